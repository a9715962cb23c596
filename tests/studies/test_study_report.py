"""Study reports, from made-up results."""

import dataclasses
import io
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode
from rich.console import Console

from bonn_qat.studies import figures, study, study_report
from bonn_qat.studies.comparison import Comparison
from bonn_qat.studies.study import Setting, Study, StudyArm
from bonn_qat.studies.study_report import SettingResult, StudyResult
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.results import RunResult

TITLES = {"float": "Full precision", "xnor": "XNOR-Net", "bonn": "BONN"}


def arm(variant: str, label: str = "", *, latents: str = "0.01", lr: float = 0.1, **paper: float) -> StudyArm:
    start = "float" if variant == "float" else latents
    return StudyArm(label=label, recipe=Recipe(latents=start, lr=lr).with_scheme(variant), paper=paper)


def run(arm: StudyArm, seed: int, top1: float, **metrics: float) -> RunResult:
    recipe = dataclasses.replace(arm.recipe, seed=seed)
    binary = {} if recipe.scheme == "float" else {"scale/conv": 0.1, "flips": 0.01}
    return RunResult(
        name=recipe.name,
        scheme=recipe.scheme_spec,
        title=TITLES.get(recipe.scheme_spec, recipe.scheme_spec),
        bits="1/1" if binary else "32/32",
        latents=recipe.latents,
        seed=seed,
        recipe=recipe.to_dict(),
        environment={"torch": "2.11", "commit": "0123abc"},
        seconds=1.0,
        epochs=[{"epoch": e, "train/top1": top1, "test/top1": top1, **binary, **metrics} for e in (1, 2)],
        size={"mbit": 1.0, "compression": 32.0, "macs": 10, "binary_macs": 9},
    )


def comparison(runs: Sequence[RunResult], missing: Sequence[str] = (), **changes: Any) -> Comparison:
    data = {"name": "digits", "classes": 10, "train": 1000, "test": 500, "image": [1, 8, 8]}
    planned = [*(run.name for run in runs), *missing]
    return Comparison(**{"directory": Path("nowhere"), "data": data, "planned": planned, "results": runs} | changes)


def setting(
    *found: tuple[StudyArm, Sequence[float]],
    search: Mapping[float, Sequence[float | None]] | None = None,
    paper: Sequence[StudyArm] = (),
    **metrics: float,
) -> SettingResult:
    """Arms with the accuracies of their seeds, and of a search: rate -> accuracy of each arm."""
    arms = tuple(one for one, _ in found)
    searched = {
        rate: comparison([run(one, 0, top1) for one, top1 in zip(arms, row, strict=True) if top1 is not None])
        for rate, row in (search or {}).items()
    }
    runs = [run(one, seed, top1, **metrics) for one, accuracies in found for seed, top1 in enumerate(accuracies)]
    named = Setting(name="small", title="Digits", arms=tuple(paper) or arms)
    return SettingResult(paper=named, arms=arms, comparison=comparison(runs), search=searched)


def whole(
    result: SettingResult, *, scale: float = 1.0, chain: bool = False, figures: Sequence[str] = ()
) -> StudyResult:
    mine = Study(
        name="mine", title="Mine & <b>yours</b>", source="", note="", seeds=1, chain=chain, figures=tuple(figures),
        settings=(result.paper,),
    )  # fmt: skip
    return StudyResult(study=mine, scale=scale, settings=(result,))


def cells(markdown: str) -> list[list[list[str]]]:
    """The tables of a page, each as rows of the texts of its cells, the heading first."""
    tree = SyntaxTreeNode(MarkdownIt("commonmark").enable("table").parse(markdown))
    rows = {"tr": [], "table": []}
    for node in tree.walk():
        if node.type == "table":
            rows["table"].append([])
        elif node.type == "tr":
            rows["table"][-1].append([])
        elif node.type in ("td", "th"):
            words = [inner.content for inner in node.walk() if inner.type in ("text", "text_special")]
            rows["table"][-1][-1].append("".join(words))
    return rows["table"]


FLOAT, XNOR, BONN = arm("float", top1=91.66), arm("xnor", "XNOR | <i>", top1=81.9, top5=99.0), arm("bonn")
THREE = ((FLOAT, (92.0, 91.0)), (XNOR, (80.0, 82.5)), (BONN, (85.0, 86.0)))


def test_a_row_has_mean_deviation_seeds_and_ours_minus_the_papers() -> None:
    full, xnor, bonn = study_report.rows(setting(*THREE), chain=False)
    assert [row.label for row in (full, xnor, bonn)] == ["Full precision", "XNOR | <i>", "BONN"]
    assert [row.latents for row in (full, xnor, bonn)] == ["", "0.01", "0.01"]
    assert (xnor.top1, xnor.std, xnor.seeds) == (fmean([80.0, 82.5]), stdev([80.0, 82.5]), 2)
    assert xnor.accuracy == "81.25 ± 1.77"
    assert [row.difference for row in (full, xnor, bonn)] == ["-0.16", "-0.65", ""]


