"""The compressed ViT-B/16 in other runtimes: images per second of each, in turns, beside the dense model there.

    python -m mixrank_bench.export

The compressed model has the ranks that the defaults of ``mixrank.compress`` gave the real one, in their form, by
``bench/results/vit_b16.jsonl``; the weights are random, as only shapes count. One JSON line for each model, runtime and
batch goes to ``bench/results/export.jsonl``; ``python -m mixrank_bench.report`` makes a table of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

from mixrank.apply import apply_
from mixrank.decompose import decompose
from mixrank.evaluate import compare_speed
from mixrank.export import export_onnx, export_torch
from mixrank.models import create_model, twin
from mixrank.plain import plain
from mixrank_bench import vit_b16
from mixrank_bench.environment import RESULTS, append, read

OUT = RESULTS / "export.jsonl"
KEEP = 0.5
BATCHES = (1, 8)
SHAPE = (3, 224, 224)
OURS = "mixrank"
ROUNDS = 9


class Called(nn.Module):
    """What another runtime computes, as a module that can be timed among others."""

    def __init__(self, call) -> None:
        super().__init__()
        self.call = call
        self.place = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        return self.call(images)


def onnx_runtime(path: Path, threads: int) -> Called:
    """An ONNX file in ONNX Runtime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return Called(lambda images: torch.from_numpy(session.run(None, {name: images.numpy()})[0]))


def torch_program(path: Path) -> Called:
    """A ``torch.export`` program. It refuses a change of mode, so it must not be a part of another module."""
    program = torch.export.load(path).module()
    return Called(lambda images: program(images))


def runtimes(name: str, model: nn.Module, folder: Path, threads: int) -> dict[tuple[str, str], nn.Module]:
    """A model in every runtime, by its name and the runtime's."""
    program, onnx = folder / f"{name}.pt2", folder / f"{name}.onnx"
    export_torch(model, program)
    export_onnx(model, onnx)
    return {
        (name, OURS): model.eval(),
        (name, "PyTorch, plain products"): plain(model).eval(),
        (name, "torch.export"): torch_program(program),
        (name, "ONNX Runtime"): onnx_runtime(onnx, threads),
    }


def models(keep: float) -> dict[str, nn.Module]:
    """The dense model and the compressed one."""
    dense = create_model(vit_b16.ARCHITECTURE)
    factorisations = decompose(dense, factors="svd", centre=False)
    plan = vit_b16.low_rank_plans(dense, factorisations, read(vit_b16.OUT))[keep]
    return {"dense": dense, f"keep {keep:g}": apply_(twin(dense), plan, factorisations)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--keep", type=float, choices=vit_b16.KEEPS, default=KEEP, help="the budget of the compressed one"
    )
    parser.add_argument("--threads", type=int, default=2, help="threads of one operation")
    parser.add_argument("--out", type=Path, default=OUT, help="the file of results, added to")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as scratch:
        found = {}
        for name, model in models(args.keep).items():
            found |= runtimes(name, model, Path(scratch), args.threads)
        for batch in BATCHES:
            named = {" / ".join(key): model for key, model in found.items()}
            speeds = compare_speed(named, torch.randn(batch, *SHAPE), rounds=ROUNDS)
            for (model, runtime), key in zip(found, named, strict=True):
                append(args.out, {"kind": "export", "model": model, "runtime": runtime} | asdict(speeds[key]))


if __name__ == "__main__":
    main()
