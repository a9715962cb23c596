"""Report: what a comparison says and how sure one can be of it, as rows, as a terminal table and as a page."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean, stdev

from rich.table import Table
from rich.text import Text

from bonn_qat import figures
from bonn_qat.errors import UnknownName
from bonn_qat.plain import printable
from bonn_qat.results import PAGE, Comparison, RunResult, write_text

REFERENCE = "bonn"
NORMAL = 1.96  # two-sided 95% quantile
# Two-sided 95% quantiles of Student's t for 1, 2, ... 30 degrees of freedom; beyond, the last one is a little strict.
STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
NO_SEED, ONE_SEED = "no seed in common: no statement", "one seed: no statement"
LARGER, WITHIN = "larger than the noise", "within the noise"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One arm: its finished seeds taken together. ``top1`` and ``std`` are in percent, ``mbit`` in 10^6 bits."""

    scheme: str
    title: str
    bits: str  # weights/activations
    latents: str
    seeds: tuple[int, ...]
    top1: float
    std: float | None  # sample standard deviation over the seeds; None for one seed
    mbit: float
    compression: float
    binary_share: float  # of the MACs, 0 to 1
    flips: float | None  # percent of the binary weights whose sign an epoch changed, mean over epochs and seeds
    seconds_per_epoch: float

    @property
    def accuracy(self) -> str:
        """Mean ± standard deviation in percent."""
        return f"{self.top1:.2f} ± {'n/a' if self.std is None else f'{self.std:.2f}'}"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Accuracy of a reference arm minus that of another, in points, by seed; and how much of it may be noise."""

    reference: str
    other: str
    by_seed: dict[int, float]
    test_images: int
    test_margin: float  # points; half a 95% interval for the choice of test images, as if each arm had its own
    std: float | None  # of one paired difference, in points: what the choice of the seed is worth; None if unknown
    dof: int  # degrees of freedom that ``std`` was estimated with

    @property
    def mean(self) -> float:
        """Mean over the seeds that both arms have; NaN if there is none."""
        return fmean(self.by_seed.values()) if self.by_seed else math.nan

    @property
    def seed_margin(self) -> float | None:
        """Half of the 95% interval of the mean that the seeds alone give, in points; None for fewer than two."""
        n = len(self.by_seed)
        return None if self.std is None or n < 2 else student(self.dof) * self.std / math.sqrt(n)

    @property
    def verdict(self) -> str:
        """Whether the mean stands out of both noises, that of the seeds and that of the test images."""
        if self.seed_margin is None:
            return ONE_SEED if self.by_seed else NO_SEED
        return LARGER if abs(self.mean) > max(self.seed_margin, self.test_margin) else WITHIN

    @property
    def statement(self) -> str:
        """What was seen: which arm is ahead, and by how much."""
        if not self.by_seed:
            return f"{self.reference} and {self.other}"
        if self.mean == 0:
            return f"{self.reference} is level with {self.other}"
        side = "ahead of" if self.mean > 0 else "behind"
        return f"{self.reference} is {abs(self.mean):.2f} points {side} {self.other}"

    @property
    def noise(self) -> str:
        """How large the two noises are; empty where nothing is stated."""
        if self.seed_margin is None:
            return ""
        seeds = f"±{self.seed_margin:.2f} from {len(self.by_seed)} seeds"
        return f"{seeds}, ±{self.test_margin:.2f} from {self.test_images:,} test images"

    def __str__(self) -> str:
        return f"{self.statement}: {self.verdict}" + (f" ({self.noise})" if self.noise else "")


def student(dof: int) -> float:
    """Two-sided 95% quantile of Student's t distribution with ``dof`` degrees of freedom."""
    return STUDENT[min(dof, len(STUDENT)) - 1]


def statistics(comparison: Comparison) -> list[Row]:
    """One row per arm with a finished run, in the planned order."""
    return [_statistics(arm) for arm in figures.arms(comparison)]


def differences(comparison: Comparison, reference: tuple[str, str] | None = None) -> list[Difference]:
    """Paired differences of a reference arm (scheme, latents) against every other arm.

    Without ``reference``: each BONN arm against the arms whose latent weights start alike and against float
    networks; an arm whose start no BONN arm shares is set against all of them.
    The spread over the seeds is estimated from all arms together (:func:`residual_spread`), where two seeds are common
    to them; else from the two arms alone. Raises UnknownName if no run of ``reference`` is finished.
    """
    arms = {arm[0].arm: arm for arm in figures.arms(comparison)}
    if reference is not None and reference not in arms:
        raise UnknownName("arm", "/".join(reference), map("/".join, arms))
    plain = [key for key in arms if key[0] == REFERENCE]
    references = [reference] if reference else plain or [key for key in arms if key[0].startswith(f"{REFERENCE}:")]
    return [
        _difference(comparison, arms[one], arms[other])
        for one in references
        for other in arms
        if other not in references and (reference or _comparable(arms[other][0], one, references))
    ]


def difference(comparison: Comparison, reference: tuple[str, str], other: tuple[str, str]) -> Difference:
    """The paired difference of two arms, each (scheme, latents), as in :func:`differences`.

    Raises UnknownName for an arm without a finished run.
    """
    arms = {arm[0].arm: arm for arm in figures.arms(comparison)}
    for arm in (reference, other):
        if arm not in arms:
            raise UnknownName("arm", "/".join(arm), map("/".join, arms))
    return _difference(comparison, arms[reference], arms[other])


