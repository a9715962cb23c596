"""C header: a packed network as C99 for firmware, its tensors as arrays and its binary layers as structs.

Beside them stands the list of its nodes, what to compute in which order, and a small C reference of what the binary
layers do, which gives the values of the packed network to the last bit. Float layers are left to the firmware.
"""

import math
import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any, cast, final

import torch
from torch import Tensor, fx

from bonn_qat.errors import InvalidModel
from bonn_qat.runtime import epilogue
from bonn_qat.runtime import graph as graphs
from bonn_qat.runtime.layout import Geometry
from bonn_qat.runtime.packed import PackedModel

FORMAT = 1

_ops = torch.ops.bonn_qat
_SIGN, _VALUES, _SIGN_OF, _BOTH = (
    _ops.sign_codes.default, _ops.binary_conv2d.default, _ops.binary_conv2d_sign.default,
    _ops.binary_conv2d_and_sign.default,
)  # fmt: skip
_CONVOLUTIONS = (_VALUES, _SIGN_OF, _BOTH)
_ELEMENTWISE = _ops.elementwise.default
_OPERATIONS = {getattr(epilogue, name): name for name in ("SCALE", "ADD", "FMA", "RESIDUAL", "PRELU", "CLAMP")}
_TYPES = {
    torch.float32: "float", torch.float64: "double", torch.bool: "uint8_t", torch.uint8: "uint8_t",
    torch.int8: "int8_t", torch.int16: "int16_t", torch.int32: "int32_t", torch.int64: "int64_t",
}  # fmt: skip
_DIGITS = {torch.float32: (".9g", "f"), torch.float64: (".17g", "")}  # so many that the number comes back
_COLUMNS = 112


def c_header(packed: PackedModel, name: str = "network") -> str:
    """The text of a header for C99 and C++11; what it defines begins with ``name``, or with ``bonn_qat``.

    Bits are ``uint64_t`` words: element i of torch's ``(O, I / groups, kh, kw)`` is bit i % 64 of word i / 64, 1 for
    +1. Floats are exact. Equal networks have equal texts.

    Raises InvalidModel for a ``name`` that does not begin identifiers of C in small letters, for a tensor without
    elements or of a type that C has not, and for a network, read from a file, with a convolution of other than signs.
    """
    if not re.fullmatch("[a-z][a-z0-9_]*", name) or name.startswith("bonn_qat"):
        raise InvalidModel(
            f"{name!r} cannot begin the names of a C header: that takes small letters, digits and _, a letter first, "
            "and not bonn_qat, with which begins what all headers share"
        )
    return _Header(packed, name).text()


# --- what is in the network


@dataclass(frozen=True, kw_only=True)
class _Epilogue:
    """An epilogue of ``channels``; ``vectors`` is the name of a tensor."""

    channels: int
    program: Sequence[int]
    vectors: str


@dataclass(frozen=True, kw_only=True)
class _Convolution:
    """A binary convolution: ``sign`` gives its ``codes``. Sizes are (C, H, W); words and thresholds are tensors."""

    node: fx.Node
    codes: fx.Node
    sign: fx.Node
    geometry: Geometry
    input: tuple[int, int, int]
    output: tuple[int, int, int]
    words: str
    thresholds: str
    epilogue: _Epilogue


@final
class _Values(fx.Interpreter):
    """Runs a graph and keeps what each node gave."""

    def __init__(self, packed: PackedModel) -> None:
        super().__init__(packed.network)
        self.found: dict[fx.Node, Any] = {}
        with torch.no_grad():
            self.run(torch.zeros(1, *packed.input_size).contiguous(memory_format=torch.channels_last))

    def run_node(self, n: fx.Node) -> Any:
        self.found[n] = super().run_node(n)
        return self.found[n]


