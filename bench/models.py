"""Whole models, dense against compressed: ``python -m mixrank_bench.models``.

Vision transformers of timm with random weights, since only speed and memory count here; ranks are mixed, from the
plain SVD of the weights, which needs no images. Every variant serves in a process of its own, and the variants of one
model, dtype and batch take turns. ``--save`` adds rows to a file; ``python -m mixrank_bench.report`` makes tables of
``bench/results/models.jsonl``.

``eager``
    the model as timm or mixrank builds it.
``compile``
    ``torch.compile`` for this very batch, with the weights frozen into the graph.
``prepacked``
    the dense model with oneDNN's prepacked weights in every linear layer: what a careful user would do without us.

``peak_megabytes`` is the highest resident memory while a process answers calls, the interpreter and its libraries
included, but not what loading, packing and compiling took before the first answer.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import datetime
import itertools
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import mixrank
from mixrank.counting import count_parameters
from mixrank.models import preprocessing
from mixrank_bench import engines
from mixrank_bench.environment import RESULTS, append_all, busy, environment
from mixrank_bench.memory import peak_megabytes, reset_peak
from mixrank_bench.timing import Timing, interleaved
from mixrank_kernels import backend

OUT = RESULTS / "models.jsonl"
MODELS = ("vit_small_patch16_224", "vit_base_patch16_224")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TURN_SECONDS, LIMIT_SECONDS = 0.2, 60.0
LOGIT_ERROR = {"float32": 1e-5, "bfloat16": 0.05}
"""The largest relative root mean square error of logits against the reference in fp32: a few times what was seen."""


@dataclass(frozen=True)
class Options:
    """What is measured.

    Attributes:
        models: names of timm.
        arguments: further arguments of ``timm.create_model``.
        keeps: shares of the parameters that the compressed models keep.
        dtypes: names of the dtypes.
        modes: of the dense model; the compressed ones have no ``prepacked``, as they pack their factors in any mode.
        batches: images of one call.
        threads: threads of one operation.
        rounds: turns of each variant.
    """

    models: tuple[str, ...] = MODELS
    arguments: dict[str, Any] = field(default_factory=dict)
    keeps: tuple[float, ...] = (0.6, 0.4)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    modes: tuple[str, ...] = ("eager", "compile", "prepacked")
    batches: tuple[int, ...] = (1, 8)
    threads: int = 1
    rounds: int = 7


@dataclass(frozen=True)
class Variant:
    """One model in one mode; ``keep`` is None for the dense model."""

    keep: float | None
    mode: str

    def __str__(self) -> str:
        return f"{'dense' if self.keep is None else f'keep {self.keep:g}'}, {self.mode}"


@dataclass(frozen=True)
class Served:
    """A model as it is handed to the processes that serve it.

    Attributes:
        paths: its checkpoint by the name of the dtype.
        parameters: how many it has.
        logits: [B, classes], what the reference computes in fp32 for the images of the largest batch.
    """

    paths: dict[str, Path]
    parameters: int
    logits: Tensor


class PrepackedLinear(nn.Module):
    """An ``nn.Linear`` that holds its weight only in oneDNN's own layout, the one for the rows of the first call."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias, self.packed = linear.weight, linear.bias, None

    def forward(self, x: Tensor) -> Tensor:  # [..., K] -> [..., N]
        if self.packed is None:
            rows = x.numel() // x.shape[-1]
            self.packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), rows)
            self.weight = None
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


