"""Fuzz the readers of all file formats with damaged and hostile files.

A file is changed either as bytes or as content; in the latter case its checksum is computed again, so that the change
gets past the checksum. Reading must succeed or raise a BonnQatError. Any other exception, a crash, a file that takes
more than ten seconds, and memory far beyond the file's size are failures, listed with what is needed to reproduce them.
Each file is a function of seed, kind and number, and is read in a forked process whose address space may grow by
768 MiB. The script prints a table and, with ``--output``, writes JSON. Examples::

    python benchmarks/fuzz.py --files 100000 --output FILE.json
    python benchmarks/fuzz.py --kinds packed --first 1234 --files 1 --seed 0 --keep FOLDER
"""

import argparse
import contextlib
import faulthandler
import itertools
import json
import math
import os
import random
import re
import resource
import select
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import bonn_qat_runtime
import hostile as hostile_calls
import numpy as np
import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

import bonn_qat
from bonn_qat import plugins
from bonn_qat.environment import environment, processor
from bonn_qat.files.tensors import digest
from bonn_qat.runtime import allowed
from bonn_qat.runtime.dry_run import dry_run
from bonn_qat.studies import statistics
from bonn_qat.studies.comparison import Comparison, read_comparison, write_manifest
from bonn_qat.training import checkpoint
from bonn_qat.training.data import load
from bonn_qat.training.network import build, check, weights_header
from bonn_qat.training.network import load as load_network
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.results import RunResult, write_run
from bonn_qat.training.resume import capture, resume
from bonn_qat.training.trainer import Trainer

