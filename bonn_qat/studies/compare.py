"""compare: the same network, data order and budget for every scheme, seed and start of the latent weights."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pluggy

from bonn_qat import distributed, plugins
from bonn_qat.errors import InvalidData, InvalidRecipe
from bonn_qat.files.atomic import sweep
from bonn_qat.files.locks import locked
from bonn_qat.studies.comparison import MANIFEST, PAGE, Comparison, read_comparison, write_manifest
from bonn_qat.studies.jobs import at_once, check_jobs, in_turn
from bonn_qat.studies.report import write_report
from bonn_qat.studies.statistics import REFERENCE
from bonn_qat.studies.worker import Elsewhere, Watch
from bonn_qat.training.data import Data
from bonn_qat.training.interrupts import held
from bonn_qat.training.network import check
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.results import RUNS, RunResult

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
        arm = recipe.with_scheme(scheme)
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
    waits: bool = False,
    watch: Watch | None = None,
    pm: pluggy.PluginManager | None = None,
) -> Comparison:
    """Run every recipe that ``directory`` has no result for, and write the report.

    Each finished run is a file of its own, with its weights beside it, and the one under way leaves checkpoints (see
    :func:`bonn_qat.train`): after an interruption the report names what is missing, and the same call goes on where it
    stopped. A run that diverges is reported as failed, and the others go on. ``watch(recipe, steps)`` gives a context
    in which the value is called after each step.

    Several processes, on one machine or on many that see ``directory``, may make the same call at once: each takes the
    next run that nobody is at. ``elsewhere`` of the result names those that were under way in others at the end; with
    ``waits`` it waits for these, and takes up what another one left.

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
    hook = plugins.Observers(pm)
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
            with _locked(directory):  # for observers of several processes would open their stores together
                hook.bonn_qat_before_comparison(directory=directory, recipes=list(recipes))
        left = list(missing.values())
        for waits_now in (False, True) if waits else (False,):
            with contextlib.closing(
                run(left, data, directory, watch=watch or _no_watch, pm=pm, waits=waits_now)
            ) as outcomes:
                left = []
                for recipe, outcome in outcomes:
                    if isinstance(outcome, Elsewhere):
                        left.append(recipe)
                        continue
                    comparison = _with_outcome(comparison, recipe, outcome)
                    if is_first and isinstance(outcome, str):
                        with _locked(directory):
                            write_manifest(_with_others(comparison))
        comparison = replace(comparison, elsewhere=[recipe.name for recipe in left])
    finally:
        if is_first:
            with held():  # what draws the figures may swallow an interruption
                comparison, page = _end(comparison)
            hook.bonn_qat_after_comparison(directory=directory, page=page)
    return comparison


def _locked(directory: Path) -> contextlib.AbstractContextManager[bool]:
    return locked(directory / ".comparison.lock", waits=True)


def _begin(recipes: Sequence[Recipe], data: Data, directory: Path) -> Comparison:
    distributed.barrier()  # for what the first process may still write there
    with contextlib.ExitStack() as stack:
        if distributed.rank() == 0:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                stack.enter_context(_locked(directory))
            except OSError as error:
                raise InvalidData(f"cannot write results to {directory}: {error.strerror}") from error
        comparison = _planned(recipes, data, directory)
        distributed.barrier()  # until all have read
        try:
            if distributed.rank() == 0:
                for name in (MANIFEST, PAGE):
                    sweep(directory / name)
                for run in comparison.results:  # of a process that was killed when it had finished them
                    (directory / RUNS / f"{run.name}.unfinished.safetensors").unlink(missing_ok=True)
                    (directory / RUNS / f".{run.name}.lock").unlink(missing_ok=True)
                write_manifest(comparison)
        except OSError as error:
            raise InvalidData(f"cannot write results to {directory}: {error.strerror}") from error
    return comparison


def _planned(recipes: Sequence[Recipe], data: Data, directory: Path) -> Comparison:
    """What is to be run, with what is finished and what another call failed at."""
    wanted = {recipe.name: recipe for recipe in recipes}
    content = {name: recipe.to_dict() for name, recipe in wanted.items()}
    fresh = Comparison(directory=directory, data=data.describe(), planned=list(wanted), results=(), recipes=content)
    if not (directory / MANIFEST).exists():
        return fresh
    before = read_comparison(directory)
    if dict(before.data) != fresh.data or any(
        # A key that came with a later version has its default in a result of an earlier one.
        run.name in wanted and wanted[run.name] != Recipe.from_dict(run.recipe)
        for run in before.results
    ):
        raise InvalidData(f"{directory} holds a comparison of other recipes or data; choose another directory")
    return replace(
        fresh,
        planned=list(dict.fromkeys([*before.planned, *wanted])),
        results=before.results,
        failures={name: why for name, why in before.failures.items() if name not in wanted},
        recipes={**before.recipes, **content},
    )


def _with_outcome(comparison: Comparison, recipe: Recipe, outcome: RunResult | str) -> Comparison:
    if isinstance(outcome, str):
        return replace(comparison, failures={**comparison.failures, recipe.name: outcome})
    results = sorted([*comparison.results, outcome], key=lambda result: comparison.planned.index(result.name))
    return replace(comparison, results=results)


def _with_others(comparison: Comparison) -> Comparison:
    """The comparison with what other processes have finished, failed at and planned since it was read."""
    now = read_comparison(comparison.directory)
    planned = list(dict.fromkeys([*now.planned, *comparison.planned]))
    recipes = {**now.recipes, **comparison.recipes}
    results = {run.name: run for run in (*now.results, *comparison.results)}
    failures = {**now.failures, **comparison.failures}
    return replace(
        comparison,
        planned=planned,
        results=[results[name] for name in planned if name in results],
        failures={name: why for name, why in failures.items() if name not in results},
        recipes=recipes,
        elsewhere=[name for name in comparison.elsewhere if name not in results],
    )


def _end(comparison: Comparison) -> tuple[Comparison, Path]:
    """What there is in the end, and the page of it."""
    with contextlib.suppress(OSError, InvalidData), _locked(comparison.directory):
        # A full disk, or a file that was damaged meanwhile, must not hide why the comparison stopped.
        comparison = _with_others(comparison)
        write_manifest(comparison)
        return comparison, write_report(comparison)
    return comparison, comparison.directory / PAGE


@contextlib.contextmanager
def _no_watch(recipe: Recipe, steps: int) -> Iterator[Callable[[], None]]:
    yield lambda: None
