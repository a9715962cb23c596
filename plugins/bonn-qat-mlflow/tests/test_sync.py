"""What a comparison's directory brings into the store, once or again, live or later."""

import json
import shutil
import sqlite3
import threading
from contextlib import closing

import pytest
from bonn_qat_mlflow.__main__ import main
from bonn_qat_mlflow.sender import Sender
from bonn_qat_mlflow.store import Store
from bonn_qat_mlflow.sync import read_all, sync
from bonn_qat_mlflow.tracker import Tracker
from bonn_qat_mlflow.where import place_of

from bonn_qat import plugins
from bonn_qat.training.checkpoint import Progress, RunState, write_state

# MLflow's own models, under SQLAlchemy 2.1.
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy:DeprecationWarning")


@pytest.fixture
def live():
    """The hooks of a new program."""

    def hooks():
        pm = plugins.create_manager(entry_points=False)
        pm.register(Tracker(Sender(patience=600.0, short=600.0)))
        return pm.hook

    return hooks


def dump(directory):
    """All that the database holds."""
    with closing(sqlite3.connect(directory / "mlflow.db")) as database:
        return list(database.iterdump())


def test_sync_alone_brings_what_live_logging_does_and_the_second_time_nothing(
    directory, live, rehearsed, tmp_path, capsys, new_store
):
    recipes = [rehearsed.recipe(), rehearsed.recipe(1)]
    rehearsed.Rehearsal(live()).whole(directory, *recipes)
    expected = rehearsed.stored(directory)
    assert {status for _, status in expected["runs"]} == {"FINISHED"}
    times = {when for *_, when in expected["metrics"]}
    assert times == {1000 * (rehearsed.started + second) for second in (10, 20)}
    before = dump(directory)
    assert main(["sync", str(directory)]) == 0
    assert dump(directory) == before

    other = tmp_path / "other" / "digits"
    shutil.copytree(directory, other, ignore=shutil.ignore_patterns("mlflow.db", "mlartifacts"))
    shutil.copy(new_store[0] / "mlflow.db", other)
    capsys.readouterr()
    assert main(["sync", str(other)]) == 0
    uri = f"sqlite:///{other}/mlflow.db"
    assert capsys.readouterr().out == f"2 runs of {other} are in {uri}, experiment digits\n"
    assert rehearsed.stored(other) == expected
    before = dump(other)
    assert main(["sync", str(other)]) == 0
    assert dump(other) == before


def test_artifacts_are_the_files_byte_for_byte(directory, rehearsed):
    rehearsed.Rehearsal().whole(directory, rehearsed.recipe())
    assert main(["sync", str(directory)]) == 0
    files = {name: content for _, name, content in rehearsed.stored(directory)["artifacts"]}
    result = directory / "runs" / "bonn-scheme-seed0.json"
    assert json.loads(result.read_bytes())["format"] == 1
    assert files == {
        result.name: result.read_bytes(), "bonn-scheme-seed0.safetensors": b"weights", "report.html": b"<p>done</p>",
    }  # fmt: skip


def test_a_result_of_an_earlier_version_is_sent_once(directory, rehearsed):
    rehearsed.Rehearsal().whole(directory, rehearsed.recipe())
    path = directory / "runs" / "bonn-scheme-seed0.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: content[key] for key in content if key not in ("run_id", "started", "times")}))
    for _ in range(2):
        assert main(["sync", str(directory)]) == 0
    assert rehearsed.stored(directory)["runs"] == [("bonn-scheme-seed0", "FINISHED"), ("digits", "FINISHED")]
    assert len(rehearsed.rows(directory, "SELECT 1 FROM metrics WHERE key = 'epoch'")) == 2


def test_an_unfinished_run_is_running_with_the_epochs_of_its_checkpoint(directory, rehearsed):
    one = rehearsed.recipe()
    result = rehearsed.result_of(one)
    rehearsed.plan(directory, one)
    progress = Progress(
        run_id=result.run_id, recipe=one.to_dict(), data={}, stage=0, step=0, epochs=list(result.epochs[:1]),
        histograms={}, seconds=1.0, scaler={}, started=result.started, times=list(result.times[:1]),
    )  # fmt: skip
    write_state(directory / "runs" / f"{one.name}.unfinished.safetensors", RunState(progress, {}))
    assert main(["sync", str(directory)]) == 0
    assert rehearsed.stored(directory)["runs"] == [(one.name, "RUNNING"), ("digits", "RUNNING")]
    assert rehearsed.rows(directory, "SELECT step, timestamp FROM metrics WHERE key = 'epoch'") == [
        (1, 1_700_000_010_000)
    ]
    rehearsed.Rehearsal().run(one, directory)
    assert main(["sync", str(directory)]) == 0
    assert rehearsed.stored(directory)["runs"] == [(one.name, "FINISHED"), ("digits", "FINISHED")]
    assert len(rehearsed.rows(directory, "SELECT 1 FROM metrics WHERE key = 'epoch'")) == 2


