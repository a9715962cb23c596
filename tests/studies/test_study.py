"""Studies as data: the included ones are fair and consistent, and mistakes in a file are errors."""

import dataclasses
import functools
import math
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import bonn_qat
from bonn_qat.errors import BonnQatError, InvalidRecipe, UnknownName
from bonn_qat.scheme import Stage
from bonn_qat.studies import study
from bonn_qat.studies.reproduce import FOLDER
from bonn_qat.studies.study import FEWEST_TEST_IMAGES, Setting, Study, StudyArm, scaled
from bonn_qat.training import data
from bonn_qat.training.network import check
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.schedule import lr_factor

FILES = Path(bonn_qat.__file__).parent / "studies" / "tables"
OF_AN_ARM = {"scheme", "scheme_options", "latents"}

load = functools.cache(study.load)
every_study = pytest.mark.parametrize("name", study.names())


def arms(name: str) -> Iterator[tuple[Setting, StudyArm]]:
    for setting in load(name).settings:
        yield from ((setting, arm) for arm in setting.arms)


# Those that come with the package


def test_the_papers_tables_and_figures_are_there() -> None:
    wanted = {"table2", "table3", "table4", "fig3", "fig4", "fig5", "fig6", "ablation"}
    assert wanted <= set(study.names()) == {path.stem for path in FILES.glob("*.toml")}


@every_study
def test_every_arm_can_be_run(name: str) -> None:
    for _, arm in arms(name):
        check(arm.recipe)
        assert arm.recipe.data in (*data.NAMES, FOLDER)


@every_study
def test_arms_of_a_setting_differ_in_nothing_but_scheme_options_and_start(name: str) -> None:
    for setting in load(name).settings:
        shared = [{key: value for key, value in arm.recipe.to_dict().items() if key not in OF_AN_ARM}
                  for arm in setting.arms]  # fmt: skip
        assert all(other == shared[0] for other in shared)


@every_study
def test_latents_start_alike_where_the_study_does_not_say_otherwise(name: str) -> None:
    content = tomllib.loads((FILES / f"{name}.toml").read_text(encoding="utf-8"))
    written = [arm for setting in content["settings"] for arm in setting["arms"]]
    read = [arm.recipe for _, arm in arms(name)]
    starts = {recipe.latents for arm, recipe in zip(written, read, strict=True)
              if "latents" not in arm and recipe.scheme != "float"}  # fmt: skip
    assert len(starts) == 1
    if name == "table3":
        assert not any("latents" in arm for arm in written)


@pytest.mark.parametrize("path", sorted(FILES.glob("recipes/*.toml")), ids=lambda path: path.stem)
def test_every_studys_recipe_states_what_the_paper_leaves_to_the_code(path: Path) -> None:
    stated = tomllib.loads(path.read_text(encoding="utf-8"))
    assert {"nesterov", "norm_decay"} <= stated.keys()


@pytest.mark.parametrize("name", ["table2", "table4", "fig6"])
def test_imagenet_has_the_papers_augmentation(name: str) -> None:
    assert {arm.recipe.augmentation for _, arm in arms(name)} == {"crop"}


def test_every_arm_of_starts_has_each_start() -> None:
    found: dict[str, set[str]] = {}
    for _, arm in arms("starts"):
        found.setdefault(arm.recipe.scheme_spec, set()).add(arm.recipe.latents)
    assert all(starts == {"0.01", "float", "equal-output"} for starts in found.values())


def test_what_two_studies_have_in_common_is_the_same_run_with_the_same_number_of_the_paper() -> None:
    """So that studies can share a directory."""
    seen: dict[tuple[str, str], tuple[Recipe, set[tuple[str, float]]]] = {}
    for name in study.names():
        for setting, arm in arms(name):
            recipe, numbers = seen.setdefault((setting.name, arm.recipe.name), (arm.recipe, set()))
            assert recipe == arm.recipe, (name, setting.name)
            numbers |= set(arm.paper.items())
    for key, (_, numbers) in seen.items():
        assert len(dict(numbers)) == len(numbers), (key, numbers)


@pytest.mark.parametrize(
    ("figure", "table"), [("fig3", "table3"), ("fig4", "table3"), ("fig5", "table3"), ("fig6", "table4")]
)
def test_a_figure_needs_no_run_that_its_table_has_not_made(figure: str, table: str) -> None:
    made = {(setting.name, arm.recipe.name) for setting, arm in arms(table)}
    assert {(setting.name, arm.recipe.name) for setting, arm in arms(figure)} <= made
    assert load(figure).seeds <= load(table).seeds


def test_a_study_can_be_cut_down_to_some_of_its_settings() -> None:
    table = load("table3")
    assert table.only([]) == table
    assert [setting.name for setting in table.only(["cifar10-wrn22-64"]).settings] == ["cifar10-wrn22-64"]
    with pytest.raises(UnknownName, match="unknown setting of table3 'cifar10-wrn22-61'; did you mean 'cifar10-wrn"):
        table.only(["cifar10-wrn22-61"])


# Scale

