"""Single operations against torch, in float64 where sums are exact."""

import ctypes
import functools
import math
import mmap
import operator
import sys
from dataclasses import replace

import bonn_qat_runtime
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bonn_qat_runtime import library
from bonn_qat_runtime.files import PackedFile, Tensor
from bonn_qat_runtime.fuse import fuse
from bonn_qat_runtime.lower import lower
from bonn_qat_runtime.plan import (
    ARRANGE,
    BINARY,
    DEPTHWISE,
    FIELDS,
    NORMALIZE,
    POINTWISE,
    PRODUCT,
    RESULT,
    aligned,
    plan,
)
from torch import nn

CPUS = library.cpus()


def program(nodes, tensors, size, cpu):
    """The program of a file with these nodes."""
    held = {name: Tensor(str(value.dtype), value) for name, value in tensors.items()}
    entries = [{"op": "tensor", "name": name, "tensor": name} for name in tensors]
    file = PackedFile(
        name="", scheme="", input_size=size, nodes=[*entries, {"op": "input", "name": "x"}, *nodes], tensors=held,
        preprocessing=None,
    )  # fmt: skip
    return library.Program(plan(fuse(lower(file)), size, library.layout(cpu)), cpu)


def call(op, name, *args):
    refer = [{"node": arg} if isinstance(arg, str) and arg != "same" else arg for arg in args]
    return {"op": op, "name": name, "args": refer, "kwargs": {}}


def output(name):
    return {"op": "output", "name": "output", "args": [{"node": name}]}


def words_of(bits):
    octets = np.packbits(bits.reshape(-1), bitorder="little")
    return np.pad(octets, (0, -len(octets) % 8)).view(np.int64)


