# Each target sets up .venv by itself, once, and again when the build's inputs change.
PYTHON ?= python3
BIN := .venv/bin
BUILD_INPUTS := setup.py pyproject.toml constraints.txt $(wildcard csrc/*.cpp csrc/*/*)

.PHONY: demo test lint package bench sanitize clean

demo: .venv/installed
	$(BIN)/mixrank demo --out demo-output

# As many processes as processors, of one thread each: PROCESSES=0 runs all tests in one, for a debugger.
PROCESSES ?= auto
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES) --dist worksteal

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The sdist, a wheel made from it and from nothing else, and that wheel at work in a new venv outside the checkout.
package: .venv/installed
	rm -rf build/package
	$(BIN)/python -m build --quiet --no-isolation --outdir build/package
	$(BIN)/python tests/packaging/check.py build/package

bench: .venv/installed
	$(BIN)/mixrank bench

# The C++ kernels under gcc's AddressSanitizer and UndefinedBehaviorSanitizer, in a build of their own which nothing else
# sees: no access outside a tensor or the scratch memory, no signed overflow, no misaligned pointer, no impossible shift.
# The C++ library is preloaded too because AddressSanitizer has to find its throw before Python loads it.
SANITIZED := build/sanitize/lib
UNDER_SANITIZERS = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONSAFEPATH=1 PYTHONPATH=$(SANITIZED) $(BIN)/python

sanitize: .venv/installed
	MIXRANK_CUDA=0 MIXRANK_SANITIZE=1 $(BIN)/python setup.py --quiet build \
		--build-base build/sanitize --build-lib $(SANITIZED)
	$(UNDER_SANITIZERS) -c "from mixrank_kernels import _C; assert '$(SANITIZED)' in _C.__file__, _C.__file__"
	$(UNDER_SANITIZERS) -m pytest tests/kernels --capture=sys \
		-k "not triton and not reference and not compile and not export and not opcheck"

clean:
	rm -rf .venv build demo-output mixrank_kernels/*.so *.egg-info python/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first because the extension is built against the torch that will load it.
.venv/installed: $(BUILD_INPUTS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools wheel ninja pybind11 torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@
