"""The examples for other frameworks: few lines change, and docs/loops.md shows them."""

import ast
import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
BEFORE = sorted((EXAMPLES / "before").glob("*.py"))


@pytest.fixture(scope="module")
def loops() -> ModuleType:
    spec = importlib.util.spec_from_file_location("loops", ROOT / "docs" / "loops.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_pair_is_on_the_page(loops: ModuleType) -> None:
    assert {path.stem for path in BEFORE} == set(loops.LOOPS)
    assert all((EXAMPLES / path.name).is_file() for path in BEFORE)


@pytest.mark.parametrize("name", [path.stem for path in BEFORE])
def test_at_most_five_lines_are_added(name: str, loops: ModuleType) -> None:
    assert 0 < loops.added(name) <= 5


@pytest.mark.parametrize("name", [path.stem for path in BEFORE])
def test_no_line_holds_two_statements(name: str, loops: ModuleType) -> None:
    for path in (EXAMPLES / f"{name}.py", EXAMPLES / "before" / f"{name}.py"):
        starts = [n.lineno for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.stmt)]
        assert len(starts) == len(set(starts))


def test_the_page_is_current(loops: ModuleType) -> None:
    assert (ROOT / "docs" / "loops.md").read_text(encoding="utf-8") == loops.page(), "run: python docs/loops.py"
