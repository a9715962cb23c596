"""What hooks, thread and file do together, by stores that hang, fail, refuse and come back."""

import os
import shutil
import threading
import warnings
from types import SimpleNamespace

import pytest
from bonn_qat_mlflow import unsent
from bonn_qat_mlflow.events import ComparisonBegan, ComparisonEnded, EpochEnded, RunBegan, RunEnded
from bonn_qat_mlflow.sender import Sender, send_file
from bonn_qat_mlflow.store import Refused
from bonn_qat_mlflow.tracker import Tracker

from bonn_qat import plugins

LONG = 60.0  # seconds that nothing here takes


class Ledger:
    """A store that keeps what it took: an event taken again changes nothing, one without its beginning is an error."""

    def __init__(self):
        self.took = []
        self.content = {}
        self.begun = set()

    def take(self, event):
        match event:
            case ComparisonBegan():
                assert event.above is None or event.above in self.begun
                self.begun.add(event.directory)
            case RunBegan():
                assert event.comparison is None or event.comparison in self.begun
                self.begun.add(event.run)
                self.content.setdefault(event.run, {"name": event.name, "times": {}})
            case EpochEnded():
                assert event.run in self.begun
                self.content[event.run][event.epoch] = event.metrics
                self.content[event.run]["times"][event.epoch] = event.time
            case RunEnded():
                assert event.run in self.begun
                self.content[event.run]["status"] = event.status
            case ComparisonEnded():
                assert event.directory in self.begun
                self.content[event.directory] = {"status": event.status}
        self.took.append(event)


class Gate:
    """A store that nobody gets past until it opens."""

    def __init__(self, store):
        self.store, self.reached, self.open = store, threading.Event(), threading.Event()

    def take(self, event):
        self.reached.set()
        assert self.open.wait(LONG)
        self.store.take(event)


class Failing:
    """A store whose connection is lost after some events."""

    def __init__(self, store, after):
        self.store, self.left = store, after

    def take(self, event):
        if self.left == 0:
            raise ConnectionError("lost")
        self.left -= 1
        self.store.take(event)


def away(directory, uri):
    raise ConnectionError("nobody there")


def connects(store):
    return lambda directory, uri: store


def recipe_of(name):
    return SimpleNamespace(name=name, to_dict=lambda: {"model": "wrn10"})


def begin(hook, name, run_id=None):
    hook.bonn_qat_before_run(recipe=recipe_of(name), model=None, run_id=run_id or f"id-{name}")


def epoch(hook, name, number):
    metrics = {"train/loss": 1 / number, "test/top1": float("nan") if number == 2 else 1.0}
    hook.bonn_qat_after_epoch(recipe=recipe_of(name), epoch=number, metrics=metrics)


def end(hook, name, report=None):
    hook.bonn_qat_after_run(recipe=recipe_of(name), result=report)


def one_run(hook, name, epochs=2):
    begin(hook, name)
    for number in range(1, epochs + 1):
        epoch(hook, name, number)
    end(hook, name, {"seconds": 1.0})


def comparison(hook, directory, names=("a", "b")):
    hook.bonn_qat_before_comparison(directory=directory, recipes=[])
    for name in names:
        one_run(hook, name)
    hook.bonn_qat_after_comparison(directory=directory, page=directory / "report.html")


