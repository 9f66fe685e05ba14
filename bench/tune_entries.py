"""The tunable numbers of ``mixrank_kernels/triton/config.py``: block sizes by class and shape, and a few constants."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass

from mixrank_bench.ops import RESIDUAL_RANK, Case
from mixrank_kernels import backend, choice
from mixrank_kernels.triton import config as configs

Config = configs.LowRankConfig | configs.GramConfig
Value = Config | int

LIMITS = {
    "BM": (16, 256),
    "BN": (32, 256),  # a block of 32 of the residual is not divided among programs
    "BR": (16, 128),
    "BK": (16, 256),
    "BS": (16, 128),
    "num_warps": (2, 16),
    "num_stages": (1, 6),
}
CONSTANTS = ("FUSED_RECOMPUTED_MACS", "GRAM_PROGRAMS", "GRAM_ROWS_MIN")
_LARGE = 1 << 20
"""Constants from here on are written as a power of two."""


@dataclass(frozen=True)
class Entry:
    """One number or configuration of the module.

    Attributes:
        name: of the table or constant.
        key: class of operands and shape in the table, None for a constant.
    """

    name: str
    key: tuple[str, str] | None = None

    def __str__(self) -> str:
        return "/".join((self.name, *(self.key or ())))

    @property
    def value(self) -> Value:
        """What the module has."""
        return getattr(configs, self.name) if self.key is None else getattr(configs, self.name)[self.key]

    def set(self, value: Value) -> None:
        """Let this process use ``value``."""
        if self.key is None:
            setattr(configs, self.name, value)
        else:
            getattr(configs, self.name)[self.key] = value

    @contextlib.contextmanager
    def served_with(self, value: Value) -> Iterator[None]:
        """Within the block, Triton serves every operator with ``value``."""
        before = self.value
        self.set(value)
        try:
            with backend.use("triton"):
                yield
        finally:
            self.set(before)

    def neighbours(self, value: Value) -> list[Value]:
        """What differs from ``value`` by one step: twice or half a number, one pipeline stage more or fewer."""
        if isinstance(value, int):
            return [value // 2, value * 2]
        found = []
        for field, (low, high) in LIMITS.items():
            number = getattr(value, field, 0)
            steps = (number - 1, number + 1) if field == "num_stages" else (number // 2, number * 2)
            # Zero stands for a block that the kernel does not have.
            found += [dataclasses.replace(value, **{field: step}) for step in steps if number and low <= step <= high]
        return [one for one in found if not isinstance(one, configs.GramConfig) or one.BS <= one.BK]

    def serves(self, case: Case) -> bool:
        """Whether Triton's kernels read this entry when they serve a case."""
        is_gram = "gram" in case.op
        if self.key is None:
            return is_gram == self.name.startswith("GRAM") and (is_gram or case.m > 16)
        if (self.name == "GRAM") != is_gram or self.key[0] != choice.operand_class(case.dtype):
            return False
        if is_gram:
            return configs.gram_config(case.dtype, max(case.k, case.n), weighted=False) is self.value
        rank = case.rank + (RESIDUAL_RANK if case.residual == "branch" else 0)
        return any(one is self.value for one in configs.lowrank_config(case.dtype, case.m, case.k, case.n, rank))


def entries() -> list[Entry]:
    """Every entry: constants last, since they weigh kernels against each other."""
    tables = [Entry(name, key) for name in ("LOWRANK", "GRAM") for key in getattr(configs, name)]
    return tables + [Entry(name) for name in CONSTANTS]


def rewritten(source: str, winners: dict[Entry, Value]) -> str:
    """The text of the module with other values; raises ValueError where an entry is not found in its one line."""
    for entry, value in winners.items():
        if entry.key is None:
            pattern, line = rf"^{entry.name} = .*$", f"{entry.name} = {_number(value)}"
        else:
            key = f'("{entry.key[0]}", "{entry.key[1]}")'
            pattern = rf"^    {re.escape(key)}: {type(value).__name__}\(.*\),$"
            line = f"    {key}: {value!r},"
        source, count = re.subn(pattern, lambda _, line=line: line, source, flags=re.MULTILINE)
        if count != 1:
            raise ValueError(f"{entry} must stand in one line of its own, but {count} lines are like that")
    return source


def _number(value: int) -> str:
    return f"2**{value.bit_length() - 1}" if value >= _LARGE and value.bit_count() == 1 else str(value)
