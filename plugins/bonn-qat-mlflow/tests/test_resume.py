"""The store after a run that resumes, and after a process or a connection that died in the middle."""

from dataclasses import replace

import pytest
from bonn_qat_mlflow.sender import Sender
from bonn_qat_mlflow.store import LoggedRun, Store, _make_database
from bonn_qat_mlflow.sync import finished
from bonn_qat_mlflow.tracker import Tracker
from bonn_qat_mlflow.where import place_of

from bonn_qat import plugins

# MLflow's own models, under SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


@pytest.fixture
def program(rehearsed):
    """A new program that compares."""

    def program():
        pm = plugins.create_manager(entry_points=False)
        pm.register(Tracker(Sender(patience=600.0, short=600.0)))
        return rehearsed.Rehearsal(pm.hook)

    return program


def interrupted(rehearsal, directory, one, epochs):
    def go():
        with rehearsal.comparison(directory, one):
            try:
                raise KeyboardInterrupt
            finally:
                rehearsal.run(one, epochs=epochs, failure="interrupted")

    with pytest.raises(KeyboardInterrupt):
        go()


def test_a_run_that_goes_on_is_the_same_run_and_has_each_epoch_once(directory, program, rehearsed):
    one = rehearsed.recipe()
    interrupted(program(), directory, one, epochs=1)
    assert rehearsed.stored(directory)["runs"] == [(one.name, "KILLED"), ("digits", "KILLED")]
    program().whole(directory, one)  # which tells the first epoch again
    found = rehearsed.stored(directory)
    assert found["runs"] == [(one.name, "FINISHED"), ("digits", "FINISHED")]
    assert found["tags"][one.name]["bonn_qat.run_id"] == f"id-{one.name}"
    for key in ("epoch", "train/loss", "test/loss"):
        logged = rehearsed.rows(directory, f"SELECT step, is_nan FROM metrics WHERE key = '{key}' ORDER BY step")
        assert logged == [(1, key == "test/loss"), (2, key == "test/loss")]


def test_a_run_that_goes_on_is_running_again(directory, rehearsed):
    store = Store(place_of(directory))
    run = LoggedRun("r", "a", {"lr": 1}, directory, 1.0, "KILLED", 5.0)

    def status():
        return rehearsed.rows(directory, "SELECT status, start_time FROM runs WHERE name = 'a'")

    store.log_run(run)
    assert status() == [("KILLED", 1000)]
    store.log_run(replace(run, status=""))  # as from a checkpoint
    assert status() == [("KILLED", 1000)]
    Store(place_of(directory)).log_run(replace(run, status="RUNNING", recipe={"lr": 1, "new": 1}))
    assert status() == [("RUNNING", 1000)]
    assert sorted(rehearsed.rows(directory, "SELECT key, value FROM params")) == [("lr", "1"), ("new", "1")]


def test_nothing_changes_a_run_of_which_the_store_has_everything(directory, rehearsed):
    one = rehearsed.recipe()
    rehearsed.Rehearsal().whole(directory, one)
    run = finished(directory, rehearsed.result_of(one))
    store = Store(place_of(directory))
    store.log_run(run)
    before = rehearsed.stored(directory)
    for status in ("RUNNING", "KILLED", ""):  # what another process knew before
        store.log_run(replace(run, status=status, result=None, epochs=run.epochs[:1]))
    assert rehearsed.stored(directory) == before


def test_an_epoch_of_which_the_store_has_a_part_is_completed(directory, rehearsed):
    """The connection was lost between two batches; of what is sent again the store keeps one."""
    store = Store(place_of(directory))
    run = LoggedRun("r", "a", {}, directory, 1.0, epochs=[(2.0, rehearsed.metrics_of(1))])
    log_batch = store._client.log_batch

    def lost(run, metrics=(), **others):
        log_batch(run, metrics=[metric for metric in metrics if metric.key != "epoch"], **others)
        if metrics:
            raise ConnectionError

    store._client.log_batch = lost
    with pytest.raises(ConnectionError):
        store.log_run(run)
    counts = "SELECT COUNT(*), COUNT(DISTINCT key) FROM metrics"
    assert rehearsed.rows(directory, counts) == [(5, 5)]
    Store(place_of(directory)).log_run(run)
    assert rehearsed.rows(directory, counts) == [(6, 6)]


def test_what_a_killed_process_left_of_a_database_is_made_anew(new_store, tmp_path):
    """MLflow cannot continue with half of its tables, so they are created under another name."""
    for name in (".mlflow.db.new", ".mlflow.db.new-journal"):
        (tmp_path / name).write_text("half")
    _make_database(tmp_path / "mlflow.db")
    assert [file.name for file in tmp_path.iterdir()] == ["mlflow.db"]
    (tmp_path / "mlflow.db").write_text("whole")
    _make_database(tmp_path / "mlflow.db")
    assert (tmp_path / "mlflow.db").read_text() == "whole"
