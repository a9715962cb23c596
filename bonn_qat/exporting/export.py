"""export: a binary network as a file, or a folder, for another runtime; ``FORMATS`` lists the formats.

It computes in float32, on images ``(B, C, H, W)``, what the model computes in evaluation mode. Signs are
multiplied before they are scaled, so that their sums are exact integers in every runtime; ``sign(0)`` is +1. Sums of
floats are rounded in another order elsewhere: where such a sum is the input of a sign and within its rounding of the
threshold, the sign may differ.
"""

import functools
import importlib.util
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bonn_qat.binarization.binarize import Binarization, binary_layers
from bonn_qat.binarization.copies import unwrapped
from bonn_qat.errors import BonnQatError, InvalidData, InvalidModel, UnknownName
from bonn_qat.exporting.onnx import beyond_bipolar, run_onnx, run_qonnx, write_onnx, write_qonnx
from bonn_qat.exporting.sources import files_of, run_c, run_wasm
from bonn_qat.exporting.trace import outputs_of, run_pt2, write_pt2
from bonn_qat.files.atomic import check_writable, write_bytes
from bonn_qat.inputs import Example, Inputs
from bonn_qat.inspection.summary import inputs_of
from bonn_qat.layers import BinaryLayer
from bonn_qat.modes import modes, neutral
from bonn_qat.packing.pack import pack
from bonn_qat.packing.ready import inference_copy
from bonn_qat.runtime.packed import PackedModel

_SEED = 0  # of the random images and inputs
_INSTALL = {
    "bonn_qat_runtime": "in a clone of the repository, pip install ./plugins/bonn-qat-runtime",
    "ziglang": "pip install ziglang",
    "node": "install Node.js",
}


class PackageMissing(BonnQatError, ImportError):
    """The package or the program that writes or runs a format is not installed."""


class Format(NamedTuple):
    """A format: ``write(model, inputs)`` returns the bytes of a file, ``run(path, images)`` runs it in another runtime.

    ``write`` is given a frozen copy of the model that it may change, in evaluation mode, on the CPU, in float32;
    ``inputs`` are an example of its inputs. ``files(content, name)`` makes these bytes the files of a folder with this
    name. ``run`` returns a tensor for each output. ``needs`` are the packages that ``write`` and ``files`` import,
    ``runs_in`` packages or programs of ``run``. ``refuses`` says what the format cannot hold of a layer, None if it can
    hold it.
    """

    write: Callable[[nn.Module, Inputs], bytes]
    run: Callable[[Path, Tensor | Inputs], list[Tensor]]
    needs: tuple[str, ...] = ()
    runs_in: tuple[str, ...] = ()
    refuses: Callable[[BinaryLayer], str | None] = lambda layer: None
    files: Callable[[bytes, str], Mapping[str, bytes]] | None = None


class Agreement(NamedTuple):
    """How far a file's outputs are from the model's, and the share (0 to 1) of images with the same class.

    ``difference`` is the largest of all images, ``median`` the median over the images of each one's largest: it is far
    below ``difference`` where only a few images have a different sign somewhere.
    """

    difference: float
    median: float
    same: float


def export(
    model: nn.Module, path: str | Path, format: str, *, input_size: Sequence[int] | None = None,
    example_inputs: Example | None = None,
) -> Path:  # fmt: skip
    """Write a binarized ``model`` to ``path``, atomically; the model stays as it is.

    ``format`` is a key of :data:`FORMATS`; for ``c`` and ``wasm``, ``path`` is a folder whose name becomes that of the
    network. ``input_size`` ``(C, H, W)`` is by default what the model was binarized for, else timm's;
    ``example_inputs`` are a batch of other inputs, as for :func:`bonn_qat.pack`. The file takes batches of any size
    where the format and the model's own code allow it, else of one.

    Raises UnknownName for another format; PackageMissing; InvalidModel for a model that is not binarized, that cannot
    be copied or traced, of which torch records something else than it computes for one, two and three images, or with a
    layer that the format cannot hold, or that a stage of the training left float; OSError for a path that cannot be
    written, before any work if that can be known; InvalidData for a folder with files of yours that would be replaced.

    >>> import bonn_qat, tempfile
    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
    >>> binary = bonn_qat.binarize(net, input_size=(3, 8, 8))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     bonn_qat.export(binary, f"{folder}/net.pt2", "pt2").name
    'net.pt2'
    """
    path, chosen = Path(path), _find(format)
    _require(format, chosen.needs)
    with neutral(making=True):
        model = unwrapped(model)
        _check(model, format)
        inputs = inputs_of(model, input_size, example_inputs)
        check_writable(path / "file" if chosen.files else path)
        frozen = inference_copy(model)
        for _, layer in binary_layers(frozen):
            layer.freeze()
        content = chosen.write(frozen, inputs)
    if chosen.files is None:
        return write_bytes(path, content)
    files = chosen.files(content, path.resolve().name)
    there = [name for name in files if (path / name).exists()]
    if there and len(there) < len(files):
        raise InvalidData(
            f"{path} already holds {' and '.join(there)}, and no earlier export of this name; give a folder of its own"
        )
    for name, part in files.items():
        write_bytes(path / name, part)
    return path


