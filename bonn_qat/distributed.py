"""Distributed: what a run must know that torchrun or ``accelerate launch`` has started in several processes."""

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from bonn_qat.errors import BonnQatError

_is_alone = False


def rank() -> int:
    """This process' number, 0 for the one that writes and reports; 0 without a process group."""
    return dist.get_rank() if _grouped() else 0


def world() -> int:
    """The number of processes of the run; 1 without a process group."""
    return dist.get_world_size() if _grouped() else 1


def device() -> torch.device:
    """A GPU where there is one, this process' own under a launcher; else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def all_reduce(tensor: Tensor) -> Tensor:
    """The sum of ``tensor`` over all processes, in place."""
    if _grouped():
        dist.all_reduce(tensor)
    return tensor


def average(tensor: Tensor) -> Tensor:
    """The mean of ``tensor`` over all processes, whose parts of a batch are equal; ``tensor`` itself without a group.

    For quantizers whose statistics are those of a batch. No gradient goes through it.
    """
    return all_reduce(tensor.detach().clone()) / world() if _grouped() else tensor


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within the block this process is one without a group, as far as this module goes."""
    global _is_alone
    before, _is_alone = _is_alone, True
    try:
        yield
    finally:
        _is_alone = before


def all_gather(tensor: Tensor) -> list[Tensor]:
    """The tensors of all processes, in their order; all of one shape and on the device of the group."""
    if not _grouped():
        return [tensor]
    found = [torch.empty_like(tensor) for _ in range(world())]
    dist.all_gather(found, tensor)
    return found


def broadcast(text: str) -> str:
    """Broadcast ``text`` from rank 0 to every process, and return it."""
    texts = [text]
    if _grouped():
        dist.broadcast_object_list(texts)
    return texts[0]


def barrier() -> None:
    """Wait until every process of the group has reached this point."""
    if _grouped():
        dist.barrier()


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """A process group for the block if a launcher has started several processes (``WORLD_SIZE``), else nothing.

    Raises BonnQatError for variables of the environment that no launcher leaves.
    """
    said = os.environ.get("WORLD_SIZE", "1")
    if said == "1" or _grouped():
        yield
        return
    own = device()
    if own.type == "cuda":
        torch.cuda.set_device(own)
    try:
        dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
    except ValueError as error:
        raise BonnQatError(
            f"WORLD_SIZE is {said!r} in the environment, but the rest of what a launcher sets is not there "
            f"({' '.join(str(error).split())}); start with torchrun or accelerate launch, or unset WORLD_SIZE"
        ) from error
    try:
        yield
    finally:
        dist.destroy_process_group()


def _grouped() -> bool:
    return not _is_alone and dist.is_available() and dist.is_initialized()
