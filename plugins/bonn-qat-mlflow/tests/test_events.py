"""Events and their lines, and the file that keeps them."""

import json
import math
from collections import Counter

import pytest
from bonn_qat_mlflow import events, unsent
from bonn_qat_mlflow.events import ComparisonBegan, ComparisonEnded, EpochEnded, InvalidEvent, RunBegan, RunEnded
from hypothesis import given, settings
from hypothesis import strategies as st

BEGAN = RunBegan(
    time=2, run="r-1", name="bonn-seed0", recipe={"lr": 0.1, "skip": ["a"]}, comparison="wide", experiment="",
    parent_experiment=None, parent_run=None, store="http://u:***@h",
)  # fmt: skip
EVENTS = [
    ComparisonBegan(time=0, directory=".", above=None, experiment="digits", store=None),
    ComparisonBegan(time=1, directory="wide", above=".", experiment="digits", store=None),
    BEGAN,
    EpochEnded(time=3, run="r-1", epoch=1, metrics={"a": math.inf, "b": -math.inf, "c": 0.1 + 0.2, "ä/\ud800": -0.0}),
    RunEnded(time=4, run="r-1", status="FINISHED", report={"size": {"mbit": 0.5}, "epochs": [{"x": None}]}),
    RunEnded(time=4, run="r-2", status="KILLED", report=None),
    ComparisonEnded(time=5, directory="/elsewhere", status="FAILED", page=None),
    ComparisonEnded(time=6, directory=".", status="FINISHED", page="wide/report.html"),
]


@pytest.mark.parametrize("event", EVENTS, ids=lambda event: type(event).__name__)
def test_a_line_gives_the_event_back(event):
    line = events.to_line(event)
    assert line.count(b"\n") == 1
    assert line.endswith(b"\n")
    assert events.from_line(line) == event


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(), st.floats() | st.integers()), st.integers(0, 2**53 - 1))
def test_every_number_survives_its_line(metrics, time):
    event = events.from_line(events.to_line(EpochEnded(time=time, run="r", epoch=1, metrics=metrics)))
    assert list(event.metrics) == list(metrics)
    assert event.time == time
    for found, given_ in zip(event.metrics.values(), metrics.values(), strict=True):
        assert found == given_ or (math.isnan(found) and math.isnan(given_))


def test_a_snapshot_holds_what_was_and_makes_data_of_what_is_none():
    class Scalar:
        def __float__(self):
            return 0.5

    metrics = {"loss": Scalar(), "what": EVENTS, "nested": {(1, 2): 3}}
    event = events.snapshot(EpochEnded(time=0, run="r", epoch=1, metrics=metrics))
    metrics.clear()
    assert event.metrics == {"loss": 0.5, "what": [str(event) for event in EVENTS], "nested": {}}


def changed(**values):
    return json.dumps({**json.loads(events.to_line(BEGAN)), **values})


ENDED = json.loads(events.to_line(EVENTS[-1]))
WRONG = {
    "no JSON": "{",
    "too deep": "[" * 100_000,
    "a list": "[1]",
    "another format": changed(format=2),
    "another event": changed(event="__class__"),
    "an unknown key": changed(evil=1),
    "a time that is none": changed(time=True),
    "a time before all": changed(time=-1),
    "a recipe that is none": changed(recipe=[]),
    "an id with a quote": changed(run="' OR '"),
    "a missing key": json.dumps({"format": 1, "event": "EpochEnded", "time": 0, "run": "r"}),
    "a page above": json.dumps({**ENDED, "page": "../../etc/passwd"}),
    "a page elsewhere": json.dumps({**ENDED, "page": "/etc/passwd"}),
    "a page on a drive": json.dumps({**ENDED, "page": "c:\\passwords"}),
    "an unknown status": json.dumps({**ENDED, "status": "RUNNING"}),
}


