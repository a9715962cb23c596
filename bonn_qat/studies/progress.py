"""Progress: one line for each epoch, in a terminal and in a log alike."""

import sys
import time as clock
from collections.abc import Mapping
from datetime import timedelta
from typing import final

from bonn_qat.files.plain import printable
from bonn_qat.hookspecs import hookimpl
from bonn_qat.training.recipe import Recipe


@final
class EpochLines:
    """An observer that writes a line to stdout after each epoch.

    ``left`` is the time that the run still needs, by the epochs that were trained since it started or resumed. Epochs
    from before it resumed are not written again.

    >>> lines = EpochLines()
    >>> lines.bonn_qat_before_run(Recipe(epochs=24))
    >>> metrics = {"train/loss": 1.234, "train/top1": 56.1, "test/top1": 55.0, "lr": 0.12}
    >>> lines.bonn_qat_after_epoch(Recipe(epochs=24), 3, metrics, clock.time() + 60)
    bonn-scheme-seed0  epoch 3/24  loss 1.234  train 56.1 %  test 55.0 %  lr 0.12  left 0:21:00
    """

    def __init__(self) -> None:
        self._began: dict[str, float] = {}
        self._told: dict[str, int] = {}

    @hookimpl
    def bonn_qat_before_run(self, recipe: Recipe) -> None:
        """Start the clock of the run."""
        self._began[recipe.name], self._told[recipe.name] = clock.time(), 0

    @hookimpl
    def bonn_qat_after_epoch(self, recipe: Recipe, epoch: int, metrics: Mapping[str, float], time: float) -> None:
        """Write the line, unless the epoch ended before the run resumed."""
        began = self._began[recipe.name]
        if time < began:
            return
        self._told[recipe.name] += 1
        left = (time - began) / self._told[recipe.name] * (recipe.epochs - epoch)
        line = (
            f"{recipe.name}  epoch {epoch}/{recipe.epochs}  loss {metrics['train/loss']:.3f}  "
            f"train {metrics['train/top1']:.1f} %  test {metrics['test/top1']:.1f} %  lr {metrics['lr']:.3g}  "
            f"left {timedelta(seconds=round(left))}"
        )
        sys.stdout.write(printable(line) + "\n")  # in one piece, for several processes may share it
        sys.stdout.flush()