SECONDS, PATIENCE = 10.0, 6  # CPU time allowed per file, and the factor for wall-clock time
MEMORY = 768 * 2**20  # bytes of address space beyond those at the start
TOO_LARGE = 2**27  # a network whose values need more bytes is loaded but not run
UNCOUNTED = 2**25  # bytes that a run may take beyond what was counted: torch's own, its threads' and its caches
Files = Mapping[str, bytes]  # by name; the first one is read
Rewrite = Callable[[random.Random, Files], Files]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of file: valid samples, a function that changes their content, and the reader."""

    samples: Sequence[Files]
    rewrite: Rewrite
    read: Callable[[Path], None]
    damage: float = 0.4  # the share of files that are changed as bytes

    def mutated(self, chance: random.Random) -> Files:
        """A file that is damaged or hostile; now and then a change has no effect."""
        files = chance.choice(self.samples)
        if chance.random() >= self.damage:
            return self.rewrite(chance, files)
        name = chance.choice(list(files))
        return {**files, name: damaged(chance, files[name])}


# ------------------------------------------------------------------------------------------------------------- bytes


def damaged(chance: random.Random, content: bytes) -> bytes:
    """``content`` with one to four parts changed, removed, repeated or moved."""
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        content = chance.choice(DAMAGES)(chance, bytearray(content))
    return content


def _place(chance: random.Random, content: bytearray) -> int:
    """A random position, more often near the beginning, where lengths and names are."""
    return int(len(content) * chance.random() ** chance.choice((1, 3, 8)))


def _flip(chance: random.Random, content: bytearray) -> bytes:
    for _ in range(chance.choice((1, 1, 8))):
        if content:
            content[_place(chance, content)] ^= 1 << chance.randrange(8)
    return bytes(content)


def _cut(chance: random.Random, content: bytearray) -> bytes:
    return bytes(content[: _place(chance, content)])


def _insert(chance: random.Random, content: bytearray) -> bytes:
    at = _place(chance, content)
    return bytes(content[:at]) + chance.randbytes(chance.choice((1, 2, 8, 100))) + bytes(content[at:])


def _drop(chance: random.Random, content: bytearray) -> bytes:
    at = _place(chance, content)
    return bytes(content[:at] + content[at + chance.choice((1, 2, 8, 100)) :])


def _repeat(chance: random.Random, content: bytearray) -> bytes:
    at, length = _place(chance, content), chance.choice((1, 8, 64, 4096))
    return bytes(content[:at] + content[at : at + length] * chance.choice((2, 3, 50)) + content[at + length :])


def _swap(chance: random.Random, content: bytearray) -> bytes:
    first, second = sorted((_place(chance, content), _place(chance, content)))
    length = chance.choice((1, 8, 64))
    a, b = content[first : first + length], content[second : second + length]
    return bytes(content[:first] + b + content[first + length : second] + a + content[second + length :])


def _length(chance: random.Random, content: bytearray) -> bytes:
    (before,) = struct.unpack("<Q", bytes(content[:8]).ljust(8, b"\0"))
    after = chance.choice((0, 1, before - 1, before + 1, before * 2, 2**31, 2**63, 2**64 - 1, len(content)))
    return struct.pack("<Q", after % 2**64) + bytes(content[8:])


def _number(chance: random.Random, content: bytearray) -> bytes:
    places = [i for i, octet in enumerate(content[: 2**18]) if chr(octet).isdigit()]
    at = chance.choice(places) if places else 0
    return bytes(content[:at]) + str(chance.choice(NUMBERS)).encode() + bytes(content[at + 1 :])


DAMAGES = (_flip, _cut, _insert, _drop, _repeat, _swap, _length, _number)

# -------------------------------------------------------------------------------------------------------------- data

NUMBERS = (
    0, -1, 1, 2, 3, 7, 64, 255, 2**16, 2**20, 2**31 - 1, 2**31, 2**32, 2**53, 2**63 - 1, 2**63, -(2**63),
    -(2**63) - 1, 2**64, 10**30, 10**400, 0.0, -0.5, 0.5, 1e-320, 1e308, -1e308, math.nan, math.inf, -math.inf,
)  # fmt: skip
DEEP = "\x01deep"  # stands for deeply nested lists or tables, which json cannot write
TEXTS = (
    "", "x", "a" * 300, "\0", "\x1b[2J", "../../x", "/etc/passwd", "\u00e9", "\ud800", "nan", "1e999", "True", DEEP,
    "<script>", "$\\frac{", "constructor", "__class__", "float", "bonn", "trunc", "file:///etc/passwd",
)  # fmt: skip


def hostile(chance: random.Random) -> Any:
    """A random value that is probably invalid where it is inserted."""
    return chance.choice((
        lambda: chance.choice(NUMBERS), lambda: chance.choice(TEXTS), lambda: chance.choice((None, True, False)),
        lambda: chance.choice(([], {}, [[]], {"": None}, [0] * 5000, {"a": {"b": {"c": [1]}}})),
        lambda: [chance.choice(NUMBERS) for _ in range(chance.randrange(6))],
    ))()  # fmt: skip


def changed(chance: random.Random, value: Any, hostile: Callable[[random.Random], Any] = hostile) -> Any:
    """A copy of nested data with one to four changes."""
    value = json.loads(json.dumps(value))
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        places = list(_places(value))
        if not places:
            return hostile(chance)
        within, key = chance.choice(places)
        _change(chance, within, key, places, hostile)
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or index) in nested data."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from _places(value[key])


def _change(
    chance: random.Random, within: Any, key: Any, places: Sequence[Any], hostile: Callable[[random.Random], Any]
) -> None:
    def other() -> Any:
        around, place = chance.choice(places)
        with contextlib.suppress(KeyError, IndexError):  # an earlier change may have removed it
            return json.loads(json.dumps(around[place]))
        return None

    def odd() -> Any:
        return json.loads(json.dumps(hostile(chance)))

    way = chance.randrange(8)
    if way == 0:
        del within[key]
    elif way == 1:
        within[key] = other()
    elif way == 2 and isinstance(within, list):
        within.insert(key, other())
    elif way == 2:
        within[chance.choice((*TEXTS, "name", "op", "args"))] = within.pop(key)
    elif way == 3 and type(within[key]) in (int, float):
        within[key] = chance.choice((-within[key], within[key] + 1, within[key] - 1, within[key] * 2, 1 / 3))
    elif way == 4:
        within[key] = [within[key]]
    elif way == 5 and isinstance(within, dict):
        within[chance.choice(TEXTS)] = odd()
    else:
        within[key] = odd()


def as_json(value: Any, chance: random.Random) -> str:
    """``value`` as JSON, with deep nesting in place of DEEP and sometimes a duplicate key."""
    text = json.dumps(value)
    depth = chance.choice((20, 30, 500, 2000, 100_000))
    nested = chance.choice(("[" * depth + "]" * depth, '{"a":' * depth + "0" + "}" * depth, "[" * depth))
    text = text.replace(json.dumps(DEEP), nested)
    return text.replace("{", '{"format": 1, ', 1) if chance.random() < 0.01 else text


def as_toml(table: Mapping[str, Any], chance: random.Random) -> str:
    """``table`` as TOML, one table or value per line."""
    return "".join(f"{_toml_key(key)} = {_toml(value, chance)}\n" for key, value in table.items())


def _toml_key(key: str) -> str:
    return key if key.isascii() and key.replace("_", "").isalnum() else json.dumps(key)


def _toml(value: Any, chance: random.Random) -> str:
    if value == DEEP:
        depth = chance.choice((20, 30, 500, 5000))
        return chance.choice(("[" * depth + "]" * depth, "{a = " * depth + "1" + "}" * depth))
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(key)} = {_toml(item, chance)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(_toml(item, chance) for item in value) + "]"
    if value is None:
        return chance.choice(("1979-05-27T07:32:00Z", "07:32:00", "1979-05-27", "0x1F", "0b1", "null"))
    return json.dumps(value).replace("NaN", "nan").replace("Infinity", "inf")


# ----------------------------------------------------------------------------------------------------------- tensors

Tensors = dict[str, Tensor]
Header = dict[str, Any]


def split(content: bytes) -> tuple[Tensors, Header]:
    """The tensors and our header of a safetensors file."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["bonn_qat"])
    return safetensors.torch.load(content), header


