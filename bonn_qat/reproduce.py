"""reproduce: run a study, at the paper's size or a smaller one, with a search for each arm's learning rate if asked."""

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import pluggy

from bonn_qat import compare, distributed, plugins, study_report
from bonn_qat.data import Data
from bonn_qat.data import load as load_data
from bonn_qat.errors import InvalidData, TrainingDiverged
from bonn_qat.recipe import Recipe
from bonn_qat.results import Comparison, read_json, write_json
from bonn_qat.settings import with_settings
from bonn_qat.study import FEWEST_TEST_IMAGES, Setting, Study, StudyArm, scaled
from bonn_qat.study_report import SettingResult, StudyResult

FOLDER = "imagenet"  # the data of a study that reads a folder of the user's
SEARCH = "search"
SEARCH_SCALE = 0.25
Watch = Callable[[Recipe, int], AbstractContextManager[Callable[[], None]]]


def reproduce(
    study: Study,
    directory: Path,
    *,
    scale: float = 1.0,
    seeds: int | None = None,
    rates: Sequence[float] = (),
    search_scale: float = SEARCH_SCALE,
    settings: Sequence[str] = (),
    data: str | None = None,
    data_directory: Path | None = None,
    size: int = 224,
    workers: int = 0,
    jobs: int = 1,
    watch: Watch | None = None,
    pm: pluggy.PluginManager | None = None,
) -> StudyResult:
    """Run what ``directory`` has no result for, and write the study's page, table and figures there.

    ``scale`` is the share of the paper's work (:func:`bonn_qat.study.scaled`); ``seeds`` are counted from 0, by
    default as many as the study says. With ``rates`` each arm is first trained with each learning rate, on
    ``search_scale`` of the work and seed 0, with training images held out in place of the test set; it then takes the
    one that was best there. ``settings`` are changes of every recipe, such as ``batch_size=64``; ``data`` takes the
    place of the study's, and is what a study of an image folder needs. Other arguments as for
    :func:`bonn_qat.data.load` and :func:`bonn_qat.compare.compare`.

    Studies may share a directory: runs that another one left there are not run again. Raises InvalidData for a
    directory that holds the study with another scale or other rates, TrainingDiverged if no rate of an arm came to an
    end.
    """

    @functools.cache
    def loaded(name: str, train: int, test: int, validation: int) -> Data:
        if name == FOLDER:
            raise InvalidData(f"{study.name} reads an image folder of yours; name it: --data DIR")
        return load_data(
            name, directory=data_directory, train_images=train, test_images=test, validation_images=validation,
            size=size, workers=workers,
        )  # fmt: skip

    def load(recipe: Recipe) -> Data:
        return loaded(recipe.data, recipe.train_images, recipe.test_images, recipe.validation_images)

    def run(recipes: list[Recipe], place: Path) -> Comparison:
        return compare.compare(recipes, load(recipes[0]), place, jobs=jobs, watch=watch, pm=pm)

    hook = (pm or plugins.manager()).hook
    _note(study, directory, scale, rates, search_scale)
    if distributed.rank() == 0:
        hook.bonn_qat_before_comparison(directory=directory, recipes=[])
    done: list[SettingResult] = []
    try:
        for paper in study.settings:
            setting = _changed(paper, settings, data)
            place = directory / setting.name
            searched = {
                rate: run([_searched(arm, rate, scale * search_scale, load) for arm in setting.arms],
                          place / SEARCH / f"lr{rate:g}")
                for rate in rates
            }  # fmt: skip
            arms = tuple(_scaled(arm, scale, load) for arm in setting.arms)
            if searched:
                arms = tuple(replace(arm, recipe=replace(arm.recipe, lr=best_rate(arm, searched))) for arm in arms)
            recipes = [
                replace(arm.recipe, seed=seed)
                for seed in range(study.seeds if seeds is None else seeds)
                for arm in arms
            ]
            comparison = run(recipes, place)
            done.append(SettingResult(paper=paper, arms=arms, comparison=comparison, search=searched))
    finally:
        result = StudyResult(study=study, scale=scale, settings=tuple(done))
        if distributed.rank() == 0:
            page = study_report.write(result, directory)
            hook.bonn_qat_after_comparison(directory=directory, report=page)
    return result


def best_rate(arm: StudyArm, searched: Mapping[float, Comparison]) -> float:
    """The learning rate with the best accuracy on the images that the search held out; of equals the lowest.

    Raises TrainingDiverged if the arm came to an end with none.
    """
    found = study_report.accuracies(arm, searched)
    if not found:
        raise TrainingDiverged(f"{arm.recipe.variant} came to an end with none of the learning rates {list(searched)}")
    return max(sorted(found), key=lambda rate: found[rate])


def runs(study: Study, seeds: int | None, rates: Sequence[float]) -> int:
    """How many runs :func:`reproduce` makes in an empty directory."""
    return sum(len(s.arms) for s in study.settings) * ((study.seeds if seeds is None else seeds) + len(rates))


def _changed(setting: Setting, settings: Sequence[str], data: str | None) -> Setting:
    def change(arm: StudyArm) -> StudyArm:
        recipe = with_settings(arm.recipe, settings)
        return replace(arm, recipe=replace(recipe, data=data) if data else recipe)

    return replace(setting, arms=tuple(map(change, setting.arms)))


def _scaled(arm: StudyArm, scale: float, load: Callable[[Recipe], Data]) -> StudyArm:
    if scale == 1:
        return arm
    whole = load(arm.recipe)
    return replace(arm, recipe=scaled(arm.recipe, scale, train_images=whole.train_size, test_images=whole.test_size))


def _searched(arm: StudyArm, rate: float, scale: float, load: Callable[[Recipe], Data]) -> Recipe:
    """The arm's recipe for the search: smaller, with the rate, and with training images in place of the test set."""
    there = load(arm.recipe).train_size
    held_out = min(FEWEST_TEST_IMAGES, there // 5)
    recipe = _scaled(arm, scale, load).recipe
    wanted = (recipe.train_images or there) + held_out
    return replace(
        recipe, lr=rate, seed=0, validation_images=held_out, test_images=0, train_images=0 if wanted > there else wanted
    )


def _note(study: Study, directory: Path, scale: float, rates: Sequence[float], search_scale: float) -> None:
    """Write what the directory holds of this study, or check that it is the same."""
    path = directory / f"{study.name}.json"
    content = {
        "study": study.name,
        "scale": scale,
        "rates": list(rates),
        "search_scale": search_scale if rates else None,
    }
    if path.exists():
        before = read_json(path)
        if before != content:
            raise InvalidData(f"{directory} holds {study.name} as {before}, not as {content}; choose another directory")
    elif distributed.rank() == 0:
        try:
            write_json(path, content)
        except OSError as error:
            raise InvalidData(f"cannot write results to {directory}: {error.strerror}") from error
