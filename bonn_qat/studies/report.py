"""Report: what a comparison says and how sure one can be of it, as rows, as a terminal table and as a page."""

import json
from collections.abc import Callable, Iterable
from html import escape
from pathlib import Path

from rich.table import Table
from rich.text import Text

from bonn_qat import plotting
from bonn_qat.files.atomic import write_text
from bonn_qat.files.plain import printable
from bonn_qat.studies import figures, statistics
from bonn_qat.studies.comparison import PAGE, Comparison
from bonn_qat.studies.statistics import Row, differences, rows
from bonn_qat.training.results import RunResult


def terminal_table(comparison: Comparison) -> Table:
    """The rows as a table for rich to print, in 80 characters: all columns but those of :data:`PAGE_ONLY`."""
    table = Table(title=Text(printable(_heading(comparison))), box=None, padding=(0, 2, 0, 0), pad_edge=False)
    columns = [column for column in COLUMNS if column[0] not in PAGE_ONLY]
    for heading, numeric, _ in columns:
        table.add_column(heading.replace(" ", "\n"), justify="right" if numeric else "left", no_wrap=True)
    for row in rows(comparison):
        table.add_row(*(Text(printable(cell(row))) for _, _, cell in columns))
    return table


def html_report(comparison: Comparison) -> str:
    """A page that stands alone: no scripts, and nothing that is loaded from elsewhere."""
    heading = _heading(comparison)
    body = "\n".join(
        (
            f"<header><h1>{escape(heading)}</h1><p>{escape(_setting(comparison))}</p></header>",
            _state(comparison),
            _results(comparison),
            _figures(comparison),
            _recipes(comparison),
            _environment(comparison),
        )
    )
    return page(heading, body)


def page(title: str, body: str) -> str:
    """A whole HTML document in the reports' style; ``title`` is text, ``body`` is HTML."""
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{CSS}</style>
</head>
<body>
{body}
</body>
</html>
"""


def write_report(comparison: Comparison) -> Path:
    """Write the page into the comparison's directory."""
    return write_text(comparison.directory / PAGE, html_report(comparison))


COLUMNS: tuple[tuple[str, bool, Callable[[Row], str]], ...] = (
    ("scheme", False, lambda row: row.title),
    ("bits W/A", False, lambda row: row.bits),
    ("latents", False, lambda row: row.latents),
    ("seeds", True, lambda row: str(len(row.seeds))),
    ("test top-1 (%)", True, lambda row: row.accuracy),
    ("size (Mbit)", True, lambda row: f"{row.mbit:.2f}"),
    ("times smaller", True, lambda row: f"{row.compression:.1f}"),
    ("binary MACs", True, lambda row: f"{row.binary_share:.1%}"),
    ("flips (%/epoch)", True, lambda row: "-" if row.flips is None else f"{row.flips:.2f}"),
    ("s/epoch", True, lambda row: f"{row.seconds_per_epoch:.1f}"),
)
PAGE_ONLY = ("binary MACs", "s/epoch")
LEGEND = (
    "Accuracy is that after the last epoch, mean ± sample standard deviation over the seeds; no epoch was chosen by "
    "looking at the test set. Latents: the standard deviation that the real-valued weights behind the signs start "
    "with, or “float” for the float network's own start; the start alone can be worth points, so compare like with "
    "like. One learning rate serves all arms; it may suit one better than another. “Times smaller” is against 32-bit "
    "floats. Flips: the part of the binary weights whose sign at the end of an epoch is not that of its beginning, "
    "mean over the epochs. Seconds are wall time, with whatever else the machine did."
)
METHOD = (
    "Differences are paired by seed. A difference counts as larger than the noise if it exceeds both 95% margins: "
    "that of the seeds (Student's t; the spread of paired differences is estimated from all arms together, as if it "
    "were the same for all) and that of the test images (binomial, as if each arm had its own images; the arms share "
    "theirs, so this errs on the strict side). Of twenty differences that are nothing but noise, one may still pass."
)
CSS = """
:root { color-scheme: light; --ink: #1b1f24; --soft: #59636e; --line: #d9dee3; --card: #f6f8fa; }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 62rem; background: #fff; color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .3rem; }
h2 { font-size: 1.25rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 .4rem; }
header p, figcaption, .note { color: var(--soft); }
figcaption, .note { font-size: .9rem; max-width: 46rem; }
.box { border-left: .3rem solid #2f7d4f; background: #eef7f1; padding: .6rem 1rem; margin: 1rem 0; }
.box.open { border-color: #b35900; background: #fff4e5; }
.box h2 { margin: 0 0 .3rem; font-size: 1.05rem; }
.box p, .box ul { margin: 0; }
.box li { overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; }
th, td { padding: .4rem .7rem; text-align: left; border-bottom: 1px solid var(--line); }
.rows td { white-space: nowrap; }
.rows th { vertical-align: bottom; }
.rows td:first-child { white-space: normal; min-width: 7rem; }
thead th { color: var(--soft); font-weight: 600; border-bottom: 2px solid var(--line); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.verdicts { padding-left: 1.2rem; }
.verdicts li { margin: .35rem 0; }
.verdicts strong { white-space: nowrap; }
.verdicts small { color: var(--soft); }
figure { margin: 0 0 1rem; break-inside: avoid; }
figure svg { display: block; width: 100%; min-width: 42rem; height: auto; }
details { border: 1px solid var(--line); border-radius: .3rem; margin: .4rem 0; padding: .4rem .8rem; }
summary { cursor: pointer; }
pre { overflow-x: auto; background: var(--card); padding: .8rem; font-size: .85rem; }
tbody th { width: 12rem; }
td { overflow-wrap: anywhere; }
@media print { body { max-width: none; padding: 0; } figure svg { min-width: 0; } .scroll { overflow: visible; } }
"""


