#!/usr/bin/env bash
# Builds, tests and times everything on a machine with a GPU and no network.
#
#   bench/gpu.sh [OUT [STAGE...]]
#
# OUT (default: $OUT, else bench/results/gpu-run) gets a log of each stage, gpu.jsonl with the results, added to line by
# line, and summary.txt. The stages, in this order unless some are named: build, tests, sanitize, timing. Only when named:
# tune, which rewrites the block sizes of the Triton kernels and leaves a copy of them in OUT. A stage that fails stops no
# other but makes the exit status 1. PYTHON (default python3) must have torch; nothing is installed and no index is asked.
# Without a CUDA device it is a rehearsal on the CPU, and fails.
#
# MIXRANK_GPU_SECONDS  when the whole has to end, 540 by default
# MIXRANK_WHEELS       a folder of wheels from which missing packages are unpacked for this run
# MIXRANK_COMMIT       the commit of a tree without git, with a + where files differ from it
set -uo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
seconds=${MIXRANK_GPU_SECONDS:-540}
out=${1:-${OUT:-bench/results/gpu-run}}
shift $(($# > 0))
stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=(build tests sanitize timing)
for stage in "${stages[@]}"; do
    case $stage in
        build | tests | sanitize | timing | tune) ;;
        *)
            echo "STAGE must be one of build, tests, sanitize, timing, tune, but it was '$stage'" >&2
            exit 2
            ;;
    esac
done
mkdir -p "$out"
out=$(realpath "$out")
: >"$out/summary.txt"

# What an installation would provide: the packages under their names, and the metadata that has the version.
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
ln -s "$PWD/bench" "$site/mixrank_bench"
export PYTHONPATH="$site:$PWD:$PWD/python${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1

failed=0
say() { echo "$*" | tee -a "$out/summary.txt"; }
left() { echo $((seconds - SECONDS - reserved)); }

# Two fifths of the time are for the timings, whatever comes before them.
reserved=0
case " ${stages[*]} " in *" timing "*) reserved=$((seconds * 2 / 5)) ;; esac

# stage NAME LIMIT LOG COMMAND...: run a command for at most LIMIT seconds, fewer where less time is left.
stage() {
    local name=$1 limit=$2 log=$3 began=$SECONDS status
    shift 3
    [ "$limit" -le "$(left)" ] || limit=$(left)
    if [ "$limit" -lt 5 ]; then
        say "$name: left out for lack of time"
        failed=1
        return
    fi
    echo "== $name" >>"$out/$log"
    timeout --kill-after=5 "$limit" "$@" >>"$out/$log" 2>&1
    status=$?
    case $status in
        0) say "$name: passed in $((SECONDS - began)) s" ;;
        124 | 137) say "$name: stopped after $((SECONDS - began)) s, see $log" ;;
        *) say "$name: failed with status $status after $((SECONDS - began)) s, see $log" ;;
    esac
    [ "$status" -eq 0 ] || failed=1
}

missing() {
    "$python" - <<'END'
from importlib.metadata import version
from importlib.util import find_spec

needed = "torch torchvision triton numpy timm safetensors typer rich pytest hypothesis setuptools pybind11 ninja".split()
absent = [name for name in needed if find_spec(name) is None]
if "setuptools" not in absent and int(version("setuptools").split(".")[0]) < 77:
    absent.append("setuptools>=77")
print(*absent)
END
}

absent=$(missing) || exit 1
if [ -n "$absent" ] && [ -n "${MIXRANK_WHEELS:-}" ]; then
    for name in $absent; do
        "$python" -m pip install --quiet --no-index --no-deps --no-compile --find-links "$MIXRANK_WHEELS" \
            --target "$site" "$name" || say "$name: no wheel of it in $MIXRANK_WHEELS fits"
    done
    absent=$(missing)
fi
if [ -n "$absent" ]; then
    say "missing: $absent; put their wheels into a folder and name it in MIXRANK_WHEELS"
    failed=1
fi

if ! "$python" -c 'from importlib.metadata import version; version("mixrank-kernels")' 2>/dev/null; then
    "$python" setup.py --quiet egg_info --egg-base "$site" >"$out/build.log" 2>&1 || say "metadata: failed, see build.log"
