"""The sdist and the wheel hold what they should, and the wheel works where nothing else is: see ``make package``.

    python tests/packaging/check.py DIST

``DIST`` is the folder with the sdist of this checkout and the wheel that was built from it. The wheel is installed in a
new venv outside the checkout, which sees only what the wheel says it depends on, taken from the packages of this
interpreter instead of an index. The last lines say which file is missing or too much, or which command failed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from email.parser import HeaderParser
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {"mixrank": "python/mixrank", "mixrank_kernels": "mixrank_kernels", "mixrank_bench": "bench"}
"""Where the packages lie in the checkout."""
BUILD_FILES = ("CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "constraints.txt", "pyproject.toml", "setup.py")
GENERATED = ("PKG-INFO", "setup.cfg")
# Run in the new venv: every module of both packages, and where each lies. The modules of mixrank_bench need its extra.
PROBE = """
import importlib, pkgutil, sys
names = ["mixrank", "mixrank_kernels", "mixrank_bench"]
for package in map(importlib.import_module, names[:2]):
    names += [info.name for info in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
for name in names:
    if not name.endswith("__main__"):
        print(importlib.import_module(name).__file__)
print(*sys.path, sep="\\n", file=sys.stderr)
"""


def tracked(root: Path = ROOT) -> set[str]:
    """The files that git knows, as paths from the root of the checkout."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, text=True, check=True)
    return set(listing.stdout.split("\0")) - {""}


def shipped(files: set[str]) -> dict[str, str]:
    """The place in the wheel of each of these files that belongs there; tests, results and scripts do not."""
    places = {}
    for package, folder in FOLDERS.items():
        for file in files:
            path = PurePosixPath(file)
            if not path.is_relative_to(folder):
                continue
            test = path.name.startswith(("test_", "conftest"))
            if package != "mixrank_bench" or (path.suffix == ".py" and not test):
                places[file] = str(package / path.relative_to(folder))
    return places


def differences(what: str, expected: set[str], found: set[str]) -> list[str]:
    """One sentence for each file that is missing, and for each that does not belong."""
    return [f"{what} lacks {name}" for name in sorted(expected - found)] + [
        f"{what} should not have {name}" for name in sorted(found - expected)
    ]


def sdist_faults(names: set[str], files: set[str]) -> list[str]:
    """What is wrong with the files of an sdist, made from a checkout in which git knows ``files``."""
    inside = {name.partition("/")[2] for name in names} - {""}
    made = {name for name in inside if name in GENERATED or name.partition("/")[0].endswith(".egg-info")}
    sources = {file for file in files if file.startswith("csrc/")}
    return differences("the sdist", {*BUILD_FILES, *sources, *shipped(files)}, inside - made)


def wheel_faults(names: set[str], files: set[str]) -> list[str]:
    """What is wrong with the files of a wheel, metadata and compiled modules aside."""
    pure = {name for name in names if not name.endswith(".so") and ".dist-info/" not in name}
    faults = differences("the wheel", set(shipped(files).values()), pure)
    if not any(name.startswith("mixrank_kernels/_C.") for name in names):
        faults.append("the wheel lacks the compiled module mixrank_kernels._C")
    return faults


def metadata_faults(contents: dict[str, str], project: dict[str, Any]) -> list[str]:
    """What the metadata of a wheel do not say as ``[project]`` of pyproject.toml says it.

    Args:
        contents: text of each file in ``.dist-info``, by its name there.
        project: the table ``[project]``.
    """
    found = HeaderParser().parsestr(contents["METADATA"])
    wanted = {
        "Name": [project["name"]],
        "Version": [project["version"]],
        "Requires-Python": [project["requires-python"]],
        "License-Expression": [project["license"]],
        "License-File": project["license-files"],
        "Classifier": project["classifiers"],
        "Provides-Extra": list(project["optional-dependencies"]),
    }
    faults = [
        f"the metadata say {key}: {found.get_all(key, [])}, and pyproject.toml says {value}"
        for key, value in wanted.items()
        if sorted(found.get_all(key, [])) != sorted(value)
    ]
    licenses = [f"licenses/{name}" for name in project["license-files"]]
    faults += [f"the wheel lacks {name}" for name in licenses if name not in contents]
    points = contents.get("entry_points.txt", "")
    faults += [
        f"the wheel has no command {name} = {target}"
        for name, target in project["scripts"].items()
        if f"{name} = {target}" not in points.splitlines()
    ]
    return faults


def needed(requirements: list[str]) -> dict[str, metadata.Distribution]:
    """The installed distributions that meet these requirements and, in turn, their own; extras are not followed."""
    found: dict[str, metadata.Distribution] = {}
    left = [*requirements]
    while left:
        requirement = Requirement(left.pop())
        name = canonicalize_name(requirement.name)
        if name not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found[name] = metadata.distribution(name)
            left += found[name].requires or []
    return found


def link_packages(distributions: dict[str, metadata.Distribution], folder: Path) -> None:
    """Fill a folder with links to everything that these distributions installed in site-packages."""
    for distribution in distributions.values():
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            link = folder / top
            if not link.exists() and not top.endswith(".pth"):
                link.symlink_to(Path(str(distribution.locate_file(top))).resolve())


def call(*command: str | Path, folder: Path) -> str:
    """Run a command in a folder without the variables that name other packages; what it printed, or a failure."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "MIXRANK_"))}
    done = subprocess.run(
        [str(word) for word in command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        words = " ".join(map(str, command))
        raise SystemExit(f"{done.stdout}{done.stderr}\nfailed with status {done.returncode}: {words}")
    return done.stdout


def install_faults(wheel: Path, requirements: list[str], work: Path) -> list[str]:
    """Install a wheel with these requirements in a new venv under ``work`` and use it there; what is wrong with it."""
    venv, empty, packages = work / "venv", work / "empty", work / "packages"
    python = venv / "bin" / "python"
    empty.mkdir()
    packages.mkdir()
    call(sys.executable, "-m", "venv", venv, folder=empty)
    # That which comes with an older Python's venv is too old for torch.
    call(python, "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools", folder=empty)
    call(python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel, folder=empty)
    [own] = (venv / "lib").glob("python*/site-packages")
    link_packages(needed(requirements), packages)
    # A line of a .pth file adds the folder but, unlike site-packages, none of the .pth files in it.
    (own / "dependencies.pth").write_text(f"{packages}\n")
    print(call(python, "-m", "pip", "check", folder=empty), end="")
    places = call(python, "-c", PROBE, folder=empty).splitlines()
    print(f"{len(places)} modules are imported from the new venv")
    cases = call(venv / "bin" / "mixrank", "bench", "--list", folder=empty).splitlines()
    print(f"mixrank bench has {len(cases)} cases")
    print(call(venv / "bin" / "mixrank", "demo", "--out", work / "demo", folder=empty), end="")
    reports = sorted((work / "demo").rglob("*.html"))
    return [f"{place} is not in the new venv" for place in places if not Path(place).is_relative_to(own)] + (
        [] if reports else ["mixrank demo wrote no report"]
    )


def main(dist: Path) -> int:
    """Check the sdist and the wheel of a folder; the exit status."""
    [sdist], [wheel] = dist.glob("*.tar.gz"), dist.glob("*.whl")
    files = tracked()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    with tarfile.open(sdist) as archive:
        faults = sdist_faults({member.name for member in archive if member.isfile()}, files)
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        faults += wheel_faults(names, files)
        inside = {name.partition(".dist-info/")[2]: name for name in names if ".dist-info/" in name}
        contents = {key: archive.read(name).decode() for key, name in inside.items()}
    faults += metadata_faults(contents, project)
    requirements = HeaderParser().parsestr(contents["METADATA"]).get_all("Requires-Dist", [])
    if not faults:
        with tempfile.TemporaryDirectory() as folder:
            faults = install_faults(wheel.resolve(), requirements, Path(folder).resolve())
    for fault in faults:
        print(fault, file=sys.stderr)
    if not faults:
        print(f"{sdist.name} and {wheel.name} are whole, and the wheel works in a new venv")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
