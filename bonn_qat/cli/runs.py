"""Commands that train: train, compare, reproduce; and report, which writes a comparison's page again."""

import shlex
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click

from bonn_qat.cli.exits import say, say_written, stoppable
from bonn_qat.cli.options import (
    IMAGE,
    Argument,
    DataDir,
    NoPlugins,
    Option,
    Runs,
    Settings,
    Size,
    Workers,
    console,
    parts,
    rate,
)
from bonn_qat.errors import InvalidRecipe

if TYPE_CHECKING:
    import pluggy

    from bonn_qat.training.recipe import Recipe


def train(
    *,
    scheme: Annotated[
        str | None, Option(help="A scheme, such as xnor:input_scale=true; by default the recipe's, or bonn.")
    ] = None,
    seed: Annotated[
        int | None, Option(min=0, help="Decides everything that is random; by default the recipe's.")
    ] = None,
    given: Runs,
) -> None:
    """Train one network; write its weights, result and report, and meanwhile its checkpoint, to the output directory.

    Under torchrun or accelerate launch the run is spread over all processes.
    """
    from bonn_qat.studies import compare as comparing

    if given.resume:
        base, planned = _planned(given.resume)
    else:
        base, _ = given.base({"scheme": "--scheme", "seed": "--seed"})
        planned = comparing.plan(base, schemes=[scheme or base.scheme], seeds=[base.seed if seed is None else seed])
    _compare(base, planned, given, Workers())


def compare(
    *,
    schemes: Annotated[
        str | None,
        Option(
            help="Comma-separated schemes, such as xnor:input_scale=true, or all; by default that of the recipe's "
            "file, or else the float network, xnor, bireal, pcnn and bonn."
        ),
    ] = None,
    seeds: Annotated[int, Option(min=1, help="Number of seeds, counted from the recipe's, or 0.")] = 1,
    latents: Annotated[str, Option(help="Comma-separated starts of the latent weights: 0.01, float, ...")] = "",
    given: Runs,
    workers: Workers,
) -> None:
    """Train the same network under several schemes, and report accuracy, size and the latent weights.

    The same command with the same output directory may be started several times, on one machine or on many: each
    process takes the next run that no other is training, and in the end what another has left unfinished.
    """
    from bonn_qat import plugins
    from bonn_qat.studies import compare as comparing

    if given.resume:
        base, planned = _planned(given.resume)
    else:
        base, keys = given.base({"scheme": "--schemes", "seed": "--seeds"})
        usual = [name for name in comparing.ARMS if name in plugins.schemes()]
        arms = parts(schemes) if schemes is not None else [base.scheme] if "scheme" in keys else usual
        numbers = range(base.seed, base.seed + seeds)
        planned = comparing.plan(base, schemes=arms, seeds=numbers, latents=parts(latents))
    _compare(base, planned, given, workers)


def _planned(directory: Path) -> tuple["Recipe", list["Recipe"]]:
    """The first recipe and all recipes that were planned in the directory of a comparison."""
    from bonn_qat.studies.comparison import read_comparison
    from bonn_qat.training.recipe import Recipe

    context = click.get_current_context()
    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    given -= {"resume", "jobs", "ray", "cores_per_run", "gpus_per_run", "data_dir", "no_plugins"}
    if odd := sorted(max(option.opts, key=len) for option in context.command.params if option.name in given):
        raise InvalidRecipe(f"--resume continues the runs as they were planned; leave out {', '.join(odd)}")
    comparison = read_comparison(directory)
    if missing := [name for name in comparison.planned if name not in comparison.recipes]:
        raise InvalidRecipe(
            f"{directory} has no recipe for {missing[0]}, because an earlier version began it; repeat the same "
            f"command with --output {directory}"
        )
    planned = [Recipe.from_dict(comparison.recipes[name]) for name in comparison.planned]
    if not planned:
        raise InvalidRecipe(f"no runs were planned in {directory}; start a comparison with --output")
    return planned[0], planned


