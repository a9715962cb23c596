"""compare: the same network, data order and budget for every scheme, seed and start of the latent weights."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pluggy

from bonn_qat import distributed, plugins
from bonn_qat.data import Data
from bonn_qat.errors import InvalidData, InvalidRecipe
from bonn_qat.jobs import at_once, check_jobs, in_turn
from bonn_qat.recipe import Recipe
from bonn_qat.report import REFERENCE, write_report
from bonn_qat.results import (
    MANIFEST,
    PAGE,
    Comparison,
    RunResult,
    read_comparison,
    write_manifest,
)
from bonn_qat.train import check
from bonn_qat.worker import Outcome, Watch

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
    jobs: int = 1,
    watch: Watch | None = None,
    pm: pluggy.PluginManager | None = None,
) -> Comparison:
    """Run every recipe that ``directory`` has no result for, and write the report.

    Each finished run is a file of its own, with its weights beside it, and the one under way leaves a checkpoint
    after each epoch: after an interruption the report names what is missing, and the same call goes on where it
    stopped. A run that diverges is reported as failed, and the others go on. ``watch(recipe, steps)`` gives a context
    in which the value is called after each step.

    With ``jobs`` above 1 so many runs go on at once, each in a process of its own: several on one GPU where the
    kernels are too small to fill it, or as many as there are cores, which they share as threads unless
    ``OMP_NUM_THREADS`` says otherwise. With as many threads the results are those of one job, on a CPU bit for bit. A
    run whose process dies has failed. ``watch`` and observers are called in this process, for several runs in turns;
    what the plugins of ``pm`` offer is sent, so their functions must be importable and their objects fit to be pickled.
    A script keeps its call below ``if __name__ == "__main__":``. In a process group (see :func:`bonn_qat.train`) every
    process makes the same call, and the first alone writes and calls the observers; jobs is then 1.

    Raises UnknownName and InvalidRecipe before anything is run, InvalidData for a directory that holds another
    comparison, BonnQatError for what cannot be sent to another process. An interruption or a full disk is raised
    again after the report is written.
    """
    check_jobs(jobs)
    is_first = distributed.rank() == 0
    hook = (pm or plugins.manager()).hook
    for recipe in recipes:
        check(recipe, pm)
    comparison = _begin(recipes, data, directory)
    missing: dict[str, Recipe] = {}
    for recipe in recipes:
        if recipe.name in comparison.missing:
            missing.setdefault(recipe.name, recipe)
    run = functools.partial(at_once, jobs=jobs) if jobs > 1 else in_turn
    try:
        if is_first:
            hook.bonn_qat_before_comparison(directory=directory, recipes=list(recipes))
        with contextlib.closing(
            run(list(missing.values()), data, directory, watch=watch or _no_watch, pm=pm)
        ) as outcomes:
            for recipe, outcome in outcomes:
                comparison = _with_outcome(comparison, recipe, outcome)
                if is_first and isinstance(outcome, str):
                    write_manifest(comparison)
    finally:
        if is_first:
            hook.bonn_qat_after_comparison(directory=directory, report=_write_report(comparison))
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
    distributed.wait()  # for what the first process may still write there
    if (directory / MANIFEST).exists():
        before = read_comparison(directory)
        wanted = {recipe.name: recipe for recipe in recipes}
        if dict(before.data) != described or any(
            # A key that came with a later version has its default in a result of an earlier one.
            run.name in wanted and wanted[run.name] != Recipe.from_dict(run.recipe)
            for run in before.results
        ):
            raise InvalidData(f"{directory} holds a comparison of other recipes or data; choose another directory")
        results = before.results
        planned = list(dict.fromkeys([*before.planned, *planned]))
    comparison = Comparison(directory=directory, data=described, planned=planned, results=results)
    distributed.wait()  # until all have read
    try:
        if distributed.rank() == 0:
            write_manifest(comparison)
    except OSError as error:
        raise InvalidData(f"cannot write results to {directory}: {error.strerror}") from error
    return comparison


def _with_outcome(comparison: Comparison, recipe: Recipe, outcome: Outcome) -> Comparison:
    if isinstance(outcome, str):
        return replace(comparison, failures={**comparison.failures, recipe.name: outcome})
    results = sorted([*comparison.results, outcome], key=lambda result: comparison.planned.index(result.name))
    return replace(comparison, results=results)


def _write_report(comparison: Comparison) -> Path:
    with contextlib.suppress(OSError):  # a full disk must not hide why the comparison stopped
        return write_report(comparison)
    return comparison.directory / PAGE


@contextlib.contextmanager
def _no_watch(recipe: Recipe, steps: int) -> Iterator[Callable[[], None]]:
    yield lambda: None