def joined(tensors: Tensors, header: str) -> bytes:
    """A safetensors file with these tensors and our header."""
    copies = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(copies, {"bonn_qat": header})


def changed_tensors(chance: random.Random, tensors: Tensors) -> Tensors:
    """``tensors`` with one or two changes."""
    tensors = dict(tensors)
    for _ in range(chance.choice((1, 1, 2))):
        if tensors:
            name = chance.choice(list(tensors))
            chance.choice(TENSOR_CHANGES)(chance, tensors, name)
    return tensors


def _other_type(chance: random.Random, tensors: Tensors, name: str) -> None:
    tensors[name] = tensors[name].to(
        chance.choice((torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool))
    )


def _other_shape(chance: random.Random, tensors: Tensors, name: str) -> None:
    tensor = tensors[name]
    ways: list[Callable[[], Tensor]] = [
        tensor.flatten, lambda: tensor[None], lambda: tensor[..., None], lambda: tensor.flatten()[:0],
        lambda: tensor.flatten()[:-1], lambda: torch.cat([tensor.flatten()] * 2),
        lambda: tensor.movedim(0, -1) if tensor.ndim else tensor, lambda: torch.zeros(()).to(tensor.dtype),
        lambda: torch.zeros(0, 2**40).to(tensor.dtype), lambda: tensor.reshape(*[1] * 20, *tensor.shape),
    ]  # fmt: skip
    tensors[name] = chance.choice(ways)()


def _other_values(chance: random.Random, tensors: Tensors, name: str) -> None:
    tensor = tensors[name].clone()
    fill = chance.choice((0, -1, 1, math.nan, math.inf, -math.inf, 1e38, 1e-45, 2**62, -(2**63)))
    if tensor.numel():
        flat = tensor.flatten()
        with contextlib.suppress(RuntimeError, ValueError, OverflowError):  # not every number fits every dtype
            flat[chance.randrange(len(flat)) :] = fill
        tensors[name] = flat.reshape(tensor.shape)


def _swapped(chance: random.Random, tensors: Tensors, name: str) -> None:
    other = chance.choice(list(tensors))
    tensors[name], tensors[other] = tensors[other], tensors[name]


def _gone(chance: random.Random, tensors: Tensors, name: str) -> None:
    tensor = tensors.pop(name)
    if chance.random() < 0.7:
        tensors[chance.choice((f"{name}.x", "", "x", "a\0b", "optimizer.x.y", "objective", "random.torch.9"))] = tensor


