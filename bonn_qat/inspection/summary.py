"""summary: count the bits and MACs of a network whose binary weights are stored as bits.

It counts the multiply-accumulates (MACs) of convolutions and linear layers, and the parameters as deployed: weights at
their own bits, scales and all other parameters at 32. Not counted are the parameters that a weight quantizer needs for
training only, such as BONN's modulation, buffers such as running statistics, and products without weights, as in
attention.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bonn_qat.binarization.binarize import Binarization, check_size
from bonn_qat.conv_types import CONVOLUTIONS, macs
from bonn_qat.errors import InvalidModel, check_model
from bonn_qat.files.plain import one_line
from bonn_qat.inputs import Example, Inputs
from bonn_qat.inspection.packed_size import packed_report
from bonn_qat.inspection.size_report import FLOAT_BITS, LayerReport, OtherReport, Report
from bonn_qat.layers import BinaryLayer
from bonn_qat.modes import modes
from bonn_qat.quantizers import ActivationQuantizer, WeightQuantizer
from bonn_qat.regularizers import binary_weight_layers
from bonn_qat.runtime.packed import PackedModel


def summary(
    model: nn.Module, input_size: Sequence[int] | None = None, *, example_inputs: Example | None = None
) -> Report:
    """Count the bits and MACs of ``model`` for one image of ``input_size`` ``(C, H, W)``, or one of ``example_inputs``.

    By default that is what the model was binarized for, else timm's size. The model runs once, in evaluation mode and
    on its own device, and is left unchanged. Raises InvalidModel if the size is unknown or the model does not take it.

    >>> report = summary(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), (3, 8, 8))
    >>> report.macs, report.parameters
    (3888, 112)
    """
    if isinstance(model, PackedModel):
        return packed_report(model)
    inputs = inputs_of(model, input_size, example_inputs)
    record = getattr(model, "binarization", None)
    done = record if isinstance(record, Binarization) else None
    kept = dict(done.kept) if done else {}
    rows = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)) or name in kept
    }
    calls = _calls(model, list(rows.values()), inputs)
    binary = set(binary_weight_layers(model).values())
    counted = {id(p) for layer in model.modules() for p in _training_only(layer)}
    layers, others = [], []
    for name, module in model.named_modules():
        own = {key: p for key, p in module.named_parameters(recurse=False) if id(p) not in counted}
        counted.update(map(id, own.values()))
        if name in rows:
            scheme = done.schemes.get(name) if done else None
            bits, call = _weight_bits(module, binary), calls.get(module, _Call())
            layers.append(_layer(name, module, own, bits, call, kept.get(name), scheme.name if scheme else None))
        elif own:
            others.append((type(module).__name__, sum(p.numel() for p in own.values())))
    return Report(
        model=type(model).__name__,
        input_size=inputs.size,
        layers=tuple(layers),
        others=_by_type(others),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        scheme=done.scheme.name if done else None,
        kept=kept,
        revived=done.revived if done else (),
    )


def inputs_of(model: nn.Module, size: Sequence[int] | None = None, example: Example | None = None) -> Inputs:
    """Inputs like the ``example``, else images of ``size``, else what ``model`` was binarized for, else timm's size.

    Raises InvalidModel if there is none.
    """
    check_model(model)
    check_size(size)
    record, config = getattr(model, "binarization", None), getattr(model, "pretrained_cfg", None)
    said = config.get("input_size") if isinstance(config, dict) else None
    done = record if isinstance(record, Binarization) else None
    if example is not None:
        return Inputs.of(example)
    if size is None and done is not None and done.inputs is not None:
        return done.inputs
    size = size or (done.input_size if done else None) or said
    if size is None:
        raise InvalidModel(
            f"{type(model).__name__} does not say which images it takes; give input_size=(C, H, W), or example_inputs"
        )
    return Inputs.images(size)


@dataclass
class _Call:
    output: tuple[int, ...] | None = None
    macs: int = 0


def _calls(model: nn.Module, layers: list[nn.Module], inputs: Inputs) -> dict[nn.Module, _Call]:
    """The output shape and MACs of each of ``layers`` in one forward pass; those of a shared layer add up."""
    found: dict[nn.Module, _Call] = {}

    def count(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        source, result = (_tensor(x) for x in (inputs[0] if inputs else None, output))
        call = found.setdefault(module, _Call(output=tuple(result.shape[1:]) if isinstance(result, Tensor) else ()))
        if isinstance(source, Tensor) and isinstance(result, Tensor):
            call.macs += macs(module, source.shape, result.shape)

    hooks = [module.register_forward_hook(count) for module in layers]
    reference = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    try:
        with modes(model), torch.no_grad():
            one = inputs.map(lambda x: x[:1].to(reference if x.is_floating_point() else reference.device))
            one.call(model)
    except Exception as error:  # whatever a model raises
        what = f"an image of {inputs.size}" if inputs.is_images else f"the example_inputs {inputs}"
        raise InvalidModel(
            f"{type(model).__name__} does not take {what}: {one_line(error)}; "
            "give input_size=(C, H, W), or example_inputs"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _tensor(x: Any) -> Any:
    # Brevitas' QuantTensor is a tuple that starts with its value.
    return x[0] if isinstance(x, tuple) else x


def _training_only(layer: nn.Module) -> list[nn.Parameter]:
    quantizer = getattr(layer, "weight_quant", None)
    return list(quantizer.parameters()) if isinstance(quantizer, nn.Module) else []


def _weight_bits(layer: nn.Module, binary: set[nn.Module]) -> int:
    quantizer = getattr(layer, "weight_quant", None)
    if isinstance(quantizer, WeightQuantizer):
        return quantizer.bits
    return 1 if layer in binary else FLOAT_BITS


def _layer(
    name: str,
    module: nn.Module,
    own: Mapping[str, nn.Parameter],
    weight_bits: int,
    call: _Call,
    kept: str | None,
    scheme: str | None,
) -> LayerReport:
    # By name, because other parameters may have as many axes, such as the gain of a standardized convolution.
    weights = sum(p.numel() for key, p in own.items() if "weight" in key)
    return LayerReport(
        name=name,
        type=type(module).__name__,
        output=call.output,
        weight_bits=weight_bits,
        input_bits=_input_bits(module),
        weights=weights,
        scales=_scales(module) if weight_bits < FLOAT_BITS and weights else 0,
        biases=sum(p.numel() for p in own.values()) - weights,
        macs=call.macs,
        kept=kept,
        scheme=scheme,
    )


@torch.no_grad()
def _scales(layer: nn.Module) -> int:
    proxy: Any = layer.weight_quant
    quantizer: Any = getattr(proxy, "tensor_quant", proxy)
    # A clone, because Brevitas' stock quantizer clamps its input in place.
    weight: Tensor = (layer.latent() if isinstance(layer, BinaryLayer) else layer.weight).clone()  # type: ignore[operator]
    return quantizer.constants(weight) if isinstance(quantizer, WeightQuantizer) else quantizer(weight)[1].numel()


def _input_bits(layer: nn.Module) -> int:
    quantizer: Any = getattr(layer, "input_quant", None)
    if isinstance(quantizer, ActivationQuantizer):
        return quantizer.bits
    return int(quantizer.bit_width()) if getattr(quantizer, "is_quant_enabled", False) else FLOAT_BITS


def _by_type(others: list[tuple[str, int]]) -> tuple[OtherReport, ...]:
    sizes: dict[str, list[int]] = {}
    for kind, parameters in others:
        sizes.setdefault(kind, []).append(parameters)
    return tuple(OtherReport(type=kind, modules=len(n), parameters=sum(n)) for kind, n in sizes.items())