WHOLE = Recipe(epochs=250, schedule="step", milestones=(60, 120, 240), factors=(0.2, 0.04, 0.1))
SIZES: dict[str, Any] = {"train_images": 50_000, "test_images": 10_000}


def test_a_scale_of_one_changes_nothing() -> None:
    assert scaled(WHOLE, 1, **SIZES) is WHOLE


@pytest.mark.parametrize("scale", [0.9, 0.25, 0.01, 0.0015])
@pytest.mark.parametrize("part", [0, 20_000])
def test_the_work_is_scaled_and_epochs_and_images_alike(scale: float, part: int) -> None:
    images, share = part or SIZES["train_images"], math.sqrt(scale)
    small = scaled(dataclasses.replace(WHOLE, train_images=part), scale, **SIZES)
    assert abs(small.epochs - share * WHOLE.epochs) <= 0.5
    assert abs(small.train_images - share * images) <= 0.5
    rounding = 1 / (share * WHOLE.epochs) + 1 / (share * images)
    assert small.epochs * small.train_images == pytest.approx(scale * WHOLE.epochs * images, rel=rounding)


@pytest.mark.parametrize("scale", [0.9, 0.01, 0.0015, 1e-9])
def test_the_schedule_keeps_its_shape(scale: float) -> None:
    small = scaled(WHOLE, scale, **SIZES)
    assert len(small.milestones) == len(WHOLE.milestones)
    assert list(small.milestones) == sorted(small.milestones)
    assert all(1 <= milestone <= small.epochs for milestone in small.milestones)
    assert lr_factor(small, small.epochs) == lr_factor(WHOLE, WHOLE.epochs)
    unchanged = {"epochs", "milestones", "train_images", "test_images"}
    before, after = WHOLE.to_dict(), small.to_dict()
    assert {key for key in before if before[key] != after[key]} <= unchanged


@pytest.mark.parametrize(
    ("scale", "there", "kept"), [(0.81, 10_000, 9_000), (0.01, 10_000, FEWEST_TEST_IMAGES), (0.01, 359, 0)]
)
def test_enough_test_images_stay(scale: float, there: int, kept: int) -> None:
    assert scaled(WHOLE, scale, train_images=1000, test_images=there).test_images == kept
    part = scaled(dataclasses.replace(WHOLE, test_images=there), scale, train_images=1000, test_images=99_999)
    assert part.test_images == (kept or there)


def test_images_that_are_held_out_are_none_of_those_trained_on() -> None:
    recipe = dataclasses.replace(WHOLE, validation_images=5000)
    small = scaled(recipe, 0.01, **SIZES)
    assert small.validation_images == FEWEST_TEST_IMAGES
    assert small.train_images - small.validation_images == 0.1 * (50_000 - 5000)
    assert scaled(recipe, 0.9999, **SIZES).train_images <= 50_000


@pytest.mark.parametrize("scale", [0, -0.1, 1.001, math.nan, math.inf])
def test_an_impossible_scale_is_an_error(scale: float) -> None:
    with pytest.raises(InvalidRecipe, match=rf"the scale is {scale:g}; allowed: above 0, at most 1"):
        scaled(WHOLE, scale, **SIZES)


# A file of one's own

