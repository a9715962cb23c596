"""``python -m bonn_qat_mlflow PATH``: send what a training could not."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bonn_qat_mlflow import unsent
from bonn_qat_mlflow.sender import send_file
from bonn_qat_mlflow.store import Store, reason
from bonn_qat_mlflow.where import masked, own_uri, told_uri

_DONE, _AWAY, _WRONG, _INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 1 the store is out of reach, 2 wrong input."""
    parser = argparse.ArgumentParser(
        prog="python -m bonn_qat_mlflow", description="Send to MLflow what a training could not, and remove the file."
    )
    parser.add_argument("path", type=Path, help=f"a file {unsent.NAME}, or the directory that it is in")
    parser.add_argument("--tracking-uri", help="the store; by default the one that MLFLOW_TRACKING_URI names")
    given = parser.parse_args(arguments)
    try:
        return _send(given.path.resolve(), given.tracking_uri)
    except (unsent.InvalidFile, OSError) as error:
        return _fail(_WRONG, str(error))
    except KeyboardInterrupt:
        return _fail(_INTERRUPTED, "interrupted; what is left stays in the file")


def _send(path: Path, uri: str | None) -> int:
    if path.is_dir():
        path /= unsent.NAME
    if not path.exists() and path.name == unsent.NAME and path.parent.is_dir():
        sys.stdout.write(f"nothing to send: there is no {path}\n")
        return _DONE
    content = unsent.check(path)
    uri = uri or told_uri()
    if uri is None and content.stores:
        meant = " or ".join(sorted(content.stores))
        return _fail(_WRONG, f"{path} is for the store {meant}; name it: --tracking-uri URI, or MLFLOW_TRACKING_URI")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    name = masked(uri or own_uri(path.parent))
    try:
        refused = send_file(path, Store(path.parent, uri))
    except unsent.InvalidFile:
        raise
    except Exception as error:
        return _fail(_AWAY, f"{name} did not take all of {path}, which stays ({reason(error)})")
    sys.stdout.write(f"{content.events} events of {len(content.runs)} runs sent to {name}\n")
    if refused:
        sys.stderr.write(f"{len(refused)} of them were refused, the first: {refused[0]}\n")
    return _DONE


def _fail(code: int, words: str) -> int:
    sys.stderr.write(f"{words}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
