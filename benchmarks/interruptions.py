"""What interruptions cost: runs of `bonn-qat compare` that are killed, stopped or run out of disk, and then go on.

A small but whole comparison, with every kind of stage, is first run undisturbed. Then, for each moment, it is run in a
directory of its own, interrupted there, and started again with the same command (every second time with ``--resume``)
until it ends. Weights, bit for bit, and results must be those of the undisturbed run. Moments:

- SIGKILL at a random time: uniform over the run's life; ``--fresh`` of these by the real command line in a process of
  its own, one of them with ``--jobs 2``, the others in forks of this process, which has imported everything;
- SIGKILL at a place: before the n-th step of the optimizer, in the middle of writing a checkpoint, in a change of
  stage, and others (:data:`PLACES`), with n random. What the process does there is patched from outside;
- SIGTERM and SIGINT at a random time: exit codes 143 and 130, and no step is made twice;
- a full disk, a disk that became read-only, and a directory that takes no more files: exit code 3 with one line, the
  checkpoint from before is whole, and with room again the run goes on.

A quarter of the moments is followed by a second SIGKILL while the run goes on, and in half of the forks a checkpoint is
also due every 0.2 s, for a run of this size would otherwise never write one within an epoch. Most forks begin with an
empty MLflow store, which takes seconds to make. Needs Linux. Example::

    python benchmarks/interruptions.py --kills 50 --jobs 2 --output interruptions.json

The file is JSON: ``options``, ``environment``, ``machine``, ``undisturbed`` (seconds, optimizer steps, and how often it
comes by each place), and ``moments``, each with its ``kind``, ``attempts`` (exit code, seconds, steps, and what it was
to meet), ``repeated`` steps, ``differences`` from the undisturbed run, ``store`` (those of the MLflow store, which
cannot be exact: it is a service of its own), ``left`` (files that the undisturbed run has not) and ``problems``. The
exit code is 1 if there is a difference or a problem.
"""

import argparse
import builtins
import contextlib
import errno
import functools
import io
import json
import mmap
import os
import random
import re
import shutil
import signal
import sqlite3
import stat
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from measuring import machine
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bonn_qat import cli, layers, plugins, regularizers
from bonn_qat.environment import environment
from bonn_qat.errors import BonnQatError
from bonn_qat.files.tensors import read_tensors
from bonn_qat.studies.comparison import read_comparison
from bonn_qat.training import data, trainer
from bonn_qat.training.checkpoint import read_state
from bonn_qat.training.results import RUNS
from bonn_qat.training.train import train

JOB = (
    "--schemes", "bireal-staged,bonn", "--data", "digits", "--model", "wrn10_16", "--epochs", "6", "-b", "16",
    "--train-images", "80", "--test-images", "50",
)  # fmt: skip
SECONDS_BETWEEN_CHECKPOINTS = 0.2
ATTEMPTS = 6

STEP = "between backward and the optimizer's step"
HALF, UNSYNCED = "half of a checkpoint is written", "a checkpoint is written, not synchronised"
UNNAMED, NAMED = "before a checkpoint takes its name", "after a checkpoint took its name"
STAGE, START, ADOPT = "in a change of stage", "in the start of the feature loss", "while latents are adopted"
NORMS, TEST = "while norms are measured anew", "in the test"
RESULT, REPORT = "while a result is written", "while the report is written"
PLACES = (STEP, HALF, UNSYNCED, UNNAMED, NAMED, STAGE, START, ADOPT, NORMS, TEST, RESULT, REPORT)
_CHECKPOINT = {"half": HALF, "unsynced": UNSYNCED, "unnamed": UNNAMED, "named": NAMED}

STORE = "mlflow.db"
ANYWHEN, COMMAND_LINE = "at any time", "at any time, command line"
FULL, READ_ONLY, IMMUTABLE = "the disk is full", "the disk is read-only", "the directory takes no files"
SIGNALS = {signal.SIGTERM: 143, signal.SIGINT: 130}


@dataclass
class Plan:
    """What an attempt is to meet: a signal after ``seconds``, or ``act`` at the ``number``-th time at ``place``."""

    signal: int = signal.SIGKILL
    seconds: float | None = None
    place: str | None = None
    number: int = 0
    act: Callable[[], None] | None = None  # in the process itself; none: the signal

    def describe(self) -> dict[str, Any]:
        """For the file."""
        name = signal.Signals(self.signal).name
        return {"signal": name, "seconds": self.seconds, "place": self.place, "number": self.number or None}


