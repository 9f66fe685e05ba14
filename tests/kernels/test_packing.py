"""Factors packed once: the same results as without, made anew whenever a weight has changed, gone when it has."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor, nn

from mixrank_kernels import backend, ops, packing, testing

pytestmark = pytest.mark.usefixtures("nothing_packed")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
LINEAR, RESIDUAL, PIVOTED = "lowrank_linear", "lowrank_residual_linear", "pivoted_linear"
SPARSE = "sparse_linear"
# Around the rows of a tile (12) and the switch from dot products to packed weights (24 rows).
ROWS = (1, 2, 3, 5, 11, 12, 13, 25, 37)


def identify(value: object) -> str:
    return str(value).removeprefix("torch.")


def factors(*shapes: tuple[int, int], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [(torch.randn(shape) / shape[1] ** 0.5).to(dtype) for shape in shapes]


def low_rank(dtype: torch.dtype) -> dict[str, Tensor]:
    return dict(zip(("down", "up"), factors((13, 37), (29, 13), dtype=dtype), strict=True))


def transposed(dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: weight.T.contiguous().T for name, weight in low_rank(dtype).items()}


def branch(dtype: torch.dtype) -> dict[str, Tensor]:
    extra = factors((7, 37), (29, 7), dtype=dtype)
    return low_rank(dtype) | dict(zip(("residual_down", "residual_up"), extra, strict=True))


def blocks(b: int, dtype: torch.dtype) -> dict[str, Tensor]:
    made = dict(zip(("down", "up"), factors((13, 96), (64, 13), dtype=dtype), strict=True))
    made |= dict(zip(("residual_down", "residual_up"), factors((7, 96), (64, 7), dtype=dtype), strict=True))
    crow = torch.arange(64 // b + 1)
    col = torch.randint(96 // b, (64 // b,))
    return made | {"crow": crow, "col": col, "values": (torch.randn(64 // b, b, b) / b**0.5).to(dtype)}


def pivots(dtype: torch.dtype) -> dict[str, Tensor]:
    down, coefficients = factors((13, 37), (48, 13), dtype=dtype)
    places = torch.randperm(61)
    index = torch.cat([places[:13].sort().values, places[13:].sort().values])
    return {"down": down, "coefficients": coefficients, "index": index}


def sparse(dtype: torch.dtype, rank: int = 13) -> dict[str, Tensor]:
    stored = torch.rand(61, 37) < 0.4
    values = (torch.randn(int(stored.sum())) / 4).to(dtype)
    made = dict(zip(("down", "up"), factors((rank, 37), (61, rank), dtype=dtype), strict=True)) if rank else {}
    return {"mask": testing.packed_bits(stored), "values": values} | made


WEIGHTS = {
    "odd-rank": (LINEAR, low_rank),
    "transposed": (LINEAR, transposed),
    "branch": (RESIDUAL, branch),
    "blocks-16": (RESIDUAL, lambda dtype: blocks(16, dtype)),
    "blocks-32": (RESIDUAL, lambda dtype: blocks(32, dtype)),
    "pivots": (PIVOTED, pivots),
    "sparse": (SPARSE, sparse),
    "sparse-alone": (SPARSE, lambda dtype: sparse(dtype, 0)),
}
PACK = {PIVOTED: packing.packed_pivots, SPARSE: packing.packed_sparse}
COLUMNS = {PIVOTED: "index", SPARSE: "mask"}  # has an entry for each column of y, as up has elsewhere


@pytest.mark.parametrize("dtype", DTYPES, ids=identify)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_results_are_those_without_packing(isa, kind, dtype):
    op, make = WEIGHTS[kind]
    weights = make(dtype)
    (bias,) = factors((1, weights[COLUMNS.get(op, "up")].shape[0]), dtype=dtype)
    packed = PACK.get(op, packing.packed)(**weights)
    columns = weights["down"].shape[1] if "down" in weights else 37
    for rows in ROWS:
        arguments = {"x": torch.randn(rows, columns).to(dtype), "bias": bias[0], **weights}
        actual = getattr(ops, op)(**arguments, packed=packed)
        if rows > 24:
            assert torch.equal(actual, getattr(ops, op)(**arguments)), f"{rows} rows"
        exact = testing.plain(op)(**testing.exact(arguments))
        testing.assert_within_budget(actual, exact, testing.plain(op)(**arguments), dtype)


def layer(dtype: torch.dtype = torch.float32) -> nn.Module:
    module = nn.Module()
    module.down, module.up = (nn.Parameter(weight) for weight in low_rank(dtype).values())
    return module.requires_grad_(False)


def assert_right(module: nn.Module, packed: Tensor | None) -> None:
    x = torch.randn(30, 37).to(module.down.dtype)
    assert packed is not None
    assert torch.equal(
        ops.lowrank_linear(x, module.down, module.up, packed=packed), ops.lowrank_linear(x, module.down, module.up)
    )


def multiply(module: nn.Module) -> None:
    module.up.mul_(2)


def multiply_detached(module: nn.Module) -> None:
    module.up.detach().mul_(2)


def multiply_in_inference_mode(module: nn.Module) -> None:
    with torch.inference_mode():
        module.down.mul_(2)


def copy_over(module: nn.Module) -> None:
    module.down.copy_(torch.randn(13, 37))


def step(module: nn.Module) -> None:
    module.requires_grad_()
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    with torch.enable_grad():
        ops.lowrank_linear(torch.ones(3, 37), module.down, module.up).square().sum().backward()
    optimizer.step()


def load(module: nn.Module) -> None:
    module.load_state_dict(layer().state_dict())


def load_and_assign(module: nn.Module) -> None:
    module.load_state_dict(layer().state_dict(), assign=True)


def swap_memory(module: nn.Module) -> None:
    module.up.data = module.up.data * 2


def swap_parameter(module: nn.Module) -> None:
    module.up = nn.Parameter(module.up * 2)


def other_dtype(module: nn.Module) -> None:
    module.to(torch.bfloat16)


def other_strides(module: nn.Module) -> None:
    module.up.data = module.up.data.as_strided((29, 13), (1, 29))


CHANGES = [
    multiply,
    multiply_detached,
    multiply_in_inference_mode,
    copy_over,
    step,
    load,
    load_and_assign,
    swap_memory,
    swap_parameter,
    other_dtype,
    other_strides,
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@torch.no_grad()
def test_packed_once_until_a_weight_changes(change):
    module = layer()
    first = packing.packed(module.down, module.up)
    assert packing.packed(module.down, module.up) is first
    size = packing.nbytes()
    change(module)
    second = packing.packed(module.down, module.up)
    assert second is not first
    assert_right(module, second)
    assert packing.packed(module.down, module.up) is second
    assert packing.nbytes() <= size


def test_memory_at_the_old_address_is_not_taken_for_the_old_one():
    module = layer()
    for _ in range(20):
        assert_right(module, packing.packed(module.down, module.up))
        module.up.data = torch.empty(0)
        module.up.data = torch.randn(29, 13)


def test_every_weight_of_a_residual_is_watched():
    weights = blocks(16, torch.float32)
    x = torch.randn(30, 96)
    for name in weights:
        before = packing.packed(**weights)
        weights[name].copy_(weights[name].flip(-1) if name == "col" else weights[name].clone())
        after = packing.packed(**weights)
        assert after is not before, name
        assert torch.equal(
            ops.lowrank_residual_linear(x, **weights, packed=after), ops.lowrank_residual_linear(x, **weights)
        )
    assert packing.packed(weights["down"], weights["up"]) is not after


def test_every_weight_of_pivots_is_watched():
    weights, x = pivots(torch.float32), torch.randn(30, 37)
    for name in weights:
        before = packing.packed_pivots(**weights)
        assert packing.packed_pivots(**weights) is before
        weights[name].copy_(weights[name].clone())
        after = packing.packed_pivots(**weights)
        assert after is not before, name
        assert torch.equal(ops.pivoted_linear(x, **weights, packed=after), ops.pivoted_linear(x, **weights))
    before = ops.pivoted_linear(x, **weights)
    for name in ("coefficients", "index"):
        changed = weights[name].data
        changed.copy_(-changed if name == "coefficients" else pivots(torch.float32)["index"])
        after = ops.pivoted_linear(x, **weights, packed=packing.packed_pivots(**weights))
        assert torch.equal(after, ops.pivoted_linear(x, **weights)), "a write that torch does not count"
        assert not torch.equal(after, before)
        before = after


def test_pivots_and_factors_are_not_taken_for_each_other():
    weights = pivots(torch.float32)
    both = {"with": packing.packed_pivots(**weights), "without": packing.packed(weights["down"], torch.randn(61, 13))}
    x = torch.ones(3, 37)
    with pytest.raises(RuntimeError, match=r"packed must be made from these factors, .* without an index"):
        ops.pivoted_linear(x, **weights, packed=both["without"])
    with pytest.raises(RuntimeError, match=r"packed must be made from these factors, .* with an index"):
        ops.lowrank_linear(x, weights["down"], torch.randn(61, 13), packed=both["with"])


def test_another_instruction_set_packs_anew():
    module, seen = layer(), []
    for isa in (*backend.isas(), backend.isas()[0]):
        with backend.use(f"cpu-{isa}"):
            assert packing.nbytes() == 0
            seen.append(packing.packed(module.down, module.up))
            assert all(seen[-1] is not other for other in seen[:-1])
            assert_right(module, seen[-1])
    assert packing.nbytes() == 0


def test_packed_for_another_instruction_set_is_ignored():
    module = layer()
    for made in backend.isas():
        with backend.use(f"cpu-{made}"):
            packed = packing.packed(module.down, module.up)
        for used in backend.isas():
            with backend.use(f"cpu-{used}"):
                assert_right(module, packed)


@pytest.mark.parametrize("name", ["down", "up"])
def test_freed_with_its_weights(name):
    kept = layer()
    packing.packed(kept.down, kept.up)
    before = packing.nbytes()
    module = layer()
    gc.disable()
    try:
        memory = weakref.ref(packing.packed(module.down, module.up))
        assert packing.nbytes() > before
        setattr(module, name, None)
        assert packing.nbytes() == before
        assert memory() is None
    finally:
        gc.enable()


def test_a_weight_of_an_old_entry_does_not_take_the_new_one_with_it():
    down, old, new = factors((13, 37), (29, 13), (29, 13))
    packing.packed(down, old)
    kept = list(packing._cache.entries.values())  # as another thread does that is comparing the entry
    packed = packing.packed(down, new)
    del old
    assert len(kept) == 1
    assert packing.packed(down, new) is packed


def test_two_layers_that_share_a_factor_are_both_right():
    down, one, other = factors((13, 37), (29, 13), (29, 13))
    x = torch.randn(30, 37)
    for up in (one, other, one):
        assert torch.equal(
            ops.lowrank_linear(x, down, up, packed=packing.packed(down, up)), ops.lowrank_linear(x, down, up)
        )


def test_nothing_is_packed_where_it_is_of_no_use():
    module = layer().requires_grad_()
    assert packing.packed(module.down, module.up) is None
    with torch.no_grad():
        assert packing.packed(module.down, module.up) is not None
        assert packing.packed(module.down.to("meta"), module.up.to("meta")) is None
    with torch.inference_mode():
        assert packing.packed(*factors((13, 37), (29, 13))) is None
    with torch._subclasses.FakeTensorMode():
        assert packing.packed(*factors((13, 37), (29, 13))) is None
    seen = []
    torch.func.vmap(lambda down, up: seen.append(packing.packed(down, up)) or down)(
        torch.randn(2, 13, 37), torch.randn(2, 29, 13)
    )
    assert seen == [None]


def test_turned_off_it_gives_nothing_and_keeps_nothing():
    module = layer()
    packing.packed(module.down, module.up)
    try:
        packing.enable(False)
        assert packing.nbytes() == 0
        assert packing.packed(module.down, module.up) is None
    finally:
        packing.enable(True)
    assert packing.packed(module.down, module.up) is not None


def test_threads_get_right_results():
    x, modules = torch.randn(30, 37), [layer() for _ in range(3)]
    expected = [ops.lowrank_linear(x, module.down, module.up) for module in modules]
    wrong, done = [], threading.Event()

    def call() -> None:
        try:
            for turn in range(300):
                module, right = modules[turn % 3], expected[turn % 3]
                packed = packing.packed(module.down, module.up)
                if not torch.equal(ops.lowrank_linear(x, module.down, module.up, packed=packed), right):
                    wrong.append(turn)
        except Exception as error:
            wrong.append(error)

    def drop() -> None:
        while not done.is_set():
            packing.clear()
            packing.nbytes()

    callers = [threading.Thread(target=call) for _ in range(2)]
    dropper = threading.Thread(target=drop)
    for thread in (*callers, dropper):
        thread.start()
    for thread in callers:
        thread.join()
    done.set()
    dropper.join()
    assert wrong == []
