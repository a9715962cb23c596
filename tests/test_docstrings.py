"""The examples in docstrings run."""

import doctest
import importlib
from pathlib import Path

import pytest

import bonn_qat

PACKAGE = Path(bonn_qat.__file__).parent
# The adapters' examples are lines for a user's own script.
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if ">>> " in path.read_text(encoding="utf-8") and path.parent.name != "adapters"
)


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_run(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0
