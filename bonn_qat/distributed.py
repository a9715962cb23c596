"""Collectives for runs that torchrun or ``accelerate launch`` starts in several processes.

Without a process group there is one process, rank 0, and every collective does nothing.

>>> rank(), world(), all_reduce(torch.ones(2)), broadcast("text")
(0, 1, tensor([1., 1.]), 'text')
"""

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from bonn_qat.errors import BonnQatError

_is_alone = False


def rank() -> int:
    """The rank of this process; rank 0 writes files and reports. 0 without a process group."""
    return dist.get_rank() if _grouped() else 0


def world() -> int:
    """The number of processes (world size); 1 without a process group."""
    return dist.get_world_size() if _grouped() else 1


def device() -> torch.device:
    """The GPU of this process (``LOCAL_RANK`` under a launcher, else the first one), or the CPU if there is no GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def all_reduce(tensor: Tensor) -> Tensor:
    """The sum of ``tensor`` over all processes, in place."""
    if _grouped():
        dist.all_reduce(tensor)
    return tensor


def average(tensor: Tensor) -> Tensor:
    """The mean of ``tensor`` over all processes, which must hold equal parts of a batch; no gradient flows through it.

    For quantizers that use batch statistics. Without a process group it returns ``tensor`` itself.
    """
    return all_reduce(tensor.detach().clone()) / world() if _grouped() else tensor


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within the block, the functions of this module behave as if there were no process group."""
    global _is_alone
    before, _is_alone = _is_alone, True
    try:
        yield
    finally:
        _is_alone = before


def all_gather(tensor: Tensor) -> list[Tensor]:
    """The tensors of all processes, ordered by rank; they must have the same shape and be on the group's device."""
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
    """Within the block there is a process group if a launcher started several processes (``WORLD_SIZE`` is above 1).

    Raises BonnQatError if the environment variables are incomplete or invalid.
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
            f"WORLD_SIZE is {said!r} in the environment, but the other variables of a launcher are missing or invalid "
            f"({' '.join(str(error).split())}); start with torchrun or accelerate launch, or unset WORLD_SIZE"
        ) from error
    try:
        yield
    except BaseException:
        with contextlib.suppress(RuntimeError):  # where another process died; that is not why the block ended
            dist.destroy_process_group()
        raise
    dist.destroy_process_group()


def _grouped() -> bool:
    return not _is_alone and dist.is_available() and dist.is_initialized()
