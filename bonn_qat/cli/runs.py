"""Commands that train: train, compare, reproduce; and report, which writes a comparison's page again."""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import click

from bonn_qat.cli.exits import say, stoppable
from bonn_qat.cli.options import (
    Argument,
    BatchSize,
    CoresPerRun,
    DataDir,
    DataOption,
    Epochs,
    GpusPerRun,
    Jobs,
    Model,
    NoPlugins,
    Option,
    Output,
    Rate,
    Ray,
    RecipeFile,
    Resume,
    Settings,
    Size,
    TestImages,
    TrainImages,
    console,
    parts,
    rate,
)
from bonn_qat.errors import InvalidRecipe

if TYPE_CHECKING:
    import pluggy

    from bonn_qat.studies.on_ray import RayCluster
    from bonn_qat.training.recipe import Recipe


def train(
    data: DataOption = None,
    scheme: Annotated[str, Option(help="A scheme, such as xnor:input_scale=true.")] = "bonn",
    seed: Annotated[int, Option(min=0, help="Decides everything that is random.")] = 0,
    model: Model = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Rate = None,
    train_images: TrainImages = None,
    test_images: TestImages = None,
    recipe: RecipeFile = None,
    settings: Settings = (),
    data_dir: DataDir = None,
    img_size: Size = 224,
    output: Output = None,
    resume: Resume = None,
    no_plugins: NoPlugins = False,
) -> None:
    """Train one network; write its weights, result and report, and meanwhile its checkpoint, to the output directory.

    Under torchrun or accelerate launch the run is spread over all processes.
    """
    from bonn_qat.studies import compare as comparing

    if resume:
        base, planned = _planned(resume)
    else:
        flags = {"data": data, "model": model, "epochs": epochs, "batch_size": batch_size, "lr": lr,
                 "train_images": train_images, "test_images": test_images}  # fmt: skip
        base = _base(recipe, flags, settings, {"scheme": "--scheme", "seed": "--seed"})
        planned = comparing.plan(base, schemes=[scheme], seeds=[seed])
    _compare(base, planned, resume or output, data_dir, img_size)


def compare(
    data: DataOption = None,
    schemes: Annotated[
        str | None,
        Option(
            help="Comma-separated schemes, such as xnor:input_scale=true, or all; by default the float "
            "network, xnor, bireal, pcnn and bonn."
        ),
    ] = None,
    seeds: Annotated[int, Option(min=1, help="Number of seeds, counted from 0.")] = 1,
    latents: Annotated[str, Option(help="Comma-separated starts of the latent weights: 0.01, float, ...")] = "",
    model: Model = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Rate = None,
    train_images: TrainImages = None,
    test_images: TestImages = None,
    recipe: RecipeFile = None,
    settings: Settings = (),
    jobs: Jobs = 1,
    ray: Ray = None,
    cores_per_run: CoresPerRun = 1,
    gpus_per_run: GpusPerRun = None,
    data_dir: DataDir = None,
    img_size: Size = 224,
    output: Output = None,
    resume: Resume = None,
    no_plugins: NoPlugins = False,
) -> None:
    """Train the same network under several schemes, and report accuracy, size and the latent weights.

    The same command with the same output directory may be started several times, on one machine or on many: each
    process takes the next run that no other is training.
    """
    from bonn_qat import plugins
    from bonn_qat.studies import compare as comparing

    if resume:
        base, planned = _planned(resume)
    else:
        flags = {"data": data, "model": model, "epochs": epochs, "batch_size": batch_size, "lr": lr,
                 "train_images": train_images, "test_images": test_images}  # fmt: skip
        base = _base(recipe, flags, settings, {"scheme": "--schemes", "seed": "--seeds"})
        arms = [name for name in comparing.ARMS if name in plugins.schemes()] if schemes is None else parts(schemes)
        planned = comparing.plan(base, schemes=arms, seeds=range(seeds), latents=parts(latents))
    cluster = _cluster(ray, cores_per_run, gpus_per_run)
    _compare(base, planned, resume or output, data_dir, img_size, jobs=jobs, ray=cluster)


def _base(recipe: Path | None, flags: dict[str, Any], settings: Sequence[str], own: dict[str, str]) -> "Recipe":
    """The recipe that all runs share; ``own`` maps the keys that each run has for itself to their options."""
    from bonn_qat.training.recipe import Recipe
    from bonn_qat.training.settings import with_settings

    base = Recipe.from_toml(recipe) if recipe else Recipe.default(flags["data"] or "digits")
    base = replace(base, **{key: value for key, value in flags.items() if value is not None})
    for setting in settings:
        if option := own.get(setting.partition("=")[0].strip()):
            raise InvalidRecipe(f"{setting} cannot be set; use {option}")
    return with_settings(base, settings)


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


