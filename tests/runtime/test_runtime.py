"""The packed runtime: products by kernels and in plain torch equal torch's convolution of +-1 exactly."""

import math
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from bonn_qat.engine import operators as engine
from bonn_qat.runtime import layout, operators, shapes
from bonn_qat.runtime.epilogue import ADD, CLAMP, FMA, PRELU, RESIDUAL, SCALE
from bonn_qat.runtime.layout import Geometry

ops = torch.ops.bonn_qat


@st.composite
def geometries(draw: Any) -> Geometry:
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    channels = st.sampled_from([1, 2, 3, 5, 8, 16, 31, 32, 33, 40, 63, 64, 65, 96, 130])
    pair = st.tuples(st.integers(1, 3), st.integers(1, 3))
    return Geometry(
        groups * draw(channels), groups * draw(channels),
        draw(st.sampled_from([(1, 1), (3, 3), (7, 7), (1, 5), (2, 3)])),
        draw(pair), draw(st.tuples(*[st.integers(0, 3)] * 4)), draw(pair), groups,
    )  # fmt: skip


def image_size(geometry: Geometry, extra: int) -> tuple[int, int]:
    """The smallest image that the kernel fits into, and ``extra`` pixels more."""
    top, bottom, left, right = geometry.padding
    sizes = [d * (k - 1) + 1 for k, d in zip(geometry.kernel, geometry.dilation, strict=True)]
    return max(1, sizes[0] - top - bottom) + extra, max(1, sizes[1] - left - right) + extra


def expected(x: Tensor, thresholds: Tensor, bits: Tensor, geometry: Geometry) -> Tensor:
    """By torch's convolution of float signs, zeros for the padding."""
    low, high = thresholds[..., None, None]
    signs = torch.where((x >= low) & (x <= high), 1.0, -1.0)
    top, bottom, left, right = geometry.padding
    padded = F.pad(signs, (left, right, top, bottom))
    return F.conv2d(padded, bits * 2.0 - 1, None, geometry.stride, 0, geometry.dilation, geometry.groups)


def problem(geometry: Geometry, batch: int = 2, extra: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(batch, geometry.in_channels, *image_size(geometry, extra))
    odd = torch.rand_like(x)
    for place, value in enumerate((math.nan, math.inf, -math.inf, 1e-42, -0.0)):
        x[(odd > 0.02 * place) & (odd < 0.02 * (place + 1))] = value
    low = torch.randn(geometry.in_channels) / 4
    high = torch.where(torch.rand_like(low) < 0.5, math.inf, low + torch.rand_like(low))
    low[torch.rand_like(low) < 0.2] = -math.inf
    return x, torch.stack((low, high)), torch.randn(geometry.weight_shape) >= 0


@settings(max_examples=150, deadline=None, derandomize=True)
@given(geometry=geometries(), batch=st.sampled_from([0, 1, 1, 2, 5]), extra=st.integers(0, 9))
def test_binary_convolutions_are_exact(geometry, batch, extra):
    x, thresholds, bits = problem(geometry, batch, extra)
    weight = layout.encode_weight(bits, geometry.groups)
    assert torch.equal(layout.decode_weight(weight, geometry), bits)
    assert weight.shape == geometry.words_shape
    codes = ops.sign_codes(x, thresholds, geometry.numbers)
    signs = layout.decode_signs(codes, geometry.in_channels, geometry.groups)
    low, high = thresholds[..., None, None]
    assert torch.equal(signs.permute(0, 3, 1, 2), (x >= low) & (x <= high))
    ones = torch.ones(1, geometry.out_channels)
    y = ops.binary_conv2d(codes, weight, geometry.numbers, [SCALE, 0], ones, None)
    assert torch.equal(y, expected(x, thresholds, bits, geometry))
    assert y.is_contiguous(memory_format=torch.channels_last)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "AVAILABLE", False)
        assert torch.equal(ops.sign_codes(x, thresholds, geometry.numbers), codes)
        assert torch.equal(ops.binary_conv2d(codes, weight, geometry.numbers, [SCALE, 0], ones, None), y)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(own=geometries(), other=geometries(), batch=st.sampled_from([1, 3]))
