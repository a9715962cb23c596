"""Comparison: a results directory, with what was planned, what is finished and what failed."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from bonn_qat.files.atomic import read_json, write_json
from bonn_qat.files.plain import shown
from bonn_qat.files.validate import Allowed, read_own
from bonn_qat.tables import as_html
from bonn_qat.training.results import RUNS, RunResult, read_run

MANIFEST, PAGE = "comparison.json", "report.html"
_NAME, _LONGEST = re.compile(r"[\w.,=+-]+"), 240  # of a run, in bytes


@dataclass(frozen=True, kw_only=True)
class _Data:
    """The data as the manifest describes them: numbers of images, and ``image`` ``[C, H, W]``."""

    name: str
    classes: int
    train: int
    test: Annotated[int, Allowed("at least 1", lambda n: n >= 1)]
    image: Annotated[Sequence[int], Allowed("[C, H, W]", lambda size: len(size) == 3)]


def _check_names(name: str, runs: Sequence[str]) -> str | None:
    """Names of runs become names of files."""
    for run, count in Counter(runs).items():
        if count > 1 or len(run.encode()) > _LONGEST or not _NAME.fullmatch(run) or not run.strip("."):
            return f"it plans the run {shown(run)} twice, or under a name that no file can have"
    return None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The content of a comparison's manifest.

    ``data`` describes the data: name, classes, train, test (numbers of images), image (channels, height, width), and
    ``fingerprint`` is their hash; comparisons of earlier versions have none.
    ``planned`` has the names of runs in the order of the table, ``failures`` the error of each run that failed,
    ``recipes`` the planned runs' recipes by name; comparisons of earlier versions have none.
    """

    data: Mapping[str, Any]
    planned: Annotated[Sequence[str], _check_names]
    failures: Mapping[str, str] = field(default_factory=dict)
    recipes: Mapping[str, Any] = field(default_factory=dict)
    fingerprint: str = ""


@dataclass(frozen=True, kw_only=True)
class Comparison(Manifest):
    """A comparison on disk: its manifest, and the results of the runs that are finished.

    ``elsewhere`` names the runs that another process was training; it is not written.
    """

    directory: Path
    results: Sequence[RunResult]
    elsewhere: Sequence[str] = ()

    @property
    def missing(self) -> list[str]:
        """Planned runs that have neither a result nor a failure."""
        done = {result.name for result in self.results} | set(self.failures)
        return [name for name in self.planned if name not in done]

    def _repr_html_(self) -> str:
        from bonn_qat.studies import report, statistics

        unfinished = [f"failed: {name}: {why}" for name, why in self.failures.items()]
        unfinished += [f"missing: {name}" for name in self.missing]
        return as_html(report.results(self), *map(str, statistics.differences(self)), *unfinished)


def write_manifest(comparison: Comparison) -> Path:
    """Write the plan and the failures of a comparison; its results are files of their own."""
    content = {f.name: getattr(comparison, f.name) for f in fields(Manifest)}
    return write_json(comparison.directory / MANIFEST, content)


def read_comparison(directory: str | Path) -> Comparison:
    """Read a comparison with the runs that are finished.

    Raises InvalidData if there is none in ``directory``, and for names of runs that cannot be names of files.
    """
    directory = Path(directory)
    path = directory / MANIFEST
    manifest = read_own(Manifest, read_json(path), f"{path} is not a comparison")
    read_own(_Data, manifest.data, f"{path} is not a comparison: its data are {shown(manifest.data)}")
    paths = [directory / RUNS / f"{name}.json" for name in manifest.planned]
    results = [read_run(path) for path in paths if path.exists()]
    return Comparison(directory=directory, results=results, **vars(manifest))