def _compare(
    base: "Recipe",
    planned: list["Recipe"],
    output: Path | None,
    data_dir: Path | None,
    img_size: int,
    *,
    jobs: int = 1,
    ray: "RayCluster | None" = None,
) -> None:
    from bonn_qat.studies import compare as comparing
    from bonn_qat.studies.comparison import MANIFEST, PAGE, read_comparison
    from bonn_qat.studies.report import results
    from bonn_qat.studies.statistics import differences
    from bonn_qat.training.data import load

    before = read_comparison(output) if output and (output / MANIFEST).exists() else None
    loaded = load(
        base.data,
        directory=data_dir,
        train_images=base.train_images,
        test_images=base.test_images,
        validation_images=base.validation_images,
        size=int(before.data["image"][1]) if before else img_size,
    )
    directory = _directory(output, loaded.name)
    say(
        f"{loaded.name}: {loaded.train_size} training and {loaded.test_size} test images; {base.model}, "
        f"{_counted(base.epochs, 'epoch')}; {_counted(len(planned), 'run')}; results in {directory}"
    )
    say_plugins(directory)
    place = f" --data-dir {shlex.quote(str(data_dir))}" if data_dir else ""
    again = f"bonn-qat compare --resume {shlex.quote(str(directory))}{place}"
    with stoppable(again):
        comparison = comparing.compare(planned, loaded, directory, jobs=jobs, ray=ray, pm=_observed())
    console().print(results(comparison))
    for difference in differences(comparison):
        say(str(difference))
    say(f"report: {directory / PAGE}")
    for name in comparison.elsewhere:
        say(f"running in another process: {name}")
    for name, reason in comparison.failures.items():
        say(f"failed: {name}: {reason}")
    if comparison.failures or set(comparison.missing) - set(comparison.elsewhere):
        raise click.exceptions.Exit(1)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def say_plugins(directory: Path) -> None:
    """Print the plugins, and where their observers write to."""
    from bonn_qat import plugins

    say(f"plugins: {', '.join(plugins.installed()) or 'none'}")
    for line in plugins.Observers().bonn_qat_describe(directory=directory):
        say(line)


def reproduce(
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
    jobs: Jobs = 1,
    ray: Ray = None,
    cores_per_run: CoresPerRun = 1,
    gpus_per_run: GpusPerRun = None,
    workers: Annotated[int, Option(help="Processes that read an image folder.")] = 8,
    data_dir: DataDir = None,
    img_size: Size = 224,
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
    cluster = _cluster(ray, cores_per_run, gpus_per_run)
    with stoppable(f"the same command with --output {shlex.quote(str(directory))}"):
        result = reproducing.reproduce(
            chosen, directory, scale=scale, seeds=seeds, rates=searched, search_scale=search_scale,
            settings=settings, data=data, data_directory=data_dir, size=img_size, workers=workers, jobs=jobs,
            ray=cluster, pm=_observed(),
        )  # fmt: skip
    for setting in result.settings:
        console().print(study_report.results(setting, result.study))
    say(f"report: {directory / f'{chosen.name}.html'}")
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
    say(f"report: {page}")


def _observed() -> "pluggy.PluginManager":
    """The installed plugins, and the observer that prints a line for each epoch, also in each job."""
    from bonn_qat import plugins
    from bonn_qat.studies.progress import EpochLines

    pm = plugins.create_manager()
    pm.register(EpochLines(), name="epoch lines")
    return pm


def _cluster(address: str | None, cores: int, gpus: float | None) -> "RayCluster | None":
    from bonn_qat.studies.on_ray import RayCluster

    if address is None and (cores != 1 or gpus is not None):
        raise InvalidRecipe("--cores-per-run and --gpus-per-run are for --ray; add it, or leave them out")
    return None if address is None else RayCluster(address=address, cores=cores, gpus=gpus)


def _directory(output: Path | None, name: str) -> Path:
    from bonn_qat import distributed

    # Every process of a group has its own clock.
    return output or Path("results") / f"{name}-{distributed.broadcast(f'{datetime.now():%Y%m%d-%H%M%S}')}"
