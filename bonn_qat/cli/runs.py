"""Commands that train: train, compare, reproduce; and report, which writes a comparison's page again."""

import shlex
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bonn_qat.cli.exits import say, stoppable
from bonn_qat.cli.options import (
    BatchSize,
    DataDir,
    DataOption,
    Epochs,
    Jobs,
    Model,
    NoPlugins,
    Output,
    Rate,
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
    from bonn_qat.training.recipe import Recipe


def train(
    context: typer.Context,
    data: DataOption = None,
    scheme: Annotated[str, typer.Option(help="A scheme, such as xnor:input_scale=true.")] = "bonn",
    seed: Annotated[int, typer.Option(min=0, help="Decides everything that is random.")] = 0,
    model: Model = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Rate = None,
    train_images: TrainImages = None,
    test_images: TestImages = None,
    recipe: RecipeFile = None,
    settings: Settings = None,
    data_dir: DataDir = None,
    img_size: Size = 224,
    output: Output = None,
    resume: Resume = None,
    no_plugins: NoPlugins = False,
) -> None:
    """Train one network; its weights, result, checkpoint while it goes on, and report are in the output directory.

    Under torchrun or accelerate launch it is spread over the processes.
    """
    from bonn_qat.studies import compare as comparing

    if resume:
        base, planned = _planned(context, resume)
    else:
        flags = {"data": data, "model": model, "epochs": epochs, "batch_size": batch_size, "lr": lr,
                 "train_images": train_images, "test_images": test_images}  # fmt: skip
        base = _base(recipe, flags, settings, {"scheme": "--scheme", "seed": "--seed"})
        planned = comparing.plan(base, schemes=[scheme], seeds=[seed])
    _compare(base, planned, resume or output, data_dir, img_size, jobs=1)


def compare(
    context: typer.Context,
    data: DataOption = None,
    schemes: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated schemes, such as xnor:input_scale=true, or all; by default the float "
            "network, xnor, bireal, pcnn and bonn."
        ),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds, counted from 0.")] = 1,
    latents: Annotated[str, typer.Option(help="Comma-separated starts of the latent weights: 0.01, float, ...")] = "",
    model: Model = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Rate = None,
    train_images: TrainImages = None,
    test_images: TestImages = None,
    recipe: RecipeFile = None,
    settings: Settings = None,
    jobs: Jobs = 1,
    data_dir: DataDir = None,
    img_size: Size = 224,
    output: Output = None,
    resume: Resume = None,
    no_plugins: NoPlugins = False,
) -> None:
    """Train the same network under several schemes, and report accuracy, size and the latent weights.

    Several processes, on one machine or on many, may be given the same command and output directory: each takes the
    next run that nobody is at.
    """
    from bonn_qat import plugins
    from bonn_qat.studies import compare as comparing

    if resume:
        base, planned = _planned(context, resume)
    else:
        flags = {"data": data, "model": model, "epochs": epochs, "batch_size": batch_size, "lr": lr,
                 "train_images": train_images, "test_images": test_images}  # fmt: skip
        base = _base(recipe, flags, settings, {"scheme": "--schemes", "seed": "--seeds"})
        arms = [name for name in comparing.ARMS if name in plugins.schemes()] if schemes is None else parts(schemes)
        planned = comparing.plan(base, schemes=arms, seeds=range(seeds), latents=parts(latents))
    _compare(base, planned, resume or output, data_dir, img_size, jobs=jobs)


def _base(recipe: Path | None, flags: dict[str, Any], settings: list[str] | None, own: dict[str, str]) -> "Recipe":
    """The recipe that the runs have in common; ``own`` are keys that each has for itself, and options for them."""
    from bonn_qat.training.recipe import Recipe
    from bonn_qat.training.settings import with_settings

    base = Recipe.from_toml(recipe) if recipe else Recipe.default(flags["data"] or "digits")
    base = replace(base, **{key: value for key, value in flags.items() if value is not None})
    for setting in settings or []:
        if option := own.get(setting.partition("=")[0].strip()):
            raise InvalidRecipe(f"{setting} cannot be set; use {option}")
    return with_settings(base, settings or [])


def _planned(context: typer.Context, directory: Path) -> tuple["Recipe", list["Recipe"]]:
    """What was planned in the directory of a comparison."""
    from bonn_qat.studies.comparison import read_comparison
    from bonn_qat.training.recipe import Recipe

    sources = {name: context.get_parameter_source(name) for name in context.params}
    given = {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}
    given -= {"resume", "jobs", "data_dir", "no_plugins"}
    if odd := sorted(max(option.opts, key=len) for option in context.command.params if option.name in given):
        raise InvalidRecipe(f"--resume goes on as it was planned: leave out {', '.join(odd)}")
    comparison = read_comparison(directory)
    if missing := [name for name in comparison.planned if name not in comparison.recipes]:
        raise InvalidRecipe(
            f"{directory} does not say how {missing[0]} was planned, for an earlier version began it; give the same "
            f"command as then, with --output {directory}"
        )
    planned = [Recipe.from_dict(comparison.recipes[name]) for name in comparison.planned]
    if not planned:
        raise InvalidRecipe(f"nothing was planned in {directory}; begin a comparison with --output")
    return planned[0], planned


