"""The CSV observer: a file for each run, with a row for each epoch.

The file is ``runs/NAME.csv`` in the directory of the comparison, or ``NAME.csv`` in the working directory for a run
outside one. It is written anew after each epoch, atomically, so a reader never sees half a row.
"""

import csv
import io
import warnings
from collections.abc import Mapping
from pathlib import Path

from bonn_qat import hookimpl
from bonn_qat.files.atomic import write_text
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.results import RUNS


class CsvObserver:
    """Keeps the rows of the runs under way."""

    def __init__(self) -> None:
        self._comparisons: list[Path] = []  # the outermost first
        self._rows: dict[str, list[dict[str, float]]] = {}  # by the run's name
        self._warned = False

    @hookimpl
    def bonn_qat_before_comparison(self, directory: Path) -> None:
        """Write into the comparison's directory from now on."""
        self._comparisons.append(directory)

    @hookimpl
    def bonn_qat_after_comparison(self, directory: Path) -> None:
        """Write again where was written before."""
        del self._comparisons[self._comparisons.index(directory) :]

    @hookimpl
    def bonn_qat_before_run(self, recipe: Recipe) -> None:
        """Begin without rows: for a resumed run the hook below is called again for each earlier epoch."""
        self._rows[recipe.name] = []

    @hookimpl
    def bonn_qat_after_epoch(self, recipe: Recipe, metrics: Mapping[str, float], time: float) -> None:
        """Add a row. A column may come in a later stage; it is empty in the rows before."""
        rows = self._rows[recipe.name]
        rows.append({"time": time, **metrics})
        text = io.StringIO()
        table = csv.DictWriter(text, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
        table.writeheader()
        table.writerows(rows)
        name = f"{recipe.name}.csv"
        try:
            write_text(self._comparisons[-1] / RUNS / name if self._comparisons else Path(name), text.getvalue())
        except OSError as error:
            if not self._warned:
                self._warned = True
                warnings.warn(f"cannot write {name} ({error}); the training continues", RuntimeWarning, stacklevel=2)


OBSERVER = CsvObserver()
