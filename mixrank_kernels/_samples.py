"""The sample inputs of every operator: small shapes around tile boundaries, and layers of real vision transformers."""

from __future__ import annotations

import torch

from mixrank_kernels import _sample_makers as make
from mixrank_kernels._sample_makers import Sample

_LINEAR_SMALL = (
    make.linear("tiny", (3,), 5, 4, 2),
    make.linear("ones", (1,), 1, 1, 1),
    make.linear("prime", (63,), 127, 61, 5),
    make.linear("vector", (), 33, 17, 9),
    make.linear("no-bias", (7,), 24, 40, 8, bias=False),
    make.linear("empty", (0,), 16, 8, 4),
    make.linear("full-rank", (9,), 12, 12, 12),
    make.linear("leading-dims", (2, 3, 5), 20, 24, 6),
    make.linear("below-tile", (31,), 63, 31, 15),
    make.linear("on-tile", (32,), 64, 32, 16),
    make.linear("above-tile", (33,), 65, 33, 17),
    make.linear("every-other-row", (10,), 32, 16, 8, layout=make.every_other_row),
    make.linear("transposed", (10,), 32, 16, 8, layout=make.transposed),
    make.linear("slice-of-wider", (10,), 32, 16, 8, layout=make.slice_of_wider),
    make.transposed_weights(make.linear("", (10,), 32, 16, 8)),
)
_LINEAR_REAL = (
    make.linear("vit-ti-qkv", (197,), 192, 576, 56),
    make.linear("vit-b-proj", (197,), 768, 768, 152),
    make.linear("vit-b-fc1", (2, 197), 768, 3072, 304),
    make.linear("vit-b-fc2", (197,), 3072, 768, 304),
    make.linear("vit-b-fc2-one-token", (1,), 3072, 768, 304),
    make.linear("swin-t-reduction", (49,), 384, 192, 64, bias=False),
)
_PIVOTED_SMALL = (
    make.pivoted_linear("tiny", (3,), 5, 4, 2),
    make.pivoted_linear("ones", (1,), 1, 1, 1),
    make.pivoted_linear("prime", (63,), 127, 61, 5),
    make.pivoted_linear("vector", (), 33, 17, 9),
    make.pivoted_linear("no-bias", (7,), 24, 40, 8, bias=False, index=torch.int32),
    make.pivoted_linear("empty", (0,), 16, 8, 4),
    make.pivoted_linear("every-row", (30,), 64, 40, 40, index=torch.int16),
    make.pivoted_linear("all-but-one", (30,), 64, 40, 39),
    make.pivoted_linear("leading-dims", (2, 3, 5), 20, 24, 6, index=torch.int16),
    make.pivoted_linear("first-rows", (33,), 65, 133, 57, pivots="first"),
    make.pivoted_linear("last-rows", (33,), 65, 133, 57, pivots="last"),
    make.pivoted_linear("more-than-a-piece", (30,), 8, 460, 421),
    make.pivoted_linear("exactly-a-piece", (30,), 8, 460, 384),
    make.pivoted_linear("below-tile", (31,), 63, 46, 15),
    make.pivoted_linear("on-tile", (32,), 64, 48, 16),
    make.pivoted_linear("above-tile", (33,), 65, 50, 17),
    make.pivoted_linear("every-other-row", (10,), 32, 24, 8, layout=make.every_other_row),
    make.pivoted_linear("transposed", (10,), 32, 24, 8, layout=make.transposed),
    make.pivoted_linear("slice-of-wider", (10,), 32, 24, 8, layout=make.slice_of_wider),
    make.transposed_weights(make.pivoted_linear("", (10,), 32, 24, 8)),
)
_PIVOTED_REAL = (
    make.pivoted_linear("vit-ti-qkv", (197,), 192, 576, 104),
    make.pivoted_linear("vit-b-proj", (197,), 768, 768, 280, index=torch.int16),
    make.pivoted_linear("vit-b-fc1", (2, 197), 768, 3072, 368, index=torch.int16),
    make.pivoted_linear("vit-b-fc2", (197,), 3072, 768, 400),
    make.pivoted_linear("vit-b-fc2-one-token", (1,), 3072, 768, 400),
    make.pivoted_linear("swin-t-reduction", (49,), 384, 192, 64, bias=False),
)
_SPARSE_SMALL = (
    make.sparse_linear("tiny", (3,), 5, 4, 0.5, 2),
    make.sparse_linear("ones", (1,), 1, 1, 1.0),
    make.sparse_linear("ones-of-factors", (1,), 1, 1, 1.0, 1),
    make.sparse_linear("prime", (63,), 127, 61, 0.3, 5),
    make.sparse_linear("no-factors", (63,), 127, 61, 0.3),
    make.sparse_linear("vector", (), 33, 17, 0.4, 9),
    make.sparse_linear("no-bias", (7,), 24, 40, 0.3, 8, bias=False),
    make.sparse_linear("empty", (0,), 16, 8, 0.5, 4),
    make.sparse_linear("nothing-stored", (9,), 20, 12, 0.0),
    make.sparse_linear("factors-alone", (9,), 20, 12, 0.0, 3),
    make.sparse_linear("all-stored", (9,), 40, 24, 1.0, 3),
    make.sparse_linear("leading-dims", (2, 3, 5), 20, 24, 0.3, 6),
    make.sparse_linear("below-tile", (63,), 127, 127, 0.2, 15),
    make.sparse_linear("on-tile", (64,), 128, 128, 0.2, 16),
    make.sparse_linear("above-tile", (65,), 129, 129, 0.2, 17),
    make.sparse_linear("several-chunks", (137,), 300, 140, 0.1, 150),
    make.sparse_linear("one-token", (1,), 127, 61, 0.3, 5),
    make.sparse_linear("four-tokens", (4,), 300, 61, 0.3, 5),
    make.sparse_linear("four-tokens-few-entries", (4,), 300, 61, 0.02),
    make.sparse_linear("every-other-row", (10,), 32, 24, 0.4, 8, layout=make.every_other_row),
    make.sparse_linear("transposed", (10,), 32, 24, 0.4, 8, layout=make.transposed),
    make.sparse_linear("slice-of-wider", (10,), 32, 24, 0.4, 8, layout=make.slice_of_wider),
    make.transposed_weights(make.sparse_linear("", (10,), 32, 24, 0.4, 8)),
)
_SPARSE_REAL = (
    make.sparse_linear("vit-ti-qkv", (197,), 192, 576, 0.4, 16),
    make.sparse_linear("vit-b-proj", (197,), 768, 768, 0.4),
    make.sparse_linear("vit-b-fc1", (2, 197), 768, 3072, 0.25, 40),
    make.sparse_linear("vit-b-fc2", (197,), 3072, 768, 0.25, 40),
    make.sparse_linear("vit-b-fc2-one-token", (1,), 3072, 768, 0.4, 40),
    make.sparse_linear("swin-t-reduction", (49,), 384, 192, 0.4, 8, bias=False),
)
_RESIDUAL_SMALL = (
    make.residual_linear("neither", (7,), 24, 40, 8),
    make.residual_linear("branch-tiny", (3,), 5, 4, 2, q=1),
    make.residual_linear("branch-ones", (1,), 1, 1, 1, q=1),
    make.residual_linear("branch-prime", (63,), 127, 61, 5, q=3),
    make.residual_linear("branch-vector", (), 33, 17, 9, q=2),
    make.residual_linear("branch-no-bias", (7,), 24, 40, 8, q=5, bias=False),
    make.residual_linear("branch-empty", (0,), 16, 8, 4, q=4),
    make.residual_linear("branch-leading-dims", (2, 3, 5), 20, 24, 6, q=7),
    make.residual_linear("branch-above-tile", (33,), 65, 33, 17, q=33),
    make.residual_linear("branch-slice-of-wider", (10,), 33, 16, 8, q=4, layout=make.slice_of_wider),
    make.residual_linear("blocks-16", (7,), 48, 64, 5, b=16, nnz=5),
    make.residual_linear("blocks-32", (9,), 64, 96, 7, b=32, nnz=4),
    make.residual_linear("blocks-int32", (9,), 64, 96, 7, b=32, nnz=4, index=torch.int32),
    make.residual_linear("blocks-all", (33,), 64, 48, 3, b=16, nnz=12),
    make.residual_linear("blocks-none", (5,), 32, 64, 3, b=32, nnz=0),
    make.residual_linear("blocks-repeated", (5,), 32, 48, 3, b=16, nnz=11, duplicates=True, index=torch.int32),
    make.residual_linear("blocks-one-row", (1,), 64, 32, 4, b=16, nnz=3),
    make.residual_linear("blocks-vector", (), 32, 64, 4, b=32, nnz=2),
    make.residual_linear("blocks-no-bias", (31,), 96, 64, 9, b=32, nnz=3, bias=False),
    make.residual_linear("both-16", (13,), 64, 48, 7, q=3, b=16, nnz=6),
    make.residual_linear("both-32", (65,), 96, 128, 15, q=5, b=32, nnz=7, index=torch.int32),
    make.residual_linear("both-empty", (0,), 32, 16, 4, q=1, b=16, nnz=1),
    make.residual_linear("both-leading-dims", (2, 3, 5), 32, 48, 6, q=2, b=16, nnz=4),
    make.residual_linear("both-every-other-row", (10,), 32, 16, 8, q=3, b=16, nnz=2, layout=make.every_other_row),
    make.residual_linear("both-transposed", (10,), 32, 64, 8, q=3, b=32, nnz=2, layout=make.transposed),
    make.residual_linear("both-slice-of-wider", (10,), 32, 64, 8, q=3, b=16, nnz=4, layout=make.slice_of_wider),
    make.transposed_weights(make.residual_linear("", (10,), 32, 16, 8, q=3, b=16, nnz=2)),
)
_RESIDUAL_REAL = (
    make.residual_linear("vit-b-proj-branch", (197,), 768, 768, 120, q=32),
    make.residual_linear("vit-b-proj-blocks-16", (197,), 768, 768, 120, b=16, nnz=230),
    make.residual_linear("vit-b-proj-blocks-32", (2, 197), 768, 768, 120, b=32, nnz=58, index=torch.int32),
    make.residual_linear("vit-b-proj-both", (197,), 768, 768, 120, q=17, b=32, nnz=58),
    make.residual_linear("vit-b-fc1-both", (197,), 768, 3072, 256, q=48, b=32, nnz=115),
    make.residual_linear("vit-b-fc2-one-token", (1,), 3072, 768, 256, q=48, b=16, nnz=460),
)
_GRAM_SMALL = (
    make.gram("tiny", (3,), 5),
    make.gram("one", (1,), 1),
    make.gram("vector", (), 9),
    make.gram("prime", (127,), 61, weighted=True, summed=True),
    make.gram("empty", (0,), 16, summed=True),
    make.gram("weighted", (40,), 24, weighted=True),
    make.gram("summed", (40,), 24, summed=True),
    make.gram("fp32-master", (40,), 24, summed=True, master=torch.float32),
    make.gram("leading-dims", (2, 3, 5), 20, weighted=True, summed=True),
    make.gram("batched", (3, 17), 20, weighted=True, summed=True, batched=True),
    make.gram("batched-plain", (2, 33), 33, batched=True),
    make.gram("below-tile", (31,), 63),
    make.gram("on-tile", (32,), 64, summed=True),
    make.gram("above-tile", (33,), 65),
    make.gram("every-other-row", (20,), 24, summed=True, layout=make.every_other_row),
    make.gram("transposed", (20,), 24, weighted=True, layout=make.transposed),
    make.gram("slice-of-wider", (20,), 24, layout=make.slice_of_wider),
)
_GRAM_REAL = (
    make.gram("vit-ti", (4, 197), 192, summed=True),
    make.gram("vit-b", (8, 197), 768, weighted=True, summed=True),
    make.gram("vit-b-long", (5000,), 768),
)
_CROSS_SMALL = (
    make.cross_gram("tiny", (3,), 5, 4),
    make.cross_gram("one", (1,), 1, 1),
    make.cross_gram("vector", (), 9, 7),
    make.cross_gram("prime", (127,), 61, 37),
    make.cross_gram("empty", (0,), 16, 8),
    make.cross_gram("wide", (40,), 5, 65),
    make.cross_gram("tall", (40,), 65, 5),
    make.cross_gram("fp32-master", (40,), 24, 17, master=torch.float32),
    make.cross_gram("leading-dims", (2, 3, 5), 20, 12),
    make.cross_gram("below-tile", (31,), 63, 31),
    make.cross_gram("on-tile", (32,), 64, 32),
    make.cross_gram("above-tile", (33,), 65, 33),
    make.cross_gram("every-other-row", (20,), 24, 16, layout=make.every_other_row),
    make.cross_gram("transposed", (20,), 24, 16, layout=make.transposed),
    make.cross_gram("slice-of-wider", (20,), 24, 16, layout=make.slice_of_wider),
)
_CROSS_REAL = (
    make.cross_gram("vit-ti", (4, 197), 192, 192),
    make.cross_gram("vit-b", (8, 197), 768, 768),
    make.cross_gram("vit-b-fc1-long", (3000,), 768, 384),
)
_INT8_SHAPES = (
    ("tiny", (3,), 5, 4, 2),
    ("ones", (1,), 1, 2, 1),
    ("prime", (63,), 127, 61, 5),
    ("vector", (), 33, 17, 9),
    ("no-bias", (7,), 24, 40, 8),
    ("empty", (0,), 16, 8, 4),
    ("leading-dims", (2, 3, 5), 20, 24, 6),
    ("below-tile", (31,), 63, 31, 15),
    ("on-tile", (32,), 64, 32, 16),
    ("above-tile", (33,), 65, 33, 17),
    ("many-terms", (13,), 1030, 35, 18),
    ("every-other-row", (10,), 32, 16, 8),
    ("transposed", (10,), 32, 16, 8),
    ("slice-of-wider", (10,), 32, 16, 8),
)
# Those that are made of each kind of layer.
_INT8_VARIED = ("tiny", "prime", "vector", "empty", "above-tile", "many-terms")
_LAYOUTS = {
    "every-other-row": make.every_other_row,
    "transposed": make.transposed,
    "slice-of-wider": make.slice_of_wider,
}


