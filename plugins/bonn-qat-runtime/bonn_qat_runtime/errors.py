"""Errors: what this package raises about its input, each with a message of one line."""


class RuntimeFailure(Exception):
    """Base class of the errors of this package."""


class InvalidFile(RuntimeFailure, ValueError):
    """A file that is missing, truncated, altered or no packed network; or images of another size or type."""


class InvalidThreads(RuntimeFailure, ValueError):
    """A number of threads below 1, or no number."""


class UnsupportedOperator(RuntimeFailure, NotImplementedError):
    """A packed network with an operator that this runtime does not have; ``bonn_qat.PackedModel`` runs it."""


class LibraryMissing(RuntimeFailure, ImportError):
    """The compiled library is missing, older than its sources, or has nothing for this CPU."""


class InvalidPlan(RuntimeFailure, ValueError):
    """A plan that would read or write what is not its own."""


def shown(value: object) -> str:
    """``repr(value)`` for a message, in less than a line."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 120 else f"{text[:117]}..."