class _Network:
    """A packed network as C needs it: ``convolutions`` and ``elementwise`` by node, both in the order of the graph."""

    def __init__(self, packed: PackedModel) -> None:
        self.nodes = list(packed.network.graph.nodes)
        self.values = _Values(packed).found
        names = {buffer: name for name, buffer in packed.names.items()}
        self.tensors = {node: names[cast(str, node.target)] for node in self.nodes if node.op == "get_attr"}
        called = [node for node in self.nodes if node.op == "call_function"]
        self.convolutions = {node: self._convolution(node) for node in called if node.target in _CONVOLUTIONS}
        self.elementwise = {
            node: self._epilogue(node, self.values[node].shape[1]) for node in called if node.target is _ELEMENTWISE
        }
        self.bits = {each.words: each.geometry.weight_shape for each in self.convolutions.values()} | {
            self.tensor(node, "words"): tuple(_arguments(node)["shape"])
            for node in called if node.target is _ops.unpack_signs.default
        }  # fmt: skip

    def tensor(self, node: fx.Node, argument: str) -> str:
        """The name of the tensor that an argument of ``node`` is."""
        value = _arguments(node)[argument]
        if value not in self.tensors:
            raise InvalidModel(f"{node} has {argument} that are computed; a C header takes tensors of the network")
        return self.tensors[value]

    def _epilogue(self, node: fx.Node, channels: int) -> _Epilogue:
        program = _arguments(node)["program"]
        if not program:
            raise InvalidModel(f"{node} has an epilogue without steps; C has no arrays without elements")
        return _Epilogue(channels=channels, program=program, vectors=self.tensor(node, "vectors"))

    def _convolution(self, node: fx.Node) -> _Convolution:
        codes, numbers = _arguments(node)["codes"], _arguments(node)["geometry"]
        sign = codes.args[0] if codes.target is operator.getitem and codes.args[1] == 1 else codes
        if sign.target not in (_SIGN, _SIGN_OF, _BOTH):
            raise InvalidModel(f"{node} has codes from {sign}; a C header takes those of a sign")
        written = Geometry.of(list(_arguments(sign)["geometry" if sign.target is _SIGN else "following"]))
        geometry = Geometry.of(list(numbers))
        alike = [(each.in_channels, each.groups, each.padding) for each in (written, geometry)]
        if alike[0] != alike[1]:
            raise InvalidModel(f"{node} has codes for {written}; a C header takes those for its own {geometry}")
        _, rows, columns, _ = self.values[codes].shape
        top, bottom, left, right = geometry.padding
        return _Convolution(
            node=node, codes=codes, sign=sign, geometry=geometry, words=self.tensor(node, "weight"),
            input=(geometry.in_channels, rows - top - bottom, columns - left - right),
            output=(geometry.out_channels, *geometry.output_size(rows, columns)),
            thresholds=self.tensor(sign, "thresholds"), epilogue=self._epilogue(node, geometry.out_channels),
        )  # fmt: skip


def _arguments(node: fx.Node) -> Mapping[str, Any]:
    """The arguments of an operator of ours, by name."""
    names = [argument.name for argument in cast(Any, node.target)._schema.arguments]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


# --- what is written


