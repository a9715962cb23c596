import contextlib
import re
import shlex
import sys
import tomllib
import types
from pathlib import Path

import pytest

import bonn_qat
from bonn_qat import cli, hookspecs, plugins
from bonn_qat.exporting.export import FORMATS
from bonn_qat.studies import study
from bonn_qat.training.recipe import Recipe

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def namespace(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """The namespace after running the README's Python blocks one after the other in an empty folder."""
    module = types.ModuleType("readme")
    sys.modules["readme"] = module
    with contextlib.chdir(tmp_path_factory.mktemp("readme")):
        for index, block in enumerate(_blocks("python")):
            exec(compile(block, f"README.md, block {index}", "exec"), module.__dict__)
    return module.__dict__


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")  # Brevitas' own, at its import
def test_the_python_blocks_run(namespace: dict[str, object]) -> None:
    assert len(namespace["model"].binarization.binary) == 16


def test_the_example_plugin_is_found_by_name(namespace: dict[str, object]) -> None:
    pm = plugins.create_manager(entry_points=False)
    pm.register(sys.modules["readme"], name="readme")
    binarized = bonn_qat.binarize(namespace["timm"].create_model("resnet18"), "bonn-hard", pm=pm)
    objective = bonn_qat.Objective(binarized, regularizers={"bound": 1.0}, pm=pm)
    assert objective.regularizers["bound"]() == 0  # every latent starts inside


def test_the_toml_blocks_are_an_entry_point_of_our_group_and_a_recipe() -> None:
    entry_points, recipe = _blocks("toml")
    assert list(tomllib.loads(entry_points)["project"]["entry-points"]) == [hookspecs.PROJECT]
    assert Recipe.from_dict(tomllib.loads(recipe)).skip == ("layer3.*",)


def test_the_commands_are_environments_of_tox() -> None:
    sections = re.findall(r"^\[(.*)\]", (ROOT / "tox.ini").read_text(), re.MULTILINE)
    assert [block.strip() for block in _blocks("sh")[1:3]] == [
        "pip install tox-uv && tox -e compare",
        "pip install tox-uv && tox",
    ]
    assert "testenv:compare" in sections


def test_the_other_commands_name_known_studies_settings_and_options() -> None:
    lines = [shlex.split(line, comments=True) for block in _blocks("sh")[3:] for line in block.splitlines()]
    lines = [words for words in lines if words]
    commands = cli.app.commands
    names = []
    for words in lines:
        name = next(word for word in words if word in commands)
        given = commands[name].make_context(name, words[words.index(name) + 1 :]).params
        names.append(name)
        if name == "reproduce":
            studies = study.load(given["study"]).only([part for part in given["only"].split(",") if part])
            assert studies.settings
        if name == "export":
            assert given["format"] in FORMATS
    assert names == ["export", "bench", *3 * ["train"], "compare", *4 * ["reproduce"]]


@pytest.mark.parametrize("hook", [name for name in vars(hookspecs) if name.startswith("bonn_qat_")])
def test_every_hook_is_in_the_readme(hook: str) -> None:
    assert f"`{hook}`" in README


def test_every_picture_exists() -> None:
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).is_file(), path
