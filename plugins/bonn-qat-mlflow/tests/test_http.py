"""Servers that do not answer, by MLflow's own client."""

import contextlib
import socket
import threading
import warnings
from types import SimpleNamespace

import pytest
from bonn_qat_mlflow import unsent
from bonn_qat_mlflow.sender import Sender
from bonn_qat_mlflow.tracker import Tracker

from bonn_qat import plugins

LONG = 120.0  # seconds that nothing here takes
RECIPE = SimpleNamespace(name="bonn-seed0", to_dict=dict)


@pytest.fixture
def server(directory, monkeypatch):
    """A socket that MLflow is told to use as its server, with a password; nobody has accepted a connection yet."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(LONG)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{server.getsockname()[1]}")
        yield server


def comparison(hook, directory):
    hook.bonn_qat_before_comparison(directory=directory, recipes=[])
    yield
    hook.bonn_qat_before_run(recipe=RECIPE, model=None, run_id="abc")
    hook.bonn_qat_after_epoch(recipe=RECIPE, epoch=1, metrics={"loss": 1.0})
    hook.bonn_qat_after_run(recipe=RECIPE, result={})
    hook.bonn_qat_after_comparison(directory=directory, page=directory / "none.html")


def observed(**times):
    pm = plugins.create_manager(entry_points=False)
    pm.register(Tracker(Sender(**times)))
    return pm.hook


def check(path, caught):
    (warning,) = caught
    assert str(path) in str(warning.message)
    content = unsent.check(path)
    assert (content.events, content.runs) == (5, {"abc"})
    (store,) = content.stores
    assert store.startswith("http://me:***@127.0.0.1:")
    assert "secret" not in path.read_text() + str(warning.message)


def test_a_server_that_accepts_and_never_answers_holds_nobody(server, directory):
    threads = set(threading.enumerate())
    hook = observed(patience=0.0)
    going = comparison(hook, directory)
    next(going)
    connection, _ = server.accept()
    connection.settimeout(LONG)
    assert connection.recv(4).startswith(b"GET")  # the thread waits for an answer from here on
    (thread,) = set(threading.enumerate()) - threads
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        next(going, None)
    assert thread.is_alive()
    check(directory / unsent.NAME, caught)
    with contextlib.closing(connection):
        pass  # which ends the request
    thread.join(LONG)
    assert not thread.is_alive()
    assert unsent.check(directory / unsent.NAME).events == 5


def test_a_server_that_refuses_connections_costs_one_warning(server, directory):
    server.close()
    hook = observed(patience=LONG)
    with pytest.warns(RuntimeWarning, match="onnection") as caught:
        for _ in comparison(hook, directory):
            pass
    check(directory / unsent.NAME, caught)
