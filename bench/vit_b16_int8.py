"""What 8-bit weights change of a real ViT-B/16, dense and compressed: agreement, divergence, top-1, bytes.

    export MIXRANK_DATA=FOLDER
    python -m mixrank_bench.vit_b16 --part strategies --only '{"weighting": "gradient"}' --models MODELS
    python -m mixrank_bench.vit_b16_int8 --models MODELS
    python -m mixrank_bench.vit_b16_peers --method "mixrank, sparse" --models MODELS
    python -m mixrank_bench.vit_b16_int8 --models MODELS --form sparse
    python -m mixrank_bench.vit_b16_compensation --models MODELS --form sparse
    python -m mixrank_bench.vit_b16_int8 --models MODELS --form sparse --trained

FOLDER is that of :mod:`mixrank_bench.vit_b16`, and the commands before write models of low ranks and of sparse weights
into MODELS. Every quantised model is compared with the same model in fp32. One JSON line for each goes to
``bench/results/vit_b16_int8.jsonl``; what is there is not measured again. ``python -m mixrank_bench.report`` makes a
table of docs/kernels/int8.md.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import tempfile
from pathlib import Path

import torch
from torch import nn

import mixrank
from mixrank.compress import FORM
from mixrank.counting import count_bytes
from mixrank.forms import TRIED
from mixrank.quantize import quantize_
from mixrank_bench.environment import RESULTS, append, read
from mixrank_bench.fidelity import Fidelity, compare, compare_logits, reference
from mixrank_bench.vit_b16 import KEEPS, Data
from mixrank_bench.vit_b16_compensation import trained_of, untrained_of

OUT = RESULTS / "vit_b16_int8.jsonl"
DENSE = "dense"
PLAIN = "fp32"
DYNAMIC = {"weights": False, "weights and activations": True}


def measure(name: str, model: nn.Module, data: Data, out: Path) -> None:
    """A model in fp32, with weights of 8 bits, and with weights and activations of 8 bits."""
    plain = reference(model, data.test(model))

    def row(kind: str, quantised: nn.Module, found: Fidelity) -> None:
        append(
            out, {"kind": "int8", "model": name, "in_8_bits": kind, "bytes": count_bytes(quantised)} | found.to_json()
        )
        print(f"{name}, {kind}: top-1 {found.top1:.1f} %", file=sys.stderr, flush=True)

    row(PLAIN, model, compare_logits(plain.logits, plain))
    for kind, dynamic in DYNAMIC.items():
        quantised = copy.deepcopy(model)
        quantize_(quantised, dynamic=dynamic)
        row(kind, quantised, compare(quantised, plain))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="the folder of the compressed models")
    parser.add_argument(
        "--keep", type=float, action="append", help="only this budget (repeatable), and the dense model"
    )
    parser.add_argument("--form", choices=TRIED, default=FORM, help="of the layers")
    parser.add_argument("--trained", action="store_true", help="what mixrank_bench.vit_b16_compensation made of them")
    parser.add_argument("--threads", type=int, default=2, help="threads of one operation")
    parser.add_argument("--out", type=Path, default=OUT, help="the file of results, added to")
    args = parser.parse_args()
    if "MIXRANK_DATA" not in os.environ:
        parser.error("set MIXRANK_DATA to the folder with the model and the images")
    torch.set_num_threads(args.threads)
    of, end = (trained_of, ", trained") if args.trained else (untrained_of, "")
    start = "" if args.form == FORM else f"{args.form} weights, "
    files = {f"{start}keep {keep}{end}": of(args.models, keep, args.form) for keep in args.keep or KEEPS}
    missing = [path for path in files.values() if not path.is_file()]
    if missing:
        parser.error(f"{missing[0]} does not exist: make it by the command before this one of --help")
    done = {row["model"] for row in read(args.out) if row["in_8_bits"] == list(DYNAMIC)[-1]}
    with tempfile.TemporaryDirectory() as scratch:
        data = Data(Path(os.environ["MIXRANK_DATA"]), Path(scratch))
        data.dequantize()
        if DENSE not in done:
            measure(DENSE, data.model(), data, args.out)
        for name, file in files.items():
            if name not in done:
                measure(name, mixrank.load(file), data, args.out)


if __name__ == "__main__":
    main()
