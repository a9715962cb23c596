"""Exceptions for bad input. Each message is one line, which a command prints as it is."""

import contextlib
import difflib
import errno
import re
from collections.abc import Iterable, Iterator

_LISTED = 40  # the longest list of names that is printed in full
_LOST = re.compile(r"connection (closed|reset|refused)|broken pipe|timed out waiting|NCCL (error|comm)", re.IGNORECASE)
_NO_MEMORY = re.compile(r"(can't|cannot) allocate memory|out of memory|not enough memory|bad[_ ]alloc", re.IGNORECASE)


class BonnQatError(Exception):
    """Base class of every error that this package raises about its input."""


class UnknownName(BonnQatError, LookupError):
    """An unknown name; the message suggests similar names and lists the known ones.

    >>> raise UnknownName("scheme", "bon", ["bonn", "xnor"])
    Traceback (most recent call last):
    bonn_qat.errors.UnknownName: unknown scheme 'bon'; did you mean 'bonn'? known: bonn, xnor
    """

    def __init__(self, kind: str, given: str, known: Iterable[str], note: str = "") -> None:
        known = sorted(known)
        near = difflib.get_close_matches(given, known, n=3)
        guess = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        names = ", ".join(known) or "none"
        if len(known) > _LISTED:
            names = f"{len(known)} names, such as {', '.join(known[:3])}"
        super().__init__(f"unknown {kind} {given!r}; {guess}known: {names}{note}")


class InvalidModel(BonnQatError, ValueError):
    """A model that does not allow the requested operation."""


class InvalidRecipe(BonnQatError, ValueError):
    """A recipe or an option with an impossible value, an unknown key or a missing key."""


class InvalidData(BonnQatError, ValueError):
    """Data or a file that is missing, empty, damaged or inconsistent with the model."""


class PluginConflict(BonnQatError):
    """Several plugins offer the name that was asked for."""


class PluginError(BonnQatError):
    """A plugin, or a scheme's own code, raised an exception."""


class TrainingDiverged(BonnQatError, ArithmeticError):
    """A loss term, a parameter, a buffer or the input of a binary layer became NaN or infinite."""


def check_model(model: object) -> None:
    """Raise InvalidModel for what is no ``torch.nn.Module``.

    >>> check_model("resnet18")
    Traceback (most recent call last):
    bonn_qat.errors.InvalidModel: this takes a model; got 'resnet18'; create it first: timm.create_model('resnet18')
    """
    from torch import nn  # slow to import

    if not isinstance(model, nn.Module):
        advice = (
            f"create it first: timm.create_model({model!r})" if isinstance(model, str) else "give a torch.nn.Module"
        )
        raise InvalidModel(f"this takes a model; got {model!r}; {advice}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that there is no memory left: Python's, torch's for a CPU or a GPU, or the system's.

    >>> is_out_of_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."))
    True
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError) and error.errno == errno.ENOMEM:
        return True
    return isinstance(error, RuntimeError | OSError) and bool(_NO_MEMORY.search(str(error)))


def is_disconnection(error: BaseException) -> bool:
    """Whether ``error`` says that torch cannot reach another process of the group.

    >>> is_disconnection(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:2222"))
    True
    """
    kinds = {cls.__name__ for cls in type(error).__mro__}
    return "DistError" in kinds or ("RuntimeError" in kinds and bool(_LOST.search(str(error))))


@contextlib.contextmanager
def within_memory(what: str) -> Iterator[None]:
    """Turn a lack of memory within the block into InvalidData: ``what`` does not fit into memory."""
    try:
        yield
    except Exception as error:
        if isinstance(error, BonnQatError) or not is_out_of_memory(error):
            raise
        raise InvalidData(f"{what} does not fit into memory") from error


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
