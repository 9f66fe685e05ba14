"""The strategies of a sweep: options of :func:`mixrank.compress` by name, checked, and which of them share factors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from torch import nn

from mixrank.allocate import check_budget
from mixrank.arguments import Allocation, Strategy
from mixrank.compress import FORM, check_energy
from mixrank.decompose import FISHER_SHRINK, LayerShape, check_strategy
from mixrank.errors import InputError
from mixrank.measured_pull import first_pull
from mixrank.models import compressible_linears

# Options of mixrank.compress; what a preset does not name is as in that function, and layers are pivoted.
_PLAIN = {"factors": "aware", "energy": "weight", "shrink": 0.0, "form": "factors", "weighting": "none"}
STRATEGIES: dict[str, dict[str, Any]] = {
    "pivoted": {},
    "svd": _PLAIN | {"factors": "svd"},
    "svd-uniform": _PLAIN | {"factors": "svd", "ranks": "uniform"},
    "aware": _PLAIN,
    "aware-uniform": _PLAIN | {"ranks": "uniform"},
    "aware-pivoted": _PLAIN | {"form": "pivoted"},
    "output": _PLAIN | {"energy": "output"},
    "shrunk": _PLAIN | {"shrink": 0.3},
    "fisher": _PLAIN | {"factors": "fisher"},
    "sensitivity": _PLAIN | {"energy": "sensitivity"},
    "sensitivity-pivoted": _PLAIN | {"energy": "sensitivity", "form": "pivoted"},
    "sparse": {"form": "sparse"},
}
DEFAULT_STRATEGIES = ("pivoted", "sparse", "svd", "svd-uniform", "aware", "aware-pivoted", "sensitivity")
Row = tuple[str, float]
"""The name of a strategy and the share of all parameters that may remain."""
Group = tuple[dict[str, Any], list[Row]]
"""Options of factors, and the rows that are made of them."""
_FACTORS = {"factors": "fisher", "centre": None, "shrink": None, "fisher_shrink": FISHER_SHRINK, "weighting": None}
_RANKS = {"ranks": "mixed", "energy": None, "step": 8, "min_rank": None, "max_rank": None, "form": FORM}


def options_by_name(given: Sequence[str] | Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """What :func:`mixrank.sweep` was given, checked by itself."""
    if isinstance(given, Mapping):
        chosen = {str(name): dict(options) for name, options in given.items()}
    else:
        unknown = next((name for name in given if name not in STRATEGIES), None)
        if unknown is not None:
            raise InputError(f"strategies must be among {', '.join(STRATEGIES)}, but one was {unknown!r}")
        chosen = {name: STRATEGIES[name] for name in given}
    if not chosen:
        raise InputError("strategies must name at least one, but there was none")
    known = _FACTORS | _RANKS
    for name, options in chosen.items():
        other = next((option for option in options if option not in known), None)
        if other is not None:
            raise InputError(f"strategy {name!r} must have options among {', '.join(known)}, but one was {other!r}")
        if is_sparse(options) and len(options) > 1:
            raise InputError(f"strategy {name!r} must have no options but the form 'sparse', but it had {options}")
        if options.get("weighting") not in (None, "none"):
            raise InputError(
                f"strategy {name!r} must have None or 'none' as weighting, but it was {options['weighting']!r}"
            )
    return chosen


def is_sparse(options: dict[str, Any]) -> bool:
    """Whether layers are sparse weights; else they are low ranks."""
    return options.get("form") == "sparse"


def rows_of(wanted: set[Row], chosen: Iterable[str]) -> list[Row]:
    """Strategy by strategy, the highest budget first."""
    return [row for name in chosen for row in sorted(wanted, key=lambda row: -row[1]) if row[0] == name]


def budgets(given: Sequence[float]) -> tuple[float, ...]:
    """Each share once, in the order in which they were given."""
    keeps = tuple(dict.fromkeys(float(share) for share in given))
    if not keeps:
        raise InputError("keep must hold at least one share, but there was none")
    return keeps


def _of(options: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """The options that ``defaults`` has, where they are not given as there."""
    return defaults | {name: value for name, value in options.items() if name in defaults}


def factors_of(options: dict[str, Any]) -> dict[str, Any]:
    """The options of the factors, with those that :func:`mixrank.compress` takes by itself."""
    factors = _of(options, _FACTORS)
    if factors["factors"] != "fisher":
        shrink = first_pull(None) if factors["shrink"] is None else factors["shrink"]
        factors |= {"weighting": "none", "shrink": 0.0 if factors["factors"] == "svd" else shrink}
    return factors


def before_a_pull(factors: dict[str, Any]) -> Strategy:
    """The arguments of :func:`mixrank.decompose` until the pull is measured."""
    found = {name: value for name, value in factors.items() if name != "weighting"}
    return cast(Strategy, found | {"shrink": first_pull(factors["shrink"])})


def allocation_of(options: dict[str, Any]) -> Allocation:
    """The options of the ranks, and the energy that :func:`mixrank.compress` takes by itself."""
    ranks = cast(Allocation, _of(options, _RANKS))
    automatic = "sensitivity" if ranks["ranks"] == "mixed" else "weight"
    return {**ranks, "energy": ranks["energy"] or automatic}


def check_strategies(model: nn.Module, chosen: dict[str, dict[str, Any]], keeps: tuple[float, ...]) -> None:
    """Raise InputError for what can be known before the calibration."""
    linears = compressible_linears(model)
    for options in chosen.values():
        if is_sparse(options):
            options = {"energy": "weight", "step": 1, "form": "factors"}
        centre = check_strategy(**before_a_pull(factors_of(options)), calibrated=True)
        shapes = {name: LayerShape.of(linear, centre) for name, linear in linears.items()}
        ranks = allocation_of(options)
        for share in keeps:
            allocation: Allocation = {**ranks, "keep": share, "max_bytes": None, "max_macs": None}
            check_budget(model, shapes, **allocation)
        check_energy(ranks["energy"], ranks["ranks"], calibrated=True, held_out=True)


def groups_of(chosen: dict[str, dict[str, Any]], wanted: set[Row]) -> list[Group]:
    """What is to be made, by the options of its factors, so that only one set of factors is held at a time."""
    groups: list[Group] = []
    for name, options in chosen.items():
        factors = factors_of(options)
        rows = rows_of(wanted, [name])
        same = next((members for other, members in groups if other == factors), None)
        if rows and same is None:
            groups.append((factors, rows))
        elif same is not None:
            same += rows
    return groups
