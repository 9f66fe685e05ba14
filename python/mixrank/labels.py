"""Class indices of images from a CSV file."""

from __future__ import annotations

import csv
from pathlib import Path

from mixrank.errors import InputError


def read_labels(path: Path, names: list[str], source: str | Path) -> list[int]:
    """Read the columns ``file`` and ``label``; the rows must match ``names`` one to one, by path or by file name.

    Args:
        path: the CSV file, UTF-8, with a header line.
        names: paths of the images within ``source``.
        source: where the images lie, for messages.

    Returns:
        A class index for each name, in the order of ``names``.

    Raises:
        InputError: the file cannot be read, lacks a column, has a label that is not an index from 0 or differs between
            two rows of the same file, or images and rows do not match.
    """
    found: dict[str, int] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            absent = [column for column in ("file", "label") if column not in (rows.fieldnames or ())]
            if absent:
                raise InputError(f"labels {path} must have the columns file and label, but has no {absent[0]!r}")
            for row in rows:
                name, label = (row["file"] or "").strip(), (row["label"] or "").strip()
                if not (label.isascii() and label.isdecimal()) or len(label) > 9:
                    where = f"labels {path}, line {rows.line_num}"
                    raise InputError(f"{where}: the label of {name!r} must be a class index, not {label!r}")
                if found.setdefault(name, int(label)) != int(label):
                    raise InputError(f"labels {path}, line {rows.line_num}: {name!r} has two different labels")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"labels {path} cannot be read: {reason}") from error
    keys = [name if name in found else Path(name).name for name in names]
    unlabelled = [name for name, key in zip(names, keys, strict=True) if key not in found]
    if unlabelled:
        count = f"{len(unlabelled)} of {len(names)} images"
        raise InputError(f"labels {path} has no label for {count} of {source} (first: {unlabelled[0]})")
    if len(set(keys)) < len(keys):
        twice = next(key for key in keys if keys.count(key) > 1)
        raise InputError(f"labels {path} means more than one image of {source} by {twice!r}: give the path within it")
    unused = sorted(found.keys() - set(keys))
    if unused:
        raise InputError(f"labels {path} names {len(unused)} files that {source} does not have (first: {unused[0]})")
    return [found[key] for key in keys]
