"""Figures: a comparison drawn as in the paper's figures, as SVG text. Needs the extra ``compare`` (matplotlib)."""

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from bonn_qat.studies.comparison import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
from bonn_qat.plotting import (
    FLOAT_COLOUR,
    HERO,
    HERO_COLOUR,
    LAPS,
    PALETTE,
    TRAIN,
    Picture,
    canvas,
    logarithmic,
    plain_text,
    row,
    tint,
)
from bonn_qat.studies.statistics import ArmRuns, arms, binary_layers, label, labels

SNAPSHOTS = 6  # epochs per histogram panel


def pictures(comparison: Comparison) -> list[Picture]:
    """Every figure that the finished runs have data for. Raises MatplotlibMissing without matplotlib."""
    drawn = ((name, draw(comparison)) for name, draw in DRAWINGS.items())
    return [Picture(name=name, title=TITLES[name], caption=CAPTIONS[name], svg=svg) for name, svg in drawn if svg]


def colours(comparison: Comparison) -> dict[str, str]:
    """A colour for each scheme, the same in all figures; those of BONN and float are the same in all comparisons."""
    result: dict[str, str] = {}
    for run in (arm[0] for arm in arms(comparison)):
        if run.scheme == HERO:
            result[run.scheme] = HERO_COLOUR
        elif not binary_layers(run):
            result[run.scheme] = FLOAT_COLOUR
        elif run.scheme not in result:
            used = sum(colour in PALETTE for colour in result.values())
            result[run.scheme] = PALETTE[used % len(PALETTE)]
    return result


def strokes(comparison: Comparison) -> dict[str, Any]:
    """A line style for each scheme: solid, or dashed where a scheme repeats a colour."""
    laps: dict[str, int] = {}
    result = {}
    for scheme, colour in colours(comparison).items():
        laps[colour] = laps.get(colour, -1) + 1
        result[scheme] = LAPS[laps[colour] % len(LAPS)]
    return result


def accuracy_curves(comparison: Comparison) -> str | None:
    """Test and train (thin, dashed) top-1 over epochs: mean line and min-max band over seeds (Fig. 6).

    Training curves are left out if there are more arms than colours, as they would hide the test curves.
    """
    facets, colour, stroke, crowded = looks = _looks(comparison, ["test/top1"])
    if not facets:
        return None
    with canvas("accuracy", height=4.6, title=TITLES["accuracy"]) as (figure, svg):
        for axis, (latents, group) in zip(row(figure, len(facets)), facets.items(), strict=True):
            for arm in group:
                tint, style = colour[arm[0].scheme], stroke[arm[0].scheme]
                if not crowded:
                    _curve(axis, arm, "train/top1", tint, linewidth=0.9, linestyle=TRAIN, alpha=0.7)
                _curve(axis, arm, "test/top1", tint, linewidth=2.0, linestyle=style, band=not crowded)
            _epochs_axis(axis)
            axis.set_title(_panel_title(latents, facets))
        figure.axes[0].set_ylabel("top-1 accuracy (%)")
        _legend(figure, looks, {} if crowded else {"test": "-", "train": TRAIN})
    return svg()


def latent_histograms(comparison: Comparison) -> str | None:
    """Histograms of the latent weights over the epochs, for one seed: arms by layers (Figs. 3 and 4)."""
    layers = _chosen_layers(comparison)
    shown = [arm for arm in arms(comparison) if any(_snapshots(arm, layer) for layer in layers)]
    if not shown:
        return None
    colour, names = colours(comparison), labels(comparison)
    height, letters = (1.8, 18) if len(shown) <= 6 else (1.3, 12)  # inches of a row, letters that fit beside it
    with canvas("histograms", height=height * len(shown) + 0.7, title=TITLES["histograms"]) as (figure, svg):
        grid = figure.subplots(len(shown), len(layers), squeeze=False)
        for arm, axes in zip(shown, grid, strict=True):
            for axis, layer in zip(axes, layers, strict=True):
                _ridges(axis, _snapshots(arm, layer), colour[arm[0].scheme])
            name = "\n".join(textwrap.wrap(names[arm[0].arm], letters, break_on_hyphens=False))
            axes[0].set_ylabel(plain_text(name), color=colour[arm[0].scheme], fontweight="bold")
        for axis, layer in zip(grid[0], layers, strict=True):
            axis.set_title(plain_text(layer))
        figure.supxlabel("latent weight", fontsize=11)
    return svg()


