"""Builds the extension module ``mixrank_kernels._C``; everything else about the package is in pyproject.toml.

MIXRANK_CUDA=auto (default) | 0 | 1 decides whether the CUDA kernels are built. It never asks for a visible GPU.
"""

import os
import shutil
import tomllib
from pathlib import Path

import pybind11
import torch
from setuptools import setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

ROOT = Path(__file__).parent
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000"  # torch 2.11: the oldest torch the built extension loads in


def sources(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


def cuda_obstacle() -> str | None:
    """Why the CUDA kernels cannot be built here, or None."""
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    if not (CUDA_HOME and (Path(CUDA_HOME) / "bin" / "nvcc").is_file()) and shutil.which("nvcc") is None:
        return "nvcc is found neither in CUDA_HOME/bin nor on the PATH"
    if not (Path(torch.__file__).parent / "include" / "c10" / "cuda").is_dir():
        return "this torch comes without its CUDA headers"
    return None


choice = os.environ.get("MIXRANK_CUDA", "auto")
if choice not in ("auto", "0", "1"):
    raise SystemExit(f"MIXRANK_CUDA must be auto, 0 or 1, but it was {choice!r}")
obstacle = "there are no CUDA sources" if not sources("csrc/cuda/*.cu") else cuda_obstacle()
if choice == "1" and obstacle:
    raise SystemExit(f"MIXRANK_CUDA=1 asks for the CUDA kernels, but {obstacle}")
with_cuda = choice != "0" and obstacle is None
if with_cuda:
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0;9.0a")

version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
cuda_version = torch.version.cuda if with_cuda else ""
baked = {"VERSION": version, "TORCH_VERSION": torch.__version__, "CUDA_VERSION": cuda_version}
macros = [STABLE_ABI, *(f'-DMIXRANK_{name}="{value}"' for name, value in baked.items())]
# Torch's headers and gcc 12's own AVX-512 headers are not free of warnings.
quiet = ["-isystem", str(Path(torch.__file__).parent / "include"), "-Wno-uninitialized", "-Wno-maybe-uninitialized"]
host = ["-O3", "-g0", "-fvisibility=hidden", "-Wall", "-Wextra", *quiet]
extension = (CUDAExtension if with_cuda else CppExtension)(
    "mixrank_kernels._C",
    ["csrc/module.cpp", *sources("csrc/c*/*.cpp"), *(sources("csrc/cuda/*.cu") if with_cuda else [])],
    include_dirs=[pybind11.get_include(), str(ROOT / "csrc")],
    extra_compile_args={"cxx": host + macros, "nvcc": ["-O3", "-lineinfo", "-DUSE_CUDA", *macros]},
)
setup(ext_modules=[extension], cmdclass={"build_ext": BuildExtension})