@dataclass
class Attempt:
    """One process of the job, and how it ended."""

    plan: Plan
    arguments: Sequence[str]
    log: Path
    counts: mmap.mmap
    pid: int
    started: float
    process: subprocess.Popen[bytes] | None = None  # the real command line's
    sent: bool = False
    code: int | None = None
    seconds: float = 0.0

    def count(self, place: str) -> int:
        """How often the process came by ``place``; 0 for one whose code is not patched."""
        return int(memoryview(self.counts).cast("q")[PLACES.index(place)])

    @property
    def interrupted(self) -> bool:
        """Whether it met what it was to meet; a signal may also come too late."""
        return self.code != 0

    def poll(self) -> bool:
        """Send what is due; whether the process has ended."""
        now = time.perf_counter() - self.started
        if self.process is not None:
            self.code = self.process.poll()
        else:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if pid else None
        if self.code is not None:
            self.seconds = now
            return True
        if self.plan.seconds is not None and now >= self.plan.seconds and not self.sent:
            os.kill(self.pid, self.plan.signal)
            self.sent = True
        return False

    def describe(self) -> dict[str, Any]:
        """For the file."""
        return {"plan": self.plan.describe(), "code": self.code, "seconds": self.seconds, "steps": self.count(STEP)}


@dataclass
class Moment:
    """A job that is interrupted, and goes on until it ends."""

    kind: str
    plans: list[Plan]  # of the first attempts; the others meet nothing
    directory: Path
    arguments: Sequence[str] = JOB
    real: bool = False  # by the real command line
    often: bool = False  # with a checkpoint also every 0.2 s
    store: Path | None = None  # an empty MLflow store to begin with; none: the job makes it
    resume: bool = False
    codes: tuple[int, ...] = (-signal.SIGKILL,)  # what the planned attempts may end with
    between: Callable[["Moment"], None] = lambda moment: None  # after each that was interrupted
    prepare: Callable[[], None] = lambda: None  # before the first attempt
    redraw: Callable[[], Plan] | None = None  # for a signal that came too late
    attempts: list[Attempt] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def begin(self) -> None:
        """Start the next attempt."""
        if not self.attempts:
            self.prepare()
        if self.store is not None and not self.attempts:
            self.directory.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.store, self.directory)
        plan = self.plans[len(self.attempts)] if len(self.attempts) < len(self.plans) else Plan()
        arguments = ["compare", *self.arguments, "--output", str(self.directory)]
        if self.attempts and self.resume and (self.directory / "comparison.json").exists():
            arguments = ["compare", "--resume", str(self.directory)]
        log = self.directory.with_name(f"{self.directory.name}-{len(self.attempts)}.log")
        counts = mmap.mmap(-1, 8 * len(PLACES))
        process = None
        if self.real:
            with log.open("wb") as file:
                process = subprocess.Popen(
                    [sys.executable, "-m", "bonn_qat", *arguments],
                    stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, cwd=self.directory.parent,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},  # as in the forks
                )  # fmt: skip
            pid = process.pid
        else:
            pid = _fork(arguments, log, plan, counts, often=self.often)
        self.attempts.append(Attempt(plan, arguments, log, counts, pid, time.perf_counter(), process))

    def goes_on(self, reference: "Undisturbed") -> bool:
        """Look after the attempt under way; False once the job has ended, as it should or not."""
        attempt = self.attempts[-1]
        if not attempt.poll():
            if time.perf_counter() - attempt.started > 60 + 20 * reference.life(self.real):
                os.kill(attempt.pid, signal.SIGKILL)
                self.problems.append(f"attempt {len(self.attempts)} hung")
            return True
        if attempt.code == 0:
            if len(self.attempts) == 1 and self.redraw is not None:  # too late
                self.attempts.clear()
                _remove(self.directory)
                self.plans[0] = self.redraw()
                self.begin()
                return True
            return False
        planned = len(self.attempts) <= len(self.plans)
        if not planned or attempt.code not in self.codes:
            said = attempt.log.read_text(errors="replace").strip().splitlines()
            self.problems.append(f"attempt {len(self.attempts)} ended with {attempt.code}: {said[-1] if said else ''}")
        self.between(self)
        if len(self.attempts) == ATTEMPTS:
            self.problems.append(f"not at its end after {ATTEMPTS} attempts")
            return False
        self.begin()
        return True

    def describe(self, reference: "Undisturbed") -> dict[str, Any]:
        """For the file: how it ended, beside the undisturbed job."""
        repeated = sum(attempt.count(STEP) for attempt in self.attempts) - reference.attempt.count(STEP)
        if repeated and self.plans[0].signal in SIGNALS and all(a.code != -signal.SIGKILL for a in self.attempts):
            self.problems.append(f"{repeated} steps were made again")
        if self.attempts[0].code == 0:
            self.problems.append(f"it never came by {self.plans[0].place!r} {self.plans[0].number} times")
        differences, store = reference.differences(self.directory)
        return {
            "kind": self.kind,
            "command": "real" if self.real else "fork",
            "often": self.often,
            "resume": self.resume,
            "attempts": [attempt.describe() for attempt in self.attempts],
            "interruptions": sum(attempt.interrupted for attempt in self.attempts),
            "repeated": None if self.real else repeated,
            "differences": differences,
            "store": store,
            "left": sorted(_files(self.directory) - _files(reference.directory)),
            "problems": self.problems,
        }


