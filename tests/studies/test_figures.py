import dataclasses
import functools
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from bonn_qat import plotting
from bonn_qat.errors import BonnQatError
from bonn_qat.studies import figures, statistics
from bonn_qat.studies.comparison import Comparison
from bonn_qat.training.results import RunResult

LAYERS = ("first", "second", "third", "fourth")
TITLES = {"float": "Float", "bonn": "BONN", "xnor": "XNOR-Net"}


def histogram(counts: tuple[int, ...] = (1, 4, 1, 4, 1)) -> dict[str, list[float]]:
    return {"edges": [0.01 * (i - len(counts) / 2) for i in range(len(counts) + 1)], "counts": list(counts)}


def run(scheme: str, seed: int = 0, *, epochs: int = 3, latents: str = "0.01", **changes: Any) -> RunResult:
    layers = () if scheme == "float" else LAYERS
    records = [
        {"epoch": e, "train/top1": 30.0 + e, "test/top1": 20.0 + e + seed}
        | {f"scale/{layer}": 0.1 / e for layer in layers}
        | ({"flips": 0.1 / e} if layers else {})
        for e in range(1, epochs + 1)
    ]
    values: dict[str, Any] = {
        "name": f"{scheme}-{latents}-{seed}",
        "scheme": scheme,
        "title": TITLES.get(scheme, scheme),
        "bits": "1/1" if layers else "32/32",
        "latents": latents,
        "seed": seed,
        "recipe": {},
        "environment": {},
        "seconds": 6.0,
        "epochs": records,
        "size": {"mbit": 1.0, "compression": 32.0, "macs": 100, "binary_macs": 90 if layers else 0},
        "histograms": {layer: {str(e): histogram() for e in range(epochs + 1)} for layer in LAYERS},
    }
    return RunResult(**values | changes)


def comparison(*results: RunResult, missing: tuple[str, ...] = ()) -> Comparison:
    data = {"name": "digits", "classes": 10, "train": 1000, "test": 500, "image": [1, 8, 8]}
    planned = [result.name for result in results] + list(missing)
    return Comparison(directory=Path("nowhere"), data=data, planned=planned, results=results)


def dead() -> RunResult:
    return dataclasses.replace(run("xnor"), epochs=[{"epoch": 1, "test/top1": 10.0, "scale/first": 0.0}])


CASES = {
    "two seeds": comparison(*(run(s, seed) for s in TITLES for seed in (0, 1))),
    "two starts": comparison(run("float"), *(run(s, latents=x) for s in ("bonn", "xnor") for x in ("0.01", "float"))),
    "one run of one epoch": comparison(run("bonn", epochs=1)),
    "a missing seed": comparison(run("bonn", 0), run("bonn", 1), run("xnor", 1), missing=("xnor-0.01-0",)),
    "seeds of different lengths": comparison(run("bonn", 0, epochs=2), run("bonn", 1, epochs=5)),
    "float alone": comparison(run("float")),
    "float without histograms": comparison(run("float", histograms={}), run("bonn")),
    "no histograms at all": comparison(run("float", histograms={}), run("bonn", histograms={})),
    "an empty histogram": comparison(run("bonn", histograms={"first": {"0": histogram((0, 0)), "1": histogram()}})),
    "one value": comparison(run("bonn", histograms={"first": {"0": {"edges": [0.1, 0.1], "counts": [5]}}})),
    "markup": comparison(
        run("bonn", title="<b> & $x$ 'n' \"q\""), run("_x", title="_hidden $5"), run("y", title="漢字")
    ),
    "more schemes than colours": comparison(*(run(f"scheme{i}", title="long title " * 9) for i in range(13))),
    "other layers": comparison(run("bonn"), run("xnor", histograms={"elsewhere": {"0": histogram()}})),
    "a scale of zero": comparison(dead()),
}


@functools.cache
def drawn(case: str) -> list[plotting.Picture]:
    return figures.pictures(CASES[case])


def svg_of(case: str, name: str) -> str:
    (svg,) = (picture.svg for picture in drawn(case) if picture.name == name)
    return svg


def texts(svg: str) -> list[str]:
    return [
        "".join(element.itertext()) for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("}text")
    ]


