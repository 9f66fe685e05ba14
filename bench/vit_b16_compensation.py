"""Train the compressed ViT-B/16 for some minutes to follow the dense one, and count what it wins back.

    MIXRANK_DATA=FOLDER python -m mixrank_bench.vit_b16 --part strategies --models MODELS \
        --only '{"weighting": "gradient"}'
    MIXRANK_DATA=FOLDER python -m mixrank_bench.vit_b16_compensation --models MODELS

    MIXRANK_DATA=FOLDER python -m mixrank_bench.vit_b16_peers --method "mixrank, sparse" --models MODELS
    MIXRANK_DATA=FOLDER python -m mixrank_bench.vit_b16_compensation --models MODELS --form sparse

FOLDER is that of :mod:`mixrank_bench.vit_b16`. The first command of each pair writes compressed models into MODELS, low
ranks from all unlabelled images, sparse weights from 512 of them; trained models are written beside them. One JSON line
for each budget goes to ``bench/results/vit_b16_compensation.jsonl``. The training has all unlabelled images; those that
choose the best step are held out of them. ``python -m mixrank_bench.report`` makes a table of docs/accuracy.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

import torch

import mixrank
from mixrank.compensate import CompensationOptions, compensate_
from mixrank.compress import FORM
from mixrank.forms import TRIED
from mixrank.precision import fast_dtype
from mixrank_bench.environment import RESULTS, append, read
from mixrank_bench.fidelity import Reference, compare, reference
from mixrank_bench.vit_b16 import KEEPS, Data, checkpoint_of
from mixrank_bench.vit_b16_peers import OURS, kept_at

OUT = RESULTS / "vit_b16_compensation.jsonl"
MINUTES = 60.0


def untrained_of(models: Path, keep: float, form: str) -> Path:
    """Where in the folder ``models`` the compressed model of a budget is kept."""
    return checkpoint_of(models, keep) if form == FORM else kept_at(models, f"{OURS}{form}", keep)


def trained_of(models: Path, keep: float, form: str) -> Path:
    """Where in the folder ``models`` what training made of it is kept."""
    path = untrained_of(models, keep, form)
    return path.with_stem(f"{path.stem}_trained")


def measure(
    data: Data,
    test: Reference,
    models: Path,
    out: Path,
    keep: float,
    minutes: float,
    options: CompensationOptions,
    form: str = FORM,
) -> None:
    """Train the model of one budget and add its row."""
    path = untrained_of(models, keep, form)
    dense, model = data.model(), mixrank.load(path)
    before = compare(model, test)
    # Named by what the run is, so that one that was interrupted goes on and another one starts anew.
    state = models / f"{path.stem}_{minutes:g}_{options.seed}.state"
    images = (batch.images for batch in data.calibration(dense))
    result = compensate_(
        model, dense, images, minutes=minutes, options=options, dtype=fast_dtype(), state=state, progress=True
    )
    after = compare(model, test)
    row = {"kind": "compensation", "form": form, "keep": keep, "minutes": minutes, "seed": options.seed}
    row |= {"before": before.to_json(), "after": after.to_json(), "training": result.to_json()}
    append(out, row)
    mixrank.save(model, trained_of(models, keep, form))
    state.unlink(missing_ok=True)
    print(f"keep {keep}: top-1 {before.top1:.1f} to {after.top1:.1f} % in {result.steps} steps", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="the folder of the compressed models")
    parser.add_argument("--out", type=Path, default=OUT, help="the file of results, added to")
    parser.add_argument("--keep", type=float, action="append", help="only this budget (repeatable)")
    parser.add_argument("--form", choices=TRIED, default=FORM, help="of the layers")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of each training")
    parser.add_argument("--seed", type=int, default=0, help="of the random views")
    parser.add_argument("--options", type=json.loads, default={}, help="of CompensationOptions, as JSON")
    parser.add_argument("--threads", type=int, default=2, help="threads of one operation")
    args = parser.parse_args()
    if "MIXRANK_DATA" not in os.environ:
        parser.error("set MIXRANK_DATA to the folder with the model and the images")
    options = CompensationOptions(**args.options, seed=args.seed)
    options.check()
    torch.set_num_threads(args.threads)
    done = {(row.get("form", FORM), row["keep"], row["minutes"], row["seed"]) for row in read(args.out)}
    wanted = [keep for keep in args.keep or KEEPS if (args.form, keep, args.minutes, args.seed) not in done]
    missing = [path for path in (untrained_of(args.models, keep, args.form) for keep in wanted) if not path.is_file()]
    if missing:
        parser.error(f"{missing[0]} does not exist: make it by a command of --help")
    with tempfile.TemporaryDirectory() as scratch:
        data = Data(Path(os.environ["MIXRANK_DATA"]), Path(scratch))
        data.dequantize()
        dense = data.model()
        test = reference(dense, data.test(dense))
        for keep in wanted:
            measure(data, test, args.models, args.out, keep, args.minutes, options, args.form)


if __name__ == "__main__":
    main()
