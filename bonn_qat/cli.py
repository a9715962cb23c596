"""The command ``bonn-qat``: parse, call a verb, print."""

import errno
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from bonn_qat.errors import BonnQatError, InvalidRecipe
from bonn_qat.files import plain
from bonn_qat.training.interrupts import TERMINATED

if TYPE_CHECKING:
    from torch import nn

    from bonn_qat.scheme import Scheme
    from bonn_qat.training.recipe import Recipe

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Train and compare 1-bit networks.")
console = Console(quiet=os.environ.get("RANK", "0") != "0")  # under a launcher the first process speaks

DataOption = Annotated[
    str | None,
    typer.Option(help="digits, cifar10, cifar100, fashion-mnist, or the path of an image folder; by default digits."),
]
DataDir = Annotated[Path | None, typer.Option(help="Where named data sets lie or are downloaded to.")]
Model = Annotated[str | None, typer.Option(help="Any timm model; by default the recipe's.")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="A TOML recipe instead of the one for the data.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="A key of the recipe, VALUE as in TOML: milestones=[20,40], scheme_options.granularity=plane; repeatable.",
    ),
]
Jobs = Annotated[
    int,
    typer.Option(min=1, help="Runs at once, each a process of its own; on a CPU at most the number of cores."),
]
Size = Annotated[int, typer.Option(help="Height and width of an image.")]
Epochs = Annotated[int | None, typer.Option(help="Epochs of every run.")]
BatchSize = Annotated[int | None, typer.Option("--batch-size", "-b", help="Of all processes together.")]
Rate = Annotated[float | None, typer.Option(help="Learning rate of every run.")]
TrainImages = Annotated[int | None, typer.Option(help="Train on a fixed random part.")]
TestImages = Annotated[int | None, typer.Option(help="Test on a fixed random part.")]
Output = Annotated[Path | None, typer.Option(help="Directory for the results; an existing one is continued.")]
Resume = Annotated[
    Path | None,
    typer.Option(
        metavar="DIRECTORY", help="Go on with what was begun there, as it was planned, and in its MLflow run."
    ),
]


def _switch_off_plugins(wanted: bool) -> None:
    if wanted:
        from bonn_qat import plugins

        os.environ["BONN_QAT_PLUGINS"] = ""
        plugins.manager.cache_clear()


NoPlugins = Annotated[
    bool,
    typer.Option(
        "--no-plugins", callback=_switch_off_plugins, is_eager=True,
        help="Load no installed plugin; the environment variable BONN_QAT_PLUGINS names those to load.",
    ),
]  # fmt: skip


@app.command()
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


@app.command()
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
        arms = [name for name in comparing.ARMS if name in plugins.schemes()] if schemes is None else _parts(schemes)
        planned = comparing.plan(base, schemes=arms, seeds=range(seeds), latents=_parts(latents))
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
    _say(
        f"{loaded.name}: {loaded.train_size} training and {loaded.test_size} test images; {base.model}, "
        f"{base.epochs} epochs; {len(planned)} runs; results in {directory}"
    )
    _say_who_is_there(directory)
    left = {run.name for run in planned} - {result.name for result in (before.results if before else ())}
    place = f" --data-dir {shlex.quote(str(data_dir))}" if data_dir else ""
    again = f"bonn-qat compare --resume {shlex.quote(str(directory))}{place}"
    with _stoppable(again), _progress(len(left)) as watch:
        comparison = comparing.compare(planned, loaded, directory, jobs=jobs, watch=watch)
    console.print(terminal_table(comparison))
    for difference in differences(comparison):
        _say(str(difference))
    _say(f"report: {directory / PAGE}")
    for name in comparison.elsewhere:
        _say(f"under way in another process: {name}")
    for name, reason in comparison.failures.items():
        _say(f"failed: {name}: {reason}")
    if comparison.failures or set(comparison.missing) - set(comparison.elsewhere):
        raise typer.Exit(1)


