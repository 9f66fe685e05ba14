"""What has to stand beside a number for it to mean anything: device, versions, commit, threads, load, date."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mixrank.cli_output import versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
_SETTINGS = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit")
BUSY_SHARE = 0.1
"""The largest share of the processors that others may use while something is timed."""


def in_checkout() -> bool:
    """Whether this is the package of a checkout, which has a place for results and documents, or an installed copy."""
    return (ROOT / "pyproject.toml").is_file() and (ROOT / "bench" / "environment.py").is_file()


def environment(commit: str | None = None) -> dict[str, Any]:
    """Return the header of a row of results.

    ``commit`` is the one that was checked out when this module was imported, since that is the code that runs. It ends
    in ``+`` where tracked files other than results and documents differ from it, and is ``unknown`` outside a checkout
    and without git, unless it is given.
    """
    return versions() | {
        "commit": commit or _COMMIT,
        "load": round(os.getloadavg()[0], 2),
        "date": datetime.date.today().isoformat(),
    }


def gpu_environment() -> dict[str, Any]:
    """What has to stand beside a number of a GPU: the card, its driver, CUDA, and its settings if they can be read."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "gpu_memory": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
        "blas": str(torch.backends.cuda.preferred_blas_library()),
    } | gpu_settings()


def gpu_settings() -> dict[str, str]:
    """Driver, clocks, power and temperature as ``nvidia-smi`` tells them; empty where it does not answer."""
    command = ["nvidia-smi", f"--query-gpu={','.join(_SETTINGS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return {}
    values = done.stdout.splitlines()[0].split(", ")
    return dict(zip(_SETTINGS, values, strict=True))


def peer_versions() -> dict[str, str]:
    """The versions of what is compared with, where it is installed."""
    found = {}
    for name in ("scipy", "onnxruntime", "zentorch"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def checked_out() -> str:
    """The commit that is checked out now, as :func:`environment` says it."""
    if not in_checkout():
        return "unknown"
    changed = _git("status", "--porcelain", "-uno", "--", ".", ":!bench/results", ":!docs", ":!README.md")
    return (_git("rev-parse", "--short=12", "HEAD") or "unknown") + ("+" if changed else "")


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return done.stdout.strip()


_COMMIT = checked_out()


def busy(
    seconds: float = 1.0, *, stat: Path = Path("/proc/stat"), load: float | None = None, cores: int | None = None
) -> str | None:
    """Say in words why the machine is too busy to time anything, or return None.

    Args:
        seconds: how long to watch the processors while this process sleeps.
        stat: where the kernel counts what the processors did; without it only the load counts.
        load: the load average of the last minute; by default the machine's.
        cores: the number of processors; by default the machine's.
    """
    load = os.getloadavg()[0] if load is None else load
    cores = cores or os.cpu_count() or 1
    if load > cores / 2:
        return f"the load average of the last minute is {load:.2f} on {cores} processors"
    if not stat.is_file():
        return None
    before = _ticks(stat)
    time.sleep(seconds)
    after = _ticks(stat)
    passed = after[1] - before[1]
    share = (after[0] - before[0]) / passed if passed else 0.0
    return f"{share:.0%} of the processors are in use by others" if share > BUSY_SHARE else None


def _ticks(stat: Path) -> tuple[int, int]:
    """Clock ticks in which any processor worked (or was taken away by the host), and all ticks."""
    user, nice, system, idle, iowait, *rest = (int(part) for part in stat.read_text().splitlines()[0].split()[1:9])
    worked = user + nice + system + sum(rest)
    return worked, worked + idle + iowait


def append(path: Path, row: dict[str, Any]) -> None:
    """Add one JSON line with the environment to a file of results; rows that are there already stay."""
    append_all(path, [row], environment())


def append_all(path: Path, rows: list[dict[str, Any]], header: dict[str, Any]) -> None:
    """Add JSON lines that share one environment to a file of results."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row | {"environment": header}, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a file of results, none if it does not exist."""
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
