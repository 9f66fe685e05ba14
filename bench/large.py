"""A model that is large for this machine: minutes and memory of ``mixrank compress``, defaults throughout.

    python -m mixrank_bench.large                       # ViT-L/16, random weights, 256 random images
    python -m mixrank_bench.large --dtype bfloat16

The command runs in a process of its own, whose highest resident memory is what counts, with that of the processes that
decode. One JSON line goes to ``bench/results/large.jsonl``; ``python -m mixrank_bench.report`` makes a table of
docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from mixrank.counting import count_parameters
from mixrank.models import create_model
from mixrank_bench.environment import RESULTS, append

OUT = RESULTS / "large.jsonl"
MODEL = "vit_large_patch16_224"
IMAGES = 256


def make(folder: Path, model: str, images: int) -> int:
    """Weights and images of a command; returns the number of parameters."""
    torch.manual_seed(0)
    made = create_model(model)
    save_file(made.state_dict(), folder / "weights.safetensors")
    source = np.random.default_rng(0)
    (folder / "images").mkdir()
    for number in range(images):
        coarse = Image.fromarray(source.integers(0, 256, (16, 16, 3), dtype=np.uint8))
        coarse.resize((256, 256), Image.Resampling.BICUBIC).save(folder / "images" / f"{number}.png")
    return count_parameters(made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--images", type=int, default=IMAGES)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=OUT, help="the file of results, added to")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        # A program takes over the peak of the one that starts it, so this one stays small.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
            parameters = executor.submit(make, folder, args.model, args.images).result()
        command = [sys.executable, "-m", "mixrank", "compress", "--model", args.model, "--keep", "0.5"]
        command += ["--form", "pivoted"]
        command += ["--weights", str(folder / "weights.safetensors"), "--images", str(folder / "images")]
        command += ["--out", str(folder / "out.safetensors"), "--json", str(folder / "out.json"), "--dtype", args.dtype]
        started = time.perf_counter()
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": str(args.threads)})
        seconds = time.perf_counter() - started
        told = json.loads((folder / "out.json").read_text())
    peak = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    row = {"kind": "large", "model": args.model, "images": args.images, "dtype": args.dtype, "parameters": parameters}
    row |= {"seconds": seconds, "peak_bytes": peak, "times": told["times"], "threads_used": args.threads}
    append(args.out, row)
    print(f"{args.model}: {seconds / 60:.1f} minutes, {peak / 2**30:.2f} GiB at most", file=sys.stderr)


if __name__ == "__main__":
    main()
