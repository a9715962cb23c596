"""Results: what a finished training run writes to disk, as frozen data."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

from bonn_qat.errors import InvalidData
from bonn_qat.files import plain
from bonn_qat.files.atomic import read_json, write_json
from bonn_qat.files.validate import Allowed, Line, read_own

RUNS = "runs"
_EPOCH = re.compile(r"0|[1-9][0-9]{0,8}")
SIZES = ("parameters", "mbit", "float_mbit", "compression", "macs", "binary_macs")


def _check_epochs(name: str, epochs: Sequence[Mapping[str, float]]) -> str | None:
    for place, metrics in enumerate(epochs):
        if not 1 <= metrics.get("epoch", 0) < 2**31 or not 0 <= metrics.get("test/top1", -1) <= 100:
            return f"{name}.{place} lacks an epoch number, or a test/top1 in percent"
    return None


def _check_size(name: str, size: Mapping[str, float]) -> str | None:
    missing = [key for key in SIZES if key not in size]
    return f"its {name} lacks {missing[0]}" if missing else None


def check_histograms(name: str, layers: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]]) -> str | None:
    """What is wrong with the histograms of a :class:`RunResult`; None if they are valid."""
    for layer, kept in layers.items():
        for epoch, histogram in kept.items():
            if not _EPOCH.fullmatch(epoch) or not _is_histogram(histogram):
                return f"{name}.{plain.shown(layer)[1:-1]} has no histogram for {plain.shown(epoch)}"
    return None


def _is_histogram(found: Mapping[str, Sequence[float]]) -> bool:
    if found.keys() != {"edges", "counts"}:
        return False
    edges, counts = list(found["edges"]), found["counts"]
    is_bounded = all(abs(number) < 1e30 for number in (*edges, *counts))
    return is_bounded and len(edges) == len(counts) + 1 > 1 and edges == sorted(edges) and min(counts) >= 0


Times = Annotated[Sequence[float], Allowed("seconds since 1970", lambda times: all(0 <= t < 1e11 for t in times))]
Time = Annotated[float, Allowed("seconds since 1970", lambda time: 0 <= time < 1e11)]
Sizes = Annotated[Mapping[str, float], _check_size]
Epochs = Annotated[Sequence[Mapping[str, float]], _check_epochs]
Histograms = Annotated[Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]], check_histograms]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One finished training run.

    ``epochs`` has one mapping per epoch, counted from 1 in ``epoch``: ``lr``, ``stage``, ``train/loss``,
    ``train/task``, ``train/NAME`` of each regularizer (weighted), ``train/top1`` and ``test/top1`` in percent,
    ``test/loss``, ``scale/LAYER``, the mean ``|scale|`` of a layer's binary weights, ``flips`` and ``flips/LAYER``,
    the share (0 to 1) of binary weights, of all layers or one, whose sign changed during the epoch.
    ``size`` holds ``parameters``, ``mbit``, ``float_mbit``, ``compression``, ``macs``, ``binary_macs``.
    ``histograms`` maps layer -> epoch (as text; "0" is the start) -> ``edges`` (n + 1) and ``counts`` (n) of
    its latent weights.
    ``run_id`` identifies the run, also to observers. ``started`` and ``times`` are when the run began and
    when each of its epochs ended, in seconds since 1970. Results of earlier versions have none of the three.
    """

    name: str
    scheme: Line  # with its options, such as "xnor" or "xnor:gradient=plain"
    title: Line
    bits: Line  # weights/activations, such as "1/1"
    latents: Line  # the start of the latent weights: "0.01" (standard deviation), "float" or "equal-output"
    seed: int
    recipe: Mapping[str, Any]
    environment: Mapping[str, str]
    seconds: float
    epochs: Epochs
    size: Sizes
    histograms: Histograms = field(default_factory=dict)
    run_id: str = ""
    started: Time = 0.0
    times: Times = field(default_factory=list)

    @property
    def top1(self) -> float:
        """Test accuracy after the last epoch, in percent; no epoch is chosen by looking at the test set."""
        return self.epochs[-1]["test/top1"]

    @property
    def arm(self) -> tuple[str, str]:
        """What runs of different seeds share: scheme and start of the latent weights."""
        return self.scheme, self.latents


def write_run(directory: str | Path, result: RunResult) -> Path:
    """Write ``runs/NAME.json`` below ``directory``."""
    return write_json(Path(directory) / RUNS / f"{result.name}.json", asdict(result))


def read_run(path: str | Path) -> RunResult:
    """Read what :func:`write_run` wrote. Raises InvalidData naming the file and what is wrong with it."""
    path = Path(path)
    result = read_own(RunResult, read_json(path), f"{path} is not a run's result")
    if result.name != path.stem:
        raise InvalidData(f"{path} is not a run's result: its name is {plain.shown(result.name)}")
    if len(result.times) not in (0, len(result.epochs)):
        raise InvalidData(
            f"{path} is not a run's result: it has {len(result.times)} times for {len(result.epochs)} epochs"
        )
    return result
