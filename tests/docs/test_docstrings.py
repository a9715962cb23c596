"""The examples in the docstrings run and print what they say."""

import doctest
import importlib
import inspect
from pathlib import Path

import pytest

import bonn_qat
from bonn_qat import functional

PACKAGE = Path(bonn_qat.__file__).parent
# The adapters show excerpts for the user's own model and data; test_examples.py runs the whole scripts.
FILES = [
    path
    for path in sorted(PACKAGE.rglob("*.py"))
    if path.parent.name != "adapters"
    and any(">>> " in line and "+SKIP" not in line for line in path.read_text(encoding="utf-8").splitlines())
]


def module_name(path: Path) -> str:
    return ".".join(("bonn_qat", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


@pytest.mark.parametrize("name", [module_name(path) for path in FILES])
def test_the_examples_of_a_module_run(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # for examples that write files
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    failed, attempted = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert attempted
    assert not failed, capsys.readouterr().out


def test_every_function_of_functional_has_an_example():
    functions = [f for f in vars(functional).values() if inspect.isfunction(f) and f.__module__ == functional.__name__]
    assert not [f.__name__ for f in functions if f.__name__[0] != "_" and ">>> " not in f.__doc__]
