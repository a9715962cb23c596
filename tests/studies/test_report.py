import dataclasses
import io
import math
import re
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from bonn_qat.errors import UnknownName
from bonn_qat.studies import report, statistics
from bonn_qat.studies.comparison import Comparison
from bonn_qat.studies.statistics import LARGER, NO_SEED, ONE_SEED, WITHIN
from bonn_qat.training.results import RunResult

VOID = {"meta", "br", "link", "img"}


def run(scheme: str, seed: int, top1: float, **changes: Any) -> RunResult:
    scale = {} if scheme == "float" else {"scale/conv": 0.1}
    values: dict[str, Any] = {
        "name": f"{scheme}-{changes.get('latents', '0.01')}-{seed}",
        "scheme": scheme,
        "title": scheme.upper(),
        "bits": "1/1",
        "latents": "0.01",
        "seed": seed,
        "recipe": {"model": "bonn_wrn22", "seed": seed},
        "environment": {"commit": "0123abc", "torch": "2.11"},
        "seconds": 8.0,
        "epochs": [{"epoch": e, "test/top1": top1, "train/top1": top1} | scale for e in (1, 2)],
        "size": {"mbit": 2.0, "float_mbit": 50.0, "compression": 25.0, "macs": 200, "binary_macs": 190 if scale else 0},
    }
    return RunResult(**values | changes)


def arm(scheme: str, accuracies: Sequence[float], **changes: Any) -> list[RunResult]:
    return [run(scheme, seed, top1, **changes) for seed, top1 in enumerate(accuracies)]


def comparison(*results: RunResult, missing: Sequence[str] = (), test: int = 10_000, **changes: Any) -> Comparison:
    data = {"name": "digits", "classes": 10, "train": 1000, "test": test, "image": [1, 8, 8]}
    planned = [result.name for result in results] + list(missing)
    values: dict[str, Any] = {"directory": Path("nowhere"), "data": data, "planned": planned, "results": results}
    return Comparison(**values | changes)


