"""Study report: the paper's numbers beside ours, as a page, as Markdown, and the figures as files."""

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.table import Table
from rich.text import Text

from bonn_qat import plotting
from bonn_qat.bonn import BONN
from bonn_qat.files.atomic import write_text
from bonn_qat.files.plain import printable
from bonn_qat.studies import figures, report, statistics
from bonn_qat.studies.comparison import PAGE, Comparison
from bonn_qat.studies.study import Setting, Study, StudyArm
from bonn_qat.training.results import RunResult

SWEEP = "sweep"
ARM = "arm"
TEXTS = (ARM, "W/A", "latents")  # columns that hold no numbers
PAGE_ONLY = ("W/A", "paper top-5", "top-5 (%)")


@dataclass(frozen=True, kw_only=True)
class SettingResult:
    """A setting that was run: as the study has it, its arms as they were run, and what came out."""

    paper: Setting
    arms: tuple[StudyArm, ...]
    comparison: Comparison
    search: Mapping[float, Comparison]  # learning rate -> its comparison on held-out images; empty without a search


@dataclass(frozen=True, kw_only=True)
class StudyResult:
    """A study, as far as it was run."""

    study: Study
    scale: float
    settings: tuple[SettingResult, ...]


@dataclass(frozen=True, kw_only=True)
class StudyRow:
    """One arm: accuracies in percent. ``verdict`` sets it against ``against``, the arm that it is compared with."""

    label: str
    bits: str
    latents: str
    lr: float
    edge: bool  # the rate is the lowest or highest of more than two that were searched
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
    """Learning rate -> accuracy of the arm in the search, of those rates that came to an end."""
    return {
        rate: fmean(run.top1 for run in found)
        for rate, comparison in searched.items()
        if (found := runs_of(arm, comparison))
    }


def runs_of(arm: StudyArm, comparison: Comparison) -> list[RunResult]:
    """The finished runs of the arm, in the comparison's order, whatever their seeds."""
    return [run for run in comparison.results if run.epochs and run.name == replace(arm.recipe, seed=run.seed).name]


def rows(result: SettingResult, *, chain: bool) -> list[StudyRow]:
    """The arms that have a result, in the study's order; each against the last, or with ``chain`` the one above it."""
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
    """Where the recipes that were run differ from the study's, in words."""
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
    """The study as Markdown, with tables alone."""
    study = result.study
    parts = [f"# {study.title}", study.source and f"Source: {study.source}.", study.note]
    for setting in result.settings:
        parts += [f"## {setting.paper.title}", _setting(setting, result.scale)]
        head, body = _cells(setting, study)
        parts.append(_markdown_table(head, body))
        parts.append("\n".join(map(_markdown_item, _statements(setting, study))))
        if setting.search:
            head, body = _search_cells(setting)
            parts += [_SEARCH_NOTE, _markdown_table(head, body)]
        parts.append(_environment(setting.comparison))
    return "\n\n".join(filter(None, parts)) + "\n"


def terminal_tables(result: StudyResult) -> list[Table]:
    """One table for each setting, for rich to print in 80 characters: all columns but those of ``PAGE_ONLY``."""
    tables = []
    for setting in result.settings:
        head, body = _cells(setting, result.study)
        table = Table(title=Text(printable(setting.paper.title)), box=None, padding=(0, 2, 0, 0), pad_edge=False)
        shown = [place for place, name in enumerate(head) if name not in PAGE_ONLY]
        for name in (head[place] for place in shown):
            lines = "\n".join(textwrap.wrap(name, 10, break_on_hyphens=False))
            table.add_column(lines, justify="right" if _is_number(name) else "left", no_wrap=name != ARM)
        for cells in body:
            table.add_row(*(Text(printable(cells[place])) for place in shown))
        tables.append(table)
    return tables


def html(result: StudyResult, drawn: Mapping[str, Sequence[plotting.Picture]], lacking: str = "") -> str:
    """The study as a page that stands alone, with the figures of each setting, or ``lacking``, why there are none."""
    study = result.study
    body = [f"<header><h1>{escape(study.title)}</h1><p>{escape(study.source)}</p></header>"]
    if study.note:
        body.append(f"<p>{escape(study.note)}</p>")
    if lacking:
        body.append(f'<section class="box open"><p>{escape(lacking)}</p></section>')
    for setting in result.settings:
        body.append(f"<section><h2>{escape(setting.paper.title)}</h2><p>{escape(_setting(setting, result.scale))}</p>")
        body.append(_html_table(*_cells(setting, study)))
        if items := "".join(f"<li>{escape(line)}</li>" for line in _statements(setting, study)):
            body.append(f'<ul class="verdicts">{items}</ul><p class="note">{escape(report.METHOD)}</p>')
        if setting.search:
            body.append(f'<h3>Search for the learning rate</h3><p class="note">{escape(_SEARCH_NOTE)}</p>')
            body.append(_html_table(*_search_cells(setting)))
        body += [report.figure(picture) for picture in drawn.get(setting.paper.name, ())]
        place = escape(f"{setting.paper.name}/{PAGE}")
        body.append(f'<p class="note"><a href="{place}">All figures and recipes of this comparison</a>. ')
        body.append(f"{escape(_environment(setting.comparison))}</p></section>")
    return report.page(study.title, "\n".join(body))