def binary_values(comparison: Comparison) -> str | None:
    """The magnitude ``|x^|`` of the binary weights over the epochs: a panel per layer, a line per arm (Fig. 5)."""
    layers = _chosen_layers(comparison)
    facets, colour, stroke, crowded = looks = _looks(comparison, [f"scale/{layer}" for layer in layers])
    if not facets:
        return None
    with canvas("values", height=2.9 * len(facets) + 0.6, title=TITLES["values"]) as (figure, svg):
        grid = figure.subplots(len(facets), len(layers), squeeze=False, sharex=True, sharey=True)
        for axes, (latents, group) in zip(grid, facets.items(), strict=True):
            for axis, layer in zip(axes, layers, strict=True):
                for arm in group:
                    tint, style = colour[arm[0].scheme], stroke[arm[0].scheme]
                    _curve(axis, arm, f"scale/{layer}", tint, linewidth=2.0, linestyle=style, band=not crowded)
                logarithmic(axis)
                _epochs_axis(axis)
            start = _panel_title(latents, facets)
            axes[0].set_ylabel("binary value |x̂|" + (f"\n{start}" if start else ""))
        for axis, layer in zip(grid[0], layers, strict=True):
            axis.set_title(plain_text(layer))
        _legend(figure, looks, {})
    return svg()


def flip_ratios(comparison: Comparison) -> str | None:
    """The share of binary weights that change sign in an epoch, over the epochs: a line per arm."""
    facets, colour, stroke, _ = looks = _looks(comparison, ["flips"])
    if not facets:
        return None
    with canvas("flips", height=4.2, title=TITLES["flips"]) as (figure, svg):
        for axis, (latents, group) in zip(row(figure, len(facets)), facets.items(), strict=True):
            for arm in group:
                scheme = arm[0].scheme
                _curve(axis, arm, "flips", colour[scheme], linewidth=2.0, linestyle=stroke[scheme])
            logarithmic(axis)
            _epochs_axis(axis)
            axis.set_title(_panel_title(latents, facets))
        figure.axes[0].set_ylabel("flips / weights, per epoch")
        _legend(figure, looks, {})
    return svg()


def final_accuracy(comparison: Comparison) -> str | None:
    """Test top-1 after the last epoch: a point per seed, a bar at the mean, a line per arm."""
    groups, colour, names = arms(comparison), colours(comparison), labels(comparison)
    if not groups:
        return None
    with canvas("final", height=0.36 * len(groups) + 0.9, title=TITLES["final"]) as (figure, svg):
        axis = figure.subplots()
        for place, arm in enumerate(groups):
            values, tint = [run.top1 for run in arm], colour[arm[0].scheme]
            mean = sum(values) / len(values)
            axis.plot(values, [place] * len(values), "o", color=tint, alpha=0.55, markeredgewidth=0)
            axis.plot([mean], [place], "|", color=tint, markersize=16, markeredgewidth=2.5)
            axis.text(1.02, place, f"{mean:.2f}", transform=axis.get_yaxis_transform(), va="center", color=tint)
        axis.set_yticks(range(len(groups)), [plain_text(names[arm[0].arm]) for arm in groups])
        axis.set_ylim(len(groups) - 0.5, -0.5)
        axis.set_xlabel("test top-1 after the last epoch (%)")
        axis.margins(x=0.08)
    return svg()


@dataclass(frozen=True, kw_only=True)
class SweepPoint:
    """An arm of an ablation: the weights of the two losses, and what was reached with them, in percent."""

    kernel: float  # lambda
    feature: float  # theta
    accuracies: tuple[float, ...]  # of the seeds
    paper: float | None = None


def sweeps(points: Sequence[SweepPoint]) -> str | None:
    """Accuracy over lambda with theta = 0, and over theta with the lambda that has most points: ours and the paper's.

    A panel that would have fewer than two points is left out.
    """
    counts: dict[float, int] = {}
    for point in points:
        counts[point.kernel] = counts.get(point.kernel, 0) + 1
    best = max(counts, key=lambda kernel: counts[kernel], default=0.0)
    panels = {
        "lambda, the kernel loss's weight (theta = 0)": {p.kernel: p for p in points if p.feature == 0},
        f"theta, the feature loss's weight (lambda = {best:g})": {p.feature: p for p in points if p.kernel == best},
    }
    panels = {name: dict(sorted(found.items())) for name, found in panels.items() if len(found) > 1}
    if not panels:
        return None
    with canvas("sweep", height=3.8, title=TITLES["sweep"]) as (figure, svg):
        for axis, (name, found) in zip(row(figure, len(panels)), panels.items(), strict=True):
            for place, point in enumerate(found.values()):
                axis.plot([place] * len(point.accuracies), point.accuracies, "o", color=HERO_COLOUR, alpha=0.5, mew=0)
            means = [sum(point.accuracies) / len(point.accuracies) for point in found.values()]
            axis.plot(means, color=HERO_COLOUR, linewidth=2.0, label="ours")
            papers = [(place, point.paper) for place, point in enumerate(found.values()) if point.paper is not None]
            if papers:
                axis.plot(*zip(*papers, strict=True), "s--", color="#777777", markersize=5, label="paper")
            axis.set_xticks(range(len(found)), [f"{value:g}" for value in found])
            axis.set_xlabel(name)
            axis.margins(x=0.08, y=0.12)
        figure.axes[0].set_ylabel("test top-1 (%)")
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return svg()


