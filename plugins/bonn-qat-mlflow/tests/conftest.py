"""One empty store, made once (it takes seconds) and copied for each test."""

import os
import shutil

import pytest

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def directory(empty_store, tmp_path, monkeypatch):
    """A comparison's directory, which is also where the program runs."""
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "digits"
    path.mkdir()
    shutil.copy(empty_store, path / "mlflow.db")
    monkeypatch.chdir(path)
    return path
