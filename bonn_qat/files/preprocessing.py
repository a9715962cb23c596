"""Preprocessing: how an image becomes the input of a network, and what its classes are called."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from bonn_qat.errors import InvalidData
from bonn_qat.files.validate import Allowed

_MOST_LABELS = 2**16
_Numbers = Annotated[
    tuple[float, ...],
    Allowed(
        "one finite number for each channel, at most 1,024", lambda x: 1 <= len(x) <= 1024 and _all(math.isfinite, x)
    ),
]


def _all(holds: Callable[[float], bool], numbers: tuple[float, ...]) -> bool:
    return all(map(holds, numbers))


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """The data that a network was trained on: ``(x - mean) / std`` of each channel of images with values from 0 to 1.

    ``labels`` are the names of the classes in the order of the logits, empty where they are not known. ``crop`` is the
    part of an image's height and width, in its middle, that the network saw in evaluation. Raises
    InvalidData for another number of means than of standard deviations.
    """

    mean: _Numbers
    std: Annotated[_Numbers, Allowed("numbers above 0", lambda x: _all(lambda n: n > 0, x))]
    labels: Annotated[
        tuple[str, ...],
        Allowed(
            f"at most {_MOST_LABELS:,} names of characters that can be printed",
            lambda names: len(names) <= _MOST_LABELS and all(map(str.isprintable, names)),
        ),
    ] = ()
    crop: Annotated[float, Allowed("a number above 0 and at most 1", lambda x: 0 < x <= 1)] = 1.0

    def __post_init__(self) -> None:
        if len(self.mean) != len(self.std):
            raise InvalidData(f"mean has {len(self.mean)} channels and std {len(self.std)}; give both as many")


def preprocessing_of(model: object) -> Preprocessing | None:
    """``model.preprocessing``, which networks of training runs and weights files have; None if it is not known."""
    found = getattr(model, "preprocessing", None)
    return found if isinstance(found, Preprocessing) else None
