"""A binary layer trains on the engine as on the plain path, norm, quantizer and product, whatever is done with it."""

import copy
import functools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import bonn_qat
from bonn_qat.engine import functions, operators
from bonn_qat.functional import prelu
from bonn_qat.layers import BinaryLayer, binary_form, normalized, step
from bonn_qat.plugins import find_scheme, schemes
from bonn_qat.scheme import PReLU, Stage
from bonn_qat.training.sync_norms import _OnCPU

OPTIONS = (
    "bonn:clip=0.5", "bonn:estimator=approx_sign", "bonn:estimator=swish_sign", "bonn:reading=inverse",
    "xnor:clip=0.3", "xnor:estimator=swish_sign", "xnor:input_scale=True", "xnor:gradient=straight",
    "bnn:activations=stochastic", "dorefa:activation_bits=1", "dorefa:activation_bits=32", "dorefa:weight_bits=2",
    "abcnet:activation_bases=3", "abcnet:mask=printed", "abcnet:weight_bases=3", "adabin:centre=code",
    "tbn:variant=tbnv2", "pcnn:clip=0.5", "mcn:modulation=mean",
)  # fmt: skip
CASES = [name for name in sorted(schemes()) if find_scheme(name).weight is not None] + list(OPTIONS)
BY_BITS = ["bonn", "bonn:estimator=approx_sign", "xnor", "reactnet", "bnn"]
BY_REPLAY = ["irnet", "adabin", "dorefa", "abcnet-5-5", "bwn"]
Make = Callable[[], nn.Module]
needs_kernels = pytest.mark.skipif(not operators.AVAILABLE, reason="no kernels")
quick = settings(database=None, deadline=None, max_examples=8)


def binary(case: str, make: Make = lambda: nn.Conv2d(16, 24, 3, padding=1), dtype: torch.dtype = torch.float32) -> Any:
    """A binary layer in training whose parameters are not at their start."""
    name, _, option = case.partition(":")
    key, _, text = option.partition("=")
    scheme = find_scheme(name)
    if key:
        kind = type(scheme.options[key])
        scheme = scheme.configure({key: text == "True" if kind is bool else kind(text)})
    layer = binary_form(make(), scheme).train()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.mul_(1 + 0.1 * torch.rand_like(parameter)).add_(0.05 * torch.rand_like(parameter))
    return layer.to(dtype)


def without_engine(module: Any) -> Any:
    """A copy whose binary layers take the plain path."""
    module = copy.deepcopy(module)
    for layer in module.modules():
        if isinstance(layer, BinaryLayer):
            layer._by_engine = lambda *_: None  # type: ignore[method-assign]
    return module


Result = dict[str, Tensor]
Call = Callable[[Any, Tensor], Tensor]