class Page(HTMLParser):
    """Checks the nesting of a page's elements, and keeps its text and its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.text = ""
        self.attributes: list[tuple[str, str]] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def printed(of: Comparison, width: int = 200) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(report.results(of))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize("n", [2, 3, 7])
def test_rows_hold_mean_and_sample_deviation(n: int) -> None:
    accuracies = np.random.default_rng(n).uniform(40, 90, n).tolist()
    (row,) = statistics.rows(comparison(*arm("bonn", accuracies)))
    assert row.top1 == pytest.approx(np.mean(accuracies))
    assert row.std == pytest.approx(np.std(accuracies, ddof=1))
    assert row.seeds == tuple(range(n))
    assert (row.mbit, row.compression, row.binary_share, row.seconds_per_epoch) == (2.0, 25.0, 0.95, 4.0)


def test_flips_are_the_mean_over_epochs_and_seeds_in_percent() -> None:
    epochs = [[{"epoch": 1, "test/top1": 1.0, "flips": a}, {"epoch": 2, "test/top1": 1.0, "flips": b}]
              for a, b in ((0.5, 0.1), (0.3, 0.1))]  # fmt: skip
    (row,) = statistics.rows(comparison(*(run("bonn", seed, 0, epochs=e) for seed, e in enumerate(epochs))))
    assert row.flips == pytest.approx(25.0)
    assert statistics.rows(comparison(run("float", 0, 0, epochs=[{"epoch": 1, "test/top1": 1.0}])))[0].flips is None


def test_one_seed_has_no_deviation() -> None:
    (row,) = statistics.rows(comparison(run("bonn", 0, 61.234)))
    assert row.std is None
    assert row.accuracy == "61.23"


def test_the_accuracy_is_that_of_the_last_epoch() -> None:
    epochs = [{"epoch": 1, "test/top1": 70.0}, {"epoch": 2, "test/top1": 60.0}]
    assert statistics.rows(comparison(run("float", 0, 0, epochs=epochs)))[0].top1 == 60.0


def test_rows_stand_in_the_planned_order() -> None:
    results = [*arm("float", [90, 91]), *arm("bonn", [80, 81]), *arm("bonn", [70, 71], latents="float")]
    of = dataclasses.replace(comparison(*results), results=results[::-1])
    assert [(row.scheme, row.top1) for row in statistics.rows(of)] == [
        ("float", 90.5),
        ("bonn", 80.5),
        ("bonn", 70.5),
    ]


def test_differences_are_paired_by_seed() -> None:
    ours, theirs = [80.0, 70.0, 90.0], [79.0, 68.0, 89.5]
    (found,) = statistics.differences(comparison(*arm("bonn", ours), *arm("xnor", theirs)))
    paired = np.subtract(ours, theirs)
    assert found.mean == pytest.approx(paired.mean())
    assert found.std == pytest.approx(paired.std(ddof=1))
    assert found.seed_margin == pytest.approx(4.303 * paired.std(ddof=1) / math.sqrt(3))
    p, q = np.mean(ours) / 100, np.mean(theirs) / 100
    assert found.test_margin == pytest.approx(196 * math.sqrt((p * (1 - p) + q * (1 - q)) / 10_000))


def test_the_spread_over_seeds_is_that_of_a_two_way_analysis_of_variance() -> None:
    table = np.random.default_rng(0).normal(60, 3, (5, 4)) + np.array([0, 2, -1, 4])
    names = ["bonn", "xnor", "pcnn", "bireal", "float"]
    runs = [one for name, row in zip(names, table.tolist(), strict=True) for one in arm(name, row)]
    # The residuals of a least-squares fit of an effect per arm and one per seed.
    arms, seeds = np.repeat(np.eye(5), 4, axis=0), np.tile(np.eye(4), (5, 1))
    _, squares, rank, _ = np.linalg.lstsq(design := np.hstack([arms, seeds[:, 1:]]), table.ravel())
    assert (rank, design.shape) == (8, (20, 8))
    for found in statistics.differences(comparison(*runs, run("tbn", 0, 10.0))):
        if found.other != "TBN":
            assert found.std is not None  # but TBN has one seed: the block is of the others' pairs
    for found in statistics.differences(comparison(*runs)):
        assert found.std == pytest.approx(math.sqrt(2 * squares[0] / 12))
        assert found.dof == 12
        assert found.seed_margin == pytest.approx(2.179 * found.std / 2)


def test_the_spread_of_two_arms_is_that_of_their_paired_differences() -> None:
    one, other = {0: 1.0, 1: 4.0, 2: 2.0, 5: 9.0}, {0: 3.0, 1: 3.0, 2: 7.0}
    std, dof = statistics.residual_spread([one, other]) or (0.0, 0)
    assert (std, dof) == (pytest.approx(np.std([-2.0, 1.0, -5.0], ddof=1)), 2)
    assert statistics.residual_spread([one]) is statistics.residual_spread([]) is None
    assert statistics.residual_spread([one, {5: 1.0}]) is None


def test_seeds_that_one_arm_lacks_do_not_count() -> None:
    (found,) = statistics.differences(comparison(*arm("bonn", [80.0, 70.0, 60.0]), run("xnor", 1, 65.0)))
    assert found.by_seed == {1: 5.0}
    assert found.verdict == ONE_SEED
    (found,) = statistics.differences(comparison(run("bonn", 0, 80.0), run("xnor", 1, 65.0)))
    assert math.isnan(found.mean)
    assert found.verdict == NO_SEED
    assert "nan" not in str(found)


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(("factor", "verdict"), [(0.99, WITHIN), (1.01, LARGER)])
def test_the_verdict_flips_at_the_margin_of_the_seeds(sign: int, factor: float, verdict: str) -> None:
    spread = np.array([-3.0, 0.0, 3.0])
    margin = 4.303 * 3.0 / math.sqrt(3)
    theirs = 50 - sign * factor * margin - spread
    (found,) = statistics.differences(comparison(*arm("bonn", [50.0] * 3), *arm("xnor", theirs.tolist()), test=10**8))
    assert found.verdict == verdict


@pytest.mark.parametrize(("factor", "verdict"), [(0.99, WITHIN), (1.01, LARGER)])
def test_the_verdict_flips_at_the_margin_of_the_test_images(factor: float, verdict: str) -> None:
    margin = 196 * math.sqrt(2 * 0.25 / 100)
    half = factor * margin / 2
    (found,) = statistics.differences(
        comparison(*arm("bonn", [50 + half] * 3), *arm("xnor", [50 - half] * 3), test=100)
    )
    assert found.seed_margin == pytest.approx(0, abs=1e-9)
    assert found.test_margin == pytest.approx(margin, rel=0.02)
    assert (abs(found.mean) > found.test_margin) == (found.verdict == LARGER)
    close = dataclasses.replace(found, test_margin=abs(found.mean) / factor)
    assert close.verdict == verdict


def test_quantiles_fall_towards_the_normal_one_and_never_below() -> None:
    quantiles = [statistics.student(dof) for dof in range(1, 200)]
    assert quantiles == sorted(quantiles, reverse=True)
    assert len(statistics.STUDENT) == 30
    assert min(quantiles) > statistics.NORMAL


def test_bonn_is_set_against_arms_of_the_same_start_and_against_float() -> None:
    results = [run("float", 0, 90.0, latents="float")]
    results += [run(scheme, 0, 50.0, latents=start) for start in ("0.01", "float") for scheme in ("bonn", "xnor")]
    found = [(d.reference, d.other) for d in statistics.differences(comparison(*results))]
    assert len(found) == len(set(found)) == 4
    starts = [[re.search(r"\((.*)\)", name) for name in pair] for pair in found]
    assert [pair[0][1] == pair[1][1] for pair in starts if pair[0] and pair[1]] == [True, True]
    assert [other for _, other in found].count("FLOAT") == 2


def test_an_arm_whose_start_no_bonn_shares_is_not_left_out() -> None:
    (found,) = statistics.differences(comparison(run("bonn", 0, 50.0), run("xnor", 0, 60.0, latents="float")))
    assert found.mean == -10


def test_a_chosen_reference_is_set_against_all_others() -> None:
    of = comparison(run("bonn", 0, 50.0), run("xnor", 0, 60.0), run("pcnn", 0, 55.0, latents="float"))
    assert [d.mean for d in statistics.differences(of, ("xnor", "0.01"))] == [10.0, 5.0]
    with pytest.raises(UnknownName, match=r"xnor/0\.02.*bonn/0\.01"):
        statistics.differences(of, ("xnor", "0.02"))


def test_the_table_shows_titles_as_they_are() -> None:
    shown = printed(comparison(*arm("bonn", [60.0, 62.0], title="[bold]<b>")))
    assert "[bold]<b>" in shown
    assert "61.00 ± 1.41" in shown


def test_the_table_fits_a_terminal_and_says_what_it_leaves_out() -> None:
    of = comparison(*arm("float", [90.0, 91.0]), *arm("bonn", [60.0, 62.0], title="BONN with a long title of its own"))
    lines = printed(of, 80).splitlines()
    assert all(len(line.rstrip()) <= 80 for line in lines)
    assert lines[-1] == "not shown at this width: binary MACs, s/epoch"
    assert "61.00 ± 1.41" in printed(of, 80)
    assert "not shown" not in printed(of)


MARKUP = "<b>\"&'<script>"
PAGES = {
    "whole": comparison(*arm("float", [90.0, 91.0]), *arm("bonn", [80.0, 81.0]), *arm("xnor", [70.0, 71.0])),
    "one run of one epoch": comparison(run("bonn", 0, 50.0, epochs=[{"epoch": 1, "test/top1": 50.0}])),
    "float alone": comparison(run("float", 0, 90.0)),
    "no bonn": comparison(run("xnor", 0, 90.0)),
    "runs of different lengths": comparison(
        run("bonn", 0, 9.0), run("xnor", 0, 9.0, epochs=[{"epoch": 1, "test/top1": 9}])
    ),
    "nothing planned": comparison(),
    "nothing finished": comparison(missing=["bonn-0.01-0"]),
    "all failed": comparison(missing=["bonn-0.01-0"], failures={"bonn-0.01-0": "TrainingDiverged: NaN"}),
    "markup": comparison(
        run("bonn", 0, 50.0, title=MARKUP, bits=MARKUP, recipe={MARKUP: MARKUP}, environment={MARKUP: MARKUP}),
        run("xnor", 0, 50.0, title=MARKUP, latents=MARKUP),
        missing=[MARKUP, "other"],
        failures={"other": MARKUP},
        data={"name": MARKUP, "classes": 1, "train": 1, "test": 1, "image": [MARKUP]},
    ),
}


@pytest.mark.parametrize("case", PAGES)
def test_the_page_is_well_formed_and_stands_alone(case: str) -> None:
    page = report.html(PAGES[case])
    parsed = Page(page)
    assert page.startswith("<!DOCTYPE html>")
    assert {"title", "h1", "style"} <= set(parsed.seen)
    assert not {"link", "img", "iframe", "object", "image"} & set(parsed.seen)
    assert re.findall("<script.*?</script>", page, re.DOTALL) == re.findall(
        "<script>.*?</script>", report.html(PAGES["nothing planned"]), re.DOTALL
    )
    loading = [v for k, v in parsed.attributes if k in ("src", "href", "xlink:href", "data") and not v.startswith("#")]
    assert loading == []
    assert "http" not in re.sub(r'xmlns(:xlink)?="[^"]*"', "", page)
    assert "@import" not in page
    ids = [value for name, value in parsed.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_text_is_shown_as_it_was_given() -> None:
    page = report.html(PAGES["markup"])
    assert "<b>" not in page
    assert Page(page).text.count(MARKUP) >= 8


def test_a_notebook_shows_table_differences_and_what_is_missing() -> None:
    page = PAGES["markup"]._repr_html_()
    assert "<b>" not in page
    assert MARKUP in Page(page).text
    of = comparison(*arm("bonn", [50.0]), *arm("xnor", [49.0]), missing=["lost-0"], failures={"broken-0": "<NaN>"})
    text = Page(of._repr_html_()).text
    assert "BONN is 1.00 points ahead of XNOR" in text
    assert "failed: broken-0: <NaN>" in text
    assert "missing: lost-0" in text


def test_runs_that_are_not_there_are_named_before_the_results() -> None:
    of = comparison(*arm("bonn", [50.0]), missing=["lost-0", "broken-0"], failures={"broken-0": "loss became NaN"})
    text = Page(report.html(of)).text
    top = text[text.index("Incomplete") : text.index("Results")]
    assert "1 of 3 planned runs" in top
    assert "lost-0: not run yet" in top
    assert "broken-0: loss became NaN" in top


def test_a_run_that_was_finished_after_a_failure_is_not_named_as_lost() -> None:
    of = comparison(run("bonn", 0, 50.0), failures={"bonn-0.01-0": "interrupted"})
    assert "Incomplete" not in Page(report.html(of)).text


def test_a_page_without_results_says_so() -> None:
    text = Page(report.html(PAGES["nothing finished"])).text
    assert "No run is finished" in text
    assert "bonn-0.01-0" in text


def test_the_page_states_verdict_recipe_and_environment() -> None:
    text = Page(report.html(PAGES["whole"])).text
    for needed in ("BONN is 10.00 points ahead of XNOR", "behind FLOAT", LARGER, "bonn_wrn22", "0123abc", "Fig. 6"):
        assert needed in text
    assert "Incomplete" not in text


def test_an_environment_that_changed_shows_all_it_was() -> None:
    of = comparison(run("bonn", 0, 1.0), run("bonn", 1, 1.0, environment={"commit": "fedc"}))
    assert "0123abc · fedc" in Page(report.html(of)).text


def test_without_matplotlib_the_page_keeps_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    text = Page(report.html(PAGES["whole"])).text
    assert "bonn-qat[compare]" in text
    assert "80.50 ± 0.71" in text


def test_the_page_is_written_beside_the_runs(tmp_path: Path) -> None:
    of = dataclasses.replace(PAGES["nothing finished"], directory=tmp_path)
    path = report.write_report(of)
    assert path == tmp_path / "report.html"
    assert path.read_text(encoding="utf-8") == report.html(of)
