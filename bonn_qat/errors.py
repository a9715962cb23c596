"""What a user can do wrong, as exceptions whose text is the one line that a command prints."""

import difflib
from collections.abc import Iterable

_LISTED = 40  # names that a reader still looks through


class BonnQatError(Exception):
    """Base of every error that this package raises about its input."""


class UnknownName(BonnQatError, LookupError):
    """A name that nobody offers."""

    def __init__(self, kind: str, given: str, known: Iterable[str], note: str = "") -> None:
        known = sorted(known)
        near = difflib.get_close_matches(given, known, n=3)
        guess = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        names = ", ".join(known) or "none"
        if len(known) > _LISTED:
            names = f"{len(known)} names, such as {', '.join(known[:3])}"
        super().__init__(f"unknown {kind} {given!r}; {guess}known: {names}{note}")


class InvalidModel(BonnQatError, ValueError):
    """A model that cannot be treated as asked."""


class InvalidRecipe(BonnQatError, ValueError):
    """A recipe with an impossible value, an unknown key or a missing one."""


class InvalidData(BonnQatError, ValueError):
    """Data that is missing, empty or inconsistent with the model."""


class PluginConflict(BonnQatError):
    """Several plugins offer the name that was asked for."""


class PluginError(BonnQatError):
    """A plugin, or a scheme's own code, raised an exception."""


class TrainingDiverged(BonnQatError, ArithmeticError):
    """A loss term became NaN or infinite."""
