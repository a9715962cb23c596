"""The hooks that a plugin can implement, each marked with ``bonn_qat.hookimpl``; see docs/plugins.md."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pluggy
from torch import nn

if TYPE_CHECKING:
    from bonn_qat.regularizers import Regularizer
    from bonn_qat.scheme import Scheme
    from bonn_qat.training.recipe import Recipe

PROJECT = "bonn_qat"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def bonn_qat_schemes() -> Iterable[Scheme]:  # type: ignore[empty-body]
    """Offer schemes; each is chosen by its ``name``."""


@hookspec
def bonn_qat_regularizers() -> Iterable[type[Regularizer]]:  # type: ignore[empty-body]
    """Offer regularizer classes; each is chosen by its ``name``."""


@hookspec(firstresult=True)
def bonn_qat_binarize_layer(scheme: Scheme, name: str, layer: nn.Module, parent: nn.Module) -> nn.Module | None:
    """Return the module that replaces ``layer``, or None to leave it to the next plugin and the built-in rule.

    Called once for each module that the policy does not keep float, a block before its children. Unless the answer is
    a ``BinaryLayer``, its children come next.
    """


@hookspec
def bonn_qat_before_comparison(directory: Path, recipes: list[Recipe]) -> None:
    """A comparison begins: its directory exists, no run has started."""


@hookspec
def bonn_qat_describe(directory: Path) -> str | None:
    """One line that a command prints before a comparison in ``directory`` begins: where an observer writes to.

    Nothing is opened for it, and no secret is in it.
    """


@hookspec
def bonn_qat_before_run(recipe: Recipe, model: nn.Module, run_id: str) -> None:
    """A training run begins, or goes on from its checkpoint; ``model`` is binarized and on its device.

    ``run_id`` is the run's own, the same each time that it goes on; the epochs that are done are told again.
    With several jobs this and the next two are called in the process that compares, for several runs in turns, each
    run's own in order; ``model`` is then a copy from before the training, on the CPU.
    """


@hookspec
def bonn_qat_after_epoch(recipe: Recipe, epoch: int, metrics: Mapping[str, float]) -> None:
    """An epoch (counted from 1) ended; metric names are like ``train/loss``, ``test/top1``, ``scale/NAME``."""


@hookspec
def bonn_qat_after_run(recipe: Recipe, result: Mapping[str, Any] | None) -> None:
    """A run ended; ``result`` is what its results file holds, or None if it failed or was interrupted."""


@hookspec
def bonn_qat_after_comparison(directory: Path, page: Path) -> None:
    """A comparison ended, finished or not; ``page`` is its page, ``directory`` holds everything else."""
