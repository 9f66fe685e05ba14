"""The compressed ViT-B/16 in other runtimes: images per second of each, in turns, beside the dense model there.

    MIXRANK_DATA=FOLDER python -m mixrank_bench.vit_b16 --part strategies --models MODELS \
        --only '{"weighting": "gradient"}'
    MIXRANK_DATA=FOLDER python -m mixrank_bench.export --models MODELS

FOLDER is that of :mod:`mixrank_bench.vit_b16`, and its first command writes what the defaults of ``mixrank.compress``
make into MODELS. One JSON line for each model, runtime and batch goes to ``bench/results/export.jsonl``;
``python -m mixrank_bench.report`` makes a table of docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor, nn

import mixrank
from mixrank.evaluate import compare_speed
from mixrank.export import export_onnx, export_torch
from mixrank.plain import plain
from mixrank_bench.environment import RESULTS, append
from mixrank_bench.vit_b16 import Data, checkpoint_of

OUT = RESULTS / "export.jsonl"
KEEP = 0.5
BATCHES = (1, 8)
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


def runtimes(name: str, model: nn.Module, folder: Path, threads: int) -> dict[tuple[str, str], nn.Module]:
    """A model in every runtime, by its name and the runtime's."""
    program, onnx = folder / f"{name}.pt2", folder / f"{name}.onnx"
    export_torch(model, program)
    export_onnx(model, onnx)
    return {
        (name, OURS): model.eval(),
        (name, "PyTorch, plain products"): plain(model).eval(),
        (name, "torch.export"): Called(torch.export.load(program).module()),
        (name, "ONNX Runtime"): onnx_runtime(onnx, threads),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="the folder of the compressed models")
    parser.add_argument("--keep", type=float, default=KEEP, help="the budget of the model that is exported")
    parser.add_argument("--threads", type=int, default=2, help="threads of one operation")
    parser.add_argument("--out", type=Path, default=OUT, help="the file of results, added to")
    args = parser.parse_args()
    if "MIXRANK_DATA" not in os.environ:
        parser.error("set MIXRANK_DATA to the folder with the model and the images")
    torch.set_num_threads(args.threads)
    file = checkpoint_of(args.models, args.keep)
    if not file.is_file():
        parser.error(f"{file} does not exist: make it by the first command of --help")
    with tempfile.TemporaryDirectory() as scratch:
        data = Data(Path(os.environ["MIXRANK_DATA"]), Path(scratch))
        data.dequantize()
        found = {}
        for name, model in (("dense", data.model()), (f"keep {args.keep:g}", mixrank.load(file))):
            found |= runtimes(name, model, Path(scratch), args.threads)
        for batch in BATCHES:
            named = {" / ".join(key): model for key, model in found.items()}
            speeds = compare_speed(named, torch.randn(batch, 3, 224, 224), rounds=ROUNDS)
            for (model, runtime), key in zip(found, named, strict=True):
                append(args.out, {"kind": "export", "model": model, "runtime": runtime} | asdict(speeds[key]))


if __name__ == "__main__":
    main()
