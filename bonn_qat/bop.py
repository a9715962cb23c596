"""Bop: the optimizer that has no latent weights (Helwegen et al., NeurIPS 2019, arXiv:1906.02107).

w a binary weight, -1 or +1; g its gradient; m the moving average of g; all of one shape, ``(O, I, kh, kw)`` in a
convolution. ``threshold`` is the paper's tau, ``gamma`` its adaptivity rate.
"""

from collections.abc import Callable
from typing import Any, overload

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, ParamsT

from bonn_qat.binarization.binarize import binary_layers
from bonn_qat.errors import InvalidModel
from bonn_qat.functional import sign


class Bop(Optimizer):
    """Flips a binary weight when its gradients have pushed it in the same direction for long enough.

    ``m <- (1 - gamma) m + gamma g``, then ``w <- -w`` where ``|m| > threshold`` and ``sign(m) = sign(w)``; the defaults
    are the paper's. The parameters are the binary weights themselves (:func:`binary_parameters`); all others belong to
    another optimizer. Creating it, or adding a group, **changes the parameters in place**: each becomes its sign, with
    ``sign(0) = +1``. Load a float checkpoint before that.

    Each group has its own ``threshold`` and ``gamma``. There is no learning rate that a scheduler could change; set
    ``group["gamma"]`` instead, which the paper divides by 10 every 100 epochs. A higher gamma or a lower threshold
    flips more weights: :class:`bonn_qat.FlipRatio` measures how many.

    Raises ValueError for a threshold below 0 or infinite, a gamma that is not above 0 and at most 1, and parameters
    of fewer than 32 bits, whose rounding would lose ``gamma g`` beside ``m``.

    >>> weight = nn.Parameter(torch.tensor([0.3, -2.0]))
    >>> Bop([weight]).param_groups[0]["threshold"], weight.tolist()
    (1e-08, [1.0, -1.0])
    """

    def __init__(self, params: ParamsT, threshold: float = 1e-8, gamma: float = 1e-4) -> None:
        super().__init__(params, {"threshold": threshold, "gamma": gamma})

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, which become their signs, with their own ``threshold`` and ``gamma`` or the defaults."""
        given = {**self.defaults, **param_group}
        if not 0 <= given["threshold"] < float("inf"):
            raise ValueError(f"threshold of Bop is {given['threshold']!r}; allowed: a number, at least 0")
        if not 0 < given["gamma"] <= 1:
            raise ValueError(f"gamma of Bop is {given['gamma']!r}; allowed: above 0 and at most 1")
        super().add_param_group(param_group)
        parameters = self.param_groups[-1]["params"]
        for parameter in parameters:
            if parameter.dtype not in (torch.float32, torch.float64):
                self.param_groups.pop()
                raise ValueError(f"a parameter of Bop is {parameter.dtype}; allowed: torch.float32 and torch.float64")
        for parameter in parameters:
            parameter.copy_(sign(parameter))

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the averages and flip; parameters without a gradient are left out. ``closure`` computes the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                # add_(alpha=gamma) would round once or twice, depending on the processor and the position.
                momentum = state["momentum"].mul_(1 - group["gamma"]).add_(group["gamma"] * weight.grad)
                # For a weight of +-1 this is both conditions.
                weight.copy_(torch.where(momentum * weight > group["threshold"], -weight, weight))
        return loss


def binary_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """The binary weights of a model, for :class:`Bop`, and all its other parameters, each once.

    Raises InvalidModel for a model without binary layers.
    """
    binary = {id(layer.weight) for _, layer in binary_layers(model)}
    if not binary:
        raise InvalidModel(f"no binary weights in {type(model).__name__}; binarize it before asking for them")
    split: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in model.parameters():
        split[id(parameter) not in binary].append(parameter)
    return split
