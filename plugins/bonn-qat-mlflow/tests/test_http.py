"""Servers that do not answer, by MLflow's own client."""

import contextlib
import socket
import threading
import warnings

import pytest
from bonn_qat_mlflow.sender import Sender
from bonn_qat_mlflow.tracker import Tracker

from bonn_qat import plugins

LONG = 600.0  # seconds that nothing here takes


@pytest.fixture
def server(directory, monkeypatch):
    """A socket that MLflow is told to use as its server, with a password; nobody has accepted a connection yet."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(LONG)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://me:secret@127.0.0.1:{server.getsockname()[1]}")
        yield server


@pytest.fixture
def observed(rehearsed):
    def observed(**times):
        pm = plugins.create_manager(entry_points=False)
        pm.register(Tracker(Sender(**times)))
        return rehearsed.Rehearsal(pm.hook)

    return observed


def check(directory, caught):
    """One warning, which names what to do without the password."""
    (warning,) = caught
    words = str(warning.message)
    assert f"python -m bonn_qat_mlflow sync {directory} --tracking-uri 'http://me:***@127.0.0.1:" in words
    assert "secret" not in words


def test_a_server_that_accepts_and_never_answers_holds_nobody(server, directory, observed, rehearsed):
    threads, one = set(threading.enumerate()), rehearsed.recipe()
    rehearsal = observed(patience=0.0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", RuntimeWarning)
        with rehearsal.comparison(directory, one):
            connection, _ = server.accept()
            connection.settimeout(LONG)
            assert connection.recv(4).startswith(b"GET")  # the thread waits for an answer from here on
            (thread,) = set(threading.enumerate()) - threads
            rehearsal.run(one, directory)
    assert thread.is_alive()
    check(directory, caught)
    with contextlib.closing(connection):
        pass  # which ends the request


def test_a_server_that_refuses_connections_costs_one_warning(server, directory, observed, rehearsed):
    server.close()
    with pytest.warns(RuntimeWarning, match="onnection") as caught:
        observed(patience=LONG, short=LONG).whole(directory, rehearsed.recipe())
    check(directory, caught)
