"""Results: what a training run and a comparison leave on disk, as frozen data that is written whole or not at all."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from bonn_qat.errors import InvalidData
from bonn_qat.files import write_whole

FORMAT = 1
RUNS, MANIFEST, PAGE = "runs", "comparison.json", "report.html"


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One finished training run.

    ``epochs`` has one mapping per epoch, counted from 1 in ``epoch``: ``lr``, ``stage``, ``train/loss``,
    ``train/task``, ``train/NAME`` of each regularizer (weighted), ``train/top1`` and ``test/top1`` in percent,
    ``test/loss``, ``scale/LAYER``, the mean ``|scale|`` of a layer's binary weights, ``flips`` and ``flips/LAYER``,
    the share (0 to 1) of all binary weights, or of a layer's, whose sign at the epoch's end is another one.
    ``size`` holds ``parameters``, ``mbit``, ``float_mbit``, ``compression``, ``macs``, ``binary_macs``.
    ``histograms`` maps layer -> epoch (as text; "0" is the start) -> ``edges`` (n + 1) and ``counts`` (n) of
    its latent weights.
    """

    name: str
    scheme: str  # with its options, such as "xnor" or "xnor:gradient=plain"
    title: str
    bits: str  # weights/activations, such as "1/1"
    latents: str  # the start of the latent weights: "0.01" (standard deviation) or "float" (as the float network's)
    seed: int
    recipe: Mapping[str, Any]
    environment: Mapping[str, str]
    seconds: float
    epochs: Sequence[Mapping[str, float]]
    size: Mapping[str, float]
    histograms: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]] = field(default_factory=dict)

    @property
    def top1(self) -> float:
        """Test accuracy after the last epoch, in percent; no epoch is chosen by looking at the test set."""
        return self.epochs[-1]["test/top1"]

    @property
    def arm(self) -> tuple[str, str]:
        """What runs of different seeds share: scheme and start of the latent weights."""
        return self.scheme, self.latents


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


def write_run(directory: Path, result: RunResult) -> Path:
    """Write ``runs/NAME.json`` below ``directory``."""
    return write_json(directory / RUNS / f"{result.name}.json", asdict(result))


def read_run(path: Path) -> RunResult:
    """Read what :func:`write_run` wrote. Raises InvalidData naming the file and what is wrong with it."""
    content = read_json(path)
    known = {f.name for f in fields(RunResult)}
    if set(content) != known:
        raise InvalidData(f"{path} is not a run's result: its keys differ in {sorted(set(content) ^ known)}")
    return RunResult(**content)


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
    """Read a comparison with the runs that are finished. Raises InvalidData if there is none in ``directory``."""
    manifest = read_json(directory / MANIFEST)
    paths = [directory / RUNS / f"{name}.json" for name in manifest["planned"]]
    results = [read_run(path) for path in paths if path.exists()]
    return Comparison(directory=directory, results=results, **manifest)


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a file that is there whole or not at all, also when the disk is full."""
    return write_text(path, json.dumps({"format": FORMAT, **content}, indent=1))


def write_text(path: Path, text: str) -> Path:
    """Write text to a file that is there whole or not at all."""
    return write_whole(path, text.encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a table that :func:`write_json` wrote, without its ``format``. Raises InvalidData naming the file."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidData(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InvalidData(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise InvalidData(f"{path} is not of format {FORMAT}, the one that this version of bonn-qat reads")
    return content
