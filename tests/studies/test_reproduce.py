"""Running studies: a few tiny networks on a few digits; most tests share one finished study."""

import dataclasses
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pluggy
import pytest

from bonn_qat import cli, hookimpl, plugins
from bonn_qat.errors import BonnQatError, InvalidData, TrainingDiverged, UnknownName
from bonn_qat.files.atomic import read_json
from bonn_qat.studies import compare as comparing
from bonn_qat.studies import reproduce, study, study_report
from bonn_qat.studies.comparison import MANIFEST, PAGE, Comparison
from bonn_qat.studies.reproduce import best_rate, runs
from bonn_qat.studies.study import Study, StudyArm
from bonn_qat.training.data import TensorData
from bonn_qat.training.data import load as load_data
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.results import RUNS, RunResult

RECIPE = 'model = "wrn10_16"\nepochs = 2\nbatch_size = 16\nlr = 0.05\nlatents = "0.01"\ntrain_images = 64\n' + (
    "test_images = 32\n"
)
TOP = 'title = "Mine"\nseeds = 2\nfigures = ["final"]\nrecipe = "recipe.toml"\n'
FLOAT = '{ scheme = "float", paper = { top1 = 91.66 } }'
XNOR = '{ scheme = "xnor", label = "XNOR" }'
BONN = '{ scheme = "bonn:feature=0.01", label = "both losses" }'
WILD = 1e30  # a learning rate with which nothing comes to an end
RATES = (0.1, WILD)


def write(folder: Path, *settings: Sequence[str], name: str = "mine", recipe: str = RECIPE, top: str = TOP) -> Study:
    """A study in ``folder``, each setting given by its arms."""
    names = ("small", "second")
    parts = [f'[[settings]]\nname = "{name}"\narms = [{", ".join(arms)}]\n'
             for name, arms in zip(names, settings, strict=False)]  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "recipe.toml").write_text(recipe)
    (folder / f"{name}.toml").write_text(top + "\n".join(parts))
    return study.load(str(folder / f"{name}.toml"))


class Begun:
    """An observer that keeps the recipes of the runs that begin and counts their epochs; it can interrupt one."""

    def __init__(self, stop_at: int = 0) -> None:
        self.recipes: list[Recipe] = []
        self.epochs: list[int] = []
        self.stop_at = stop_at

    @hookimpl
    def bonn_qat_before_run(self, recipe: Recipe) -> None:
        self.recipes.append(recipe)
        self.epochs.append(0)
        if len(self.recipes) == self.stop_at:
            raise KeyboardInterrupt

    @hookimpl
    def bonn_qat_after_epoch(self) -> None:
        self.epochs[-1] += 1


class Observer:
    def __init__(self) -> None:
        self.calls: list[tuple[str, Path]] = []

    @hookimpl
    def bonn_qat_before_comparison(self, directory: Path) -> None:
        self.calls.append(("before", directory))

    @hookimpl
    def bonn_qat_after_comparison(self, directory: Path, page: Path) -> None:
        self.calls.append(("after", page))


def watched(*observers: object) -> pluggy.PluginManager:
    pm = plugins.create_manager()
    for observer in observers:
        pm.register(observer)
    return pm


@pytest.fixture(scope="module", autouse=True)
def _no_pages_of_comparisons() -> Iterator[None]:
    """Their figures cost more than these trainings, and have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparing, "write_report", lambda comparison: comparison.directory / PAGE)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A study of three arms and two seeds, with a search among two rates, and what it was trained on."""
    place = tmp_path_factory.mktemp("study")
    mine, begun, observer = write(place, [FLOAT, XNOR, BONN]), Begun(), Observer()
    used: dict[Path, Any] = {}

    def compare(recipes: Sequence[Recipe], data: Any, directory: Path, **others: Any) -> Comparison:
        used[directory] = data
        return comparing.compare(recipes, data, directory, **others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reproduce, "compare", SimpleNamespace(compare=compare))
        result = reproduce.reproduce(mine, place / "out", rates=RATES, pm=watched(begun, observer))
    return SimpleNamespace(
        study=mine, folder=place, directory=place / "out", result=result, begun=begun, used=used, calls=observer.calls
    )


