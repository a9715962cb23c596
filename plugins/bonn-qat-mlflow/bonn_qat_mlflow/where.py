"""Which store is meant: told without opening it, without importing MLflow, and without its secrets."""

import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

DATABASE, ARTIFACTS = "mlflow.db", "mlartifacts"
_PASSWORD = re.compile(r"(?<=://)([^\s:@/]*):\S*@")
_TOKEN = re.compile(r"(?<=https://)[^\s:@/]+@|(?<=http://)[^\s:@/]+@")
_PARAMETER = re.compile(r"(?i)([?&;][^\s=&;]*(?:pass|pwd|token|secret|key|odbc_connect)[^\s=&;]*=)[^\s&;#]*")


class ActiveRun(NamedTuple):
    """Ids of the MLflow run that is active in this thread, and of its experiment."""

    experiment: str
    run: str


def active_run() -> ActiveRun | None:
    """The program's own run; None where there is none, as where nobody imported MLflow."""
    active = getattr(sys.modules.get("mlflow"), "active_run", lambda: None)()
    return ActiveRun(active.info.experiment_id, active.info.run_id) if active is not None else None


def told_uri(*, or_default: bool = False) -> str | None:
    """The URI of the store that MLflow was told to use, by the program or the environment; None for none.

    With ``or_default`` that of the store which MLflow uses, told or not.
    """
    mlflow = sys.modules.get("mlflow")
    # Another thread may be importing it: then not all is there yet.
    is_set, uri = getattr(mlflow, "is_tracking_uri_set", None), getattr(mlflow, "get_tracking_uri", None)
    if is_set is not None and uri is not None and (or_default or is_set()):
        return str(uri())
    return os.environ.get("MLFLOW_TRACKING_URI") or None


def own_uri(directory: Path) -> str:
    """The URI of the database in ``directory``, which is the store where MLflow was told of none."""
    return f"sqlite:///{(directory / DATABASE).as_posix()}"


def experiment_of(directory: Path) -> str:
    """The experiment of a comparison in ``directory``, an absolute path: the environment's, or named like it."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or directory.name


def masked(text: str) -> str:
    """``text`` with ``***`` for what may be a secret in a URI: ``postgresql://user:***@host/runs``."""
    return _PARAMETER.sub(r"\1***", _TOKEN.sub("***@", _PASSWORD.sub(r"\1:***@", text)))