TENSOR_CHANGES = (_other_type, _other_shape, _other_values, _swapped, _gone)


def rewrite_tensors(
    sign: Callable[[Tensors, Header], Header], hostile: Callable[[random.Random], Any] = hostile
) -> Rewrite:
    """A function that changes header or tensors of a file; ``sign`` writes the new checksum into the header."""

    def rewrite(chance: random.Random, files: Files) -> Files:
        ((name, content),) = files.items()
        tensors, header = split(content)
        if chance.random() < 0.7:
            header = changed(chance, header, hostile)
        if chance.random() < 0.4:
            tensors = changed_tensors(chance, tensors)
        if isinstance(header, dict) and chance.random() < 0.98:
            with contextlib.suppress(TypeError, ValueError):
                header = sign(tensors, header)
        text = as_json(header, chance)
        try:
            return {name: joined(tensors, text)}
        except (safetensors.SafetensorError, UnicodeEncodeError):  # safetensors cannot write it
            return {name: damaged(chance, content)}

    return rewrite


def unsigned(tensors: Tensors, header: Header) -> Header:
    """The ``sign`` function for files without a checksum."""
    return header


# ------------------------------------------------------------------------------------------------------------ packed


class Tiny(nn.Module):
    """A small network with a max-pool, convolutions with a shortcut, and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm, self.act = nn.Conv2d(3, 8, 3, 1, 1), nn.BatchNorm2d(8), nn.ReLU()
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.conv1, self.conv2 = nn.Conv2d(8, 8, 3, 1, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=2)
        self.norm1, self.norm2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.qkv, self.head, self.last = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(8, 4)
        self.layer_norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, 3, 8, 8)`` -> ``(B, 4)``."""
        x = self.pool(self.act(self.norm(self.stem(x))))
        x = self.act(self.norm1(self.conv1(x))) + x
        x = torch.cat([self.norm2(self.conv2(x)), x], 1)[:, :8]
        tokens = self.layer_norm(x.flatten(2).transpose(1, 2))
        query, key, value = self.qkv(tokens).reshape(x.shape[0], -1, 3, 8).unbind(2)
        tokens = tokens + nn.functional.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]
        result: Tensor = self.last(nn.functional.gelu(self.head(tokens)).mean(1))
        return result


SPECIAL = ({"dtype": "int64"}, {"dtype": "complex64"}, {"number": "nan"}, {"device": "cuda"}, {"layout": "sparse_coo"})
REFUSED = (
    "aten.empty.memory_format", "aten.as_strided.default", "aten.from_file.default", "aten.rand.default",
    "aten.gelu_backward.default", "aten.set_.source_Tensor", "aten.view.dtype", "aten.add_.Tensor", "os.system",
    "aten.resize.default", "bonn_qat.__init__.default", "prim.device.default", "python.eval", "aten.add", "..",
)  # fmt: skip


def packed_kind() -> Kind:
    """Packed networks: they are loaded and, unless they need much memory, run on an image."""
    torch.manual_seed(0)
    samples = []
    for scheme in ("bonn", *(name for name in ("bwn",) if name in plugins.schemes())):
        model = bonn_qat.binarize(Tiny(), scheme, input_size=(3, 8, 8), include=["head"]).eval()
        samples.append({"packed.safetensors": bonn_qat.pack(model).dump()})
    return Kind(samples=samples, rewrite=_packed_rewrite(samples), read=read_packed)


