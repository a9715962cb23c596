"""Hooks and thread together, by stores that hang, fail, refuse and come back."""

import os
import threading
import warnings

import pytest
from bonn_qat_mlflow.sender import Sender
from bonn_qat_mlflow.sync import read_all, sync
from bonn_qat_mlflow.tracker import Tracker
from bonn_qat_mlflow.where import Place

from bonn_qat import plugins

LONG = 600.0  # seconds that nothing here takes


class Ledger:
    """A store that keeps what it was told."""

    def __init__(self, refuses=""):
        self.refuses, self.runs, self.comparisons = refuses, {}, {}

    def log_run(self, run):
        known = self.runs.setdefault(run.id, {"name": run.name, "epochs": {}, "status": "", "files": []})
        known["epochs"] |= {int(values["epoch"]): time for time, values in run.epochs}
        known["status"] = run.status or known["status"]
        known["files"] = [path.name for path in run.files] or known["files"]
        return [f"no {self.refuses}"] if self.refuses == run.name else []

    def log_comparison(self, directory, status, time, files=()):
        self.comparisons[directory.name] = status
        return []


class Gate:
    """A store that nobody gets past until it opens."""

    def __init__(self, store):
        self.store, self.reached, self.open = store, threading.Event(), threading.Event()

    def __getattr__(self, name):
        def passes(*arguments):
            self.reached.set()
            assert self.open.wait(LONG)
            return getattr(self.store, name)(*arguments)

        return passes


class Failing:
    """A store whose connection is lost after some calls."""

    def __init__(self, store, after):
        self.store, self.left = store, after

    def __getattr__(self, name):
        def passes(*arguments):
            if self.left == 0:
                raise ConnectionError("lost")
            self.left -= 1
            return getattr(self.store, name)(*arguments)

        return passes


def away(place):
    raise ConnectionError("nobody there")


def connects(*stores):
    """Each try to connect gets the next store, None for none, the last one again and again."""
    left = list(stores)

    def connect(place):
        store = left.pop(0) if len(left) > 1 else left[0]
        return away(place) if store is None else store

    return connect


