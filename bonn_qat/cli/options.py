"""Commands from annotated functions, the options that several of them share, and values parsed from text."""

import functools
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

import click

from bonn_qat.errors import BonnQatError, InvalidRecipe

if TYPE_CHECKING:
    from rich.console import Console

    from bonn_qat.scheme import Scheme


class Option:
    """Stands in ``Annotated[TYPE, Option(...)]``: flags, by default ``--name``, and keywords of ``click.Option``."""

    parameter: type[click.Parameter] = click.Option

    def __init__(self, *flags: str, min: float | None = None, **keywords: Any) -> None:
        self.flags, self.min, self.keywords = flags, min, keywords

    def declare(self, name: str, kind: Any, default: Any) -> click.Parameter:
        """The click parameter ``name`` of type ``kind``; without a default it is required."""
        keywords = dict(self.keywords)
        flags = () if self.parameter is click.Argument else self.flags or (f"--{name.replace('_', '-')}",)
        if get_origin(kind) is UnionType:  # X | None
            kind = get_args(kind)[0]
        if get_origin(kind) is tuple:
            keywords["multiple"] = True
        elif kind is bool:
            keywords["is_flag"] = True
        elif kind is Path:
            keywords["type"] = click.Path(path_type=Path)
        else:
            ranges: dict[Any, Any] = {int: click.IntRange, float: click.FloatRange}
            keywords["type"] = kind if self.min is None else ranges[kind](min=self.min)
        if default is inspect.Parameter.empty:
            keywords["required"] = True
        elif default is not None:
            keywords |= {"default": default, "show_default": default not in ("", ())}
        return self.parameter([name, *flags], **keywords)


class Argument(Option):
    """As :class:`Option`, for an argument without a flag."""

    parameter = click.Argument


def command(function: Callable[..., None]) -> click.Command:
    """``function`` as a click command: its annotated parameters are the options, its docstring is the help.

    click alone, because typer takes 0.4 s of CPU to parse or complete an option (it imports pydantic for that).
    """
    parameters = []
    for name, given in inspect.signature(function, eval_str=True).parameters.items():
        kind, option = get_args(given.annotation)
        parameters.append(option.declare(name, kind, given.default))
    return click.Command(function.__name__, callback=function, params=parameters, help=inspect.getdoc(function))


DataOption = Annotated[
    str | None,
    Option(help="digits, cifar10, cifar100, fashion-mnist, or the path of an image folder; by default digits."),
]
DataDir = Annotated[Path | None, Option(help="Where named data sets are stored or downloaded to.")]
Model = Annotated[str | None, Option(help="Any timm model; by default the recipe's.")]
RecipeFile = Annotated[Path | None, Option("--recipe", help="A TOML recipe; by default the one for the data.")]
Settings = Annotated[
    tuple[str, ...],
    Option(
        "--set",
        metavar="KEY=VALUE",
        help="A key of the recipe, VALUE as in TOML: milestones=[20,40], scheme_options.granularity=plane; repeatable.",
    ),
]
Jobs = Annotated[
    int,
    Option(min=1, help="Number of runs at once, each in its own process; on a CPU at most the number of cores."),
]
Ray = Annotated[
    str | None,
    Option(
        metavar="ADDRESS",
        help="Train on a Ray cluster: HOST:PORT, auto for the one that this machine belongs to, or local to start one.",
    ),
]
CoresPerRun = Annotated[int, Option(min=1, help="Cores of each run on the Ray cluster, as threads.")]
GpusPerRun = Annotated[
    float | None,
    Option(min=0, help="GPUs of each run on the Ray cluster, also a fraction; by default 1 if it has any."),
]
Size = Annotated[int, Option(help="Height and width of an image.")]
Epochs = Annotated[int | None, Option(help="Epochs of every run.")]
BatchSize = Annotated[int | None, Option("--batch-size", "-b", help="Images in a batch, over all processes together.")]
Rate = Annotated[float | None, Option(help="Learning rate of every run.")]
TrainImages = Annotated[int | None, Option(help="Train on a fixed random subset of this size.")]
TestImages = Annotated[int | None, Option(help="Test on a fixed random subset of this size.")]
Output = Annotated[Path | None, Option(help="Directory for the results; runs in an existing one are continued.")]
Resume = Annotated[
    Path | None,
    Option(metavar="DIRECTORY", help="Continue the runs planned in this directory, in the same MLflow run."),
]


def _switch_off_plugins(_: click.Context, __: click.Parameter, wanted: bool) -> None:
    if wanted:
        from bonn_qat import plugins

        os.environ["BONN_QAT_PLUGINS"] = ""
        plugins.manager.cache_clear()


NoPlugins = Annotated[
    bool,
    Option(
        "--no-plugins", callback=_switch_off_plugins, is_eager=True,
        help="Load no installed plugin; the environment variable BONN_QAT_PLUGINS names those to load.",
    ),
]  # fmt: skip


@functools.cache
def console() -> "Console":
    """The terminal. Under a launcher only rank 0 prints."""
    from rich.console import Console

    return Console(
        quiet=os.environ.get("RANK", "0") != "0",
        width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 120,  # rich takes 80 for a file or a pipe
    )


def scheme_of(spec: str) -> "Scheme":
    """The scheme with the options that ``spec`` names, such as ``xnor:input_scale=true``."""
    from bonn_qat.training.network import recipe_scheme
    from bonn_qat.training.recipe import Recipe

    return recipe_scheme(Recipe().with_scheme(spec))


def rate(text: str) -> float:
    """A learning rate. Raises InvalidRecipe if ``text`` is not a number."""
    try:
        return float(text)
    except ValueError as error:
        raise InvalidRecipe(f"{text!r} in --rates is not a number; write --rates 0.01,0.1") from error


def numbers(text: str, option: str) -> list[int]:
    """Comma-separated whole numbers. Raises BonnQatError naming ``option`` for anything else."""
    try:
        return [int(part) for part in parts(text)]
    except ValueError as error:
        raise BonnQatError(f"{text!r} is not a list of whole numbers; write {option} 1,4") from error


def parts(text: str) -> list[str]:
    """The comma-separated parts of ``text``, stripped of spaces; empty ones are dropped."""
    return [part.strip() for part in text.split(",") if part.strip()]