def _packed_rewrite(samples: Sequence[Files]) -> Rewrite:
    """A function that changes calls and tensors of packed networks."""
    functions = hostile_calls.functions()
    every = [node["name"] for content in samples for node in split(content["packed.safetensors"])[1]["nodes"]]

    def value(chance: random.Random) -> Any:
        return chance.choice((
            lambda: chance.choice(functions), lambda: chance.choice(REFUSED), lambda: {"node": chance.choice(every)},
            lambda: hostile(chance), lambda: hostile(chance),
            lambda: chance.choice(SPECIAL),
        ))()  # fmt: skip

    anywhere = rewrite_tensors(_signed, value)

    def rewrite(chance: random.Random, files: Files) -> Files:
        if chance.random() < 0.4:
            return anywhere(chance, files)
        # Change a single call, because more of these files load.
        ((name, content),) = files.items()
        tensors, header = split(content)
        node = chance.choice([node for node in header["nodes"] if "args" in node])
        if chance.random() < 0.2:
            node["kwargs"] = changed(chance, {**node.get("kwargs", {}), "dim": 1}, value)
        else:
            node["args"] = changed(chance, node["args"], value)
        if chance.random() < 0.2:
            tensors = changed_tensors(chance, tensors)
        try:
            return {name: joined(tensors, as_json(_signed(tensors, header), chance))}
        except (safetensors.SafetensorError, UnicodeEncodeError, TypeError, ValueError):
            return {name: damaged(chance, content)}

    return rewrite


def _signed(tensors: Tensors, header: Header) -> Header:
    header.pop("sha256", None)
    return header | {"sha256": digest(tensors, header)}


def read_packed(path: Path) -> None:
    """Load a packed network and, unless it needs much memory, run it twice on an image.

    Raises AssertionError if it takes more memory than the dry run counted, or draws random numbers.
    """
    model = bonn_qat.PackedModel.load(path)
    bonn_qat.summary(model)
    needed = dry_run(model.network.graph, dict(model.network.named_buffers()), [(model.input_size, torch.float32)], 1)
    if math.prod(model.input_size) > TOO_LARGE or needed > TOO_LARGE:
        return
    image = torch.linspace(-2, 2, math.prod(model.input_size)).view(1, *model.input_size)
    Path("/proc/self/clear_refs").write_text("5")  # the largest size so far becomes the present one
    before = _memory("VmRSS")
    first = model(image)
    taken = _memory("VmHWM") - before
    assert taken <= 2 * needed + UNCOUNTED, f"{taken:,} bytes taken, {needed:,} counted"
    for one, other in zip(allowed.tensors([first]), allowed.tensors([model(image)]), strict=True):
        assert one.is_floating_point() is other.is_floating_point()
        assert torch.equal(torch.nan_to_num(one), torch.nan_to_num(other)), "two calls differ"


def _memory(field: str) -> int:
    """Bytes of this process, by the name of a line of /proc/self/status."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def runtime_kind() -> Kind:
    """Packed networks of convolutions: the C runtime loads them and, unless they need much memory, runs them."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.PReLU(), nn.MaxPool2d(2, 1), nn.Conv2d(8, 20, 3, 2, 1, groups=2),
        nn.BatchNorm2d(20), nn.Hardtanh(), nn.Conv2d(20, 20, 1), nn.AvgPool2d(2), nn.Conv2d(20, 4, 1), nn.Flatten(),
        nn.Linear(4, 3),
    )  # fmt: skip
    models = (bonn_qat.binarize(net, scheme, input_size=(3, 8, 8)).eval() for scheme in ("bonn", "bireal"))
    samples = [{"packed.safetensors": bonn_qat.pack(model).dump()} for model in models]

    def read(path: Path) -> None:
        network = bonn_qat_runtime.Network(path)
        if network._program._plan.arena_bytes <= TOO_LARGE and math.prod(network.input_size) <= TOO_LARGE:
            network(np.linspace(-2, 2, math.prod(network.input_size), dtype=np.float32).reshape(1, *network.input_size))

    return Kind(samples=samples, rewrite=_packed_rewrite(samples), read=read)


def calls_kind() -> Kind:
    """Packed networks of one call, of each allowed operator in turn, with odd and extreme arguments."""
    functions = hostile_calls.functions()

    def content(call: hostile_calls.Call) -> Files:
        tensors, header = hostile_calls.as_file(call)
        return {"packed.safetensors": joined(tensors, json.dumps(header))}

    def rewrite(chance: random.Random, files: Files) -> Files:
        while True:
            with contextlib.suppress(UnicodeEncodeError):
                return content(hostile_calls.hostile(chance, chance.choice(functions)))

    samples = [content(hostile_calls.ordinary(name)) for name in functions]
    return Kind(samples=samples, rewrite=rewrite, read=read_packed, damage=0.0)


# ---------------------------------------------------------------------------------------------------- training's files


