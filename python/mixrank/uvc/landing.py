"""From shares and gates to whole heads, columns, neurons and blocks that just fit a budget.

Rounding to whole groups misses a budget by some per cent, and gates drop blocks at once. So all shares are raised or
lowered alike until what stays fits, and then neurons and columns come back, those of the largest norm first, until no
further one fits: they are the smallest things that can be removed. At last their numbers are made multiples of what
processors like.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import cast

from torch import Tensor

from mixrank.errors import InputError
from mixrank.uvc.options import Removed
from mixrank.uvc.primal_dual import BlockVariables, Groups, removed
from mixrank.uvc.shrink import KeptBlock
from mixrank.uvc.structure import BlockShape, Structure

_STEPS = 40  # halvings of the number that shares are moved by
_STEPS_OF_A_HEAD = 4

Chunk = list[tuple[int, int, float]]
"""What comes back together: the head, or -1 for a neuron, the place there, and the norm."""


def macs_of(structure: Structure, kept: Sequence[KeptBlock | None]) -> int:
    """Multiply-adds of one image of what stays of a model."""
    shapes = [one.shape for one in kept if one is not None]
    return structure.fixed_macs + sum(
        structure.block_macs(len(shape.columns), sum(shape.columns), shape.neurons) for shape in shapes
    )


def contributions(structure: Structure, kept: Sequence[KeptBlock | None]) -> Removed:
    """Multiply-adds of one image that went, by what took them along: of a block or head that goes, all that it took."""
    taken = dict.fromkeys(("blocks", "heads", "columns", "neurons"), 0)
    for shape, one in zip(structure.blocks, kept, strict=True):
        whole = structure.block_macs(len(shape.columns), sum(shape.columns), shape.neurons)
        if one is None:
            taken["blocks"] += whole
            continue
        stays = [count for count, columns in zip(shape.columns, one.columns, strict=True) if columns]
        without_heads = structure.block_macs(len(stays), sum(stays), shape.neurons)
        columns = sum(one.shape.columns)
        taken["heads"] += whole - without_heads
        taken["columns"] += structure.block_macs(0, sum(stays) - columns, 0)
        taken["neurons"] += structure.block_macs(0, 0, shape.neurons - one.shape.neurons)
    return Removed(**taken)


def land(
    structure: Structure,
    groups: Sequence[Groups],
    shares: Sequence[BlockVariables],
    gates: Tensor,
    budget: float,
    multiple: int = 1,
) -> list[KeptBlock | None]:
    """Choose what stays: no more than the budget, and less by fewer than ``multiple`` neurons, where that can be had.

    Args:
        structure: of the model.
        groups: of each block, by norms or by importance.
        shares: those that are to be removed of each block.
        gates: ``[blocks]``, the probability that each is kept. Blocks below a half go, those of the lowest gates first,
            unless the others cannot fill the budget; further ones go where nothing else fits.
        budget: share of the multiply-adds that may remain, in (0, 1).
        multiple: of which the columns of each head and the neurons of each block are, if they are that many.

    Returns:
        For each block what stays, or None.

    Raises:
        InputError: nothing fits the budget.
    """
    groups = [one.relative() for one in groups]
    allowed = int(budget * structure.macs())
    order = gates.argsort(descending=True, stable=True).tolist()
    blocks = max(1, int((gates >= 0.5).sum()))
    largest = [_whole(shape) for shape in structure.blocks]
    # As many blocks as the gates say, or more where these are too few even with nothing else removed.
    while blocks < len(order) and macs_of(structure, _only(largest, order[:blocks])) < allowed:
        blocks += 1
    for count in range(blocks, 0, -1):
        found = _fitted(structure, groups, shares, set(order[:count]), allowed)
        if found is not None:
            return _aligned(structure, groups, _filled(structure, groups, found, allowed), allowed, multiple)
    least = (structure.fixed_macs + structure.block_macs(1, 1, 1)) / structure.macs()
    raise InputError(f"budget must be above {least:.4f} (one block of one head), but it was {budget}")


def _whole(shape: BlockShape) -> KeptBlock:
    return KeptBlock(tuple(tuple(range(count)) for count in shape.columns), tuple(range(shape.neurons)))


def _only(kept: Sequence[KeptBlock], blocks: Sequence[int]) -> list[KeptBlock | None]:
    return [one if index in set(blocks) else None for index, one in enumerate(kept)]


def _fitted(
    structure: Structure,
    groups: Sequence[Groups],
    shares: Sequence[BlockVariables],
    blocks: set[int],
    allowed: int,
) -> list[KeptBlock | None] | None:
    """What stays of the blocks with all shares raised or lowered alike, by the least that fits; None where none does.

    First in proportion, up to twofold, so that what was not to go at all stays whole; where that is not enough, by
    one number.
    """

    def at(level: float) -> list[KeptBlock | None]:
        factor, more = min(level, 2.0), max(0.0, level - 2.0)
        pairs = enumerate(zip(groups, shares, strict=True))
        return [kept_by(found, share, factor, more) if index in blocks else None for index, (found, share) in pairs]

    low, high = 0.0, 3.0
    if macs_of(structure, at(high)) > allowed:
        return None
    for _ in range(_STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if macs_of(structure, at(middle)) <= allowed else (middle, high)
    return at(high)


def kept_by(groups: Groups, shares: BlockVariables, factor: float = 1.0, more: float = 0.0) -> KeptBlock:
    """What stays of a block by its shares times ``factor`` plus ``more``, each brought into [0, 1]."""
    heads = set(removed(groups.heads, (factor * shares.heads + more).clamp(0, 1)).tolist())
    columns = tuple(
        () if head in heads else _stays(norms, factor * shares.columns[head] + more)
        for head, norms in enumerate(groups.columns)
    )
    return KeptBlock(columns, _stays(groups.neurons, factor * shares.neurons + more))


def _stays(norms: Tensor, share: Tensor) -> tuple[int, ...]:
    gone = set(removed(norms, share.clamp(0, 1)).tolist())
    return tuple(i for i in range(len(norms)) if i not in gone)


def _filled(
    structure: Structure, groups: Sequence[Groups], kept: list[KeptBlock | None], allowed: int
) -> list[KeptBlock | None]:
    """What was removed comes back until no further neuron fits.

    First neurons and columns of the heads that stay, which cost the same, those of the largest norm relative to their
    kind's mean first; where all of these are back, a head with its column of the largest norm, for which neurons of the
    smallest norm go again if they must.
    """
    each, kept = structure.block_macs(0, 0, 1), list(kept)

    def stays(index: int) -> KeptBlock:
        return cast(KeptBlock, kept[index])  # what comes back and what goes is of blocks that stay

    while True:
        free = (allowed - macs_of(structure, kept)) // each
        absent = [entry for index, one in enumerate(kept) if one is not None for entry in _absent(index, groups, one)]
        for _, index, head, place in heapq.nsmallest(free, absent):
            kept[index] = _with(stays(index), head, place)
        heads = [
            entry for index, one in enumerate(kept) if one is not None for entry in _absent_heads(index, groups, one)
        ]
        if free <= len(absent) or not heads:
            return kept
        _, index, head = min(heads)
        kept[index] = _with(stays(index), head, int(groups[index].columns[head].argmax()))
        excess = -(-(macs_of(structure, kept) - allowed) // each)
        for _, index, neuron in heapq.nsmallest(max(0, excess), _present(groups, kept)):
            one = stays(index)
            kept[index] = KeptBlock(one.columns, tuple(i for i in one.neurons if i != neuron))


def _aligned(
    structure: Structure, groups: Sequence[Groups], kept: Sequence[KeptBlock | None], allowed: int, multiple: int
) -> list[KeptBlock | None]:
    """What stays in multiples: those of the smallest norm above one go, and where there is room they come in multiples.

    The heads of a block get the same number of columns, in steps of a quarter of a head at least: fewer columns save
    no time unless they are much fewer, and unequal numbers cost some. Columns and neurons cost the same multiply-adds.
    The largest mean norm relative to its kind comes first; heads get columns of their own where all neurons are back.
    """
    if multiple == 1:
        return list(kept)
    step = -(-structure.head_width // (_STEPS_OF_A_HEAD * multiple)) * multiple
    found = [
        None if one is None else _whole_multiples(block, one, multiple, step)
        for block, one in zip(groups, kept, strict=True)
    ]
    found = _with_chunks(structure, groups, found, allowed, partial(_next_chunks, multiple=multiple, step=step))
    if all(one is None or len(one.neurons) == len(block.neurons) for block, one in zip(groups, found, strict=True)):
        found = _with_chunks(structure, groups, found, allowed, partial(_last_chunks, multiple=multiple))
    return found


def _with_chunks(
    structure: Structure,
    groups: Sequence[Groups],
    kept: Sequence[KeptBlock | None],
    allowed: int,
    chunks_of: Callable[[Groups, KeptBlock], Iterable[Chunk]],
) -> list[KeptBlock | None]:
    """What stays with chunk after chunk that fits, the one of the largest mean norm first."""
    each, kept = structure.block_macs(0, 0, 1), list(kept)
    while True:
        free = (allowed - macs_of(structure, kept)) // each
        chunks = [
            (-sum(norm for *_, norm in chunk) / len(chunk), index, [entry[:2] for entry in chunk])
            for index, one in enumerate(kept)
            if one is not None
            for chunk in chunks_of(groups[index], one)
            if len(chunk) <= free
        ]
        if not chunks:
            return kept
        _, index, places = min(chunks)
        for head, place in places:
            kept[index] = _with(cast(KeptBlock, kept[index]), head, place)


def _whole_multiples(groups: Groups, kept: KeptBlock, multiple: int, step: int) -> KeptBlock:
    """Fewer or as many: neurons in multiples, and in each head as many columns as in the others, in steps."""

    def rounded(count: int, step: int) -> int:
        return max(count - count % step, min(count, step))

    def largest(norms: Tensor, count: int) -> tuple[int, ...]:
        return tuple(sorted(norms.argsort(descending=True, stable=True)[:count].tolist()))

    neurons, columns = len(kept.neurons), kept.columns
    if neurons < len(groups.neurons):
        neurons = rounded(neurons, multiple)
    stay = [norms for norms, one in zip(groups.columns, columns, strict=True) if one]
    if any(one and len(one) < len(norms) for norms, one in zip(groups.columns, columns, strict=True)):
        mean = rounded(sum(kept.shape.columns) // len(stay), step)
        each = min(mean, *map(len, stay))
        columns = tuple(largest(norms, each) if one else () for norms, one in zip(groups.columns, columns, strict=True))
    return KeptBlock(columns, largest(groups.neurons, neurons))


def _next_chunks(groups: Groups, kept: KeptBlock, multiple: int, step: int) -> Iterator[Chunk]:
    """The next neurons up to a multiple, or all; the next columns up to a step, or all, of all heads that stay."""
    yield from _chunk(-1, groups.neurons, kept.neurons, multiple)
    heads = [head for head, columns in enumerate(kept.columns) if columns]
    chunks = [chunk for head in heads for chunk in _chunk(head, groups.columns[head], kept.columns[head], step)]
    if chunks:
        yield [entry for chunk in chunks for entry in chunk]


def _last_chunks(groups: Groups, kept: KeptBlock, multiple: int) -> Iterator[Chunk]:
    """The next columns of one head."""
    for head, columns in enumerate(kept.columns):
        if columns:
            yield from _chunk(head, groups.columns[head], columns, multiple)


def _chunk(head: int, norms: Tensor, present: tuple[int, ...], multiple: int) -> Iterator[Chunk]:
    missing = sorted(_missing(norms, present), key=lambda entry: -entry[1])
    if missing:
        yield [(head, place, norm) for place, norm in missing[: multiple - len(present) % multiple]]


def _with(kept: KeptBlock, head: int, place: int) -> KeptBlock:
    """One column of a head more, or where ``head`` is -1 one neuron more."""
    if head < 0:
        return KeptBlock(kept.columns, tuple(sorted((*kept.neurons, place))))
    columns = (tuple(sorted((*one, place))) if i == head else one for i, one in enumerate(kept.columns))
    return KeptBlock(tuple(columns), kept.neurons)


def _absent(index: int, groups: Sequence[Groups], kept: KeptBlock) -> list[tuple[float, int, int, int]]:
    """Columns of heads that stay, and neurons, that are removed: minus the relative norm, block, head or -1, place."""
    found = _missing(groups[index].neurons, kept.neurons)
    entries = [(-norm, index, -1, place) for place, norm in found]
    for head, (norms, columns) in enumerate(zip(groups[index].columns, kept.columns, strict=True)):
        if columns:
            entries += [(-norm, index, head, place) for place, norm in _missing(norms, columns)]
    return entries


def _present(groups: Sequence[Groups], kept: Sequence[KeptBlock | None]) -> list[tuple[float, int, int]]:
    """The neurons that stay, all but the one of the largest norm of each block: relative norm, block, neuron."""
    found = []
    for index, (block, one) in enumerate(zip(groups, kept, strict=True)):
        if one is not None:
            relative = _missing(block.neurons, tuple(set(range(len(block.neurons))) - set(one.neurons)))
            found += sorted((norm, index, neuron) for neuron, norm in relative)[:-1]
    return found


def _absent_heads(index: int, groups: Sequence[Groups], kept: KeptBlock) -> list[tuple[float, int, int]]:
    present = tuple(head for head, columns in enumerate(kept.columns) if columns)
    return [(-norm, index, head) for head, norm in _missing(groups[index].heads, present)]


def _missing(norms: Tensor, present: tuple[int, ...]) -> list[tuple[int, float]]:
    """The groups that are not present, with their norms."""
    stays = set(present)
    return [(place, norm) for place, norm in enumerate(norms.tolist()) if place not in stays]