def _heading(comparison: Comparison) -> str:
    return f"1-bit networks compared on {comparison.data['name']}"


def _setting(comparison: Comparison) -> str:
    """The line below the heading: images, epochs and seeds."""
    data, runs = comparison.data, [run for arm in statistics.arms(comparison) for run in arm]
    parts = [
        f"{data['classes']} classes",
        f"{data['train']:,} training and {data['test']:,} test images of {' x '.join(map(str, data['image']))}",
    ]
    if runs:
        parts += [_counted("epoch", (len(run.epochs) for run in runs)), _named("seed", (run.seed for run in runs))]
    return " · ".join(parts)


def _counted(noun: str, counts: Iterable[int]) -> str:
    low, *_, high = sorted([*(distinct := sorted(set(counts))), distinct[-1]])
    return f"{low if low == high else f'{low} to {high}'} {noun}{'' if high == 1 else 's'}"


def _named(noun: str, numbers: Iterable[int]) -> str:
    distinct = sorted(set(numbers))
    return f"{noun}{'' if len(distinct) == 1 else 's'} {', '.join(map(str, distinct))}"


def _state(comparison: Comparison) -> str:
    """A box that says whether the comparison is whole, and names every run that is not in it."""
    planned, done = len(comparison.planned), {run.name for run in comparison.results}
    # A run that failed once and was finished later is not lost.
    lost = [(name, why) for name, why in comparison.failures.items() if name not in done]
    lost += [(name, "not run yet, or interrupted") for name in comparison.missing]
    if not lost:
        return f'<section class="box"><p>Complete: {planned} of {planned} planned runs are finished.</p></section>'
    items = "".join(f"<li><strong>{escape(name)}</strong>: {escape(why)}</li>" for name, why in lost)
    return (
        f'<section class="box open"><h2>Incomplete: {len(done)} of {planned} planned runs are finished</h2>'
        f"<ul>{items}</ul></section>"
    )


def _results(comparison: Comparison) -> str:
    found = rows(comparison)
    if not found:
        return "<section><h2>Results</h2><p>No run is finished yet, so there is nothing to show.</p></section>"
    return f"<section><h2>Results</h2>{_table(found)}<p class='note'>{LEGEND}</p>{_verdicts(comparison)}</section>"


def _table(rows: Iterable[Row]) -> str:
    kinds = ["number" if numeric else "text" for _, numeric, _ in COLUMNS]
    head = "".join(f'<th class="{kind}">{name}</th>' for kind, (name, _, _) in zip(kinds, COLUMNS, strict=True))
    body = "".join(
        "<tr>"
        + "".join(f'<td class="{k}">{escape(cell(row))}</td>' for k, (_, _, cell) in zip(kinds, COLUMNS, strict=True))
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table class="rows"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _verdicts(comparison: Comparison) -> str:
    found = differences(comparison)
    if not found:
        return "<p>BONN and another arm are not both finished, so no difference can be stated.</p>"
    items = "".join(
        f"<li>{escape(d.statement)}: <strong>{d.verdict}</strong>"
        + (f" <small>({escape(d.noise)})</small>" if d.noise else "")
        + "</li>"
        for d in found
    )
    return f'<h3>BONN against the others</h3><ul class="verdicts">{items}</ul><p class="note">{METHOD}</p>'


def _figures(comparison: Comparison) -> str:
    try:
        pictures = figures.pictures(comparison)
    except plotting.MatplotlibMissing as error:
        return f'<section class="box open"><p>{escape(str(error))}</p></section>'
    if not pictures:
        return ""
    return "<section><h2>Figures</h2>" + "".join(map(figure, pictures)) + "</section>"


def figure(picture: plotting.Picture) -> str:
    """A picture with title and caption, as HTML."""
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>"
    return f'<h3>{escape(picture.title)}</h3><figure><div class="scroll">{picture.svg}</div>{caption}</figure>'


def _recipes(comparison: Comparison) -> str:
    names = statistics.labels(comparison)
    items = "".join(
        f"<details><summary>{escape(names[arm[0].arm])}</summary><pre>{escape(_recipe(arm[0]))}</pre></details>"
        for arm in statistics.arms(comparison)
    )
    note = '<p class="note">As recorded by the first seed of each arm; the others differ in the seed.</p>'
    return f"<section><h2>Recipes</h2>{note}{items}</section>" if items else ""


def _recipe(run: RunResult) -> str:
    return json.dumps(run.recipe, indent=2, default=str, ensure_ascii=False)


def _environment(comparison: Comparison) -> str:
    """What the runs recorded about code and machine; a value that changed between runs shows all it was."""
    seen: dict[str, dict[str, None]] = {}
    for run in comparison.results:
        for key, value in run.environment.items():
            seen.setdefault(key, {})[str(value)] = None
    rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(' · '.join(values))}</td></tr>" for k, values in seen.items())
    return f"<section><h2>Environment</h2><table><tbody>{rows}</tbody></table></section>" if rows else ""
