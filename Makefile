# Each target sets up .venv by itself, once, and again when the build's inputs change.
PYTHON ?= python3
BIN := .venv/bin
BUILD_INPUTS := setup.py pyproject.toml constraints.txt $(wildcard csrc/*.cpp csrc/*/*)

.PHONY: demo test lint bench clean

demo: .venv/installed
	$(BIN)/mixrank demo --out demo-output

test: .venv/installed
	$(BIN)/python -m pytest

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/installed
	$(BIN)/python -m mixrank_bench.run

clean:
	rm -rf .venv build demo-output mixrank_kernels/*.so *.egg-info python/*.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first because the extension is built against the torch that will load it.
.venv/installed: $(BUILD_INPUTS)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt setuptools wheel ninja pybind11 torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[dev]'
	touch $@