fi
{
    command -v nvidia-smi >/dev/null && nvidia-smi
    command -v nvcc >/dev/null && nvcc --version | tail -2
    "$python" - "$site/device" <<'END'
import platform
import sys
from pathlib import Path

import torch

print(f"Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA {torch.version.cuda}, {platform.machine()}")
device, architecture = "cpu", ""
if torch.cuda.is_available():
    print(torch.cuda.get_device_properties(0))
    major, minor = torch.cuda.get_device_capability()
    device, architecture = "cuda", f"{major}.{minor}" + "a" * (major >= 9)
Path(sys.argv[1]).write_text(f"{device} {architecture}")
END
} 2>&1 | tee -a "$out/summary.txt"
if [ ! -s "$site/device" ]; then
    say "$python cannot import torch: name one that can in PYTHON"
    exit 1
fi
read -r device architecture < <(cat "$site/device" && echo)
if [ "$device" = cpu ]; then
    say "no CUDA device was found: this is a rehearsal, and its numbers mean nothing"
    failed=1
else
    export TRITON_INTERPRET=0
    # For this card only: each further architecture compiles every CUDA kernel once more.
    export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-$architecture}"
fi

run_build() {
    stage build 240 build.log env MIXRANK_CUDA=auto MAX_JOBS="$(nproc)" "$python" setup.py build_ext --inplace
    stage "what was built" 30 build.log "$python" -c 'from mixrank_kernels import _C, backend
print(_C.build_info())
print("implementations for CUDA tensors:", *backend.available("cuda"))'
    grep '^implementations' "$out/build.log" | tee -a "$out/summary.txt"
}

run_tests() {
    local workers=()
    if "$python" -c 'import xdist' 2>/dev/null; then workers=(-n "$(nproc)" --dist worksteal); fi
    stage "every operator once" 60 tests.log "$python" -m mixrank_bench.gpu_smoke --device "$device"
    stage "tests on the device" 150 tests.log "$python" -m pytest -q -m gpu "${workers[@]}" tests/kernels tests/bench
    stage "tests of Triton" 60 tests.log "$python" -m pytest -q "${workers[@]}" tests/kernels/test_triton.py
}

run_sanitize() {
    local tool sanitizer
    sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
    if [ -z "$sanitizer" ]; then
        say "sanitize: left out, compute-sanitizer is not found"
        return
    fi
    for tool in memcheck racecheck synccheck; do
        # Each tensor an allocation of its own, or nobody sees a step over its end.
        stage "sanitize, $tool" 40 sanitize.log env PYTORCH_NO_CUDA_MEMORY_CACHING=1 \
            "$sanitizer" --tool "$tool" --error-exitcode 3 "$python" -m mixrank_bench.gpu_smoke
    done
}

run_timing() {
    reserved=0
    local options=()
    [ -z "${MIXRANK_COMMIT:-}" ] || options+=(--commit "$MIXRANK_COMMIT")
    [ "$device" = cuda ] || options+=(--rounds 1)
    # The case that was begun last has half a minute to end.
    stage timing "$(left)" timing.log "$python" -m mixrank_bench.gpu --device "$device" --save "$out/gpu.jsonl" \
        --seconds $(($(left) > 60 ? $(left) - 30 : $(left) / 2)) "${options[@]}"
    grep -E 'at least .*x, |^failed|left out' "$out/timing.log" | tee -a "$out/summary.txt"
}

run_tune() {
    if [ "$device" = cpu ]; then
        say "tune: left out, there is no CUDA device"
        return
    fi
    stage tune "$(left)" tune.log "$python" -m mixrank_bench.tune triton --write --seconds $(($(left) * 3 / 4))
    cp mixrank_kernels/triton/config.py "$out"
    grep -E '^(LOWRANK|GRAM|FUSED)' "$out/tune.log" | tee -a "$out/summary.txt"
}

for stage in "${stages[@]}"; do
    "run_$stage"
done
say "$((SECONDS)) s in all; results and logs are in $out"
exit "$failed"
