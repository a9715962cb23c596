"""Results: what one training run leaves on disk, as frozen data."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_type_hints

from bonn_qat.errors import InvalidData
from bonn_qat.files import plain
from bonn_qat.files.atomic import expect, read_json, write_json

RUNS = "runs"
_EPOCH = re.compile(r"0|[1-9][0-9]{0,8}")
_LATEST = 1e11  # seconds since 1970
_SIZES = {"parameters", "mbit", "float_mbit", "compression", "macs", "binary_macs"}


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
    ``run_id`` is the run's own, the one that observers are told. ``started`` and ``times`` are when the run began and
    when each of its epochs ended, in seconds since 1970. An earlier version wrote none of the three.
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
    run_id: str = ""
    started: float = 0.0
    times: Sequence[float] = field(default_factory=list)

    @property
    def top1(self) -> float:
        """Test accuracy after the last epoch, in percent; no epoch is chosen by looking at the test set."""
        return self.epochs[-1]["test/top1"]

    @property
    def arm(self) -> tuple[str, str]:
        """What runs of different seeds share: scheme and start of the latent weights."""
        return self.scheme, self.latents


def write_run(directory: Path, result: RunResult) -> Path:
    """Write ``runs/NAME.json`` below ``directory``."""
    return write_json(directory / RUNS / f"{result.name}.json", asdict(result))


def read_run(path: Path) -> RunResult:
    """Read what :func:`write_run` wrote. Raises InvalidData naming the file and what is wrong with it."""
    content = {"run_id": "", "started": 0.0, "times": [], **read_json(path)}
    expect(path, "a run's result", content, get_type_hints(RunResult))
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
    times = content["times"]
    if len(times) not in (0, len(content["epochs"])) or not all(0 <= t < _LATEST for t in (*times, content["started"])):
        return f"its times are not one per epoch, in seconds since 1970: {plain.shown(times)}"
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
