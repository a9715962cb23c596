"""The hooks that a plugin can implement, each marked with ``bonn_qat.hookimpl``; see docs/plugins.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import pluggy
from torch import nn

if TYPE_CHECKING:
    from bonn_qat.regularizers import Regularizer
    from bonn_qat.scheme import Scheme

PROJECT = "bonn_qat"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class RunRecipe(Protocol):
    """What an observer can read of a run's :class:`bonn_qat.Recipe`: every field of it, its name, and it as data."""

    @property
    def name(self) -> str:
        """The name of the run, unique within a comparison."""

    def to_dict(self) -> dict[str, Any]:
        """The recipe as JSON has it."""


@hookspec
def bonn_qat_schemes() -> Iterable[Scheme]:  # type: ignore[empty-body]
    """Offer schemes; each is chosen by its ``name``."""


@hookspec
def bonn_qat_regularizers() -> Iterable[type[Regularizer]]:  # type: ignore[empty-body]
    """Offer regularizer classes; each is chosen by its ``name``."""


@dataclass(frozen=True)
class Pretrained:
    """A trained network: ``weights`` is its file from :func:`bonn_qat.save`, ``packed`` the same network packed.

    ``name`` is timm's: the architecture, a dot, and a tag that says how and on what data it was trained.

    >>> Pretrained("wrn22_16.bonn_cifar10", Path("wrn22_16.bonn_cifar10.safetensors")).name
    'wrn22_16.bonn_cifar10'
    """

    name: str
    weights: Path
    packed: Path | None = None


@hookspec
def bonn_qat_pretrained() -> Iterable[Pretrained]:  # type: ignore[empty-body]
    """Offer trained networks; each is chosen by its ``name``."""


@hookspec(firstresult=True)
def bonn_qat_binarize_layer(
    scheme: Scheme, name: str, layer: nn.Module, parent: nn.Module, channels: int
) -> nn.Module | None:
    """Return the module that replaces ``layer``, or None to leave it to the next plugin and the built-in rule.

    Called once for each module that the policy does not keep float, a block before its children. Unless the answer is
    a ``BinaryLayer``, its children come next. For a ``layer`` without weights ``channels`` are those of what it reads,
    ``(B, channels, ...)``; 1 where they are unknown or differ from call to call.
    """


# The timeline hooks report what happens to observers and ignore what they return. They are called one at a time, in the
# training's own thread, so the training waits for them. An exception in an observer becomes a warning.


@hookspec
def bonn_qat_before_comparison(directory: Path, recipes: Sequence[RunRecipe]) -> None:
    """A comparison is about to begin; ``directory`` exists and no run of this call has started.

    A study is a comparison of comparisons: the hook is called for the study's directory, without recipes, and then for
    each comparison in it. With several jobs every process of the comparison makes this call.
    """


@hookspec
def bonn_qat_describe(directory: Path) -> str | None:
    """Return one line that says where the observer writes to, for a command to print before a comparison begins.

    Called before anything is opened or written. Leave out passwords and tokens.
    """


@hookspec
def bonn_qat_before_run(recipe: RunRecipe, model: nn.Module, run_id: str) -> None:
    """A training run starts, or resumes from its checkpoint; ``model`` is binarized and on its device.

    A resumed run has the same ``run_id`` as before, and ``bonn_qat_after_epoch`` is called again for each epoch that it
    finished earlier, with the same metrics and the same time.
    """


@hookspec
def bonn_qat_after_epoch(recipe: RunRecipe, epoch: int, metrics: Mapping[str, float], time: float) -> None:
    """An epoch (counted from 1) ended at ``time``, in seconds since 1970.

    The metrics have names like ``train/loss``, ``test/top1`` and ``scale/LAYER``, see
    :class:`bonn_qat.training.results.RunResult`.
    """


@hookspec
def bonn_qat_after_run(recipe: RunRecipe, result: Mapping[str, Any] | None) -> None:
    """A run ended; ``result`` is the content of its results file, or None if the run failed or was interrupted.

    In a comparison the results file and the weights are written right after this call.
    """


@hookspec
def bonn_qat_after_comparison(directory: Path, page: Path) -> None:
    """A comparison ended, completely or not; everything in ``directory`` and its report ``page`` are written."""