@pytest.fixture
def again(finished: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy of the finished study's directory."""
    return shutil.copytree(finished.directory, tmp_path / "out")


# What is run


def test_as_many_runs_are_made_as_were_announced(finished: SimpleNamespace) -> None:
    assert len(finished.begun.recipes) == runs(finished.study, None, RATES) == 3 * (2 + len(RATES))
    assert runs(finished.study, 5, ()) == 15
    assert runs(finished.study, 5, (0.1, 0.1)) == 18
    for recipe, done in zip(finished.begun.recipes, finished.begun.epochs, strict=True):
        assert done == (0 if recipe.lr == WILD else recipe.epochs)
    planned = {(arm.recipe.name, seed) for arm in finished.study.settings[0].arms for seed in range(2)}
    (setting,) = finished.result.settings
    assert {(dataclasses.replace(Recipe.from_dict(run.recipe), seed=0).name, run.seed)
            for run in setting.comparison.results} == planned  # fmt: skip


def test_each_arm_takes_a_rate_that_came_to_an_end(finished: SimpleNamespace) -> None:
    (setting,) = finished.result.settings
    assert set(setting.search) == set(RATES)
    assert len(setting.search[WILD].failures) == 3
    assert [arm.recipe.lr for arm in setting.arms] == [0.1] * 3
    assert {run.recipe["lr"] for run in setting.comparison.results} == {0.1}
    assert study_report.changes(setting) == ["lr searched for each arm instead of 0.05"]


def test_the_search_trains_and_tests_on_training_images_alone(finished: SimpleNamespace) -> None:
    def images(part: Any) -> set[bytes]:
        found = [image.numpy().tobytes() for image in part[0]]
        assert len(set(found)) == len(found)
        return set(found)

    place = finished.directory / "small"
    last, *searches = (finished.used[path] for path in (place, *(place / "search" / f"lr{rate:g}" for rate in RATES)))
    whole = load_data("digits", train_images=64, test_images=32)
    assert isinstance(whole, TensorData)
    assert images(last._train) == images(whole._train)
    assert images(last._test) == images(whole._test)
    for data in searches:
        trained, held_out = images(data._train), images(data._test)
        assert (len(trained), len(held_out)) == (64 // 2, 64 // 5)
        assert not trained & held_out
        assert trained | held_out <= images(whole._train)
    for recipe in finished.begun.recipes:
        searched = recipe.validation_images > 0
        assert (recipe.epochs, recipe.validation_images) == ((1, 12) if searched else (2, 0))
        assert not (searched and recipe.seed)


def test_a_search_at_the_whole_size_keeps_to_the_recipes_part_of_the_images() -> None:
    recipe = Recipe(train_images=64, test_images=32)

    def load(recipe: Recipe) -> Any:
        return load_data(
            "digits", train_images=recipe.train_images, test_images=recipe.test_images,
            validation_images=recipe.validation_images,
        )  # fmt: skip

    data = load(reproduce._searched(StudyArm(label="", recipe=recipe), 0.1, 1.0, load))
    assert (data.train_size, data.test_size) == (52, 12)
    few = dataclasses.replace(recipe, train_images=3)
    assert load(reproduce._searched(StudyArm(label="", recipe=few), 0.1, 1.0, load)).train_size == 2


def test_a_study_is_a_comparison_around_its_own(finished: SimpleNamespace) -> None:
    out = finished.directory
    inner = [out / "small" / "search" / f"lr{rate:g}" for rate in RATES] + [out / "small"]
    parts = [call for place in inner for call in (("before", place), ("after", place / PAGE))]
    assert finished.calls == [("before", out), *parts, ("after", out / "mine.html")]
    assert read_json(out / "mine.json") == {"study": "mine", "scale": 1, "rates": list(RATES), "search_scale": 0.25}


# Going on


def test_the_same_study_again_trains_nothing(finished: SimpleNamespace, again: Path) -> None:
    begun = Begun()
    kept = {path: path.stat().st_mtime_ns for path in again.rglob(f"{RUNS}/*.json")}
    result = reproduce.reproduce(finished.study, again, rates=[*reversed(RATES), 0.1], pm=watched(begun))
    # What failed is tried again.
    assert {recipe.lr for recipe in begun.recipes} == {WILD}
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
    assert study_report.markdown(result) == study_report.markdown(finished.result)


def test_more_seeds_are_added_to_those_that_are_there(finished: SimpleNamespace, again: Path) -> None:
    only_xnor = write(finished.folder, [XNOR], name="xnor")
    begun = Begun()
    result = reproduce.reproduce(only_xnor, again, seeds=3, settings=["lr=0.1"], pm=watched(begun))
    assert [recipe.name for recipe in begun.recipes] == ["xnor-0.01-seed2"]
    (row,) = study_report.rows(result.settings[0], chain=False)
    assert (row.label, row.seeds) == ("XNOR", 3)


def test_a_study_in_the_directory_of_another_runs_only_what_is_new_and_reports_only_its_own(
    finished: SimpleNamespace, again: Path
) -> None:
    (again / "small" / RUNS / "float-float-seed1.json").unlink()
    part = write(finished.folder, [BONN.replace("both losses", "BONN"), XNOR], name="part")
    begun = Begun()
    result = reproduce.reproduce(part, again, settings=["lr=0.1"], pm=watched(begun))
    assert begun.recipes == []
    (setting,) = result.settings
    assert not setting.comparison.missing
    assert [run.scheme for run in setting.comparison.results] == ["bonn:feature=0.01"] * 2 + ["xnor"] * 2
    assert [row.label for row in study_report.rows(setting, chain=False)] == ["BONN", "XNOR"]
    assert {path.name for path in again.glob("part*")} == {
        "part.html", "part.json", "part.md", "part-final-small.svg",
    }  # fmt: skip
    assert "float" not in (again / "part.md").read_text()


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"scale": 0.5}, "holds mine as .*'scale': 1.0.* not as .*'scale': 0.5.*; choose another directory"),
        ({"rates": (0.2,)}, r"holds mine as .*'rates': \[0.1, 1e\+30\].* not as .*'rates': \[0.2\]"),
        ({"rates": ()}, r"not as .*'rates': \[\]"),
        ({"search_scale": 0.1}, r"'search_scale': 0.25.* not as .*'search_scale': 0.1"),
        ({"settings": ["weight_decay=0.1"]}, "holds a comparison of other recipes or data"),
    ],
)
def test_a_directory_of_the_study_in_another_form_is_refused(
    finished: SimpleNamespace, changed: dict[str, Any], words: str
) -> None:
    before = {path: path.read_bytes() for path in finished.directory.iterdir() if path.is_file()}
    with pytest.raises(InvalidData, match=words):
        reproduce.reproduce(finished.study, finished.directory, **{"rates": RATES, **changed})
    assert {path: path.read_bytes() for path in finished.directory.iterdir() if path.is_file()} == before