@dataclass
class Undisturbed:
    """The job as it should end."""

    directory: Path
    attempt: Attempt
    real_seconds: float | None

    def life(self, real: bool) -> float:
        """Seconds from its start to its end."""
        return self.real_seconds if real and self.real_seconds is not None else self.attempt.seconds

    def differences(self, directory: Path) -> tuple[list[str], list[str]]:
        """How the job in ``directory`` ended otherwise: its weights, results and report; and its store."""
        pair = directory, self.directory
        try:
            return list(_differences(*pair)), list(_store_differences(*pair))
        except (BonnQatError, OSError, ValueError, sqlite3.Error) as error:
            return [str(error)], []


def main() -> None:
    """Run everything, print a table, write it where ``--output`` says."""
    args = arguments()
    found = dict(environment(torch.device("cpu")))
    _import_everything()
    started = time.perf_counter()
    with _directory(args.directory) as directory:
        reference = undisturbed(directory, real=args.fresh > 0)

        def save(results: Sequence[dict[str, Any]]) -> None:
            document = {
                "options": vars(args) | {"output": None, "directory": None},
                "environment": found,
                "machine": machine("cpu"),
                "seconds": time.perf_counter() - started,
                "undisturbed": {
                    "job": list(JOB),
                    "seconds": reference.attempt.seconds,
                    "command_line_seconds": reference.real_seconds,
                    "places": {place: reference.attempt.count(place) for place in PLACES},
                },
                "moments": results,
            }
            if args.output:
                args.output.write_text(json.dumps(document, indent=1) + "\n")

        results = together(plan(args, directory, reference), reference, args.jobs, save)
    print(table(results))
    print(
        f"{len(results)} jobs in {time.perf_counter() - started:.0f} s; undisturbed {reference.attempt.seconds:.1f} s"
    )
    if any(result["differences"] or result["problems"] for result in results):
        raise SystemExit(1)


def undisturbed(directory: Path, *, real: bool) -> Undisturbed:
    """Run the job without interruptions, as a fork and by the real command line, whose results must be the same."""
    moment = Moment("undisturbed", [], directory / "undisturbed")
    _finish(moment)
    reference = Undisturbed(moment.directory, moment.attempts[0], None)
    if missing := [place for place in PLACES if not reference.attempt.count(place)]:
        raise SystemExit(f"the job never comes by {missing[0]!r}: what this script patches is called otherwise now")
    if real:
        command = Moment("undisturbed", [], directory / "command-line", real=True)
        _finish(command)
        reference.real_seconds = command.attempts[0].seconds
        if found := reference.differences(command.directory)[0]:
            raise SystemExit(f"the command line gives something else: {found[0]}")
    return reference