def test_a_convolution_writes_the_codes_of_the_next(own, other, batch):
    following = Geometry(
        3, own.out_channels, other.kernel, other.stride, other.padding, other.dilation,
        3 if own.out_channels % 3 == 0 and other.groups == 3 else 1,
    )  # fmt: skip
    x, thresholds, bits = problem(own, batch)
    codes = ops.sign_codes(x, thresholds, own.numbers)
    vectors, after = torch.randn(3, own.out_channels), torch.randn(2, own.out_channels).sort(0).values
    arguments = (codes, layout.encode_weight(bits, own.groups), own.numbers, [SCALE, 0, FMA, 1], vectors, None)
    if not operators.can_follow(own, following):
        with pytest.raises(RuntimeError, match="are not those that"):
            ops.binary_conv2d_sign(*arguments, after, following.numbers)
        return
    y = ops.binary_conv2d(*arguments)
    signs = ops.sign_codes(y, after, following.numbers)
    assert torch.equal(ops.binary_conv2d_sign(*arguments, after, following.numbers), signs)
    both = ops.binary_conv2d_and_sign(*arguments, after, following.numbers)
    assert torch.equal(both[0], y)
    assert torch.equal(both[1], signs)


@pytest.mark.parametrize("channels", [1, 31, 32, 64, 72])
def test_an_epilogue_rounds_as_torch_does(channels):
    """Bit for bit: scale, batch norm, shortcut, PReLU, ReLU, Hardtanh, bias."""
    geometry = Geometry(channels, 40, (3, 3), padding=(1, 1, 1, 1))
    x, thresholds, bits = problem(geometry, 2, 6)
    norm = nn.BatchNorm2d(channels).eval().requires_grad_(False)
    for tensor in (norm.weight, norm.bias, norm.running_mean):
        tensor.normal_()
    norm.running_var.uniform_(0.1, 3)
    scale, slope, bias = torch.rand(channels), torch.randn(channels), torch.randn(channels)
    ones, zeros = torch.ones(1, channels, 1, 1), torch.zeros(1, channels, 1, 1)
    factor = F.batch_norm(ones, torch.zeros(channels), norm.running_var, norm.weight, None, eps=norm.eps).flatten()
    offset = norm(zeros).flatten()
    vectors = torch.stack([scale, factor, offset, slope, bias, torch.full_like(bias, -1), torch.ones_like(bias)])
    program = [SCALE, 0, FMA, 1, RESIDUAL, 0, PRELU, 3, ADD, 4, CLAMP, 5]
    sums = expected(x, thresholds, bits, geometry)
    residual = torch.randn_like(sums)
    reference = F.prelu(norm(sums * scale[:, None, None]) + residual, slope) + bias[:, None, None]
    codes, weight = ops.sign_codes(x, thresholds, geometry.numbers), layout.encode_weight(bits)
    arguments = (codes, weight, geometry.numbers, program, vectors, residual)
    assert torch.equal(ops.binary_conv2d(*arguments), F.hardtanh(reference))
    assert torch.equal(ops.elementwise(sums, program, vectors, residual), F.hardtanh(reference))


def test_a_fused_multiplication_and_addition_is_rounded_once():
    """Against exact fractions, with cases where rounding by way of float64 is not enough."""
    a, b, c = 812825 * 2.0**-27, 1321 * 2.0**-27, 1.0
    x, factors, offsets = (torch.randn(1, 500, 1, 1) for _ in range(3))
    x[0, :2, 0, 0], factors[0, :2, 0, 0], offsets[0, :2, 0, 0] = a, torch.tensor([b, -b]), torch.tensor([c, -c])
    vectors = torch.cat([factors, offsets])[:, :, 0, 0]
    exact = [
        Fraction(float(p)) * Fraction(float(q)) + Fraction(float(r))
        for p, q, r in zip(x.flatten(), *vectors, strict=True)
    ]
    result = ops.elementwise(x, [FMA, 0], vectors, None)
    for value, sum_ in zip(result.flatten(), exact, strict=True):
        above, below = (torch.nextafter(value, torch.tensor(bound)) for bound in (math.inf, -math.inf))
        assert all(abs(Fraction(float(value)) - sum_) <= abs(Fraction(float(o)) - sum_) for o in (above, below))


