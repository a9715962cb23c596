"""Layers: the binary convolution, and what becomes of a float layer by default."""

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bonn_qat import functional
from bonn_qat.hookspecs import hookimpl
from bonn_qat.quantizers import ActivationQuantizer, WeightQuantizer
from bonn_qat.scheme import ACTIVATIONS, Scheme, Stage


class BinaryConv2d(nn.Conv2d):
    """``norm -> input_quant -> conv2d with weight_quant(weight) -> output``.

    The latent ``weight`` is ``(O, I / groups, kh, kw)``. Kernels of two values ``+-scale`` are convolved as {-1, +1},
    the scale comes after (:func:`functional.binary_conv2d`); others as they are. ``input_quant`` None leaves the
    inputs float, ``output`` None what comes out. Made from a float convolution by :meth:`from_float`; :meth:`enter`
    makes it float for a stage of the training.
    """

    weight_quant: WeightQuantizer
    input_quant: ActivationQuantizer | None
    output: nn.Module | None
    norm: nn.Module
    binary_weight: bool = True
    stand_in: Callable[[Tensor], Tensor] | None = None  # for the activation quantizer

    @classmethod
    def from_float(cls, conv: nn.Conv2d, scheme: Scheme, *, normalize: bool = True) -> "BinaryConv2d":
        """A binary layer that takes over ``conv``'s parameters; ``normalize=False`` leaves the norm out."""
        if scheme.weight is None:
            raise ValueError(f"the scheme {scheme.name!r} leaves weights float")
        layer = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            conv.groups, bias=False, padding_mode=conv.padding_mode, device="meta",
        )  # fmt: skip
        layer.weight, layer.bias = conv.weight, conv.bias
        layer.weight_quant = scheme.weight(conv.weight.detach())
        layer.input_quant = scheme.activation(conv.in_channels) if scheme.activation else None
        layer.output = scheme.output(conv.out_channels) if scheme.output else None
        norm = scheme.norm(conv.in_channels) if scheme.norm and normalize else nn.Identity()
        layer.norm = norm.to(device=conv.weight.device, dtype=conv.weight.dtype)
        return layer.train(conv.training)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if isinstance(self.padding, str) or self.padding_mode != "zeros":
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            self._explicit_padding: tuple[list[int], str] | None = (self._reversed_padding_repeated_twice, mode)
        else:
            self._explicit_padding = None

    @torch.no_grad()
    def adopt(self, latent_std: float | None) -> None:
        """Start from the float weights that ``weight`` holds: the quantizer's parameters, then the latents' scale."""
        self.weight_quant.adopt(self.weight)
        if latent_std is not None:
            self.weight.mul_(latent_std / self.weight.std())

    def enter(self, stage: Stage) -> None:
        """Quantize what ``stage`` has quantized, and nothing else."""
        self.binary_weight, self.stand_in = stage.weights == "binary", ACTIVATIONS[stage.activations]

    def forward(self, input: Tensor) -> Tensor:
        x, positions = self.norm(input), None
        if self.input_quant is not None:
            x, positions = self._activations(x)
        stride, padding, dilation = cast(tuple[Any, Any, Any], (self.stride, self.padding, self.dilation))
        if self._explicit_padding is not None:
            x, padding = F.pad(x, *self._explicit_padding), (0, 0)
            positions = None if positions is None else F.pad(positions, *self._explicit_padding)
        if self.binary_weight and self.weight_quant.scaled_sign:
            value, scale = self.weight_quant.quantize(self.weight)
            y = functional.binary_conv2d(x, value, scale, stride, padding, dilation, self.groups)
        else:
            value = self.weight_quant.quantize(self.weight)[0] if self.binary_weight else self.weight
            y = torch.conv2d(x, value, None, stride, padding, dilation, self.groups)
        if positions is not None:
            window = positions.new_full((1, 1, *self.kernel_size), 1 / math.prod(self.kernel_size))
            y = y * torch.conv2d(positions, window, None, stride, padding, dilation)
        y = y if self.output is None else self.output(y)
        return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]

    def _activations(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.stand_in is not None:
            return self.stand_in(x), None
        assert self.input_quant is not None
        value, scale = self.input_quant.quantize(x)
        return value, scale if scale.ndim == 4 else None


@hookimpl(trylast=True)
def bonn_qat_binarize_layer(scheme: Scheme, name: str, layer: nn.Module, parent: nn.Module) -> nn.Module | None:
    """A block that has a ``binary_form`` gives it, a convolution becomes binary, a ReLU the scheme's nonlinearity.

    A ``parent`` with a true attribute ``normalizes_input`` has its own norm before the convolution.
    """
    binary_form: Callable[[Scheme], nn.Module] | None = getattr(layer, "binary_form", None)
    if binary_form is not None:
        return binary_form(scheme)
    if isinstance(layer, nn.Conv2d) and not isinstance(layer, BinaryConv2d):
        return BinaryConv2d.from_float(layer, scheme, normalize=not getattr(parent, "normalizes_input", False))
    if isinstance(layer, nn.ReLU | nn.ReLU6) and scheme.nonlinearity is not None:
        return scheme.nonlinearity(1)
    return None