@pytest.fixture
def observe(tmp_path, monkeypatch):
    """Gives the hooks of a tracker, and the tracker, for a way to connect."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    monkeypatch.chdir(tmp_path)

    def observe(connect, **times):
        tracker = Tracker(Sender(connect, **{"patience": LONG, "short": LONG, **times}))
        pm = plugins.create_manager(entry_points=False)
        pm.register(tracker)
        return pm.hook, tracker

    return observe


@pytest.fixture
def path(tmp_path):
    return tmp_path / unsent.NAME


def kept(path):
    ledger = Ledger()
    send_file(path, ledger)
    return ledger


@pytest.fixture
def whole(observe, tmp_path):
    """What a store that is there takes of a comparison, the times left out."""
    ledger = Ledger()
    hook, _ = observe(connects(ledger))
    comparison(hook, tmp_path)
    assert [type(event) for event in ledger.took] == [
        ComparisonBegan, *[RunBegan, EpochEnded, EpochEnded, RunEnded] * 2, ComparisonEnded,
    ]  # fmt: skip
    return without_times(ledger)


def ended(ledger):
    """The runs that ended, in order; some may have been told twice."""
    return list(dict.fromkeys(event.run for event in ledger.took if isinstance(event, RunEnded)))


def without_times(ledger):
    """What the ledger holds, as text, in which NaN equals NaN."""
    return repr({key: {**held, "times": None} for key, held in ledger.content.items()})


def test_a_store_that_is_there_takes_all_and_leaves_no_file(whole, path):
    assert not path.exists()


def test_hooks_return_while_the_store_hangs_and_what_it_did_not_take_is_in_the_file(observe, tmp_path, path, whole):
    gate = Gate(Ledger())
    hook, _ = observe(connects(gate), patience=0.0)
    hook.bonn_qat_before_comparison(directory=tmp_path, recipes=[])
    assert gate.reached.wait(LONG)
    one_run(hook, "a")
    one_run(hook, "b")
    with pytest.warns(RuntimeWarning, match=f"not done within 0 seconds.*-m bonn_qat_mlflow .*{unsent.NAME}") as caught:
        hook.bonn_qat_after_comparison(directory=tmp_path, page=tmp_path / "report.html")
    assert len(caught) == 1
    assert without_times(kept(path)) == whole
    gate.open.set()


def test_the_wait_for_a_store_that_was_found_away_is_another(observe, tmp_path, path):
    ledger = Ledger()
    first, second = Gate(Ledger()), Gate(ledger)
    stores = iter([first, second])
    hook, _ = observe(lambda *place: next(stores), patience=0.0, short=LONG)
    hook.bonn_qat_before_comparison(directory=tmp_path, recipes=[])
    assert first.reached.wait(LONG)
    one_run(hook, "a")
    with pytest.warns(RuntimeWarning, match="0 seconds"):
        hook.bonn_qat_after_comparison(directory=tmp_path, page=tmp_path / "none.html")
    threading.Timer(0.05, second.open.set).start()
    comparison(hook, tmp_path, ["b"])  # with no patience all of it would be in the file
    assert not path.exists()
    assert {"id-a", "id-b"} <= ledger.content.keys()
    assert ended(ledger) == ["id-a", "id-b"]
    first.open.set()


def test_a_store_that_is_away_costs_one_warning_and_all_is_in_the_file_with_its_times(observe, tmp_path, path, whole):
    hook, _ = observe(away)
    with pytest.warns(RuntimeWarning, match="ConnectionError: nobody there") as caught:
        comparison(hook, tmp_path)
    assert len(caught) == 1
    ledger = kept(path)
    assert without_times(ledger) == whole
    times = [event.time for event in ledger.took]
    assert times == sorted(times)
    assert times[0] > 1e12


@pytest.mark.parametrize("taken", range(11))
def test_wherever_the_connection_is_lost_store_and_file_have_all_together(taken, observe, tmp_path, path, whole):
    ledger = Ledger()
    stores = iter([Failing(ledger, taken)])
    hook, _ = observe(lambda *place: next(stores, None) or away())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        comparison(hook, tmp_path)
    assert len(caught) == path.exists() == (taken < 10)
    if path.exists():
        copy = shutil.copy(path, tmp_path / "copy.jsonl")
        send_file(path, ledger)
        send_file(copy, Ledger())  # which knows of no beginning but the file's
    assert without_times(ledger) == whole


def test_a_store_that_comes_back_gets_all_at_the_next_beginning(observe, tmp_path, path, whole):
    ledger = Ledger()
    stores = iter([Failing(ledger, 2), None, ledger])
    hook, _ = observe(lambda *place: next(stores) or away())
    with pytest.warns(RuntimeWarning, match="lost") as caught:
        comparison(hook, tmp_path, ["a", "b"])
    assert len(caught) == 1
    assert path.exists()
    comparison(hook, tmp_path, ["c"])
    assert not path.exists()
    assert {"id-a", "id-b", "id-c"} <= ledger.content.keys()
    del ledger.content["id-c"]
    assert without_times(ledger) == whole


def test_what_an_earlier_program_left_is_sent_first(observe, tmp_path, path):
    hook, _ = observe(away)
    with pytest.warns(RuntimeWarning):
        comparison(hook, tmp_path, ["a"])
    before = path.read_bytes()
    hook, _ = observe(away)
    with pytest.warns(RuntimeWarning):
        comparison(hook, tmp_path, ["b"])
    assert path.read_bytes().startswith(before)
    ledger = Ledger()
    hook, _ = observe(connects(ledger))
    comparison(hook, tmp_path, ["c"])
    assert not path.exists()
    assert ended(ledger) == ["id-a", "id-b", "id-c"]


def test_a_malformed_file_is_left_as_it_is_and_costs_one_warning(observe, tmp_path, path):
    path.write_text("{}\n")
    ledger = Ledger()
    hook, _ = observe(connects(ledger))
    with pytest.warns(RuntimeWarning, match="line 1: format None") as caught:
        comparison(hook, tmp_path)
    assert len(caught) == 1
    first, *rest = path.read_bytes().splitlines(keepends=True)
    assert first == b"{}\n"
    path.write_bytes(b"".join(rest))
    kept(path)


def test_a_finished_run_is_in_the_file_before_its_hook_returns(observe, tmp_path, path):
    """It is not told again if the program is killed now."""
    ledger = Ledger()
    gate = Gate(ledger)
    hook, tracker = observe(connects(gate))
    hook.bonn_qat_before_comparison(directory=tmp_path, recipes=[])
    one_run(hook, "a")
    begin(hook, "b")
    epoch(hook, "b", 1)
    copy = shutil.copy(path, tmp_path / "copy.jsonl")
    gate.open.set()
    tracker.flush(LONG)
    assert not path.exists()  # for all was sent
    assert len(ledger.took) == 7  # and nothing twice
    of_a = {key: value for key, value in ledger.content.items() if key != "id-b"}
    assert kept(copy).content == of_a


def test_a_run_outside_a_comparison_is_waited_for(observe, path):
    ledger = Ledger()
    gate = Gate(ledger)
    hook, _ = observe(connects(gate))
    threading.Timer(0.05, gate.open.set).start()
    one_run(hook, "a")
    assert ledger.content["id-a"]["status"] == "FINISHED"
    assert not path.exists()


def test_several_runs_at_once_are_kept_apart_in_the_file(observe, tmp_path, path):
    hook, _ = observe(away)
    hook.bonn_qat_before_comparison(directory=tmp_path, recipes=[])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for act in (begin, lambda *of: epoch(*of, 1), lambda *of: epoch(*of, 2), end):
            for name in ("a", "b"):
                act(hook, name)
        hook.bonn_qat_after_comparison(directory=tmp_path, page=tmp_path / "none.html")
    content = kept(path).content
    assert content["id-a"]["status"] == content["id-b"]["status"] == "FAILED"
    assert content["id-a"].keys() == content["id-b"].keys() == {"name", "times", 1, 2, "status"}


def test_what_began_after_the_file_did_is_in_it_too(observe, tmp_path, path):
    """The end of the first run is kept at once; of the second the store has the beginning when it is lost."""
    gate = Gate(Failing(Ledger(), 5))
    hook, tracker = observe(connects(gate))
    hook.bonn_qat_before_comparison(directory=tmp_path, recipes=[])
    one_run(hook, "a", epochs=1)
    begin(hook, "b")
    epoch(hook, "b", 1)
    gate.open.set()
    with pytest.warns(RuntimeWarning, match="lost"):
        tracker.flush(LONG)
    assert kept(path).content["id-b"].keys() == {"name", "times", 1}


def test_two_programs_may_write_to_one_file(observe, path):
    """As two that train outside a comparison do, in the same directory."""
    hooks = [observe(away)[0] for _ in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for act in (begin, lambda *of: epoch(*of, 1), lambda *of: epoch(*of, 2), end):
            for name, hook in zip("ab", hooks, strict=True):
                act(hook, name)
    content = kept(path).content
    assert content["id-a"].keys() == content["id-b"].keys() == {"name", "times", 1, 2, "status"}


def test_of_programs_whose_store_is_slow_nothing_is_left_once_it_took_all(observe, path):
    programs = {}
    for name in "abc":
        gate = Gate(Ledger())
        hook, tracker = observe(connects(gate))
        hook.bonn_qat_before_comparison(directory=path.parent, recipes=[])
        programs[name] = hook, gate, tracker
    for name, (hook, _, _) in programs.items():
        one_run(hook, name)
    for name, left in zip("abc", ({"id-a", "id-b", "id-c"}, {"id-b", "id-c"}, {"id-c"}), strict=True):
        assert unsent.check(path).runs == left
        _, gate, tracker = programs[name]
        gate.open.set()
        tracker.flush(LONG)
    assert not path.exists()


def test_what_is_written_after_somebody_sent_the_file_can_be_sent_too(observe, tmp_path, path):
    hook, tracker = observe(away)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        hook.bonn_qat_before_comparison(directory=tmp_path, recipes=[])
        begin(hook, "a")
        epoch(hook, "a", 1)
        tracker.flush(LONG)
    kept(path)
    epoch(hook, "a", 2)
    end(hook, "a")
    tracker.flush(LONG)
    assert kept(path).content["id-a"].keys() == {"name", "times", 2, "status"}


def test_what_the_store_refuses_costs_itself_alone(observe, tmp_path, path):
    class Choosy(Ledger):
        def take(self, event):
            if isinstance(event, EpochEnded) and event.epoch == 1:
                raise Refused("no first epochs")
            super().take(event)

    ledger = Choosy()
    hook, _ = observe(connects(ledger))
    with pytest.warns(RuntimeWarning, match="refused.*no first epochs") as caught:
        comparison(hook, tmp_path)
    assert len(caught) == 1
    assert not path.exists()
    assert 2 in ledger.content["id-a"]
    assert 2 in ledger.content["id-b"]


def test_where_no_file_can_be_written_the_training_goes_on(observe, tmp_path, path):
    path.mkdir()
    hook, _ = observe(away)
    with pytest.warns(RuntimeWarning) as caught:
        comparison(hook, tmp_path)
    words = [str(warning.message) for warning in caught]
    assert len(words) == 2
    assert any("cannot be written (IsADirectoryError" in word for word in words)


def test_what_the_disk_did_not_take_is_written_with_the_next(observe, tmp_path, path, monkeypatch, whole):
    append, left = unsent.append, iter([1, 1, 1])

    def full(*arguments, **options):
        if next(left, None):
            raise OSError(28, "No space left on device")
        return append(*arguments, **options)

    monkeypatch.setattr(unsent, "append", full)
    hook, _ = observe(away)
    with pytest.warns(RuntimeWarning, match="nobody there|No space left") as caught:
        comparison(hook, tmp_path)
    assert len(caught) == 2
    assert without_times(kept(path)) == whole


def test_a_forked_process_has_nothing_to_send(observe, tmp_path, path, monkeypatch):
    gate = Gate(Ledger())
    hook, tracker = observe(connects(gate))
    hook.bonn_qat_before_comparison(directory=tmp_path, recipes=[])
    with monkeypatch.context() as child:
        child.setattr(os, "getpid", lambda: -1)
        tracker.flush(LONG)  # as at the end of the child
    assert not path.exists()
    gate.open.set()
