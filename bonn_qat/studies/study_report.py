"""Study report: the paper's numbers beside ours, as a page and as Markdown, with the figures as files."""

import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from bonn_qat import plotting
from bonn_qat.bonn import BONN
from bonn_qat.files.atomic import write_text
from bonn_qat.studies import figures, report, statistics
from bonn_qat.studies.comparison import PAGE, Comparison
from bonn_qat.studies.study import Setting, Study, StudyArm
from bonn_qat.tables import Column, Strong, Table
from bonn_qat.training.results import RunResult

SWEEP = "sweep"


@dataclass(frozen=True, kw_only=True)
class SettingResult:
    """A setting as the study defines it, its arms as they were run, and their results."""

    paper: Setting
    arms: tuple[StudyArm, ...]
    comparison: Comparison
    search: Mapping[float, Comparison]  # learning rate -> its comparison on held-out images; empty without a search


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """The results of a study so far."""

    study: Study
    scale: float
    settings: tuple[SettingResult, ...]


@dataclass(frozen=True, kw_only=True)
class StudyRow:
    """One arm, its accuracies in percent; ``against`` is its difference from the arm that it is compared with."""

    label: str
    bits: str
    latents: str
    lr: float
    edge: bool  # whether the rate is the lowest or highest of more than two searched
    seeds: int
    paper: Mapping[str, float]
    top1: float
    std: float | None
    top5: float | None
    against: statistics.Difference | None

    @property
    def accuracy(self) -> str:
        """Mean ± standard deviation over the seeds."""
        return f"{self.top1:.2f}" + (f" ± {self.std:.2f}" if self.std is not None else " (one seed)")

    @property
    def difference(self) -> str:
        """Ours minus the paper's top-1, in points."""
        return f"{self.top1 - self.paper['top1']:+.2f}" if "top1" in self.paper else ""


def accuracies(arm: StudyArm, searched: Mapping[float, Comparison]) -> dict[float, float]:
    """Accuracy of the arm in the search by learning rate, for the rates whose runs finished."""
    return {
        rate: fmean(run.top1 for run in found)
        for rate, comparison in searched.items()
        if (found := runs_of(arm, comparison))
    }


def runs_of(arm: StudyArm, comparison: Comparison) -> list[RunResult]:
    """The finished runs of the arm, of all seeds, in the comparison's order."""
    return [run for run in comparison.results if run.epochs and run.name == replace(arm.recipe, seed=run.seed).name]


def rows(result: SettingResult, *, chain: bool) -> list[StudyRow]:
    """The arms that have a result, each compared with the last arm, or with ``chain`` with the arm above it."""
    finished = [arm for arm in result.arms if runs_of(arm, result.comparison)]
    made = []
    for place, arm in enumerate(finished):
        runs = runs_of(arm, result.comparison)
        other = (finished[place - 1] if place else None) if chain else finished[-1]
        top5 = [run.epochs[-1]["test/top5"] for run in runs if "test/top5" in run.epochs[-1]]
        made.append(
            StudyRow(
                label=_label(arm, runs[0]),
                bits=runs[0].bits,
                latents=_latents(runs[0]),
                lr=arm.recipe.lr,
                edge=len(result.search) > 2 and arm.recipe.lr in (min(result.search), max(result.search)),
                seeds=len(runs),
                paper=arm.paper,
                top1=fmean(run.top1 for run in runs),
                std=stdev(run.top1 for run in runs) if len(runs) > 1 else None,
                top5=fmean(top5) if top5 else None,
                against=_difference(result, arm, other),
            )
        )
    return made


def changes(result: SettingResult) -> list[str]:
    """How the recipes that were run differ from those of the study, in words."""
    found: dict[str, None] = {}
    for arm, paper in zip(result.arms, result.paper.arms, strict=True):
        ours, papers = _flat(arm), _flat(paper)
        for key, value in ours.items():
            before = _plain(papers[key], key) if key in papers else "the scheme's own"
            if key == "lr" and result.search:
                found[f"lr searched for each arm instead of {before}"] = None
            elif key not in papers or value != papers[key]:
                found[f"{key} {_plain(value, key)} instead of {before}"] = None
    return list(found)


def markdown(result: StudyResult) -> str:
    """The study as Markdown: tables and lists, without figures."""
    study = result.study
    parts = [f"# {study.title}", study.source and f"Source: {study.source}.", study.note]
    for section in map(functools.partial(_section, result), result.settings):
        parts += [f"## {section.title}", section.setting, section.results.to_markdown()]
        parts.append("\n".join(map(_markdown_item, section.statements)))
        if section.search:
            parts += [SEARCH_NOTE, section.search.to_markdown()]
        parts.append(section.environment)
    return "\n\n".join(filter(None, parts)) + "\n"


