"""FlipRatio: how many binary weights change their sign during training."""

import torch
from torch import Tensor, nn

from bonn_qat.binarization.binarize import binary_layers
from bonn_qat.errors import InvalidModel
from bonn_qat.layers import BinaryLayer


class FlipRatio:
    """The share of binary weights whose sign changed from one :meth:`update` to the next, 0 to 1 (Larq's FlipRatio).

    Call :meth:`update` after each step or each epoch; :meth:`compute` averages over the intervals since the last
    :meth:`reset`. The first of these begins at the last update before the reset, or at the creation; Larq's metric
    forgets the signs too, so that its first interval begins with the update after the reset. The sign is that of the
    quantized weight; for values other than ``+-scale``, such as AdaBin's, that of its difference from the middle of the
    filter's range. Raises InvalidModel for a model without binary layers.

    >>> from bonn_qat import binarize
    >>> net = binarize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10)))
    >>> ratio = FlipRatio(net)
    >>> net[1].weight.data.neg_()[0, 0, 0, 0] *= -1
    >>> ratio.update()
    >>> ratio.compute()["1"] == (576 - 1) / 576
    True
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = dict(binary_layers(model))
        if not self._layers:
            raise InvalidModel(f"no binary weights in {type(model).__name__}; binarize it before making the metric")
        self._signs = self._measure()
        self.reset()

    def reset(self) -> None:
        """Forget the intervals, but not the last signs."""
        self._flips: dict[str, Tensor] = {}
        self._updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Compare the signs with those of the last call, or of the start."""
        before, self._signs = self._signs, self._measure()
        for name, signs in self._signs.items():
            flips = (signs != before[name]).sum()
            self._flips[name] = flips + self._flips[name] if name in self._flips else flips
        self._updates += 1

    def compute(self) -> dict[str, float]:
        """The mean share for each binary layer by name, and for all of them together under ``""``.

        Raises ValueError before the first update.
        """
        if not self._updates:
            raise ValueError("FlipRatio.compute() comes after at least one update()")
        sizes = {name: signs.numel() * self._updates for name, signs in self._signs.items()}
        flips = {name: int(count) for name, count in self._flips.items()}
        ratios = {name: flips[name] / sizes[name] for name in sizes}
        return {"": sum(flips.values()) / sum(sizes.values()), **ratios}

    @property
    def signs(self) -> dict[str, Tensor]:
        """The last signs by layer, bool, of the weight's shape; set them to continue another FlipRatio."""
        return self._signs

    @signs.setter
    def signs(self, signs: dict[str, Tensor]) -> None:
        self._signs = signs

    @torch.no_grad()
    def _measure(self) -> dict[str, Tensor]:
        return {name: _signs(layer) for name, layer in self._layers.items()}


def _signs(layer: BinaryLayer) -> Tensor:
    value, _ = layer.weight_quant.quantize(layer.latent())
    if layer.weight_quant.scaled_sign:
        return value >= 0
    kernels = value.flatten(1)
    return kernels >= (kernels.amin(1, keepdim=True) + kernels.amax(1, keepdim=True)) / 2
