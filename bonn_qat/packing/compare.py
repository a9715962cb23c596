"""Compare: whether what was made of a model computes what the model computes."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bonn_qat.binarization.dry_run import tensors_in
from bonn_qat.errors import InvalidModel, is_out_of_memory
from bonn_qat.inputs import Inputs
from bonn_qat.packing.ready import reason

_MOST = 0.25  # of the norm of an output, by which what was made may differ
_ROUNDING = 1e-3  # of the norm, by which two calls of the model may differ


@torch.no_grad()
def compare(model: nn.Module, made: Callable[..., Any], inputs: Inputs, failed: str, *, is_exact: bool = True) -> None:
    """Raise InvalidModel, whose message starts with ``failed``, unless ``made`` computes what ``model`` does.

    torch.export sees one number of images and one call, so it compares one, two and three images, and the model with
    itself. Without ``is_exact`` rounding may turn so many signs that values tell nothing.
    """
    for count in (1, 2, 3):
        drawn = inputs.drawn(count, seed=count)
        try:
            expected, again = (list(tensors_in(drawn.map(Tensor.clone).call(model))) for _ in range(2))
        except Exception:  # a model may take some numbers of images only
            continue
        if _differ(expected, again, _ROUNDING):
            raise InvalidModel(f"{failed}: it computes something else in each call")
        try:
            found = list(tensors_in(drawn.call(made)))
        except Exception as error:  # what torch raises for another number of images than it has seen
            if is_out_of_memory(error):
                raise
            raise InvalidModel(f"{failed}: {reason(error)}") from error
        if [x.shape for x in expected] != [x.shape for x in found]:
            raise InvalidModel(f"{failed}: its outputs for {count} images are not one for each image")
        # Rounding may turn signs behind float layers, but not change most of an output.
        if is_exact and _differ(expected, found, _MOST):
            raise InvalidModel(f"{failed}: for {count} images it computes something else than for others")


def _differ(expected: list[Tensor], found: list[Tensor], most: float) -> bool:
    return any(
        not bool((x - y).norm() <= most * x.norm())
        for x, y in zip(expected, found, strict=True)
        if x.is_floating_point() and x.isfinite().all()
    )
