"""compare: the same network, data order and budget for every scheme, seed and start of the latent weights."""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pluggy

from bonn_qat import plugins
from bonn_qat.checkpoint import write_tensors
from bonn_qat.data import Data
from bonn_qat.errors import BonnQatError, InvalidData, InvalidRecipe
from bonn_qat.recipe import Recipe
from bonn_qat.report import REFERENCE, write_report
from bonn_qat.results import (
    MANIFEST,
    PAGE,
    RUNS,
    Comparison,
    RunResult,
    read_comparison,
    write_manifest,
    write_run,
)
from bonn_qat.train import build, check, steps, train

ARMS = ("float", "xnor", "bireal", "pcnn", "bonn")
ALL = "all"


def plan(
    recipe: Recipe,
    *,
    schemes: Sequence[str] = ARMS,
    seeds: Iterable[int] = (0,),
    latents: Sequence[str] = (),
    pm: pluggy.PluginManager | None = None,
) -> list[Recipe]:
    """One recipe for each scheme, start of the latents and seed; a float network has no latents and runs once a seed.

    A scheme may have options of its own, ``xnor:gradient=plain+input_scale=true``. ``"all"`` stands for every scheme
    that is installed, the float network first and BONN last.

    ``latents`` empty takes the recipe's. Raises UnknownName for a scheme that no plugin offers, InvalidRecipe
    for no scheme at all.
    """
    starts = list(dict.fromkeys(latents)) or [recipe.latents]
    arms = []
    names = [name for scheme in schemes for name in (_everyone(pm) if scheme == ALL else [scheme])]
    for scheme in dict.fromkeys(names):
        arm = recipe.with_variant(scheme)
        is_float = plugins.find_scheme(arm.scheme, pm).weight is None
        arms += [replace(arm, latents=start) for start in (["float"] if is_float else starts)]
    if not arms:
        raise InvalidRecipe("no scheme to compare; name at least one")
    # All arms of one seed before the next, so that an interrupted comparison is still a comparison.
    return [replace(arm, seed=seed) for seed in dict.fromkeys(seeds) for arm in arms]


def _everyone(pm: pluggy.PluginManager | None) -> list[str]:
    offered = plugins.schemes(pm)
    return sorted(offered, key=lambda name: (offered[name].weight is not None, name == REFERENCE))


def compare(
    recipes: Sequence[Recipe],
    data: Data,
    directory: Path,
    *,
    watch: Callable[[Recipe, int], contextlib.AbstractContextManager[Callable[[], None]]] | None = None,
    pm: pluggy.PluginManager | None = None,
) -> Comparison:
    """Run every recipe that ``directory`` has no result for, and write the report.

    Each finished run is a file of its own, with its weights beside it, and the one under way leaves a checkpoint
    after each epoch: after an interruption the report names what is missing, and the same call goes on where it
    stopped. A run that
    diverges is reported as failed, and the others go on. ``watch(recipe, steps)`` gives a context in which the
    value is called after each step.

    Raises UnknownName before anything is run, InvalidData for a directory that holds another comparison. An
    interruption or a full disk is raised again after the report is written.
    """
    hook = (pm or plugins.manager()).hook
    for recipe in recipes:
        check(recipe, pm)
    comparison = _begin(recipes, data, directory)
    hook.bonn_qat_before_comparison(directory=directory, recipes=list(recipes))
    try:
        for recipe in recipes:
            if recipe.name in comparison.missing:
                comparison = _run(comparison, recipe, data, watch or _no_watch, pm)
    finally:
        page = _write_report(comparison)
        hook.bonn_qat_after_comparison(directory=directory, report=page)
    return comparison


def _begin(recipes: Sequence[Recipe], data: Data, directory: Path) -> Comparison:
    planned = [recipe.name for recipe in recipes]
    described = {
        "name": data.name,
        "classes": data.classes,
        "image": list(data.image),
        "train": data.train_size,
        "test": data.test_size,
    }
    results: Sequence[RunResult] = ()
    if (directory / MANIFEST).exists():
        before = read_comparison(directory)
        wanted = {recipe.name: recipe.to_dict() for recipe in recipes}
        if dict(before.data) != described or any(
            wanted.get(run.name, run.recipe) != run.recipe for run in before.results
        ):
            raise InvalidData(f"{directory} holds a comparison of other recipes or data; choose another directory")
        results = before.results
        planned = list(dict.fromkeys([*before.planned, *planned]))
    comparison = Comparison(directory=directory, data=described, planned=planned, results=results)
    try:
        write_manifest(comparison)
    except OSError as error:
        raise InvalidData(f"cannot write results to {directory}: {error.strerror}") from error
    return comparison


def _run(
    comparison: Comparison,
    recipe: Recipe,
    data: Data,
    watch: Callable[[Recipe, int], contextlib.AbstractContextManager[Callable[[], None]]],
    pm: pluggy.PluginManager | None,
) -> Comparison:
    try:
        model = build(recipe, data, pm)
        runs = comparison.directory / RUNS
        unfinished = runs / f"{recipe.name}.unfinished.safetensors"
        with watch(recipe, steps(recipe, data)) as tick:
            result = train(model, recipe, data, checkpoint=unfinished, tick=tick, pm=pm)
        write_tensors(runs / f"{recipe.name}.safetensors", model.state_dict())
        write_run(comparison.directory, result)
        unfinished.unlink(missing_ok=True)
    except BonnQatError as error:
        comparison = replace(comparison, failures={**comparison.failures, recipe.name: str(error)})
        write_manifest(comparison)
        return comparison
    return replace(comparison, results=[*comparison.results, result])


def _write_report(comparison: Comparison) -> Path:
    with contextlib.suppress(OSError):  # a full disk must not hide why the comparison stopped
        return write_report(comparison)
    return comparison.directory / PAGE


@contextlib.contextmanager
def _no_watch(recipe: Recipe, steps: int) -> Iterator[Callable[[], None]]:
    yield lambda: None
