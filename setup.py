"""Builds the extension modules ``mixrank_kernels._C`` (CPU) and, where it can, ``mixrank_kernels._cuda``.

Everything else about the package is in pyproject.toml.

MIXRANK_CUDA=auto (default) | 0 | 1 decides whether the CUDA kernels are built. It never asks for a visible GPU.
MIXRANK_SANITIZE=0 (default) | 1 builds with AddressSanitizer and UndefinedBehaviorSanitizer, see ``make sanitize``.
"""

import os
import re
import shutil
import subprocess
import tomllib
from glob import glob
from pathlib import Path

import pybind11
import torch
from setuptools import setup

ROOT = Path(__file__).parent
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11: the oldest torch the built extension loads in
SETTINGS = {"MIXRANK_CUDA": ("auto", "0", "1"), "MIXRANK_SANITIZE": ("0", "1")}
# -fno-wrapv because Python's own flags define signed overflow away.
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-fno-wrapv"]


def find_toolkit() -> None:
    """Tell torch where the CUDA toolkit is: nvcc on the PATH may be a script, so nvcc itself is asked."""
    nvcc = shutil.which("nvcc")
    if nvcc is None or "CUDA_HOME" in os.environ or "CUDA_PATH" in os.environ:
        return
    dry_run = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True, check=False
    )
    if found := re.search(r"\bTOP=(.+)", dry_run.stderr):
        os.environ["CUDA_HOME"] = str(Path(found[1].strip()).resolve())


def cuda_obstacle() -> str | None:
    """Why the CUDA kernels cannot be built here, or None."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not (CUDA_HOME and (Path(CUDA_HOME) / "bin" / "nvcc").is_file()) and shutil.which("nvcc") is None:
        return "nvcc is found neither in CUDA_HOME/bin nor on the PATH"
    if not (Path(torch.__file__).parent / "include" / "c10" / "cuda").is_dir():
        return "this torch comes without its CUDA headers"
    return None


find_toolkit()
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension  # noqa: E402

for name, allowed in SETTINGS.items():
    if os.environ.setdefault(name, allowed[0]) not in allowed:
        raise SystemExit(f"{name} must be one of {', '.join(allowed)}, but it was {os.environ[name]!r}")
common, cpu, cuda, cu = (
    sorted(glob(f"csrc/{pattern}", root_dir=ROOT))
    for pattern in ("common/*.cpp", "cpu/*.cpp", "cuda/*.cpp", "cuda/*.cu")
)
obstacle = cuda_obstacle()
if os.environ["MIXRANK_CUDA"] == "1" and obstacle:
    raise SystemExit(f"MIXRANK_CUDA=1 asks for the CUDA kernels, but {obstacle}")
with_cuda = os.environ["MIXRANK_CUDA"] != "0" and obstacle is None
# The PTX is for architectures that come later.
os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0+PTX;9.0a")
cuda_version = torch.version.cuda if with_cuda else ""
version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
baked = {"VERSION": version, "TORCH_VERSION": torch.__version__, "CUDA_VERSION": cuda_version}
macros = [STABLE_ABI, *(f'-DMIXRANK_{name}="{value}"' for name, value in baked.items())]
# Torch's headers and gcc 12's own AVX-512 headers are not free of warnings.
quiet = ["-isystem", str(Path(torch.__file__).parent / "include"), "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
level = ["-O1", "-g", *SANITIZE] if os.environ["MIXRANK_SANITIZE"] == "1" else ["-O3", "-g0"]
host = [*level, "-fvisibility=hidden", "-Wall", "-Wextra", *quiet, *macros]
include_dirs = [pybind11.get_include(), str(ROOT / "csrc")]
extensions = [
    CppExtension(
        "mixrank_kernels._C",
        ["csrc/module.cpp", *common, *cpu],
        include_dirs=include_dirs,
        extra_compile_args=host,
        extra_link_args=level,
    )
]
if with_cuda:
    extensions.append(
        CUDAExtension(
            "mixrank_kernels._cuda",
            [*common, *cuda, *cu],
            include_dirs=include_dirs,
            extra_compile_args={
                "cxx": host,
                "nvcc": ["-O3", "-lineinfo", "-std=c++20", "-DUSE_CUDA", *macros],
            },
            extra_link_args=level,
        )
    )
setup(ext_modules=extensions, cmdclass={"build_ext": BuildExtension})