@pytest.mark.parametrize("case", CASES)
def test_every_picture_is_one_xml_element_with_ids_of_its_own(case: str) -> None:
    assert drawn(case)
    ids: list[str] = []
    for picture in drawn(case):
        root = ElementTree.fromstring(picture.svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert "width" not in root.attrib
        assert picture.caption
        ids += [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
        links = re.findall(r'(?:href="#|url\(#)([^")]+)', picture.svg)
        assert set(links) <= set(ids)
    assert len(ids) == len(set(ids))


def test_no_picture_has_mathematical_text_of_which_matplotlib_keeps_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.mathtext import MathTextParser

    def parse(self: Any, text: str, *args: Any, **kwargs: Any) -> None:
        raise AssertionError(text)

    monkeypatch.setattr(MathTextParser, "parse", parse)
    assert all(draw(CASES["two starts"]) for draw in figures.DRAWINGS.values())


def test_the_same_comparison_gives_the_same_bytes() -> None:
    assert figures.pictures(CASES["float alone"]) == drawn("float alone")


def test_nothing_finished_draws_nothing() -> None:
    assert figures.pictures(comparison(missing=("bonn-0.01-0",))) == []


def test_float_networks_have_no_binary_values() -> None:
    assert {picture.name for picture in drawn("float alone")} == {"final", "accuracy", "histograms"}
    svg = svg_of("two seeds", "values")
    assert "BONN" in texts(svg)
    assert "Float" not in texts(svg)


def test_flips_are_drawn_for_binary_networks_alone() -> None:
    svg = svg_of("two seeds", "flips")
    assert "BONN" in texts(svg)
    assert "Float" not in texts(svg)
    assert figures.flip_ratios(CASES["float alone"]) is None
    assert figures.flip_ratios(comparison(dead())) is None  # a result of an earlier version has none


def test_schemes_of_one_colour_have_line_styles_of_their_own_and_no_training_curves() -> None:
    crowded = CASES["more schemes than colours"]
    looks = {(figures.colours(crowded)[name], str(style)) for name, style in figures.strokes(crowded).items()}
    assert len(looks) == 13
    assert "train" in texts(svg_of("two seeds", "accuracy"))
    assert "train" not in texts(svg_of("more schemes than colours", "accuracy"))


def test_titles_are_drawn_as_they_are_written() -> None:
    svg = svg_of("markup", "accuracy")
    assert "<b>" not in svg
    assert {"<b> & $x$ 'n' \"q\"", "_hidden $5", "漢字"} <= {text.strip() for text in texts(svg)}


def test_layers_are_the_first_the_middle_and_the_last() -> None:
    for name in ("histograms", "values"):
        assert [text for text in texts(svg_of("two seeds", name)) if text in LAYERS] == ["first", "third", "fourth"]


def test_snapshots_are_few_and_hold_both_ends() -> None:
    svg = figures.latent_histograms(comparison(run("bonn", epochs=40)))
    assert svg
    assert {"epoch 0", "40"} <= set(texts(svg))
    assert texts(svg).count("40") == 3
    assert (
        len(re.findall(r"\b(?:epoch )?\d+\b", " ".join(t for t in texts(svg) if "." not in t))) == 3 * figures.SNAPSHOTS
    )


def test_a_scheme_has_one_colour_and_no_two_share_one() -> None:
    mixed = CASES["two starts"]
    colours = figures.colours(mixed)
    assert len(set(colours.values())) == len(colours) == 3
    assert colours["bonn"] == plotting.HERO_COLOUR
    assert colours["float"] == plotting.FLOAT_COLOUR
    for name in ("accuracy", "values", "final"):
        assert all(colours[scheme].lower() in svg_of("two starts", name) for scheme in ("bonn", "xnor"))


def test_the_band_reaches_from_the_worst_to_the_best_seed() -> None:
    assert figures._series([run("bonn", seed) for seed in (0, 3, 1)], "test/top1")[2] == [22.0, 25.0, 23.0]


def test_arms_stand_in_the_planned_order_whatever_the_order_of_the_results() -> None:
    shuffled = dataclasses.replace(CASES["two seeds"], results=CASES["two seeds"].results[::-1])
    assert [arm[0].scheme for arm in statistics.arms(shuffled)] == ["float", "bonn", "xnor"]
    assert [[r.seed for r in arm] for arm in statistics.arms(shuffled)] == [[0, 1]] * 3


def test_labels_name_the_start_only_where_it_tells_arms_apart() -> None:
    assert set(statistics.labels(CASES["two seeds"]).values()) == set(TITLES.values())
    assert len(set(statistics.labels(CASES["two starts"]).values())) == 5


def test_without_matplotlib_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(BonnQatError, match=r"bonn-qat\[compare\]"):
        figures.pictures(CASES["two seeds"])


def test_drawing_leaves_the_settings_of_matplotlib_alone() -> None:
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.pictures(CASES["float alone"])
    assert dict(matplotlib.rcParams) == before