def test_one_seed_has_no_deviation_and_no_verdict() -> None:
    xnor, bonn = study_report.rows(setting((XNOR, [80.0]), (BONN, [85.0])), chain=False)
    assert (xnor.std, xnor.accuracy) == (None, "80.00 (one seed)")
    assert str(xnor.against) == "XNOR | <i> is 5.00 points behind BONN: one seed, so no verdict"
    assert bonn.against is None


def test_rows_are_set_against_the_last_or_in_a_chain_against_the_one_above() -> None:
    plain, chained = (study_report.rows(setting(*THREE), chain=chain) for chain in (False, True))
    assert [row.against and row.against.mean for row in plain] == [6.0, -4.25, None]
    assert [row.against and row.against.mean for row in chained] == [None, -10.25, 4.25]
    assert [row.against and row.against.other for row in chained] == [None, "Full precision", "XNOR | <i>"]
    (table,) = cells(study_report.markdown(whole(setting(*THREE), chain=True)))
    assert [row[-1] for row in table] == ["to the row above", "", "-10.25", "+4.25"]
    text = study_report.markdown(whole(setting(*THREE), chain=True))
    assert f"\n- BONN: +4.25 points to the row above, {chained[2].against.verdict} (±" in text


def test_an_arm_without_a_run_has_no_row_and_nothing_is_set_against_it() -> None:
    rows = study_report.rows(setting((FLOAT, [92.0]), (XNOR, []), (BONN, [85.0])), chain=True)
    assert [(row.label, row.against and row.against.other) for row in rows] == [
        ("Full precision", None), ("BONN", "Full precision"),
    ]  # fmt: skip


def test_seeds_that_no_two_arms_share_give_no_difference() -> None:
    result = setting((XNOR, [80.0]), (BONN, [85.0]))
    runs = [run(XNOR, 0, 80.0), run(BONN, 1, 85.0)]
    result = dataclasses.replace(result, comparison=comparison(runs))
    page = study_report.markdown(whole(result, chain=True))
    assert [row[-1] for row in cells(page)[0]] == ["to the row above", "", ""]
    assert "- BONN and XNOR | &lt;i>: no common seed, so no verdict" in page


@pytest.mark.parametrize(
    ("rates", "lr", "star"),
    [([0.1, 0.2, 0.4], 0.1, True), ([0.1, 0.2, 0.4], 0.4, True), ([0.1, 0.2, 0.4], 0.2, False),
     ([0.1, 0.2], 0.1, False), ([], 0.1, False)],
)  # fmt: skip
def test_a_rate_at_the_edge_of_the_search_has_a_star(rates: list[float], lr: float, star: bool) -> None:
    one = arm("bonn", lr=lr)
    result = setting((one, [85.0]), search={rate: [50.0] for rate in rates})
    table, *_ = cells(study_report.markdown(whole(result)))
    assert table[1][table[0].index("lr")] == f"{lr:g}{'*' if star else ''}"


def test_the_search_is_a_table_with_the_best_rate_in_bold_and_what_failed() -> None:
    result = setting((arm("bonn", lr=0.2), [85.0]), (FLOAT, []), search={0.1: [50.0, 40.0], 0.2: [60.0, None]})
    page = study_report.markdown(whole(result))
    _, table = cells(page)
    assert table == [
        ["arm", "latents", "lr 0.1", "lr 0.2"], ["BONN", "0.01", "50.00", "60.00"],
        ["Full precision", "", "40.00", "failed"],
    ]  # fmt: skip
    assert "**60.00**" in page
    assert "<strong>60.00</strong>" in study_report.html(whole(result), {})
    assert study_report.accuracies(result.arms[0], result.search) == {0.1: 50.0, 0.2: 60.0}
    assert study_report.accuracies(FLOAT, result.search) == {0.1: 40.0}


def test_columns_of_the_papers_numbers_are_there_where_it_has_any() -> None:
    both = setting((FLOAT, [92.0]), (XNOR, [80.0]), **{"test/top5": 98.765})
    (head, full, xnor), = cells(study_report.markdown(whole(both)))  # fmt: skip
    places = [head.index(name) for name in ("paper top-1", "difference", "paper top-5", "top-5 (%)")]
    assert [full[place] for place in places] == ["91.66", "+0.34", "", "98.77"]
    assert [xnor[place] for place in places] == ["81.90", "-1.90", "99.0", "98.77"]
    (head, *_), = cells(study_report.markdown(whole(setting((FLOAT, [92.0]), **{"test/top5": 98.765}))))  # fmt: skip
    assert "difference" in head
    assert not {"paper top-5", "top-5 (%)"} & set(head)
    (head, *_), = cells(study_report.markdown(whole(setting((BONN, [92.0])))))  # fmt: skip
    assert not {"paper top-1", "difference"} & set(head)