def _say_who_is_there(directory: Path) -> None:
    """The plugins, and where what they observe goes to."""
    from bonn_qat import plugins

    _say(f"plugins: {', '.join(plugins.installed()) or 'none'}")
    for line in plugins.manager().hook.bonn_qat_describe(directory=directory):
        _say(line)


@app.command()
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

    chosen = studies.load(study).only(_parts(only))
    directory = _directory(output, chosen.name)
    searched = [_rate(part) for part in _parts(rates)]
    count = reproducing.runs(chosen, seeds, searched)
    _say(f"{chosen.title}; {count} runs, scale {scale:g}; results in {directory}")
    _say_who_is_there(directory)
    with _stoppable(f"the same command with --output {shlex.quote(str(directory))}"), _progress(count) as watch:
        result = reproducing.reproduce(
            chosen, directory, scale=scale, seeds=seeds, rates=searched, search_scale=search_scale,
            settings=settings or [], data=data, data_directory=data_dir, size=img_size, workers=workers, jobs=jobs,
            watch=watch,
        )  # fmt: skip
    for table in study_report.terminal_tables(result):
        console.print(table)
    _say(f"report: {directory / f'{chosen.name}.html'}")
    comparisons = [setting.comparison for setting in result.settings]
    for name in (name for comparison in comparisons for name in comparison.elsewhere):
        _say(f"under way in another process: {name}")
    for name, reason in (failure for comparison in comparisons for failure in comparison.failures.items()):
        _say(f"failed: {name}: {reason}")
    if any(c.failures or set(c.missing) - set(c.elsewhere) for c in comparisons):
        raise typer.Exit(1)


@app.command()
def report(directory: Annotated[Path, typer.Argument(help="The results of a comparison.")]) -> None:
    """Write the report of a comparison again from its results."""
    from bonn_qat.studies.comparison import read_comparison
    from bonn_qat.studies.report import terminal_table, write_report

    comparison = read_comparison(directory)
    page = write_report(comparison)
    console.print(terminal_table(comparison))
    _say(f"report: {page}")


@app.command()
def summary(
    model: Annotated[str, typer.Argument(help="Any timm model.")],
    scheme: Annotated[str, typer.Option(help="The scheme, or float.")] = "bonn",
    num_classes: Annotated[int, typer.Option()] = 1000,
    img_size: Size = 224,
    no_plugins: NoPlugins = False,
) -> None:
    """Bits, sizes and multiply-accumulates of a network, layer by layer, and what stays float and why."""
    import timm

    import bonn_qat.models  # noqa: F401 (registers the paper's networks with timm)
    from bonn_qat.binarization.binarize import binarize
    from bonn_qat.errors import UnknownName
    from bonn_qat.inspection.summary import summary as summarise

    if not timm.is_model(model):
        raise UnknownName("model", model, timm.list_models())
    size = (3, img_size, img_size)
    network = binarize(
        timm.create_model(model, num_classes=num_classes), _scheme(scheme), input_size=size, inplace=True
    )
    typer.echo(str(summarise(network, size)))


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="Any timm model.")],
    scheme: Annotated[str, typer.Option(help="The scheme of the binary network.")] = "bonn",
    img_size: Size = 224,
    num_classes: Annotated[int, typer.Option()] = 1000,
    batch_sizes: Annotated[str, typer.Option(help="Comma-separated numbers of images in a call.")] = "1,32",
    threads: Annotated[str, typer.Option(help="Comma-separated numbers of threads; by default 1 and all cores.")] = "",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds in which the arms take turns.")] = 20,
    startup: Annotated[
        bool, typer.Option("--startup", help="Also start each arm in processes of its own: time and peak memory.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Directory for bench.json and bench.svg.")] = None,
    no_plugins: NoPlugins = False,
) -> None:
    """Latency and size of a network on this machine: float PyTorch, onnxruntime float and int8, packed.

    The weights are random: what they are changes neither.
    """
    import timm

    import bonn_qat.models  # noqa: F401 (registers the paper's networks with timm)
    from bonn_qat.bench import bench as measure
    from bonn_qat.binarization.binarize import binarize
    from bonn_qat.errors import UnknownName
    from bonn_qat.files.atomic import write_json, write_text
    from bonn_qat.plotting import MatplotlibMissing

    counts, batches = _numbers(threads, "--threads"), _numbers(batch_sizes, "--batch-sizes")
    if not timm.is_model(model):
        raise UnknownName("model", model, timm.list_models())
    size = (3, img_size, img_size)
    network = timm.create_model(model, num_classes=num_classes)
    binary = binarize(network, _scheme(scheme), input_size=size)
    with console.status("starting") as status:
        found = measure(
            network, binary, size, name=model, batches=batches, threads=counts or None, rounds=rounds,
            startup_rounds=3 if startup else 0, watch=status.update,
        )  # fmt: skip
    typer.echo(str(found))
    if output:
        written = [write_json(output / "bench.json", found.to_json())]
        try:
            if chart := found.chart():
                written.append(write_text(output / "bench.svg", chart))
        except MatplotlibMissing as error:
            _say(str(error))
        _say(f"written: {', '.join(map(str, written))}")
    if found.failures:
        raise typer.Exit(1)


