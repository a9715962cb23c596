"""compare: train the same network under several schemes, seeds and starts of the latent weights, with equal budgets."""

import contextlib
import errno
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import pluggy

from bonn_qat import distributed, plugins
from bonn_qat.errors import InvalidData, InvalidRecipe
from bonn_qat.files.atomic import remove_leftovers
from bonn_qat.studies.comparison import MANIFEST, PAGE, Comparison, read_comparison, write_manifest
from bonn_qat.studies.jobs import at_once, check_jobs, check_plugins
from bonn_qat.studies.on_ray import RayCluster, on_ray
from bonn_qat.studies.report import write_report
from bonn_qat.studies.run import checkpoint_of, in_turn, is_held, is_over, lock_of, whole_comparison
from bonn_qat.studies.statistics import REFERENCE
from bonn_qat.training.data import Data
from bonn_qat.training.interrupts import deferred_interrupts
from bonn_qat.training.network import check_trainable
from bonn_qat.training.recipe import Recipe

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
    """One recipe for each scheme, start of the latent weights and seed; a float network, without latents, once a seed.

    A scheme may have options, ``xnor:gradient=plain+input_scale=true``. ``"all"`` stands for every installed scheme,
    the float network first and BONN last. Without ``latents`` the recipe's start is used, and for a float network
    ``"float"``, unless it is the recipe's own scheme.

    Raises UnknownName for a scheme that no plugin offers, InvalidRecipe if no scheme is named.

    >>> [recipe.name for recipe in plan(Recipe(), schemes=["float", "bonn"], latents=["0.01"])]
    ['float-float-seed0', 'bonn-0.01-seed0']
    """
    starts = list(dict.fromkeys(latents)) or [recipe.latents]
    arms = []
    names = [name for scheme in schemes for name in (_everyone(pm) if scheme == ALL else [scheme])]
    for scheme in dict.fromkeys(names):
        arm = recipe.with_scheme(scheme)
        # The recipe's own scheme keeps all of the recipe.
        without = plugins.find_scheme(arm.scheme, pm).weight is None and (latents or arm.scheme != recipe.scheme)
        arms += [replace(arm, latents=start) for start in (["float"] if without else starts)]
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
    ray: RayCluster | None = None,
    waits: bool = False,
    around: Path | None = None,
    pm: pluggy.PluginManager | None = None,
) -> Comparison:
    """Run every recipe that ``directory`` has no result for, and write the report.

    Each finished run is a file of its own with its weights beside it, and a run under way keeps a checkpoint (see
    :func:`bonn_qat.train`): after an interruption the report names what is missing, and the same call resumes. A run
    that diverges is reported as failed, and the others go on.

    Several processes, on one machine or on many that see ``directory``, may make the same call at once: each takes the
    next run that no other is training, and in the end takes over what another has left unfinished. ``elsewhere`` of the
    result names the runs that others were still training then; with ``waits`` it waits for these.

    ``jobs`` above 1 starts that many such processes: several on one GPU where the kernels are too small to fill it, or
    as many as there are cores, which they share as threads unless ``OMP_NUM_THREADS`` is set. With the same number of
    threads the results are those of one job, on a CPU bit for bit. A run whose process dies is resumed from its
    checkpoint by another process; it has failed when that dies too. Each process loads the installed plugins of ``pm``
    itself, so no others may be registered there, and the data are pickled; a script keeps its call below
    ``if __name__ == "__main__":``.

    ``ray`` runs them as tasks of a Ray cluster, which needs no shared directory (:mod:`bonn_qat.studies.on_ray`). All
    plugins but observers are installed on its nodes.

    Observers are called in the process that trains; with ``ray`` they are called here. ``around`` is the directory of
    the study that this comparison belongs to, whose observers have been told of it. In a process group (see
    :func:`bonn_qat.train`) every process makes the same call, rank 0 writes and calls the observers, and jobs is 1.

    Raises UnknownName and InvalidRecipe before anything is run, InvalidData for a directory that holds another
    comparison or cannot be written, BonnQatError before anything is run for a plugin that another process cannot load,
    and for an exception in a job; OSError where results or the report cannot be written, or were removed meanwhile. An
    interruption or a full disk is raised again after the report is written.

    >>> compare(plan(Recipe(epochs=5)), load("digits"), Path("results/mine"), jobs=2).results  # doctest: +SKIP
    """
    check_jobs(jobs)
    if ray is not None and (jobs > 1 or distributed.world() > 1):
        raise InvalidRecipe("runs go to Ray or to several processes here, not both; leave out jobs and the launcher")
    pm = pm or plugins.manager()
    if jobs > 1 or ray is not None:
        check_plugins(pm, observers=ray is None)
    is_first = distributed.rank() == 0
    observers = plugins.Observers(pm)
    for recipe in recipes:
        check_trainable(recipe, pm)
    comparison = _begin(recipes, data, directory)
    left = list({recipe.name: recipe for recipe in recipes if recipe.name in comparison.missing}.values())
    unwritten: Exception | None = None
    try:
        if is_first:
            with whole_comparison(directory):  # observers of several processes would open their stores together
                observers.bonn_qat_before_comparison(directory=directory, recipes=list(recipes))
        if ray is not None:
            on_ray(left, data, directory, cluster=ray, pm=pm, waits=waits)
        elif jobs > 1:
            at_once(left, data, directory, jobs=jobs, pm=pm, waits=waits, around=around)
        else:
            in_turn(left, data, directory, pm=pm, waits=waits)
    finally:
        if is_first:
            try:
                with deferred_interrupts():  # what draws the figures may swallow an interruption
                    comparison = _end(comparison)
            except (OSError, InvalidData) as error:
                unwritten = error  # which must not hide why the comparison stopped
            observers.bonn_qat_after_comparison(directory=directory, page=directory / PAGE)
    if unwritten is not None:
        raise unwritten
    distributed.barrier()
    comparison = comparison if is_first else read_comparison(directory)
    names = {recipe.name for recipe in recipes}
    # Another process may write its result and end between the two questions.
    ours = [name for name in names if name not in comparison.failures and not is_held(directory, name)]
    gone = sorted(name for name in ours if not is_over(directory, name))
    if gone and is_first:
        raise FileNotFoundError(
            errno.ENOENT, f"no result of {', '.join(gone)} is there: files were removed or moved, or the process that "
            "trained it ended", str(directory),
        )  # fmt: skip
    return replace(comparison, elsewhere=[name for name in comparison.missing if name in names])