def test_the_markdown_has_whole_tables_and_flat_lists_whatever_the_labels_are() -> None:
    result = setting((FLOAT, [92.0]), (XNOR, [80.0]), (arm("bonn", "+ a | b\n*c*"), [85.0]))
    page = study_report.markdown(whole(result, chain=True))
    (table,) = cells(page)
    assert len({len(row) for row in table}) == 1
    assert [row[0] for row in table] == ["arm", "Full precision", "XNOR | <i>", "+ a | b c"]
    nodes = list(SyntaxTreeNode(MarkdownIt("commonmark").enable("table").parse(page)).walk())
    assert sum(node.type == "bullet_list" for node in nodes) == 1
    assert sum(node.type == "list_item" for node in nodes) == 2
    assert "<i>" not in [node.content for node in nodes if node.type == "html_inline"]


def test_what_failed_and_what_is_missing_is_said() -> None:
    found = setting((XNOR, [80.0]), (BONN, [85.0]))
    states = dataclasses.replace(
        found.comparison, planned=[*found.comparison.planned, "bonn-0.01-seed1"], failures={"x-seed0": "it was <bad>"}
    )
    result = whole(dataclasses.replace(found, comparison=states))
    assert "\n- failed: x-seed0: it was" in study_report.markdown(result)
    assert "\n- missing: bonn-0.01-seed1\n" in study_report.markdown(result)
    assert "<li>failed: x-seed0: it was &lt;bad&gt;</li>" in study_report.html(result, {})


def test_arms_of_one_label_are_told_apart_by_their_start() -> None:
    result = setting((arm("xnor", latents="float"), [80.0]), (arm("xnor"), [81.0]), (BONN, [85.0]))
    first, second, _ = study_report.rows(result, chain=False)
    assert str(first.against).startswith("XNOR-Net (latents float) is 5.00 points behind BONN:")
    assert str(second.against).startswith("XNOR-Net (latents 0.01) is 4.00 points behind BONN:")


def test_changes_of_the_recipe_are_in_words() -> None:
    def changes(search: bool = False, **changed: Any) -> list[str]:
        recipe = dataclasses.replace(BONN.recipe, **changed)
        rates = {0.1: [50.0]} if search else None
        return study_report.changes(
            setting((dataclasses.replace(BONN, recipe=recipe), [85.0]), search=rates, paper=[BONN])
        )

    assert changes() == []
    assert changes(lr=0.2) == ["lr 0.2 instead of 0.1"]
    assert changes(lr=0.2, search=True) == ["lr searched for each arm instead of 0.1"]
    assert changes(train_images=9, validation_images=3) == [
        "train_images 9 instead of all", "validation_images 3 instead of 0",
    ]  # fmt: skip
    assert changes(milestones=(1, 2), compile="default") == [
        "milestones (1, 2) instead of none", "compile default instead of none",
    ]  # fmt: skip
    assert changes(scheme_options={"granularity": "plane"}) == [
        "scheme_options.granularity plane instead of the scheme's own"
    ]
    result = setting(
        (BONN, [85.0]), paper=[dataclasses.replace(BONN, recipe=dataclasses.replace(BONN.recipe, epochs=9))]
    )
    for scale, words in ((1.0, "Not the study's own"), (0.01, "At scale 0.01, not the study's own")):
        page = study_report.markdown(whole(result, scale=scale))
        assert f"\n{words} setting: epochs 30 instead of 9; 1,000 training and 500 test images.\n" in page
    assert "\nThe study's own setting; 1,000" in study_report.markdown(whole(setting((BONN, [85.0]))))


# Pages and figures


def test_the_page_escapes_what_others_wrote() -> None:
    result = whole(setting(*THREE), figures=["final"])
    page = study_report.html(result, {"small": study_report.pictures(result.settings[0], result.study)})
    assert "<h1>Mine &amp; &lt;b&gt;yours&lt;/b&gt;</h1>" in page
    assert ">XNOR | &lt;i&gt;</td>" in page
    assert "<i>" not in page
    assert "<b>" not in page