def geometries():
    random = np.random.default_rng(0)
    for _ in range(40):
        groups = int(random.choice([1, 1, 1, 2, 3, 16]))
        inputs, outputs = (groups * int(random.choice([1, 3, 8, 16, 20, 33, 48, 64, 80])) for _ in range(2))
        kernel, stride, dilation = (random.integers(1, most + 1, 2).tolist() for most in (3, 3, 2))
        yield [outputs, inputs, *kernel, *stride, *random.integers(0, 4, 4).tolist(), *dilation, groups]


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize("geometry", [*geometries()], ids=lambda numbers: "-".join(map(str, numbers)))
def test_a_binary_convolution_is_exact(geometry, cpu):
    o, i, kh, kw, sh, sw, top, bottom, left, right, dh, dw, groups = geometry
    random = np.random.default_rng(1)
    x = random.standard_normal((2, i, 9, 7)).astype(np.float32)
    x[0, 0, 0, :3] = np.nan, np.inf, -np.inf
    low = np.where(random.random(i) < 0.2, -np.inf, random.standard_normal(i))
    high = np.where(random.random(i) < 0.7, np.inf, random.standard_normal(i))
    bits = random.random((o, i // groups, kh, kw)) < 0.5
    tensors = {
        "thresholds": np.stack((low, high)).astype(np.float32), "words": words_of(bits),
        "vectors": np.stack((np.full(o, 0.5), random.standard_normal(o))).astype(np.float32),
        "next": np.stack((random.standard_normal(o), np.full(o, np.inf))).astype(np.float32),
    }  # fmt: skip
    nodes = [
        call("bonn_qat.sign_codes.default", "signs", "x", "thresholds", geometry),
        call("bonn_qat.binary_conv2d.default", "y", "signs", "words", geometry, [0, 0, 1, 1], "vectors", None),
    ]
    within = (x >= tensors["thresholds"][0][:, None, None]) & (x <= tensors["thresholds"][1][:, None, None])
    signs, weight = (torch.from_numpy(np.where(array, 1.0, -1.0)) for array in (within, bits))
    sums = F.conv2d(F.pad(signs, (left, right, top, bottom)), weight, stride=(sh, sw), dilation=(dh, dw), groups=groups)
    rows = torch.from_numpy(tensors["vectors"])[:, :, None, None]
    expected = sums.float() * rows[0] + rows[1]
    found = program([*nodes, output("y")], tensors, (i, 9, 7), cpu)(x)
    np.testing.assert_array_equal(found, expected.numpy())

    # And its signs, as the next convolution reads them: here with one weight of +1 for each channel.
    after = [o, o, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, o]
    tensors |= {"ones": words_of(np.ones((o, 1, 1, 1), np.bool_)), "none": np.zeros((0, o), np.float32)}
    nodes[1] = call(
        "bonn_qat.binary_conv2d_sign.default", "y", "signs", "words", geometry, [0, 0, 1, 1], "vectors", None, "next",
        after,
    )  # fmt: skip
    nodes.append(call("bonn_qat.binary_conv2d.default", "z", "y", "ones", after, [], "none", None))
    is_above = expected.numpy() >= tensors["next"][0][:, None, None]
    found = program([*nodes, output("z")], tensors, (i, 9, 7), cpu)(x)
    np.testing.assert_array_equal(found, np.where(is_above, 1.0, -1.0))


@pytest.mark.parametrize("cpu", CPUS)
@pytest.mark.parametrize(
    ("inputs", "outputs", "kernel", "stride", "padding", "dilation", "groups"),
    [
        (3, 20, (3, 3), [2, 1], [1, 0], [1, 1], 1),
        (3, 64, (7, 7), [2, 2], [3, 3], [1, 1], 1),
        (20, 33, (1, 3), [1, 2], [0, 2], [1, 2], 1),
        (32, 64, (3, 3), [1, 1], "same", [2, 1], 2),
        (12, 18, (2, 2), [1], [1], [1], 3),
        (24, 24, (3, 3), [1, 1], [1, 1], [1, 1], 24),
        (24, 24, (5, 3), [2, 1], [4, 2], [2, 3], 24),
        (7, 7, (2, 9), [1, 3], [0, 5], [1, 2], 7),
    ],
)
@pytest.mark.parametrize("is_first", [True, False])
def test_a_float_convolution_is_torchs(is_first, inputs, outputs, kernel, stride, padding, dilation, groups, cpu):
    random = np.random.default_rng(2)
    x = random.standard_normal((2, inputs, 11, 14)).astype(np.float32)
    weight = random.standard_normal((outputs, inputs // groups, *kernel)).astype(np.float32)
    bias = random.standard_normal(outputs).astype(np.float32)
    nodes = [] if is_first else [call("aten.relu.default", "r", "x")]
    overload = "padding" if padding == "same" else "default"
    nodes.append(
        call(f"aten.conv2d.{overload}", "y", "x" if is_first else "r", "weight", "bias", stride, padding, dilation,
             groups)
    )  # fmt: skip
    nodes.append(call("aten.prelu.default", "z", "y", "slope"))
    tensors = {"weight": weight, "bias": bias, "slope": np.full(1, 0.25, np.float32)}
    found = program([*nodes, output("z")], tensors, (inputs, 11, 14), cpu)(x)
    source = torch.from_numpy(x if is_first else np.maximum(x, 0)).double()
    y = F.conv2d(
        source, torch.from_numpy(weight).double(), torch.from_numpy(bias).double(), stride, padding, dilation, groups
    )
    np.testing.assert_allclose(found, F.leaky_relu(y, 0.25).numpy(), rtol=1e-4, atol=1e-5)


POOLS = {
    "aten.max_pool2d.default": (F.max_pool2d, [([3, 3], [2, 2], [1, 1]), ([2], [2], [0], [2], True), ([3, 2], [])]),
    "aten.avg_pool2d.default": (
        F.avg_pool2d,
        [([2, 2], [2, 2], [0, 0], True), ([3], [2], [1], True, False), ([3, 3], [1, 1], [1, 1], False, True, 5)],
    ),
    "aten.adaptive_avg_pool2d.default": (F.adaptive_avg_pool2d, [([1, 1],), ([3, 4],)]),
}


@pytest.mark.parametrize("op", POOLS)
def test_a_pool_is_torchs(op):
    function, cases = POOLS[op]
    x = np.random.default_rng(3).standard_normal((2, 20, 11, 14)).astype(np.float32)
    x[1, 3, 4, 5] = np.nan
    for args in cases:
        found = program([call(op, "y", "x", *args), output("y")], {}, (20, 11, 14), CPUS[0])(x)
        given = [arg or None for arg in args] if args[1:2] == ([],) else args
        np.testing.assert_allclose(found, function(torch.from_numpy(x), *given).numpy(), rtol=1e-5, atol=1e-6)


def test_sums_and_steps_are_torchs():
    random = np.random.default_rng(4)
    x = random.standard_normal((2, 20, 5, 6)).astype(np.float32)
    x[0, 0, 0, :3] = np.nan, np.inf, -np.inf
    tensors = {"row": random.standard_normal((1, 20, 1, 1)).astype(np.float32)}
    tensors |= {name: random.random(20).astype(np.float32) for name in ("weight", "bias", "mean", "variance")}
    tensors["classes"] = random.standard_normal((7, 600)).astype(np.float32)
    nodes = [
        call("aten.mul.Tensor", "a", "x", "row"),
        call("aten.sub.Tensor", "b", "a", 0.5),
        call("aten.hardtanh.default", "c", "b", -0.75, 0.5),
        call("aten.batch_norm.default", "d", "c", "weight", "bias", "mean", "variance", False, 0.1, 1e-5, True),
        call("aten.add.Tensor", "e", "d", "a"),
        call("aten.relu.default", "f", "e"),
        call("aten.leaky_relu.default", "g", "e", 0.1),
        call("aten.add.Tensor", "h", "f", "g"),
    ]
    held = {name: torch.from_numpy(value) for name, value in tensors.items()}
    a = torch.from_numpy(x) * held["row"]
    e = a + F.batch_norm(F.hardtanh(a - 0.5, -0.75, 0.5), held["mean"], held["variance"], held["weight"], held["bias"])
    expected = F.relu(e) + F.leaky_relu(e, 0.1)
    found = program([*nodes, output("h")], tensors, (20, 5, 6), CPUS[0])(x)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)
    nodes += [call("aten.flatten.using_ints", "i", "h", 1), call("aten.linear.default", "j", "i", "classes")]
    found = program([*nodes, output("j")], tensors, (20, 5, 6), CPUS[0])(x)
    np.testing.assert_allclose(found, F.linear(expected.flatten(1), held["classes"]).numpy(), rtol=1e-3, atol=1e-4)


def test_a_fused_step_is_rounded_once():
    a = np.array([[1 + 2**-12]], np.float32).repeat(4, 0).reshape(1, 4, 1, 1)
    vectors = np.array([[1 + 2**-12] * 4, [-1, 2.0**-60, -(2.0**-60), math.nan]], np.float32)
    nodes = [call("bonn_qat.elementwise.default", "y", "x", [2, 0], "vectors", None), output("y")]
    exact = float(a[0, 0, 0, 0]) ** 2
    for cpu in CPUS:
        found = program(nodes, {"vectors": vectors}, (4, 1, 1), cpu)(a).reshape(-1)
        assert found[0] == np.float32(exact - 1)
        # Halfway between two floats: what is added decides.
        assert found[1] == np.nextafter(np.float32(1 + 2**-11), np.float32(2))
        assert found[2] == np.float32(1 + 2**-11)
        assert np.isnan(found[3])


FUNCTIONS = {
    "exp": torch.exp, "sigmoid": torch.sigmoid, "silu": F.silu, "tanh": torch.tanh, "gelu": F.gelu, "erf": torch.erf,
    "hardsigmoid": F.hardsigmoid, "hardswish": F.hardswish, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal, "square": torch.square, "abs": torch.abs, "relu6": F.relu6, "neg": torch.neg,
    "round": torch.round, "floor": torch.floor, "sign": torch.sign,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
}  # fmt: skip


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_function_is_torchs_in_float64_within_a_few_units_in_the_last_place(name):
    scales = 10.0 ** np.linspace(-30, 2, 2000)
    random = np.random.default_rng(6)
    x = np.concatenate((random.standard_normal(40000) * 3, random.choice([-1, 1], 2000) * scales)).astype(np.float32)
    special = np.array([0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 88.8, 104, -104, 3e38, -3e38], np.float32)
    x = np.concatenate((x, special if name != "gelu" else special[4:10]))  # torch's gelu(inf) is NaN
    x = x.reshape(1, -1, 1, 1)
    node = call(f"aten.{name.removesuffix('_tanh')}.default", "y", "x")
    node["kwargs"] = {"approximate": "tanh"} if name == "gelu_tanh" else {}
    found = [program([node, output("y")], {}, x.shape[1:], cpu)(x) for cpu in CPUS]
    for other in found[1:]:
        np.testing.assert_array_equal(found[0], other)
    exact = FUNCTIONS[name](torch.from_numpy(x).double()).numpy()
    own = FUNCTIONS[name](torch.from_numpy(x)).numpy()
    ours = found[0]
    np.testing.assert_array_equal(np.isnan(ours), np.isnan(own))
    np.testing.assert_array_equal(ours[np.isinf(own)], own[np.isinf(own)])
    # Where 1 + erf loses digits, so does torch: the error is one of what is added.
    added = np.abs(x) if "gelu" in name else np.float32(0)
    finite = np.isfinite(own)
    unit = np.spacing(np.maximum(np.abs(own), np.broadcast_to(added, own.shape)))
    allowed = 4 * unit[finite] + 2 * np.abs(own[finite] - exact[finite])
    assert (np.abs(ours[finite] - exact[finite]) <= allowed).all()


def traced(module, *shape):
    """The calls of a module as a file has them, its constants, and what torch computes for three images."""
    exported = torch.export.export(module.eval(), (torch.zeros(1, *shape),)).run_decompositions({})
    nodes, tensors, held = [], {}, exported.state_dict | exported.constants
    places = exported.graph_signature.inputs_to_parameters | exported.graph_signature.inputs_to_buffers
    places |= exported.graph_signature.inputs_to_lifted_tensor_constants

    def encoded(value):
        if isinstance(value, torch.fx.Node):
            return {"node": "x" if value.name == image else value.name}
        if isinstance(value, list | tuple):
            return [encoded(item) for item in value]
        if isinstance(value, torch.dtype | torch.device | torch.memory_format | torch.layout):
            return {"dtype": str(value).removeprefix("torch.")}
        return {"number": str(value)} if isinstance(value, float) and not math.isfinite(value) else value

    (image,) = exported.graph_signature.user_inputs
    for node in exported.graph.nodes:
        if node.op == "placeholder" and node.name != image:
            tensors[node.name] = held[places[node.name]].detach().numpy()
        elif node.op == "call_function" and "_assert_" not in str(node.target):
            name = f"python.{node.target.__name__}" if node.target is operator.getitem else str(node.target)
            args, kwargs = encoded(node.args), {key: encoded(value) for key, value in node.kwargs.items()}
            nodes.append({"op": name, "name": node.name, "args": args, "kwargs": kwargs})
        elif node.op == "output":
            (returned,) = node.args
            nodes.append(
                {"op": "output", "name": "output", "args": [encoded(returned[0] if len(returned) == 1 else returned)]}
            )
    return nodes, tensors


class Of(nn.Module):
    """A function as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def tokens(x):
    return x.flatten(2).transpose(1, 2)


def windows(x):
    n, c, h, w = x.shape
    return x.roll((1, -2), (2, 3)).view(n, c, 2, h // 2, 2, w // 2).permute(0, 2, 4, 3, 5, 1).reshape(-1, h * w // 4, c)


def attended(x):
    q, k, v = tokens(x).reshape(1, x.shape[2] * x.shape[3], 3, 2, -1).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


# Each on a map of 24 channels and 4 by 6 pixels.
SHAPES = {
    "cat": lambda x: torch.cat((x[:, 3:8] * 2, x, F.relu(x)[:, ::5]), 1).exp(),
    "cat of pixels": lambda x: torch.cat((x[:, :, 1:], x.flip(3)), 2) + 1,
    "cat with a constant": lambda x: torch.cat((torch.ones(1, 1, 24) * 3, tokens(x)), 1) * 2,
    "split": lambda x: torch.add(*x.split([8, 16], 1)[1].chunk(2, 1)),
    "squeeze and excite": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "gate of pixels": lambda x: x * x.mean(1, keepdim=True).sigmoid(),
    "both broadcast": lambda x: x.mean(2, keepdim=True) - x.mean(3, keepdim=True),
    "quotient": lambda x: x / (x.abs().amax((1, 2), keepdim=True) + 1) + 1 / (x * x + 1) - 2 / (3 + x.abs()),
    "comparisons": lambda x: (x >= 0.5).float() - (x <= x[:, :1]).float() + (x > x.flip(1)).float() * (x > 1).float(),
    "extrema": lambda x: torch.maximum(x, -x[:, :1]) + torch.minimum(x.flip(1), x),
    "sums": lambda x: x.sum((1, 3)) + x.amax(1).sum(1, keepdim=True).sum(-1, keepdim=True)[:, 0],
    "variance": lambda x: torch.var_mean(x, 1, correction=0, keepdim=True)[0] * x.std(2, correction=1, keepdim=True),
    "norm of vectors": lambda x: F.normalize(tokens(x), dim=-1) + F.normalize(tokens(x), dim=1),
    "pools of parts": lambda x: F.max_pool2d(x.view(3, 8, 4, 6), 3, 2).view(1, -1) * F.avg_pool1d(x[:, 0], 6).mean(1),
    "windows": lambda x: F.gelu(windows(x)).mean(1).reshape(1, -1),
    "pixel shuffle": lambda x: F.pixel_unshuffle(F.pixel_shuffle(x[:, :12], 2) + 1, 2),
    "pads": lambda x: F.pad(F.pad(x, (1, 2, 0, 3), value=2.5), (2, 1, 3, 2), mode="reflect")[:, :, :, :5],
    "other pads": lambda x: F.pad(x, (1, 2, 3, 1), mode="replicate") + F.pad(x, (2, 1, 1, 3), mode="circular"),
    "nearest": lambda x: F.interpolate(x, scale_factor=2) + F.interpolate(x, (8, 12), mode="nearest"),
    "bilinear": lambda x: F.interpolate(x, (7, 9), mode="bilinear"),
    "aligned": lambda x: F.interpolate(x, (7, 9), mode="bilinear", align_corners=True),
    "bicubic": lambda x: F.interpolate(x, (7, 9), mode="bicubic"),
    "unfold": lambda x: F.unfold(x, 3, padding=1, stride=2).reshape(1, 24, 9, -1) * 2,
    "repeat": lambda x: x.repeat(1, 2, 1, 2) + x.repeat_interleave(2, 1).repeat_interleave(2, 3),
    "softmax": lambda x: x.softmax(1) + tokens(x).softmax(1).transpose(1, 2).reshape(x.shape),
    "attention": attended,
    "other attention": lambda x: tokens(x).transpose(1, 2) @ (tokens(x) @ tokens(x).transpose(1, 2)).softmax(-1),
    "einsum": lambda x: torch.einsum("bchw,bcwd->bhcd", x, x.transpose(2, 3)),
    "stack": lambda x: torch.stack((x, x.flip(2)), 2).flatten(1, 2) + 1,
    "positions": lambda x: x + torch.arange(24.0).reshape(1, 4, 6).sin().cumsum(2) / torch.ones(1, 4, 1).cumsum(1),
}  # fmt: skip


def assert_traced(module, *shape, tolerance=2e-6):
    torch.manual_seed(0)
    nodes, tensors = traced(module, *shape)
    x = torch.randn(1, *shape)
    expected = module(x).detach().numpy()
    for cpu in CPUS:
        found = program(nodes, tensors, shape, cpu)(x.numpy())
        np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@pytest.mark.parametrize("name", SHAPES)
def test_what_moves_numbers_is_torchs(name):
    assert_traced(Of(SHAPES[name]), 24, 4, 6)


LAYERS = {
    "layer norm": nn.Sequential(Of(tokens), nn.LayerNorm(24), nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 5)),
    "layer norm of channels": Of(lambda x: F.layer_norm(x.permute(0, 2, 3, 1), [24]).permute(0, 3, 1, 2)),
    "layer norm of all": nn.LayerNorm([24, 4, 6]),
    "rms norm": nn.Sequential(Of(tokens), nn.RMSNorm(24)),
    "group norm": nn.Sequential(nn.GroupNorm(3, 24), nn.SiLU(), nn.GroupNorm(1, 24)),
    "multi-head attention": nn.Sequential(Of(tokens), nn.TransformerEncoderLayer(24, 3, 48, batch_first=True)),
    "depthwise": nn.Sequential(nn.Conv2d(24, 24, (3, 5), (2, 1), (1, 3), (1, 2), groups=24), nn.Hardswish()),
    "depthwise of few": nn.Sequential(Of(lambda x: x[:, :3]), nn.Conv2d(3, 3, 3, padding=1, groups=3)),
    "transposed": nn.ConvTranspose2d(24, 18, 3, 2, 1, 1, groups=3),
    "rows": nn.Sequential(Of(lambda x: x.flatten(2)), nn.Conv1d(24, 24, 5, 2, 2, groups=2), nn.Hardsigmoid()),
    "linear of pixels": nn.Sequential(Of(lambda x: x.permute(0, 2, 3, 1)), nn.Linear(24, 7), nn.Softmax(2)),
    "classifier": nn.Sequential(Of(lambda x: x.permute(0, 2, 3, 1).flatten(1)), nn.Linear(576, 7)),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_torchs(name):
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = LAYERS[name]
        for parameter in module.parameters():
            nn.init.normal_(parameter, std=0.3)
        assert_traced(module, 24, 4, 6, tolerance=1e-5)


def test_several_results_are_a_tuple():
    nodes, tensors = traced(Of(lambda x: (x.relu(), x.mean((2, 3)))), 20, 3, 5)
    x = torch.randn(4, 20, 3, 5)
    found = program(nodes, tensors, (20, 3, 5), CPUS[0])(x.numpy())
    assert isinstance(found, tuple)
    for own, other in zip(found, (x.relu(), x.mean((2, 3))), strict=True):
        np.testing.assert_allclose(own, other.numpy(), rtol=1e-6, atol=1e-6)


def guarded(size):
    """Zeros before a page that nobody may touch."""
    if sys.platform != "linux":
        return aligned(size)
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    array = np.frombuffer(memory, np.uint8)
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(array.ctypes.data + pages), mmap.PAGESIZE, 0) == 0
    return array[pages - size : pages]


def mutated(made, random):
    """A plan with some numbers of some rows, or of the constants, replaced."""
    rows, constants = made.rows.copy(), made.constants.copy()
    odd = [-(2**63), -64, -1, 0, 1, 2, 3, 63, 64, 4096, 2**20, 2**31, 2**40, 2**63 - 1]
    for _ in range(random.integers(1, 4)):
        row, column = random.integers(len(rows)), random.integers(rows.shape[1])
        value = rows[row, column]
        rows[row, column] = random.choice([*odd, value + 1, value - 1, value + 64, value - 64, 2 * min(value, 2**40)])
    if random.random() < 0.3:
        numbers = constants[: len(constants) // 4 * 4].view(np.int32)
        numbers[random.integers(len(numbers))] = random.integers(-(2**31), 2**31)
    fresh = guarded(len(constants))
    fresh[:] = constants
    return replace(made, rows=rows, constants=fresh)


@functools.cache
def attention_plan():
    """A plan with every operation that a plan of a convolutional network has not."""
    module = nn.Sequential(
        nn.Conv2d(24, 24, 3, groups=24), Of(lambda x: x * x.mean((2, 3), keepdim=True).sigmoid()), Of(attended),
        nn.LayerNorm(8),
    )  # fmt: skip
    nodes, tensors = traced(module, 24, 6, 5)
    return program(nodes, tensors, (24, 6, 5), CPUS[0])._plan


@pytest.mark.parametrize(
    ("name", "scheme", "pixels"), [("wrn10_16", "reactnet", 16), ("mobilenetv2_100", "bonn", 64), (None, None, None)]
)
def test_no_altered_plan_reads_or_writes_elsewhere(packed, monkeypatch, name, scheme, pixels):
    if name:
        made = bonn_qat_runtime.Network(packed(name, scheme, pixels))._program._plan
    else:
        made = attention_plan()
        assert {ARRANGE, DEPTHWISE, NORMALIZE, PRODUCT} <= set(made.rows[:, 0])
    monkeypatch.setattr(library, "aligned", guarded)
    random, refused = np.random.default_rng(5), 0
    images = guarded(4 * made.inputs).view(np.float32).reshape(1, -1)
    for _ in range(300):
        try:
            library.Program(mutated(made, random), CPUS[0])(images)
        except bonn_qat_runtime.InvalidPlan:
            refused += 1
    assert 100 < refused < 300


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("operation", 99, "range"), ("x", 2**40, "arena"), ("x", 8, "arena"), ("y", 2**40, "arena"),
        ("scratch", -64, "arena"), ("signs", 2**62, "arena"), ("residual", 2**40, "arena"),
        ("weight", 2**40, "constants"),
        ("program", 2**40, "constants"), ("vectors", -1, "constants"), ("thresholds", 2**40, "constants"),
        ("tables", 2**40, "constants"), ("sums", 2**40, "constants"), ("classes", 1, "constants"),
        ("rows", 0, "constants"), ("turns", 8, "range"), ("turns", -1, "range"), ("turns", 1, "range"),
        ("ring", 17, "range"), ("ring", -1, "range"), ("x_ring", 1, "range"),
        ("height", 0, "range"), ("width", 2**62, "range"), ("channels", 2**40, "range"), ("pitch", 17, "range"),
        ("stride_y", 1000, "range"), ("kernel_width", 50, "range"), ("dilation_x", 0, "range"), ("groups", 3, "range"),
        ("top", -1, "range"), ("steps", -1, "range"), ("steps", 1000, "constants"), ("out_height", 10**5, "arena"),
    ],
)  # fmt: skip
def test_a_row_that_reaches_too_far_is_refused(packed, field, value, reason):
    network = bonn_qat_runtime.Network(packed("wrn10_16", "reactnet", 16))
    made = network._program._plan
    rows = made.rows.copy()
    row = int(np.flatnonzero(rows[:, 0] == BINARY)[0])
    rows[row, FIELDS.index(field)] = value
    with pytest.raises(bonn_qat_runtime.InvalidPlan, match=f"row {row} of the plan.*{reason}"):
        library.Program(replace(made, rows=rows), network.cpu)


@pytest.mark.parametrize(
    ("operation", "field", "value", "reason"),
    [
        (ARRANGE, "x", 2**30, "arena"), (ARRANGE, "y", 2**30, "arena"), (ARRANGE, "run", 2**30, "arena"),
        (ARRANGE, "run", 0, "range"), (ARRANGE, "axes", 0, "range"), (ARRANGE, "windows", -64, "constants"),
        (PRODUCT, "x", 2**30, "arena"), (PRODUCT, "other", 2**30, "arena"), (PRODUCT, "other", -1, "arena"),
        (PRODUCT, "axes", 0, "range"), (PRODUCT, "axes", 2**19, "constants"), (PRODUCT, "y", 2**30, "arena"),
        (NORMALIZE, "weight", 2**30, "constants"), (NORMALIZE, "x", 8, "arena"),
        (NORMALIZE, "out_width", 10**4, "arena"), (DEPTHWISE, "weight", 2**30, "constants"),
        (DEPTHWISE, "groups", 12, "range"), (DEPTHWISE, "outputs", 23, "range"),
        (POINTWISE, "residual_pitch", 16, "range"), (RESULT, "y", 1, "range"), (RESULT, "y", -1, "range"),
    ],
)  # fmt: skip
def test_a_row_of_attention_that_reaches_too_far_is_refused(operation, field, value, reason):
    made = attention_plan()
    rows = made.rows.copy()
    row = int(np.flatnonzero(rows[:, 0] == operation)[0])
    rows[row, FIELDS.index(field)] = value
    with pytest.raises(bonn_qat_runtime.InvalidPlan, match=f"row {row} of the plan.*{reason}"):
        library.Program(replace(made, rows=rows), CPUS[0])
