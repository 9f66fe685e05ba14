"""What hostile input is given to: each target makes one case out of random numbers, and tries it."""

from __future__ import annotations

import io
import json
import random
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import mixrank
from mixrank import InputError, checkpoint
from mixrank.cli_output import read_result, to_json_text
from mixrank.labels import read_labels
from mixrank.models import create_model
from mixrank.prepare import Prepare
from mixrank.report import write_report
from mixrank.uvc.recipe import read_recipe
from mixrank.uvc.shrink import KeptBlock, shrink_
from mixrank_kernels import ops, testing

Attempt = Callable[[random.Random], None]


@dataclass(frozen=True)
class Target:
    """Something that takes input of strangers.

    Attributes:
        prepare: makes in a folder what all cases share, and returns what tries one.
        promised: the errors that bad input may end in.
    """

    prepare: Callable[[Path], Attempt]
    promised: tuple[type[Exception], ...] = (InputError,)


NASTY: tuple[Any, ...] = (
    None, True, -1, 0, 1, 2**31, 2**63, -(2**63), 10**30, 1e308, float("nan"), float("inf"), "", "\x00", "NaN",
    "../../etc/passwd", "/dev/zero", "a" * 5000, "__class__", "torch.nn.Linear", "𝄞", "\xff", [], {}, [[]], {"": {}},
    [0] * 1000,
)  # fmt: skip


def mutated(data: bytes, source: random.Random) -> bytes:
    """Some bytes of a file changed, lost, doubled or moved."""
    data = bytearray(data)
    for _ in range(source.choice((1, 1, 2, 4, 16))):
        place = source.randrange(len(data) + 1)
        length = source.choice((1, 1, 2, 8, 64, 1024))
        match source.randrange(6):
            case 0:
                data[place : place + length] = source.randbytes(length)
            case 1:
                del data[place:]
            case 2:
                del data[place : place + length]
            case 3:
                data[place:place] = data[place : place + length] * source.choice((1, 2, 50))
            case 4:
                data[place : place + 1] = bytes([source.choice((0, 1, 127, 128, 255))])
            case 5:
                number = source.choice((0, 1, -1, 2**31 - 1, -(2**31), 2**24))
                data[place : place + 4] = struct.pack(source.choice("<>") + "i", number)
    return bytes(data)


def twisted(value: Any, source: random.Random) -> Any:
    """Something in a value of JSON replaced by what nobody expects, lost, renamed, or of another type."""
    if isinstance(value, dict) and value and source.random() < 0.85:
        key = source.choice(list(value))
        changed = dict(value)
        match source.randrange(8):
            case 0:
                del changed[key]
            case 1:
                changed[str(source.choice(NASTY))[:100]] = changed.pop(key)
            case 2:
                changed[key] = source.choice(NASTY)
            case _:
                changed[key] = twisted(value[key], source)
        return changed
    if isinstance(value, list) and value and source.random() < 0.85:
        place, changed = source.randrange(len(value)), list(value)
        match source.randrange(6):
            case 0:
                del changed[place]
            case 1:
                changed.insert(place, changed[place])
            case 2:
                changed[place] = source.choice(NASTY)
            case _:
                changed[place] = twisted(value[place], source)
        return changed
    if isinstance(value, str) and source.random() < 0.3:
        try:
            inner = json.loads(value)
        except ValueError:
            inner = None
        if isinstance(inner, dict | list):
            return json.dumps(twisted(inner, source))
    if isinstance(value, int) and not isinstance(value, bool) and source.random() < 0.5:
        return value + source.choice((-1, 1, 2, 1000, -1000))
    return source.choice(NASTY)