def residual_spread(arms: Sequence[Mapping[int, float]]) -> tuple[float, int] | None:
    """Standard deviation of one paired difference and its degrees of freedom, from ``arms``: seed -> accuracy.

    The residual of accuracy less the arm's mean, less the seed's mean, over the A arms and the n seeds that all of
    them have (a randomized block design): ``sqrt(2 S / d)`` with S the sum of squares and ``d = (A - 1)(n - 1)``. It
    takes the spread to be the same in all arms; of two arms it is that of their paired differences. None if d is 0.
    """
    common = sorted(set.intersection(*(set(arm) for arm in arms))) if arms else []
    dof = (len(arms) - 1) * (len(common) - 1)
    if not common or dof < 1:
        return None
    grand = fmean(arm[seed] for arm in arms for seed in common)
    effects = {seed: fmean(arm[seed] for arm in arms) - grand for seed in common}
    squares = 0.0
    for arm in arms:
        mean = fmean(arm[seed] for seed in common)
        squares += sum((arm[seed] - mean - effects[seed]) ** 2 for seed in common)
    return math.sqrt(2 * squares / dof), dof


def terminal_table(comparison: Comparison) -> Table:
    """The rows as a table for rich to print, in 80 characters: all columns but those of :data:`PAGE_ONLY`."""
    table = Table(title=Text(printable(_heading(comparison))), box=None, padding=(0, 2, 0, 0), pad_edge=False)
    columns = [column for column in COLUMNS if column[0] not in PAGE_ONLY]
    for heading, numeric, _ in columns:
        table.add_column(heading.replace(" ", "\n"), justify="right" if numeric else "left", no_wrap=True)
    for row in statistics(comparison):
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


def _statistics(arm: figures.Arm) -> Row:
    first, accuracies = arm[0], [run.top1 for run in arm]
    return Row(
        scheme=first.scheme,
        title=first.title,
        bits=first.bits,
        latents=first.latents if figures.binary_layers(first) else "-",
        seeds=tuple(run.seed for run in arm),
        top1=fmean(accuracies),
        std=stdev(accuracies) if len(arm) > 1 else None,
        mbit=first.size["mbit"],
        compression=first.size["compression"],
        binary_share=first.size["binary_macs"] / max(first.size["macs"], 1),
        flips=_flips(arm),
        seconds_per_epoch=fmean(run.seconds / len(run.epochs) for run in arm),
    )


def _flips(arm: figures.Arm) -> float | None:
    shares = [epoch["flips"] for run in arm for epoch in run.epochs if "flips" in epoch]
    return 100 * fmean(shares) if shares else None


def _comparable(other: RunResult, reference: tuple[str, str], references: Iterable[tuple[str, str]]) -> bool:
    shared = {latents for _, latents in references}
    return not figures.binary_layers(other) or other.latents == reference[1] or other.latents not in shared


def _difference(comparison: Comparison, reference: figures.Arm, other: figures.Arm) -> Difference:
    names, images = figures.labels(comparison), int(comparison.data["test"])
    ours, theirs = ({run.seed: run.top1 for run in arm} for arm in (reference, other))
    shares = [fmean(accuracies.values()) / 100 for accuracies in (ours, theirs)]
    everyone = [{run.seed: run.top1 for run in arm} for arm in figures.arms(comparison)]
    std, dof = residual_spread(everyone) or residual_spread([ours, theirs]) or (None, 0)
    return Difference(
        reference=names[reference[0].arm],
        other=names[other[0].arm],
        by_seed={seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())},
        test_images=images,
        test_margin=100 * NORMAL * math.sqrt(sum(p * (1 - p) for p in shares) / images),
        std=std,
        dof=dof,
    )


def _heading(comparison: Comparison) -> str:
    return f"1-bit networks compared on {comparison.data['name']}"


def _setting(comparison: Comparison) -> str:
    """The line below the heading: images, epochs and seeds."""
    data, runs = comparison.data, [run for arm in figures.arms(comparison) for run in arm]
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
    rows = statistics(comparison)
    if not rows:
        return "<section><h2>Results</h2><p>No run is finished yet, so there is nothing to show.</p></section>"
    return f"<section><h2>Results</h2>{_table(rows)}<p class='note'>{LEGEND}</p>{_verdicts(comparison)}</section>"


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
    except figures.MatplotlibMissing as error:
        return f'<section class="box open"><p>{escape(str(error))}</p></section>'
    if not pictures:
        return ""
    return "<section><h2>Figures</h2>" + "".join(map(figure, pictures)) + "</section>"


def figure(picture: figures.Picture) -> str:
    """A picture with title and caption, as HTML."""
    caption = f"<figcaption>{escape(picture.caption)}</figcaption>"
    return f'<h3>{escape(picture.title)}</h3><figure><div class="scroll">{picture.svg}</div>{caption}</figure>'


def _recipes(comparison: Comparison) -> str:
    names = figures.labels(comparison)
    items = "".join(
        f"<details><summary>{escape(names[arm[0].arm])}</summary><pre>{escape(_recipe(arm[0]))}</pre></details>"
        for arm in figures.arms(comparison)
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
