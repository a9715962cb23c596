"""Options that several commands share, and the values that are parsed from their text."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from bonn_qat.errors import BonnQatError, InvalidRecipe

if TYPE_CHECKING:
    from bonn_qat.scheme import Scheme

console = Console(
    quiet=os.environ.get("RANK", "0") != "0",  # under a launcher, rank 0 alone prints
    width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120,  # rich takes 80 for a file or a pipe
)

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
    typer.Option(min=1, help="Runs at once, each in a process of its own; on a CPU at most the number of cores."),
]
Ray = Annotated[
    str | None,
    typer.Option(
        metavar="ADDRESS",
        help="Train on a Ray cluster: HOST:PORT, auto for the one that this machine belongs to, or local to start one.",
    ),
]
CoresPerRun = Annotated[int, typer.Option(min=1, help="Cores of each run on the Ray cluster, as threads.")]
GpusPerRun = Annotated[
    float | None,
    typer.Option(min=0, help="GPUs of each run on the Ray cluster, also a fraction; by default 1 if it has any."),
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


def scheme_of(spec: str) -> "Scheme":
    """The scheme with the options that ``spec`` names, such as ``xnor:input_scale=true``."""
    from bonn_qat.training.network import recipe_scheme
    from bonn_qat.training.recipe import Recipe

    return recipe_scheme(Recipe().with_scheme(spec))


def rate(text: str) -> float:
    """A learning rate. Raises InvalidRecipe for what is no number."""
    try:
        return float(text)
    except ValueError as error:
        raise InvalidRecipe(f"{text!r} in --rates is no number; write --rates 0.01,0.1") from error


def numbers(text: str, option: str) -> list[int]:
    """Comma-separated whole numbers. Raises BonnQatError naming ``option`` for anything else."""
    try:
        return [int(part) for part in parts(text)]
    except ValueError as error:
        raise BonnQatError(f"{text!r} is no list of whole numbers; write {option} 1,4") from error


def parts(text: str) -> list[str]:
    """The comma-separated parts of ``text``, without spaces and empty ones."""
    return [part.strip() for part in text.split(",") if part.strip()]