@pytest.mark.parametrize("channels", [1, 32, 40, 64])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [((3, 3), (2, 2), (1, 1)), ((2, 2), (2, 2), (0, 0)), ((5, 3), (1, 3), (2, 0))]
)
def test_maxima_are_those_of_torch(channels, kernel, stride, padding):
    x = torch.randn(2, channels, 13, 77)
    odd = torch.rand_like(x)
    for value, share in ((math.nan, 0.01), (math.inf, 0.02), (-math.inf, 0.3)):
        x[odd < share] = value
    y = ops.max_pool2d(x, kernel, stride, padding)
    assert torch.equal(y.isnan(), F.max_pool2d(x, kernel, stride, padding).isnan())
    assert torch.equal(y.nan_to_num(7, 8, 9), F.max_pool2d(x, kernel, stride, padding).nan_to_num(7, 8, 9))
    assert y.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(RuntimeError, match="more than half"):
        ops.max_pool2d(x, kernel, stride, list(kernel))


def test_threads_change_nothing():
    geometry = Geometry(70, 64, (3, 3), padding=(1, 1, 1, 1))
    x, thresholds, bits = problem(geometry, 3, 40)
    vectors = torch.ones(1, 70)

    def run() -> tuple[Tensor, ...]:
        codes = ops.sign_codes(x, thresholds, geometry.numbers)
        y = ops.binary_conv2d(codes, layout.encode_weight(bits), geometry.numbers, [SCALE, 0], vectors, None)
        pooled = ops.max_pool2d(y.contiguous(), [3, 3], [2, 2], [1, 1])
        return codes, y, ops.elementwise(y, [PRELU, 0], vectors / 4, None), pooled

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run()
        torch.set_num_threads(2)
        assert all(torch.equal(a, b) for a, b in zip(run(), alone, strict=True))
    finally:
        torch.set_num_threads(before)


