"""Hostile calls: each operator that a packed network may call, with ordinary, odd and extreme arguments, as a file.

An ordinary call, for images of any side, is written down for each operator; a hostile one has one to three arguments
replaced by others: long lists, extreme numbers, tensors of another shape or type. ``fuzz.py`` and the tests
read and run them.
"""

import functools
import math
import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bonn_qat.files.tensors import digest
from bonn_qat.runtime import allowed
from bonn_qat.runtime.graph import PYTHON
from bonn_qat.runtime.layout import Geometry
from bonn_qat.runtime.packed import FORMAT

OURS = (
    "sign_codes", "binary_conv2d", "binary_conv2d_sign", "binary_conv2d_and_sign", "elementwise", "max_pool2d",
    "unpack_signs",
)  # fmt: skip
GEOMETRY = Geometry(4, 4, (3, 3), padding=(1, 1, 1, 1)).numbers
NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2, 3, 7, 255, 4096, 4097, 2**16, 2**20, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53, 2**62, 2**63 - 1,
    -(2**63), 0.0, -0.5, 0.5, 1e-6, 2e-10, 1e-320, 1e10, 1e38, 1e308, -1e308, math.nan, math.inf, -math.inf,
)  # fmt: skip
LENGTHS = (0, 1, 2, 3, 4, 5, 16, 17, 64, 1000, 20_000)
OTHERS: Mapping[str, Sequence[Any]] = {
    "dtype": ("bool", "uint8", "int8", "int32", "int64", "float16", "bfloat16", "float32", "float64"),
    "memory_format": ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d"),
}
EQUATIONS = (
    "abc,cd->abd", "abc,cd->", "abc,de->abcde", "aab,cd->", "...", "a...,b...->ab...", "->", ",", "a,a,a,a->a",
    "abc->cba", ",".join("a" * 5000), "x" * 100_000, "ab,bc->ac,", "é",
)  # fmt: skip


class Call(NamedTuple):
    """A call of ``op``; ``tensors`` are those that it names."""

    op: str
    args: list[Any]
    kwargs: dict[str, Any]
    tensors: dict[str, Tensor]


def functions() -> list[str]:
    """The names of all functions that a packed graph may call."""
    return sorted({*allowed.GROUP_OF, *PYTHON, *(f"bonn_qat.{name}.default" for name in OURS)})


def function_of(name: str) -> Any:
    """The operator with this name in a file."""
    if name in PYTHON:
        return PYTHON[name]
    namespace, operation, overload = name.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), operation), overload)


