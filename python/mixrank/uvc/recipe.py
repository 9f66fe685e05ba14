"""Recipes of unified compression: TOML files with all that decides a run, beside the model and the data."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mixrank.errors import InputError
from mixrank.uvc.combine import CombinedOptions
from mixrank.uvc.options import UVCOptions

SHIPPED = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Recipe:
    """What a file of a recipe says.

    Attributes:
        options: of the search and the training.
        combined: of what follows where ranks are lowered as well.
        batch_size: images in a step, of one process.
        views: random views of the training images, see :class:`mixrank.prepare.TrainingViews`.
    """

    options: UVCOptions = field(default_factory=UVCOptions)
    combined: CombinedOptions = field(default_factory=CombinedOptions)
    batch_size: int = 128
    views: Mapping[str, Any] = field(default_factory=dict)


def read_recipe(name: Path | str | None, given: Mapping[str, Any]) -> Recipe:
    """Read a recipe.

    A file has ``batch_size`` and the fields of :class:`UVCOptions` at its top, those of :class:`CombinedOptions` in the
    table ``[mixed_rank]`` and arguments of ``timm.data.create_transform`` in the table ``[views]``; what it does not
    name is as by default.

    Args:
        name: a file, or the name of one that ships with the package (without ``.toml``); None: all by default.
        given: what is to be otherwise than the file says, of its top; None means as the file says.

    Raises:
        InputError: there is no such file, it is not TOML, it names what is no option (the error says which there are),
            or a value is of another type or outside its range.
    """
    content = {} if name is None else _read(Path(name))
    views, combined = content.pop("views", {}), content.pop("mixed_rank", {})
    for table, value in (("views", views), ("mixed_rank", combined)):
        if not isinstance(value, dict):
            raise InputError(f"{name}: {table} must be a table, but it was {value!r}")
    content |= {key: value for key, value in given.items() if value is not None}
    batch_size = content.pop("batch_size", Recipe().batch_size)
    if type(batch_size) is not int or batch_size < 1:
        raise InputError(f"batch_size must be a whole number of at least 1, but it was {batch_size!r}")
    recipe = Recipe(_made(UVCOptions, content, name), _made(CombinedOptions, combined, name), batch_size, views)
    recipe.options.check()
    recipe.combined.check()  # beside the options only where both are used
    return recipe


def _read(path: Path) -> dict[str, Any]:
    shipped = SHIPPED / f"{path}.toml"
    if not path.is_file():
        if not shipped.is_file():
            names = ", ".join(sorted(each.stem for each in SHIPPED.glob("*.toml")))
            raise InputError(f"there is no recipe {path}: give a file, or one of {names}")
        path = shipped
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise InputError(f"{path} is not a readable TOML file: {error}") from error


def _made(kind: type, content: Mapping[str, Any], name: Path | str | None) -> Any:
    """An instance of a dataclass whose fields are numbers, from a part of a file."""
    known = {each.name: each.default for each in fields(kind)}
    for key, value in content.items():
        if key not in known:
            raise InputError(f"{name}: there is no option {key}, only {', '.join(known)}")
        whole = isinstance(known[key], int)
        if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
            wanted = "a whole number" if whole else "a number"
            raise InputError(f"{name}: {key} must be {wanted}, but it was {value!r}")
    return kind(**{key: value if isinstance(known[key], int) else float(value) for key, value in content.items()})