class _Names:
    """Identifiers, each given once, in small letters: no macro, in large ones, is among them."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._taken: set[str] = set()

    def new(self, name: str) -> str:
        """An identifier that is like ``name``."""
        plain = f"{self._prefix}_{re.sub('[^a-z0-9]+', '_', name.lower()).strip('_')}"
        found, count = plain, 1
        while found in self._taken:
            count += 1
            found = f"{plain}_{count}"
        self._taken.add(found)
        return found


class _Header:
    """The header of one network, while it is written."""

    def __init__(self, packed: PackedModel, name: str) -> None:
        self.packed, self.macro, self.network = packed, name.upper(), _Network(packed)
        names, network = _Names(name), self.network
        self.table = names.new("convolutions")
        # In the order of the graph: that of a file's tensors is another.
        self.arrays = {
            tensor: names.new(f"{tensor.removesuffix('.words')}.words" if tensor in network.bits else tensor)
            for tensor in dict.fromkeys(network.tensors.values())
        }
        layers = {node: each.words for node, each in network.convolutions.items()}
        layers |= {node: each.vectors for node, each in network.elementwise.items()}
        self.structs = {node: names.new(tensor.rpartition(".")[0] or node.name) for node, tensor in layers.items()}
        self.programs = {
            node: names.new(f"{struct.removeprefix(name)}.program") for node, struct in self.structs.items()
        }

    def text(self) -> str:
        """All of it."""
        tensors, network = self.packed.tensors(), self.network
        parts = [self._comment(), f"#ifndef {self.macro}_H\n#define {self.macro}_H\n", _SHARED, self._sizes()]
        parts += [self._tensor(name, tensors[name]) for name in self.arrays]
        for node, each in network.elementwise.items():
            opening = f"static const bonn_qat_epilogue {self.structs[node]} ="
            parts.append(f"{self._program(node, each)}{opening} {self._epilogue(node, each)};\n")
        parts += [self._convolution(each) for each in network.convolutions.values()]
        if network.convolutions:
            pointers = [f"&{self.structs[node]}" for node in network.convolutions]
            kind, size = "bonn_qat_convolution *const", f"{self.macro}_CONVOLUTIONS"
            parts.append("/* In the order in which they run. */\n" + _array(kind, self.table, size, pointers))
        return "\n".join([*parts, _REFERENCE, f"#endif /* {self.macro}_H */\n"])

    def _sizes(self) -> str:
        convolutions = self.network.convolutions.values()
        channels, height, width = self.packed.input_size
        sizes = {"CHANNELS": channels, "HEIGHT": height, "WIDTH": width, "CONVOLUTIONS": len(convolutions)}
        if convolutions:
            sizes["SIGN_WORDS"] = max(_words(math.prod(each.input)) for each in convolutions)
            sizes["WINDOW_WORDS"] = max(2 * _words(math.prod(each.geometry.weight_shape[1:])) for each in convolutions)
        return "".join(f"#define {self.macro}_{key} {value}\n" for key, value in sizes.items())

    def _tensor(self, name: str, tensor: Tensor) -> str:
        bits, kind, shape = self.network.bits.get(name), str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape)
        allowed = list(_TYPES) if bits is None else [torch.int64]
        if not tensor.numel() or tensor.dtype not in allowed:
            types = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise InvalidModel(f"{name} is {kind} {shape}; a C header takes {types} there, and at least one element")
        identifier, items = self.arrays[name], _items(tensor) if bits is None else _word_items(tensor)
        size = f"{identifier.upper()}_COUNT"
        array = _array(_TYPES[tensor.dtype] if bits is None else "uint64_t", identifier, size, items)
        what = f"{kind} {shape}" if bits is None else f"bits {bits}"
        return f"/* {_plain(name)}: {what} */\n#define {size} {len(items)}\n{array}"

    def _program(self, node: fx.Node, each: _Epilogue) -> str:
        pairs = zip(each.program[::2], each.program[1::2], strict=True)
        steps = [f"{{BONN_QAT_{_OPERATIONS[operation]}, {row}}}" for operation, row in pairs]
        return _array("bonn_qat_step", self.programs[node], str(len(steps)), steps)

    def _epilogue(self, node: fx.Node, each: _Epilogue) -> str:
        return f"{{{each.channels}, {len(each.program) // 2}, {self.programs[node]}, {self.arrays[each.vectors]}}}"

    def _convolution(self, each: _Convolution) -> str:
        node, geometry = each.node, each.geometry
        rows = [
            (_braces(each.input), "input: channels, height, width"),
            (_braces(each.output), "output: channels, height, width"),
            (_braces(geometry.kernel), "kernel: y, x"),
            (_braces(geometry.stride), "stride: y, x"),
            (_braces(geometry.padding), "padding: top, bottom, left, right"),
            (_braces(geometry.dilation), "dilation: y, x"),
            (str(geometry.groups), "groups"),
            (self.arrays[each.words], f"bits {geometry.weight_shape}"),
            (self.arrays[each.thresholds], "thresholds of the sign before it"),
            (self._epilogue(node, each.epilogue), "epilogue: channels, steps, program, vectors"),
        ]
        lines = "".join(f"    {value}, /* {comment} */\n" for value, comment in rows)
        struct = f"static const bonn_qat_convolution {self.structs[node]} = {{\n{lines}}};\n"
        return self._program(node, each.epilogue) + struct

    def _comment(self) -> str:
        channels, height, width = self.packed.input_size
        layer = next((self.structs[node] for node in self.network.convolutions), f"{self.macro.lower()}_layer")
        scheme = f", scheme {self.packed.scheme}" if self.packed.scheme else ""
        lines = [
            f"{self.packed.name}{scheme}: a packed 1-bit network for images of {channels} x {height} x {width}",
            f"(channels, height, width). Written by bonn-qat {_version()}; format {FORMAT} of its C headers.",
            "", *_INTRODUCTION.format(name=self.macro.lower(), macro=self.macro, layer=layer).splitlines(),
            "", *_Listing(self).lines(),
        ]  # fmt: skip
        return "/*\n" + "".join(f" * {_plain(line)}".rstrip() + "\n" for line in lines) + " */\n"


class _Listing:
    """The nodes of a network, a line for each: name, what it gives, and the call in the names of the header."""

    def __init__(self, header: _Header) -> None:
        self.network, self.structs, self.arrays = header.network, header.structs, header.arrays
        convolutions = list(self.network.convolutions.values())
        self.kinds = {node: _kind(value) for node, value in self.network.values.items()}
        self.kinds |= {each.codes: f"signs {(1, *each.input)}" for each in convolutions}
        self.readers = {each.sign: self.structs[each.node] for each in reversed(convolutions)}

    def lines(self) -> list[str]:
        """Nodes in the order in which they run."""
        nodes = [node for node in self.network.nodes if node.op != "get_attr"]
        first = max(len(node.name) for node in nodes)
        second = max(len(self.kinds[node]) for node in nodes)
        return [f"  {node.name:{first}}  {self.kinds[node]:{second}}  {self._call(node)}" for node in nodes]

    def _call(self, node: fx.Node) -> str:
        if node.op != "call_function":
            return "the image" if node.op == "placeholder" else f"gives {self._text(node.args[0])}"
        if node.target is operator.getitem and cast(fx.Node, node.args[0]).target is _BOTH:
            return f"the {'signs' if node.args[1] else 'map'} of {self._text(node.args[0])}"
        call = self._ours(node) if node in self.structs else ""
        if node.target is _SIGN:
            call = self._text(_arguments(node)["x"])
        if node.target in (_SIGN, _SIGN_OF):
            return f"sign({call}) for {self.readers.get(node)}"
        if node.target is _BOTH:
            return f"{call}, and its sign for {self.readers.get(node)}"
        keywords = [f"{key}={self._text(value)}" for key, value in node.kwargs.items()]
        return call or f"{graphs.name_of(node.target)}({', '.join([*map(self._text, node.args), *keywords])})"

    def _ours(self, node: fx.Node) -> str:
        arguments = _arguments(node)
        taken = [arguments.get("codes", arguments.get("x")), arguments["residual"]]
        inputs = ", ".join(self._text(value) for value in taken if value is not None)
        return f"{'elementwise' if node.target is _ELEMENTWISE else 'convolve'}({self.structs[node]}, {inputs})"

    def _text(self, value: Any) -> str:
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(self._text, value))}]"
        if isinstance(value, fx.Node):
            return self.arrays[self.network.tensors[value]] if value in self.network.tensors else value.name
        return str(value)


# --- numbers and names as C has them


def _kind(value: Any) -> str:
    """What a node gives; nothing for several results, which other nodes take apart."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    return "" if isinstance(value, list | tuple) else str(value)


