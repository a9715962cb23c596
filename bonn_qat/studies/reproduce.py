"""reproduce: run a study of the paper, at full or reduced size, with an optional search for each learning rate."""

import errno
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pluggy

from bonn_qat import distributed, plugins
from bonn_qat.errors import InvalidData, InvalidRecipe, TrainingDiverged, UnknownName
from bonn_qat.files.atomic import read_json, write_json
from bonn_qat.studies import compare, study_report
from bonn_qat.studies.comparison import MANIFEST, Comparison, read_comparison
from bonn_qat.studies.on_ray import RayCluster
from bonn_qat.studies.study import FEWEST_TEST_IMAGES, Setting, Study, StudyArm, check_distinct, check_scale, scaled
from bonn_qat.studies.study_report import SettingResult, StudyResult, runs_of
from bonn_qat.training.data import Data
from bonn_qat.training.data import load as load_data
from bonn_qat.training.network import check_trainable
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.settings import with_settings

FOLDER = "imagenet"  # the data of a study that reads a folder of the user's
SEARCH = "search"
SEARCH_SCALE = 0.25


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
    ray: RayCluster | None = None,
    pm: pluggy.PluginManager | None = None,
) -> StudyResult:
    """Run every run of ``study`` that ``directory`` has no result for, and write the study's page, table and figures.

    ``scale`` is the share of the paper's work (:func:`bonn_qat.studies.study.scaled`). ``seeds`` is how many seeds to
    run, counted from the recipe's; by default the study's number. With ``rates`` each arm is first trained once with
    each learning rate, with ``search_scale`` of the work and the first seed, and tested on held-out training images
    instead of the test set; the arm then takes the best rate. ``settings`` change every recipe, such as
    ``batch_size=64``, or the recipes whose scheme has the option, such as ``scheme_options.reading=inverse``. ``data``
    replaces the study's data; a study of an image folder needs it. Other arguments as for
    :func:`bonn_qat.load_data` and :func:`bonn_qat.studies.compare.compare`.

    Several studies may share a directory; finished runs are not run again. After an interruption the page is written
    with the runs that are finished, and the interruption is raised again.

    Raises InvalidRecipe, UnknownName, and InvalidData for missing data before anything is written; InvalidData for a
    directory that holds the study with another scale or other rates; TrainingDiverged if an arm diverged with every
    rate.

    >>> reproduce(load("table3"), Path("results/table3"), scale=0.01, rates=[0.05, 0.5])  # doctest: +SKIP
    """
    rates = sorted(set(rates))
    seeds = study.seeds if seeds is None else seeds
    if seeds < 1:
        raise InvalidRecipe(f"seeds is {seeds}; allowed: at least 1")
    check_scale("scale", scale)
    check_scale("search's scale", search_scale)
    load = _loader(study, data_directory, size, workers)

    def run(recipes: Sequence[Recipe], place: Path, waits: bool = False) -> Comparison:
        return compare.compare(
            recipes, load(recipes[0]), place, jobs=jobs, ray=ray, waits=waits, around=directory, pm=pm
        )

    plans = []
    for paper in study.settings:
        setting = _changed(paper, settings, data, rates, pm)
        for arm in setting.arms:
            check_trainable(arm.recipe, pm)
        load(setting.arms[0].recipe)
        arms = tuple(_scaled(arm, scale, load) for arm in setting.arms)
        search = {rate: [_searched(arm, rate, scale * search_scale, load) for arm in setting.arms] for rate in rates}
        plans.append(_Plan(paper, arms, search))
    hook = plugins.Observers(pm)
    _note(study, directory, scale, rates, search_scale)
    if distributed.rank() == 0:
        hook.bonn_qat_before_comparison(directory=directory, recipes=[])
    done: list[SettingResult] = []
    try:
        for plan in plans:
            for found in _carried_out(plan, directory / plan.paper.name, seeds, run):
                done.append(found)  # one by one, so that what comes before an interruption is kept
    finally:
        result = StudyResult(study=study, scale=scale, settings=tuple(done))
        if distributed.rank() == 0:
            page = directory / f"{study.name}.html"
            try:
                if done:
                    page = study_report.write(result, directory)
            finally:
                hook.bonn_qat_after_comparison(directory=directory, page=page)
    for found in done:
        if not (place := directory / found.paper.name / MANIFEST).exists():
            raise FileNotFoundError(errno.ENOENT, "it was removed or moved meanwhile", str(place))
    return result


def best_rate(arm: StudyArm, searched: Mapping[float, Comparison]) -> float:
    """The learning rate with the best accuracy on the held-out images; of equal ones the lowest.

    Raises TrainingDiverged if the arm diverged with every rate.
    """
    found = study_report.accuracies(arm, searched)
    if not found:
        raise TrainingDiverged(f"{arm.recipe.scheme_spec} diverged with each of the learning rates {list(searched)}")
    return max(sorted(found), key=lambda rate: found[rate])


def runs(study: Study, seeds: int | None, rates: Sequence[float]) -> int:
    """The number of runs that :func:`reproduce` makes in an empty directory."""
    return sum(len(s.arms) for s in study.settings) * ((study.seeds if seeds is None else seeds) + len(set(rates)))