STUDY = """
title = "Mine"
seeds = 2
figures = ["final"]
recipe = "base.toml"

[[settings]]
name = "small"
recipe = { epochs = 3 }
arms = [
    { scheme = "float", paper = { top1 = 90 } },
    { scheme = "xnor:clip=0.5", label = "XNOR", latents = "0.02" },
    { scheme = "bonn", recipe = { weight_decay = 0.0 } },
]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "base.toml").write_text('latents = "0.01"\nepochs = 5\n[[stages]]\nshare = 1.0')
    return tmp_path


def read(folder: Path, content: str) -> Study:
    (folder / "mine.toml").write_text(content)
    return study.load(str(folder / "mine.toml"))


def test_a_file_is_read_with_its_recipe_and_what_it_leaves_out(folder: Path) -> None:
    found = read(folder, STUDY)
    (setting,) = found.settings
    assert (found.name, found.title, found.source, found.note, found.seeds, found.chain, found.figures) == (
        "mine", "Mine", "", "", 2, False, ("final",),
    )  # fmt: skip
    assert (setting.name, setting.title) == ("small", "small")
    base = Recipe(epochs=3, stages=(Stage(),))
    wanted = [
        dataclasses.replace(base, scheme="float", latents="float"),
        dataclasses.replace(base, scheme="xnor", scheme_options={"clip": 0.5}, latents="0.02"),
        dataclasses.replace(base, weight_decay=0.0, latents="0.01"),
    ]
    assert [arm.recipe for arm in setting.arms] == wanted
    assert [arm.label for arm in setting.arms] == ["", "XNOR", ""]
    assert [arm.paper for arm in setting.arms] == [{"top1": 90.0}, {}, {}]
    assert read(folder, STUDY.replace("seeds = 2\n", "")).seeds == 1


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seeds =", "seed =", "unknown key of a study 'seed'; did you mean 'seeds'"),
        ("name =", "nam =", "unknown key of a setting 'nam'; did you mean 'name'"),
        ("label =", "labl =", "unknown key of an arm 'labl'; did you mean 'label'"),
        ("epochs = 3", "epoch = 3", "unknown key of a recipe 'epoch'; did you mean 'epochs'"),
        ("weight_decay", "weight_dcay", "unknown key of a recipe 'weight_dcay'; did you mean 'weight_decay'"),
        ("top1 =", "top3 =", "unknown key of the paper's numbers 'top3'"),
        ('["final"]', '["finl"]', "unknown figure of the study mine 'finl'; did you mean 'final'"),
        ('["final"]', "[3]", "unknown figure of the study mine '3'"),
        ('["final"]', "[[3]]", r"unknown figure of the study mine '\[3\]'"),
        ('["final"]', "3", "figures of a study is 3; a value of type list is needed"),
        ('["final"]', '"final"', "figures of a study is 'final'; a value of type list is needed"),
        ("seeds = 2", 'seeds = "x"', "seeds of a study is 'x'; a value of type int is needed"),
        ("seeds = 2", "seeds = true", "seeds of a study is True; a value of type int is needed"),
        ("seeds = 2", "seeds = 0", "seeds of the study mine is 0; allowed: at least 1"),
        ("seeds = 2", 'chain = "no"', "chain of a study is 'no'; a value of type bool is needed"),
        ('title = "Mine"', "title = 3", "title of a study is 3; a value of type str is needed"),
        ('name = "small"', "", "a setting of a study has the name ''; one that fits a directory is needed"),
        ('name = "small"', "name = 3", "name of a setting is 3; a value of type str is needed"),
        ('name = "small"', 'name = "../small"', "has the name '../small'; one that fits a directory is needed"),
        ('name = "small"', 'name = "small"\ntitle = 1', "title of a setting is 1; a value of type str is needed"),
        ('scheme = "bonn", ', "", r"an arm of a study has no scheme: .*'weight_decay': 0.0"),
        ('scheme = "bonn"', "scheme = 1", "scheme of an arm is 1; a value of type str is needed"),
        ('label = "XNOR"', "label = 1", "label of an arm is 1; a value of type str is needed"),
        ('latents = "0.02"', "latents = 0.02", "latents of a recipe is 0.02; a value of type str is needed"),
        ("clip=0.5", "clip", "the option 'clip' in 'xnor:clip' has no value; write clip=VALUE"),
        ("top1 = 90", 'top1 = "90"', "the paper's top1 of the arm 'float' is '90'; a number of percent is needed"),
        ("top1 = 90", "top1 = 0.9e3", "the paper's top1 of the arm 'float' is 900.0; a number of percent"),
        ("{ top1 = 90 }", "90", "paper of an arm is 90; a value of type table is needed"),
        ("{ weight_decay = 0.0 }", "3", "recipe of an arm is 3; a value of type table is needed"),
        ("{ epochs = 3 }", '"x"', "recipe of a setting is 'x'; a value of type table is needed"),
        ("{ weight_decay = 0.0 }", "{ train_images = 5 }", "the arm 'bonn' sets train_images; all arms of"),
        ('scheme = "bonn"', 'scheme = "float"', "two arms of the setting 'small' are both 'float-float-seed0'"),
        ("[[settings]]", "[settings]", "settings of a study is .*; a value of type array of tables is needed"),
        ("arms = [", "arms = 3\n[[other]]\nx = [", "unknown key of a study 'other'"),
        ('recipe = "base.toml"', "", "the recipe of the study mine.toml is None; the path of a recipe beside it"),
        ('"base.toml"', '"bse.toml"', "cannot read the recipe .*bse.toml: No such file"),
        ('"base.toml"', '"mine.toml"', "unknown key of a recipe 'figures'|unknown key of a recipe 'title'"),
        ('"Mine"', '"Mine', "mine.toml is not TOML"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_what_was_given(folder: Path, old: str, new: str, words: str) -> None:
    assert old in STUDY
    with pytest.raises(BonnQatError, match=words):
        read(folder, STUDY.replace(old, new, 1))


def test_a_study_without_settings_or_with_two_of_a_name_is_an_error(folder: Path) -> None:
    top, setting = STUDY.split("[[settings]]")
    for content in (top, f"{top}settings = []"):
        with pytest.raises(InvalidRecipe, match="a study needs settings, an array"):
            read(folder, content)
    with pytest.raises(InvalidRecipe, match="a study needs arms, an array"):
        read(folder, f'{top}[[settings]]\nname = "small"')
    with pytest.raises(InvalidRecipe, match=r"two settings of mine\.toml are named small"):
        read(folder, f"{STUDY}[[settings]]{setting}")


def test_a_study_that_is_not_there_is_an_error(folder: Path) -> None:
    with pytest.raises(UnknownName, match=r"unknown study 'table5'; did you mean 'table4'.*the path of a \.toml file"):
        study.load("table5")
    with pytest.raises(InvalidRecipe, match=r"cannot read the study .*none\.toml: No such file"):
        study.load(str(folder / "none.toml"))