@given(st.lists(st.booleans(), max_size=200))
@settings(max_examples=30, deadline=None, derandomize=True)
def test_words_keep_every_bit(bits):
    tensor = torch.tensor(bits, dtype=torch.bool)
    words = layout.pack_words(tensor)
    assert words.dtype == torch.int64
    assert len(words) == (len(bits) + 63) // 64
    assert torch.equal(layout.unpack_words(words, tuple(tensor.shape)), tensor)
    assert all((int(words[i // 64]) >> i % 64) & 1 == bit for i, bit in enumerate(bits))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(geometry=geometries(), piece=st.sampled_from([1, 500, 3000, 2**22]))
def test_words_are_laid_out_in_pieces_as_in_one(geometry, piece):
    bits = torch.randn(geometry.weight_shape) >= 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layout, "_PIECE", piece)
        laid = layout.encode_words(layout.pack_words(bits), geometry)
    assert torch.equal(laid, layout.encode_weight(bits, geometry.groups))


def test_signs_come_back_from_words():
    signs = torch.randn(5, 3, 3, 7).sign()
    assert torch.equal(ops.unpack_signs(layout.pack_words(signs > 0), list(signs.shape)), signs)


GOOD = Geometry(8, 8, (3, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"codes": torch.zeros(1, 5, 5, 2, dtype=torch.int32)}, "are not codes"),
        ({"codes": torch.zeros(1, 2, 5, 1, dtype=torch.int32)}, "smaller than the kernel"),
        ({"weight": torch.zeros(3, dtype=torch.int32)}, "the weights"),
        ({"vectors": torch.zeros(1, 9)}, "the vectors"),
        ({"program": [SCALE, 1]}, "no operation 0 with row 1"),
        ({"program": [FMA, 0]}, "no operation 2 with row 0"),
        ({"program": [9, 0]}, "no operation 9"),
        ({"program": [RESIDUAL, 0]}, "a residual that is not given"),
        ({"program": [SCALE]}, "a list of pairs"),
        ({"residual": torch.zeros(1, 8, 2, 2)}, "the residual"),
        ({"geometry": [*GOOD.numbers[:-1], 3]}, "are not the geometry"),
        ({"geometry": [1, 2]}, "13 numbers"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_is_read(changes, message):
    arguments: dict[str, Any] = {
        "codes": torch.zeros(1, 5, 5, 1, dtype=torch.int32),
        "weight": torch.zeros(GOOD.words_shape, dtype=torch.int32),
        "geometry": GOOD.numbers,
        "program": [SCALE, 0],
        "vectors": torch.ones(1, 8),
        "residual": None,
    }
    ops.binary_conv2d(*arguments.values())
    with pytest.raises((RuntimeError, ValueError), match=message):
        ops.binary_conv2d(*(arguments | changes).values())


def test_codes_that_are_none_are_read_without_harm():
    codes = torch.randint(-(2**31), 2**31, (1, 5, 5, 1), dtype=torch.int32)
    weight = torch.zeros(GOOD.words_shape, dtype=torch.int32)
    assert ops.binary_conv2d(codes, weight, GOOD.numbers, [SCALE, 0], torch.ones(1, 8), None).isfinite().all()


AFTER = Geometry(8, 8, (3, 3), padding=(1, 1, 1, 1))
REFUSALS = (RuntimeError, ValueError, TypeError, AttributeError)  # torch gives None for a tensor to the operator


def whole_calls() -> dict[Any, list[Any]]:
    """Each operator with arguments that it takes."""
    codes, weight = torch.zeros(2, 5, 5, 1, dtype=torch.int32), torch.zeros(GOOD.words_shape, dtype=torch.int32)
    plain = [codes, weight, GOOD.numbers, [SCALE, 0, RESIDUAL, 0], torch.ones(1, 8), torch.ones(2, 8, 3, 3)]
    images = torch.randn(2, 8, 5, 5)
    return {
        ops.sign_codes: [images, torch.zeros(2, 8), AFTER.numbers],
        ops.binary_conv2d: plain,
        ops.binary_conv2d_sign: [*plain, torch.zeros(2, 8), AFTER.numbers],
        ops.binary_conv2d_and_sign: [*plain, torch.zeros(2, 8), AFTER.numbers],
        ops.elementwise: [images, [SCALE, 0, RESIDUAL, 0], torch.ones(1, 8), images],
        ops.max_pool2d: [images, [3, 3], [2, 2], [1, 1]],
        ops.unpack_signs: [torch.zeros(2, dtype=torch.int64), [3, 40]],
    }


def oddities(argument: Any) -> list[Any]:
    """What may stand in the place of an argument."""
    if isinstance(argument, Tensor):
        others = [argument[None], argument[..., :0], argument[:0], argument[..., 1:], argument.flatten()[0]]
        return [
            *others, *(other.clone() for other in others), torch.cat([argument, argument], -1), argument.double(),
            argument.to(torch.float16), argument.to(torch.int8), argument.to("meta"), argument.to_sparse(), None, 3,
        ]  # fmt: skip
    odd: list[Any] = [[], argument[:-1], [*argument, 1], [-n for n in argument], [2**62] * len(argument), None, "3"]
    for place in range(len(argument)):
        odd += [[*argument[:place], n, *argument[place + 1 :]] for n in (0, -1, 2, 3, 7, 64, 2**20, 2**31, 2**63 - 1)]
    return odd


@pytest.mark.parametrize("operator", whole_calls(), ids=str)
@pytest.mark.parametrize("compiled", [True, False], ids=["kernels", "plain torch"])
def test_hostile_arguments_are_refused_and_never_read(operator, compiled, monkeypatch):
    """Whatever an argument is: an exception, or what tensors without memory say that it gives, of the same call."""
    if not compiled:
        monkeypatch.setattr(engine, "AVAILABLE", False)
    whole = whole_calls()[operator]
    refused = 0
    for place, argument in enumerate(whole):
        for odd in oddities(argument):
            arguments = [*whole[:place], odd, *whole[place + 1 :]]
            try:
                found = operator(*arguments)
            except REFUSALS:
                refused += 1
                continue
            meta = [other.to("meta") if isinstance(other, Tensor) else other for other in arguments]
            told = operator(*meta)
            for one, other in zip(*([t] if isinstance(t, Tensor) else t for t in (found, told)), strict=True):
                assert (one.shape, one.dtype) == (other.shape, other.dtype)
    assert refused > 10


@pytest.mark.parametrize("operator", whole_calls(), ids=str)
def test_what_an_operator_refuses_tensors_without_memory_refuse_too(operator):
    whole = whole_calls()[operator]
    for place, argument in enumerate(whole):
        for odd in oddities(argument):
            if isinstance(odd, Tensor) and (odd.is_meta or odd.is_sparse):
                continue
            arguments = [*whole[:place], odd, *whole[place + 1 :]]
            try:
                operator(*arguments)
            except REFUSALS:
                with pytest.raises(REFUSALS):
                    operator(*(other.to("meta") if isinstance(other, Tensor) else other for other in arguments))


def test_operators_take_tensors_of_any_strides():
    for operator, arguments in whole_calls().items():
        expected = operator(*arguments)
        for spread in (
            lambda t: torch.stack([t, t], -1)[..., 0],
            lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
            lambda t: torch.cat([t, t])[len(t) :],
        ):
            found = operator(*(spread(a) if isinstance(a, Tensor) else a for a in arguments))
            pairs = zip(*([t] if isinstance(t, Tensor) else t for t in (found, expected)), strict=True)
            assert all(torch.equal(one, other) for one, other in pairs)


def test_a_residual_of_another_type_is_refused():
    arguments = whole_calls()[ops.binary_conv2d]
    for dtype in (torch.float64, torch.float16, torch.uint8):
        with pytest.raises(RuntimeError, match="the residual: expected"):
            ops.binary_conv2d(*arguments[:5], arguments[5].to(dtype))


@pytest.mark.parametrize(
    ("shape", "window"), [((1, 8, 0, 5), 2), ((1, 8, 5, 0), 2), ((1, 0, 5, 5), 2), ((1, 8, 5, 5), 2**40)]
)
def test_there_is_no_maximum_of_nothing(shape, window):
    with pytest.raises(RuntimeError, match=r"is smaller than the window|are not valid windows"):
        ops.max_pool2d(torch.zeros(shape), [window, window], [1, 1], [window // 2] * 2)


def test_a_filter_has_no_more_inputs_than_its_count_has_room_for():
    """The C runtime counts in 16 bits."""
    for inputs in (65_535, 65_536):
        geometry = Geometry(1, inputs, (1, 1))
        weight = layout.encode_weight(torch.zeros(geometry.weight_shape, dtype=torch.bool))
        codes = layout.encode_signs(torch.ones(1, 1, 1, inputs, dtype=torch.bool))
        arguments = codes, weight, geometry.numbers, [SCALE, 0], torch.ones(1, 1), None
        if inputs == 65_535:
            assert ops.binary_conv2d(*arguments).item() == -inputs
        else:
            with pytest.raises(ValueError, match="at most 65,535"):
                ops.binary_conv2d(*arguments)


def test_torch_finds_nothing_wrong_with_the_operators():
    """Schemas, the shapes that tracing is told, dispatch: torch's own check."""
    geometry = Geometry(12, 8, (3, 3), padding=(1, 1, 1, 1))
    x, thresholds, bits = problem(geometry)
    codes, weight = ops.sign_codes(x, thresholds, geometry.numbers), layout.encode_weight(bits)
    following = Geometry(1, 12, (1, 1)).numbers
    plain = (codes, weight, geometry.numbers, [SCALE, 0], torch.ones(1, 12), None)
    calls = {
        ops.sign_codes: (x, thresholds, geometry.numbers),
        ops.binary_conv2d: plain,
        ops.binary_conv2d_sign: (*plain, torch.zeros(2, 12), following),
        ops.binary_conv2d_and_sign: (*plain, torch.zeros(2, 12), following),
        ops.elementwise: (x, [SCALE, 0], torch.ones(1, 8), None),
        ops.max_pool2d: (x, [3, 3], [2, 2], [1, 1]),
        ops.unpack_signs: (torch.zeros(2, dtype=torch.int64), [3, 40]),
    }
    for operator, arguments in calls.items():
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))


aten = torch.ops.aten
X, Y = torch.randn(2, 6, 9, 8), torch.randn(2, 5, 6)
CALLS: list[tuple[Any, list[Any]]] = [
    *((getattr(aten, name).default, [X]) for name in shapes.ELEMENTWISE),
    *((getattr(getattr(aten, name), kind), [X, other])
      for name in ("add", "sub", "mul", "div", "ge", "gt", "le", "lt")
      for kind, other in (("Tensor", X), ("Tensor", torch.randn(6, 1, 1)), ("Tensor", torch.randn(())), ("Scalar", 2))),
    (aten.mul.Tensor, [torch.randn(4, 1, 3), torch.randn(2, 1, 5, 1)]),
    (aten.where.self, [X > 0, X, torch.zeros(())]),
    (aten.cat.default, [[X, X[:, :2]], 1]), (aten.cat.default, [[Y, Y], -1]), (aten.stack.default, [[Y, Y], 1]),
    (aten.stack.default, [[Y, Y], -1]),
    (aten.conv2d.default, [X, torch.randn(4, 3, 3, 2), torch.randn(4), [2, 1], [1, 0], [1, 2], 2]),
    (aten.conv2d.default, [X, torch.randn(4, 6, 1, 1)]),
    (aten.linear.default, [Y, torch.randn(7, 6), torch.randn(7)]), (aten.linear.default, [Y[0, 0], torch.randn(7, 6)]),
    (aten.matmul.default, [Y, torch.randn(6, 4)]),
    (aten.matmul.default, [torch.randn(3, 1, 4, 5), torch.randn(2, 5, 6)]),
    (aten.scaled_dot_product_attention.default,
     [torch.randn(2, 3, 4, 5), torch.randn(2, 3, 6, 5), torch.randn(2, 3, 6, 7)]),
    (aten.scaled_dot_product_attention.default, [*[torch.randn(2, 3, 4, 5)] * 3, torch.randn(1, 1, 4, 4)]),
    (aten.softmax.int, [Y, -1]), (aten._softmax.default, [Y, 1, False]),
    (aten.avg_pool2d.default, [X, [3, 2], [2], [1]]),
    (aten.avg_pool2d.default, [X, [2, 2], [2, 2], [0, 0], True, False]),
    *((aten.max_pool2d.default, [torch.randn(1, 1, n, n + 1), [k], [s], [p], [d], ceil])
      for n in (5, 6, 7) for k in (2, 3) for s in (1, 2, 3) for p in (0, 1) for d in (1, 2) for ceil in (False, True)),
    (aten.max_pool2d.default, [X, [2, 2]]), (aten.adaptive_avg_pool2d.default, [X, [3, 2]]),
    (aten.mean.dim, [X, [2, 3], True]), (aten.mean.dim, [X, [-1, 1]]), (aten.sum.dim_IntList, [X, [0]]),
    (aten.amax.default, [X, [1]]), (aten.prelu.default, [X, torch.randn(6)]), (aten.prelu.default, [X, torch.randn(1)]),
    (aten.layer_norm.default, [Y, [6], torch.randn(6), torch.randn(6)]), (aten.layer_norm.default, [Y, [5, 6]]),
    (aten.rms_norm.default, [Y, [6], torch.randn(6)]),
    (aten.group_norm.default, [X, 3, torch.randn(6), torch.randn(6)]),
    (aten.batch_norm.default, [X, None, None, torch.zeros(6), torch.ones(6), False, 0.1, 1e-5, False]),
    (aten.roll.default, [X, [1, -2], [2, 3]]),
    (aten.slice_scatter.default, [X, X[:, 1:3], 1, 1, 3]),
    (aten.slice_scatter.default, [X, X[..., -5::2], -1, -5, None, 2]),
]  # fmt: skip


def test_shapes_are_those_of_torch():
    """For every operator whose shapes are known here, and that for these arguments torch is not asked."""
    for function, arguments in CALLS:
        meta = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to("meta"), arguments)
        told = shapes.own(function, meta, {})
        found = function(*arguments)
        assert told is not None, (function, arguments)
        assert (told.shape, told.dtype, told.device.type) == (found.shape, found.dtype, "meta"), function
    assert {str(function) for function, _ in CALLS} == set(shapes.OWN)


def test_what_does_not_fit_is_told_by_torch():
    for function, arguments in CALLS:
        meta = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to("meta"), arguments)
        for place, argument in enumerate(meta):
            if not isinstance(argument, Tensor) or str(function).split(".")[1] in (*shapes.ELEMENTWISE, "max_pool2d"):
                continue
            shorter = argument[..., :-1] if argument.ndim else argument[None]
            for odd in (shorter, argument[None, None, None], argument.to(torch.int64), "x", None, []):
                changed = [*meta[:place], odd, *meta[place + 1 :]]
                real = [torch.empty_like(a, device="cpu") if isinstance(a, Tensor) else a for a in changed]
                try:
                    expected = function(*real)
                except (RuntimeError, TypeError, IndexError, NotImplementedError):
                    assert shapes.own(function, changed, {}) is None, (function, place, odd)
                else:
                    told = shapes.own(function, changed, {})
                    assert told is None or (told.shape, told.dtype) == (expected.shape, expected.dtype)
