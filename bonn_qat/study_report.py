"""Study report: the paper's numbers beside ours, as a page, as Markdown, and the figures as files."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rich.table import Table
from rich.text import Text

from bonn_qat import figures, report
from bonn_qat.errors import UnknownName
from bonn_qat.recipe import Recipe
from bonn_qat.results import PAGE, Comparison, RunResult, write_text
from bonn_qat.study import Setting, Study, StudyArm

SWEEP = "sweep"
_OWN = ("lr", "seed", "latents", "scheme", "scheme_options")  # have a column of their own, or make the arm


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
    edge: bool  # the rate is the lowest or highest of those searched
    seeds: int
    paper: Mapping[str, float]
    top1: float
    std: float | None
    top5: float | None
    against: report.Difference | None

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
        if (found := _of(arm, comparison))
    }


def rows(result: SettingResult, *, chain: bool) -> list[StudyRow]:
    """The arms that have a result, in the study's order; each against the last, or with ``chain`` the one above it."""
    finished = [arm for arm in result.arms if _of(arm, result.comparison)]
    made = []
    for place, arm in enumerate(finished):
        runs = _of(arm, result.comparison)
        other = (finished[place - 1] if place else None) if chain else finished[-1]
        top5 = [run.epochs[-1]["test/top5"] for run in runs if "test/top5" in run.epochs[-1]]
        made.append(
            StudyRow(
                label=_label(arm, runs[0]),
                bits=runs[0].bits,
                latents=runs[0].latents if figures.binary_layers(runs[0]) else "",
                lr=arm.recipe.lr,
                edge=len(result.search) > 2 and arm.recipe.lr in (min(result.search), max(result.search)),
                seeds=len(runs),
                paper=arm.paper,
                top1=fmean(run.top1 for run in runs),
                std=stdev(run.top1 for run in runs) if len(runs) > 1 else None,
                top5=fmean(top5) if top5 else None,
                against=_difference(result.comparison, arm, other),
            )
        )
    return made


def changes(result: SettingResult) -> list[str]:
    """Where the recipes that were run differ from the study's, in words; the learning rate has a column."""
    ours, papers = (arm.recipe.to_dict() for arm in (result.arms[0], result.paper.arms[0]))
    return [
        f"{key} {_plain(ours[key])} instead of {_plain(value, key)}"
        for key, value in papers.items()
        if key not in _OWN and ours[key] != value
    ]


def markdown(result: StudyResult) -> str:
    """The study as Markdown, with tables alone."""
    study = result.study
    parts = [f"# {study.title}", f"Paper: {study.source}.", *filter(None, [study.note])]
    for setting in result.settings:
        parts += [f"## {setting.paper.title}", _setting(setting, result.scale)]
        head, body = _cells(setting, study)
        parts.append(_markdown_table(head, body))
        parts.append("\n".join(f"- {line}" for line in _statements(setting, study)))
        if setting.search:
            head, body = _search_cells(setting)
            parts += [_SEARCH_NOTE, _markdown_table(head, body)]
        parts.append(_environment(setting.comparison))
    return "\n\n".join(filter(None, parts)) + "\n"


def terminal_tables(result: StudyResult) -> list[Table]:
    """One table for each setting, for rich to print."""
    tables = []
    for setting in result.settings:
        head, body = _cells(setting, result.study)
        table = Table(title=Text(setting.paper.title), box=None, padding=(0, 2, 0, 0), pad_edge=False)
        for place, name in enumerate(head):
            table.add_column(name, justify="right" if place > 1 else "left")
        for cells in body:
            table.add_row(*map(Text, cells))
        tables.append(table)
    return tables


def html(result: StudyResult) -> str:
    """The study as a page that stands alone."""
    study = result.study
    body = [f"<header><h1>{escape(study.title)}</h1><p>{escape(study.source)}</p></header>"]
    if study.note:
        body.append(f"<p>{escape(study.note)}</p>")
    for setting in result.settings:
        body.append(f"<section><h2>{escape(setting.paper.title)}</h2><p>{escape(_setting(setting, result.scale))}</p>")
        body.append(_html_table(*_cells(setting, study)))
        items = "".join(f"<li>{escape(line)}</li>" for line in _statements(setting, study))
        body.append(f'<ul class="verdicts">{items}</ul><p class="note">{escape(report.METHOD)}</p>')
        if setting.search:
            body.append(f'<h3>Search for the learning rate</h3><p class="note">{escape(_SEARCH_NOTE)}</p>')
            body.append(_html_table(*_search_cells(setting)))
        body += [report.figure(picture) for picture in pictures(setting, study)]
        place = escape(f"{setting.paper.name}/{PAGE}")
        body.append(f'<p class="note"><a href="{place}">All figures and recipes of this comparison</a>. ')
        body.append(f"{escape(_environment(setting.comparison))}</p></section>")
    return report.page(study.title, "\n".join(body))


