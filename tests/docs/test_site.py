"""The site: every public name is on it and says what it is, every page is in its menu, its notebooks run."""

import contextlib
import importlib
import re
import sys
import types
from pathlib import Path

import bonn_qat_runtime
import pytest

import bonn_qat

DOCS = Path(__file__).parents[2] / "docs"
API = "\n".join(page.read_text(encoding="utf-8") for page in sorted((DOCS / "api").glob("*.md")))
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*_nb.py"))


def test_every_public_name_is_on_a_page_and_has_a_docstring() -> None:
    listed = set(re.findall(r"^\.\. (?:auto\w+|py:data):: ([\w.]+)", API, re.MULTILINE))
    names = {name.removeprefix("bonn_qat.") for name in listed}
    assert not set(bonn_qat.__all__) - names
    assert "bonn_qat_runtime" in listed
    things = [getattr(package, name) for package in (bonn_qat, bonn_qat_runtime) for name in package.__all__]
    assert not [thing for thing in things if not thing.__doc__]


def test_every_page_is_in_the_menu() -> None:
    menu = "\n".join(page.read_text(encoding="utf-8") for page in DOCS.rglob("index.md"))
    pages = {page.stem for page in DOCS.rglob("*.md") if page.parent.name != "adr" and page.stem != "index"}
    assert not {page for page in pages if not re.search(rf"(^|<|/){page}>?$", menu, re.MULTILINE)}
    assert {re.sub("_nb$", "", path.stem) for path in NOTEBOOKS} <= set(menu.splitlines())


def test_the_figures_of_the_pages_are_those_of_the_script() -> None:
    spec = importlib.util.spec_from_file_location("figures", DOCS / "figures.py")
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    pages = [DOCS.parent / "README.md", *DOCS.glob("*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    assert {f"{name}.svg" for name in figures.DRAWINGS} == set(re.findall(r"figures/(\w+\.svg)", text))


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = re.sub(
        r"^(EPOCHS|ROUNDS|SEEDS) = \d+$", r"\1 = 1", notebook.read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    source = source.replace('load_data("digits")', 'load_data("digits", train_images=256, test_images=128)')
    module = types.ModuleType("notebook")
    monkeypatch.setitem(sys.modules, "notebook", module)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with contextlib.chdir(tmp_path):
        exec(compile(source, notebook, "exec"), module.__dict__)
