"""Time the operators and a model on a GPU: ``python -m mixrank_bench.gpu --save FILE``.

Ceilings come first, then the cases in the order of :mod:`mixrank_bench.gpu_cases`, with the model after those that the
bars speak of. Every case first passes the error budget on its own inputs. All variants of a case take turns within one
process, each as a CUDA graph of some calls, timed by events, in two ways:

``cold``
    every call has operands of its own, and the second-level cache is flushed before the first: weights and inputs come
    from memory, as in a model that does not fit into the cache.
``warm``
    all calls have the same operands.
``eager``
    one row: calls from Python as they come, which shows what launching costs.

``--device cpu`` sends small cases along the same way by the wall clock; its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mixrank_bench import gpu_bars, gpu_cases, gpu_ceilings, gpu_models, peers, samples
from mixrank_bench.environment import append_all, environment, gpu_environment, gpu_settings
from mixrank_bench.gpu_timing import FLUSH_BYTES, recorded, turns
from mixrank_bench.measures import SERVED
from mixrank_bench.ops import KEEPS, Case
from mixrank_bench.timing import Turn, interleaved
from mixrank_bench.variant import Variant
from mixrank_kernels import backend
from mixrank_kernels._register import bind
from mixrank_kernels._schema import SCHEMAS

FEWEST_COPIES, MOST_COPIES = 4, 32
TURN_SECONDS, CASE_SECONDS = 0.003, 4.0
SMALL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PARTS = ("ceilings", "cases", "model")


@dataclasses.dataclass(frozen=True)
class Options:
    """What ``python -m mixrank_bench.gpu`` was asked for.

    Attributes:
        device: where the cases are served.
        save: a file to add the rows to, as JSON lines.
        seconds: no case is begun later than this.
        rounds: turns of each variant.
        only: operators to time; all of them when empty.
        parts: which of ``PARTS``.
        commit: the commit of a tree without git.
    """

    device: str = "cuda"
    save: Path | None = None
    seconds: float = float("inf")
    rounds: int = 9
    only: tuple[str, ...] = ()
    parts: tuple[str, ...] = PARTS
    commit: str | None = None

    def cases(self) -> list[Case]:
        """The cases to time, those of the bars first."""
        small = (case for dtype in SMALL_DTYPES for case in samples.tiny_cases(dtype))
        found = gpu_cases.cases() if self.device == "cuda" else small
        return [case for case in found if not self.only or case.op in self.only]


def implementations(device: str, op: str) -> tuple[str, ...]:
    """Our implementations of an operator that are compared on a device; Triton's interpreter is no device."""
    left_out = ("reference",) if device == "cuda" else ("reference", "triton")
    return tuple(name for name in backend.available(device, op) if name not in left_out and not name.startswith("cpu"))