@functools.lru_cache(maxsize=4)
def tensors(side: int) -> dict[str, Tensor]:
    """Tensors to choose from, ordinary ones; images have ``side`` pixels in a row."""
    made = torch.Generator().manual_seed(side)
    image = torch.randn(1, 4, side, side, generator=made)
    return {
        "image": image, "signal": image[0].reshape(1, 4, -1), "tokens": image[0, 0].reshape(1, -1, 4),
        "wide": image[0, 1].reshape(1, 4, -1), "row": torch.rand(4, generator=made) + 0.5, "square": torch.eye(4),
        "heads": image[:, :, :, :4], "mask": torch.zeros(side, side), "kernel": torch.ones(4, 4, 3, 3),
        "bounds": torch.tensor([0.0, torch.inf]).repeat(4, 1).T.contiguous(),
        "kernel1": torch.ones(4, 4, 3), "places": torch.tensor([0, 3, 1]), "truth": image > 0,
        "whole": (image * 9).to(torch.int64), "spots": torch.zeros(1, 4, side, side, dtype=torch.int64),
        "slice": image[:, 0], "codes": torch.full((1, side, side, 1), 2, dtype=torch.int32),
        "bits": torch.zeros(1, 9, 16, dtype=torch.int32), "vectors": torch.ones(1, 4),
        "words": torch.zeros(side * side // 16, dtype=torch.int64),
    }  # fmt: skip


ODD: Mapping[str, Tensor] = {
    "none": torch.zeros(0), "no_pixels": torch.zeros(1, 4, 0, 0), "no_image": torch.zeros(0, 4, 8, 8),
    "scalar": torch.tensor(2.5), "minus_one": torch.tensor(-1), "least": torch.full((4,), -(2**63)),
    "far": torch.tensor([2**40, -(2**40), 7]), "nan": torch.full((1, 4, 8, 8), math.nan), "bool": torch.ones(4) > 0,
    "half": torch.zeros(1, 4, 8, 8, dtype=torch.float16), "double": torch.zeros(1, 4, 8, 8, dtype=torch.float64),
    "axes": torch.zeros([1] * 16), "long": torch.zeros(100_000), "many": torch.zeros(1, 1000, 1, 1),
}  # fmt: skip


def _bases(n: int) -> dict[str, list[Any]]:
    """Arguments by operator; a text that begins with $ is a tensor. Others take the default of their type."""
    pool = ["$image", [2, 2], [2, 2], [0, 0]]
    convolved = ["$codes", "$bits", GEOMETRY, [0, 0], "$vectors", "$image"]
    norm = ["$image", "$row", "$row", "$row", "$row", False, 0.1, 1e-5, False]
    of: dict[str, list[Any]] = {
        "bonn_qat.sign_codes": ["$image", "$bounds", GEOMETRY], "bonn_qat.binary_conv2d": convolved,
        "bonn_qat.binary_conv2d_sign": [*convolved, "$bounds", GEOMETRY],
        "bonn_qat.binary_conv2d_and_sign": [*convolved, "$bounds", GEOMETRY],
        "bonn_qat.elementwise": ["$image", [0, 0, 3, 0], "$vectors", "$image"],
        "bonn_qat.max_pool2d": ["$image", [3, 3], [2, 2], [1, 1]], "bonn_qat.unpack_signs": ["$words", [4, n, n]],
        "conv1d": ["$signal", "$kernel1", "$row", [1], [1], [1], 1],
        "conv1d.padding": ["$signal", "$kernel1", "$row", [1], "same", [1], 1],
        "conv2d": ["$image", "$kernel", "$row", [1, 1], [1, 1], [1, 1], 1],
        "conv2d.padding": ["$image", "$kernel", "$row", [1, 1], "same", [1, 1], 1],
        "conv_transpose2d": ["$image", "$kernel", "$row", [2, 2], [1, 1], [1, 1], 1, [1, 1]],
        "convolution": ["$image", "$kernel", "$row", [2, 2], [1, 1], [1, 1], True, [0, 0], 1],
        "addmm": ["$square", "$square", "$square"], "bmm": ["$wide", "$tokens"], "mm": ["$square", "$square"],
        "einsum": ["abc,cd->abd", ["$tokens", "$square"]], "linear": ["$tokens", "$square", "$row"],
        "matmul": ["$tokens", "$square"],
        "scaled_dot_product_attention": ["$heads", "$heads", "$heads", "$mask", 0.0, False],
        "batch_norm": norm, "instance_norm": ["$image", "$row", "$row", None, None, True, 0.1, 1e-5, False],
        "group_norm": ["$image", 2, "$row", "$row"], "layer_norm": ["$tokens", [4], "$row", "$row"],
        "rms_norm": ["$tokens", [4], "$row"], "prelu": ["$image", "$row"],
        "adaptive_avg_pool1d": ["$signal", [3]], "avg_pool1d": ["$signal", [2], [2], [0]],
        **{key: ["$image", [3, 3]] for key in ("adaptive_avg_pool2d", "_adaptive_avg_pool2d", "adaptive_max_pool2d")},
        "avg_pool2d": [*pool, False, True, None], "max_pool2d": [*pool, [1, 1], False],
        "max_pool2d_with_indices": [*pool, [1, 1], False],
        "im2col": ["$image", [2, 2], [1, 1], [0, 0], [2, 2]],
        "col2im": ["$wide", [n, n], [2, 2], [1, 1], [0, 0], [2, 2]],
        **{key: ["$image", [2 * n, 2 * n], False, 2.0, 2.0] for key in ("upsample_bilinear2d", "upsample_bicubic2d")},
        **{key: ["$image", None, False, [2.0, 2.0]] for key in ("upsample_bilinear2d.vec", "upsample_bicubic2d.vec")},
        "upsample_nearest2d": ["$image", [2 * n, 2 * n], 2.0, 2.0],
        "upsample_nearest2d.vec": ["$image", None, [2.0, 2.0]],
        "arange": [n * n], "arange.start": [1, n * n], "arange.start_step": [1, n * n, 2], "full": [[n, n], 1.5],
        "zeros": [[n, n]], "ones": [[n, n]], "new_zeros": ["$image", [n, n]], "new_ones": ["$image", [n, n]],
        "new_full": ["$image", [n, n], 2.5], "embedding": ["$square", "$places"], "gather": ["$image", 1, "$spots"],
        "index": ["$image", [None, "$places"]], "index_select": ["$image", 1, "$places"],
        "pad": ["$image", [1, 1, 1, 1], "reflect"], "constant_pad_nd": ["$image", [1, 1], 0.5],
        "reflection_pad1d": ["$signal", [1, 1]], "reflection_pad2d": ["$image", [1, 1, 1, 1]],
        "replication_pad2d": ["$image", [1, 1, 1, 1]], "repeat": ["$image", [1, 2, 1, 1]], "tile": ["$image", [2, 1]],
        "repeat_interleave": ["$image", 2, 1], "roll": ["$image", [1], [1]], "pixel_shuffle": ["$image", 2],
        "pixel_unshuffle": ["$image", 2], "select_scatter": ["$image", "$slice", 1, 0],
        "slice_scatter": ["$image", "$image", 1, 0, 4, 1], "where.self": ["$truth", "$image", "$image"],
        "where.ScalarOther": ["$truth", "$image", 0.5], "where.ScalarSelf": ["$truth", 0.5, "$image"],
        "where.Scalar": ["$truth", 0.5, 1.5], "masked_fill": ["$image", "$truth", 0.5],
        **{key: ["$whole", "$whole"] for key in ("bitwise_and.Tensor", "bitwise_or.Tensor", "bitwise_xor.Tensor")},
        **{key: ["$whole", 3] for key in ("bitwise_and.Scalar", "bitwise_or.Scalar", "bitwise_xor.Scalar")},
        "bitwise_not": ["$whole"], "chunk": ["$image", 2, 1], "expand": ["$image", [2, -1, -1, -1]],
        "flatten": ["$image", 1, -1], "movedim": ["$image", 1, 2], "movedim.intlist": ["$image", [1], [2]],
        "narrow": ["$image", 1, 0, 2], "permute": ["$image", [0, 2, 3, 1]], "reshape": ["$image", [1, -1]],
        "view": ["$image", [1, -1]], "_unsafe_view": ["$image", [1, -1]], "select": ["$image", 1, 0],
        "slice": ["$image", 1, 0, 3, 1], "split": ["$image", 2, 1], "split.sizes": ["$image", [1, 3], 1],
        "split_with_sizes": ["$image", [1, 3], 1], "unflatten": ["$image", 1, [2, 2]], "unfold": ["$image", 2, 2, 1],
        "t": ["$square"], "unbind": ["$image", 1], "sort.stable": ["$image"], "clamp.Tensor": ["$image", "$image"],
        "clamp": ["$image", 0.5], "clip": ["$image", 0.5], "softmax": ["$image", 1],
        "_softmax": ["$image", 1, False], "_log_softmax": ["$image", 1, False],
        "linalg_vector_norm": ["$image", 2, [1]], "sort": ["$image", 1, False], "topk": ["$image", 2, 1],
        "unsqueeze": ["$image", 1], "swapaxes": ["$image", 1, 2], "swapdims": ["$image", 1, 2],
        "transpose": ["$image", 1, 2], "flip": ["$image", [1]], "squeeze.dims": ["$image", [0]],
    }  # fmt: skip
    return {name if name.startswith("bonn_qat") else f"aten.{name}": args for name, args in of.items()}


def ordinary(name: str, side: int = 8) -> Call:
    """A call that is valid."""
    if name in PYTHON:
        return Call(name, [["$image", "$image"], 1] if name == "python.getitem" else [5, 3][: 1 + (name[-3:] != "neg")],
                    {}, tensors(side))  # fmt: skip
    bases, function = _bases(side), function_of(name)
    base, kwargs = bases.get(name, bases.get(name.rpartition(".")[0])), dict[str, Any]()
    needed = [a for a in function._schema.arguments if not a.has_default_value()]
    if base is None:
        base = [_default(str(argument.type), argument.name) for argument in needed if not argument.kwarg_only]
    for argument in needed:
        if argument.kwarg_only:
            kwargs[argument.name] = "floor" if argument.name == "rounding_mode" else True
    return Call(name, list(base), kwargs, tensors(side))


def _default(kind: str, name: str) -> Any:
    if kind == "List[Tensor]":
        return ["$image", "$image"]
    if kind == "Tensor":
        return "$image"
    return 2.0 if kind == "number" else [1] if kind.startswith("List") or "List" in kind else 1


def hostile(chance: random.Random, name: str) -> Call:
    """A call of which one to three arguments are odd or extreme; now and then it is still valid."""
    call = ordinary(name)
    args, kwargs = list(call.args), dict(call.kwargs)
    arguments = [] if name in PYTHON else function_of(name)._schema.arguments
    optional = [argument for argument in arguments[len(args) :] if argument.kwarg_only]
    for _ in range(chance.choice((1, 1, 1, 2, 3))):
        place = chance.randrange(len(args) + len(optional)) if args or optional else -1
        if 0 <= place < len(args):
            kind, label = (str(arguments[place].type), arguments[place].name) if arguments else ("number", "")
            args[place] = odd(chance, kind, label, args[place])
        elif optional:
            argument = optional[place - len(args)]
            kwargs[argument.name] = odd(chance, str(argument.type), argument.name, None)
    following = [argument for argument in arguments[len(args) :] if not argument.kwarg_only]
    if following and chance.random() < 0.3:
        args += [odd(chance, str(argument.type), argument.name, None) for argument in following]
    return Call(name, args, kwargs, {**call.tensors, **ODD})


def odd(chance: random.Random, kind: str, name: str, given: Any) -> Any:
    """A value for an argument, mostly of its type."""
    if chance.random() < 0.05:
        return chance.choice((None, "x", [], {}, True, [[1]], "$image", *NUMBERS))
    if name in OTHERS:
        return {name: chance.choice(OTHERS[name])}
    if name in ("device", "layout"):
        return {name: {"device": "cpu", "layout": "strided"}[name]}
    if "Tensor" in kind:
        one = [f"${name}" for name in (*tensors(8), *ODD)] + ["$huge", "x", 2, 0.5]
        if "List" not in kind:
            return chance.choice(one)
        return [chance.choice((*one, None)) for _ in range(chance.choice(LENGTHS[:7]))] if chance.random() < 0.8 else [
            chance.choice(one)] * chance.choice(LENGTHS)  # fmt: skip
    if kind == "str" or kind.endswith("[str]"):
        return chance.choice(("none", "tanh", "constant", "reflect", "replicate", "circular", "floor", "trunc", "same",
                              "valid", "", *EQUATIONS))  # fmt: skip
    if kind == "bool" or kind.endswith("[bool]"):
        return chance.choice((True, False, False, None, 2))
    if "List" in kind:
        return _list(chance, given, whole="float" not in kind)
    if isinstance(given, int | float) and chance.random() < 0.3:
        return chance.choice((given + 1, given - 1, -given, given * 2, given * 1000))
    return chance.choice([number for number in NUMBERS if "int" not in kind or isinstance(number, int)])


def _list(chance: random.Random, given: Any, *, whole: bool) -> list[Any]:
    numbers = [number for number in NUMBERS if isinstance(number, int) or not whole]
    if isinstance(given, list) and given and chance.random() < 0.5:
        place = chance.randrange(len(given))
        return [*given[:place], chance.choice((*numbers, "$scalar")), *given[place + 1 :]]
    if chance.random() < 0.5:
        return [chance.choice((0, 1, 2, -1, chance.choice(numbers)))] * chance.choice(LENGTHS)
    return [chance.choice(numbers) for _ in range(chance.choice(LENGTHS[:8]))]


def as_file(call: Call, size: tuple[int, int, int] = (3, 8, 8)) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and header of a packed network that makes this call, and returns the tensors that it gives."""
    used: dict[str, dict[str, Any]] = {}

    def ready(value: Any) -> Any:
        if isinstance(value, list):
            return [ready(item) for item in value]
        if value == "x":
            return {"node": "x"}
        if isinstance(value, str) and value.startswith("$"):
            used[value[1:]] = {"op": "tensor", "name": f"t_{value[1:]}", "tensor": value[1:]}
            return {"node": f"t_{value[1:]}"}
        return {"number": str(value)} if isinstance(value, float) and not math.isfinite(value) else value

    args, kwargs = ready(call.args), {key: ready(value) for key, value in call.kwargs.items()}
    held = {name: call.tensors[name].clone() for name in used if name != "huge"}
    middle: list[dict[str, Any]] = []
    if used.pop("huge", None):  # an expanded tensor, of 64 MiB if anything made it whole
        used["long"] = {"op": "tensor", "name": "t_long", "tensor": "long"}
        held["long"] = call.tensors["long"].clone()
        args_of_huge = [{"node": "t_long"}, [168, 100_000]]
        middle.append({"op": "aten.expand.default", "name": "t_huge", "args": args_of_huge, "kwargs": {}})
    middle.append({"op": call.op, "name": "y", "args": args, "kwargs": kwargs})
    result = [{"node": "y"}]
    if call.op not in PYTHON:
        returns = function_of(call.op)._schema.returns
        several = len(returns) if len(returns) > 1 else 2 if str(returns[0].type) == "List[Tensor]" else 0
        if several:
            names = [f"z{i}" for i in range(several)]
            middle += [
                {"op": "python.getitem", "name": n, "args": [{"node": "y"}, i], "kwargs": {}}
                for i, n in enumerate(names)
            ]
            result = [{"node": name} for name in names]
        elif str(returns[0].type) != "Tensor":
            middle.append({"op": "aten.full.default", "name": "z", "args": [[1], {"node": "y"}], "kwargs": {}})
            result = [{"node": "z"}]
    elif call.op != "python.getitem":
        middle.append({"op": "aten.full.default", "name": "z", "args": [[1], {"node": "y"}], "kwargs": {}})
        result = [{"node": "z"}]
    nodes = [
        {"op": "input", "name": "x"},
        *used.values(),
        *middle,
        {"op": "output", "name": "output", "args": [result]},
    ]
    header = {
        "kind": "packed", "format": FORMAT, "name": "hostile", "scheme": "", "input_size": list(size), "batch": None,
        "layers": [], "nodes": nodes,
    }  # fmt: skip
    return held, header | {"sha256": digest(held, header)}
