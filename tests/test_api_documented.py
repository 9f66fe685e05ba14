"""Every public name says what it does, what it takes, gives and refuses, and shows an example.

That the examples run and show the truth is tested in test_documents.py. A class that other public names return, or that
their examples make, is shown there.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import doctest
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from torch import Tensor

import mixrank
import mixrank_kernels
from mixrank_kernels import backend, packing

ROOT = Path(__file__).resolve().parent.parent
HEADING = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Example):$")
ENTRY = re.compile(r"^\*{0,2}(\w+(?:, \w+)*): +\S+ +\S+|^\*{0,2}(\w+(?:, \w+)*):$")
SHAPE = re.compile(r"``\[[^\]]*\]``|shape|one (?:weight|for each)|as for|once more")
DTYPE = re.compile(r"dtype|float|int8|int16|int32|int64|uint8|as for|once more")
CHECKED_ERRORS = ("InputError", "ValueError", "TypeError", "RuntimeError")


def named_in_documents() -> Iterator[str]:
    """Full names of functions and classes that the documents use."""
    text = "\n".join(path.read_text() for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
    names = set(re.findall(r"\bmixrank(?:_kernels)?(?:\.\w+)+", text))
    for module, imported in re.findall(r"^from (mixrank[\w.]*) import (.+)$", text, flags=re.MULTILINE):
        names |= {f"{module}.{name}" for name in re.findall(r"\w+", imported)}
    for name in sorted(names):
        parent, _, last = name.rpartition(".")
        try:
            found = getattr(importlib.import_module(parent), last, None)
        except ImportError:  # of an attribute of a class
            continue
        if inspect.isfunction(found) or inspect.isclass(found):
            yield name


def public() -> dict[str, Any]:
    """What is public, by its full name: functions and classes, no constants."""
    names = [f"mixrank.{name}" for name in mixrank.__all__]
    names += [f"mixrank_kernels.{name}" for name in mixrank_kernels.__all__]
    for module in (backend, packing):
        names += [f"{module.__name__}.{name}" for name in vars(module) if own(module, name)]
    found = {}
    for name in dict.fromkeys([*names, *named_in_documents()]):
        parent, _, last = name.rpartition(".")
        value = getattr(importlib.import_module(parent), last)
        if inspect.isfunction(value) or inspect.isclass(value):
            found[name] = value
    return found


def own(module: ModuleType, name: str) -> bool:
    """Whether a name of a module is public and its own: one that it lists, or without a list one defined there."""
    if hasattr(module, "__all__"):
        return name in module.__all__
    return not name.startswith("_") and getattr(getattr(module, name), "__module__", None) == module.__name__


PUBLIC = public()
RESULTS = {
    word
    for value in PUBLIC.values()
    if inspect.isfunction(value)
    for word in re.findall(r"\w+", str(inspect.signature(value).return_annotation))
}
RESULTS |= {
    word
    for value in PUBLIC.values()
    if dataclasses.is_dataclass(value) and value.__name__ in RESULTS
    for field in dataclasses.fields(value)
    for word in re.findall(r"\w+", str(field.type))
}


def sections(text: str) -> dict[str, str]:
    """The parts of a docstring by their headings; what comes before the first has none."""
    found, heading = {"": []}, ""
    for line in inspect.cleandoc(text).splitlines():
        if match := HEADING.match(line):
            heading = match[1]
            found[heading] = []
        else:
            found[heading].append(line)
    return {name: textwrap.dedent("\n".join(lines)).strip("\n") for name, lines in found.items()}


def entries(text: str) -> dict[str, str]:
    """What a section says of each name; a name without at least two words is none."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in text.splitlines():
        if match := ENTRY.match(line):
            names = (match[1] or match[2]).split(", ")
        for name in names:
            found[name] = f"{found.get(name, '')} {line}".strip()
    return {name: said for name, said in found.items() if len(said.split()) >= 3}


