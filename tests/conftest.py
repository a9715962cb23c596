import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest
import torch

# Set before any import: no window system, no telemetry, no tracking server, no observers among the plugins.
os.environ["MPLBACKEND"] = "Agg"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
_installed = (entry.name for entry in importlib.metadata.entry_points(group="bonn_qat"))
os.environ["BONN_QAT_PLUGINS"] = ",".join(name for name in _installed if name.startswith(("baselines.", "weights")))
for variable in ("BONN_QAT_DATA", "MLFLOW_TRACKING_URI"):
    os.environ.pop(variable, None)
# Shells start background jobs with Ctrl-C ignored, which would break the tests that interrupt.
if threading.current_thread() is threading.main_thread():
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _same_plugins() -> Iterator[None]:
    """The plugins of a test are those of all, also after one that ran a command with ``--no-plugins``."""
    from bonn_qat import plugins

    manager, before = plugins.manager, os.environ["BONN_QAT_PLUGINS"]
    yield
    if os.environ.get("BONN_QAT_PLUGINS") != before:
        os.environ["BONN_QAT_PLUGINS"] = before
        manager.cache_clear()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Slow tests first, so that no worker is left with one at the end.
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


Scripts = Callable[..., list[subprocess.CompletedProcess[str]]]


@pytest.fixture(scope="session")
def run_scripts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scripts]:
    """Run Python scripts, each ``[path, *arguments]``, at the same time, each in its own process.

    Like ``subprocess.run`` with ``sys.executable``, without the seconds for importing torch, timm and scikit-learn: see
    ``fork_server.py``.
    """
    server = subprocess.Popen(
        [sys.executable, "-P", str(Path(__file__).with_name("fork_server.py"))],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("scripts")

    def run(
        *commands: list[str], cwd: Path, env: Mapping[str, str] = os.environ
    ) -> list[subprocess.CompletedProcess[str]]:
        outputs = [[folder / f"{index}.{stream}" for stream in ("stdout", "stderr")] for index in range(len(commands))]
        programs = [
            {"arguments": command, "cwd": str(cwd), "env": dict(env), "stdout": str(out), "stderr": str(err)}
            for command, (out, err) in zip(commands, outputs, strict=True)
        ]
        server.stdin.write(json.dumps(programs) + "\n")
        server.stdin.flush()
        return [
            subprocess.CompletedProcess(command, code, *(path.read_text() for path in paths))
            for command, code, paths in zip(commands, json.loads(server.stdout.readline()), outputs, strict=True)
        ]

    yield run
    server.stdin.close()
    server.wait()
    server.stdout.close()