@pytest.mark.parametrize("line", WRONG.values(), ids=WRONG)
def test_what_is_no_event_is_refused_by_its_line(line, tmp_path):
    path = tmp_path / unsent.NAME
    path.write_bytes(events.to_line(BEGAN) + line.encode() + b"\n" + events.to_line(BEGAN))
    before = path.read_bytes()
    taken = []
    for act in (lambda: unsent.check(path), lambda: unsent.send(path, taken.append)):
        with pytest.raises(unsent.InvalidFile, match=rf"{unsent.NAME}, line 2: [^\n]{{1,300}}$"):
            act()
    assert not taken
    assert path.read_bytes() == before


def test_a_line_without_end_is_refused_before_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(unsent, "LONGEST_LINE", 1000)
    path = tmp_path / unsent.NAME
    path.write_bytes(b" " * 2000)
    with pytest.raises(unsent.InvalidFile, match="line 1: above 1000 bytes"):
        unsent.check(path)
    monkeypatch.setattr(events, "LONGEST_LINE", 1000)
    with pytest.raises(InvalidEvent, match="allowed: 1000"):
        events.to_line(EpochEnded(time=0, run="r", epoch=1, metrics={"a" * 1000: 1}))


def sent(path):
    taken = []
    unsent.send(path, taken.append)
    assert not path.exists()
    return taken


def test_what_is_appended_is_sent_in_order_and_the_file_removed(tmp_path):
    path = tmp_path / unsent.NAME
    first = unsent.append(path, lambda start: EVENTS[:2])
    second = unsent.append(path, lambda start: EVENTS[2:5] if start == first.end else [])
    assert (first.start, second.start) == (0, first.end)
    assert second.end == path.stat().st_size
    content = unsent.check(path)
    assert (content.events, content.runs, content.stores) == (5, {"r-1"}, {"http://u:***@h"})
    assert sent(path) == EVENTS[:5]


def test_what_is_taken_out_is_ones_own_and_as_often_as_it_is_there(tmp_path):
    path = tmp_path / unsent.NAME
    mine, theirs, rest = EVENTS[:2], [EVENTS[1], EVENTS[2]], b'{"format": 1, "ev'
    lines = Counter(unsent.append(path, lambda start: mine).lines)
    others = unsent.append(path, lambda start: theirs).lines
    lines.update(unsent.append(path, lambda start: mine).lines)
    path.write_bytes(path.read_bytes() + rest)
    unsent.take_out(path, lines)
    assert path.read_bytes() == b"".join(others)
    unsent.take_out(path, Counter(others))
    assert not path.exists()
    unsent.take_out(path, Counter(others))


@pytest.mark.parametrize("rest", [b'{"format": 1, "ev', b"x" * 200_000], ids=["short", "long"])
def test_what_a_killed_process_left_of_a_line_is_no_event(rest, tmp_path):
    path = tmp_path / unsent.NAME
    whole = unsent.append(path, lambda start: EVENTS[:2]).end
    with path.open("ab") as file:
        file.write(rest)
    assert unsent.check(path).events == 2
    assert not unsent.remove(path, whole + len(rest))
    assert unsent.append(path, lambda start: EVENTS[2:3]).start == whole
    with path.open("ab") as file:
        file.write(rest)
    assert sent(path) == EVENTS[:3]


def test_what_comes_while_the_file_is_sent_is_sent_too(tmp_path):
    path = tmp_path / unsent.NAME
    late = list(EVENTS[1:])
    taken = []

    def take(event):
        taken.append(event)
        if late:
            unsent.append(path, lambda start: [late.pop(0)])
        with pytest.raises(unsent.Busy, match="another process is sending"):
            unsent.send(path, taken.append)

    unsent.append(path, lambda start: EVENTS[:1])
    unsent.send(path, take)
    assert taken == EVENTS
    assert not path.exists()


def test_a_file_that_could_not_be_sent_stays(tmp_path):
    path = tmp_path / unsent.NAME
    unsent.append(path, lambda start: EVENTS)
    taken = []

    def take(event):
        if len(taken) == 3:
            raise ConnectionError
        taken.append(event)

    with pytest.raises(ConnectionError):
        unsent.send(path, take)
    assert sent(path) == EVENTS
