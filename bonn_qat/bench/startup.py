"""startup: the time and memory that a new process needs to reach its first result."""

import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bonn_qat.bench import engines
from bonn_qat.bench.backends import Backend, Launch
from bonn_qat.bench.report import Startup
from bonn_qat.errors import BonnQatError


class DidNotStart(BonnQatError, RuntimeError):
    """The process of a backend failed."""


def startup(
    backends: Mapping[str, Backend],
    size: Sequence[int],
    *,
    rounds: int = 3,
    batch: int = 1,
    threads: int = 1,
    watch: Callable[[str], None] | None = None,
) -> tuple[tuple[Startup, ...], dict[str, str]]:
    """Start each of ``backends`` in fresh processes, ``rounds`` times in turns; images of ``size`` ``(C, H, W)``.

    Backends without ``launch`` are left out. The second result holds, for each backend that did not start, the last
    line that its process wrote to stderr.
    """
    launches = {
        name: functools.cache(backend.launch) for name, backend in backends.items() if backend.launch is not None
    }
    found: dict[str, list[_Start]] = {name: [] for name in launches}
    failures: dict[str, str] = {}
    for number in range(rounds):
        for name in found:
            if name in failures:
                continue
            if watch is not None:
                watch(f"start {number + 1} of {rounds}: {name}")
            try:
                found[name].append(_start(launches[name](), (batch, *size), threads))
            except Exception as error:  # whatever saving a foreign module raises
                failures[name] = first_line(error)
    done = {name: starts for name, starts in found.items() if name not in failures}
    return tuple(_startup(name, starts, batch, threads) for name, starts in done.items()), failures


def first_line(error: Exception) -> str:
    """The type and the first line of an exception."""
    return ": ".join([type(error).__name__, *str(error).strip().splitlines()[:1]])


_Start = tuple[float, dict[str, int | None]]  # seconds and memory


def _start(launch: Launch, shape: Sequence[int], threads: int) -> _Start:
    # -P, because the directory of the file would hide packages of the same names as the modules beside it.
    command = [
        sys.executable, "-P", str(Path(engines.__file__)), launch.engine, str(launch.path), str(threads),
        ",".join(map(str, shape)), *launch.modules,
    ]  # fmt: skip
    with tempfile.TemporaryFile("w+") as errors:
        begin = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            assert process.stdout is not None
            # Modules may print while they are imported.
            any(line.strip() == engines.FIRST_RESULT for line in iter(process.stdout.readline, ""))
            seconds = time.perf_counter() - begin
            memory = process.stdout.read()
        if process.returncode:
            errors.seek(0)
            said = errors.read().strip().splitlines()
            raise DidNotStart(said[-1] if said else f"exit code {process.returncode}")
    return seconds, json.loads(memory.splitlines()[-1])


def _startup(name: str, starts: Sequence[_Start], batch: int, threads: int) -> Startup:
    seconds, memory = zip(*starts, strict=True)
    return Startup(
        backend=name,
        batch=batch,
        threads=threads,
        seconds=seconds,
        process_kib=_known(memory, "process_kib"),
        added_kib=_known(memory, "added_kib"),
    )


def _known(memory: Sequence[Mapping[str, Any]], key: str) -> tuple[int, ...]:
    return tuple(found[key] for found in memory if found[key] is not None)
