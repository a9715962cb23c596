"""Exceptions for bad input. Each message is one line, which a command prints as it is."""

import difflib
from collections.abc import Iterable

_LISTED = 40  # the longest list of names that is printed in full


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


def first_line(error: Exception) -> str:
    """The first line of an error's text, or its type where it has none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
