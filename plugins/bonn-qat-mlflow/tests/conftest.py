"""One empty store, made once (it takes seconds) and copied for each test."""

import os
import shutil
import subprocess
import sys

import pytest

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
SETTINGS = ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID")


@pytest.fixture(scope="session")
def new_store(tmp_path_factory):
    """The directory of a store that the tracker made, and everything that it said."""
    path = tmp_path_factory.mktemp("store")
    code = "from pathlib import Path; from bonn_qat_mlflow.store import Store; Store(Path.cwd(), None)"
    environment = {key: value for key, value in os.environ.items() if key not in SETTINGS}
    made = subprocess.run(
        [sys.executable, "-c", code], cwd=path, env=environment, capture_output=True, text=True, check=True
    )
    return path, made.stdout + made.stderr


@pytest.fixture
def directory(new_store, tmp_path, monkeypatch):
    """A comparison's directory, which is also where the program runs."""
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "digits"
    path.mkdir()
    shutil.copy(new_store[0] / "mlflow.db", path)
    monkeypatch.chdir(path)
    return path
