"""Train the demo's vision transformer on Fashion-MNIST and write the assets that ship with the package.

    python -m mixrank.demo.train --data /usr/share/datasets/fashion-mnist

``--data`` is a folder with the four IDX files of Fashion-MNIST (Debian's ``dataset-fashion-mnist``
package installs them there). The seed is fixed; eight epochs take two idle cores about 40 minutes. The last 1,000
training images are held out: they become the demo's unlabelled calibration images. With ``--depth 12 --patch-size 7
--out FOLDER`` the same recipe trains the second model of docs/accuracy.md.
"""

from __future__ import annotations

import argparse
import gzip
import math
import pathlib
import time

import numpy as np
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from mixrank.demo import ARCHITECTURE, ASSETS, IMAGES, MEAN, MODEL_ARGS, STD, WEIGHTS
from mixrank.precision import multiplies_bfloat16

CALIBRATION_IMAGES, TEST_IMAGES = 1000, 2000


def read_idx(path: pathlib.Path) -> np.ndarray:
    """Read one gzipped IDX file of unsigned bytes (the format of MNIST) into an array of its own shape."""
    raw = gzip.decompress(path.read_bytes())
    zero, kind, dims = raw[:2], raw[2], raw[3]
    if zero != b"\0\0" or kind != 8:
        raise ValueError(f"{path} is not an IDX file of unsigned bytes")
    shape = np.frombuffer(raw, ">i4", dims, 4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(shape)


def read_fashion_mnist(folder: pathlib.Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Training images ``[60000, 28, 28]`` uint8 and labels int64, then those of the test set (10,000)."""
    files = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    images, labels, test_images, test_labels = (
        torch.from_numpy(read_idx(folder / f"{name}-ubyte.gz").copy()) for name in files
    )
    return images, labels.long(), test_images, test_labels.long()


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shift by up to two pixels, flip left-right, and erase one random square: uint8 ``[B, 28, 28]`` in and out."""
    count, size = images.shape[0], images.shape[-1]
    padded = F.pad(images, (2, 2, 2, 2))
    offsets = torch.randint(0, 5, (count, 2), generator=generator)
    steps = torch.arange(size)
    rows, columns = offsets[:, :1] + steps, offsets[:, 1:] + steps
    flip = torch.rand(count, generator=generator) < 0.5
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    shifted = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    corner = torch.randint(-4, size, (count, 2), generator=generator)
    extent = torch.randint(0, 12, (count, 2), generator=generator)
    inside = (steps >= corner[..., None]) & (steps < (corner + extent)[..., None])
    erased = inside[:, 0, :, None] & inside[:, 1, None, :]
    return shifted.masked_fill(erased, 0)


def normalise(images: torch.Tensor) -> torch.Tensor:
    """uint8 ``[B, 28, 28]`` to the model's float ``[B, 1, 28, 28]``."""
    return (images.float() / 255 - MEAN).div_(STD).unsqueeze(1)


@torch.inference_mode()
def top1(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    hits = [
        (model(normalise(x)).argmax(1) == y).sum() for x, y in zip(images.split(500), labels.split(500), strict=True)
    ]
    return 100 * sum(hits).item() / len(labels)


def train(
    images: torch.Tensor, labels: torch.Tensor, model_args: dict, epochs: int, batch: int, seed: int
) -> torch.nn.Module:
    """AdamW with a warm-up and a cosine, label smoothing 0.1, bf16 autocast, weight averaging over the tail."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model = timm.create_model(ARCHITECTURE, drop_path_rate=0.05, **model_args).train()
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998), use_buffers=True
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.05, betas=(0.9, 0.98), fused=True)
    steps = epochs * (len(images) // batch)
    warm_up = steps // 20
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda s: s / warm_up if s < warm_up else 0.5 * (1 + math.cos(math.pi * (s - warm_up) / (steps - warm_up))),
    )
    started = time.monotonic()
    for epoch in range(epochs):
        total = 0.0
        order = torch.randperm(len(images), generator=generator)
        chunks = order.split(batch)[: len(images) // batch]
        for chunk in chunks:
            x = normalise(augment(images[chunk], generator))
            with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bfloat16()):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), labels[chunk], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            average.update_parameters(model)
            total += loss.item()
        print(
            f"epoch {epoch + 1}/{epochs}  loss {total / len(chunks):.4f}  {time.monotonic() - started:.0f} s",
            flush=True,
        )
    return average.module.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=pathlib.Path, required=True, help="folder with the four IDX files")
    parser.add_argument("--out", type=pathlib.Path, default=ASSETS, help="where the assets go")
    parser.add_argument(
        "--depth", type=int, default=MODEL_ARGS["depth"], help="blocks of the model (default: %(default)s)"
    )
    parser.add_argument(
        "--patch-size", type=int, default=MODEL_ARGS["patch_size"], help="pixels (default: %(default)s)"
    )
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    train_images, train_labels, test_images, test_labels = read_fashion_mnist(args.data)
    kept = len(train_images) - CALIBRATION_IMAGES
    model_args = MODEL_ARGS | {"depth": args.depth, "patch_size": args.patch_size}
    model = train(train_images[:kept], train_labels[:kept], model_args, args.epochs, args.batch, args.seed)

    args.out.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, args.out / WEIGHTS)
    np.savez_compressed(
        args.out / IMAGES,
        calibration_images=train_images[kept:].numpy(),
        test_images=test_images[:TEST_IMAGES].numpy(),
        test_labels=test_labels[:TEST_IMAGES].byte().numpy(),
    )
    model.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    print(f"top-1 on all {len(test_images)} test images {top1(model, test_images, test_labels):.2f} %")


if __name__ == "__main__":
    main()
