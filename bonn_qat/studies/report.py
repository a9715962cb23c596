"""Report: the results of a comparison as a table and as a page, with how certain they are."""

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2

from bonn_qat import plotting
from bonn_qat.files.atomic import write_text
from bonn_qat.studies import figures, statistics
from bonn_qat.studies.comparison import PAGE, Comparison
from bonn_qat.tables import Column, Table, facts


def results(comparison: Comparison) -> Table:
    """A row for each arm that has a finished run."""
    columns = [
        Column("scheme", text=True, wraps=True), Column("bits W/A", text=True), Column("latents", text=True),
        Column("seeds"), Column("test top-1 (%)"), Column("size (Mbit)"), Column("times smaller"),
        Column("binary MACs", drop=1), Column("flips (%/epoch)"), Column("s/epoch", drop=2),
    ]  # fmt: skip
    rows = [
        (row.title, row.bits, row.latents, str(len(row.seeds)), row.accuracy, f"{row.mbit:.2f}",
         f"{row.compression:.1f}", f"{row.binary_share:.1%}", "-" if row.flips is None else f"{row.flips:.2f}",
         f"{row.seconds_per_epoch:.1f}")
        for row in statistics.rows(comparison)
    ]  # fmt: skip
    return Table(columns, rows, title=_title(comparison))


def html(comparison: Comparison) -> str:
    """The page; without matplotlib it says so in place of the figures."""
    finished = {run.name for run in comparison.results}
    # A run that failed once and was finished later is no problem.
    unfinished = [(name, why) for name, why in comparison.failures.items() if name not in finished]
    unfinished += [(name, "not run yet, or interrupted") for name in comparison.missing]
    pictures: list[plotting.Picture] = []
    no_figures = ""
    try:
        pictures = figures.pictures(comparison)
    except plotting.MatplotlibMissing as error:
        no_figures = str(error)
    labels, firsts = statistics.labels(comparison), [arm[0] for arm in statistics.arms(comparison)]
    return render(
        "comparison",
        title=_title(comparison),
        setting=_setting(comparison),
        finished=len(finished),
        planned=len(comparison.planned),
        seeds=max((len(row.seeds) for row in statistics.rows(comparison)), default=0),
        unfinished=unfinished,
        results=results(comparison),
        differences=statistics.differences(comparison),
        pictures=pictures,
        no_figures=no_figures,
        recipes=[(labels[r.arm], json.dumps(r.recipe, indent=2, default=str, ensure_ascii=False)) for r in firsts],
        environment=facts((key, " · ".join(values)) for key, values in environment(comparison).items()),
    )


def write_report(comparison: Comparison) -> Path:
    """Write the page into the comparison's directory."""
    return write_text(comparison.directory / PAGE, html(comparison))


def render(template: str, **values: Any) -> str:
    """One of the templates beside this module, as HTML; all text in ``values`` is escaped."""
    return _templates().get_template(f"{template}.html.jinja").render(values)


def environment(comparison: Comparison) -> dict[str, list[str]]:
    """What the runs recorded about code and machine; each key with every value that it had."""
    seen: dict[str, dict[str, None]] = {}
    for run in comparison.results:
        for key, value in run.environment.items():
            seen.setdefault(key, {})[str(value)] = None
    return {key: list(values) for key, values in seen.items()}


@functools.cache
def _templates() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("bonn_qat.studies"), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip


def _title(comparison: Comparison) -> str:
    return f"1-bit networks compared on {comparison.data['name']}"


def _setting(comparison: Comparison) -> str:
    """The line below the title: images, epochs and seeds."""
    data, runs = comparison.data, [run for arm in statistics.arms(comparison) for run in arm]
    images = f"{data['train']:,} training and {data['test']:,} test images of {' x '.join(map(str, data['image']))}"
    parts = [f"{data['classes']} classes", images]
    if runs:
        parts += [_counted("epoch", (len(run.epochs) for run in runs)), _named("seed", (run.seed for run in runs))]
    return " · ".join(parts)


def _counted(noun: str, counts: Iterable[int]) -> str:
    distinct = sorted(set(counts))
    return f"{' to '.join(map(str, dict.fromkeys((distinct[0], distinct[-1]))))} {noun}{'s' * (distinct[-1] != 1)}"


def _named(noun: str, numbers: Iterable[int]) -> str:
    distinct = sorted(set(numbers))
    return f"{noun}{'s' * (len(distinct) != 1)} {', '.join(map(str, distinct))}"
