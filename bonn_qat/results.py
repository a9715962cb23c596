"""Results: what a training run and a comparison leave on disk, as frozen data that is written whole or not at all."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from bonn_qat import plain
from bonn_qat.errors import InvalidData
from bonn_qat.files import write_whole

FORMAT = 1
RUNS, MANIFEST, PAGE = "runs", "comparison.json", "report.html"
_LARGEST = 2**26  # bytes of a file
_NAME, _LONGEST = re.compile(r"[\w.,=+-]+"), 240  # of a run, in bytes
_EPOCH = re.compile(r"0|[1-9][0-9]{0,8}")
_SIZES = {"parameters", "mbit", "float_mbit", "compression", "macs", "binary_macs"}
_DATA: Mapping[str, Any] = {"name": str, "classes": int, "train": int, "test": int, "image": list[int]}


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
    _expect(path, "a run's result", content, get_type_hints(RunResult))
    if said := _odd(content, path.stem):
        raise InvalidData(f"{path} is not a run's result: {said}")
    return RunResult(**content)


def _odd(content: Mapping[str, Any], name: str) -> str | None:
    """What no run leaves, and no report could be made of; None if there is nothing."""
    if content["name"] != name:
        return f"its name is {plain.shown(content['name'])}"
    for key in ("scheme", "title", "bits", "latents"):
        if not content[key].isprintable():
            return f"{key} is {plain.shown(content[key])}"
    for place, metrics in enumerate(content["epochs"]):
        if not 1 <= metrics.get("epoch", 0) < 2**31 or not 0 <= metrics.get("test/top1", -1) <= 100:
            return f"epochs.{place} has no number of an epoch, or no test/top1 in percent"
    if missing := sorted(_SIZES - content["size"].keys()):
        return f"its size lacks {missing[0]}"
    for layer, kept in content["histograms"].items():
        for epoch, histogram in kept.items():
            if not _EPOCH.fullmatch(epoch) or not _is_histogram(histogram):
                return f"histograms.{plain.shown(layer)[1:-1]} has no histogram for {plain.shown(epoch)}"
    return None


def _is_histogram(found: Mapping[str, Sequence[float]]) -> bool:
    if found.keys() != {"edges", "counts"}:
        return False
    edges, counts = list(found["edges"]), found["counts"]
    is_within = all(abs(number) < 1e30 for number in (*edges, *counts))
    return is_within and len(edges) == len(counts) + 1 > 1 and edges == sorted(edges) and min(counts) >= 0


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
    _expect(path, "a comparison", manifest, {key: hints[key] for key in kept})
    _expect(path, "a comparison", {key: manifest["data"].get(key) for key in _DATA}, _DATA)
    if len(manifest["data"]["image"]) != 3 or manifest["data"]["test"] < 1:
        raise InvalidData(f"{path} is not a comparison: its data are {plain.shown(manifest['data'])}")
    # Names of runs become names of files.
    for name, count in Counter(manifest["planned"]).items():
        if count > 1 or len(name.encode()) > _LONGEST or not _NAME.fullmatch(name) or not name.strip("."):
            raise InvalidData(f"{path} is not a comparison: it plans a run {plain.shown(name)}, or two of it")
    paths = [directory / RUNS / f"{name}.json" for name in manifest["planned"]]
    results = [read_run(path) for path in paths if path.exists()]
    return Comparison(directory=directory, results=results, **manifest)


def _expect(path: Path, kind: str, content: Mapping[str, Any], hints: Mapping[str, Any]) -> None:
    if odd := sorted(content.keys() ^ hints.keys()):
        raise InvalidData(f"{path} is not {kind}: its keys differ in {plain.shown(odd)}")
    for key, hint in hints.items():
        if said := plain.misfit(key, content[key], hint):
            raise InvalidData(f"{path} is not {kind}: {said}")


def write_json(path: Path, content: Mapping[str, Any]) -> Path:
    """Write a file that is there whole or not at all, also when the disk is full."""
    return write_text(path, json.dumps({"format": FORMAT, **content}, indent=1, ensure_ascii=False))


def write_text(path: Path, text: str) -> Path:
    """Write text to a file that is there whole or not at all; half a character becomes a question mark."""
    return write_whole(path, text.encode(errors="replace"))


def read_json(path: Path) -> dict[str, Any]:
    """Read a table that :func:`write_json` wrote, without its ``format``. Raises InvalidData naming the file."""
    try:
        content = plain.from_json(plain.read_text(path, _LARGEST))
    except OSError as error:
        raise InvalidData(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise InvalidData(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise InvalidData(f"{path} is not of format {FORMAT}, the one that this version of bonn-qat reads")
    return content