DRAWINGS: Mapping[str, Callable[[Comparison], str | None]] = {
    "final": final_accuracy,
    "accuracy": accuracy_curves,
    "histograms": latent_histograms,
    "values": binary_values,
    "flips": flip_ratios,
}
TITLES = {
    "final": "Final accuracy",
    "accuracy": "Accuracy over the epochs",
    "histograms": "Latent weights over the epochs",
    "values": "Magnitude of the binary weights over the epochs",
    "flips": "Sign flips over the epochs",
    "sweep": "Accuracy for different weights of the losses",
}
CAPTIONS = {
    "final": "Each point is a seed; the bar and the number are the mean. Check whether the points of two schemes "
    "overlap before comparing the means. The axis does not start at zero.",
    "accuracy": "Thick lines: test images. Thin dashed lines: training images, left out if there are more arms than "
    "colours. After a single epoch: filled and hollow points. The band reaches from the worst to the best seed. A wide "
    "gap between training and test is overfitting; a jump is a step of the learning rate or a new stage of the scheme. "
    "Compare Fig. 6 of the paper.",
    "histograms": "The latent weights, that is the real-valued weights behind the signs, of the first, middle and last "
    "binary layer, for one seed. Time runs downwards and from light to dark. Each ridge is scaled to its own peak and "
    "each panel has its own horizontal axis. BONN's prior should split one mode into two, one for each sign. "
    "Compare Figs. 3 and 4 of the paper.",
    "values": "The magnitude of the binary weights of a layer (averaged over its filters if each has its own), on a "
    "logarithmic axis. In the paper BONN's values grow several times and settle high, while those of XNOR-Net shrink. "
    "Compare Fig. 5 of the paper.",
    "sweep": "Each point is a seed; the line connects the means; squares are the paper's numbers. The values on the "
    "horizontal axis are evenly spaced, not to scale.",
    "flips": "The share of binary weights whose sign differs between the start and the end of an epoch, averaged over "
    "the seeds, on a logarithmic axis. Signs that still change late have not settled; signs that never change were "
    "decided by the initialization.",
}


def _panel_title(latents: str, facets: Mapping[str, Any]) -> str:
    if len(facets) < 2:
        return ""
    words = {"float": "latents start as float", "equal-output": "layers start with equal outputs"}
    return words.get(latents) or plain_text(f"latents start at std {latents}")


class _Looks(NamedTuple):
    """The arms of each panel by the initialization of their latents, and how a scheme's lines look."""

    facets: dict[str, list[ArmRuns]]
    colour: dict[str, str]
    stroke: dict[str, Any]
    crowded: bool  # whether there are more schemes than colours


def _looks(comparison: Comparison, keys: Sequence[str]) -> _Looks:
    """The looks of the arms that have one of the metrics ``keys``; a float network is in every panel."""
    shown = [arm for arm in arms(comparison) if any(_series(arm, key) for key in keys)]
    starts = dict.fromkeys(arm[0].latents for arm in shown if binary_layers(arm[0])) or ("",)
    facets = {start: [x for x in shown if not binary_layers(x[0]) or x[0].latents == start] for start in starts}
    stroke = strokes(comparison)
    crowded = any(style != LAPS[0] for style in stroke.values())
    return _Looks(facets if shown else {}, colours(comparison), stroke, crowded)


