"""Packed: a network of bits, as a module and as a file; it needs neither the model's class nor its library."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, final

import torch
from torch import Tensor, fx, nn

from bonn_qat.errors import InvalidData, InvalidModel, first_line, within_memory
from bonn_qat.files import plain
from bonn_qat.files.atomic import write_bytes
from bonn_qat.files.preprocessing import Preprocessing
from bonn_qat.files.tensors import digest, dump_tensors, load_tensors, read_tensors
from bonn_qat.files.validate import Allowed, Line, OneOf, read_own
from bonn_qat.modes import neutral
from bonn_qat.runtime import graph as graphs
from bonn_qat.runtime.dry_run import dry_run
from bonn_qat.runtime.layout import Geometry
from bonn_qat.runtime.planned import Planned, takes

MOST_INPUTS = 16
_TYPES = {"float32": torch.float32, "int64": torch.int64, "int32": torch.int32, "bool": torch.bool}
FORMAT = 2  # 2: thresholds are intervals


@dataclass(frozen=True, kw_only=True)
class PackedLayer:
    """How a binary layer was packed.

    ``kind`` ``"bits"``: weights and inputs are bits, and the product counts bits. ``"weights"``: weights are bits on
    disk and in memory, and become floats for the product. ``"float"``: weights stay floats. ``reason`` says why the
    kind is not ``"bits"``.
    """

    name: Line
    kind: Annotated[str, Allowed("bits, weights, float", lambda kind: kind in ("bits", "weights", "float"))]
    reason: Line = ""


_Size = Annotated[
    tuple[int, ...],
    Allowed(
        "one to three numbers, [C, H, W] for images, each 1 to 65,536", lambda s: 1 <= len(s) <= 3 and _are_sizes(*s)
    ),
]
_Batch = Annotated[int | None, Allowed("1 to 65,536", lambda batch: batch is None or _are_sizes(batch))]


def _are_sizes(*numbers: int) -> bool:
    return all(1 <= number <= 2**16 for number in numbers)


@dataclass(frozen=True, kw_only=True)
class Input:
    """A tensor that a packed network takes: ``(B, *size)`` of ``type``, such as ``"float32"``, by position or name."""

    name: Line
    size: _Size
    type: Annotated[str, OneOf(_TYPES)] = "float32"

    @property
    def dtype(self) -> torch.dtype:
        """The type as torch's."""
        return _TYPES[self.type]

    def __str__(self) -> str:
        return f"{self.type} {self.name} ({', '.join(map(str, ('B', *self.size)))})"


_Inputs = Annotated[
    list[Input], Allowed(f"at most {MOST_INPUTS}, of different names", lambda given: (
        len({each.name for each in given}) == len(given) <= MOST_INPUTS))
]  # fmt: skip
_Outputs = Annotated[list[Line], Allowed("different names", lambda names: len(set(names)) == len(names))]


@dataclass(frozen=True, kw_only=True)
class _Header:
    """The header of a file."""

    kind: str
    format: int
    name: Line
    scheme: Line
    input_size: _Size
    batch: _Batch
    layers: list[PackedLayer]
    nodes: Any
    preprocessing: Preprocessing | None = None
    inputs: _Inputs = field(default_factory=list)  # none: images
    outputs: _Outputs = field(default_factory=list)  # none: no dict


