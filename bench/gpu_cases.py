"""The cases that are timed on a GPU, those that the most is to be learned from first."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from mixrank_bench.ops import (
    DENSITIES,
    HEAD_WIDTH,
    HEADS,
    KEEPS,
    LAYERS,
    RESIDUALS,
    TOKENS,
    Case,
    linear,
    pivoted,
    sparse,
)

ROWS = (1, 16, TOKENS, 8 * TOKENS, 64 * TOKENS)
MODELS = ("vit-b", "vit-s", "vit-l, swin-b stage 4")
GRAM_WIDTHS = (384, 768, 1024, 3072)
NARROW_WIDTH = 192
LAYERS_AT_ONCE = 12
BAR_DTYPE = torch.bfloat16
COMPILED_ROWS, COMPILED_LAYERS = (1, TOKENS, ROWS[-1]), ("vit-b proj", "vit-b fc1")
"""Where ``torch.compile`` is among the peers: it takes seconds for each shape."""


def bar_cases() -> Iterator[Case]:
    """What the bars speak of: ViT-B at the smaller budget, and Gram matrices of many rows, in bfloat16."""
    for m, layer in itertools.product(reversed(ROWS), LAYERS):
        yield linear("vit-b", layer, m, KEEPS[0], BAR_DTYPE)
    for k in GRAM_WIDTHS:
        yield _gram(k, ROWS[-1], BAR_DTYPE, torch.float32)


def choice_cases() -> Iterator[Case]:
    """What the choice of an implementation rests on, beside the bars: every operator, class of operands and range."""
    for dtype in (BAR_DTYPE, torch.float32):
        for m in ROWS:
            yield linear("vit-b", "proj", m, KEEPS[0], dtype, "branch")
            yield pivoted("vit-b", "proj", m, KEEPS[1], dtype)
            yield sparse("vit-b", "proj", m, DENSITIES[0], dtype)
        for k in (NARROW_WIDTH, *GRAM_WIDTHS):
            yield _gram(k, ROWS[-1], dtype, torch.float64)
        for k, n in ((NARROW_WIDTH, NARROW_WIDTH), (768, 768), (768, 3072)):
            yield Case("cross_gram_accumulate_", f"width {k}", dtype, ROWS[-1], k, n)
    for m, layer in itertools.product(ROWS, LAYERS):
        yield linear("vit-b", layer, m, KEEPS[0], torch.float32)


def other_cases() -> Iterator[Case]:
    """Block-sparse residuals, batches, other models, budgets and dtypes."""
    for layer, m, residual in itertools.product(("proj", "fc1"), (1, TOKENS, ROWS[-1]), RESIDUALS):
        case = linear("vit-b", layer, m, KEEPS[0], BAR_DTYPE, residual)
        if (residual, layer) != ("branch", "proj"):
            yield case
    for k in GRAM_WIDTHS:
        yield Case("gram_accumulate_", f"{LAYERS_AT_ONCE} layers", BAR_DTYPE, ROWS[3], k, batch=LAYERS_AT_ONCE)
        yield _gram(k, ROWS[3], BAR_DTYPE, torch.float64)
    yield Case("gram_accumulate_", "heads of vit-b", BAR_DTYPE, ROWS[3], HEAD_WIDTH, batch=HEADS)
    for m, layer in itertools.product(ROWS, LAYERS):
        yield linear("vit-b", layer, m, KEEPS[0], torch.float16)
    for k in GRAM_WIDTHS[:2]:
        yield _gram(k, ROWS[-1], torch.float16, torch.float64)
    for model, m, layer in itertools.product(MODELS[1:], ROWS, LAYERS):
        yield linear(model, layer, m, KEEPS[0], BAR_DTYPE)
    for model, m, layer in itertools.product(MODELS, ROWS, LAYERS):
        yield linear(model, layer, m, KEEPS[1], BAR_DTYPE)


def cases() -> Iterator[Case]:
    """Every case of the suite, in the order in which they are timed."""
    yield from bar_cases()
    yield from choice_cases()
    yield from other_cases()


def _gram(k: int, m: int, dtype: torch.dtype, master: torch.dtype) -> Case:
    return Case("gram_accumulate_", f"width {k}", dtype, m, k, master=master)