def _words(bits: int) -> int:
    return math.ceil(bits / 64)


def _array(kind: str, identifier: str, size: str, items: Sequence[str]) -> str:
    step = max(1, _COLUMNS // (2 + max(map(len, items))))
    lines = (", ".join(items[at : at + step]) for at in range(0, len(items), step))
    return f"static const {kind} {identifier}[{size}] = {{\n    " + ",\n    ".join(lines) + "\n};\n"


def _word_items(words: Tensor) -> list[str]:
    return [f"0x{word & (1 << 64) - 1:016x}u" for word in words.tolist()]


def _items(tensor: Tensor) -> list[str]:
    """The elements as literals."""
    numbers = tensor.flatten().tolist()
    if tensor.dtype in _DIGITS:
        digits, suffix = _DIGITS[tensor.dtype]
        return [_float(number, digits, suffix) for number in numbers]
    # A literal has no sign, and this one would be too large for the minus before it.
    return ["INT64_MIN" if number == -(1 << 63) else str(int(number)) for number in numbers]


def _float(number: float, digits: str, suffix: str) -> str:
    if math.isfinite(number):
        text = format(number, digits)
        return f"{text}{suffix}" if "." in text or "e" in text else f"{text}.0{suffix}"
    return "NAN" if math.isnan(number) else "INFINITY" if number > 0 else "-INFINITY"


def _braces(numbers: Sequence[int]) -> str:
    return f"{{{', '.join(map(str, numbers))}}}"


def _plain(text: str) -> str:
    """Text that no comment of C ends with or warns of, whatever stands in a file."""
    line = text.encode("ascii", "backslashreplace").decode().replace("*/", "* /").replace("/*", "/ *")
    return "".join(c if c.isprintable() else "?" for c in line)


def _version() -> str:
    try:
        return version("bonn-qat")
    except PackageNotFoundError:
        return "of no version"


# --- text that is C itself

_INTRODUCTION = """\
Include it in one C file; every array is static. Of other layers than binary ones it holds the tensors alone.

Bits are words: bit i % 64 of words[i / 64] is element i, 1 is +1 and 0 is -1. Tensors lie in torch's order, weights
(out, in / groups, kernel height, kernel width). A threshold is the least value of its channel with the sign +1.

With BONN_QAT_REFERENCE defined before it, the header has plain functions for the binary layers, to use or to test
your own against. They give, to the last bit, what the packed network gives. A map of floats, or of signs, lies as
(height, width, channels), of one image:

  static uint64_t signs[{macro}_SIGN_WORDS], window[{macro}_WINDOW_WORDS];
  bonn_qat_sign(&{layer}, map, signs);
  bonn_qat_convolve(&{layer}, signs, NULL, result, window);

Nodes, in the order in which they run. Each has a name, what it gives (torch's shape for one image, so a map is
(1, channels, height, width)), and its call. Signs are +1 and -1, and zeros where a convolution pads them."""

_SHARED = f"""\
#include <math.h>
#include <stddef.h>
#include <stdint.h>

#ifndef BONN_QAT_FORMAT
#define BONN_QAT_FORMAT {FORMAT}

typedef struct {{ int32_t channels, height, width; }} bonn_qat_size;
typedef struct {{ int32_t y, x; }} bonn_qat_pair;
typedef struct {{ int32_t top, bottom, left, right; }} bonn_qat_padding;

/* What an epilogue does with a value; `row` is a row of its vectors (rows, channels). */
enum {{
    BONN_QAT_SCALE = {epilogue.SCALE}, /* value * row */
    BONN_QAT_ADD = {epilogue.ADD}, /* value + row */
    BONN_QAT_FMA = {epilogue.FMA}, /* value * row + next row, rounded once */
    BONN_QAT_RESIDUAL = {epilogue.RESIDUAL}, /* value + residual; takes no row */
    BONN_QAT_PRELU = {epilogue.PRELU}, /* value where it is above 0, else value * row */
    BONN_QAT_CLAMP = {epilogue.CLAMP} /* value, at least row and at most next row */
}};
typedef struct {{ int32_t operation, row; }} bonn_qat_step;

typedef struct {{
    int32_t channels, steps;
    const bonn_qat_step *program; /* (steps) */
    const float *vectors; /* (rows, channels) */
}} bonn_qat_epilogue;

typedef struct {{
    bonn_qat_size input, output;
    bonn_qat_pair kernel, stride;
    bonn_qat_padding padding; /* zeros, neither +1 nor -1 */
    bonn_qat_pair dilation;
    int32_t groups;
    const uint64_t *words; /* the weights: bits (out, in / groups, kernel height, kernel width) */
    const float *thresholds; /* (in): an input is +1 where its value >= threshold, else -1 */
    bonn_qat_epilogue epilogue;
}} bonn_qat_convolution;

#elif BONN_QAT_FORMAT != {FORMAT}
#error "headers of two formats; write both with the same version of bonn-qat"
#endif
"""

_REFERENCE = """\
#if defined(BONN_QAT_REFERENCE) && !defined(BONN_QAT_REFERENCE_DEFINED)
#define BONN_QAT_REFERENCE_DEFINED

#ifdef __FAST_MATH__
#error "the reference needs IEEE arithmetic: infinite thresholds, and sums in the order in which they are written"
#endif

static inline int32_t bonn_qat_popcount(uint64_t bits)
{
#if defined(__GNUC__) && !defined(BONN_QAT_PORTABLE)
    return __builtin_popcountll(bits);
#else
    int32_t count = 0;
    for (; bits != 0; bits &= bits - 1)
        count++;
    return count;
#endif
}

/* Bit i. */
static inline uint64_t bonn_qat_bit(const uint64_t *words, int32_t i)
{
    return words[i / 64] >> (i % 64) & 1;
}

/* At least `count` bits, of at most 64, from bit `start` on; what is above them may be anything. */
static inline uint64_t bonn_qat_bits(const uint64_t *words, int32_t start, int32_t count)
{
    const int32_t shift = start % 64;
    uint64_t bits = words[start / 64] >> shift;
    if (shift + count > 64)
        bits |= words[start / 64 + 1] << (64 - shift);
    return bits;
}

/* The value of a channel after an epilogue. It is volatile, so that each step is rounded to float32 before the next: in
   longer registers, or joined to one instruction, two steps would give another number. fmaf has to round once, as C99
   says; that of some small C libraries rounds twice. */
static inline float bonn_qat_run(const bonn_qat_epilogue *epilogue, int32_t channel, float start, float residual)
{
    volatile float value = start;
    int32_t step;
    for (step = 0; step < epilogue->steps; step++) {
        const float *row = epilogue->vectors + epilogue->program[step].row * epilogue->channels + channel;
        switch (epilogue->program[step].operation) {
        case BONN_QAT_SCALE:
            value = value * row[0];
            break;
        case BONN_QAT_ADD:
            value = value + row[0];
            break;
        case BONN_QAT_FMA:
            value = fmaf(value, row[0], row[epilogue->channels]);
            break;
        case BONN_QAT_RESIDUAL:
            value = value + residual;
            break;
        case BONN_QAT_PRELU:
            if (!(value > 0.0f))
                value = value * row[0];
            break;
        case BONN_QAT_CLAMP:
            if (value < row[0])
                value = row[0];
            if (value > row[epilogue->channels])
                value = row[epilogue->channels];
            break;
        }
    }
    return value;
}

/* An epilogue of its own: a map of `pixels` to `output`, which may be the map. `residual` is NULL or as the map. */
static inline void bonn_qat_elementwise(
    const bonn_qat_epilogue *epilogue, const float *map, int32_t pixels, const float *residual, float *output)
{
    int32_t i;
    for (i = 0; i < pixels * epilogue->channels; i++)
        output[i] = bonn_qat_run(epilogue, i % epilogue->channels, map[i], residual ? residual[i] : 0.0f);
}

/* The signs of a map, the layer's input: `signs` has a bit for each element, in the order of the map. */
static inline void bonn_qat_sign(const bonn_qat_convolution *layer, const float *map, uint64_t *signs)
{
    const int32_t channels = layer->input.channels;
    const int32_t size = layer->input.height * layer->input.width * channels;
    int32_t i;
    for (i = 0; i < size; i++) {
        const uint64_t bit = map[i] >= layer->thresholds[i % channels];
        signs[i / 64] = (i % 64 ? signs[i / 64] : 0) | bit << (i % 64);
    }
}

/* What the kernel covers at output (y, x): bits in the order of a filter's weights, and which of them are valid: those
   of pixels, not of padding. */
static inline void bonn_qat_window(
    const bonn_qat_convolution *layer, const uint64_t *signs, int32_t group, int32_t y, int32_t x, uint64_t *bits,
    uint64_t *valid)
{
    const bonn_qat_size in = layer->input;
    const int32_t channels = in.channels / layer->groups;
    int32_t count = 0, channel, tap_y, tap_x;
    for (channel = group * channels; channel < (group + 1) * channels; channel++)
        for (tap_y = 0; tap_y < layer->kernel.y; tap_y++)
            for (tap_x = 0; tap_x < layer->kernel.x; tap_x++) {
                const int32_t row = y * layer->stride.y + tap_y * layer->dilation.y - layer->padding.top;
                const int32_t column = x * layer->stride.x + tap_x * layer->dilation.x - layer->padding.left;
                if (count % 64 == 0)
                    bits[count / 64] = valid[count / 64] = 0;
                if (row >= 0 && row < in.height && column >= 0 && column < in.width) {
                    const int32_t at = (row * in.width + column) * in.channels + channel;
                    bits[count / 64] |= bonn_qat_bit(signs, at) << (count % 64);
                    valid[count / 64] |= (uint64_t)1 << (count % 64);
                }
                count++;
            }
}

/* The product of a window with the weights from bit `start` on: equal signs less different ones. */
static inline int32_t bonn_qat_product(
    const uint64_t *words, int32_t start, int32_t count, const uint64_t *bits, const uint64_t *valid)
{
    int32_t sum = 0, i;
    for (i = 0; i < count; i += 64) {
        const uint64_t weights = bonn_qat_bits(words, start + i, count - i < 64 ? count - i : 64);
        const uint64_t equal = ~(bits[i / 64] ^ weights) & valid[i / 64];
        sum += 2 * bonn_qat_popcount(equal) - bonn_qat_popcount(valid[i / 64]);
    }
    return sum;
}

/* Signs to the map `output`. `residual` is NULL or as `output`, and may be it. `window` is memory to work in: twice the
   words of one filter's bits, which are NAME_WINDOW_WORDS at most. */
static inline void bonn_qat_convolve(
    const bonn_qat_convolution *layer, const uint64_t *signs, const float *residual, float *output, uint64_t *window)
{
    const bonn_qat_size out = layer->output;
    const int32_t filters = out.channels / layer->groups;
    const int32_t inputs = layer->input.channels / layer->groups * layer->kernel.y * layer->kernel.x;
    uint64_t *valid = window + (inputs + 63) / 64;
    int32_t y, x, filter;
    for (y = 0; y < out.height; y++)
        for (x = 0; x < out.width; x++)
            for (filter = 0; filter < out.channels; filter++) {
                const int32_t at = (y * out.width + x) * out.channels + filter;
                int32_t sum;
                if (filter % filters == 0)
                    bonn_qat_window(layer, signs, filter / filters, y, x, window, valid);
                sum = bonn_qat_product(layer->words, filter * inputs, inputs, window, valid);
                output[at] = bonn_qat_run(&layer->epilogue, filter, (float)sum, residual ? residual[at] : 0.0f);
            }
}

#endif /* BONN_QAT_REFERENCE */
"""