def _begin(recipes: Sequence[Recipe], data: Data, directory: Path) -> Comparison:
    distributed.barrier()  # rank 0 may still be writing there
    with contextlib.ExitStack() as stack:
        if distributed.rank() == 0:
            try:
                directory.mkdir(parents=True, exist_ok=True)
                stack.enter_context(whole_comparison(directory))
            except OSError as error:
                raise InvalidData(f"cannot write results to {directory}: {error.strerror}") from error
        comparison = _planned(recipes, data, directory)
        distributed.barrier()  # until all have read
        try:
            if distributed.rank() == 0:
                for name in (MANIFEST, PAGE):
                    remove_leftovers(directory / name)
                for run in comparison.results:  # a process may have been killed right after it finished one
                    checkpoint_of(directory, run.name).unlink(missing_ok=True)
                    lock_of(directory, run.name).unlink(missing_ok=True)
                write_manifest(comparison)
        except OSError as error:
            raise InvalidData(f"cannot write results to {directory}: {error.strerror}") from error
    return comparison


def _planned(recipes: Sequence[Recipe], data: Data, directory: Path) -> Comparison:
    """The comparison with these recipes added, and with the finished and failed runs of earlier calls."""
    wanted = {recipe.name: recipe for recipe in recipes}
    content = {name: recipe.to_dict() for name, recipe in wanted.items()}
    fresh = Comparison(
        directory=directory,
        data=data.describe(),
        fingerprint=data.fingerprint,
        planned=list(wanted),
        results=(),
        recipes=content,
    )
    if not (directory / MANIFEST).exists():
        return fresh
    before = read_comparison(directory)
    if dict(before.data) != fresh.data or any(
        # A result of an earlier version lacks the keys that were added later; they have their defaults.
        run.name in wanted and wanted[run.name] != Recipe.from_dict(run.recipe)
        for run in before.results
    ):
        raise InvalidData(f"{directory} holds a comparison of other recipes or data; choose another directory")
    if before.results and before.fingerprint not in ("", fresh.fingerprint):
        raise InvalidData(
            f"{directory} holds results of other images or labels, which also go by the name {data.name!r} and have "
            "the same numbers; choose another directory"
        )
    return replace(
        fresh,
        planned=list(dict.fromkeys([*before.planned, *wanted])),
        results=before.results,
        failures={name: why for name, why in before.failures.items() if name not in wanted},
        recipes={**before.recipes, **content},
    )


def _end(comparison: Comparison) -> Comparison:
    """Write the comparison as all processes leave it on disk, and its page."""
    directory = comparison.directory
    directory.mkdir(parents=True, exist_ok=True)
    with whole_comparison(directory):
        if not (directory / MANIFEST).exists():  # the directory was removed or moved
            write_manifest(comparison)
        comparison = read_comparison(directory)
        finished = {run.name for run in comparison.results}
        failures = {name: why for name, why in comparison.failures.items() if name not in finished}
        comparison = replace(comparison, failures=failures)
        write_manifest(comparison)
        write_report(comparison)
    return comparison
