"""Weights of sparse_linear packed once: made anew whenever one has changed, and taken for no others."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mixrank_kernels import ops, packing, testing

pytestmark = pytest.mark.usefixtures("nothing_packed")


def sparse() -> dict[str, Tensor]:
    stored = torch.rand(61, 37) < 0.4
    made = {"mask": testing.packed_bits(stored), "values": torch.randn(int(stored.sum())) / 4}
    return made | {"down": torch.randn(13, 37) / 6, "up": torch.randn(61, 13) / 4}


def test_every_weight_of_a_sparse_layer_is_watched():
    weights, x = sparse(), torch.randn(30, 37)
    for name in weights:
        before = packing.packed_sparse(**weights)
        assert packing.packed_sparse(**weights) is before
        weights[name].copy_(weights[name].clone())
        after = packing.packed_sparse(**weights)
        assert after is not before, name
        assert torch.equal(ops.sparse_linear(x, **weights, packed=after), ops.sparse_linear(x, **weights))
    before = ops.sparse_linear(x, **weights)
    for name in ("values", "down", "up", "mask"):
        packed = packing.packed_sparse(**weights)
        weights[name].data.copy_(weights[name].flip(0) if name == "mask" else -weights[name])
        after = ops.sparse_linear(x, **weights, packed=packed)
        assert torch.equal(after, ops.sparse_linear(x, **weights)), f"{name}: a write that torch does not count"
        assert not torch.equal(after, before)
        before = after


@pytest.mark.parametrize("rows", [1, 30])
def test_a_mask_with_more_bits_than_values_that_nothing_noticed_reads_no_other_memory(isa, rows):
    mask, values = torch.zeros(40, 5, dtype=torch.uint8), torch.ones(320)
    mask[:, 0] = 255
    packed = packing.packed_sparse(mask, values)
    mask.data[20:, 2] = 255  # bytes that are no sample of it
    assert ops.sparse_linear(torch.ones(rows, 40), mask, values, packed=packed).isfinite().all()


def test_packed_sparse_weights_of_others_are_refused(isa):
    weights = sparse()
    right = packing.packed_sparse(**weights).clone()
    scrambled = right.clone()
    scrambled[:8] = 255
    other = r"packed must be made from these weights, but it was made for a mask of \[61, 5\], R = 13 and \d+ values"
    for packed, message in (
        (packing.packed_sparse(weights["mask"].clone(), weights["values"]), other.replace("13", "0")),
        (packing.packed_sparse(**sparse()), other),
        (packing.packed_sparse(**{n: t if n == "mask" else t.double() for n, t in weights.items()}), other),
        (right[:-64], "packed must be whole, but it was cut"),
        (right[:8], "packed must come from mixrank_kernels.packing, but it has another content"),
        (scrambled, "packed must come from mixrank_kernels.packing, but it has another content"),
        (packing.packed(torch.ones(13, 37), torch.ones(29, 13)), "packed must come from mixrank_kernels.packing"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ops.sparse_linear(torch.ones(3, 37), **weights, packed=packed)


def test_packed_sparse_weights_do_not_hide_bits_beyond_the_features():
    """Without factors, nothing tells while packing how many features there are."""
    weights = {"mask": torch.tensor([[0b1001]], dtype=torch.uint8), "values": torch.ones(2)}
    packed = packing.packed_sparse(**weights)
    assert ops.sparse_linear(torch.ones(1, 4), **weights, packed=packed).item() == 2
    with pytest.raises(RuntimeError, match="mask must have no bit set beyond K = 3, but row 0 had one"):
        ops.sparse_linear(torch.ones(1, 3), **weights, packed=packed)