def pictures(result: SettingResult, study: Study) -> list[figures.Picture]:
    """The study's figures of a setting, under the study's own labels."""
    names = {arm_key(arm.recipe): arm.label for arm in result.arms if arm.label}
    wanted = {arm_key(arm.recipe) for arm in result.arms}
    shown = replace(
        result.comparison,
        results=[
            replace(run, title=names.get(run.arm, run.title)) for run in result.comparison.results if run.arm in wanted
        ],
    )
    made = []
    for name in study.figures:
        if name == SWEEP:
            svg = figures.sweeps(_sweep_points(result))
        elif name in figures.DRAWINGS:
            svg = figures.DRAWINGS[name](shown)
        else:
            raise UnknownName(f"figure of the study {study.name!r}", name, [SWEEP, *figures.DRAWINGS])
        if svg:
            title, caption = figures.TITLES[name], figures.CAPTIONS[name]
            made.append(figures.Picture(name=f"{name}-{result.paper.name}", title=title, caption=caption, svg=svg))
    return made


def write(result: StudyResult, directory: Path) -> Path:
    """Write page, Markdown and figures into ``directory``; returns the page's path."""
    study = result.study
    for setting in result.settings:
        for picture in pictures(setting, study):
            write_text(directory / f"{study.name}-{picture.name}.svg", picture.svg)
    write_text(directory / f"{study.name}.md", markdown(result))
    return write_text(directory / f"{study.name}.html", html(result))


def arm_key(recipe: Recipe) -> tuple[str, str]:
    """What names the arm of a recipe's runs: scheme with options, and start of the latents."""
    return recipe.variant, recipe.latents


_SEARCH_NOTE = (
    "Accuracy (%) on training images that were held out, by learning rate, one seed, on a part of the work; each arm "
    "was then trained with its best rate. * marks a best rate at the edge of those searched."
)


def _of(arm: StudyArm, comparison: Comparison) -> list[RunResult]:
    return [run for run in comparison.results if run.arm == arm_key(arm.recipe) and run.epochs]


def _label(arm: StudyArm, run: RunResult) -> str:
    return arm.label or run.title


def _difference(comparison: Comparison, arm: StudyArm, other: StudyArm | None) -> report.Difference | None:
    if other is None or other is arm:
        return None
    found = report.difference(comparison, arm_key(arm.recipe), arm_key(other.recipe))
    names = [_label(one, _of(one, comparison)[0]) for one in (arm, other)]
    return replace(found, reference=names[0], other=names[1])


def _cells(result: SettingResult, study: Study) -> tuple[list[str], list[list[str]]]:
    made = rows(result, chain=study.chain)
    has_top5 = any("top5" in row.paper for row in made)
    has_paper = any(row.paper for row in made)
    head = ["arm", "W/A", "latents", "lr", "seeds"]
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
            cells.append("" if row.against is None else f"{row.against.mean:+.2f}")
        body.append(cells)
    return head, body


def _search_cells(result: SettingResult) -> tuple[list[str], list[list[str]]]:
    """Rates as columns; the best of an arm's in asterisks."""
    body = []
    for arm in result.arms:
        found = accuracies(arm, result.search)
        cells = [f"{found[rate]:.2f}" if rate in found else "diverged" for rate in result.search]
        cells = [f"**{c}**" if rate == arm.recipe.lr else c for rate, c in zip(result.search, cells, strict=True)]
        runs = _of(arm, result.comparison) or [run for c in result.search.values() for run in _of(arm, c)]
        body.append([_label(arm, runs[0]) if runs else arm.recipe.variant, arm.recipe.latents, *cells])
    return ["arm", "latents", *(f"lr {rate:g}" for rate in result.search)], body


def _statements(result: SettingResult, study: Study) -> Iterable[str]:
    yield from (str(row.against) for row in rows(result, chain=study.chain) if row.against is not None)
    yield from (f"failed: {name}: {why}" for name, why in result.comparison.failures.items())
    yield from (f"missing: {name}" for name in result.comparison.missing)


def _setting(result: SettingResult, scale: float) -> str:
    data, differing = result.comparison.data, changes(result)
    images = f"{data['train']:,} training and {data['test']:,} test images"
    if not differing:
        return f"The study's own setting; {images}."
    small = f"At scale {scale:g}, not the paper's setting: " if scale < 1 else "Not the paper's setting: "
    return f"{small}{', '.join(differing)}; {images}."


def _plain(value: Any, key: str = "") -> str:
    if isinstance(value, list):
        return "(" + ", ".join(f"{entry:g}" if isinstance(entry, float) else str(entry) for entry in value) + ")"
    if key.endswith("_images") and value == 0:
        return "all"
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
        runs = _of(arm, result.comparison)
        if runs:
            weights = {"kernel": 1e-4, "feature": 1e-3} | dict(arm.recipe.scheme_options)
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
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _html_table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    def cell(place: int, text: str) -> str:
        strong = text.startswith("**")
        text = escape(text.strip("*") if strong else text)
        return f'<td class="{"number" if place > 2 else "text"}">{f"<strong>{text}</strong>" if strong else text}</td>'

    top = "".join(
        f'<th class="{"number" if place > 2 else "text"}">{escape(name)}</th>' for place, name in enumerate(head)
    )
    rest = "".join(f"<tr>{''.join(cell(*entry) for entry in enumerate(cells))}</tr>" for cells in body)
    return f'<div class="scroll"><table class="rows"><thead><tr>{top}</tr></thead><tbody>{rest}</tbody></table></div>'
