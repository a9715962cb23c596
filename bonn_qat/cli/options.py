"""Commands from annotated functions, the options that several of them share, and values parsed from text."""

import functools
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin

import click

from bonn_qat.errors import BonnQatError, InvalidRecipe

if TYPE_CHECKING:
    from rich.console import Console

    from bonn_qat.scheme import Scheme
    from bonn_qat.studies.on_ray import RayCluster
    from bonn_qat.training.recipe import Recipe


IMAGE = 224  # pixels along an edge, where nothing else says


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
            keywords |= {"nargs": -1} if self.parameter is click.Argument else {"multiple": True}
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

    A parameter whose type is a dataclass stands for the options that are the fields of that.

    click alone, because typer takes 0.4 s of CPU to parse or complete an option (it imports pydantic for that).
    """
    groups: dict[str, tuple[Callable[..., Any], list[str]]] = {}

    def declared(of: Callable[..., Any]) -> Iterator[click.Parameter]:
        for name, given in inspect.signature(of, eval_str=True).parameters.items():
            kind = given.annotation
            if isinstance(kind, type) and is_dataclass(kind):
                group = list(declared(kind))
                groups[name] = kind, [str(option.name) for option in group]
                yield from group
            else:
                kind, option = get_args(kind)
                yield option.declare(name, kind, given.default)

    def called(**values: Any) -> None:
        grouped = {name: cls(**{key: values.pop(key) for key in keys}) for name, (cls, keys) in groups.items()}
        function(**values, **grouped)

    parameters = list(declared(function))
    return click.Command(function.__name__, callback=called, params=parameters, help=inspect.getdoc(function))


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
DataDir = Annotated[Path | None, Option(help="Where named data sets are stored or downloaded to.")]
Settings = Annotated[
    tuple[str, ...],
    Option(
        "--set",
        metavar="KEY=VALUE",
        help="A key of the recipe, VALUE as in TOML: milestones=[20,40], scheme_options.granularity=plane; repeatable.",
    ),
]
Size = Annotated[int, Option(help="Height and width of an image.")]


@dataclass(frozen=True, kw_only=True)
class Workers:
    """Options for training several runs at once."""

    jobs: Annotated[
        int,
        Option(min=1, help="Number of runs at once, each in its own process; on a CPU at most the number of cores."),
    ] = 1
    ray: Annotated[
        str | None,
        Option(
            metavar="ADDRESS",
            help="Train on a Ray cluster: HOST:PORT, auto for the one that this machine belongs to, or local to start "
            "one.",
        ),
    ] = None
    cores_per_run: Annotated[int, Option(min=1, help="Cores of each run on the Ray cluster, as threads.")] = 1
    gpus_per_run: Annotated[
        float | None,
        Option(min=0, help="GPUs of each run on the Ray cluster, also a fraction; by default 1 if it has any."),
    ] = None

    def cluster(self) -> "RayCluster | None":
        """The cluster that ``--ray`` names, if any. Raises InvalidRecipe for options of a cluster without it."""
        from bonn_qat.studies.on_ray import RayCluster

        if self.ray is not None:
            return RayCluster(address=self.ray, cores=self.cores_per_run, gpus=self.gpus_per_run)
        if self.cores_per_run != 1 or self.gpus_per_run is not None:
            raise InvalidRecipe("--cores-per-run and --gpus-per-run are for --ray; add it, or leave them out")
        return None


_KEYS = ("data", "model", "epochs", "batch_size", "lr", "train_images", "test_images")


@dataclass(frozen=True, kw_only=True)
class Runs:
    """Options of the commands that train by a recipe; those that are None leave the recipe's key as it is."""

    data: Annotated[
        str | None,
        Option(help="digits, cifar10, cifar100, fashion-mnist, or the path of an image folder; by default digits."),
    ] = None
    model: Annotated[str | None, Option(help="Any timm model; by default the recipe's.")] = None
    epochs: Annotated[int | None, Option(help="Epochs of every run.")] = None
    batch_size: Annotated[
        int | None, Option("--batch-size", "-b", help="Images in a batch, over all processes together.")
    ] = None
    lr: Annotated[float | None, Option(help="Learning rate of every run.")] = None
    train_images: Annotated[int | None, Option(help="Train on a fixed random subset of this size.")] = None
    test_images: Annotated[int | None, Option(help="Test on a fixed random subset of this size.")] = None
    recipe: Annotated[Path | None, Option("--recipe", help="A TOML recipe; by default the one for the data.")] = None
    settings: Settings = ()
    data_dir: DataDir = None
    img_size: Annotated[
        int | None, Option(help="Height and width of an image of a folder; by default as in the directory, or 224.")
    ] = None
    output: Annotated[Path | None, Option(help="Directory for the results; runs in an existing one are continued.")] = (
        None
    )
    resume: Annotated[
        Path | None,
        Option(metavar="DIRECTORY", help="Continue the runs planned in this directory, in the same MLflow run."),
    ] = None
    no_plugins: NoPlugins = False

    def base(self, own: Mapping[str, str]) -> tuple["Recipe", set[str]]:
        """The recipe that all runs share, and the keys that its file sets.

        ``own`` maps the keys that each run has for itself to the command's option for them.
        """
        from bonn_qat.files.validate import read_toml
        from bonn_qat.training.recipe import Recipe
        from bonn_qat.training.settings import with_settings

        content = read_toml(self.recipe, "recipe") if self.recipe else {}
        base = Recipe.from_dict(content) if self.recipe else Recipe.default(self.data or "digits")
        given = {key: value for key in _KEYS if (value := getattr(self, key)) is not None}
        for setting in self.settings:
            key = setting.partition("=")[0].strip()
            if key in own:
                raise InvalidRecipe(f"{setting} cannot be set; use {own[key]}")
            if key in given:
                raise InvalidRecipe(
                    f"--{key.replace('_', '-')} and --set {setting} contradict each other; leave one out"
                )
        return with_settings(replace(base, **given), self.settings), set(content)


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