def raised(function: Callable) -> set[str]:
    """Names of the errors that a function's own body raises, those of functions inside it aside."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    found, left = set(), list(tree.body[0].body)
    while left:
        node = left.pop()
        if isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef):
            continue
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            found.add(node.exc.func.id)
        left += ast.iter_child_nodes(node)
    return found & set(CHECKED_ERRORS)


def faults_of_call(function: Callable, parts: dict[str, str]) -> list[str]:
    """What the sections do not say of the parameters and of the errors of a function."""
    signature = inspect.signature(function)
    parameters = {name: one for name, one in signature.parameters.items() if name not in ("self", "cls")}
    told = entries(parts.get("Args", ""))
    faults = [f"Args lacks {name}" for name in parameters if name not in told]
    faults += [f"Args has {name}, which is no parameter" for name in told if name not in parameters]
    if not faults and list(told) != list(parameters):
        faults.append("Args are not in the order of the parameters")
    tensors = [name for name, one in parameters.items() if re.match(r"Tensor\b", str(one.annotation)) and name in told]
    for what, rule in (("shape", SHAPE), ("dtype", DTYPE)):
        faults += [f"Args does not tell the {what} of {name}" for name in tensors if not rule.search(told[name])]
    errors = entries(parts.get("Raises", ""))
    checks = re.match(r"Raise (\w+)", parts[""])  # what only checks says it in its first words
    faults += [f"Raises lacks {name}" for name in sorted(raised(function) - {*errors, checks and checks[1]})]
    known = vars(builtins) | {"InputError": mixrank.InputError}
    return faults + [f"Raises has {name}, which is no error" for name in errors if name not in known]


def faults_of_function(function: Callable) -> list[str]:
    parts = sections(function.__doc__ or "")
    faults = faults_of_summary(parts) + faults_of_call(function, parts)
    signature = inspect.signature(function)
    gives = str(signature.return_annotation) not in ("None", "Iterator[None]")
    # Without parameters there is nothing else to say than what it returns.
    if gives and signature.parameters and len(parts.get("Returns", "").split()) < 2:
        faults.append("it does not tell what it returns")
    return faults


def faults_of_summary(parts: dict[str, str]) -> list[str]:
    summary = parts[""].partition("\n\n")[0]
    whole = len(summary.split()) >= 3 and summary.endswith((".", ":"))
    return [] if whole else ["it does not say in a sentence what it is"]


def faults_of_class(cls: type) -> list[str]:
    parts = sections(cls.__doc__ or "")
    faults = faults_of_summary(parts)
    if dataclasses.is_dataclass(cls):
        told = entries(parts.get("Attributes", ""))
        inherited = {name for base in cls.__mro__[1:] for name in getattr(base, "__dataclass_fields__", ())}
        fields = [field.name for field in dataclasses.fields(cls) if field.name not in inherited]
        faults += [f"Attributes lacks {name}" for name in fields if name not in told]
        faults += [f"Attributes has {name}, which is no field" for name in told if name not in fields]
        check = vars(cls).get("__post_init__")
        if check and raised(check) - set(entries(parts.get("Raises", ""))):
            faults.append("Raises lacks what __post_init__ raises")
    elif not issubclass(cls, Exception):
        faults += faults_of_call(cls.__init__, parts)
    for name, value in vars(cls).items():
        method = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if name.startswith("_") or name in ("forward", "extra_repr"):
            continue
        if inspect.isfunction(method):
            faults += [f"{name}: {fault}" for fault in faults_of_method(method)]
        elif isinstance(method, property) and len((method.__doc__ or "").split()) < 3:
            faults.append(f"{name}: it does not say what it is")
    return faults


def faults_of_method(method: Callable) -> list[str]:
    parts = sections(method.__doc__ or "")
    return faults_of_summary(parts) + faults_of_call(method, parts)


def example(value: Any) -> str:
    """The code of the examples of a docstring, without those that do not run."""
    tests = doctest.DocTestFinder(recurse=False).find(value, value.__name__, module=False)
    return "".join(one.source for test in tests for one in test.examples if not one.options.get(doctest.SKIP))


def poor(x: Tensor, rank: int, bias: Tensor | None = None, like: Tensor | None = None) -> Tensor:  # noqa: D417
    """Does something to x.

    Args:
        x: ``[M, K]``, float32.
        width: how wide the thing is.
        bias: yes.
        like: some other tensor.

    Example:
        >>> poor(x, 2)  # doctest: +SKIP
    """
    if rank < 1:
        raise ValueError("rank must be at least 1")

    def unused() -> None:
        raise TypeError

    return x


def test_what_a_docstring_lacks_is_named():
    assert faults_of_function(poor) == [
        "Args lacks rank",
        "Args lacks bias",
        "Args has width, which is no parameter",
        "Args does not tell the shape of like",
        "Args does not tell the dtype of like",
        "Raises lacks ValueError",
        "it does not tell what it returns",
    ]
    assert example(poor) == ""


def test_the_operators_and_the_steps_are_among_the_public_names():
    assert {"mixrank.compress", "mixrank_kernels.lowrank_linear", "mixrank_kernels.backend.explain"} <= set(PUBLIC)
    assert "mixrank.__version__" not in PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_it_is_documented(name):
    value = PUBLIC[name]
    assert (faults_of_class if inspect.isclass(value) else faults_of_function)(value) == []


@pytest.mark.parametrize("name", PUBLIC)
def test_it_has_an_example(name):
    value = PUBLIC[name]
    if inspect.isclass(value) and value.__name__ in RESULTS:
        return
    code = "".join(map(example, PUBLIC.values())) if inspect.isclass(value) else example(value)
    assert re.search(rf"\b{value.__name__}\b", code)