@pytest.mark.parametrize("shown", [["final", "sweep"], []])
def test_page_markdown_and_the_figures_named_are_written(tmp_path: Path, shown: list[str]) -> None:
    lines = [(arm(f"bonn:kernel={kernel}+feature=0", f"lambda {kernel}", top1=80.0), [79.0]) for kernel in (0, 0.1)]
    result = whole(setting(*lines), figures=shown)
    page = study_report.write(result, tmp_path)
    assert page == tmp_path / "mine.html"
    drawn = [f"mine-{name}-small.svg" for name in shown]
    assert {path.name for path in tmp_path.iterdir()} == {"mine.html", "mine.md", *drawn}
    for name in drawn:
        assert ElementTree.fromstring((tmp_path / name).read_text()).tag.endswith("svg")
        assert (tmp_path / name).read_text() in page.read_text()
    assert (tmp_path / "mine.md").read_text() == study_report.markdown(result)


def test_without_matplotlib_there_is_a_page_that_says_what_is_lacking(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = study_report.write(whole(setting(*THREE), figures=["final"]), tmp_path).read_text()
    assert "bonn-qat[compare]" in page
    assert "81.25 ± 1.77" in page
    assert not list(tmp_path.glob("*.svg"))


def test_a_study_of_which_nothing_is_finished_has_a_page(tmp_path: Path) -> None:
    result = whole(setting((XNOR, []), (BONN, [])), figures=["final", "accuracy", "sweep"])
    assert "Digits" in study_report.write(result, tmp_path).read_text()
    assert cells(study_report.markdown(result))[0] == [["arm", "W/A", "latents", "lr", "seeds", "top-1 (%)"]]


def texts(svg: str) -> list[str]:
    return ["".join(found.itertext()).strip() for found in ElementTree.fromstring(svg).iter()
            if found.tag.endswith("}text")]  # fmt: skip


def test_arms_of_one_scheme_have_their_own_labels_in_the_legend() -> None:
    result = setting((arm("xnor", "plain", latents="float"), [80.0]), (arm("xnor", "small latents"), [81.0]))
    (picture,) = study_report.pictures(result, whole(result, figures=["accuracy"]).study)
    assert {"plain", "small latents"} <= set(texts(picture.svg))
    same = setting((arm("xnor", latents="float"), [80.0]), (arm("xnor"), [81.0]))
    assert len(figures.colours(study_report._under_labels(result))) == 2
    assert len(figures.colours(study_report._under_labels(same))) == 1


def test_a_sweep_draws_the_paper_and_ours() -> None:
    points = [("bonn:kernel=0+feature=0", 70.0, 71.5), ("bonn:feature=0", 75.0, 76.5), ("bonn:feature=0.1", 76.0, None)]
    arms = [arm(variant, **({} if paper is None else {"top1": paper})) for variant, _, paper in points]
    result = setting(
        (FLOAT, [92.0]), *((one, [top1, top1 + 1]) for one, (_, top1, _) in zip(arms, points, strict=True))
    )
    found = study_report._sweep_points(result)
    assert [(point.kernel, point.feature, point.accuracies, point.paper) for point in found] == [
        (0.0, 0.0, (70.0, 71.0), 71.5), (1e-4, 0.0, (75.0, 76.0), 76.5), (1e-4, 0.1, (76.0, 77.0), None),
    ]  # fmt: skip
    (picture,) = study_report.pictures(result, whole(result, figures=["sweep"]).study)
    written = texts(picture.svg)
    assert {"ours", "paper", "0", "0.0001", "0.1"} <= set(written)
    assert [text for text in written if "theta" in text] == [
        "lambda, the kernel loss's weight (theta = 0)", "theta, the feature loss's weight (lambda = 0.0001)",
    ]  # fmt: skip
    points_drawn = len(re.findall(r"<use [^>]*#0072b2[^>]*>|<use [^>]*style=\"fill: #0072b2", picture.svg))
    assert points_drawn == 2 * 4  # two seeds of each of two arms in each of two panels
    unlike = dataclasses.replace(found[0], feature=0.5)
    assert figures.sweeps([unlike, found[1]]) is None  # no panel has two points
    alone = figures.sweeps([dataclasses.replace(point, paper=None) for point in found])
    assert alone
    assert "paper" not in texts(alone)


@pytest.mark.parametrize("name", study.names())
def test_the_tables_of_every_study_fit_a_terminal(name: str) -> None:
    shipped = study.load(name)
    settings = tuple(
        dataclasses.replace(setting(*((one, [88.9, 77.7]) for one in found.arms)), paper=found)
        for found in shipped.settings
    )
    console = Console(file=io.StringIO(), width=80)
    for found in settings:
        console.print(study_report.results(found, shipped))
    printed = console.file.getvalue()
    assert "…" not in printed
    assert all(len(line.rstrip()) <= 80 for line in printed.splitlines())
    assert printed.count("83.30 ± 7.92") == sum(len(found.arms) for found in shipped.settings)