class Small(nn.Module):
    """A network that is fast to create and to binarize."""

    def __init__(self, num_classes: int = 10, in_chans: int = 3, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(in_chans, 4, 3), nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)
        self.act, self.drop, self.fc = nn.ReLU(), nn.Dropout(drop_rate), nn.Linear(8, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``(B, C, H, W)`` -> ``(B, num_classes)``."""
        x = self.act(self.norm(self.conv(self.stem(x))))
        result: Tensor = self.fc(self.drop(x.mean((2, 3))))
        return result


@timm.models.register_model  # type: ignore[untyped-decorator]
def fuzz_small(pretrained: bool = False, **options: Any) -> Small:
    """:class:`Small` as a timm model."""
    own = {key: value for key, value in options.items() if not key.startswith("pretrained_") and key != "cache_dir"}
    return Small(**own)


OPTIONS = Recipe(
    model="fuzz_small", data="digits", epochs=3, batch_size=8, train_images=16, test_images=8, seed=3,
    scheme_options={"clip": 1.5}, regularizer_options={"kernel": {"nu": 1e-3}}, model_options={"drop_rate": 0.1},
    milestones=(1, 2), factors=(0.1, 0.5), schedule="step", skip=("stem",),
)  # fmt: skip


def make_trainer() -> Trainer:
    """A run before its first step."""
    recipe = Recipe(model="fuzz_small", epochs=3, batch_size=8, train_images=16, test_images=8)
    data = load("digits", train_images=16, test_images=8)
    return Trainer(build(recipe, data), recipe, data, torch.device("cpu"), task=nn.CrossEntropyLoss())


def checkpoint_kind() -> Kind:
    """Checkpoints: a run before its first step resumes from them."""
    run = make_trainer()
    samples = []
    for _ in range(2):
        with tempfile.TemporaryDirectory() as folder:
            path = checkpoint.write_state(Path(folder, "x"), capture(run))
            samples.append({"checkpoint.safetensors": path.read_bytes()})
        run.epoch(1)
    fresh = make_trainer()

    def read(path: Path) -> None:
        resume(fresh, path)

    return Kind(samples=samples, rewrite=rewrite_tensors(_signed), read=read)


def weights_kind() -> Kind:
    """Trained weights: loaded into the network that they describe."""
    data = load("digits", train_images=16, test_images=8)
    samples: list[Files] = []
    for scheme in ("bonn", "float", "float", "float"):  # a binary network takes longer to create
        recipe = Recipe(model="fuzz_small", scheme=scheme, epochs=3, batch_size=8)
        tensors = {name: tensor.clone() for name, tensor in build(recipe, data).state_dict().items()}
        samples.append({"weights.safetensors": joined(tensors, json.dumps(weights_header(recipe, data)))})

    def read(path: Path) -> None:
        load_network(path)

    return Kind(samples=samples, rewrite=rewrite_tensors(unsigned), read=read)


def recipe_kind() -> Kind:
    """Recipes: they are read and checked."""
    recipes = sorted((Path(bonn_qat.__file__).parent / "training" / "recipes").glob("*.toml"))
    samples: list[Files] = [{"recipe.toml": path.read_bytes()} for path in recipes]
    staged = {**OPTIONS.to_dict(), "stages": [{"share": 1.0, "regularizers": {"kernel": 1e-4}, "weights": "binary"}]}
    tables = [OPTIONS.to_dict(), staged]
    samples += [{"recipe.toml": as_toml(table, random.Random(0)).encode()} for table in tables]

    def rewrite(chance: random.Random, files: Files) -> Files:
        table = changed(chance, chance.choice(tables))
        text = as_toml(table if isinstance(table, dict) else {"x": table}, chance)
        return {"recipe.toml": text.encode(errors="replace")}

    def read(path: Path) -> None:
        check(Recipe.from_toml(path))

    return Kind(samples=samples, rewrite=rewrite, read=read)


def results_kind() -> Kind:
    """Results of a comparison: they are read and summarized in a table."""
    epochs = [{"epoch": float(e), "lr": 0.1, "test/top1": 50.0 + e, "scale/conv": 0.1, "flips": 0.01} for e in (1, 2)]
    histogram = {"edges": [-1.0, 0.0, 1.0], "counts": [3.0, 4.0]}
    size = dict.fromkeys(("parameters", "mbit", "float_mbit", "compression", "macs", "binary_macs"), 2.5)
    runs = [
        RunResult(
            name=f"bonn-0.01-seed{seed}", scheme="bonn", title="BONN", bits="1/1", latents="0.01", seed=seed,
            recipe=OPTIONS.to_dict(), environment={"python": "3"}, seconds=1.5, epochs=epochs, size=size,
            histograms={"conv": {"0": histogram, "2": histogram}},
        )
        for seed in (0, 1)
    ]  # fmt: skip
    data = {"name": "digits", "classes": 10, "train": 16, "test": 8, "image": [1, 8, 8]}
    with tempfile.TemporaryDirectory() as folder:
        plan = Comparison(directory=Path(folder), data=data, planned=[run.name for run in runs], results=runs,
                          recipes={run.name: run.recipe for run in runs})  # fmt: skip
        write_manifest(plan)
        for run in runs:
            write_run(plan.directory, run)
        paths = [path for path in sorted(plan.directory.rglob("*.json")) if path.is_file()]
        files = {str(path.relative_to(folder)): path.read_bytes() for path in paths}

    def rewrite(chance: random.Random, files: Files) -> Files:
        name = chance.choice(list(files))
        return {**files, name: as_json(changed(chance, json.loads(files[name])), chance).encode()}

    def read(path: Path) -> None:
        statistics.rows(read_comparison(path.parent))

    return Kind(samples=[files], rewrite=rewrite, read=read)


KINDS: Mapping[str, Callable[[], Kind]] = {
    "packed": packed_kind, "calls": calls_kind, "checkpoint": checkpoint_kind, "weights": weights_kind,
    "recipe": recipe_kind, "results": results_kind, "runtime": runtime_kind,
}  # fmt: skip
SHARES = {
    "packed": 4,
    "calls": 8,
    "checkpoint": 3,
    "weights": 2,
    "recipe": 8,
    "results": 8,
    "runtime": 8,
}  # fewer files of the slow kinds


def number_of(name: str, seed: int, index: int) -> random.Random:
    """The random generator that determines a file."""
    return random.Random(f"{name} {seed} {index}")


def write(folder: Path, files: Files) -> Path:
    """Write the files of one case below ``folder``; returns the path of the first."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return folder / next(iter(files))


def outcome(kind: Kind, path: Path) -> str:
    """``read``, the name of our exception, or ``failed: `` and the reason."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind.read(path)
    except (bonn_qat.BonnQatError, bonn_qat_runtime.RuntimeFailure) as error:
        return type(error).__name__ if "\n" not in str(error) and len(str(error)) < 5000 else "failed: not a line"
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        words = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return f"failed: {words} ({Path(last.filename).name}:{last.lineno})"
    return "read"


# ---------------------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A file that was handled wrongly; ``seed``, ``kind`` and ``index`` reproduce it."""

    kind: str
    seed: int
    index: int
    what: str


class Reader:
    """Reads files of one kind in a forked process, and forks again after a crash."""

    def __init__(self, name: str, seed: int, folder: Path) -> None:
        self.name, self.seed, self.folder = name, seed, folder
        self.kind = KINDS[name]()
        for sample in self.kind.samples:  # so that forked processes find everything loaded
            if (what := outcome(self.kind, write(folder / "whole", sample))) != "read":
                raise RuntimeError(f"a valid file of the kind {name} is not read: {what}")

    def run(self, indices: range) -> Iterator[tuple[int, str]]:
        """The number and the outcome of each file."""
        first = indices.start
        while first < indices.stop:
            for index, what in self._run(range(first, indices.stop)):
                yield index, what
                first = index + 1

    def _run(self, indices: range) -> Iterator[tuple[int, str]]:
        receiver, sender = os.pipe()
        sys.stdout.flush()
        child = os.fork()
        if not child:
            os.close(receiver)
            self._child(indices, sender)
        os.close(sender)
        waiting, buffer = indices.start, b""
        try:
            while waiting < indices.stop:
                if not select.select([receiver], [], [], PATIENCE * SECONDS)[0]:
                    yield waiting, f"failed: no answer for {PATIENCE * SECONDS:g} seconds"
                    return
                if not (part := os.read(receiver, 2**16)):
                    _, status = os.waitpid(child, 0)
                    child = 0
                    number = os.waitstatus_to_exitcode(status)
                    name = signal.Signals(-number).name if number < 0 else f"exit {number}"
                    why = f"more than {SECONDS:g} seconds" if name == "SIGPROF" else f"the process ended, {name}"
                    yield waiting, f"failed: {why} {self._where()}".strip()
                    return
                *lines, buffer = (buffer + part).split(b"\n")
                for line in lines:
                    yield waiting, line.decode()
                    waiting += 1
        finally:
            os.close(receiver)
            if child:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)

    def _where(self) -> str:
        """The innermost lines of a crashed process, preferably in this package."""
        lines = [line.strip() for line in (self.folder / "fault").read_text(errors="replace").splitlines()]
        found = [line for line in lines if "/bonn_qat/" in line] or [line for line in lines if line.startswith("File")]
        return "; ".join(re.sub(r'".*/', '"', line) for line in found[:3])

    def _child(self, indices: range, sender: int) -> None:
        try:
            used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
            resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            with (self.folder / "fault").open("w") as file:
                faulthandler.enable(file)
                faulthandler.register(signal.SIGPROF, file, chain=True)
                for index in indices:
                    files = self.kind.mutated(number_of(self.name, self.seed, index))
                    path = write(self.folder / "case", files)
                    signal.setitimer(signal.ITIMER_PROF, SECONDS)
                    what = outcome(self.kind, path)
                    os.write(sender, what.encode(errors="replace").replace(b"\n", b" ") + b"\n")
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)


