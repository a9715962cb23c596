"""Which store is used, worked out without opening it, without importing MLflow, and without showing its secrets."""

import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

DATABASE = "mlflow.db"
_SECRETS = (
    (re.compile(r"(?<=://)([^\s:@/]*):\S*@"), r"\1:***@"),
    (re.compile(r"(?<=https://)[^\s:@/]+@|(?<=http://)[^\s:@/]+@"), "***@"),
    (re.compile(r"(?i)([?&;][^\s=&;]*(?:pass|pwd|token|secret|key|odbc_connect)[^\s=&;]*=)[^\s&;#]*"), r"\1***"),
)


class Parent(NamedTuple):
    """Ids of an MLflow experiment and of the run in it, if any, that becomes the parent."""

    experiment: str
    run: str | None


class Place(NamedTuple):
    """Where runs are logged: the directory of the outermost comparison, or the working directory, and the store.

    ``uri`` None stands for the directory's own database.
    """

    directory: Path
    uri: str | None
    experiment: str
    is_comparison: bool = True

    def __str__(self) -> str:
        """The URI of the store, without secrets."""
        return masked(self.uri or own_uri(self.directory))


def place_of(directory: Path, uri: str | None = None) -> Place:
    """The place of a comparison in ``directory``, an absolute path."""
    return Place(directory, uri or told_uri(), os.environ.get("MLFLOW_EXPERIMENT_NAME") or directory.name)


def active_run() -> Parent | None:
    """The program's active MLflow run; None if there is none, or if MLflow has not been imported."""
    active = getattr(sys.modules.get("mlflow"), "active_run", lambda: None)()
    return Parent(active.info.experiment_id, active.info.run_id) if active is not None else None


def told_uri(*, or_default: bool = False) -> str | None:
    """The tracking URI that the program or the environment has set; None for none.

    With ``or_default`` the URI that MLflow uses, set or not.
    """
    mlflow = sys.modules.get("mlflow")
    # Another thread may be in the middle of importing it.
    is_set, uri = getattr(mlflow, "is_tracking_uri_set", None), getattr(mlflow, "get_tracking_uri", None)
    if is_set is not None and uri is not None and (or_default or is_set()):
        return str(uri())
    return os.environ.get("MLFLOW_TRACKING_URI") or None


def own_uri(directory: Path) -> str:
    """The URI of the database in ``directory``."""
    return f"sqlite:///{(directory / DATABASE).as_posix()}"


def masked(text: str) -> str:
    """``text`` with ``***`` in place of what may be a secret in a URI.

    >>> masked("postgresql://me:password@host/runs")
    'postgresql://me:***@host/runs'
    """
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def reason(error: Exception) -> str:
    """The error in one line, without secrets."""
    first = (str(error).strip().splitlines() or [""])[0]
    return masked(f"{type(error).__name__}: {first}")[:300]