def test_an_interruption_leaves_a_page_of_what_there_is_and_the_same_call_goes_on(tmp_path: Path) -> None:
    mine = write(tmp_path, [FLOAT, XNOR], [BONN], top=TOP.replace('["final"]', "[]"))
    observer = Observer()
    with pytest.raises(KeyboardInterrupt):
        reproduce.reproduce(mine, tmp_path / "out", seeds=1, pm=watched(Begun(stop_at=2), observer))
    text = (tmp_path / "out" / "mine.md").read_text()
    assert "| Full precision |" in text
    assert "- missing: xnor-0.01-seed0" in text
    assert observer.calls[-1] == ("after", tmp_path / "out" / "mine.html")
    assert observer.calls[-1][1].is_file()
    begun = Begun()
    reproduce.reproduce(mine, tmp_path / "out", seeds=1, pm=watched(begun))
    assert [recipe.name for recipe in begun.recipes] == ["xnor-0.01-seed0", "bonn_feature=0.01-0.01-seed0"]
    assert "missing" not in (tmp_path / "out" / "mine.md").read_text()


# What is changed


@pytest.fixture(scope="module")
def changed(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A study made small, with other data and a setting, and with an arm that comes to no end."""
    place = tmp_path_factory.mktemp("changed")
    recipe = RECIPE.replace('latents = "0.01"', 'latents = "scheme"\ndata = "cifar10"').replace(
        "train_images = 64\n", ""
    )
    mine = write(place, [FLOAT, BONN, f'{{ scheme = "xnor", recipe = {{ lr = {WILD} }} }}'], recipe=recipe)
    result = reproduce.reproduce(
        mine, place / "out", scale=0.0025, seeds=1, data="digits", settings=["batch_size=8", "weight_decay=0"]
    )
    return SimpleNamespace(setting=result.settings[0], page=(place / "out" / "mine.md").read_text())


def test_settings_are_those_of_every_arm_and_are_told(changed: SimpleNamespace) -> None:
    recipes = [arm.recipe for arm in changed.setting.arms]
    assert {(recipe.batch_size, recipe.weight_decay, recipe.data) for recipe in recipes} == {(8, 0.0, "digits")}
    assert {(recipe.epochs, recipe.train_images, recipe.test_images) for recipe in recipes} == {(1, 72, 32)}
    told = [
        "data digits instead of cifar10", "epochs 1 instead of 2", "batch_size 8 instead of 16",
        "weight_decay 0 instead of 0.0005", "train_images 72 instead of all",
    ]  # fmt: skip
    assert study_report.changes(changed.setting) == told
    assert f"At scale 0.0025, not the study's own setting: {', '.join(told)}; 72 training" in changed.page


def test_an_arm_that_fails_is_told_and_the_others_have_their_rows(changed: SimpleNamespace) -> None:
    rows = study_report.rows(changed.setting, chain=False)
    assert [(row.label, row.latents) for row in rows] == [("Full precision", ""), ("both losses", "0.01")]
    assert list(changed.setting.comparison.failures) == ["xnor-scheme-seed0"]
    assert re.search("- failed: xnor-scheme-seed0: .* held NaN or infinity in step", changed.page)


def test_a_setting_is_for_the_arms_that_it_has_a_meaning_for(tmp_path: Path) -> None:
    mine = write(tmp_path, [FLOAT, XNOR, BONN])
    changed = reproduce._changed(mine.settings[0], ["latents=0.02", "scheme_options.feature=0.1"], None, (), None)
    assert [(arm.recipe.scheme_spec, arm.recipe.latents) for arm in changed.arms] == [
        ("float", "float"), ("xnor", "0.02"), ("bonn:feature=0.1", "0.02"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"scale": 0}, "the scale is 0; allowed: above 0, at most 1"),
        ({"scale": 2.0}, "the scale is 2; allowed: above 0, at most 1"),
        ({"scale": 0.5, "search_scale": 2.0}, "the search's scale is 2; allowed: above 0, at most 1"),
        ({"seeds": 0}, "seeds is 0; allowed: at least 1"),
        ({"rates": (0.1, 0.0)}, "lr in the recipe is 0.0; allowed: a number above 0"),
        ({"rates": (float("nan"),)}, "lr in the recipe is nan; allowed: numbers other than NaN"),
        ({"settings": ["scheme=xnor"]}, "'scheme=xnor' cannot be set: the study sets the scheme of each run"),
        ({"settings": ["seed=3"]}, "'seed=3' cannot be set: the study sets the seed of each run"),
        ({"settings": ["lr=3"], "rates": (0.1,)}, "'lr=3' cannot be set: the study sets the lr of each run"),
        ({"settings": ["latents=float"]}, "two arms of the setting 'small' are both 'xnor-float-seed0'"),
        ({"settings": ["validation_images=9"], "rates": (0.1,)}, "validation_images in the recipe is 9; a search for"),
        ({"settings": ["epoch=9"]}, "unknown key of a recipe 'epoch'; did you mean 'epochs'"),
        (
            {"settings": ["scheme_options.fature=9"]},
            "unknown option of a scheme in 'small' 'fature'; did you mean 'feat",
        ),
        ({"settings": ["model=wrn10"]}, "unknown model 'wrn10'; did you mean 'wrn10_16'"),
        ({"settings": ["train_images=2000"]}, "2000 images were requested, but there are only 1438"),
        ({"data": "digit"}, "unknown data set 'digit'; did you mean 'digits'"),
        ({"data": "imagenet"}, "mine needs an image folder; pass it with --data DIR"),
    ],
)
def test_a_mistake_is_told_before_anything_is_written(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    mine = write(tmp_path, [FLOAT, XNOR, XNOR.replace("}", ', latents = "float" }'), BONN])
    with pytest.raises(BonnQatError, match=words):
        reproduce.reproduce(mine, tmp_path / "out", **changed)
    assert not (tmp_path / "out").exists()


def test_a_scheme_that_nobody_offers_is_told_before_the_settings_above_it_are_run(tmp_path: Path) -> None:
    mine = write(tmp_path, [FLOAT], ['{ scheme = "xnorr" }'])
    with pytest.raises(UnknownName, match="unknown scheme 'xnorr'; did you mean 'xnor'"):
        reproduce.reproduce(mine, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_study_of_an_image_folder_asks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidData, match="table4 needs an image folder; pass it with --data DIR"):
        reproduce.reproduce(study.load("table4"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The choice of a rate


def searched(*accuracies: tuple[float, float | None]) -> dict[float, Comparison]:
    """Rate -> a comparison where ``xnor`` reached an accuracy, or failed, beside a ``bonn`` that is always better."""

    def run(scheme: str, top1: float) -> RunResult:
        recipe = Recipe(scheme=scheme, latents="0.01")
        return RunResult(
            name=recipe.name, scheme=scheme, title=scheme, bits="1/1", latents="0.01", seed=0, recipe=recipe.to_dict(),
            environment={}, seconds=1.0, epochs=[{"epoch": 1, "test/top1": top1}], size={},
        )  # fmt: skip

    found = {}
    for rate, top1 in accuracies:
        results = [run("bonn", 99.0), *([] if top1 is None else [run("xnor", top1)])]
        found[rate] = Comparison(directory=Path("nowhere"), data={}, planned=[], results=results)
    return found


@pytest.mark.parametrize(
    ("accuracies", "best"),
    [
        ([(0.1, 50.0), (0.2, 60.0), (0.4, 55.0)], 0.2),
        ([(0.4, 60.0), (0.2, 50.0), (0.1, 60.0)], 0.1),  # of equals the lowest, in whatever order
        ([(0.1, 10.0), (0.2, None)], 0.1),
        ([(0.1, None), (0.2, 0.0)], 0.2),
    ],
)
def test_the_best_rate_is_that_of_the_highest_accuracy(accuracies: Any, best: float) -> None:
    arm = StudyArm(label="", recipe=Recipe(scheme="xnor", latents="0.01"))
    assert best_rate(arm, searched(*accuracies)) == best


def test_an_arm_that_no_rate_brings_to_an_end_ends_the_study(tmp_path: Path) -> None:
    arm = StudyArm(label="", recipe=Recipe(scheme="xnor", latents="0.01"))
    with pytest.raises(TrainingDiverged, match=r"xnor diverged with each of the learning rates \[0.1, 0.2\]"):
        best_rate(arm, searched((0.1, None), (0.2, None)))
    observer = Observer()
    with pytest.raises(TrainingDiverged, match=r"float diverged with each of the learning rates \[1e\+30\]"):
        reproduce.reproduce(write(tmp_path, [FLOAT]), tmp_path / "out", rates=[WILD], pm=watched(observer))
    assert observer.calls[-1] == ("after", tmp_path / "out" / "mine.html")
    assert not (tmp_path / "out" / "small" / MANIFEST).exists()


# The command


def test_the_command_prints_the_table_in_80_columns(
    finished: SimpleNamespace, again: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(finished.folder, [FLOAT, XNOR, BONN], name="command")
    arguments = ["reproduce", str(finished.folder / "command.toml"), "--rates", "0.1", "--output", str(again)]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("Mine; 9 runs, scale 1; results in")
    table, _, rest = printed.partition("report: ")
    assert rest.strip() == str(again / "command.html")
    lines = table.splitlines()
    for label in ("Full precision", "XNOR", "both losses"):
        (line,) = (line for line in lines if line.startswith(label))
        assert len(line) <= 80
        assert " ± " in line


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["table5"], "unknown study 'table5'; did you mean 'table4'"),
        (["table3", "--only", "cifar10"], "unknown setting of table3 'cifar10'; did you mean 'cifar10-wrn22-"),
        (["none.toml"], "cannot read the study none.toml: No such file or directory"),
        (["table3", "--rates", "0.1,x"], "'x' in --rates is not a number"),
        (["table3", "--set", "epochs=many"], "epochs of a recipe is 'many'; a value of type int is needed"),
        (["table4"], "table4 needs an image folder; pass it with --data DIR"),
    ],
)
def test_bad_input_gives_one_line_and_exit_code_2(
    arguments: list[str], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert cli.main(["reproduce", *arguments]) == 2
    told = capsys.readouterr().err
    assert words in told
    assert told.startswith("bonn-qat: ")
    assert told.count("\n") == 1
    assert not list(tmp_path.iterdir())
