"""diagnose: model, images -> Diagnosis, whether the signs of a binary network carry information."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from bonn_qat.binarization.binarize import binary_layers
from bonn_qat.errors import InvalidData, InvalidModel
from bonn_qat.files.plain import one_line
from bonn_qat.layers import BinaryLayer
from bonn_qat.modes import modes
from bonn_qat.tables import Column, Table

LOW, HIGH = 0.05, 0.95


class DeadLayers(UserWarning):
    """Binary layers whose inputs nearly all have the same sign, so that they see a constant and cannot learn."""


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """The share of +1 among the inputs of each binary layer, 0 to 1, by name.

    ``unreached``: the binary layers that were not called.
    """

    shares: Mapping[str, float]
    unreached: tuple[str, ...] = ()

    @property
    def dead(self) -> tuple[str, ...]:
        """The layers with less than 5% or more than 95% of +1."""
        return tuple(name for name, share in self.shares.items() if not LOW <= share <= HIGH)

    def __str__(self) -> str:
        rows = [(name, f"{share:.1%}", "dead" if name in self.dead else "") for name, share in self.shares.items()]
        columns = [Column("layer", text=True), Column("share of +1 inputs"), Column("", text=True, optional=True)]
        verdict = f"{len(self.dead)} of {len(self.shares)} binary layers are dead: below {LOW:.0%} or above {HIGH:.0%}"
        never = [f"not reached: {', '.join(self.unreached)}"] if self.unreached else []
        return "\n".join([str(Table(columns, rows)), verdict, *never])


def diagnose(model: nn.Module, images: Tensor) -> Diagnosis:
    """Measure the signs of the inputs of each binary layer for ``images`` ``(B, C, H, W)``, B at least 2.

    They may be inputs of another shape that the model takes, such as ``(B, C, L)`` or ``(B, features)``.

    Norms use the statistics of the batch, as in training, because the running ones of a new network do not normalize;
    dropout is off. The model is unchanged afterwards. Warns of DeadLayers, once for all of them. Raises InvalidData
    for less than two images, InvalidModel for a model without binary activations or that does not take the images.

    >>> from bonn_qat import binarize
    >>> net = binarize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10)))
    >>> diagnose(net, torch.randn(4, 3, 8, 8)).dead
    ()
    """
    layers = {name: layer for name, layer in binary_layers(model) if layer.input_quant is not None}
    if not layers:
        raise InvalidModel(f"{type(model).__name__} has no binary activations; binarize it with a scheme that has them")
    if not isinstance(images, Tensor) or images.ndim < 2 or len(images) < 2:
        given = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise InvalidData(f"diagnose takes a batch of at least 2 images, (B, C, H, W); got {given}")
    counts: dict[str, list[int]] = {name: [0, 0] for name in layers}
    hooks = [
        layer.get_submodule("norm").register_forward_hook(_counter(layer, counts[name]))
        for name, layer in layers.items()
    ]
    reference = next(iter(layers.values())).weight
    # Clones, because norms in training mode update the running statistics.
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        with modes(model, training=lambda module: isinstance(module, _NormBase)), torch.no_grad():
            torch.func.functional_call(model, buffers, (images.to(reference.device, reference.dtype),))
    except Exception as error:  # whatever a model raises
        raise InvalidModel(
            f"{type(model).__name__} does not take images of {tuple(images.shape)}: {one_line(error)}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    diagnosis = Diagnosis(
        shares={name: plus / seen for name, (plus, seen) in counts.items() if seen},
        unreached=tuple(name for name, (_, seen) in counts.items() if not seen),
    )
    if diagnosis.dead:
        named = ", ".join(f"{name} ({diagnosis.shares[name]:.1%})" for name in diagnosis.dead)
        warnings.warn(
            f"layers whose inputs nearly all have the same sign cannot learn; share of +1: {named}",
            DeadLayers,
            stacklevel=2,
        )
    return diagnosis


def _counter(layer: BinaryLayer, count: list[int]) -> Any:
    def measure(norm: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        assert layer.input_quant is not None
        value, _ = layer.input_quant.quantize(output)
        count[0] += int((value > 0).sum())
        count[1] += value.numel()

    return measure


def first_non_finite(model: nn.Module, images: Tensor) -> str:
    """Where NaN or infinity first occurs, in words: a parameter, else the output of a layer."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return f"the parameter {name} is not finite"
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not found and not bool(torch.isfinite(output).all()):
                found.append(f"the first layer whose output is not finite is {name} ({type(module).__name__})")

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        with torch.no_grad():
            model(images)
    finally:
        for handle in handles:
            handle.remove()
    if found:
        return found[0]
    return "no layer's output is" if bool(torch.isfinite(images).all()) else "the images hold NaN or infinity"