@app.command()
def export(
    source: Annotated[
        str, typer.Argument(help="The weights that a comparison left, runs/NAME.safetensors, or any timm model.")
    ],
    format: Annotated[str, typer.Option(help="onnx, qonnx, pt2, packed or c.")],
    output: Annotated[Path, typer.Option(help="The file to write.")],
    scheme: Annotated[str | None, typer.Option(help="The scheme of a timm model; by default bonn.")] = None,
    img_size: Annotated[
        int | None, typer.Option(help="Height and width; by default those of the training, or 224.")
    ] = None,
    num_classes: Annotated[int | None, typer.Option(help="Classes of a timm model; by default 1000.")] = None,
    no_plugins: NoPlugins = False,
) -> None:
    """Write a binary network as a file for another runtime, and compare what the two give.

    A timm model is as it starts, with random weights.
    """
    from bonn_qat.exporting.export import PackageMissing, verify
    from bonn_qat.exporting.export import export as write

    network, size = _source(source, scheme, img_size, num_classes)
    with console.status(f"writing {output}"):
        path = write(network, output, format, input_size=size)
    typer.echo(f"{path}: {path.stat().st_size / 1e6:.2f} MB")
    try:
        with console.status(f"running {output}"):
            agreement = verify(network, path, format, input_size=size)
    except PackageMissing as missing:
        typer.echo(f"not compared with the network: {missing}")
        return
    typer.echo(
        f"difference from the network's outputs on random images: at most {agreement.difference:.2g}, "
        f"median {agreement.median:.2g}; the same class for {agreement.same:.1%}"
    )


@app.command()
def schemes(no_plugins: NoPlugins = False) -> None:
    """The schemes that are installed, with their bits, references and options."""
    from bonn_qat import plugins

    for scheme in sorted(plugins.schemes().values(), key=lambda scheme: scheme.name):
        options = ", ".join(f"{name}={value!r}" for name, value in scheme.options.items())
        console.print(f"[bold]{scheme.name}[/bold]  {scheme.bits} bits W/A", highlight=False)
        console.print(Padding(Text(scheme.reference), (0, 0, 0, 4)))
        if options:
            console.print(Padding(Text(f"options: {options}"), (0, 0, 0, 4)))
    console.print(
        "Set options in a recipe's table scheme_options, or: compare --schemes xnor:input_scale=true+gradient=plain"
    )


_FULL = {errno.ENOSPC, errno.EDQUOT}
_NOT_WRITTEN = {*_FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG, errno.EIO}


class _Stopped(Exception):
    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


