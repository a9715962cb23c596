"""``python -m bonn_qat_mlflow sync DIR``: send to MLflow what it has missed of a comparison or a study."""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from bonn_qat.errors import InvalidData
from bonn_qat_mlflow.store import Store
from bonn_qat_mlflow.sync import read_all, sync
from bonn_qat_mlflow.where import place_of, reason

_DONE, _AWAY, _WRONG, _INTERRUPTED = 0, 1, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 done, 1 the store is out of reach, 2 wrong input."""
    parser = argparse.ArgumentParser(prog="python -m bonn_qat_mlflow")
    command = parser.add_subparsers(required=True).add_parser(
        "sync", help="send to MLflow what it has missed of a comparison or a study"
    )
    command.add_argument("directory", type=Path, help="the directory that holds comparison.json, or the study's")
    command.add_argument(
        "--tracking-uri", help="the store; by default MLFLOW_TRACKING_URI, else mlflow.db in DIRECTORY"
    )
    given = parser.parse_args(arguments)
    root = given.directory.resolve()
    place = place_of(root, given.tracking_uri)
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        found = read_all(root)
        refused = sync(Store(place), found)
    except InvalidData as error:
        return _fail(_WRONG, str(error))
    except KeyboardInterrupt:
        return _fail(_INTERRUPTED, "interrupted; run the command again to send the rest")
    except Exception as error:
        return _fail(_AWAY, f"{place} did not take everything in {root}; try again later ({reason(error)})")
    count = sum(len(runs) for _, runs, _ in found)
    sys.stdout.write(f"{count} runs of {root} are in {place}, experiment {place.experiment}\n")
    if refused:
        sys.stderr.write(f"{len(refused)} parts were refused, the first: {refused[0]}\n")
    return _DONE


def _fail(code: int, words: str) -> int:
    sys.stderr.write(f"{words}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())
