"""Unified compression of the embedded model on Fashion-MNIST: half of its multiply-adds, in minutes on two cores.

    python -m mixrank.demo.uvc --data /usr/share/datasets/fashion-mnist --out vit_50.safetensors

``--data`` is a folder with the four IDX files of Fashion-MNIST, as for :mod:`mixrank.demo.train`. The model that ships
with the package is compressed on the training images but the last 1,000, and measured on all 10,000 test images, which
decide nothing. An interrupted run goes on where it was when it is started again.
"""

from __future__ import annotations

import argparse
import pathlib

import torch

from mixrank import checkpoint
from mixrank.cli_output import versions, write_json
from mixrank.demo import ASSETS
from mixrank.demo.run import batches, load_model
from mixrank.demo.train import CALIBRATION_IMAGES, augment, normalise, read_fashion_mnist
from mixrank.errors import InputError
from mixrank.files import check_writable
from mixrank.precision import fast_dtype
from mixrank.run_uvc import shares
from mixrank.uvc.data import TensorData
from mixrank.uvc.options import UVCOptions, UVCResult
from mixrank.uvc.run import compress_uvc_

BATCH = 128
EPOCHS = 2.0


def compress(
    data: pathlib.Path, options: UVCOptions, assets: pathlib.Path, state: pathlib.Path | None, progress: bool
) -> tuple[torch.nn.Module, UVCResult]:
    """The embedded model after unified compression, and what that did."""
    images, labels, test_images, test_labels = read_fashion_mnist(data)
    kept = len(images) - CALIBRATION_IMAGES
    model = load_model(assets)
    training = TensorData(
        images[:kept], labels[:kept], BATCH, lambda x, generator: normalise(augment(x, generator)), seed=options.seed
    )
    result = compress_uvc_(
        model,
        training,
        options=options,
        validation=batches(test_images, test_labels),
        dtype=fast_dtype(),
        state=state,
        progress=progress,
    )
    return model, result


def summary(result: UVCResult) -> str:
    """What a run did, in a few lines."""
    return (
        f"{shares(result)}\n"
        f"blocks  {len(result.blocks)} remain\n"
        f"top-1   {result.before:.2f} %, {result.landed:.2f} % when the groups were removed, "
        f"{result.after:.2f} % after training\n"
        f"time    {result.seconds / 60:.1f} minutes, {result.steps} steps"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder with the four IDX files")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="the checkpoint to write")
    parser.add_argument("--json", type=pathlib.Path, help="also write the result to this file")
    parser.add_argument("--assets", type=pathlib.Path, default=ASSETS, help="folder with another model of its kind")
    parser.add_argument("--budget", type=float, default=0.5, help="share of the multiply-adds that may remain")
    parser.add_argument("--epochs", type=float, default=EPOCHS)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    state = args.out.with_name(f"{args.out.name}.state")
    try:
        check_writable(args.out, "--out")
        options = UVCOptions(budget=args.budget, epochs=args.epochs, seed=args.seed)
        model, result = compress(args.data, options, args.assets, state, progress=True)
        checkpoint.save(model, args.out)
        if args.json is not None:
            write_json(args.json, {"command": "uvc", "result": result.to_json(), "versions": versions()})
    except InputError as error:
        parser.error(str(error))
    state.unlink(missing_ok=True)
    print(summary(result))


if __name__ == "__main__":
    main()