_SMALL = {"img_size": 16, "depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 3}


def _checkpoints(folder: Path) -> Attempt:
    """Small checkpoints of every kind of layer, their bytes or their headers changed."""
    files = []
    for number, form in enumerate(("factors", "pivoted", "int8", "int8 sparse", "pruned")):
        torch.manual_seed(number)
        model = create_model("vit_tiny_patch16_224", args=_SMALL)
        if form == "pruned":
            shrink_(model, [KeptBlock((tuple(range(16)), ()), tuple(range(20))), None])
        elif form == "int8 sparse":
            mixrank.compress(model, [torch.randn(6, 3, 16, 16)], keep=0.7, form="sparse")
        else:
            images = [torch.randn(6, 3, 16, 16)]
            mixrank.compress(
                model, images, keep=0.7, form="factors" if form == "factors" else "pivoted", energy="weight"
            )
        if "int8" in form:
            mixrank.quantize_(model)
        mixrank.save(model, folder / form)
        files.append((folder / form).read_bytes())
    path = folder / "case.safetensors"

    def attempt(source: random.Random) -> None:
        data = source.choice(files)
        if source.random() < 0.5:
            path.write_bytes(mutated(data, source))
        else:
            length = struct.unpack("<Q", data[:8])[0]
            header = json.loads(data[8 : 8 + length])
            for _ in range(source.choice((1, 1, 2, 5))):
                header = twisted(header, source)
            text = json.dumps(header)
            if source.random() < 0.1:  # a name twice
                name = json.dumps(source.choice(list(json.loads(data[8 : 8 + length]))))
                text = text[:-1] + f", {name}: " + json.dumps(source.choice(NASTY)) + "}"
            raw = text.encode("utf-8", "surrogatepass")
            told = (
                len(raw) if source.random() < 0.9 else source.choice((0, 1, 2**40, 2**63, len(raw) - 1, len(raw) + 7))
            )
            path.write_bytes(struct.pack("<Q", told) + raw + data[8 + length :])
        checkpoint.read_header(path)
        mixrank.load(path)

    return attempt


def _labels(folder: Path) -> Attempt:
    """A CSV file of labels."""
    names = [f"class/{number}.png" for number in range(20)]
    good = "file,label\n" + "".join(f"{name},{number % 3}\n" for number, name in enumerate(names))
    path = folder / "labels.csv"

    def attempt(source: random.Random) -> None:
        path.write_bytes(mutated(good.encode(), source))
        found = read_labels(path, names, folder)
        assert len(found) == len(names)

    return attempt


def _images(folder: Path) -> Attempt:
    """Files of images of many formats, modes and shapes, whole and broken."""
    del folder
    config = {"input_size": [3, 32, 32], "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3}
    prepare = Prepare(config | {"crop_pct": 0.9, "crop_mode": "center"})
    pixels = np.random.default_rng(0)
    modes = ("RGB", "L", "P", "RGBA", "1", "CMYK", "I;16", "LA", "F", "I")
    files = []
    for mode in modes:
        for size in ((1, 1), (7, 5), (40, 30), (1, 300), (3000, 2)):
            image = Image.fromarray(pixels.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert("RGB")
            image = image.convert("L").convert(mode) if mode in ("I;16", "F", "I") else image.convert(mode)
            for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"):
                buffer = io.BytesIO()
                try:
                    image.save(buffer, kind)
                except (OSError, ValueError, KeyError):  # not every format has every mode
                    continue
                files.append(buffer.getvalue())
    # A bomb: 30,000 x 30,000 pixels in few bytes.
    buffer = io.BytesIO()
    Image.new("1", (30000, 30000)).save(buffer, "PNG", optimize=True)
    files += [buffer.getvalue()] * 3

    def attempt(source: random.Random) -> None:
        data = source.choice(files)
        if source.random() < 0.8:
            data = mutated(data, source)
        try:
            found = prepare(io.BytesIO(data))
        except Exception as error:  # a data set tells of any error of a decoder, and goes on
            raise InputError(str(error)) from error
        assert found.shape == (3, 32, 32)

    return attempt


_DTYPES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.float64,
    torch.int8,
    torch.int64,
    torch.int16,
    torch.bool,
)


def _operators(folder: Path) -> Attempt:
    """Arguments of the operators, of right and wrong shapes, dtypes, strides and devices, some values not finite."""
    del folder

    def tensor(source: random.Random, sizes: list[int], dtype: torch.dtype) -> Any:
        if source.random() < 0.03:
            return source.choice((None, 1.0, "x", [1]))
        if source.random() < 0.1:
            sizes = [source.choice((0, 1, 2, 3, 7, 16, 33)) for _ in range(source.randrange(5))]
        if source.random() < 0.08:
            dtype = source.choice(_DTYPES)
        made = torch.empty(sizes, dtype=dtype, device="meta" if source.random() < 0.02 else "cpu")
        if made.device.type == "cpu":
            made = made.copy_(torch.randn(sizes) * source.choice((1.0, 1.0, 100.0)))
            if made.is_floating_point() and made.numel() and source.random() < 0.05:
                made.view(-1)[source.randrange(made.numel())] = source.choice((float("nan"), float("inf"), 1e38))
        if made.dim() > 1 and source.random() < 0.2:
            made = made.transpose(-1, -2).contiguous().transpose(-1, -2)
        if made.dim() and source.random() < 0.1:
            made = made.repeat_interleave(2, -1)[..., ::2]
        return made

    def attempt(source: random.Random) -> None:
        def of(*sizes: int, dtype: torch.dtype | None = None) -> Any:
            return tensor(source, list(sizes), dtype or kind)

        kind = source.choice(_DTYPES[:4])
        k, n, m = (source.choice((1, 2, 3, 16, 17, 64, 100)) for _ in range(3))
        r = source.choice((1, 2, min(k, n), max(1, min(k, n) // 2)))
        lead = source.choice(((m,), (2, m), (m, 1, 2), ()))
        bias = of(n) if source.random() < 0.6 else None
        codes, flag = {"dtype": torch.int8}, source.random() < 0.5
        match source.randrange(9):
            case 0:
                ops.lowrank_linear(of(*lead, k), of(r, k), of(n, r), bias)
            case 1:
                order = torch.randperm(n)
                index = torch.cat([order[:r].sort().values, order[r:].sort().values]).to(torch.int16)
                index = index if source.random() < 0.8 else of(n, dtype=torch.int16)
                ops.pivoted_linear(of(*lead, k), of(r, k), of(n - r, r), index, bias)
            case 2:
                ops.lowrank_residual_linear(
                    of(*lead, k), of(r, k), of(n, r), bias, residual_down=of(2, k), residual_up=of(n, 2)
                )
            case 3:
                blocks = of(2, 16, 16), of(3, dtype=torch.int32), of(2, dtype=torch.int32)
                values, crow, col = blocks
                ops.lowrank_residual_linear(of(m, 32), of(r, 32), of(32, r), None, crow=crow, col=col, values=values)
            case 4:
                ops.gram_accumulate_(of(k, k, dtype=torch.float64), of(*lead, k), None, of(k, dtype=torch.float64))
            case 5:
                ops.int8_linear(of(*lead, k), of(n, k, **codes), of(n, dtype=torch.float32), bias, flag)
            case 6:
                mask, values = of(n, (k + 7) // 8, dtype=torch.uint8), of(n)
                if source.random() < 0.8:
                    stored = torch.rand(n, k) < source.choice((0.0, 0.3, 1.0))
                    mask, values = testing.packed_bits(stored), of(int(stored.sum()))
                factors = (of(r, k), of(n, r)) if flag else (None, None)
                ops.sparse_linear(of(*lead, k), mask, values, *factors, bias)
            case 7:
                scales = of(r, dtype=torch.float32), of(n, dtype=torch.float32)
                ops.int8_lowrank_linear(
                    of(*lead, k), of(r, k, **codes), scales[0], of(n, r, **codes), scales[1], bias, flag
                )
            case 8:
                stored, scale = torch.rand(n, k) < source.choice((0.0, 0.3, 1.0)), of(n, dtype=torch.float32)
                factors = (of(r, k, **codes), of(r, dtype=torch.float32), of(n, r, **codes), scale)
                weights = testing.packed_bits(stored), of(int(stored.sum()) + (source.random() < 0.1), **codes), scale
                ops.int8_sparse_linear(of(*lead, k), *weights, *(factors if flag else [None] * 4), bias)

    return attempt


def _results(folder: Path) -> Attempt:
    """The JSON of a result, for the report."""
    summary = {"top1": 80.0, "top5": None, "parameters": 100, "bytes": 400, "macs": 1000, "images_per_second": 9.5}
    model = create_model("vit_tiny_patch16_224", args=_SMALL)
    made = mixrank.compress(model, [torch.randn(6, 3, 16, 16)], keep=0.7, energy="weight").to_json()
    good = {"command": "compress", "model": {"architecture": "vit", "args": _SMALL}, "dense": summary}
    good |= {"compressed": summary, "fidelity": {"agreement": 99.0, "divergence": 0.1, "images": 5}} | made
    good |= {"options": {"keep": 0.5}, "versions": {"torch": "2"}, "times": {"load": 1.0}, "images": {"calibration": 5}}
    good = json.loads(to_json_text(good))
    path, page = folder / "result.json", folder / "page.html"

    def attempt(source: random.Random) -> None:
        if source.random() < 0.2:
            path.write_bytes(mutated(json.dumps(good).encode(), source))
        else:
            content = good
            for _ in range(source.choice((1, 1, 3))):
                content = twisted(content, source)
            path.write_text(json.dumps(content))
        write_report(page, read_result(path))

    return attempt


def _recipes(folder: Path) -> Attempt:
    """The TOML file of a recipe."""
    good = (
        b"budget = 0.4\nepochs = 3\nbatch_size = 32\nseed = 1\n[views]\nscale = [0.5, 1.0]\n[mixed_rank]\npower = 0.5\n"
    )
    path = folder / "recipe.toml"

    def attempt(source: random.Random) -> None:
        path.write_bytes(mutated(good, source))
        read_recipe(path, {})

    return attempt


# The operators' checks raise what torch._check raises; the dispatcher adds its own of arguments that are no tensors.
_OF_OPERATORS = (RuntimeError, ValueError, TypeError, NotImplementedError)
TARGETS = {
    "checkpoint": Target(_checkpoints),
    "labels": Target(_labels),
    "image": Target(_images),
    "operator": Target(_operators, _OF_OPERATORS),
    "result": Target(_results),
    "recipe": Target(_recipes),
}
SHARES = {"checkpoint": 0.3, "labels": 0.1, "image": 0.25, "operator": 0.25, "result": 0.02, "recipe": 0.08}
"""Of all cases."""