def plan(args: argparse.Namespace, directory: Path, reference: Undisturbed) -> list[Moment]:
    """The moments: first at any time, then at the places in turns, then signals, then the disk."""
    rng = random.Random(args.seed)
    moments: list[Moment] = []
    store = _empty_store(directory)

    def at_any_time(number: int = signal.SIGKILL, *, real: bool = False) -> Plan:
        return Plan(number, seconds=rng.uniform(0, reference.life(real)))

    def at(place: str) -> Plan:
        return Plan(place=place, number=rng.randint(1, reference.attempt.count(place)))

    def add(kind: str, first: Plan, *, real: bool = False, **options: Any) -> None:
        plans = [first]
        if rng.random() < args.twice:
            anyhow = real or rng.random() < 0.5
            plans.append(at_any_time(real=real) if anyhow else at(rng.choice(PLACES)))
        moments.append(
            Moment(
                kind, plans, directory / f"{len(moments):03}", real=real, resume=len(moments) % 2 == 1,
                often=not real and rng.random() < 0.5, store=None if real or rng.random() < 0.25 else store, **options,
            )
        )  # fmt: skip

    aimed = args.kills // 2
    for index in range(args.kills - aimed):
        real = index < args.fresh
        job = (*JOB, "--jobs", "2") if real and index == 1 else JOB
        kind = (COMMAND_LINE + (", 2 jobs" if job != JOB else "")) if real else ANYWHEN
        redraw = functools.partial(at_any_time, real=real)
        add(kind, redraw(), real=real, arguments=job, redraw=redraw)
    places = [place for _ in range(aimed // len(PLACES) + 1) for place in rng.sample(PLACES, len(PLACES))]
    for place in places[:aimed]:
        add(place, at(place))
    for number, code in SIGNALS.items():
        redraw = functools.partial(at_any_time, number)
        for _ in range(args.signals):
            # By the signal itself before the command has begun to listen; a shell says the same number to both.
            codes = (code, -number, -signal.SIGKILL)
            add(signal.Signals(number).name, redraw(), codes=codes, redraw=redraw)
    if args.disk:
        for kind, make in ((FULL, _fill), (READ_ONLY, _close), (IMMUTABLE, _lock)):
            target = directory / f"{len(moments):03}"
            prepare, act, between = make(target)
            halfway = Plan(place=STEP, number=rng.randint(1, reference.attempt.count(STEP) // 2), act=act)
            moments.append(Moment(kind, [halfway], target, codes=(3,), prepare=prepare, between=between))
    return moments


def together(
    moments: Sequence[Moment], reference: Undisturbed, jobs: int, save: Callable[[list[dict[str, Any]]], None]
) -> list[dict[str, Any]]:
    """Let ``jobs`` moments go on at once; what each gave, in their order. ``save`` gets what there is after each."""
    waiting = list(enumerate(moments))
    active: list[tuple[int, Moment]] = []
    results: dict[int, dict[str, Any]] = {}
    while waiting or active:
        while waiting and len(active) < jobs:
            index, moment = waiting.pop(0)
            moment.begin()
            active.append((index, moment))
        for index, moment in list(active):
            if not moment.goes_on(reference):
                active.remove((index, moment))
                result = results[index] = moment.describe(reference)
                print(line(result), flush=True)
                save([results[done] for done in sorted(results)])
                if not (result["differences"] or result["problems"]):
                    _remove(moment.directory)
        time.sleep(0.002)
    return [results[index] for index in sorted(results)]


def _finish(moment: Moment) -> None:
    moment.begin()
    while not moment.attempts[0].poll():
        time.sleep(0.002)
    if moment.attempts[0].code != 0:
        raise SystemExit(f"the undisturbed job failed:\n{moment.attempts[0].log.read_text(errors='replace')}")


def line(result: dict[str, Any]) -> str:
    """One moment, on one line."""
    words = "; ".join(result["problems"] + result["differences"][:2]) or "equal"
    met = " then ".join(
        f"{attempt['plan']['place'] or attempt['plan']['signal']}"
        + (
            f" at {attempt['plan']['seconds']:.1f} s"
            if attempt["plan"]["seconds"]
            else f", {attempt['plan']['number']}"
        )
        for attempt in result["attempts"]
        if attempt["code"] != 0
    )
    return f"{result['kind']}: {met or 'never met'}: {words}"


def table(results: Sequence[dict[str, Any]]) -> str:
    """By kind: how many, how many interruptions in all, how many ended equal, and the steps made twice."""
    heads = f"{'jobs':>6}{'times':>7}{'equal':>7}{'steps again':>14}{'store equal':>13}{'files left':>12}"
    lines = [f"{'interrupted':48}{heads}"]
    for kind in [*dict.fromkeys(result["kind"] for result in results), "all"]:
        rows = [result for result in results if kind in (result["kind"], "all")]
        again = [row["repeated"] for row in rows if row["repeated"] is not None]
        steps = f"{statistics.median(again):g} (to {max(again)})" if again else "-"
        equal = sum(not row["differences"] and not row["problems"] for row in rows)
        lines.append(
            f"{kind:48}{len(rows):6}{sum(row['interruptions'] for row in rows):7}{equal:7}{steps:>14}"
            f"{sum(not row['store'] for row in rows):13}{sum(len(row['left']) for row in rows):12}"
        )
    return "\n".join(lines)


def _differences(directory: Path, reference: Path) -> Iterator[str]:
    expected, found = read_comparison(reference), read_comparison(directory)
    if list(found.planned) != list(expected.planned) or found.failures or found.missing:
        yield f"planned {found.planned}, failed {found.failures}, missing {found.missing}"
    if not (directory / "report.html").read_text(encoding="utf-8").rstrip().endswith("</html>"):
        yield "the report is not whole"
    results = {run.name: run for run in found.results}
    for run in expected.results:
        other = results.get(run.name)
        if other is None:
            continue
        for name in ("scheme", "recipe", "size", "histograms"):
            if getattr(run, name) != getattr(other, name):
                yield f"{run.name}: {name}"
        for epoch, (a, b) in enumerate(zip(run.epochs, other.epochs, strict=True), 1):
            names = {name for name in a.keys() | b.keys() if "seconds" not in name}
            yield from (f"{run.name}: {name} of epoch {epoch}" for name in sorted(names) if a.get(name) != b.get(name))
        (tensors, header), (others, other_header) = (
            read_tensors(root / RUNS / f"{run.name}.safetensors") for root in (reference, directory)
        )
        if header != other_header or tensors.keys() != others.keys():
            yield f"{run.name}: the header or the names of its weights"
        yield from (
            f"{run.name}: the tensor {name}"
            for name, tensor in tensors.items()
            if name not in others or tensor.dtype != others[name].dtype or not _same_bits(tensor, others[name])
        )


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def _store_differences(directory: Path, reference: Path) -> Iterator[str]:
    if not (reference / STORE).exists():
        return
    expected, found = _stored(reference), _stored(directory)
    for name, (here, there) in enumerate(zip(expected, found, strict=True)):
        if here != there:
            yield f"{('runs', 'metrics')[name]}: {len(there)} in place of {len(here)}"


def _stored(directory: Path) -> tuple[list[Any], set[Any]]:
    """Names and states of the runs in the MLflow store, and their metrics by epoch, seconds aside."""
    with contextlib.closing(sqlite3.connect(directory / STORE)) as database:
        directory_run = "select run_uuid from tags where key = 'bonn_qat.directory'"
        runs = database.execute(f"select name, status from runs where run_uuid not in ({directory_run})").fetchall()
        metrics = database.execute(
            "select runs.name, key, step, value from metrics join runs on runs.run_uuid = metrics.run_uuid "
            "where key not like '%seconds%' and key not like 'system/%'"
        ).fetchall()
    return sorted(runs), set(metrics)


def _files(directory: Path) -> set[str]:
    return {
        str(path.relative_to(directory))
        for path in directory.rglob("*")
        if path.is_file() and "mlartifacts" not in path.parts and not path.name.startswith(STORE)
    }


# What happens in the processes.


def _import_everything() -> None:
    """So that a fork begins where the command has its imports behind it; no thread may be started before one."""
    os.environ.setdefault("MPLBACKEND", "Agg")
    torch.set_num_threads(1)
    import sklearn.datasets  # noqa: F401
    import timm

    import bonn_qat.models
    import bonn_qat.studies.compare
    import bonn_qat.studies.figures
    import bonn_qat.studies.report

    plugins.schemes()
    bonn_qat.binarize(timm.create_model("wrn10_16"), inplace=True)  # imports a good part of torch
    with contextlib.suppress(ImportError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401
    with contextlib.suppress(ImportError):
        import matplotlib.pyplot as plt

        plt.figure().savefig(os.devnull, format="svg")  # finds the fonts
        plt.close("all")
    if threading.active_count() > 1:
        raise SystemExit(f"a fork would miss the threads {threading.enumerate()[1:]}")


def _fork(arguments: Sequence[str], log: Path, plan: Plan, counts: mmap.mmap, *, often: bool) -> int:
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        _child(arguments, log, plan, counts, often=often)
    return pid


def _child(arguments: Sequence[str], log: Path, plan: Plan, counts: mmap.mmap, *, often: bool) -> NoReturn:
    code = 70
    try:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(file, stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.chdir(log.parent)
        torch.set_num_threads(1)  # a fork's pool of threads is made anew here, while nobody else asks for it
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if often:
            assert train.__kwdefaults__ is not None
            train.__kwdefaults__["checkpoint_seconds"] = SECONDS_BETWEEN_CHECKPOINTS
        _Watch(plan, memoryview(counts).cast("q")).install()
        code = cli.main(list(arguments))
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


class _Watch:
    """Counts how often this process comes by each place, and does there what its plan says.

    Everything is patched from outside: the package knows nothing of it.
    """

    def __init__(self, plan: Plan, counts: memoryview) -> None:
        self._plan, self._counts = plan, counts
        self._fsync, self._replace, self._unlink = os.fsync, os.replace, os.unlink

    def install(self) -> None:
        """Put the watches in their places; raises AttributeError where the package has changed."""
        register_optimizer_step_pre_hook(lambda *_: self.comes_by(STEP))
        for owner, name, place in (
            (layers.BinaryLayer, "enter", STAGE), (layers.BinaryLayer, "adopt", ADOPT), (trainer, "update_bn", NORMS),
            (regularizers.FeatureLoss, "start", START), (data.TensorData, "test_batches", TEST),
        ):  # fmt: skip
            setattr(owner, name, self._watched(getattr(owner, name), place))
        os.fsync, os.replace, os.unlink = self.fsync, self.replace, self.unlink  # type: ignore[assignment]

    def comes_by(self, place: str) -> None:
        """Count, and do what is planned for the count."""
        index = PLACES.index(place)
        self._counts[index] += 1
        if self._plan.place == place and self._counts[index] == self._plan.number:
            (self._plan.act or _die)()

    def fsync(self, file: int) -> None:
        """In the place of ``os.fsync``: a file's bytes are with the system, and not yet on the disk."""
        if stat.S_ISREG(os.fstat(file).st_mode):
            written = os.readlink(f"/proc/self/fd/{file}")
            place = self._place(written, "half")
            if place is not None:
                planned = self._plan.place, self._plan.number
                if planned == (place, self._counts[PLACES.index(place)] + 1) and self._plan.act is None:
                    os.ftruncate(file, os.fstat(file).st_size // 2)
                self.comes_by(place)
            self._told(written, "unsynced")
        self._fsync(file)

    def replace(self, source: Any, target: Any, **options: Any) -> None:
        """In the place of ``os.replace``."""
        self._told(target, "unnamed")
        self._replace(source, target, **options)
        self._told(target, "named")

    def unlink(self, path: Any, **options: Any) -> None:
        """In the place of ``os.unlink``: a checkpoint goes when the run has a result."""
        if os.path.exists(path) and not os.path.basename(path).startswith("."):
            self._told(path, "unlinked")
        self._unlink(path, **options)

    def _told(self, path: Any, phase: str) -> None:
        place = self._place(path, phase)
        if place is not None:
            self.comes_by(place)

    @staticmethod
    def _place(path: Any, phase: str) -> str | None:
        name = os.path.basename(path)
        if name.startswith("."):
            name = re.sub(r"^\.|\.\d+$", "", name)
        if name == "report.html":
            return REPORT
        if name.endswith(".safetensors") and "unfinished" in name:
            return _CHECKPOINT.get(phase, RESULT)
        return RESULT if name.endswith((".safetensors", ".json")) else None

    def _watched(self, function: Callable[..., Any], place: str) -> Callable[..., Any]:
        """``function``, in the middle: at each batch of those that it gets or gives, or when it has done its work."""

        def batches(found: Iterable[Any]) -> Iterator[Any]:
            for batch in found:
                yield batch
                self.comes_by(place)

        if place == TEST:
            return lambda *args, **options: batches(function(*args, **options))
        if place == NORMS:
            return lambda found, *rest, **options: function(batches(found), *rest, **options)
        if place == START:
            return lambda loss, found: function(loss, batches(found))

        def watched(*args: Any, **options: Any) -> Any:
            result = function(*args, **options)
            self.comes_by(place)
            return result

        return watched


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # it may not be dead yet


# The disk.

Disk = tuple[Callable[[], None], Callable[[], None], Callable[[Moment], None]]  # prepare, act, between


def _fill(directory: Path) -> Disk:
    """A file system of its own that a step fills, where one may be mounted; else writing fails as if it were full."""
    filler = directory / "filler"

    def prepare() -> None:
        directory.mkdir(parents=True)
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(directory)], capture_output=True, check=False
        )

    def act() -> None:
        if not directory.is_mount():
            _refuse(errno.ENOSPC)
            return
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(2**20))
        with contextlib.suppress(OSError), filler.open("ab", buffering=0) as file:
            while True:
                file.write(bytes(1))

    def between(moment: Moment) -> None:
        _check_disk(moment)
        filler.unlink(missing_ok=True)

    return prepare, act, between


def _close(directory: Path) -> Disk:
    """From a step on no file can be opened for writing, as where the system has made a faulty disk read-only."""
    really = io.open

    def refusing(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if not isinstance(file, int) and set(mode) & set("wax+") and Path(file).is_relative_to(directory):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(file))
        return really(file, mode, *args, **options)

    def act() -> None:
        io.open = builtins.open = refusing

    return (lambda: None), act, _check_disk


def _lock(directory: Path) -> Disk:
    """The folder of the runs takes no new files from a step on, by ``chattr``; without it writing fails as if so."""
    runs = directory / RUNS

    def change(flag: str) -> bool:
        return subprocess.run(["chattr", flag, str(runs)], capture_output=True, check=False).returncode == 0

    def act() -> None:
        if not change("+i"):
            _refuse(errno.EPERM)

    def between(moment: Moment) -> None:
        change("-i")
        _check_disk(moment)

    return (lambda: runs.mkdir(parents=True)), act, between


def _refuse(number: int) -> None:
    def refuse(file: int) -> NoReturn:
        raise OSError(number, os.strerror(number))

    os.fsync = refuse  # type: ignore[assignment]


def _check_disk(moment: Moment) -> None:
    said = [text for text in moment.attempts[-1].log.read_text(errors="replace").splitlines() if text.strip()]
    if not said or not said[-1].startswith("bonn-qat: ") or sum(text.startswith("bonn-qat: ") for text in said) != 1:
        moment.problems.append(f"not told in one line: {said[-1] if said else 'nothing'}")
    kept = list((moment.directory / RUNS).glob("[!.]*.unfinished.safetensors"))
    if not kept:
        moment.problems.append("no checkpoint was kept")
    for path in kept:
        try:
            read_state(path)
        except BonnQatError as error:
            moment.problems.append(str(error))


def _remove(directory: Path) -> None:
    if directory.is_mount():
        subprocess.run(["umount", str(directory)], check=False)
    subprocess.run(["rm", "-rf", str(directory)], check=True)


def _empty_store(directory: Path) -> Path | None:
    """What takes MLflow seconds to make, made once, in a fork; none without MLflow."""
    path = directory / STORE
    pid = os.fork()
    if not pid:
        with contextlib.suppress(Exception):
            import mlflow

            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # it tells of its tables
            mlflow.MlflowClient(tracking_uri=f"sqlite:///{path}").search_experiments()
        os._exit(0)
    os.waitpid(pid, 0)
    return path if path.exists() else None


@contextlib.contextmanager
def _directory(chosen: Path | None) -> Iterator[Path]:
    """Where the jobs write: as chosen, or a temporary one, removed unless jobs that ended otherwise are left in it."""
    if chosen is not None:
        chosen.mkdir(parents=True, exist_ok=True)
        yield chosen.resolve()
        return
    path = Path(tempfile.mkdtemp(prefix="interruptions-"))
    try:
        yield path
    finally:
        if any(inner.is_dir() for inner in path.glob("[0-9]*")):
            print(f"what ended otherwise is kept in {path}")
        else:
            _remove(path)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="SIGKILLs: half at any time, half at places")
    parser.add_argument("--fresh", type=int, default=3, help="of those at any time, how many by the real command line")
    parser.add_argument("--signals", type=int, default=5, help="SIGTERMs, and as many SIGINTs")
    parser.add_argument("--no-disk", dest="disk", action="store_false", help="leave out the full and read-only disk")
    parser.add_argument("--twice", type=float, default=0.25, help="share of the moments that a second SIGKILL follows")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--jobs", type=int, default=1, help="moments at once")
    parser.add_argument("--directory", type=Path, help="where the jobs write, and what differs is kept")
    parser.add_argument("--output", type=Path, help="a JSON file for the result")
    args = parser.parse_args(argv)
    args.fresh = min(args.fresh, args.kills - args.kills // 2)
    return args


if __name__ == "__main__":
    main()