def pictures(result: SettingResult, study: Study) -> list[plotting.Picture]:
    """The study's figures of a setting, under the study's own labels. Raises MatplotlibMissing without matplotlib."""
    shown = _under_labels(result)
    made = []
    for name in study.figures:
        svg = figures.sweeps(_sweep_points(result)) if name == SWEEP else figures.DRAWINGS[name](shown)
        if svg:
            title, caption = figures.TITLES[name], figures.CAPTIONS[name]
            made.append(plotting.Picture(name=f"{name}-{result.paper.name}", title=title, caption=caption, svg=svg))
    return made


def write(result: StudyResult, directory: Path) -> Path:
    """Write page, Markdown and, where there is matplotlib, figures into ``directory``; returns the page's path."""
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


_SEARCH_NOTE = (
    "Accuracy (%) on training images that were held out, by learning rate, one seed, on a part of the work; each arm "
    "was then trained with its best rate. * marks a best rate at the edge of those searched."
)


def _label(arm: StudyArm, run: RunResult) -> str:
    return arm.label or run.title


def _latents(run: RunResult) -> str:
    return run.latents if statistics.binary_layers(run) else ""


def _under_labels(result: SettingResult) -> Comparison:
    """The arms' runs, titled as the study has it; arms of one scheme whose labels differ have colours of their own."""
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
    """Name of an arm's recipe -> what to call it in a sentence: its label, and its start where two share a label."""
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


def _cells(result: SettingResult, study: Study) -> tuple[list[str], list[list[str]]]:
    made = rows(result, chain=study.chain)
    has_top5 = any("top5" in row.paper for row in made)
    has_paper = any(row.paper for row in made)
    head = [ARM, "W/A", "latents", "lr", "seeds"]
    head += ["paper top-1"] * has_paper + ["top-1 (%)"] + ["difference"] * has_paper
    head += ["paper top-5", "top-5 (%)"] * has_top5 + ["to the row above"] * study.chain
    body = []
    for row in made:
        cells = [row.label, row.bits, row.latents, f"{row.lr:g}{'*' if row.edge else ''}", str(row.seeds)]
        cells += [f"{row.paper['top1']:.2f}" if "top1" in row.paper else ""] * has_paper
        cells += [row.accuracy] + [row.difference] * has_paper
        if has_top5:
            cells += [f"{row.paper['top5']:.1f}" if "top5" in row.paper else ""]
            cells += ["" if row.top5 is None else f"{row.top5:.2f}"]
        if study.chain:
            cells.append(f"{row.against.mean:+.2f}" if row.against and row.against.by_seed else "")
        body.append(cells)
    return head, body


def _search_cells(result: SettingResult) -> tuple[list[str], list[list[str]]]:
    """Rates as columns; the best of an arm's in asterisks."""
    body = []
    for arm in result.arms:
        found = accuracies(arm, result.search)
        cells = [f"{found[rate]:.2f}" if rate in found else "failed" for rate in result.search]
        cells = [f"**{c}**" if rate == arm.recipe.lr else c for rate, c in zip(result.search, cells, strict=True)]
        runs = [run for c in (result.comparison, *result.search.values()) for run in runs_of(arm, c)]
        body.append([_label(arm, runs[0]), _latents(runs[0])] if runs else [arm.recipe.scheme_spec, arm.recipe.latents])
        body[-1] += cells
    return [ARM, "latents", *(f"lr {rate:g}" for rate in result.search)], body


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


def _environment(comparison: Comparison) -> str:
    seen: dict[str, dict[str, None]] = {}
    for run in comparison.results:
        for key, value in run.environment.items():
            seen.setdefault(key, {})[value] = None
    return ", ".join(f"{key} {' / '.join(values)}" for key, values in seen.items())


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


def _markdown_table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    def row(cells: Sequence[str]) -> str:
        return "| " + " | ".join(_markdown_line(text).replace("|", r"\|") for text in cells) + " |"

    return "\n".join(map(row, [head, ["---:" if _is_number(name) else "---" for name in head], *body]))


def _markdown_item(text: str) -> str:
    # A label such as "+ PReLU" would begin a list of its own.
    return "- " + re.sub(r"^(?=[-+*#])", r"\\", _markdown_line(text))


def _markdown_line(text: str) -> str:
    return " ".join(text.split()).replace("<", "&lt;")


def _is_number(name: str) -> bool:
    return name not in TEXTS


def _html_table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    kinds = ["number" if _is_number(name) else "text" for name in head]

    def cell(place: int, text: str) -> str:
        strong = text.startswith("**")
        text = escape(text.strip("*") if strong else text)
        return f'<td class="{kinds[place]}">{f"<strong>{text}</strong>" if strong else text}</td>'

    top = "".join(
        f'<th class="{kind}">{escape(name).replace("-", "&#8209;")}</th>'
        for kind, name in zip(kinds, head, strict=True)
    )
    rest = "".join(f"<tr>{''.join(cell(*entry) for entry in enumerate(cells))}</tr>" for cells in body)
    return f'<div class="scroll"><table class="rows"><thead><tr>{top}</tr></thead><tbody>{rest}</tbody></table></div>'
