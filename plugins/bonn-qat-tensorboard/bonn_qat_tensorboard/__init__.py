"""The TensorBoard observer: events in ``tensorboard/NAME``, below the comparison's or the working directory."""

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bonn_qat import hookimpl
from bonn_qat.training.recipe import Recipe


class TensorBoardObserver:
    """Keeps the writers of the runs under way. TensorBoard is imported by the first run."""

    def __init__(self) -> None:
        self._comparisons: list[Path] = []  # the outermost first
        self._writers: dict[str, Any] = {}  # by the run's name
        self._warned = False

    @hookimpl
    def bonn_qat_before_comparison(self, directory: Path) -> None:
        self._comparisons.append(directory)

    @hookimpl
    def bonn_qat_after_comparison(self, directory: Path) -> None:
        del self._comparisons[self._comparisons.index(directory) :]

    @hookimpl
    def bonn_qat_before_run(self, recipe: Recipe) -> None:
        """Begin without events: for a resumed run the hook below is called again for each earlier epoch."""
        folder = (self._comparisons[-1] if self._comparisons else Path()) / "tensorboard" / recipe.name

        def begin() -> None:
            from torch.utils.tensorboard import SummaryWriter

            for file in folder.glob("events.out.tfevents.*"):
                file.unlink()
            self._writers[recipe.name] = SummaryWriter(str(folder))

        self._try(begin)

    @hookimpl
    def bonn_qat_after_epoch(self, recipe: Recipe, epoch: int, metrics: Mapping[str, float], time: float) -> None:
        """Add a point to each curve, at the time at which the epoch ended."""
        self._try(lambda: [self._writers[recipe.name].add_scalar(*item, epoch, time) for item in metrics.items()])
        self._try(lambda: self._writers[recipe.name].flush())

    @hookimpl
    def bonn_qat_after_run(self, recipe: Recipe) -> None:
        self._try(lambda: self._writers.pop(recipe.name).close())

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:
            if not self._warned:
                self._warned = True
                warnings.warn(f"TensorBoard: {error}; the training continues", RuntimeWarning, stacklevel=3)


OBSERVER = TensorBoardObserver()