def _compare(base: "Recipe", planned: list["Recipe"], given: Runs, workers: Workers) -> None:
    from bonn_qat.studies import compare as comparing
    from bonn_qat.studies.comparison import MANIFEST, PAGE, read_comparison
    from bonn_qat.studies.report import results
    from bonn_qat.studies.statistics import differences
    from bonn_qat.training.data import load

    output, cluster = given.resume or given.output, workers.cluster()
    before = read_comparison(output) if output and (output / MANIFEST).exists() else None
    loaded = load(
        base.data,
        directory=given.data_dir,
        train_images=base.train_images,
        test_images=base.test_images,
        validation_images=base.validation_images,
        size=given.img_size or (int(before.data["image"][1]) if before else IMAGE),
    )
    directory = _directory(output, loaded.name)
    say(
        f"{loaded.name}: {loaded.train_size} training and {loaded.test_size} test images; {base.model}, "
        f"{_counted(base.epochs, 'epoch')}; {_counted(len(planned), 'run')}; results in {directory}"
    )
    say_plugins(directory)
    place = f" --data-dir {shlex.quote(str(given.data_dir))}" if given.data_dir else ""
    again = f"bonn-qat compare --resume {shlex.quote(str(directory))}{place}"
    with stoppable(again):
        comparison = comparing.compare(planned, loaded, directory, jobs=workers.jobs, ray=cluster, pm=_observed())
    console().print(results(comparison))
    for difference in differences(comparison):
        say(str(difference))
    say_written(directory / PAGE, what="report")
    for name in comparison.elsewhere:
        say(f"running in another process: {name}")
    for name, reason in comparison.failures.items():
        say(f"failed: {name}: {reason}")
    others = [name for name in comparison.missing if name not in comparison.elsewhere]
    for name in others:
        say(f"planned before, and not finished: {name}; {again} trains it")
    if comparison.failures or others:
        raise click.exceptions.Exit(1)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def say_plugins(directory: Path) -> None:
    """Print the plugins, and where their observers write to."""
    from bonn_qat import plugins

    say(f"plugins: {', '.join(plugins.installed()) or 'none'}")
    for line in plugins.Observers().bonn_qat_describe(directory=directory):
        say(str(line))


def reproduce(
    *,
    study: Annotated[str, Argument(help="table2, table3, table4, fig3 to fig6, ablation, ..., or a TOML file.")],
    scale: Annotated[float, Option(help="The share of the paper's work: epochs and images shrink alike.")] = 1.0,
    seeds: Annotated[int | None, Option(min=1, help="Number of seeds; by default the study's.")] = None,
    rates: Annotated[
        str, Option(help="Comma-separated learning rates: each arm takes its best, by held-out images.")
    ] = "",
    search_scale: Annotated[float, Option(help="The share of a run's work that the search trains for.")] = 0.25,
    only: Annotated[str, Option(help="Comma-separated settings of the study; by default all.")] = "",
    data: Annotated[str | None, Option(help="Other data, or the image folder of table2, table4 and fig6.")] = None,
    settings: Settings = (),
    runs: Workers,
    workers: Annotated[int, Option(min=0, help="Processes that read an image folder.")] = 8,
    data_dir: DataDir = None,
    img_size: Size = IMAGE,
    output: Annotated[
        Path | None, Option(help="Directory for the results; an existing one is continued, or shared by studies.")
    ] = None,
    no_plugins: NoPlugins = False,
) -> None:
    """Run a table or figure of the paper, and report its numbers beside ours.

    Under torchrun or accelerate launch each run is spread over all processes.
    """
    from bonn_qat.studies import reproduce as reproducing
    from bonn_qat.studies import study as studies
    from bonn_qat.studies import study_report

    chosen = studies.load(study).only(parts(only))
    directory = _directory(output, chosen.name)
    searched = [rate(part) for part in parts(rates)]
    count = reproducing.runs(chosen, seeds, searched)
    say(f"{chosen.title}; {_counted(count, 'run')}, scale {scale:g}; results in {directory}")
    say_plugins(directory)
    cluster = runs.cluster()
    with stoppable(f"the same command with --output {shlex.quote(str(directory))}"):
        result = reproducing.reproduce(
            chosen, directory, scale=scale, seeds=seeds, rates=searched, search_scale=search_scale,
            settings=settings, data=data, data_directory=data_dir, size=img_size, workers=workers, jobs=runs.jobs,
            ray=cluster, pm=_observed(),
        )  # fmt: skip
    for setting in result.settings:
        console().print(study_report.results(setting, result.study))
    say_written(directory / f"{chosen.name}.html", what="report")
    comparisons = [setting.comparison for setting in result.settings]
    for name in (name for comparison in comparisons for name in comparison.elsewhere):
        say(f"running in another process: {name}")
    for name, reason in (failure for comparison in comparisons for failure in comparison.failures.items()):
        say(f"failed: {name}: {reason}")
    if any(c.failures or set(c.missing) - set(c.elsewhere) for c in comparisons):
        raise click.exceptions.Exit(1)


def report(directory: Annotated[Path, Argument(help="The results of a comparison.")]) -> None:
    """Write the report of a comparison again, from its results."""
    from bonn_qat.studies.comparison import read_comparison
    from bonn_qat.studies.report import results, write_report

    comparison = read_comparison(directory)
    page = write_report(comparison)
    console().print(results(comparison))
    say_written(page, what="report")


def _observed() -> "pluggy.PluginManager":
    """The installed plugins, and the observer that prints a line for each epoch, also in each job."""
    from bonn_qat import plugins
    from bonn_qat.studies.progress import EpochLines

    pm = plugins.create_manager()
    pm.register(EpochLines(), name="epoch lines")
    return pm


def _directory(output: Path | None, name: str) -> Path:
    from bonn_qat import distributed

    # Every process of a group has its own clock.
    return output or Path("results") / f"{name}-{distributed.broadcast(f'{datetime.now():%Y%m%d-%H%M%S}')}"