def _compare(
    base: "Recipe", planned: list["Recipe"], output: Path | None, data_dir: Path | None, img_size: int, *, jobs: int
) -> None:
    from bonn_qat.studies import compare as comparing
    from bonn_qat.studies.comparison import MANIFEST, PAGE, read_comparison
    from bonn_qat.studies.report import terminal_table
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
        f"{base.epochs} epochs; {len(planned)} runs; results in {directory}"
    )
    say_plugins(directory)
    left = {run.name for run in planned} - {result.name for result in (before.results if before else ())}
    place = f" --data-dir {shlex.quote(str(data_dir))}" if data_dir else ""
    again = f"bonn-qat compare --resume {shlex.quote(str(directory))}{place}"
    with stoppable(again), _progress(len(left)) as watch:
        comparison = comparing.compare(planned, loaded, directory, jobs=jobs, watch=watch)
    console.print(terminal_table(comparison))
    for difference in differences(comparison):
        say(str(difference))
    say(f"report: {directory / PAGE}")
    for name in comparison.elsewhere:
        say(f"under way in another process: {name}")
    for name, reason in comparison.failures.items():
        say(f"failed: {name}: {reason}")
    if comparison.failures or set(comparison.missing) - set(comparison.elsewhere):
        raise typer.Exit(1)


def say_plugins(directory: Path) -> None:
    """The plugins, and where what they observe goes to."""
    from bonn_qat import plugins

    say(f"plugins: {', '.join(plugins.installed()) or 'none'}")
    for line in plugins.Observers().bonn_qat_describe(directory=directory):
        say(line)


def reproduce(
    study: Annotated[str, typer.Argument(help="table2, table3, table4, fig3 to fig6, ablation, ..., or a TOML file.")],
    scale: Annotated[float, typer.Option(help="The share of the paper's work: epochs and images shrink alike.")] = 1.0,
    seeds: Annotated[int | None, typer.Option(min=1, help="Number of seeds; by default the study's.")] = None,
    rates: Annotated[
        str, typer.Option(help="Comma-separated learning rates: each arm takes its best, by held-out images.")
    ] = "",
    search_scale: Annotated[float, typer.Option(help="The share of a run's work that the search trains for.")] = 0.25,
    only: Annotated[str, typer.Option(help="Comma-separated settings of the study; by default all.")] = "",
    data: Annotated[
        str | None, typer.Option(help="Other data, or the image folder of table2, table4 and fig6.")
    ] = None,
    settings: Settings = None,
    jobs: Jobs = 1,
    workers: Annotated[int, typer.Option(help="Processes that read an image folder.")] = 8,
    data_dir: DataDir = None,
    img_size: Size = 224,
    output: Annotated[
        Path | None, typer.Option(help="Directory for the results; an existing one is continued, or shared by studies.")
    ] = None,
    no_plugins: NoPlugins = False,
) -> None:
    """Run a table or figure of the paper, and report its numbers beside ours.

    Under torchrun or accelerate launch every run is spread over the processes.
    """
    from bonn_qat.studies import reproduce as reproducing
    from bonn_qat.studies import study as studies
    from bonn_qat.studies import study_report

    chosen = studies.load(study).only(parts(only))
    directory = _directory(output, chosen.name)
    searched = [rate(part) for part in parts(rates)]
    count = reproducing.runs(chosen, seeds, searched)
    say(f"{chosen.title}; {count} runs, scale {scale:g}; results in {directory}")
    say_plugins(directory)
    with stoppable(f"the same command with --output {shlex.quote(str(directory))}"), _progress(count) as watch:
        result = reproducing.reproduce(
            chosen, directory, scale=scale, seeds=seeds, rates=searched, search_scale=search_scale,
            settings=settings or [], data=data, data_directory=data_dir, size=img_size, workers=workers, jobs=jobs,
            watch=watch,
        )  # fmt: skip
    for table in study_report.terminal_tables(result):
        console.print(table)
    say(f"report: {directory / f'{chosen.name}.html'}")
    comparisons = [setting.comparison for setting in result.settings]
    for name in (name for comparison in comparisons for name in comparison.elsewhere):
        say(f"under way in another process: {name}")
    for name, reason in (failure for comparison in comparisons for failure in comparison.failures.items()):
        say(f"failed: {name}: {reason}")
    if any(c.failures or set(c.missing) - set(c.elsewhere) for c in comparisons):
        raise typer.Exit(1)


def report(directory: Annotated[Path, typer.Argument(help="The results of a comparison.")]) -> None:
    """Write the report of a comparison again from its results."""
    from bonn_qat.studies.comparison import read_comparison
    from bonn_qat.studies.report import terminal_table, write_report

    comparison = read_comparison(directory)
    page = write_report(comparison)
    console.print(terminal_table(comparison))
    say(f"report: {page}")


@contextmanager
def _progress(runs: int) -> Iterator[Callable[["Recipe", int], AbstractContextManager[Callable[[], None]]]]:
    """A bar for all runs and one for each that is under way, with the time that is left."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(elapsed_when_finished=True), console=console) as bars:
        whole = bars.add_task("all runs", total=runs)

        @contextmanager
        def watch(recipe: "Recipe", steps: int) -> Iterator[Callable[[], None]]:
            task = bars.add_task(recipe.name, total=steps)
            try:
                yield lambda: bars.advance(task)
            except Exception:
                bars.advance(whole)  # a run that failed is over, one that was interrupted is not
                raise
            else:
                bars.advance(whole)
            finally:
                bars.remove_task(task)

        yield watch


def _directory(output: Path | None, name: str) -> Path:
    from bonn_qat import distributed

    # Of several processes each has a clock of its own.
    return output or Path("results") / f"{name}-{distributed.broadcast(f'{datetime.now():%Y%m%d-%H%M%S}')}"