@final
class PackedModel(nn.Module):
    """A packed network: images ``(B, C, H, W)``, float32 of ``input_size`` -> the model's outputs. For inference only.

    Tokens and several tensors are taken too, by position or by name: ``inputs``. Of a model that returns a dict of
    tensors, or an object of transformers that is one, the outputs are a dict.

    ``layers`` says how each binary layer was packed, ``preprocessing`` how the images of the training were standardized
    and what the classes are called, if that is known. Made by :func:`pack` or :meth:`load`. The outputs do not depend
    on what the caller has set in torch, such as ``torch.autocast`` (:func:`bonn_qat.modes.neutral`), and they are the
    caller's own: changing them in place changes neither the network nor the images.

    On a CPU the whole network runs in C if ``plugins/bonn-qat-runtime`` is installed and has its operators, else node
    by node in torch: :attr:`runtime`. A change of its tensors is seen in the next call if torch counts it, as it does
    for all that is done to the tensors themselves; not one through ``tensor.data`` or a numpy array of their memory.
    """

    def __init__(
        self,
        graph: fx.Graph,
        tensors: Mapping[str, Tensor],
        weights: Mapping[str, Geometry],
        *,
        name: str,
        scheme: str,
        inputs: Sequence[Input],
        batch: int | None,
        layers: Sequence[PackedLayer],
        outputs: Sequence[str] = (),
        preprocessing: Preprocessing | None = None,
    ) -> None:
        super().__init__()
        self.preprocessing = preprocessing
        self.name, self.scheme, self.batch = name, scheme, batch
        self.inputs, self.outputs, self.input_size = tuple(inputs), tuple(outputs), inputs[0].size
        self.layers = tuple(layers)
        self._nodes, self._weights = graph, dict(weights)
        self.network, self.names = graphs.module(graph, tensors)
        self.layout = graphs.image_layout(graph) if len(self.input_size) == 3 else torch.contiguous_format
        self._owns = graphs.gives_new_tensors(graph)
        self._container = tuple if isinstance(graph.output_node().args[0], tuple) else list  # of several outputs
        self._checked: set[int] = set()  # batch sizes that the network is known to take
        self._planned: Planned | None = None
        self.requires_grad_(False).eval()

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """Raises InvalidData for inputs of another size or type, or if the network cannot be computed on them.

        Images are float32 alone: others are neither converted nor scaled here, so that nobody gives raw bytes by
        mistake.
        """
        outputs = self._computed(self._given(args, kwargs))
        return dict(zip(self.outputs, outputs, strict=True)) if self.outputs else outputs

    def _given(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
        """The tensors in the order of ``inputs``."""
        names = [each.name for each in self.inputs]
        named = {**dict(zip(names, args, strict=False)), **kwargs}
        if len(args) + len(kwargs) != len(names) or named.keys() != set(names):
            raise InvalidData(
                f"this network was packed for {', '.join(map(str, self.inputs))}; got {len(args)} by position"
                + (f" and {', '.join(kwargs)} by name" if kwargs else "")
            )
        tensors = [named[name] for name in names]
        for each, x in zip(self.inputs, tensors, strict=True):
            if not isinstance(x, Tensor) or x.layout != torch.strided:
                given = f"one of layout {x.layout}" if isinstance(x, Tensor) else type(x).__name__
                raise InvalidData(f"a packed network takes a tensor of {each.name}; got {given}")
            if x.shape[1:] != each.size or x.dtype != each.dtype:
                is_other = x.dtype != each.dtype
                todo = (
                    "convert them as for the model"
                    if is_other
                    else "for another size pack it with "
                    + (_AXES.get(len(each.size), "example_inputs") if x.is_floating_point() else "example_inputs")
                )
                raise InvalidData(f"this network was packed for {each}; got {x.dtype} {tuple(x.shape)}; {todo}")
        if len({len(x) for x in tensors}) > 1:
            raise InvalidData(f"the inputs are of one batch; got {', '.join(str(len(x)) for x in tensors)} samples")
        return tensors

    def node_by_node(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """What a call gives, computed in torch whatever :attr:`runtime` is, which adds floats as the model does."""
        outputs = self._computed(self._given(args, kwargs), in_c=False)
        return dict(zip(self.outputs, outputs, strict=True)) if self.outputs else outputs

    def _computed(self, tensors: list[Tensor], in_c: bool = True) -> Any:
        first = tensors[0]
        if torch.compiler.is_compiling():
            # Not `torch.no_grad`: an exported graph that raises within it leaves gradients off in the process.
            kind, tensors = first.device.type, [x.detach() for x in tensors]
            with torch.autocast(kind, enabled=False) if torch.is_autocast_enabled(kind) else _NOTHING:
                return self._run(tensors)
        if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            raise InvalidModel(
                "torch.jit.trace would record a packed network for one number of images; use torch.export or "
                "torch.compile, or save it with packed.save(path)"
            )
        if in_c and takes(first) and (planned := self._in_c()).network:
            with self.computing():
                outputs = planned.run(first)
            return outputs if isinstance(outputs, Tensor) else self._container(outputs)
        with neutral():
            if len(first) == 0:
                return self._nothing(tensors)
            count = len(first) if self.batch is None else self.batch
            for size in {count, len(first) % count or count} - self._checked:
                self.check(size)
            with self.computing():
                return self._run(tensors)

    @property
    def runtime(self) -> str:
        """What computes images on a CPU: ``"C"``, or why the network runs node by node in torch."""
        return self._in_c().reason or "C"

    def _in_c(self) -> Planned:
        tensors: Any = self.network._buffers
        if self._planned is None or not self._planned.is_of(tensors):
            self._planned = Planned(tensors, self.dump)
        return self._planned

    def _run(self, tensors: list[Tensor]) -> Any:
        tensors = [x.contiguous(memory_format=self.layout if x.ndim == 4 else torch.contiguous_format) for x in tensors]
        parts = [tensors] if self.batch is None else zip(*(torch.split(x, self.batch) for x in tensors), strict=True)
        result = _joined([self.network(*part) for part in parts])
        return result if self._owns else _mapped(Tensor.clone, result)

    def zeros(self, count: int, device: torch.device | None = None) -> list[Tensor]:
        """Inputs that are all zero, ``count`` of each."""
        made = [torch.zeros(count, *each.size, dtype=each.dtype, device=device) for each in self.inputs]
        return [x.contiguous(memory_format=self.layout) if x.ndim == 4 else x for x in made]

    def _nothing(self, tensors: list[Tensor]) -> Any:
        """The outputs for no image at all, which some operators do not take: their sizes follow from others'."""
        count, device = self.batch or 1, tensors[0].device
        one = self._computed(self.zeros(count, device))
        two = self._computed([x + 1 if x.is_floating_point() else x for x in self.zeros(2 * count, device)])

        def empty(x: Tensor, y: Tensor) -> Tensor:
            shape = [2 * a - b for a, b in zip(x.shape, y.shape, strict=True)]
            if 0 in shape:
                return x.new_empty(shape)
            if torch.equal(x, y):  # whatever the images are
                return x
            raise InvalidData(f"{self.name} gives {tuple(shape)} for no image at all, whose values are not defined")

        return _mapped(empty, one, two)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Within the block, errors that the values in a file cause, such as an index out of range, become
        InvalidData."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, IndexError, ValueError, MemoryError) as error:
            raise InvalidData(f"{self.name} cannot be computed on these images: {first_line(error)}") from error

    @property
    def _sizes(self) -> list[tuple[tuple[int, ...], torch.dtype]]:
        return [(each.size, each.dtype) for each in self.inputs]

    def check(self, count: int) -> None:
        """Raise InvalidData if the network does not take ``count`` images at once."""
        dry_run(self.network.graph, dict(self.network.named_buffers()), self._sizes, count)
        self._checked.add(count)

    def _apply(self, fn: Any, recurse: bool = True) -> "PackedModel":
        made = {id(held): fn(held) for held in self.network.buffers()}
        for held in self.network.buffers():
            if made[id(held)].dtype != held.dtype:
                raise InvalidModel(
                    f"a packed network computes with bits and float32, and cannot become {made[id(held)].dtype}; "
                    "convert its images and its outputs instead"
                )
            if made[id(held)].is_meta:
                raise InvalidModel("a packed network without its values, on the device meta, computes nothing")
        super()._apply(lambda held: made[id(held)], recurse)  # type: ignore[no-untyped-call]
        return self

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are saved, by name: bits as int64 words, others as they are."""
        with neutral(making=True):
            held = {name: self.network.get_buffer(buffer).contiguous() for name, buffer in self.names.items()}
            return {
                name: graphs.to_words(tensor, self._weights[name]) if name in self._weights else tensor
                for name, tensor in held.items()
            }

    def save(self, path: str | Path) -> Path:
        """Write a safetensors file with a JSON header, atomically. Raises OSError where that fails."""
        return write_bytes(Path(path), self.dump())

    def dump(self) -> bytes:
        """The bytes that :meth:`save` writes."""
        return dump_tensors(*self._as_data())

    def _as_data(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors and the header of a file."""
        tensors = self.tensors()
        header = {
            "kind": "packed", "format": FORMAT, "name": self.name, "scheme": self.scheme,
            "input_size": list(self.input_size), "batch": self.batch,
            "layers": [asdict(layer) for layer in self.layers],
            "nodes": graphs.describe(self._nodes, self._weights),
        }  # fmt: skip
        if self.preprocessing:
            header["preprocessing"] = asdict(self.preprocessing)
        if self.inputs != (Input(name="images", size=self.input_size),):
            header["inputs"] = [asdict(each) for each in self.inputs]
        if self.outputs:
            header["outputs"] = list(self.outputs)
        return tensors, header | {"sha256": digest(tensors, header)}

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled as it is saved: a graph holds functions of torch that cannot be pickled. In bytes, because torch would
        # hand tensors to another process as shared memory, which is gone when that process looks for it.
        tensors, header = self._as_data()
        return PackedModel._from_bytes, (dump_tensors(tensors), header)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PackedModel":
        # Not by __reduce__, which would move the copy to the CPU.
        with neutral(making=True):
            held = {name: self.network.get_buffer(buffer).clone() for name, buffer in self.names.items()}
            return PackedModel(
                self._nodes, held, self._weights, name=self.name, scheme=self.scheme, inputs=self.inputs,
                outputs=self.outputs, batch=self.batch, layers=self.layers, preprocessing=self.preprocessing,
            )  # fmt: skip

    @classmethod
    def load(cls, path: str | Path) -> "PackedModel":
        """Read what :meth:`save` wrote. It calls known operators only, and needs neither brevitas, timm nor the model's
        class.

        Raises InvalidData naming the file for one that is missing, truncated, altered, of another version, or larger
        than the memory. What a hostile file can do, and what it cannot: docs/security.md.
        """
        with neutral(making=True):
            tensors, header = read_tensors(Path(path))
        with within_memory(str(path)):
            try:
                return cls._from_file(tensors, header)
            except InvalidData as error:
                raise InvalidData(f"{path}: {error}") from error

    @classmethod
    def _from_bytes(cls, content: bytes, header: dict[str, Any]) -> "PackedModel":
        return cls._from_file(load_tensors(content), header)

    @classmethod
    def _from_file(cls, tensors: dict[str, Tensor], header: dict[str, Any]) -> "PackedModel":
        with neutral(making=True):
            return cls._built(tensors, header)

    @classmethod
    def _built(cls, tensors: dict[str, Tensor], header: dict[str, Any]) -> "PackedModel":
        if header.get("kind") != "packed":
            raise InvalidData("not a packed network; bonn_qat.pack(model).save(path) writes one")
        if header.get("format") != FORMAT:
            raise InvalidData(
                f"a packed network of format {plain.shown(header.get('format'))}; this version of bonn-qat reads "
                f"{FORMAT}"
            )
        if header.pop("sha256", None) != digest(tensors, header):
            raise InvalidData("the file was altered after it was written: its checksum does not match")
        given = vars(read_own(_Header, header, "its header is invalid"))
        size = given["input_size"]
        given = {key: value for key, value in given.items() if key not in ("kind", "format", "nodes", "input_size")}
        given["inputs"] = given["inputs"] or [Input(name="images", size=size)]
        graph, weights = graphs.rebuild(header["nodes"])
        places, returned = graph.find_nodes(op="placeholder"), graph.output_node().args[0]
        if len(places) != len(given["inputs"]) or given["inputs"][0].size != size:
            raise InvalidData("its inputs do not match its nodes")
        if given["outputs"] and not (isinstance(returned, list | tuple) and len(returned) == len(given["outputs"])):
            raise InvalidData("its outputs do not match its nodes")
        used = [node.target for node in graph.nodes if node.op == "get_attr"]
        if missing := sorted(set(used) ^ set(tensors)):
            raise InvalidData(f"its tensors do not match its nodes: {plain.shown(missing[0])} is missing or unused")
        graphs.check_words(tensors, weights)
        shapes = {name: torch.empty(weights[name].words_shape, dtype=torch.int32, device="meta")
                  if name in weights else tensor.to("meta") for name, tensor in tensors.items()}  # fmt: skip
        count = given["batch"] or 1
        dry_run(graph, shapes, [(each.size, each.dtype) for each in given["inputs"]], count)
        held = {
            name: graphs.from_words(tensors[name], weights[name]) if name in weights else tensors[name]
            for name in tensors
        }
        made = cls(graph, held, weights, **given)
        made._checked.add(count)
        return made

    def extra_repr(self) -> str:
        """For ``print(model)``."""
        return f"{self.name}, scheme={self.scheme!r}, input_size={self.input_size}"


_NOTHING = contextlib.nullcontext()
_AXES = {1: "input_size=(C,)", 2: "input_size=(C, L)", 3: "input_size=(C, H, W)"}


def _mapped(function: Callable[..., Tensor], *results: Any) -> Any:
    """``function`` of a network's tensors, which are one, or a list or tuple of them."""
    if isinstance(results[0], Tensor):
        return function(*results)
    return type(results[0])(map(function, *results))


def _joined(parts: list[Any]) -> Any:
    """The results for parts of a batch as one."""
    if len(parts) == 1:
        return parts[0]
    if isinstance(parts[0], Tensor):
        return torch.cat(parts)
    return type(parts[0])(map(torch.cat, zip(*parts, strict=True)))
