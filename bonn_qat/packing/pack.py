"""pack: model -> PackedModel, a network whose binary weights are bits and whose binary layers run on bits.

The function stays the same, and the values of the binary layers are equal bit for bit.
"""

from collections.abc import Sequence

from torch import nn

from bonn_qat.binarization.binarize import Binarization, binary_layers
from bonn_qat.binarization.copies import unwrapped
from bonn_qat.errors import InvalidModel
from bonn_qat.files.preprocessing import preprocessing_of
from bonn_qat.inputs import Example, Inputs
from bonn_qat.inspection.summary import inputs_of
from bonn_qat.layers import BinaryConv3d, BinaryConvTranspose3d
from bonn_qat.modes import neutral
from bonn_qat.packing.compare import compare
from bonn_qat.packing.fuse import fuse
from bonn_qat.packing.layers import pack_layer
from bonn_qat.packing.ready import inference_copy
from bonn_qat.packing.trace import trace
from bonn_qat.runtime.packed import MOST_INPUTS, PackedModel


def pack(
    model: nn.Module, input_size: Sequence[int] | None = None, *, example_inputs: Example | None = None
) -> PackedModel:
    """Pack a binarized model for images of ``input_size`` ``(C, H, W)``, by default what it was binarized for.

    Inputs of one or two axes, such as features of tokens ``(N, C)``, are taken too. A model of tokens or of several
    inputs gets ``example_inputs`` instead: a batch of what it is called with, as a tensor, a tuple of tensors, or a
    dict of tensors by name. A part of a model may be packed and put in its place:
    ``model.backbone = pack(model.backbone, size)``; the rest stays torch's.

    The model stays as it is; the packed network computes what it computes in evaluation mode, in float32, on the CPU.
    Layers whose weights and inputs have one bit run on bits. If only the weights have one bit (BWN, MCN, DoReFa-Net,
    TBN, AdaBin), these are kept as bits and become floats for the product; several bases (ABC-Net) stay floats.
    ``layers`` of the result says it for each layer. A network with the scheme ``float`` is packed as it is.

    Raises InvalidModel for a model without binary layers, one in a stage with float weights or activations, one that
    torch cannot export, that returns anything but a tensor, or a list, tuple or dict of tensors, whose result is not
    that of each image alone: one, two and three images are compared; or that computes something else in each call.

    >>> import bonn_qat
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
    >>> packed = bonn_qat.pack(bonn_qat.binarize(net, input_size=(3, 8, 8)))
    >>> [(layer.name, layer.kind) for layer in packed.layers]
    [('2', 'bits')]
    """
    with neutral(making=True):
        model = unwrapped(model)
        _check(model)
        inputs = _inputs(model, input_size, example_inputs)
        ready = inference_copy(model)
        layers = [pack_layer(ready, name, layer) for name, layer in list(binary_layers(ready))]
        network = trace(ready, inputs)
        fuse(network)
        record = getattr(model, "binarization", None)
        made = PackedModel(
            network.graph, network.tensors, network.weights, name=type(model).__name__, inputs=network.inputs,
            outputs=network.outputs, batch=network.batch, layers=layers,
            scheme=record.scheme.name if isinstance(record, Binarization) else "",
            preprocessing=preprocessing_of(model),
        )  # fmt: skip
        # A product of floats may be rounded to the other side of a threshold in every layer.
        is_exact = all(layer.kind == "bits" for layer in layers)
        compare(ready, made.node_by_node, inputs, f"{made.name} cannot be packed", is_exact=is_exact)
        return made


def _inputs(model: nn.Module, size: Sequence[int] | None, example: Example | None) -> Inputs:
    if not isinstance(size, Sequence | None):
        raise InvalidModel(f"{_SIZES}; got input_size={size}")
    inputs = inputs_of(model, size, example)
    if len(inputs.tensors) > MOST_INPUTS:
        raise InvalidModel(f"a packed network takes at most {MOST_INPUTS} inputs; got {len(inputs.tensors)}")
    for shape in (tuple(x.shape[1:]) for x in inputs.tensors):
        if not 1 <= len(shape) <= 3 or not all(1 <= n <= 2**16 for n in shape):
            raise InvalidModel(f"{_SIZES}; got input_size={shape}")
    return inputs


_SIZES = "a packed network takes inputs of one to three axes, such as images (C, H, W), each of 1 to 65,536"


def _check(model: nn.Module) -> None:
    """Raise InvalidModel for a model that is not 1-bit."""
    if isinstance(model, PackedModel):
        raise InvalidModel("the network is packed already")
    layers, record = list(binary_layers(model)), getattr(model, "binarization", None)
    if not layers and not (isinstance(record, Binarization) and record.scheme.name == "float"):
        raise InvalidModel(
            f"{type(model).__name__} has no binary layer to pack; binarize it first, with the scheme 'float' if it is "
            "to stay float, and one with layers of Brevitas becomes ours by bonn_qat.adapters.brevitas.from_brevitas"
        )
    for name, layer in layers:
        if layer.stand_in is not None or not layer.binary_weight:
            raise InvalidModel(
                f"{name} is in a stage of its training with float weights or activations; it is not 1-bit yet"
            )
        if isinstance(layer, BinaryConv3d | BinaryConvTranspose3d):
            raise InvalidModel(
                f"{name} is a {type(layer).__name__}, and packed networks have no convolutions over three axes; "
                "export(model, path, 'pt2') or 'onnx' writes the network with float kernels"
            )
