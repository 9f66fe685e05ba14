"""Other ways to a sum of products of rows, which users take instead of the operators that accumulate one."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mixrank_bench import engines as libraries
from mixrank_bench.measures import ADDMM, OUT_DTYPE, SSYRK
from mixrank_bench.ops import TOKENS, Case
from mixrank_bench.variant import Variant


def gram_peers(case: Case, arguments: dict[str, Tensor | None]) -> dict[str, Callable[[], Variant]]:
    """What builds each other way to the same sum, by name."""
    x = arguments["x"]
    z = arguments.get("z", x)

    def zeros(extra: int = 0) -> Tensor:
        return _zeros(case, x.device, extra=extra)

    def out_dtype() -> Variant:
        """What a user would take who knows of it; there is no such form that adds."""
        total, product = zeros(), torch.bmm if case.batch else torch.mm
        return Variant(lambda: total.add_(product(x.mT, z, out_dtype=torch.float32)), Tensor.clone)

    def addmm() -> Variant:
        total = zeros()
        add = total.baddbmm_ if case.batch else total.addmm_

        def call() -> Tensor:
            wide = x.float()
            return add(wide.mT, wide if z is x else z.float())

        return Variant(call, Tensor.clone)

    def images() -> Variant:
        """Matrices of single images, then their sum: the hook of published compressors."""
        total, images, targets = zeros(), x.view(-1, TOKENS, case.k), z.view(-1, TOKENS, z.shape[-1])

        def call() -> Tensor:
            wide = images.float()
            return total.add_((wide.mT @ (wide if z is x else targets.float())).sum(0))

        return Variant(call, Tensor.clone)

    def kronfluence() -> Variant:
        """A copy in fp32, a column of ones for the bias, and the product of all of it."""
        total = zeros(extra=1)

        def call() -> Tensor:
            wide = x.to(torch.float32, copy=True)
            wide = torch.cat([wide, wide.new_ones(len(wide), 1)], dim=-1)
            return total.addmm_(wide.mT, wide)

        return Variant(call, lambda result: result[:-1, :-1].clone())

    def scipy() -> Variant:
        total = zeros()
        parts = [(x, total)] if not case.batch else list(zip(x, total, strict=True))
        calls = [libraries.ssyrk(rows, matrix) for rows, matrix in parts]

        def call() -> Tensor:
            for part in calls:
                part()
            return total

        return Variant(call, lambda result: result.tril() + result.tril(-1).mT)

    found = {ADDMM: addmm}
    if x.is_cuda and case.dtype.itemsize == 2:
        found[OUT_DTYPE] = out_dtype
    if not case.batch:
        found["batched matmul, then sum"] = images
    if case.op == "gram_accumulate_":
        if x.device.type == "cpu":
            found[SSYRK] = scipy
        if not case.batch:
            found["as kronfluence does"] = kronfluence
    return found


def rounded_gram(case: Case, arguments: dict[str, Tensor | None]) -> Variant:
    """The sum in the dtype of the operands, to which it is rounded at each call."""
    x = arguments["x"]
    total = _zeros(case, x.device, dtype=case.dtype)
    add, z = total.baddbmm_ if case.batch else total.addmm_, arguments.get("z", x)
    return Variant(lambda: add(x.mT, z), Tensor.clone)


def _zeros(case: Case, device: torch.device, *, extra: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A Gram matrix to add to, with so many columns and rows more."""
    lead = (case.batch,) if case.batch else ()
    return torch.zeros(*lead, case.k + extra, (case.n or case.k) + extra, dtype=dtype, device=device)