def examine(name: str, args: argparse.Namespace, indices: range) -> tuple[dict[str, Any], list[Failure]]:
    """Read the files of a kind; returns the counts of the outcomes, and the failures."""
    counts: Counter[str] = Counter()
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        reader = Reader(name, args.seed, Path(folder))
        start = time.perf_counter()
        for index, what in reader.run(indices):
            counts[what if not what.startswith("failed") else "failed"] += 1
            if what.startswith("failed"):
                failures.append(Failure(kind=name, seed=args.seed, index=index, what=what))
                print(f"  {name} {index}: {what}", flush=True)
                if args.keep:
                    files = reader.kind.mutated(number_of(name, args.seed, index))
                    write(args.keep / f"{name}-{args.seed}-{index}", files)
        seconds = time.perf_counter() - start
    return {"kind": name, "files": len(indices), "seconds": seconds, "outcomes": dict(counts)}, failures


def main() -> None:
    """Read files of each kind, print a table and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=2000, help="number of files of all kinds together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first file of each kind")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--keep", type=Path, help="a folder for the files that failed")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = args.kinds.split(",")
    rows, failures = [], list[Failure]()
    for name in names:
        share = round(args.files * SHARES[name] / sum(SHARES[name] for name in names))
        row, failed = examine(name, args, range(args.first, args.first + share))
        rows.append(row)
        failures += failed
    print_table(rows)
    if args.output:
        options = {"files": args.files, "seed": args.seed, "first": args.first, "kinds": names}
        found = {"environment": dict(environment(torch.device("cpu"))), "machine": processor(), "options": options}
        text = json.dumps(found | {"rows": rows, "failures": [asdict(failure) for failure in failures]}, indent=1)
        args.output.write_text(text + "\n")
    sys.exit(bool(failures))


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the outcomes of each kind as a table."""
    names = sorted(set(itertools.chain.from_iterable(row["outcomes"] for row in rows)) - {"failed"})
    columns = ["kind", "files", *names, "failed", "ms per file"]
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        counts = [row["outcomes"].get(name, 0) for name in (*names, "failed")]
        cells = [row["kind"], f"{row['files']:,}", *(f"{count:,}" for count in counts)]
        print("| " + " | ".join([*cells, f"{1e3 * row['seconds'] / max(row['files'], 1):.1f}"]) + " |")


if __name__ == "__main__":
    main()
