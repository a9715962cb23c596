"""Comparison: a results directory, with what was planned, what is finished and what failed."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from bonn_qat.errors import InvalidData
from bonn_qat.files import plain
from bonn_qat.files.atomic import expect, read_json, write_json
from bonn_qat.training.results import RUNS, RunResult, read_run

MANIFEST, PAGE = "comparison.json", "report.html"
_NAME, _LONGEST = re.compile(r"[\w.,=+-]+"), 240  # of a run, in bytes
_DATA: Mapping[str, Any] = {"name": str, "classes": int, "train": int, "test": int, "image": list[int]}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A comparison as it stands on disk: what was planned, what is finished, and what failed with which words.

    ``recipes`` are the planned runs' as data, by name. ``elsewhere`` names runs that another process was at when this
    one came to them; it is not written.
    """

    directory: Path
    data: Mapping[str, Any]  # name, classes, train, test (numbers of images), image (channels, height, width)
    planned: Sequence[str]  # names of runs, in the order of the table
    results: Sequence[RunResult]
    failures: Mapping[str, str] = field(default_factory=dict)
    recipes: Mapping[str, Any] = field(default_factory=dict)
    elsewhere: Sequence[str] = ()

    @property
    def missing(self) -> list[str]:
        """Planned runs that have neither a result nor a failure."""
        done = {result.name for result in self.results} | set(self.failures)
        return [name for name in self.planned if name not in done]


def write_manifest(comparison: Comparison) -> Path:
    """Write the plan and the failures of a comparison; its results are files of their own."""
    return write_json(
        comparison.directory / MANIFEST,
        {
            "data": comparison.data,
            "planned": comparison.planned,
            "failures": comparison.failures,
            "recipes": comparison.recipes,
        },
    )


def read_comparison(directory: Path) -> Comparison:
    """Read a comparison with the runs that are finished.

    Raises InvalidData if there is none in ``directory``, and for names of runs that are not those of files there.
    """
    path = directory / MANIFEST
    manifest = read_json(path)
    hints = get_type_hints(Comparison)
    # An earlier version wrote no recipes.
    kept = ["data", "planned", "failures", *(["recipes"] if "recipes" in manifest else [])]
    expect(path, "a comparison", manifest, {key: hints[key] for key in kept})
    expect(path, "a comparison", {key: manifest["data"].get(key) for key in _DATA}, _DATA)
    if len(manifest["data"]["image"]) != 3 or manifest["data"]["test"] < 1:
        raise InvalidData(f"{path} is not a comparison: its data are {plain.shown(manifest['data'])}")
    # Names of runs become names of files.
    for name, count in Counter(manifest["planned"]).items():
        if count > 1 or len(name.encode()) > _LONGEST or not _NAME.fullmatch(name) or not name.strip("."):
            raise InvalidData(f"{path} is not a comparison: it plans a run {plain.shown(name)}, or two of it")
    paths = [directory / RUNS / f"{name}.json" for name in manifest["planned"]]
    results = [read_run(path) for path in paths if path.exists()]
    return Comparison(directory=directory, results=results, **manifest)
