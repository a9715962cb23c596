"""The store after events that are told again: by a run that goes on, from a file, or all of them."""

import math
import os
import sqlite3
from contextlib import closing
from types import SimpleNamespace

import pytest
from bonn_qat_mlflow import store, unsent
from bonn_qat_mlflow.__main__ import main
from bonn_qat_mlflow.events import ComparisonBegan, EpochEnded, RunBegan, RunEnded
from bonn_qat_mlflow.sender import Sender
from bonn_qat_mlflow.store import Store
from bonn_qat_mlflow.tracker import Tracker

from bonn_qat import plugins

# MLflow's own models, under SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")

RECIPE = SimpleNamespace(name="bonn-seed0", to_dict=lambda: {"model": "wrn10", "lr": 0.1, "skip": ["stem"]})
REPORT = {"seconds": 2.5, "size": {"mbit": 0.5}, "environment": {"commit": "abc"}, "epochs": []}
MANY = 5  # metrics, more than a batch has here


@pytest.fixture(autouse=True)
def _small_batches(monkeypatch):
    monkeypatch.setattr(store, "_METRICS_PER_BATCH", 4)


class Recording(Store):
    """A store that keeps what it is told."""

    def __init__(self, *place):
        super().__init__(*place)
        self.events = []

    def take(self, event):
        self.events.append(event)
        super().take(event)


def test_what_a_killed_process_left_of_a_database_is_removed_once_it_is_old(tmp_path):
    (tmp_path / "mlflow.db").touch()
    files = [tmp_path / name for name in (".mlflow.db.17", ".mlflow.db.17-journal", ".mlflow.db.18", "mlflow.db.17")]
    for file in files:
        file.touch()
    for file in [*files[:2], files[3]]:
        os.utime(file, (0, 0))
    store._make_database(tmp_path / "mlflow.db")
    assert {file.name for file in tmp_path.iterdir()} == {"mlflow.db", ".mlflow.db.18", "mlflow.db.17"}


def observed(connect=Store):
    """The hooks of a new program."""
    pm = plugins.create_manager(entry_points=False)
    tracker = Tracker(Sender(connect, patience=120.0))
    pm.register(tracker)
    return pm.hook


def metrics_of(epoch, many=2):
    return {"epoch": epoch, "train/loss": math.nan if epoch == 1 else 1 / epoch,
            **{f"scale/{i}": math.inf if i == 0 else i / epoch for i in range(many)}}  # fmt: skip


def run(hook, epochs, report=None, interrupted=False, many=2):
    hook.bonn_qat_before_run(recipe=RECIPE, model=None, run_id="abc-1")
    try:
        for epoch in range(1, epochs + 1):
            hook.bonn_qat_after_epoch(recipe=RECIPE, epoch=epoch, metrics=metrics_of(epoch, many))
        if interrupted:
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        hook.bonn_qat_after_run(recipe=RECIPE, result=None)
    else:
        hook.bonn_qat_after_run(recipe=RECIPE, result=report)


def comparison(hook, directory, *arguments, **options):
    inner = directory / "wide"
    inner.mkdir(exist_ok=True)
    (directory / "report.html").write_text("<p>done</p>")
    hook.bonn_qat_before_comparison(directory=directory, recipes=[])
    hook.bonn_qat_before_comparison(directory=inner, recipes=[])
    run(hook, *arguments, **options)
    hook.bonn_qat_after_comparison(directory=inner, page=inner / "none.html")
    hook.bonn_qat_after_comparison(directory=directory, page=directory / "report.html")


def dump(directory):
    """All that the database holds."""
    with closing(sqlite3.connect(directory / "mlflow.db")) as database:
        return list(database.iterdump())


def rows(directory, query):
    with closing(sqlite3.connect(directory / "mlflow.db")) as database:
        return database.execute(query).fetchall()


def test_all_events_told_again_leave_the_same_store(directory):
    stores = []

    def connect(*place):
        stores.append(Recording(*place))
        return stores[-1]

    comparison(observed(connect), directory, 2, interrupted=True, many=MANY)
    comparison(observed(connect), directory, 3, report=REPORT, many=MANY)
    told = [event for store in stores for event in store.events]
    before = dump(directory)
    assert len(rows(directory, "SELECT 1 FROM metrics")) == 3 * (2 + MANY) + 2
    for again in (told, told[:3] + told):  # by a store that knows nothing, and some twice by one
        other = Store(directory, None)
        for event in again:
            other.take(event)
        assert dump(directory) == before


def test_a_run_that_goes_on_is_the_same_run_and_has_each_epoch_once(directory):
    comparison(observed(), directory, 2, interrupted=True)
    assert rows(directory, "SELECT name, status FROM runs WHERE name = 'bonn-seed0'") == [("bonn-seed0", "KILLED")]
    comparison(observed(), directory, 3, report=REPORT)  # which tells the first two epochs again
    assert sorted(rows(directory, "SELECT name, status FROM runs")) == [
        ("bonn-seed0", "FINISHED"), ("digits", "FINISHED"), ("wide", "FINISHED"),
    ]  # fmt: skip
    ((identity,),) = rows(directory, "SELECT run_uuid FROM runs WHERE name = 'bonn-seed0'")
    tags = dict(rows(directory, f"SELECT key, value FROM tags WHERE run_uuid = '{identity}'"))
    assert tags["bonn_qat.run_id"] == "abc-1"
    for key in ("epoch", "train/loss", "scale/1"):
        logged = rows(directory, f"SELECT step, is_nan FROM metrics WHERE key = '{key}' ORDER BY step")
        assert logged == [(1, key == "train/loss"), (2, 0), (3, 0)]