def prepacked(model: nn.Module) -> nn.Module:
    """Replace every linear layer of the model, in place, by one with prepacked weights."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            model.set_submodule(name, PrepackedLinear(module))
    return model


MODES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "eager": lambda model: model,
    "compile": lambda model: torch.compile(model, dynamic=False, options={"freezing": True}),
    "prepacked": prepacked,
}


def variants(options: Options, dtype: str) -> list[Variant]:
    """Everything that takes turns on one model, but for what this processor does not have."""
    others = [mode for mode in options.modes if mode != "prepacked"]
    dense = options.modes if engines.reorders(DTYPES[dtype]) else others
    compressed = itertools.product(options.keeps, others)
    return [Variant(None, mode) for mode in dense] + [Variant(keep, mode) for keep, mode in compressed]


def images_of(model: nn.Module, batch: int) -> Tensor:
    """The same random images in every process: [B, C, H, W]; those of a smaller batch are the first of a larger one."""
    shape = preprocessing(model)["input_size"]
    generator = torch.Generator().manual_seed(1)
    return torch.cat([torch.randn(1, *shape, generator=generator) for _ in range(batch)])


def prepare(name: str, options: Options, folder: Path) -> dict[float | None, Served]:
    """Build the dense and the compressed models, and write them to ``folder`` in every dtype."""
    torch.manual_seed(0)
    dense = mixrank.create_model(name, args=options.arguments)
    factorisations = mixrank.decompose(dense, factors="svd")
    served = {}
    for keep in (None, *options.keeps):
        model, plan = copy.deepcopy(dense), None
        if keep is not None:
            plan = mixrank.allocate(dense, factorisations, keep=keep)
            mixrank.apply_(model, plan, factorisations)
        with torch.inference_mode(), backend.use("reference"):
            logits = model(images_of(model, max(options.batches)))
        paths = {dtype: folder / f"{name}-{keep}-{dtype}.safetensors" for dtype in options.dtypes}
        for dtype, path in paths.items():
            mixrank.save(model.to(DTYPES[dtype]), path, plan=plan)
        served[keep] = Served(paths, count_parameters(model), logits)
    return served


def serve(connection: Connection, path: Path, mode: str, batch: int, threads: int) -> None:
    """The body of a process: load, answer once, then once for each True; a False ends it with the peak of memory."""
    torch.set_num_threads(threads)
    model = mixrank.load(path)
    images = images_of(model, batch).to(next(model.parameters()).dtype)
    model = MODES[mode](model)
    with torch.inference_mode():
        connection.send(model(images).float().numpy())
        reset_peak()
        while connection.recv():
            model(images)
            connection.send(None)
    connection.send(peak_megabytes())


class Server:
    """A process that serves one variant; used as a context manager."""

    def __init__(self, path: Path, mode: str, batch: int, threads: int, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=serve, name=name, args=(other, path, mode, batch, threads))
        self.process.start()
        other.close()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_details: object) -> None:
        if kind is not None:
            self.process.terminate()
        self.process.join()

    def first(self) -> Tensor:
        """Wait for the first answer: logits [B, classes]."""
        return torch.from_numpy(self._receive())

    def call(self) -> None:
        """Let it answer once more."""
        self.connection.send(True)
        self._receive()

    def peak(self) -> float | None:
        """End it and return the peak of its memory in megabytes."""
        self.connection.send(False)
        return self._receive()

    def _receive(self) -> Any:
        try:
            return self.connection.recv()
        except EOFError:
            raise RuntimeError(f"{self.process.name} ended without an answer; its error stands above") from None


def gate(variant: Variant, dtype: str, actual: Tensor, expected: Tensor) -> None:
    """Raise AssertionError unless a variant computes the logits of the reference."""
    error = ((actual - expected).square().mean() / expected.square().mean()).sqrt().item()
    allowed = LOGIT_ERROR[dtype]
    assert error <= allowed, f"{variant}, {dtype}: the logits are {error:.1e} from the reference, allowed {allowed:.1e}"


def measure(served: dict[float | None, Served], dtype: str, batch: int, options: Options) -> dict[Variant, dict]:
    """Let all variants of one model take turns.

    Returns:
        The measured part of each variant's row.
    """
    with contextlib.ExitStack() as stack:
        servers: dict[Variant, Server] = {}
        for variant in variants(options, dtype):
            path = served[variant.keep].paths[dtype]
            server = Server(path, variant.mode, batch, options.threads, name=f"the process of {variant}, {dtype}")
            servers[variant] = stack.enter_context(server)
        for variant, server in servers.items():
            gate(variant, dtype, server.first(), served[variant.keep].logits[:batch])
        calls = {variant: server.call for variant, server in servers.items()}
        timings = interleaved(calls, rounds=options.rounds, turn_seconds=TURN_SECONDS, limit_seconds=LIMIT_SECONDS)
        return {
            variant: rates(timing, batch) | {"peak_megabytes": servers[variant].peak()}
            for variant, timing in timings.items()
        }


def rates(timing: Timing, batch: int) -> dict[str, float]:
    """Images per second: the median, and the slowest and the fastest round."""
    return {
        "images_per_second": 1e3 * batch / timing.median,
        "low": 1e3 * batch / timing.high,
        "high": 1e3 * batch / timing.low,
    }


def rows(options: Options) -> Iterator[dict[str, Any]]:
    """Measure everything; the rows of one model, dtype and batch come together."""
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            served = prepare(name, options, Path(folder))
            for dtype, batch in itertools.product(options.dtypes, options.batches):
                for variant, measured in measure(served, dtype, batch, options).items():
                    yield {
                        "kind": "model",
                        "model": name,
                        "keep": variant.keep,
                        "mode": variant.mode,
                        "batch": batch,
                        "threads": options.threads,
                        "dtype": dtype,
                        "parameters": served[variant.keep].parameters,
                    } | measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="NAME", help=f"names of timm (default: {' '.join(MODELS)})")
    parser.add_argument("--threads", type=int, default=1, help="threads of one operation")
    parser.add_argument("--rounds", type=int, default=7, help="turns of each variant")
    parser.add_argument("--quick", action="store_true", help=f"only {MODELS[0]}, keep 0.4 and batch 8")
    parser.add_argument("--save", type=Path, nargs="?", const=OUT, help=f"add the rows to a file ({OUT.name})")
    parser.add_argument("--busy", action="store_true", help="measure although the machine is busy")
    args = parser.parse_args()
    for option in ("threads", "rounds"):
        if getattr(args, option) < 1:
            parser.error(f"--{option} must be at least 1, but it was {getattr(args, option)}")
    reason = None if args.busy else busy()
    if reason:
        parser.error(f"{reason}: timings would mean nothing; wait, or pass --busy to have them all the same")
    options = Options(tuple(args.models or MODELS), threads=args.threads, rounds=args.rounds)
    if args.quick:
        options = dataclasses.replace(options, models=tuple(args.models or MODELS[:1]), keeps=(0.4,), batches=(8,))
    torch.set_num_threads(args.threads)

    header = environment()
    run = f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}-{header['commit']}"
    console = Console()
    console.print(header, highlight=False)
    table = Table("model", "", "dtype", "batch", "images/s", "range", "peak memory, MB")
    for row in rows(options):
        if args.save:
            append_all(args.save, [{"run": run} | row], header)
        peak = "-" if row["peak_megabytes"] is None else f"{row['peak_megabytes']:.0f}"
        speed, spread = f"{row['images_per_second']:.2f}", f"{row['low']:.2f} - {row['high']:.2f}"
        variant = Variant(row["keep"], row["mode"])
        table.add_row(row["model"], str(variant), row["dtype"], str(row["batch"]), speed, spread, peak)
    console.print(table)


if __name__ == "__main__":
    main()