def _chosen_layers(comparison: Comparison) -> list[str]:
    """First, middle and last binary layer of the first arm that has any, else of those with histograms."""
    runs = [run for arm in arms(comparison) for run in arm]
    layers = next(filter(None, map(binary_layers, runs)), None)
    layers = layers or next((list(run.histograms) for run in runs if run.histograms), [])
    places = sorted({0, len(layers) // 2, len(layers) - 1}) if layers else []
    return [layers[place] for place in places]


def _series(arm: ArmRuns, key: str) -> dict[int, list[float]]:
    """Epoch -> the values of the seeds that reached it, above zero for what is drawn on a log axis."""
    above = 0.0 if key.startswith(("scale/", "flips")) else -math.inf
    found: dict[int, list[float]] = {}
    for run in arm:
        for record in run.epochs:
            if above < (value := record.get(key, math.nan)) < math.inf:
                found.setdefault(int(record["epoch"]), []).append(value)
    return dict(sorted(found.items()))


def _snapshots(arm: ArmRuns, layer: str) -> dict[int, Mapping[str, Sequence[float]]]:
    """Up to SNAPSHOTS epochs, the first and the last among them -> histogram, of the first seed that has any."""
    stored = next((run.histograms[layer] for run in arm if run.histograms.get(layer)), {})
    filled = sorted(int(epoch) for epoch, histogram in stored.items() if sum(histogram["counts"]) > 0)
    steps = min(SNAPSHOTS, len(filled)) - 1
    chosen = {filled[round(i * (len(filled) - 1) / max(steps, 1))] for i in range(steps + 1)}
    return {epoch: stored[str(epoch)] for epoch in sorted(chosen)}


def _curve(axis: "Axes", arm: ArmRuns, key: str, colour: str, *, band: bool = False, **style: Any) -> None:
    series = _series(arm, key)
    if not series:
        return
    means = [sum(values) / len(values) for values in series.values()]
    # A line through one point is invisible.
    mark: dict[str, Any] = {"marker": "o", "fillstyle": "full" if band else "none"} if len(series) == 1 else {}
    axis.plot(list(series), means, color=colour, **style, **mark)
    if band:
        low, high = [min(v) for v in series.values()], [max(v) for v in series.values()]
        axis.fill_between(list(series), low, high, color=colour, alpha=0.18, linewidth=0)


def _ridges(axis: "Axes", snapshots: Mapping[int, Mapping[str, Sequence[float]]], colour: str) -> None:
    """Histograms one below the other, time downwards, each overlapping the one before it."""
    axis.grid(False)
    axis.spines["left"].set_visible(False)
    for place, histogram in enumerate(snapshots.values()):
        density = _density(histogram)
        peak = max(density) or 1.0
        top = [1.7 * value / peak - place for value in density]
        shade = tint(colour, 0.25 + 0.75 * (place + 1) / len(snapshots))
        style: Any = {"facecolor": shade, "edgecolor": "white", "linewidth": 0.5, "zorder": place + 2}
        axis.stairs(top, histogram["edges"], baseline=-place, fill=True, **style)
    epochs = [f"epoch {epoch}" if place == 0 else str(epoch) for place, epoch in enumerate(snapshots)]
    axis.set_yticks([-place for place in range(len(snapshots))], epochs, fontsize=9)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=9)
    if snapshots:
        reach = max(map(_reach, snapshots.values()))
        axis.set_xlim(-reach, reach)
        axis.locator_params(axis="x", nbins=5)
    else:
        axis.set_xticks([])
        axis.text(0.5, 0.5, "not recorded", transform=axis.transAxes, ha="center", color="#777777")


def _density(histogram: Mapping[str, Sequence[float]]) -> list[float]:
    edges, counts = histogram["edges"], histogram["counts"]
    return [n / (b - a) if b > a else 0.0 for n, a, b in zip(counts, edges[:-1], edges[1:], strict=True)]


def _reach(histogram: Mapping[str, Sequence[float]]) -> float:
    """The magnitude below which 99.5% of the weights are, so that a few outliers do not squeeze the rest."""
    edges, counts = histogram["edges"], histogram["counts"]
    outer = [max(abs(a), abs(b)) for a, b in pairwise(edges)]
    seen, total = 0.0, sum(counts)
    for magnitude, count in sorted(zip(outer, counts, strict=True)):
        seen += count
        if seen >= 0.995 * total:
            return magnitude or 1.0
    return max(outer) or 1.0


def _epochs_axis(axis: "Axes") -> None:
    axis.locator_params(axis="x", integer=True, min_n_ticks=1)
    if len({*axis.dataLim.intervalx}) == 1:  # one epoch
        axis.set_xlim(0, 2 * axis.dataLim.x0)
    axis.set_xlabel("epoch")
    axis.label_outer()


def _legend(figure: "Figure", looks: _Looks, meanings: Mapping[str, Any]) -> None:
    """A legend below the panels: a line for each scheme, then ``meanings``, names of line styles."""
    from matplotlib.lines import Line2D

    titles = {arm[0].scheme: label(arm[0], start=False) for group in looks.facets.values() for arm in group}
    handles = [Line2D([], [], color=looks.colour[name], linestyle=looks.stroke[name], linewidth=2.5) for name in titles]
    handles += [Line2D([], [], color="#777777", linestyle=meaning) for meaning in meanings.values()]
    # matplotlib leaves out labels that start with an underscore; a space before it is not seen.
    names = [plain_text(f" {title}" if title.startswith("_") else title) for title in (*titles.values(), *meanings)]
    columns = max(1, min(5, 120 // (8 + max(map(len, names)))))  # about 120 letters fit the width
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(handles), columns))
