"""The code of the README and of the guides: it runs, its recipe is one, its commands take their options."""

import contextlib
import re
import shlex
import sys
import tomllib
import types
from collections.abc import Callable
from pathlib import Path

import pytest

from bonn_qat import cli
from bonn_qat.exporting.export import FORMATS
from bonn_qat.studies import study
from bonn_qat.training.recipe import Recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = {
    name: (ROOT / name).read_text(encoding="utf-8")
    for name in ("docs/start.md", "docs/backbones.md", "docs/schemes.md")
}
GUIDES = ("start", "schemes", "reproduce", "long_runs", "export", "pretrained", "plugins")


def _blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], dict[str, object]]:
    """Run the Python blocks of a page one after the other in an empty folder, and return their namespace."""

    def run(page: str, text: str) -> dict[str, object]:
        module = types.ModuleType("page")
        monkeypatch.setitem(sys.modules, "page", module)
        with contextlib.chdir(tmp_path):
            for index, block in enumerate(_blocks(text, "python")):
                exec(compile(block, f"{page}, block {index}", "exec"), module.__dict__)
        return module.__dict__

    return run


def test_the_readme_is_short_and_its_code_makes_a_packed_file(run, tmp_path: Path) -> None:
    assert len(README.splitlines()) <= 150
    (block,) = _blocks(README, "python")
    assert len([line for line in block.splitlines() if line]) <= 13
    namespace = run("README.md", README)
    assert len(namespace["model"].binarization.binary) == 16
    assert (tmp_path / "net.safetensors").is_file()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # Brevitas' own, at its import
@pytest.mark.parametrize("page", CODE)
def test_the_python_blocks_of_a_guide_run(page: str, run) -> None:
    assert run(page, CODE[page])


def test_the_recipe_of_the_guide_is_one() -> None:
    (recipe,) = _blocks((ROOT / "docs" / "recipes.md").read_text(encoding="utf-8"), "toml")
    assert Recipe.from_dict(tomllib.loads(recipe)).skip == ("layer3.*",)


def test_the_commands_are_environments_of_tox() -> None:
    sections = re.findall(r"^\[(.*)\]", (ROOT / "tox.ini").read_text(), re.MULTILINE)
    assert [block.strip() for block in _blocks(README, "sh")[1:]] == [
        "pip install tox-uv && tox -e compare",
        "pip install tox-uv && tox",
    ]
    assert {f"testenv:{name}" for name in re.findall(r"tox -e (\w+)", README)} <= set(sections)


@pytest.mark.parametrize("guide", GUIDES)
def test_the_commands_of_a_guide_name_known_studies_formats_and_options(guide: str) -> None:
    text = (ROOT / "docs" / f"{guide}.md").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [shlex.split(line, comments=True) for block in _blocks(text, "sh") for line in block.splitlines()]
    ours = [words for words in lines if {"bonn-qat", "bonn_qat"} & set(words) and "install" not in words]
    assert ours
    commands = cli.app.commands
    for words in ours:
        name = next(word for word in words if word in commands)
        given = commands[name].make_context(name, words[words.index(name) + 1 :]).params
        if name == "reproduce":
            studies = study.load(given["study"]).only([part for part in (given["only"] or "").split(",") if part])
            assert studies.settings
        if name == "export":
            assert given["format"] in FORMATS


def test_every_picture_exists() -> None:
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).is_file(), path