def _int8_small(lowrank: bool) -> tuple[Sample, ...]:
    made = []
    for pivoted in (False, True)[: 1 + lowrank]:
        for dynamic in (True, False):
            for name, rows, k, n, r in _INT8_SHAPES:
                kind = ("-pivoted" if pivoted else "") + ("" if dynamic else "-weight-only")
                if not kind or name in _INT8_VARIED:
                    layout = _LAYOUTS.get(name, lambda t: t)
                    made.append(
                        make.int8(name + kind, rows, k, n, r * lowrank, name != "no-bias", dynamic, pivoted, layout)
                    )
    return tuple(made)


_INT8_REAL = tuple(
    make.int8(name + ("" if dynamic else "-weight-only"), rows, k, n, dynamic=dynamic)
    for dynamic in (True, False)
    for name, rows, k, n in (
        ("vit-b-qkv", (197,), 768, 2304),
        ("vit-b-fc2", (2, 197), 3072, 768),
        ("vit-b-fc2-one-token", (1,), 3072, 768),
        ("vit-b-classifier", (8,), 768, 1000),
    )
)
_INT8_LOWRANK_REAL = tuple(
    make.int8(name + kind, rows, k, n, r, dynamic=dynamic, pivoted=kind == "-pivoted")
    for kind, dynamic in (("", True), ("-weight-only", False), ("-pivoted", True))
    for name, rows, k, n, r in (
        ("vit-b-qkv", (197,), 768, 2304, 232),
        ("vit-b-fc1", (2, 197), 768, 3072, 248),
        ("vit-b-fc2", (197,), 3072, 768, 248),
        ("vit-b-proj-one-token", (1,), 768, 768, 152),
    )
)
_SAMPLES = {
    ("int8_linear", False): _int8_small(lowrank=False),
    ("int8_linear", True): _INT8_REAL,
    ("int8_lowrank_linear", False): _int8_small(lowrank=True),
    ("int8_lowrank_linear", True): _INT8_LOWRANK_REAL,
    ("int8_sparse_linear", False): tuple(make.int8_sparse(s) for s in _SPARSE_SMALL if s.name != "transposed-weights"),
    ("int8_sparse_linear", True): tuple(make.int8_sparse(sample) for sample in _SPARSE_REAL),
    ("lowrank_linear", False): _LINEAR_SMALL,
    ("lowrank_linear", True): _LINEAR_REAL,
    ("lowrank_residual_linear", False): _RESIDUAL_SMALL,
    ("lowrank_residual_linear", True): _RESIDUAL_REAL,
    ("pivoted_linear", False): _PIVOTED_SMALL,
    ("pivoted_linear", True): _PIVOTED_REAL,
    ("sparse_linear", False): _SPARSE_SMALL,
    ("sparse_linear", True): _SPARSE_REAL,
    ("gram_accumulate_", False): _GRAM_SMALL,
    ("gram_accumulate_", True): _GRAM_REAL,
    ("cross_gram_accumulate_", False): _CROSS_SMALL,
    ("cross_gram_accumulate_", True): _CROSS_REAL,
}


def sample_inputs(op: str, *, real_sizes: bool = False) -> tuple[Sample, ...]:
    """The samples of the operator ``op``: small shapes around tile boundaries, or layers of real ViTs."""
    return _SAMPLES[op, real_sizes]
