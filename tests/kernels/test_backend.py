"""The choice of an implementation: forcing, nesting, explaining; loading of the extension."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import mixrank_kernels
from mixrank_kernels import _load, _register, backend, ops, reference, testing
from mixrank_kernels._schema import SCHEMAS

X, DOWN, UP = torch.randn(6, 8), torch.randn(3, 8), torch.randn(5, 3)


def test_the_best_instruction_set_is_the_default():
    explanation = backend.explain("lowrank_linear", X, DOWN, UP)
    assert explanation.chosen == f"cpu-{backend.isas()[0]}"
    assert backend.available()[0] == "cpu"


@pytest.mark.parametrize("name", backend.available())
def test_explain_names_what_is_forced_and_why_the_others_are_not(name):
    with backend.use(name):
        explanation = backend.explain("lowrank_linear", X, DOWN, UP)
        assert explanation.chosen == (f"cpu-{backend.isas()[0]}" if name == "cpu" else name)
        assert f"served by {explanation.chosen}" in str(explanation)
        for other, reason in explanation.refused.items():
            assert other != explanation.chosen
            assert reason


def test_forced_choices_nest_and_end(monkeypatch):
    served = []

    def spy(*arguments):
        served.append("reference")
        return original(*arguments)

    original = reference.lowrank_linear
    monkeypatch.setattr(reference, "lowrank_linear", spy)
    ops.lowrank_linear(X, DOWN, UP)
    assert served == []
    with backend.use("reference"):
        ops.lowrank_linear(X, DOWN, UP)
        assert len(served) == 1
        with backend.use("cpu-portable"):
            ops.lowrank_linear(X, DOWN, UP)
            assert len(served) == 1
            assert backend.explain("lowrank_linear", X, DOWN, UP).chosen == "cpu-portable"
        ops.lowrank_linear(X, DOWN, UP)
        assert len(served) == 2
    ops.lowrank_linear(X, DOWN, UP)
    assert len(served) == 2
    assert backend.explain("lowrank_linear", X, DOWN, UP).chosen == f"cpu-{backend.isas()[0]}"


def test_an_operator_that_an_implementation_lacks_keeps_its_default(monkeypatch):
    monkeypatch.setattr(_register, "TRITON_OPERATORS", ("gram_accumulate_",))
    served = []
    monkeypatch.setattr(_register, "triton_implementation", lambda op: lambda *arguments: served.append(op))
    assert "triton" not in backend.available("cpu", "lowrank_linear")
    assert "triton" in backend.available("cpu", "gram_accumulate_")
    assert "triton" in backend.available("cpu")
    with backend.use("triton"):
        torch.testing.assert_close(ops.lowrank_linear(X, DOWN, UP), X @ DOWN.mT @ UP.mT)
        ops.gram_accumulate_(torch.zeros(8, 8), X)
        explanation = backend.explain("lowrank_linear", X, DOWN, UP)
    assert served == ["gram_accumulate_"]
    assert explanation.chosen == f"cpu-{backend.isas()[0]}"
    assert explanation.refused["triton"] == "it has no kernel for lowrank_linear"
    assert "comes first" in explanation.refused["reference"]


def test_an_operator_that_the_extension_lacks_is_served_by_the_reference(monkeypatch):
    monkeypatch.setattr(_register, "COMPILED_OPERATORS", ("gram_accumulate_",))
    assert backend.available("cpu", "lowrank_linear") == ("reference", "triton", "composite")
    with backend.use("cpu-portable"):
        explanation = backend.explain("lowrank_linear", X, DOWN, UP)
    assert explanation.chosen == "reference"
    assert explanation.refused["cpu-portable"] == "it has no kernel for lowrank_linear"


def test_the_operators_of_triton_are_those_stated():
    from mixrank_kernels import triton

    assert set(_register.TRITON_OPERATORS) == set(triton.__all__) & set(SCHEMAS)


@pytest.mark.parametrize("op", SCHEMAS)
def test_available_agrees_with_explain(op):
    arguments = testing.sample_inputs(op)[0].arguments().values()
    names = backend.available("cpu", op)
    chosen = backend.explain(op, *arguments).chosen
    assert chosen == names[0] or (names[0] == "cpu" and chosen.startswith("cpu-"))
    for name in set(names) - {"cpu"}:
        with backend.use(name):
            assert backend.explain(op, *arguments).chosen == name


def test_a_forced_choice_ends_with_an_exception():
    with pytest.raises(KeyError), backend.use("reference"):
        raise KeyError
    assert backend.explain("lowrank_linear", X, DOWN, UP).chosen.startswith("cpu-")


def test_a_forced_choice_reaches_compiled_functions(monkeypatch):
    served = []
    compiled = torch.compile(ops.lowrank_linear, fullgraph=True)
    original = reference.lowrank_linear
    monkeypatch.setattr(reference, "lowrank_linear", lambda *a: served.append(1) or original(*a))
    compiled(X, DOWN, UP)
    assert served == []
    with backend.use("reference"):
        compiled(X, DOWN, UP)
    assert served == [1]


def test_unknown_names_are_refused():
    with (
        pytest.raises(ValueError, match=r"implementation must be one of cpu, .*but it was 'cublas'"),
        backend.use("cublas"),
    ):
        pass
    with pytest.raises(ValueError, match=r"op must be one of lowrank_linear, .*, but it was 'matmul'"):
        backend.explain("matmul", X)
    with pytest.raises(ValueError, match=r"op must be one of lowrank_linear, .*, but it was 'matmul'"):
        backend.available("cpu", "matmul")


def test_explain_checks_the_arguments():
    with pytest.raises(RuntimeError, match="down must have shape"):
        backend.explain("lowrank_linear", X, UP, UP)


def test_an_instruction_set_that_is_missing_is_refused(monkeypatch):
    monkeypatch.setattr(backend, "isas", lambda: ("portable",))
    with (
        pytest.raises(
            RuntimeError, match="cpu-avx2 cannot run here: this machine does not have the instruction set avx2"
        ),
        backend.use("cpu-avx2"),
    ):
        pass


RUN_WITHOUT_EXTENSION = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "mixrank_kernels._C" else find(name, *rest)
import torch, mixrank_kernels
assert not mixrank_kernels.HAS_EXTENSION
x, down, up = torch.randn(3, 8, requires_grad=True), torch.randn(2, 8), torch.randn(4, 2)
y = mixrank_kernels.lowrank_linear(x, down, up)
torch.testing.assert_close(y, torch.nn.functional.linear(x, up @ down))
y.sum().backward()
gram = torch.zeros(8, 8, dtype=torch.float64)
mixrank_kernels.gram_accumulate_(gram, x.detach())
mixrank_kernels.cross_gram_accumulate_(gram, x.detach(), x.detach().clone())
mixrank_kernels.lowrank_residual_linear(x, down, up, residual_down=down, residual_up=up).sum().backward()
explanation = mixrank_kernels.backend.explain("lowrank_linear", x, down, up)
assert explanation.chosen == "reference", explanation
assert "is not built; build it with" in explanation.refused["cpu"], explanation
"""


def test_everything_works_without_the_extension():
    subprocess.run([sys.executable, "-c", RUN_WITHOUT_EXTENSION], check=True, timeout=120)


def test_importing_touches_neither_cuda_nor_triton():
    code = (
        "import sys, torch, mixrank_kernels; assert 'triton' not in sys.modules, 'triton'; "
        "assert not torch.cuda.is_initialized()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_broken_extension_says_how_to_rebuild_it(monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: aoti_torch_something")

    monkeypatch.setattr(_load.importlib, "import_module", broken)
    with pytest.raises(ImportError, match=r"does not load: undefined symbol.*pip install --no-build-isolation"):
        _load.load_extension()


def test_an_extension_of_another_version_says_how_to_rebuild_it(monkeypatch):
    stale = SimpleNamespace(build_info=lambda: {"version": "0.0.1"})
    monkeypatch.setattr(_load.importlib, "import_module", lambda name: stale)
    with pytest.raises(ImportError, match=r"was built from version 0\.0\.1 but the package is .*pip install"):
        _load.load_extension()


def test_the_extension_is_of_this_version():
    assert _register.extension.build_info()["version"] == mixrank_kernels.__version__
