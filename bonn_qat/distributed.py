"""Distributed: what a run must know that torchrun or ``accelerate launch`` has started in several processes."""

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor


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


def add_up(tensor: Tensor) -> Tensor:
    """The sum of ``tensor`` over all processes, in place."""
    if _grouped():
        dist.all_reduce(tensor)
    return tensor


def agreed(text: str) -> str:
    """What the first process calls it."""
    texts = [text]
    if _grouped():
        dist.broadcast_object_list(texts)
    return texts[0]


def wait() -> None:
    """Go on when every process has come here."""
    if _grouped():
        dist.barrier()


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """A process group for the block if a launcher has started several processes (``WORLD_SIZE``), else nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) < 2 or _grouped():
        yield
        return
    own = device()
    if own.type == "cuda":
        torch.cuda.set_device(own)
    dist.init_process_group("nccl" if own.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()