def trained(module: Any, x: Tensor, call: Call = lambda module, x: module(x)) -> Result:
    """Output, gradients and buffers of a step."""
    x = x.detach().requires_grad_(x.is_floating_point())
    torch.manual_seed(1)
    y = call(module, x)
    grad = torch.sin(torch.arange(y.numel(), dtype=torch.float64)) + 0.7  # whose sums do not cancel
    y.backward(grad.reshape(y.shape).to(y.dtype))
    found = {"y": y.detach(), "x": x.grad}
    found |= {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    found |= {name: buffer.clone() for name, buffer in module.named_buffers()}
    module.zero_grad()
    return {key: value for key, value in found.items() if value is not None}


def check_equal(found: Result, expected: Result, error: float, exact: tuple[str, ...] = ()) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert found[key].dtype == value.dtype, key
        if key in exact or not value.is_floating_point():
            assert torch.equal(found[key], value), key
        else:
            wrong = (found[key].double() - value.double()).abs().max() / value.double().abs().max().clamp(min=1e-30)
            assert wrong <= error, key


def check(module: Any, x: Tensor, call: Call = lambda module, x: module(x), error: float = 1e-12) -> Result:
    """``call`` gives the same on both paths."""
    plain = without_engine(module)
    found = trained(module, x, call)
    check_equal(found, trained(plain, x, call), error)
    return found


@pytest.fixture
def torch_moments(monkeypatch: pytest.MonkeyPatch) -> None:
    """The statistics of torch's batch norm, whose sums have another order than those of the kernels."""
    monkeypatch.setattr(
        functions, "_moments", lambda x, dtype: torch.batch_norm_update_stats(x.to(dtype), None, None, 0.0)
    )


def maps(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    x = (torch.randn(shape, dtype=torch.float64) * 1.5 + 0.5).to(dtype)
    return x.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else x


# ----------------------------------------------------------------------------------------- equal to the plain path

LAYERS: dict[str, tuple[Make, tuple[int, ...]]] = {
    "conv": (lambda: nn.Conv2d(16, 24, 3, padding=1), (3, 16, 6, 6)),
    "strided, without bias": (lambda: nn.Conv2d(33, 20, 3, 2, (1, 0), bias=False), (3, 33, 9, 7)),
    "dilated, same": (lambda: nn.Conv2d(8, 40, (2, 3), padding="same", dilation=(1, 2)), (2, 8, 6, 6)),
    "1x1, more pixels than in a row": (lambda: nn.Conv2d(24, 9, 1), (3, 24, 7, 9)),
    "groups": (lambda: nn.Conv2d(8, 16, 3, padding=1, groups=4), (3, 8, 6, 6)),
    "reflect": (lambda: nn.Conv2d(8, 16, 3, padding=1, padding_mode="reflect"), (3, 8, 6, 6)),
    "signals": (lambda: nn.Conv1d(8, 16, 3, 2, padding=1), (3, 8, 12)),
    "volumes": (lambda: nn.Conv3d(8, 16, 2, padding=1, groups=2), (3, 8, 3, 4, 2)),
    "transposed": (lambda: nn.ConvTranspose2d(8, 16, 3, 2, 1, 1), (3, 8, 3, 4)),
    "linear": (lambda: nn.Linear(20, 12), (9, 20)),
    "linear of tokens": (lambda: nn.Linear(20, 12, bias=False), (2, 3, 2, 20)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_layer_takes_the_engine_unless_its_quantizer_says_nothing(case: str) -> None:
    layer, x = binary(case), maps(3, 16, 6, 6)
    is_known = layer.input_quant is None or layer.input_quant.is_pure
    assert (layer._by_engine(x, None, None, *layer.geometry(x)) is not None) == is_known
    assert is_known != ("tbn" in case or case in ("xnor:input_scale=True", "bnn:activations=stochastic"))
    if case in BY_BITS and operators.AVAILABLE:
        assert "SignProduct" in type(layer._by_engine(x, None, None, *layer.geometry(x))[0].grad_fn).__name__


@pytest.mark.parametrize("case", CASES)
def test_float64_is_equal_up_to_rounding(case: str) -> None:
    for make, shape in LAYERS.values():
        layer, x = binary(case, make, torch.float64), maps(*shape, dtype=torch.float64)
        check(layer, x)


@pytest.mark.parametrize("case", CASES)
def test_float32_has_equal_outputs_where_sums_are_exact_and_gradients_up_to_rounding(
    case: str, torch_moments: None
) -> None:
    for make, shape in LAYERS.values():
        layer, x = binary(case, make), maps(*shape)
        plain = without_engine(layer)
        signs = layer.input_quant is not None and layer.input_quant.bits == 1
        exact = ("y",) if signs and layer.weight_quant.scaled_sign and "abcnet" not in case else ()
        exact = exact if "adabin" not in case and "dorefa" not in case else ()
        check_equal(trained(layer, x), trained(plain, x), 2e-6, exact)


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[Make, Tensor]:
    pair = lambda least, most: draw(st.tuples(*[st.integers(least, most)] * 2))  # noqa: E731
    kernel, stride, dilation, padding = pair(1, 4), pair(1, 3), pair(1, 2), pair(0, 3)
    size = [max(2, (k - 1) * d + 1 + extra) for k, d, extra in zip(kernel, dilation, pair(0, 6), strict=True)]
    inputs, outputs, batch = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(1, 3))
    bias = draw(st.booleans())
    x = maps(batch, inputs, *size)
    if draw(st.booleans()):
        x = x.contiguous()
    return lambda: nn.Conv2d(inputs, outputs, kernel, stride, padding, dilation, bias=bias), x


@needs_kernels
@given(convolutions(), st.sampled_from(BY_BITS), st.booleans())
@settings(quick, max_examples=40)
def test_any_convolution_by_bits_is_equal(drawn: tuple[Make, Tensor], case: str, tables: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "_BY_TABLES", operators._BY_TABLES if tables else frozenset())
        check_any_convolution(*drawn, case)


def check_any_convolution(make: Make, x: Tensor, case: str) -> None:
    layer = binary(case, make)
    plain = without_engine(layer)
    for norm in (layer.norm, plain.norm):  # frozen, so that both have equal statistics
        norm.eval()
        norm.running_mean.fill_(0.3)
    found, expected = trained(layer, x), trained(plain, x)
    if x.shape[1] < 8:  # the norm's gradients are then a few sums, all of which may nearly cancel
        found, expected = ({key: value for key, value in of.items() if key[:5] != "norm."} for of in (found, expected))
    check_equal(found, expected, 3e-6, ("y",))


@pytest.mark.parametrize("case", ["bonn", "reactnet", "irnet", "adabin"])
@pytest.mark.parametrize(
    "stage",
    [Stage(weights="float"), *(Stage(activations=name) for name in ("float", "relu", "leaky_clip", "clip"))],
    ids=lambda stage: f"{stage.weights}-{stage.activations}",
)
def test_stages_are_equal(case: str, stage: Stage) -> None:
    layer, x = binary(case, dtype=torch.float64), maps(3, 16, 6, 6, dtype=torch.float64)
    layer.enter(stage)
    check(layer, x)


@needs_kernels
@pytest.mark.parametrize("case", BY_BITS)
def test_with_the_statistics_of_the_kernels_signs_differ_only_where_they_are_uncertain(case: str) -> None:
    layer, x = binary(case, lambda: nn.Conv2d(48, 48, 1, bias=False)), maps(8, 48, 16, 16)
    seen: list[Tensor] = []
    plain = without_engine(layer)
    plain.norm.register_forward_hook(lambda module, inputs, y: seen.append(y.detach()))
    with torch.no_grad():  # each output is one sign
        for each in (layer, plain):
            each.weight_quant = binary("bnn").weight_quant
            each.weight.copy_(2 * torch.eye(48)[:, :, None, None] - 1)
    sums = [found(x.clone().requires_grad_()).detach() for found in (layer, plain)]
    total = [(y.sum(1, keepdim=True) / -46) for y in sums]
    signs = [((y + t) / 2).round() for y, t in zip(sums, total, strict=True)]
    estimator = layer.input_quant.estimator()
    threshold = 0.0 if estimator.threshold is None else estimator.threshold.detach().reshape(-1, 1, 1)
    differs = signs[0] != signs[1]
    assert ((seen[0] - threshold).abs()[differs] <= 1e-5).all()
    assert differs.float().mean() < 1e-3


@needs_kernels
@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(2, 300), st.floats(-1e3, 1e3), st.floats(0, 1e4))
@settings(quick, max_examples=20)
def test_moments_are_those_of_the_map(seed: int, channels: int, pixels: int, centre: float, outlier: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(3, channels, pixels, 1, generator=draw) + centre
    x[0, :, 0] += outlier
    x = x.contiguous(memory_format=torch.channels_last)
    mean, variance = operators.moments(x)
    exact = x.double()
    spread = exact.var((0, 2, 3), correction=0) + 1e-6
    assert ((mean - exact.mean((0, 2, 3))).abs() <= 1e-6 * (spread.sqrt() + abs(centre) + outlier)).all()
    assert ((variance - exact.var((0, 2, 3), correction=0)).abs() <= 4e-6 * spread).all()


# ---------------------------------------------------------------------------------------------------- bfloat16


@needs_kernels
@pytest.mark.parametrize("case", BY_BITS)
def test_under_autocast_sums_are_exact_and_rounded_once(case: str) -> None:
    layer, x = binary(case, lambda: nn.Conv2d(300, 32, 3, padding=1, bias=False)), maps(2, 300, 6, 6)
    layer.norm.eval()
    plain = without_engine(layer)
    _, scale = layer.weight_quant.quantize(layer.latent())
    integers = (plain(x).detach().double() / scale.double().abs().reshape(-1, 1, 1)).round()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert integers.abs().max() > 256  # which bfloat16 does not hold exactly
    assert torch.equal(y, (integers.float() * scale.abs().reshape(-1, 1, 1)).to(torch.bfloat16))


@pytest.mark.parametrize("case", BY_BITS + BY_REPLAY)
def test_under_autocast_gradients_are_near_those_of_float32(case: str) -> None:
    layer, x = binary(case), maps(4, 16, 8, 8)

    def autocast(module: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return module(x)  # type: ignore[no-any-return]

    found, expected = trained(copy.deepcopy(layer), x, autocast), trained(layer, x)
    assert found["y"].dtype == torch.bfloat16
    for key in expected.keys() - {"y"}:
        error = (found[key].double() - expected[key].double()).norm() / expected[key].double().norm().clamp(min=1e-30)
        assert error < 0.03, key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["bonn", "reactnet", "irnet"])
def test_a_layer_in_half_precision_trains(case: str, dtype: torch.dtype) -> None:
    layer, x = binary(case, dtype=dtype), maps(4, 16, 8, 8, dtype=dtype)
    found = trained(layer, x)
    assert all(value.isfinite().all() for value in found.values())
    assert found["y"].dtype == found["x"].dtype == found["weight"].dtype == dtype


# ------------------------------------------------------------------------------------------------- kinds of use

BOTH = pytest.mark.parametrize("case", ["bonn", "reactnet", "irnet", "adabin"])


def wide(case: str, make: Make = lambda: nn.Conv2d(16, 16, 3, padding=1)) -> tuple[Any, Tensor]:
    return binary(case, make, torch.float64), maps(3, 16, 6, 6, dtype=torch.float64)


@BOTH
def test_a_layer_is_used_twice(case: str) -> None:
    check(*wide(case), lambda layer, x: layer(layer(x).tanh()) + layer(x))


@BOTH
def test_parts_are_frozen(case: str) -> None:
    for parts in (["weight"], ["norm."], ["norm.bias"], ["weight_quant."], ["input_quant."], [""]):
        layer, x = wide(case)
        for name, parameter in layer.named_parameters():
            parameter.requires_grad_(not any(name.startswith(part) for part in parts))
        found = check(layer, x)
        assert not any(name in found for name, p in layer.named_parameters() if not p.requires_grad)


@BOTH
def test_norms_of_every_kind(case: str) -> None:
    for norm in (
        nn.BatchNorm2d(16).eval(), nn.BatchNorm2d(16, affine=False), nn.BatchNorm2d(16, track_running_stats=False),
        nn.BatchNorm2d(16, momentum=None), nn.BatchNorm2d(16, eps=0.1, momentum=0.5), nn.BatchNorm2d(16, bias=False),
        nn.Identity(), nn.GroupNorm(2, 16), nn.InstanceNorm2d(16, affine=True), nn.Dropout(0.5),
    ):  # fmt: skip
        layer, x = wide(case)
        layer.norm = norm.double()
        check(layer, x)


def test_a_synchronized_norm_is_called_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Tensor] = []

    def seen(self: Any, input: Tensor) -> Tensor:
        calls.append(input)
        return nn.functional.batch_norm(input, None, None, self.weight, self.bias, training=True)

    monkeypatch.setattr(_OnCPU, "forward", seen)
    layer, x = wide("bonn")
    layer.norm = _OnCPU(16).double()
    outer = _OnCPU(16).double()
    step(outer, layer, x)
    assert len(calls) == 2


HOOKS = (
    "register_forward_pre_hook", "register_forward_hook", "register_full_backward_hook",
    "register_full_backward_pre_hook",
)  # fmt: skip


@pytest.mark.parametrize("register", HOOKS)
@pytest.mark.parametrize("part", ["", "norm", "outer"])
def test_hooks_see_the_same_calls(register: str, part: str) -> None:
    class Block(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.outer, self.layer = nn.BatchNorm2d(16).double(), layer

        def forward(self, x: Tensor) -> Tensor:
            return step(self.outer, self.layer, x, x)

    layer, x = wide("bonn")
    block, seen = Block(layer), []
    plain = without_engine(block)
    for each in (block, plain):
        module = each.outer if part == "outer" else each.layer.get_submodule(part)
        seen.append(calls := [])
        getattr(module, register)(lambda _, *values, calls=calls: calls.append(flat(values)))
    check_equal(trained(block, x), trained(plain, x), 1e-12)
    (found,), (expected,) = seen
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def flat(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values.detach().clone()]
    return [x for value in values or () for x in flat(value)]


def test_hooks_on_an_identity_and_on_all_modules_are_called() -> None:
    layer, x = wide("bonn")
    layer.norm, names = nn.Identity(), []
    layer.norm.register_forward_hook(lambda module, *_: names.append("own"))
    layer(x)
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: names.append(type(module).__name__))
    try:
        step(nn.BatchNorm2d(16).double(), layer, x)
    finally:
        handle.remove()
    assert names == ["own", "BatchNorm2d", "Identity", "own", "BinaryConv2d"]


def test_a_forward_that_somebody_replaced_is_called_as_always() -> None:
    layer, x = wide("bonn")
    norm, calls = nn.BatchNorm2d(16).double(), []
    for module in (layer, norm):
        module.forward = lambda x, *, own=module.forward: (calls.append(own), own(x))[1]
    step(norm, layer, x)
    assert len(calls) == 2

    class Own(type(layer)):  # type: ignore[misc]
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input)  # type: ignore[no-any-return]

    layer.__class__ = Own
    del layer.forward
    assert step(None, layer, x).shape == x.shape


@BOTH
def test_copies_are_equal(case: str) -> None:
    layer, x = wide(case)
    expected = trained(copy.deepcopy(layer), x)
    check_equal(trained(copy.deepcopy(layer), x), expected, 0)
    check_equal(trained(pickle.loads(pickle.dumps(layer)), x), expected, 0)


@BOTH
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_gradients_are_equal(case: str, reentrant: bool) -> None:
    layer, x = wide(case)
    layer.norm.eval()  # a checkpoint updates the statistics twice
    expected = trained(copy.deepcopy(layer), x)
    found = trained(layer, x, lambda layer, x: checkpoint(layer, x, use_reentrant=reentrant))
    check_equal(found, expected, 0)


@BOTH
def test_a_second_backward_pass_doubles_the_gradients(case: str) -> None:
    layer, x = wide(case)
    x.requires_grad_()
    y = layer(x)
    first = torch.autograd.grad(y.sin().sum(), [x, layer.weight], retain_graph=True)
    second = torch.autograd.grad(y.sin().sum(), [x, layer.weight])
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


@BOTH
def test_a_derivative_of_the_gradient_is_refused(case: str) -> None:
    layer, x = wide(case)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(layer(x).sin().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@BOTH
def test_gradients_go_to_features_in_between(case: str) -> None:
    layer, x = wide(case)

    def call(layer: Any, x: Tensor) -> Tensor:
        feature = layer(x)
        (grad,) = torch.autograd.grad(layer(feature).sin().sum(), feature, retain_graph=True)
        return feature * grad

    check(layer, x, call)


@BOTH
def test_an_output_may_be_changed_in_place(case: str) -> None:
    check(*wide(case), lambda layer, x: layer(x).mul_(2).add_(1).sin_())


@BOTH
def test_an_input_that_changed_is_an_error(case: str) -> None:
    layer, x = wide(case)
    y = layer(x)
    x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@BOTH
def test_parameters_may_change_after_the_forward_pass_where_only_their_values_then_count(case: str) -> None:
    layer, x = wide(case)
    expected = trained(copy.deepcopy(layer), x)

    def call(layer: Any, x: Tensor) -> Tensor:
        y = layer(x)
        with torch.no_grad():
            layer.norm.bias.add_(1)
            layer.bias.add_(1)
        return y  # type: ignore[no-any-return]

    check_equal(trained(layer, x, call), expected, 0)


@BOTH
def test_other_parameters_take_the_place_of_the_layers_own(case: str) -> None:
    layer, x = wide(case)
    other = {name: (p * 1.5).detach().requires_grad_() for name, p in layer.named_parameters()}
    y = torch.func.functional_call(layer, other, x)
    grads = torch.autograd.grad(y.sin().sum(), list(other.values()))
    changed = copy.deepcopy(layer)
    with torch.no_grad():
        for name, parameter in changed.named_parameters():
            parameter.copy_(other[name])
    changed = without_engine(changed)
    expected = torch.autograd.grad(changed(x).sin().sum(), list(changed.parameters()))
    for a, b in zip(grads, expected, strict=True):
        assert (a - b).abs().max() <= 1e-12 * max(1.0, float(b.abs().max()))


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@BOTH
def test_parameters_may_be_parametrized(case: str) -> None:
    layer, x = wide(case)
    parametrize.register_parametrization(layer, "weight", Double())
    parametrize.register_parametrization(layer.norm, "weight", Double())
    for name, _ in list(layer.input_quant.named_parameters(recurse=False)):
        parametrize.register_parametrization(layer.input_quant, name, Double())
    plain = without_engine(layer)
    assert any("parametrizations" in name for name in trained(layer, x))
    check_equal(trained(layer, x), trained(plain, x) and trained(plain, x), 1e-12)


@BOTH
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_inputs_that_are_not_finite_give_what_they_give_on_the_plain_path(case: str, value: float) -> None:
    layer, x = binary(case), maps(3, 16, 6, 6)
    x[1, 3, 2, 2] = value
    norms = layer.norm, copy.deepcopy(layer.norm).eval(), nn.Identity()
    for layer.norm in norms:
        found, expected = trained(copy.deepcopy(layer), x), trained(without_engine(layer), x)
        for key in ("y", "x", "weight"):
            assert torch.equal(found[key].isfinite(), expected[key].isfinite()), key
        torch.testing.assert_close(found["y"], expected["y"], equal_nan=True)


@pytest.mark.parametrize("case", ["bonn", "irnet"])
def test_batches_of_none_and_of_one(case: str) -> None:
    layer, x = binary(case), maps(1, 16, 6, 6)
    check(layer, x, error=1e-5)
    layer.norm.eval()
    assert layer(x[:0]).shape == (0, 24, 6, 6)
    layer.norm.train()
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer(maps(1, 16, 1, 1))
    with pytest.raises(RuntimeError, match="16"):
        layer(maps(2, 8, 6, 6))


@needs_kernels
def test_an_image_smaller_than_the_kernel_is_torchs_error() -> None:
    layer = binary("bonn", lambda: nn.Conv2d(16, 16, 3))
    with pytest.raises(RuntimeError, match="Kernel size can't be greater"):
        layer(maps(2, 16, 2, 2))


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "a part": lambda x: torch.cat([x, x], 1)[:, 8:24],
    "every other pixel": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "transposed": lambda x: x.transpose(2, 3),
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_of_every_layout(layout: str, torch_moments: None) -> None:
    for case in ("bonn", "irnet"):
        layer, x = wide(case)
        check(layer, x, lambda layer, x: layer(LAYOUTS[layout](x)))
        layer, x = binary(case), maps(3, 16, 6, 6)
        layer.norm.eval()
        check(layer, x, lambda layer, x: layer(LAYOUTS[layout](x)), error=3e-6)


@needs_kernels
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", ["bonn", "reactnet"])
def test_an_output_has_the_layout_of_a_float_convolutions(case: str, layout: str) -> None:
    for conv in (nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(16, 1, 1), nn.Conv2d(16, 9, 3, 2)):
        layer, x = binary(case, functools.partial(copy.copy, conv)), LAYOUTS[layout](maps(3, 16, 6, 6))
        expected = [conv(x).is_contiguous(memory_format=of) for of in (torch.contiguous_format, torch.channels_last)]
        for y in (layer(x), step(None, layer, x), layer.eval()(x)):
            assert [
                y.is_contiguous(memory_format=of) for of in (torch.contiguous_format, torch.channels_last)
            ] == expected


@pytest.mark.parametrize("case", ["bonn", "reactnet", "irnet"])
def test_a_step_has_the_flops_of_a_float_convolutions(case: str) -> None:
    for conv in (nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(40, 9, 1), nn.Conv2d(16, 9, (3, 2), 2)):
        layer, x = binary(case, functools.partial(copy.copy, conv)), maps(3, conv.in_channels, 6, 6).requires_grad_()
        counts = []
        for module in (conv, layer, layer.eval()):
            with FlopCounterMode(display=False) as flops:
                module(x).sum().backward()
            counts.append(flops.get_total_flops())
        assert counts[0] > 0
        assert counts == 3 * counts[:1]


@BOTH
def test_an_input_without_a_gradient(case: str) -> None:
    layer, x = wide(case)
    found = trained(layer, x, lambda layer, x: layer(x.detach()))
    expected = trained(without_engine(layer), x, lambda layer, x: layer(x.detach()))
    found.pop("norm.num_batches_tracked"), expected.pop("norm.num_batches_tracked")
    assert "x" not in found
    assert found.keys() == expected.keys()
    check_equal({"weight": found["weight"]}, {"weight": expected["weight"]}, 1e-12)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_without_gradients_outputs_are_equal(case: str, training: bool, torch_moments: None) -> None:
    for make, shape in LAYERS.values():
        layer, x = binary(case, make).train(training), maps(*shape)
        for off in (torch.no_grad, torch.inference_mode):
            found, plain = copy.deepcopy(layer), without_engine(layer)
            with off():
                torch.manual_seed(0)
                y = found(x)
                torch.manual_seed(0)
                assert torch.equal(y, plain(x))
            for name, buffer in plain.named_buffers():
                torch.testing.assert_close(found.get_buffer(name), buffer)


@needs_kernels
@pytest.mark.parametrize("case", BY_BITS)
def test_evaluation_counts_bits(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = binary(case).eval(), maps(3, 16, 6, 6)
    monkeypatch.setattr(functions.Geometry, "convolve_as_written", None)
    with torch.no_grad():
        layer(x)
    layer(x.requires_grad_()).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("case", ["bonn", "reactnet"])
def test_it_compiles_without_a_break(case: str) -> None:
    layer, x = binary(case, lambda: nn.Conv2d(16, 16, 3, padding=1)), maps(3, 16, 6, 6)
    compiled = torch.compile(lambda x: step(None, layer, x, x), fullgraph=True, backend="aot_eager")
    expected = trained(copy.deepcopy(layer), x, lambda layer, x: step(None, layer, x, x))
    check_equal(trained(layer, x, lambda layer, x: compiled(x)), expected, 2e-6)


def operators_and_arguments() -> dict[str, tuple[Any, ...]]:
    """Each operator of a convolution, and arguments that fit, the tensors first."""
    grad, scale, places = maps(2, 9, 3, 4), torch.ones(9), ((2, 1), (1, 0), (1, 1))
    words, weight = torch.zeros(2, 6, 6, 2, dtype=torch.int32), torch.zeros(1, 3, 3, 2, 16, dtype=torch.int32)
    single = torch.float32
    return {
        "convolve": (words, weight, scale, scale, grad, 40, *places, (3, 4), single),
        "input_gradient": (grad, weight, scale, maps(2, 40, 6, 6), torch.ones(5, 40), *places, 1.0, False, True),
        "weight_gradient": (grad, words, 40, (3, 3), *places),
    }


@needs_kernels
@pytest.mark.parametrize("name", ["convolve", "input_gradient", "weight_gradient"])
def test_compilers_know_what_an_operator_returns_and_arguments_that_do_not_fit_are_refused(name: str) -> None:
    if name != "convolve" and not operators.has_tables(torch.float32, (1, 1), (1, 1)):
        pytest.skip("no kernels with tables")
    operator, arguments = getattr(operators, name), operators_and_arguments()[name]
    torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))
    for place, argument in enumerate(arguments):
        if isinstance(argument, Tensor):
            wide = argument.long() if argument.dtype == torch.int32 else argument.double()
            for other in (wide, argument.transpose(0, -1)[:1] if argument.ndim > 1 else argument[1:]):
                with pytest.raises(RuntimeError, match=name):
                    operator(*arguments[:place], other, *arguments[place + 1 :])


# ---------------------------------------------------------------------------------------------------------- PReLU


def plain_prelu(x: Tensor, slope: Tensor, *shifts: Tensor) -> Tensor:
    """RPReLU in torch's operations."""
    before, after = (shift.reshape(-1, 1, 1) for shift in shifts or x.new_zeros(2, 1))
    return torch.prelu(x - before, slope) + after


@given(st.integers(1, 40), *[st.booleans()] * 4, st.integers(0, 2**32))
@settings(quick, max_examples=20)
def test_prelu_is_torchs(channels: int, shifts: bool, shared: bool, last: bool, wide: bool, seed: int) -> None:
    dtype = torch.float64 if wide else torch.float32
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(2, channels, 3, 5, generator=draw).to(dtype)
    x[0, 0, 0, :3] = torch.tensor([0.0, -0.0, 1e-41])
    x = x.contiguous(memory_format=torch.channels_last) if last else x
    vectors = torch.randn(3 if shifts else 1, 1 if shared else channels, generator=draw).to(dtype)
    grad = torch.randn(x.shape, generator=draw).to(dtype)
    results = []
    for function in (prelu, plain_prelu):
        leaves = [leaf.clone().requires_grad_() for leaf in (x, *vectors)]
        y = function(*leaves)
        results.append((y.detach(), *torch.autograd.grad(y, leaves, grad)))
    (y, dx, *sums), (expected, expected_dx, *expected_sums) = results
    assert torch.equal(y, expected)
    torch.testing.assert_close(dx, expected_dx, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sums, expected_sums, rtol=1e-5, atol=1e-5)


def test_the_shifts_of_a_prelu_may_change_after_the_forward_pass() -> None:
    vectors = [torch.full((8,), value).requires_grad_() for value in (0.25, 0.5, 1.0)]
    x = maps(2, 8, 4, 4)
    y = prelu(x, *vectors).sum()
    with torch.no_grad():
        for shift in vectors[1:]:
            shift.zero_()
    (_, before, after) = torch.autograd.grad(y, vectors)
    torch.testing.assert_close(before, -torch.where(x > 0.5, 1.0, 0.25).sum((0, 2, 3)))
    assert torch.equal(after, torch.full((8,), 32.0))


def test_an_output_of_prelu_may_be_changed_in_place() -> None:
    x, act = maps(2, 8, 4, 4).requires_grad_(), PReLU(8)
    (grad,) = torch.autograd.grad(act(x).mul_(3).sum(), x)
    torch.testing.assert_close(grad, torch.where(x > 0, 3.0, 0.75))


# --------------------------------------------------------------------------------------------------- batch norms


@given(st.integers(1, 40), *[st.booleans()] * 4, st.integers(0, 2**32))
@settings(quick, max_examples=20)
def test_a_norm_and_a_sum_are_torchs(
    channels: int, affine: bool, addend: bool, last: bool, half: bool, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    layout, dtype = torch.channels_last if last else torch.contiguous_format, torch.bfloat16 if half else torch.float32
    drawn = torch.randn(3, 4, channels, 3, 5, generator=draw).to(dtype)
    x, other, grad = (one.contiguous(memory_format=layout) for one in drawn)
    norm = nn.BatchNorm2d(channels, affine=affine, momentum=0.3)
    for parameter in norm.parameters():
        nn.init.normal_(parameter, generator=draw)
    reference, bound = copy.deepcopy(norm).double(), 2.0**-7 if half else 2.0**-19
    inputs = [x, other] if addend else [x]
    leaves, exact = [one.clone().requires_grad_() for one in inputs], [one.double().requires_grad_() for one in inputs]
    y = normalized(norm, *leaves)
    expected = functools.reduce(torch.add, (reference(exact[0]), *exact[1:]))
    found = torch.autograd.grad(y, (*leaves, *norm.parameters()), grad)
    wanted = torch.autograd.grad(expected, (*exact, *reference.parameters()), grad.double())
    for one, two in zip((y, *found, *norm.buffers()), (expected, *wanted, *reference.buffers()), strict=True):
        assert one.dtype in (dtype, torch.float32, torch.int64)
        assert (one - two).abs().max() <= bound * (1 + two.abs().max())
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=layout)
    by_engine = operators.AVAILABLE and x.is_contiguous(memory_format=torch.channels_last)
    assert (y.grad_fn.name() == "_NormalizedBackward") == by_engine


@given(st.integers(1, 70), st.booleans(), st.booleans(), st.sampled_from(["bonn", "reactnet"]), st.integers(0, 2**32))
@settings(quick, max_examples=20)
def test_in_evaluation_norms_sums_and_products_are_torchs_bit_for_bit(
    channels: int, affine: bool, trains: bool, case: str, seed: int
) -> None:
    torch.manual_seed(seed)
    x, addend = maps(2, channels, 6, 7), maps(2, channels, 6, 7)
    norm = nn.BatchNorm2d(channels, affine=affine).eval()
    for tensor in (*norm.parameters(), norm.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.01, 2)
    layer = binary(case, lambda: nn.Conv2d(channels, channels, 3, padding=1)).eval()
    with torch.set_grad_enabled(trains):
        assert torch.equal(normalized(norm, x, addend), norm(x) + addend)
        assert torch.equal(step(norm, layer, x, addend), layer(norm(x)) + addend)


def test_the_sum_of_a_norm_and_a_map_broadcasts_and_keeps_its_dtype() -> None:
    x, row = maps(2, 8, 4, 4), torch.randn(8, 1, 1, dtype=torch.float64)
    y, norm = normalized(nn.BatchNorm2d(8), x, row), nn.BatchNorm2d(8)
    torch.testing.assert_close(y, norm(x) + row, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        normalized(norm, x[:1, :, :1, :1].contiguous(memory_format=torch.channels_last))


# --------------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize("scheme", ["bonn", "reactnet", "irnet"])
def test_hooks_on_the_parts_of_a_block_fire_and_change_no_gradient(scheme: str) -> None:
    import timm

    model = bonn_qat.binarize(timm.create_model("wrn10_16", drop_rate=0.1), scheme, input_size=(3, 16, 16)).train()
    x, targets = torch.randn(4, 3, 16, 16), torch.arange(4)

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        torch.manual_seed(0)
        nn.functional.cross_entropy(model(x), targets).backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    names, watched = set(), copy.deepcopy(model)
    for name, module in watched.named_modules():
        module.register_forward_hook(lambda module, inputs, y, name=name: names.add(name))
    found, expected = gradients(watched), gradients(model)
    for key, value in expected.items():
        # The gradient of a shift before a norm is 0 but for rounding.
        assert (found[key] - value).abs().max() <= 2e-2 * value.abs().max() + 1e-7, key
    blocks = ("bn1", "bn2", "bn1_after", "bn2_after", "act1", "act2", "dropout", "conv1", "conv2")
    assert {f"layer1.0.{name}" for name in blocks if hasattr(watched.layer1[0], name)} <= names