def test_a_run_that_goes_on_is_running_and_what_was_before_changes_no_status(directory):
    store = Store(directory, None)
    began = RunBegan(
        time=1, run="r", name="a", recipe={"lr": 1}, comparison=None, experiment="e", parent_experiment=None,
        parent_run=None, store=None,
    )  # fmt: skip
    store.take(began)
    store.take(RunEnded(time=5, run="r", status="KILLED", report=None))

    def status():
        return rows(directory, "SELECT status, start_time, end_time FROM runs")

    assert status() == [("KILLED", 1, 5)]
    Store(directory, None).take(began)  # told again
    assert status() == [("KILLED", 1, 5)]
    going_on = RunBegan(**{**vars(began), "time": 6, "recipe": {"lr": 2, "new": 1}})
    Store(directory, None).take(going_on)
    assert status() == [("RUNNING", 1, 5)]
    assert sorted(rows(directory, "SELECT key, value FROM params")) == [("lr", "1"), ("new", "1")]
    last = Store(directory, None)
    for event in (
        going_on,
        RunEnded(time=9, run="r", status="FINISHED", report=None),
        RunEnded(time=5, run="r", status="KILLED", report=None),
    ):
        last.take(event)
    assert status() == [("FINISHED", 1, 9)]


def test_an_epoch_of_which_the_store_has_a_part_is_completed(directory):
    began = RunBegan(
        time=1, run="r", name="a", recipe={}, comparison=None, experiment="e", parent_experiment=None,
        parent_run=None, store=None,
    )  # fmt: skip
    first = Store(directory, None)
    first.take(began)
    log_batch = first._client.log_batch

    def lost(run, metrics):
        if metrics[-1].key == "epoch":
            raise ConnectionError
        log_batch(run, metrics=metrics)

    first._client.log_batch = lost
    with pytest.raises(ConnectionError):
        first.take(EpochEnded(time=2, run="r", epoch=1, metrics=metrics_of(1, MANY)))
    again = Store(directory, None)
    again.take(RunBegan(**{**vars(began), "time": 3}))
    again.take(EpochEnded(time=4, run="r", epoch=1, metrics=metrics_of(1, MANY)))
    assert rows(directory, "SELECT COUNT(*), COUNT(DISTINCT key) FROM metrics") == [(MANY + 2, MANY + 2)]
    assert rows(directory, "SELECT DISTINCT timestamp FROM metrics WHERE key = 'epoch'") == [(4,)]


def test_the_command_sends_what_a_store_that_was_away_did_not_get(directory, tmp_path, monkeypatch, capsys):
    database = directory / "mlflow.db"
    comparison(observed(), directory, 1, interrupted=True)
    away = tmp_path / "away"
    database.rename(away)
    database.mkdir()  # which no database can be opened in
    with pytest.warns(RuntimeWarning) as caught:
        comparison(observed(), directory, 3, report=REPORT)
    assert len(caught) == 1
    path = directory / unsent.NAME
    capsys.readouterr()
    assert main([str(path)]) == 1
    assert path.exists()
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)

    database.rmdir()
    away.rename(database)
    assert main([str(directory)]) == 0
    assert f"9 events of 1 runs sent to sqlite:///{database}" in capsys.readouterr().out
    assert not path.exists()
    assert {status for (status,) in rows(directory, "SELECT status FROM runs")} == {"FINISHED"}
    logged = rows(directory, "SELECT step, value FROM metrics WHERE key = 'epoch' ORDER BY step")
    assert logged == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert len(rows(directory, "SELECT 1 FROM metrics WHERE key = 'scale/0' AND value > 1e300")) == 3
    assert (directory / "mlartifacts").rglob("report.html")
    assert main([str(path)]) == 0
    assert "nothing to send" in capsys.readouterr().out


def test_the_command_sends_to_the_store_that_is_named(directory, tmp_path, capsys, monkeypatch):
    began = ComparisonBegan(time=1, directory=".", above=None, experiment="mine", store="http://u:***@server")
    path = tmp_path / unsent.NAME
    unsent.append(path, lambda start: [began])
    assert main([str(path)]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "http://u:***@server" in said
    assert path.exists()
    uri = f"sqlite:///{directory}/mlflow.db"
    assert main([str(path), "--tracking-uri", uri]) == 0
    assert capsys.readouterr().out == f"1 events of 0 runs sent to {uri}\n"
    assert not path.exists()
    assert rows(directory, "SELECT name FROM experiments WHERE name = 'mine'") == [("mine",)]


def test_the_command_refuses_what_is_no_file_of_events(tmp_path, capsys):
    path = tmp_path / unsent.NAME
    path.write_text('{"format": 1, "event": "exec"}\n')
    for given, words in ((path, "line 1: event 'exec'"), (tmp_path / "none.jsonl", "none.jsonl")):
        assert main([str(given)]) == 2
        said = capsys.readouterr()
        assert (said.out, said.err.count("\n")) == ("", 1)
        assert words in said.err
    assert path.exists()
