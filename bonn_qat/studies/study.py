"""Study: a table or figure of a paper as data: its settings, their arms, and the paper's numbers for them."""

import importlib.resources
import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from bonn_qat.errors import InvalidRecipe, UnknownName
from bonn_qat.files.plain import shown
from bonn_qat.files.validate import read_as, read_toml
from bonn_qat.quantizers import number
from bonn_qat.studies import figures
from bonn_qat.training.recipe import Recipe

_T = TypeVar("_T")
FEWEST_TEST_IMAGES = 2000  # of a scaled study: their noise is 1 point then
_MOST_SEEDS, _LONGEST_NAME = 1000, 100  # runs of an arm; characters of a setting's name
_SHARED = ("model", "data", "train_images", "test_images", "validation_images")


@dataclass(frozen=True, kw_only=True)
class _Arm:
    """An arm in a study's file: ``scheme`` with options, ``recipe`` changes the setting's."""

    scheme: str = ""
    label: str = ""
    latents: Any = None
    recipe: Mapping[str, Any] = field(default_factory=dict)
    paper: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Setting:
    """A setting in a study's file: ``recipe`` changes the study's."""

    name: str = ""
    title: str = ""
    recipe: Mapping[str, Any] = field(default_factory=dict)
    arms: tuple[_Arm, ...] = ()