def html(result: StudyResult, pictures: Mapping[str, Sequence[plotting.Picture]], no_figures: str = "") -> str:
    """The page: ``pictures`` by setting, or ``no_figures``, the reason why there are none."""
    study = result.study
    return report.render(
        "study",
        title=study.title,
        source=study.source,
        note=study.note,
        sections=[_section(result, setting) for setting in result.settings],
        pictures=pictures,
        no_figures=no_figures,
        search_note=SEARCH_NOTE,
        page=PAGE,
    )


def results(setting: SettingResult, study: Study) -> Table:
    """A row for each arm that has a finished run: the paper's numbers beside ours."""
    made = rows(setting, chain=study.chain)
    has_top5 = any("top5" in row.paper for row in made)
    columns = [
        Column("arm", text=True, wraps=True), Column("W/A", text=True, drop=3), Column("latents", text=True),
        Column("lr"), Column("seeds"), Column("paper top-1", optional=True), Column("top-1 (%)"),
        Column("difference", optional=True), Column("paper top-5", optional=True, drop=2),
        Column("top-5 (%)", optional=True, drop=1), *[Column("to the row above")] * study.chain,
    ]  # fmt: skip
    cells = [
        [row.label, row.bits, row.latents, f"{row.lr:g}{'*' * row.edge}", str(row.seeds),
         f"{row.paper['top1']:.2f}" if "top1" in row.paper else "", row.accuracy, row.difference,
         f"{row.paper['top5']:.1f}" if "top5" in row.paper else "",
         f"{row.top5:.2f}" if has_top5 and row.top5 is not None else "",
         *[f"{row.against.mean:+.2f}" if row.against and row.against.by_seed else ""] * study.chain]
        for row in made
    ]  # fmt: skip
    return Table(columns, cells, title=setting.paper.title)


def pictures(result: SettingResult, study: Study) -> list[plotting.Picture]:
    """The study's figures of a setting, with the study's labels. Raises MatplotlibMissing without matplotlib."""
    shown = _under_labels(result)
    made = []
    for name in study.figures:
        svg = figures.sweeps(_sweep_points(result)) if name == SWEEP else figures.DRAWINGS[name](shown)
        if svg:
            title, caption = figures.TITLES[name], figures.CAPTIONS[name]
            made.append(plotting.Picture(name=f"{name}-{result.paper.name}", title=title, caption=caption, svg=svg))
    return made


def write(result: StudyResult, directory: Path) -> Path:
    """Write page, Markdown and, if matplotlib is installed, figures into ``directory``; return the page's path."""
    study = result.study
    drawn: dict[str, list[plotting.Picture]] = {}
    lacking = ""
    try:
        drawn = {setting.paper.name: pictures(setting, study) for setting in result.settings}
    except plotting.MatplotlibMissing as error:
        lacking = str(error)
    for picture in (picture for found in drawn.values() for picture in found):
        write_text(directory / f"{study.name}-{picture.name}.svg", picture.svg)
    write_text(directory / f"{study.name}.md", markdown(result))
    return write_text(directory / f"{study.name}.html", html(result, drawn, lacking))


SEARCH_NOTE = (
    "Accuracy (%) on held-out training images for each learning rate, with one seed and a part of the epochs; each arm "
    "was then trained with its best rate. * marks a best rate that is the lowest or highest of those searched."
)


@dataclass(frozen=True, kw_only=True)
class _Section:
    """A setting as page and Markdown show it."""

    name: str
    title: str
    setting: str
    results: Table
    statements: Sequence[str]
    search: Table | None
    environment: str


def _section(result: StudyResult, setting: SettingResult) -> _Section:
    environment = report.environment(setting.comparison)
    return _Section(
        name=setting.paper.name,
        title=setting.paper.title,
        setting=_setting(setting, result.scale),
        results=results(setting, result.study),
        statements=list(_statements(setting, result.study)),
        search=_search(setting) if setting.search else None,
        environment=", ".join(f"{key} {' / '.join(values)}" for key, values in environment.items()),
    )


def _label(arm: StudyArm, run: RunResult) -> str:
    return arm.label or run.title


def _latents(run: RunResult) -> str:
    return run.latents if statistics.binary_layers(run) else ""