@pytest.mark.parametrize("was_live", [True, False])
def test_a_failed_run_is_there_once_with_the_reason(was_live, directory, live, rehearsed):
    one, two = rehearsed.recipe(), rehearsed.recipe(1)
    rehearsal = rehearsed.Rehearsal(live() if was_live else None)
    with rehearsal.comparison(directory, one, two):
        rehearsal.run(one, directory, failure="the loss is NaN")
        rehearsal.run(two, directory)
    for _ in range(2):
        assert main(["sync", str(directory)]) == 0
    found = rehearsed.stored(directory)
    assert found["runs"] == [(one.name, "FAILED"), (two.name, "FINISHED"), ("digits", "FAILED")]
    assert found["tags"][one.name]["mlflow.note.content"] == "the loss is NaN"


def test_a_study_is_a_parent_of_its_comparisons(directory, rehearsed):
    small = directory / "small"
    for part in (small, small / "search" / "lr0.1"):
        rehearsed.Rehearsal().whole(part, rehearsed.recipe(0 if part == small else 1))
    (directory / "study.html").write_text("<p>all</p>")
    assert main(["sync", str(directory)]) == 0
    found = rehearsed.rows(
        directory,
        "SELECT runs.name, above.name FROM runs JOIN tags USING (run_uuid) JOIN runs AS above ON tags.value = "
        "above.run_uuid WHERE tags.key = 'mlflow.parentRunId' ORDER BY 2, 1",
    )
    assert found == [
        ("small", "digits"), ("small/search/lr0.1", "digits"), ("bonn-scheme-seed0", "small"),
        ("bonn-scheme-seed1", "small/search/lr0.1"),
    ]  # fmt: skip
    assert ("digits", "study.html", b"<p>all</p>") in rehearsed.stored(directory)["artifacts"]


def test_results_without_a_comparison_can_be_sent(directory, rehearsed):
    rehearsed.Rehearsal().run(rehearsed.recipe(), directory)
    assert main(["sync", str(directory)]) == 0
    assert rehearsed.stored(directory)["runs"] == [("bonn-scheme-seed0", "FINISHED"), ("digits", "FINISHED")]


def test_several_programs_that_send_at_once_make_each_run_once(directory, rehearsed, new_store):
    """As several processes of one comparison do; the lock of a file is that of whoever opened it."""
    recipes = [rehearsed.recipe(seed) for seed in range(3)]
    rehearsed.Rehearsal().whole(directory, *recipes)
    errors = []

    def send():
        try:
            sync(Store(place_of(directory)), read_all(directory))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=send) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    names = [*sorted(one.name for one in recipes), "digits"]
    assert rehearsed.stored(directory)["runs"] == [(name, "FINISHED") for name in names]
    assert len(rehearsed.rows(directory, "SELECT 1 FROM metrics WHERE key = 'epoch'")) == 6


def test_the_command_sends_what_a_store_that_was_away_missed(directory, live, rehearsed, tmp_path, capsys):
    database, away, one = directory / "mlflow.db", tmp_path / "away", rehearsed.recipe()
    rehearsal = rehearsed.Rehearsal(live())
    with rehearsal.comparison(directory, one):
        rehearsal.run(one, epochs=1, failure="interrupted")  # which leaves nothing on disk
    database.rename(away)
    database.mkdir()  # no database can be opened in it
    with pytest.warns(RuntimeWarning, match=f"-m bonn_qat_mlflow sync {directory}$") as caught:
        rehearsed.Rehearsal(live()).whole(directory, one)
    assert len(caught) == 1
    capsys.readouterr()
    assert main(["sync", str(directory)]) == 1
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)

    database.rmdir()
    away.rename(database)
    assert main(["sync", str(directory)]) == 0
    assert rehearsed.stored(directory)["runs"] == [(one.name, "FINISHED"), ("digits", "FINISHED")]
    logged = rehearsed.rows(directory, "SELECT step, value FROM metrics WHERE key = 'epoch' ORDER BY step")
    assert logged == [(1, 1.0), (2, 2.0)]


def test_the_command_sends_to_the_store_that_is_named(directory, tmp_path, rehearsed, capsys):
    other = tmp_path / "results"
    rehearsed.Rehearsal().whole(other, rehearsed.recipe())
    uri = f"sqlite:///{directory}/mlflow.db"
    assert main(["sync", str(other), "--tracking-uri", uri]) == 0
    assert f"in {uri}, experiment results" in capsys.readouterr().out
    assert not (other / "mlflow.db").exists()


def test_the_command_refuses_what_is_no_comparison(tmp_path, rehearsed, capsys):
    damaged = tmp_path / "damaged"
    rehearsed.Rehearsal().whole(damaged, rehearsed.recipe())
    (damaged / "runs" / "bonn-scheme-seed0.json").write_text("{}")
    for given, words in ((tmp_path / "none", "none holds no comparison.json"), (damaged, "bonn-scheme-seed0.json")):
        assert main(["sync", str(given)]) == 2
        said = capsys.readouterr()
        assert (said.out, said.err.count("\n")) == ("", 1)
        assert words in said.err
        assert not (given / "mlflow.db").exists()


def test_nothing_outside_the_directory_is_sent(directory, rehearsed, tmp_path):
    rehearsed.Rehearsal().whole(directory, rehearsed.recipe())
    weights = directory / "runs" / "bonn-scheme-seed0.safetensors"
    weights.unlink()
    (tmp_path / "secret").write_text("secret")
    weights.symlink_to(tmp_path / "secret")
    assert main(["sync", str(directory)]) == 0
    assert weights.name not in {name for _, name, _ in rehearsed.stored(directory)["artifacts"]}
