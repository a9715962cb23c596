"""Backends: the forms of one network that are measured side by side, each a file and a function that runs it."""

import copy
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bonn_qat.bench import engines
from bonn_qat.bench.engines import Run
from bonn_qat.binarization.binarize import binary_layers
from bonn_qat.errors import BonnQatError
from bonn_qat.files.tensors import write_tensors
from bonn_qat.inputs import Inputs

_CALIBRATION_IMAGES = 16


class BackendMissing(BonnQatError, ImportError):
    """A backend needs a package that is not installed."""


@dataclass(frozen=True, kw_only=True)
class Networks:
    """The networks to measure, on the CPU and in evaluation mode; a backend must not change them.

    ``size`` is that of an image, ``(C, H, W)``, or other inputs; the backends write their files to ``directory``.
    """

    float_model: nn.Module
    binary_model: nn.Module
    size: tuple[int, ...] | Inputs
    directory: Path

    @property
    def inputs(self) -> Inputs:
        """An example of what the networks take."""
        return self.size if isinstance(self.size, Inputs) else Inputs.images(self.size)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How to start a backend in a new process: the engine, the network's file, and modules to import first."""

    engine: str
    path: Path
    modules: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Backend:
    """One form of a network, ready to be measured.

    ``make(threads, images)`` returns a function that runs the float images ``(B, C, H, W)``, or other ``Inputs``, once;
    torch is already set to ``threads`` threads. ``launch()`` tells how to start it in a new process; None if that is
    not possible. ``note`` tells what the measurement includes.
    """

    make: Callable[[int, Any], Run]
    size_bytes: int  # on disk
    note: str
    launch: Callable[[], Launch] | None = None


def torch_float(networks: Networks) -> Backend:
    """The float network, eager."""
    note = "eager, inference mode, channels_last (the other layout is not tried); size of the state dict"
    return _torch(networks.float_model, networks.directory / "float", note)


def torch_binary(networks: Networks) -> Backend:
    """The training network with frozen (already quantized) weights, eager."""
    frozen = copy.deepcopy(networks.binary_model)
    for _, layer in binary_layers(frozen):
        layer.freeze()
    note = "the training network, frozen: signs are int8 on disk and float in the product; else like torch float"
    return _torch(frozen, networks.directory / "binary", note)


def onnxruntime_float(networks: Networks) -> Backend:
    """The float network in onnxruntime. Raises BackendMissing without onnxruntime, onnx or onnxscript."""
    note = "exported with a free batch size, all graph optimizations, CPU provider"
    return _onnxruntime(_float_file(networks), note)


def onnxruntime_int8(networks: Networks) -> Backend:
    """The float network quantized to 8 bits for onnxruntime. Raises BackendMissing as :func:`onnxruntime_float`.

    Static quantization with QuantizeLinear and DequantizeLinear: int8 weights per channel and uint8 activations, the
    fastest pair without VNNI. A norm that is not folded into a convolution stays float, because onnxruntime has none
    in 8 bits. The ranges are calibrated on noise: the latency is meaningful, the accuracy is not.
    """
    source, path = _float_file(networks), networks.directory / "int8.onnx"
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Noise(quantization.CalibrationDataReader):  # type: ignore[misc]  # untyped
        def __init__(self) -> None:
            self.batches = _noise(networks.inputs, [each.name for each in onnx.load(source).graph.input])

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    prepared = networks.directory / "prepared.onnx"
    quant_pre_process(source, prepared, skip_symbolic_shape=True)
    operators = {node.op_type for node in onnx.load(prepared).graph.node}
    operators = {name for name in operators if not name.endswith("Normalization")}
    quantization.quantize_static(
        prepared, path, Noise(), quant_format=quantization.QuantFormat.QDQ, op_types_to_quantize=sorted(operators),
        activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8, per_channel=True,
    )  # fmt: skip
    note = "static, QDQ, uint8 activations, int8 weights per channel; calibrated on noise, so only latency counts"
    return _onnxruntime(path, note)


def packed(networks: Networks) -> Backend:
    """The packed binary network."""
    from bonn_qat.packing.pack import pack
    from bonn_qat.runtime.packed import PackedModel

    path = pack(networks.binary_model, example_inputs=networks.inputs).save(networks.directory / "packed.safetensors")
    model = PackedModel.load(path)
    bits = sum(layer.kind == "bits" for layer in model.layers)
    how = "all of it in C" if model.runtime == "C" else f"node by node in torch: {model.runtime}"
    return Backend(
        make=lambda threads, images: engines.forward(model, images),
        size_bytes=path.stat().st_size,
        note=f"{bits} of {len(model.layers)} binary layers compute with bits; {how}",
        launch=lambda: Launch(engine="packed", path=path),
    )


BACKENDS: Mapping[str, Callable[[Networks], Backend]] = {
    "torch float": torch_float,
    "torch binary": torch_binary,
    "onnxruntime float": onnxruntime_float,
    "onnxruntime int8": onnxruntime_int8,
    "packed": packed,
}


def _torch(model: nn.Module, stem: Path, note: str) -> Backend:
    state = write_tensors(stem.with_suffix(".safetensors"), model.state_dict())
    # A copy, because the memory format is a property of the parameters.
    model = copy.deepcopy(model).to(memory_format=torch.channels_last)

    def launch() -> Launch:
        path = stem.with_suffix(".pt")
        torch.save(model, path)
        return Launch(engine="torch", path=path, modules=tuple(sorted({type(m).__module__ for m in model.modules()})))

    return Backend(
        make=lambda threads, images: engines.forward(model, images),
        size_bytes=state.stat().st_size,
        note=note,
        launch=launch,
    )


def _onnxruntime(path: Path, note: str) -> Backend:
    return Backend(
        make=lambda threads, images: _feed(engines.session(path, threads), images),
        size_bytes=path.stat().st_size,
        note=note,
        launch=lambda: Launch(engine="onnxruntime", path=path),
    )


def _float_file(networks: Networks) -> Path:
    """The float network as an ONNX file, exported once."""
    path = networks.directory / "float.onnx"
    _require("onnxruntime", "onnx", "onnxscript")
    if path.exists():
        return path
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    given = networks.inputs.drawn(2, seed=0)  # two, because a batch of one is exported as a constant
    with warnings.catch_warnings():
        # Of several inputs, the first alone names the axis.
        warnings.filterwarnings("ignore", "# The axis name", UserWarning)
        exported = torch.onnx.export(
            networks.float_model, given.args, kwargs=dict(given.kwargs), dynamo=True, verbose=False,
            dynamic_shapes=given.dynamic_shapes(networks.float_model, torch.export.Dim("batch")),
        )  # fmt: skip
    assert exported is not None
    # Metadata about the source code must not count as size.
    ClearMetadataAndDocStringPass()(exported.model)
    exported.save(path)
    return path


def _feed(session: Any, images: Tensor | Inputs) -> Run:
    named = Inputs.batch(images).named([each.name for each in session.get_inputs()])
    return engines.feed(session, {name: x.numpy() for name, x in named.items()})


def _noise(inputs: Inputs, names: list[str]) -> Iterator[dict[str, Any]]:
    for seed in range(_CALIBRATION_IMAGES):
        yield {name: x.numpy() for name, x in inputs.drawn(1, seed).named(names).items()}


def _require(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise BackendMissing(f"needs {' and '.join(missing)}: pip install 'bonn-qat[bench]'")