def _under_labels(result: SettingResult) -> Comparison:
    """The comparison with the study's labels as titles; arms of one scheme with different labels differ in colour."""
    found = [(_label(arm, run), run) for arm in result.arms for run in runs_of(arm, result.comparison)]
    labels: dict[str, set[str]] = {}
    for label, run in found:
        labels.setdefault(run.scheme, set()).add(label)
    runs = [
        replace(run, title=label, scheme=run.scheme if len(labels[run.scheme]) == 1 else f"{run.scheme} {label}")
        for label, run in found
    ]
    return replace(result.comparison, results=runs)


def _names(result: SettingResult) -> dict[str, str]:
    """The label of each arm by its recipe's name, with the initialization of its latents if two share a label."""
    found = {
        arm.recipe.name: (_label(arm, runs[0]), runs[0].latents)
        for arm in result.arms
        if (runs := runs_of(arm, result.comparison))
    }
    labels = [label for label, _ in found.values()]
    return {
        name: f"{label} (latents {latents})" if labels.count(label) > 1 else label
        for name, (label, latents) in found.items()
    }


def _difference(result: SettingResult, arm: StudyArm, other: StudyArm | None) -> statistics.Difference | None:
    if other is None or other is arm:
        return None
    (ours, *_), (theirs, *_) = (runs_of(one, result.comparison) for one in (arm, other))
    names = _names(result)
    found = statistics.difference(result.comparison, ours.arm, theirs.arm)
    return replace(found, reference=names[arm.recipe.name], other=names[other.recipe.name])


def _search(result: SettingResult) -> Table:
    """A column for each rate; the best of each arm is emphasized."""
    body = []
    for arm in result.arms:
        found = accuracies(arm, result.search)
        cells = [f"{found[rate]:.2f}" if rate in found else "failed" for rate in result.search]
        runs = [run for c in (result.comparison, *result.search.values()) for run in runs_of(arm, c)]
        names = [_label(arm, runs[0]), _latents(runs[0])] if runs else [arm.recipe.scheme_spec, arm.recipe.latents]
        best = [Strong(c) if rate == arm.recipe.lr else c for rate, c in zip(result.search, cells, strict=True)]
        body.append([*names, *best])
    rates = [Column(f"lr {rate:g}") for rate in result.search]
    return Table([Column("arm", text=True, wraps=True), Column("latents", text=True), *rates], body)


def _statements(result: SettingResult, study: Study) -> Iterable[str]:
    for row in rows(result, chain=study.chain):
        if row.against and study.chain and row.against.by_seed:
            noise = f" ({row.against.noise})" if row.against.noise else ""
            yield f"{row.label}: {row.against.mean:+.2f} points to the row above, {row.against.verdict}{noise}"
        elif row.against:
            yield str(row.against)
    yield from (f"failed: {name}: {why}" for name, why in result.comparison.failures.items())
    yield from (f"missing: {name}" for name in result.comparison.missing)


def _setting(result: SettingResult, scale: float) -> str:
    data, differing = result.comparison.data, changes(result)
    images = f"{data['train']:,} training and {data['test']:,} test images"
    if not differing:
        return f"The study's own setting; {images}."
    small = f"At scale {scale:g}, not the study's own setting" if scale < 1 else "Not the study's own setting"
    return f"{small}: {', '.join(differing)}; {images}."


def _flat(arm: StudyArm) -> dict[str, Any]:
    content = arm.recipe.to_dict()
    options = content.pop("scheme_options")
    return content | {f"scheme_options.{key}": value for key, value in options.items()}


def _plain(value: Any, key: str) -> str:
    if key in ("train_images", "test_images") and value == 0:
        return "all"
    if value in ("", [], {}):
        return "none"
    if isinstance(value, list):
        return "(" + ", ".join(_plain(entry, "") for entry in value) + ")"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _sweep_points(result: SettingResult) -> list[figures.SweepPoint]:
    points = []
    for arm in result.arms:
        runs = runs_of(arm, result.comparison)
        weights = BONN.regularizers | dict(arm.recipe.scheme_options)
        if runs and arm.recipe.scheme == BONN.name:
            points.append(
                figures.SweepPoint(
                    kernel=float(weights["kernel"]),
                    feature=float(weights["feature"]),
                    accuracies=tuple(run.top1 for run in runs),
                    paper=arm.paper.get("top1"),
                )
            )
    return points


def _markdown_item(text: str) -> str:
    # A label such as "+ PReLU" would begin a list of its own.
    return "- " + re.sub(r"^(?=[-+*#])", r"\\", " ".join(text.split()).replace("<", "&lt;"))