def _say(line: str) -> None:
    """Print ``line`` as it is, but for what would be an order to the terminal: it may be of a file of somebody else."""
    console.print(plain.printable(line), soft_wrap=True, markup=False, highlight=False)


@contextmanager
def _stoppable(again: str) -> Iterator[None]:
    kept = f"finished runs are kept, and the one under way up to its last checkpoint; {again} goes on from there"
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        yield
    except KeyboardInterrupt:
        raise _Stopped(130, f"interrupted; {kept}") from None
    except SystemExit:
        raise _Stopped(TERMINATED, f"terminated; {kept}") from None
    except OSError as error:
        if error.errno not in _NOT_WRITTEN:
            raise
        raise _Stopped(3, f"{_why(error)}; {kept}") from error
    finally:
        signal.signal(signal.SIGTERM, before)


def _why(error: OSError) -> str:
    return "the disk is full" if error.errno in _FULL else f"{error.filename or 'a file'}: {error.strerror}"


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


def _source(
    source: str, scheme: str | None, img_size: int | None, num_classes: int | None
) -> tuple["nn.Module", tuple[int, int, int]]:
    """The network of a weights file, or of timm's name, and the size of its images."""
    import timm

    import bonn_qat.models  # noqa: F401 (registers the paper's networks with timm)
    from bonn_qat.binarization.binarize import binarize
    from bonn_qat.errors import UnknownName
    from bonn_qat.training.network import restore

    if source.endswith(".safetensors") or Path(source).is_file():
        if scheme is not None or num_classes is not None:
            raise InvalidRecipe(f"{source} says itself of which scheme and how many classes it is; leave them out")
        network, (channels, height, width) = restore(Path(source))
        return network, (channels, img_size or height, img_size or width)
    if not timm.is_model(source):
        raise UnknownName("model", source, timm.list_models())
    size = (3, img_size or 224, img_size or 224)
    network = timm.create_model(source, num_classes=1000 if num_classes is None else num_classes)
    return binarize(network, _scheme(scheme or "bonn"), input_size=size, inplace=True), size


def _scheme(variant: str) -> "Scheme":
    from bonn_qat.training.network import recipe_scheme
    from bonn_qat.training.recipe import Recipe

    return recipe_scheme(Recipe().with_variant(variant))


def _directory(output: Path | None, name: str) -> Path:
    from bonn_qat import distributed

    # Of several processes each has a clock of its own.
    return output or Path("results") / f"{name}-{distributed.broadcast(f'{datetime.now():%Y%m%d-%H%M%S}')}"


def _rate(text: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InvalidRecipe(f"{text!r} in --rates is no number; write --rates 0.01,0.1") from error


def _numbers(text: str, option: str) -> list[int]:
    try:
        return [int(part) for part in _parts(text)]
    except ValueError as error:
        raise BonnQatError(f"{text!r} is no list of whole numbers; write {option} 1,4") from error


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def main(arguments: list[str] | None = None) -> int:
    """Run the command and return its exit code.

    0; 1 when a run failed; 2 for bad input, 3 for results that cannot be written, as on a full disk, 130 for Ctrl-C,
    143 for SIGTERM, each with one line on stderr.
    """
    from bonn_qat.distributed import process_group

    try:
        with process_group():
            code: int | None = app(args=arguments, standalone_mode=False)
    except _Stopped as stopped:
        return _fail(stopped.code, str(stopped))
    except BonnQatError as error:
        return _fail(2, str(error))
    except OSError as error:
        if error.errno not in _NOT_WRITTEN:
            raise
        return _fail(3, _why(error))
    except Exception as error:
        # typer's own, of whichever library it has its parser from
        if not hasattr(error, "format_message"):
            raise
        words = error.format_message()
        return _fail(2, words) if words else 2  # the help was printed
    return code or 0


def _fail(code: int, message: str) -> int:
    typer.echo(f"bonn-qat: {plain.printable(message)}", err=True)
    return code