class _Plan(NamedTuple):
    """A setting of the study, its arms as they will be run, and the recipes of the search by learning rate."""

    paper: Setting
    arms: tuple[StudyArm, ...]
    search: Mapping[float, Sequence[Recipe]]


def _carried_out(plan: _Plan, place: Path, seeds: int, run: Callable[..., Comparison]) -> Iterator[SettingResult]:
    """Yield the plan's result, also a partial one before an interruption is raised again."""
    # The choice needs all of them, also those that other processes are training.
    searched = {rate: run(recipes, place / SEARCH / f"lr{rate:g}", waits=True) for rate, recipes in plan.search.items()}
    arms = plan.arms
    if searched:
        arms = tuple(replace(arm, recipe=replace(arm.recipe, lr=best_rate(arm, searched))) for arm in arms)
    recipes = [replace(arm.recipe, seed=arm.recipe.seed + number) for number in range(seeds) for arm in arms]
    result = functools.partial(SettingResult, paper=plan.paper, arms=arms, search=searched)
    try:
        comparison = run(recipes, place)
    except (KeyboardInterrupt, SystemExit, OSError):
        if (place / MANIFEST).exists():
            yield result(comparison=_own(read_comparison(place), recipes, arms))
        raise
    yield result(comparison=_own(comparison, recipes, arms))


def _loader(study: Study, directory: Path | None, size: int, workers: int) -> Callable[[Recipe], Data]:
    @functools.cache
    def loaded(name: str, train: int, test: int, validation: int) -> Data:
        if name == FOLDER and not Path(name).is_dir():
            raise InvalidData(f"{study.name} needs an image folder; pass it with --data DIR")
        return load_data(
            name, directory=directory, train_images=train, test_images=test, validation_images=validation,
            size=size, workers=workers,
        )  # fmt: skip

    return lambda recipe: loaded(recipe.data, recipe.train_images, recipe.test_images, recipe.validation_images)


def _scheme_option(given: str) -> str | None:
    table, _, option = given.partition("=")[0].strip().partition(".")
    return option or None if table == "scheme_options" else None


def _changed(
    setting: Setting,
    settings: Sequence[str],
    data: str | None,
    rates: Sequence[float],
    pm: pluggy.PluginManager | None,
) -> Setting:
    """The setting with changed recipes; the float network keeps its value of ``latents``, because it has no latent
    weights.

    An option of a scheme changes only the arms whose schemes have it.
    """
    for given in settings:
        key = given.partition("=")[0].strip()
        if key in ("scheme", "seed") or (key == "lr" and rates):
            raise InvalidRecipe(f"{given!r} cannot be set: the study sets the {key} of each run")

    options = {given: name for given in settings if (name := _scheme_option(given))}
    offered = {arm.recipe.scheme: plugins.find_scheme(arm.recipe.scheme, pm).takes for arm in setting.arms}
    for option in options.values():
        if not any(option in names for names in offered.values()):
            raise UnknownName(f"option of a scheme in {setting.name!r}", option, set().union(*offered.values()))

    def change(arm: StudyArm) -> StudyArm:
        known = offered[arm.recipe.scheme]
        recipe = with_settings(arm.recipe, [g for g in settings if options.get(g) is None or options[g] in known])
        recipe = replace(recipe, data=data or recipe.data)
        return replace(arm, recipe=replace(recipe, latents="float") if recipe.scheme == "float" else recipe)

    arms = tuple(map(change, setting.arms))
    check_distinct(setting.name, [arm.recipe for arm in arms])
    return replace(setting, arms=arms)


def _scaled(arm: StudyArm, scale: float, load: Callable[[Recipe], Data]) -> StudyArm:
    if scale == 1:
        return arm
    whole = load(replace(arm.recipe, validation_images=0))
    return replace(arm, recipe=scaled(arm.recipe, scale, train_images=whole.train_size, test_images=whole.test_size))


def _searched(arm: StudyArm, rate: float, scale: float, load: Callable[[Recipe], Data]) -> Recipe:
    """The arm's recipe for the search: smaller, with the rate, and tested on held-out training images."""
    if arm.recipe.validation_images:
        raise InvalidRecipe(
            f"validation_images in the recipe is {arm.recipe.validation_images}; a search for the rate holds images "
            "out itself: leave it 0, or leave the rates out"
        )
    there = load(arm.recipe).train_size
    held_out = max(1, min(FEWEST_TEST_IMAGES, there // 5))
    recipe = _scaled(arm, scale, load).recipe
    wanted = (recipe.train_images or there) + held_out
    return replace(
        recipe, lr=rate, validation_images=held_out, test_images=0,
        train_images=arm.recipe.train_images if wanted > there else wanted,
    )  # fmt: skip


def _own(comparison: Comparison, recipes: Sequence[Recipe], arms: Sequence[StudyArm]) -> Comparison:
    """The comparison without the runs of other studies in its directory, but with every seed of these arms."""
    names = [recipe.name for recipe in recipes]
    kept = [run for arm in arms for run in runs_of(arm, comparison)]
    return replace(
        comparison,
        planned=list(dict.fromkeys([*names, *(run.name for run in kept)])),
        results=kept,
        failures={name: why for name, why in comparison.failures.items() if name in names},
    )


def _note(study: Study, directory: Path, scale: float, rates: Sequence[float], search_scale: float) -> None:
    """Write scale and rates of the study to the directory, or check that they match the ones written before."""
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
