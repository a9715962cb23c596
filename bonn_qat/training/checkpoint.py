"""Checkpoint: the state of an unfinished training run as a file, and when to write it."""

import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple, final

import torch
from torch import Tensor

from bonn_qat import distributed
from bonn_qat.errors import BonnQatError, InvalidData
from bonn_qat.files.plain import shown
from bonn_qat.files.tensors import digest, read_tensors, write_tensors
from bonn_qat.files.validate import Allowed, read_own
from bonn_qat.training.interrupts import TERMINATED, Interrupts
from bonn_qat.training.results import Time, Times, check_histograms

FORMAT = 2


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The state of a run beside its tensors: the header of its file.

    ``epochs`` are the metrics of the finished epochs, ``step`` the optimizer steps of the current one, ``stage`` the
    index of the stage of the last step, -1 before the first. ``data`` describes the data, and ``fingerprint`` is their
    hash. ``seconds`` is the time spent, ``histograms`` are those of the result, ``scaler`` is the state of the loss
    scaler. ``started`` and ``times`` are those of the result too. Checkpoints of earlier versions lack ``fingerprint``,
    ``started`` and ``times``.
    """

    run_id: str
    recipe: Mapping[str, Any]
    data: Mapping[str, Any]
    stage: Annotated[int, Allowed("at least -1", lambda stage: stage >= -1)]
    step: Annotated[int, Allowed("at least 0", lambda step: step >= 0)]
    epochs: list[dict[str, float]]
    histograms: Annotated[dict[str, dict[str, dict[str, list[float]]]], check_histograms]
    seconds: Annotated[float, Allowed("at least 0", lambda seconds: seconds >= 0)]
    scaler: Mapping[str, float]
    fingerprint: str = ""
    started: Time = 0.0
    times: Times = field(default_factory=list)


class RunState(NamedTuple):
    """Everything that the rest of a run depends on; a tensor is named after its part: ``optimizer.0.exp_avg``."""

    progress: Progress
    tensors: Mapping[str, Tensor]

    def part(self, name: str) -> dict[str, Tensor]:
        """The tensors whose names begin with ``name`` and a dot, without it."""
        return {key.removeprefix(f"{name}."): t for key, t in self.tensors.items() if key.startswith(f"{name}.")}


def write_state(path: str | Path, state: RunState) -> Path:
    """Write ``state`` atomically. Raises OSError if the file cannot be written."""
    header = {"kind": "unfinished run", "format": FORMAT, **asdict(state.progress)}
    return write_tensors(path, state.tensors, header | {"sha256": digest(state.tensors, header)})


def read_state(path: str | Path) -> RunState:
    """Read what :func:`write_state` wrote.

    Raises InvalidData naming the file for one that cannot be read, was altered, or is not a checkpoint.
    """
    tensors, header = read_tensors(path)
    if header.pop("kind", None) != "unfinished run" and "stage" not in header:
        raise InvalidData(f"{path} is not a checkpoint of a training run; delete it, or give another path")
    if header.get("format") != FORMAT:
        raise InvalidData(
            f"{path} is a checkpoint of format {shown(header.get('format'))}; this version of bonn-qat resumes "
            f"{FORMAT}; delete it to start the run again"
        )
    checksum = header.pop("sha256", None)
    if checksum != digest(tensors, {"kind": "unfinished run", **header}):
        raise InvalidData(f"{path} was altered after it was written: its checksum does not match; delete it")
    del header["format"]
    return RunState(read_own(Progress, header, f"{path} is not a checkpoint"), tensors)


def mismatch(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str | None:
    """How tensors differ in name, type or shape from the expected ones; None if they do not."""
    if odd := sorted(found.keys() ^ expected.keys()):
        return f"{shown(odd[0])[1:-1]} is {'missing' if odd[0] in expected else 'unknown'}"
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
            return f"{name} is {found[name].dtype} {tuple(found[name].shape)}, not {tensor.dtype} {tuple(tensor.shape)}"
    return None


@final
class Checkpointer:
    """Decides when a run writes a checkpoint, and stops the run after writing one when it has to stop.

    ``write`` writes a checkpoint; None writes none. It is called by :meth:`save`, by :meth:`after_step` once
    ``seconds`` have passed since the last time, and before a run stops: for Ctrl-C or SIGTERM, which ``interrupts``
    defers, and for whatever ``tick`` raises. All processes of a group call the same methods at the same points, and
    agree on the outcome.
    """

    def __init__(
        self,
        write: Callable[[], None] | None = None,
        *,
        seconds: float = math.inf,
        interrupts: Interrupts | None = None,
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self._write, self._seconds = write, seconds
        self._interrupts = Interrupts() if interrupts is None else interrupts  # which is false until a signal comes
        self._tick = tick
        self._saved = time.monotonic()

    def save(self) -> None:
        """Write a checkpoint now. Raises OSError where the system refuses to; the last one stays."""
        if self._write is not None:
            self._write()
            self._saved = time.monotonic()

    def after_step(self, device: torch.device, *, may_wait: bool) -> None:
        """Call after each step; ``may_wait`` says whether this is a step at which to wait for the device."""
        try:
            self._tick()
        except BaseException as error:
            if distributed.world() == 1:
                try:
                    self.save()
                except (OSError, BonnQatError) as second:
                    error.add_note(f"the state of the run could not be written either: {second}")
            raise
        if not may_wait:
            return
        stops, is_due = bool(self._interrupts), time.monotonic() - self._saved >= self._seconds
        if distributed.world() > 1:
            counts = torch.tensor([stops, is_due and distributed.rank() == 0], dtype=torch.float32, device=device)
            stops, is_due = (count > 0 for count in distributed.all_reduce(counts).tolist())
        try:
            if stops or is_due:
                self.save()
        except BonnQatError:
            if not stops:  # what the run would otherwise end with, after it has resumed
                raise
        if stops:
            self._interrupts.deliver()
            sys.exit(TERMINATED)  # the signal came to another process of the group

    def between_batches(self, *, resumable: bool) -> None:
        """Call between batches without a step; ``resumable`` says whether the run could resume from its state here."""
        if self._interrupts and distributed.world() == 1:
            if resumable:
                self.save()
            self._interrupts.deliver()