@dataclass(frozen=True, kw_only=True)
class _Study:
    """A study's file; ``recipe`` is the path of the recipe that all arms start from, relative to it."""

    recipe: Any = None
    title: str = ""
    source: str = ""
    note: str = ""
    seeds: int = 1
    chain: bool = False
    figures: tuple[Any, ...] = ()
    settings: tuple[_Setting, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StudyArm:
    """One row: a recipe and the paper's ``top1`` and ``top5`` for it in percent, if the paper has them."""

    label: str  # empty: the scheme's own title
    recipe: Recipe
    paper: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Arms with the same network and data: one comparison."""

    name: str  # also of its directory
    title: str
    arms: tuple[StudyArm, ...]


@dataclass(frozen=True, kw_only=True)
class Study:
    """A table or figure of a paper.

    With ``chain`` each arm is compared with the row above it. ``figures`` are names of
    ``bonn_qat.studies.figures.TITLES``.

    Raises InvalidRecipe for fewer than one seed, UnknownName for another figure.
    """

    name: str
    title: str
    source: str
    note: str
    seeds: int
    chain: bool
    figures: tuple[str, ...]
    settings: tuple[Setting, ...]

    def __post_init__(self) -> None:
        if not 1 <= self.seeds <= _MOST_SEEDS:
            raise InvalidRecipe(
                f"seeds of the study {self.name} is {self.seeds}; allowed: at least 1, at most {_MOST_SEEDS}"
            )
        for figure in self.figures:
            if figure not in figures.TITLES:
                raise UnknownName(f"figure of the study {self.name}", figure, figures.TITLES)

    def only(self, names: Sequence[str]) -> "Study":
        """The same study with only the named settings, or all if no name is given. Raises UnknownName."""
        known = {setting.name: setting for setting in self.settings}
        for name in names:
            if name not in known:
                raise UnknownName(f"setting of {self.name}", name, known)
        return replace(self, settings=tuple(s for s in self.settings if not names or s.name in names))


def names() -> list[str]:
    """The studies that come with the package."""
    files = (importlib.resources.files("bonn_qat.studies") / "tables").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in files if file.name.endswith(".toml"))


def load(name: str | Path) -> Study:
    """A study of the package by its name, or any by the path of its TOML file.

    >>> load("table3").seeds > 1
    True

    Raises UnknownName for a name that is neither, or a key that no study has; InvalidRecipe for impossible values.
    """
    name = str(name)
    if name.endswith(".toml"):
        return _read(Path(name).stem, Path(name))
    if name not in names():
        raise UnknownName("study", name, [*names(), "the path of a .toml file"])
    with importlib.resources.as_file(importlib.resources.files("bonn_qat.studies") / "tables") as folder:
        return _read(name, folder / f"{name}.toml")


def scaled(recipe: Recipe, scale: float, *, train_images: int, test_images: int) -> Recipe:
    """The recipe with ``scale`` times the work: epochs and training images are each multiplied by its square root.

    ``train_images`` and ``test_images`` are the sizes of the whole data; a recipe that takes a part of it is scaled
    from that part. At least 2,000 test images and validation images are kept, or all there are. Milestones move with
    the epochs. A scale of 1 changes nothing. Raises InvalidRecipe for a scale that is not above 0 and at most 1.
    """
    check_scale("scale", scale)
    if scale == 1:
        return recipe
    share = math.sqrt(scale)
    train, test = recipe.train_images or train_images, recipe.test_images or test_images
    held_out = _tested(share, recipe.validation_images)
    kept = _tested(share, test)
    return replace(
        recipe,
        epochs=max(1, round(share * recipe.epochs)),
        milestones=tuple(max(1, round(share * milestone)) for milestone in recipe.milestones),
        train_images=max(1, round(share * (train - recipe.validation_images))) + held_out,
        test_images=kept if kept < test else recipe.test_images,
        validation_images=held_out,
    )


def check_scale(name: str, scale: float) -> None:
    """Raise InvalidRecipe for a scale, called ``name``, that is not above 0 and at most 1."""
    if not 0 < scale <= 1:
        raise InvalidRecipe(f"the {name} is {scale:g}; allowed: above 0, at most 1 (all of the work)")


def _tested(share: float, images: int) -> int:
    return min(images, max(FEWEST_TEST_IMAGES, round(share * images)))


def _read(name: str, path: Path) -> Study:
    file = read_as(_Study, read_toml(path, "study"))
    if not isinstance(file.recipe, str):
        raise InvalidRecipe(
            f"the recipe of the study {path.name} is {file.recipe!r}; the path of a recipe beside it is needed"
        )
    base = Recipe.from_toml(path.parent / file.recipe).to_dict()
    settings = tuple(_setting(base, setting) for setting in _some("settings", file.settings))
    if twice := [name for name, count in Counter(setting.name for setting in settings).items() if count > 1]:
        raise InvalidRecipe(f"two settings of {path.name} are named {' and '.join(sorted(twice))}")
    return Study(
        name=name,
        title=file.title or name,
        source=file.source,
        note=file.note,
        seeds=file.seeds,
        chain=file.chain,
        figures=tuple(map(str, file.figures)),
        settings=settings,
    )


def _some(kind: str, entries: tuple[_T, ...]) -> tuple[_T, ...]:
    if not entries:
        raise InvalidRecipe(f"a study needs {kind}, an array of at least one table")
    return entries


def _setting(base: Mapping[str, Any], file: _Setting) -> Setting:
    if len(file.name) > _LONGEST_NAME or not re.fullmatch(r"\w[\w.,=+-]*", file.name):
        raise InvalidRecipe(
            f"a setting of a study has the name {shown(file.name)}; one that fits a directory is needed: "
            f"letters, digits, _.,=+-, at most {_LONGEST_NAME} of them"
        )
    arms = tuple(_arm({**base, **file.recipe}, arm) for arm in _some("arms", file.arms))
    check_distinct(file.name, [arm.recipe for arm in arms])
    return Setting(name=file.name, title=file.title or file.name, arms=arms)


def check_distinct(setting: str, recipes: Sequence[Recipe]) -> None:
    """Raise InvalidRecipe if two arms of the setting are the same run."""
    runs = [recipe.name for recipe in recipes]
    if len(set(runs)) < len(runs):
        twice = next(run for run in runs if runs.count(run) > 1)
        raise InvalidRecipe(
            f"two arms of the setting {setting!r} are both {twice!r}; arms of one setting differ in scheme, options or "
            "latents"
        )


def _arm(base: Mapping[str, Any], file: _Arm) -> StudyArm:
    scheme = file.scheme
    if not scheme:
        raise InvalidRecipe(f"an arm of a study has no scheme: {shown(file)}")
    for key in _SHARED:
        if key in file.recipe:
            raise InvalidRecipe(f"the arm {scheme!r} sets {key}; all arms of a setting share it")
    latents = {} if file.latents is None else {"latents": file.latents}
    recipe = Recipe.from_dict({**base, **file.recipe, **latents}).with_scheme(scheme)
    if recipe.scheme == "float":
        recipe = replace(recipe, latents="float")
    for key, value in file.paper.items():
        if key not in ("top1", "top5"):
            raise UnknownName("key of the paper's numbers", key, ("top1", "top5"))
        if not 0 <= number(value) <= 100:
            raise InvalidRecipe(f"the paper's {key} of the arm {scheme!r} is {value!r}; a number of percent is needed")
    return StudyArm(label=file.label, recipe=recipe, paper={key: float(value) for key, value in file.paper.items()})
