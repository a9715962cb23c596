"""Single operations against torch, in float64 where sums are exact."""

import ctypes
import math
import mmap
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
from bonn_qat_runtime.plan import BINARY, FIELDS, aligned, plan

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


@pytest.mark.parametrize(("name", "scheme", "pixels"), [("wrn10_16", "reactnet", 16), ("mobilenetv2_100", "bonn", 64)])
def test_no_altered_plan_reads_or_writes_elsewhere(packed, monkeypatch, name, scheme, pixels):
    monkeypatch.setattr(library, "aligned", guarded)
    network = bonn_qat_runtime.Network(packed(name, scheme, pixels))
    made, random, refused = network._program._plan, np.random.default_rng(5), 0
    images = guarded(4 * made.inputs).view(np.float32).reshape(1, *network.input_size)
    for _ in range(300):
        try:
            library.Program(mutated(made, random), network.cpu)(images)
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
