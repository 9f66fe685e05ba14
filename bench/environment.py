"""What has to stand beside a number for it to mean anything: device, versions, commit, threads, load, date."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
from pathlib import Path
from typing import Any

from mixrank.cli_output import versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"


def environment() -> dict[str, Any]:
    """Return the header of a row of results. ``commit`` ends in ``+`` where tracked files differ from it."""
    return versions() | {
        "commit": _git("rev-parse", "--short=12", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else ""),
        "load": round(os.getloadavg()[0], 2),
        "date": datetime.date.today().isoformat(),
    }


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip()


def append(path: Path, row: dict[str, Any]) -> None:
    """Add one JSON line with the environment to a file of results; rows that are there already stay."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row | {"environment": environment()}, allow_nan=False) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of results, none if it does not exist."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