def verify(
    model: nn.Module, path: str | Path, format: str, *, input_size: Sequence[int] | None = None,
    example_inputs: Example | None = None, images: int = 8,
) -> Agreement:  # fmt: skip
    """Run ``model``, and its file in the format's own runtime, on the same random ``images``, or other inputs.

    Raises UnknownName for another format, PackageMissing where its runtime is not installed.
    """
    chosen = _find(format)
    _require(format, chosen.runs_in)
    with neutral(making=True), modes(model):
        batch = inputs_of(model, input_size, example_inputs).drawn(images, _SEED)
        reference = next((p for p in model.parameters() if p.is_floating_point()), batch.tensors[0])
        given = batch.map(lambda x: x.to(reference if x.is_floating_point() else reference.device))
        ours = [output.cpu().float() for output in outputs_of(given.call(model))]
        theirs = chosen.run(Path(path), batch)
    both = [(own.view(images, -1), other.view(images, -1)) for own, other in zip(ours, theirs, strict=True)]
    differences = torch.stack([(own - other).abs().amax(1) for own, other in both]).amax(0)
    same = both[-1][0].argmax(1) == both[-1][1].argmax(1)
    return Agreement(float(differences.max()), float(differences.median()), float(same.float().mean()))


def _find(format: str) -> Format:
    if format not in FORMATS:
        raise UnknownName("format", format, FORMATS)
    return FORMATS[format]


def _require(format: str, packages: Sequence[str]) -> None:
    missing = [each for each in packages if importlib.util.find_spec(each) is None and shutil.which(each) is None]
    if missing:
        how = {_INSTALL.get(each, "pip install 'bonn-qat[export]'"): None for each in missing}
        raise PackageMissing(f"the format {format!r} needs {' and '.join(missing)}: {'; '.join(how)}")


def _check(model: nn.Module, format: str) -> None:
    if isinstance(model, PackedModel):
        raise InvalidModel(
            "a packed network cannot be exported again; export the model that it was packed from, or write its file as "
            "C or WebAssembly with bonn_qat_runtime.sources.c_files and wasm_files"
        )
    layers, record = dict(binary_layers(model)), getattr(model, "binarization", None)
    if not layers and not isinstance(record, Binarization):
        raise InvalidModel(
            f"{type(model).__name__} is not binarized; export(binarize(model), ...), or for Brevitas' layers "
            "export(bonn_qat.adapters.brevitas.from_brevitas(model), ...)"
        )
    for name, layer in layers.items():
        if not layer.binary_weight or layer.stand_in is not None:
            raise InvalidModel(
                f"{name} is in a stage of the training that leaves weights or activations float; "
                "layer.enter(bonn_qat.Stage()) makes it binary"
            )
        reason = FORMATS[format].refuses(layer)
        if reason is not None:
            scheme = record.schemes.get(name, record.scheme).name if isinstance(record, Binarization) else "unknown"
            others = [repr(key) for key, known in FORMATS.items() if not known.files and not known.refuses(layer)]
            raise InvalidModel(
                f"the format {format!r} cannot hold {name}, of the scheme {scheme!r}: {reason}; "
                f"{', '.join(others)} can, and skip={name!r} in binarize leaves it float"
            )


def _write_packed(model: nn.Module, inputs: Inputs) -> bytes:
    return pack(model, example_inputs=inputs).dump()


def _run_packed(path: Path, inputs: Tensor | Inputs) -> list[Tensor]:
    return outputs_of(Inputs.batch(inputs).call(PackedModel.load(path)))


FORMATS: Mapping[str, Format] = {
    "onnx": Format(write_onnx, run_onnx, ("onnx", "onnxscript"), ("onnxruntime",)),
    "qonnx": Format(write_qonnx, run_qonnx, ("onnx", "onnxscript", "qonnx"), ("qonnx",), beyond_bipolar),
    "pt2": Format(write_pt2, run_pt2),
    "packed": Format(_write_packed, _run_packed),
    "c": Format(
        _write_packed, run_c, ("bonn_qat_runtime",), ("ziglang",), files=functools.partial(files_of, format="c")
    ),
    "wasm": Format(
        _write_packed, run_wasm, ("bonn_qat_runtime", "ziglang"), ("node",),
        files=functools.partial(files_of, format="wasm"),
    ),
}  # fmt: skip