def copies(case: Case) -> int:
    """Sets of operands that a call finds none of in the cache when it comes to them again."""
    return max(FEWEST_COPIES, min(MOST_COPIES, FLUSH_BYTES // case.bytes))


def measure(case: Case, device: torch.device, rounds: int) -> Iterator[dict[str, Any]]:
    """Time one case with every variant.

    Yields:
        A row for each way to time it. ``milliseconds`` holds the timings by group and name, ``absent`` the reason of
        each peer that is missing, ``refused`` that of each variant that failed, and ``gate`` is None, or says why our
        operator has no timings.
    """
    torch.compiler.reset()
    first = case.arguments(device)
    options = {
        "compiling": _compiled(case),
        "unpacked": False,
        "engines": peers.DEVICE_ENGINES,
        "forced": serving(case, first, device),
        "rounded": True,
    }
    fields = [peers.field(case, copied(first), **options) for _ in range(copies(case))]
    verdicts = peers.verdicts(case, fields[0], first)
    refused = {key: reason for key, reason in verdicts.items() if reason}
    row = {"kind": "op", "device": device.type, "threads": None} | case.to_json() | {"absent": fields[0].absent}

    def timed(way: str, turn: Turn, play: dict[tuple[str, str], Any], calls: int) -> dict[str, Any]:
        gate = refused.get(("ours", SERVED))
        timings = interleaved(
            {} if gate else play,
            rounds=rounds,
            turn_seconds=TURN_SECONDS,
            settle_seconds=0.0,
            limit_seconds=CASE_SECONDS,
            turn=turn,
        )
        times = {key: dataclasses.asdict(timing.divided(calls)) for key, timing in timings.items()}
        told = {"gate": gate, "refused": peers.nested(refused), "milliseconds": peers.nested(times)}
        return row | {"timed": way} | told

    for way in ("cold", "warm"):
        play = {}
        for group, name in (key for key in verdicts if key not in refused):
            variants = [field.variants[group][name] for field in fields]
            calls = [variant.call for variant in (variants if way == "cold" else variants[:1] * len(variants))]
            try:
                play[group, name] = recorded(calls, device, variants[0].within)
            except Exception as error:  # what a capture forbids, and what a compiler says
                refused[group, name] = f"not captured: {peers.in_words(error)}"
        yield timed(way, turns(device, cold=way == "cold"), play, len(fields))
    if case.m == 1:
        alone = {key: fields[0].variants[key[0]][key[1]] for key in verdicts if key not in refused}

        def turn(variant: Variant, seconds: float) -> float:
            with variant.within():
                return turns(device)(variant.call, seconds)

        yield timed("eager", turn, alone, 1)


def serving(case: Case, arguments: dict[str, Tensor | None], device: torch.device) -> list[str]:
    """Those of our implementations that serve these very arguments, and do not leave them to another one."""
    found = []
    for name in implementations(device.type, case.op):
        with backend.use(name):
            if backend.explain(case.op, *bind(case.op, **arguments)).chosen == name:
                found.append(name)
    return found


@torch.inference_mode(False)
def copied(arguments: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    """The same values elsewhere, never in tensors of inference mode, whose indices are read again at each call."""
    return {name: tensor.clone() if isinstance(tensor, Tensor) else tensor for name, tensor in arguments.items()}


def _compiled(case: Case) -> bool:
    """Whether ``torch.compile`` is among the peers of a case."""
    of_bars = (case.dtype, case.keep) == (gpu_cases.BAR_DTYPE, KEEPS[0])
    return of_bars and case.m in gpu_cases.COMPILED_ROWS and case.layer in gpu_cases.COMPILED_LAYERS


def rows(options: Options) -> Iterator[list[dict[str, Any]]]:
    """Measure what was asked for; the rows of one case come together."""
    device, began = torch.device(options.device), time.monotonic()
    on_gpu = device.type == "cuda"
    if "ceilings" in options.parts:
        sizes = {} if on_gpu else {"side": 64, "footprints": (1 << 12, 1 << 14)}
        limits, beside = gpu_ceilings.measure(device, **sizes)
        yield [limits.to_json() | beside | {"device": device.type} | gpu_settings()]
    cases = options.cases() if "cases" in options.parts else []
    of_bars = set(gpu_cases.bar_cases())
    work: list[Case | None] = [case for case in cases if case in of_bars]
    work += [None] * ("model" in options.parts)
    work += [case for case in cases if case not in of_bars]
    for index, case in enumerate(work):
        if time.monotonic() - began > options.seconds:
            print(f"{len(work) - index} of {len(work)} are left out for lack of time", flush=True)
            break
        if case is not None:
            yield list(_survived(case, device, options.rounds))
            continue
        setting = gpu_models.Setting() if on_gpu else gpu_models.SMALL
        yield list(gpu_models.rows(setting, device, implementations(device.type, "lowrank_linear"), options.rounds))
    yield [{"kind": "settings", "device": device.type} | gpu_settings()]


def _survived(case: Case, device: torch.device, rounds: int) -> Iterator[dict[str, Any]]:
    """The rows of a case; one that fails as a whole says why, unless the device is lost with it."""
    try:
        yield from measure(case, device, rounds)
    except Exception as error:
        if device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        row = {"kind": "op", "device": device.type, "threads": None, "timed": "cold"} | case.to_json()
        yield row | {"absent": {}, "refused": {}, "gate": peers.in_words(error), "milliseconds": {}}


def run(options: Options) -> bool:
    """Time what was asked for, print it, and return whether all of our implementations passed every gate."""
    header = environment(options.commit) | (gpu_environment() if options.device == "cuda" else {})
    run_id = f"{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%SZ}-{header['commit']}"
    print(", ".join(f"{name} {value}" for name, value in header.items()), flush=True)
    kept: list[dict[str, Any]] = []
    with torch.inference_mode():
        for together in rows(options):
            together = [{"run": run_id} | row for row in together]
            kept += together
            if options.save:
                append_all(options.save, together, header)
            for row in together:
                print(in_one_line(row), flush=True)
    for line in gpu_bars.judge(kept):
        print(line, flush=True)
    failed = [row for row in kept if row["kind"] in ("op", "model") and (row["gate"] or row["refused"].get("ours"))]
    for row in failed:
        what = f"{row.get('op', row['kind'])} {row['dtype']} {row['case']} {row['timed']}"
        print(f"failed: {what}: {row['gate'] or row['refused']['ours']}", file=sys.stderr)
    return not failed


def in_one_line(row: dict[str, Any]) -> str:
    """A row for the eye: microseconds of each variant."""
    if row["kind"] not in ("op", "model"):
        return ", ".join(f"{name} {value}" for name, value in row.items() if name != "run")
    what = f"{row.get('op', row['kind'])} {row['dtype']} {row['case']} {row['timed']}"
    if row["gate"]:
        return f"{what}: no number, {row['gate']}"
    groups = (
        f"{group}: " + ", ".join(f"{name} {1e3 * timing['median']:.1f}" for name, timing in named.items())
        for group, named in row["milliseconds"].items()
    )
    return f"{what}, µs: {'; '.join(groups)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="where the cases are served")
    parser.add_argument("--save", type=Path, help="a file to add the rows to, as JSON lines")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no case later than this")
    parser.add_argument("--rounds", type=int, default=Options.rounds, help="turns of each variant")
    parser.add_argument("--only", choices=tuple(SCHEMAS), action="append", help="only this operator (repeatable)")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part (repeatable)")
    parser.add_argument("--commit", help="the commit of a tree without git, with a + where it was changed")
    args = parser.parse_args()
    if args.rounds < 1:
        parser.error(f"--rounds must be at least 1, but it was {args.rounds}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device must be cpu where PyTorch finds no CUDA device, but it was cuda")
    options = Options(
        args.device,
        args.save,
        args.seconds,
        args.rounds,
        tuple(args.only or ()),
        tuple(args.part or PARTS),
        args.commit,
    )
    sys.exit(0 if run(options) else 1)


if __name__ == "__main__":
    main()