@pytest.fixture
def observe(tmp_path, monkeypatch, rehearsed):
    """Gives a rehearsal whose observer is a tracker with a way to connect."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.chdir(tmp_path)

    def observe(connect, **times):
        pm = plugins.create_manager(entry_points=False)
        pm.register(Tracker(Sender(connect, **{"patience": LONG, "short": LONG, **times})))
        return rehearsed.Rehearsal(pm.hook)

    return observe


@pytest.fixture
def place(tmp_path):
    return tmp_path / "digits"


@pytest.fixture
def recipes(rehearsed):
    return [rehearsed.recipe(), rehearsed.recipe(1)]


@pytest.fixture
def whole(observe, place, recipes):
    """What a store that is there has of a comparison."""
    ledger = Ledger()
    observe(connects(ledger)).whole(place.parent / "whole" / "digits", *recipes)
    return vars(ledger)


def synced(place, ledger=None):
    """What a store has once the directory was synced into it."""
    ledger = ledger or Ledger()
    sync(ledger, read_all(place))
    return vars(ledger)


def test_a_store_that_is_there_has_all_of_each_run_and_sync_adds_nothing(whole, place, recipes):
    assert whole["comparisons"] == {"digits": "FINISHED"}
    assert whole["runs"] == {
        f"id-{one.name}": {
            "name": one.name, "epochs": {1: 1_700_000_010.0, 2: 1_700_000_020.0}, "status": "FINISHED",
            "files": [f"{one.name}.json", f"{one.name}.safetensors"],
        }
        for one in recipes
    }  # fmt: skip
    assert synced(place.parent / "whole" / "digits") == whole


def test_hooks_return_while_the_store_hangs_and_sync_has_all(observe, place, recipes, whole):
    gate = Gate(Ledger())
    rehearsal = observe(connects(gate), patience=0.0)

    def go():
        with rehearsal.comparison(place, *recipes):
            assert gate.reached.wait(LONG)
            for one in recipes:
                rehearsal.run(one, place)

    with pytest.warns(RuntimeWarning, match=f"not done within 0 seconds.*-m bonn_qat_mlflow sync {place}$") as caught:
        go()
    assert len(caught) == 1
    assert synced(place) == whole
    gate.open.set()


def test_the_wait_for_a_store_that_was_found_away_is_another(observe, place, recipes):
    gate = Gate(Ledger())
    rehearsal = observe(connects(gate), patience=0.0, short=LONG)
    with pytest.warns(RuntimeWarning, match="0 seconds"):
        rehearsal.whole(place, recipes[0])
    threading.Timer(0.05, gate.open.set).start()
    rehearsal.whole(place, recipes[1])  # with no patience it would not be waited for
    assert {run["status"] for run in gate.store.runs.values()} == {"FINISHED"}


def test_a_store_that_is_away_costs_one_warning_and_sync_has_all(observe, place, recipes, whole):
    with pytest.warns(RuntimeWarning, match="ConnectionError: nobody there") as caught:
        observe(away).whole(place, *recipes)
    assert len(caught) == 1
    assert synced(place) == whole


@pytest.mark.parametrize("taken", range(6))
def test_wherever_the_connection_is_lost_sync_completes_the_store(taken, observe, place, recipes, whole):
    ledger = Ledger()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        observe(connects(Failing(ledger, taken), None)).whole(place, *recipes)
    # A slow thread does several epochs of a run at once.
    assert len(caught) == (vars(ledger) != {**whole, "refuses": ""}) or taken > 4
    assert synced(place, ledger) == whole


def test_a_store_that_comes_back_gets_all_without_the_command(observe, place, recipes, whole):
    ledger = Ledger()
    with pytest.warns(RuntimeWarning, match="lost") as caught:
        observe(connects(Failing(ledger, 2), None, None, ledger)).whole(place, *recipes)
    assert len(caught) == 1
    assert vars(ledger) == whole or synced(place, ledger) == whole


def test_what_an_earlier_program_could_not_send_is_sent_when_the_comparison_goes_on(observe, place, recipes):
    with pytest.warns(RuntimeWarning):
        observe(away).whole(place, recipes[0])
    ledger = Ledger()
    observe(connects(ledger)).whole(place, recipes[1])
    assert {run["name"]: run["status"] for run in ledger.runs.values()} == {one.name: "FINISHED" for one in recipes}


def test_a_damaged_file_costs_one_warning(observe, place, recipes):
    ledger = Ledger()
    rehearsal = observe(connects(ledger))

    def go():
        with rehearsal.comparison(place, *recipes):
            rehearsal.run(recipes[0], place)
            (place / "comparison.json").write_text("{}")
            rehearsal.run(recipes[1])

    with pytest.warns(RuntimeWarning, match="comparison.json") as caught:
        go()
    assert len(caught) == 1
    assert ledger.runs[f"id-{recipes[0].name}"]["status"] == "FINISHED"


def test_a_run_outside_a_comparison_is_waited_for_and_has_its_file(observe, recipes):
    gate = Gate(Ledger())
    threading.Timer(0.05, gate.open.set).start()
    observe(connects(gate)).run(recipes[0])
    (run,) = gate.store.runs.values()
    assert (run["status"], run["files"]) == ("FINISHED", [f"{recipes[0].name}.json"])


def test_a_run_outside_a_comparison_that_is_not_sent_says_what_to_keep(observe, recipes, tmp_path, whole):
    with pytest.warns(RuntimeWarning, match="nobody there.*write_run") as caught:
        observe(away).run(recipes[0])
    assert len(caught) == 1


def test_runs_that_are_open_at_once_are_kept_apart(observe, place, recipes, rehearsed):
    ledger = Ledger()
    rehearsal = observe(connects(ledger))
    with rehearsal.comparison(place, *recipes):
        for one in recipes:
            rehearsal.hook.bonn_qat_before_run(recipe=one, model=None, run_id=one.name)
        for one, epochs in zip(recipes, ((1,), (1, 2)), strict=True):
            for epoch in epochs:
                metrics = rehearsed.metrics_of(epoch)
                rehearsal.hook.bonn_qat_after_epoch(recipe=one, epoch=epoch, metrics=metrics, time=1.0)
        for one in recipes:
            rehearsal.hook.bonn_qat_after_run(recipe=one, result=None)
    assert [len(ledger.runs[one.name]["epochs"]) for one in recipes] == [1, 2]
    assert {run["status"] for run in ledger.runs.values()} == {"FAILED"}


def test_what_the_store_refuses_costs_one_warning_and_itself_alone(observe, place, recipes):
    ledger = Ledger(refuses=recipes[0].name)
    with pytest.warns(RuntimeWarning, match=f"refused.*no {recipes[0].name}") as caught:
        observe(connects(ledger)).whole(place, *recipes)
    assert len(caught) == 1
    assert ledger.runs[f"id-{recipes[1].name}"]["status"] == "FINISHED"


def test_where_nothing_can_be_written_the_training_goes_on(observe, place, recipes):
    """As on a full disk: the store's lock and its database cannot be made."""

    def full(place):
        raise OSError(28, "No space left on device")

    with pytest.warns(RuntimeWarning, match="No space left") as caught:
        observe(full).whole(place, *recipes)
    assert len(caught) == 1


def test_a_forked_process_has_nothing_to_send(place, monkeypatch):
    gate, where = Gate(Ledger()), Place(place, None, "digits")
    sender = Sender(connects(gate), patience=LONG)
    sender.put(where, place, lambda store: store.log_comparison(place, "RUNNING", 0.0))
    assert gate.reached.wait(LONG)
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: -1)
        sender.wait(where)  # for what the parent alone sends
    assert not gate.store.comparisons
    gate.open.set()
