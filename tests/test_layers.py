"""Binary layers: each computes what its formula says, whatever float layer it was made of."""

import copy
import math
from dataclasses import replace
from functools import partial

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bonn_qat
from bonn_qat.bonn import BONN
from bonn_qat.errors import InvalidModel, InvalidRecipe, PluginError
from bonn_qat.functional import binary_linear
from bonn_qat.layers import BinaryConv2d, BinaryLinear, binary_form
from bonn_qat.plugins import find_scheme, schemes
from bonn_qat.quantizers import WeightQuantizer

BARE = replace(BONN, norm=None, latent_std=None)
STANDARDIZING = {
    "StdConv2d": lambda **kw: timm.layers.StdConv2d(6, 8, 3, bias=True, **kw),
    "StdConv2dSame": lambda **kw: timm.layers.StdConv2dSame(6, 8, 3, bias=True, **kw),
    "ScaledStdConv2d": lambda **kw: timm.layers.ScaledStdConv2d(6, 8, 3, gamma=1.7, **kw),
    "ScaledStdConv2dSame": lambda **kw: timm.layers.ScaledStdConv2dSame(6, 8, 3, gamma=1.7, **kw),
}


def sign(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x >= 0, 1.0, -1.0)


def test_binary_linear_has_the_values_and_gradients_of_linear():
    torch.manual_seed(0)
    x = sign(torch.randn(7, 12)).double().requires_grad_()
    for scale in (torch.tensor(-0.3).double(), torch.rand(5).double() + 0.1):
        value = (sign(torch.randn(5, 12)).double() * scale.abs().reshape(-1, 1)).requires_grad_()
        out, grad = binary_linear(x, value, scale), torch.randn(7, 5).double()
        found = torch.autograd.grad(out, (x, value), grad)
        expected = torch.autograd.grad(F.linear(x, value), (x, value), grad)
        torch.testing.assert_close(out, F.linear(x, value))
        torch.testing.assert_close(found, expected)
        exact = out / scale.abs()
        torch.testing.assert_close(exact, exact.round())


@pytest.mark.parametrize("shape", [(12,), (3, 12), (2, 5, 12), (2, 3, 4, 12)])
def test_a_binary_linear_layer_takes_any_leading_shape(shape):
    torch.manual_seed(0)
    linear = nn.Linear(12, 5)
    layer = binary_form(linear, BARE)
    x = torch.randn(shape)
    expected = F.linear(sign(x), sign(linear.weight) * linear.weight.abs().mean(), linear.bias)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("name", sorted(schemes()))
def test_a_linear_layer_is_a_1x1_convolution_to_every_scheme(name):
    scheme = find_scheme(name)
    if scheme.weight is None:
        pytest.skip("float weights")
    torch.manual_seed(0)
    linear = nn.Linear(12, 6)
    conv = nn.Conv2d(12, 6, 1)
    with torch.no_grad():
        conv.weight.copy_(linear.weight[:, :, None, None])
        conv.bias.copy_(linear.bias)
    dense, convolution = binary_form(linear, scheme), binary_form(conv, scheme)
    tokens = torch.randn(20, 12, requires_grad=True)
    images = tokens.detach()[:, :, None, None].requires_grad_()
    for layer in (dense, convolution):
        layer.adopt()
    out, expected = dense(tokens), convolution(images)
    torch.testing.assert_close(out[:, :, None, None], expected)
    grad = torch.randn_like(out)
    out.backward(grad)
    expected.backward(grad[:, :, None, None])
    torch.testing.assert_close(tokens.grad[:, :, None, None], images.grad)
    torch.testing.assert_close(dense.weight.grad[:, :, None, None], convolution.weight.grad)


# What is a Conv2d over two axes, and how inputs, outputs and weights of that become those of the other layer.
ALIKE = {
    "1d": (lambda: nn.Conv1d(6, 8, 3, 2, 2, 2, 2), {"kernel": (1, 3), "stride": (1, 2), "padding": (0, 2),
           "dilation": (1, 2), "groups": 2}, (1, 9), lambda x: x.squeeze(2), lambda w: w.squeeze(2)),
    "1d, circular": (lambda: nn.Conv1d(6, 8, 3, padding=2, padding_mode="circular"), {"kernel": (1, 3),
           "padding": (0, 2), "padding_mode": "circular"}, (1, 9), lambda x: x.squeeze(2), lambda w: w.squeeze(2)),
    "3d": (lambda: nn.Conv3d(6, 8, (3, 2, 1), (2, 1, 1), (1, 0, 0), groups=2), {"kernel": (3, 2), "stride": (2, 1),
           "padding": (1, 0), "groups": 2}, (6, 5), lambda x: x[..., None], lambda w: w[..., None]),
    "transposed": (lambda: nn.ConvTranspose2d(6, 8, 3, padding=2, dilation=2, groups=2), {"kernel": (3, 3),
           "padding": 2, "dilation": 2, "groups": 2}, (6, 5), lambda x: x,
           lambda w: w.flip(2, 3).reshape(2, 4, 3, 3, 3).transpose(1, 2).reshape(6, 4, 3, 3)),
}  # fmt: skip


@pytest.mark.parametrize("kind", ALIKE)
@pytest.mark.parametrize("name", sorted(schemes()))
def test_every_convolution_is_one_of_images_to_every_scheme(name, kind):
    make, options, size, place, layout = ALIKE[kind]
    scheme = find_scheme(name)
    if scheme.weight is None:
        pytest.skip("float weights")
    float_layer, alike = (
        make(),
        nn.Conv2d(6, 8, options["kernel"], **{k: v for k, v in options.items() if k != "kernel"}),
    )
    with torch.no_grad():
        float_layer.weight.copy_(layout(alike.weight))
        float_layer.bias.copy_(alike.bias)
    layer, convolution = binary_form(float_layer, scheme), binary_form(alike, scheme)
    for one in (layer, convolution):
        one.adopt()
    torch.testing.assert_close(layer.weight, layout(convolution.weight))
    images = torch.randn(4, 6, *size, requires_grad=True)
    inputs = place(images.detach()).requires_grad_()
    for training in (True, False):
        out, expected = layer.train(training)(inputs), convolution.train(training)(images)
        torch.testing.assert_close(out, place(expected))
        grad = torch.randn_like(expected)
        expected.backward(grad)
        out.backward(place(grad))
        torch.testing.assert_close(inputs.grad, place(images.grad), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(layer.weight.grad, layout(convolution.weight.grad), atol=1e-4, rtol=1e-4)
    quantizers = (dict(one.weight_quant.named_parameters()) for one in (layer, convolution))
    assert [p.numel() for p in next(quantizers).values()] == [p.numel() for p in next(quantizers).values()]
    with torch.no_grad():
        for one in (layer, convolution):
            one.weight.mul_(30)
            one.constrain()
    torch.testing.assert_close(layer.weight, layout(convolution.weight))
    layer.freeze()
    torch.testing.assert_close(layer(inputs), place(convolution(images)), atol=1e-4, rtol=1e-4)


OTHERS = {
    "1d": (nn.Conv1d, {"stride": 2, "padding": 1, "groups": 2}, (9,)),
    "3d": (nn.Conv3d, {"stride": (1, 2, 1), "padding": (1, 0, 2), "groups": 2}, (5, 6, 7)),
    "3d, reflect": (nn.Conv3d, {"padding": 1, "padding_mode": "reflect"}, (5, 6, 7)),
    "3d, same": (nn.Conv3d, {"padding": "same"}, (5, 6, 7)),
    "transposed 1d": (nn.ConvTranspose1d, {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2}, (5,)),
    "transposed 2d": (nn.ConvTranspose2d, {"stride": (3, 2), "padding": 1, "output_padding": (2, 1)}, (5, 4)),
    "transposed 3d": (nn.ConvTranspose3d, {"stride": 2, "dilation": 2, "groups": 2}, (3, 4, 5)),
}


def filters(layer: nn.Module, weight: Tensor) -> Tensor:
    """The weights that each output channel is a sum with, ``(O, n)``, found from torch's own layer."""
    probe = copy.deepcopy(layer).double()
    nn.init.zeros_(probe.bias)
    own = []
    for output in range(layer.out_channels):
        sums = probe(torch.rand(1, layer.in_channels, *[9] * (weight.ndim - 2)).double())[0, output].sum()
        (grad,) = torch.autograd.grad(sums, probe.weight)
        own.append(weight[grad != 0])
    return torch.stack(own)


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("training", [True, False])
def test_values_and_gradients_are_those_of_the_formula(kind, training):
    make, options, size = OTHERS[kind]
    float_layer = make(6, 8, 3, **options).double()
    scheme = BARE.configure({"gradient": "derivative", "granularity": "filter"})
    layer = binary_form(float_layer, scheme).train(training)
    plain = copy.deepcopy(float_layer)
    x = torch.randn(3, 6, *size).double()
    inputs = [x.clone().requires_grad_() for _ in range(2)]

    def ste(x: Tensor) -> Tensor:
        return x.clamp(-1, 1) + (sign(x) - x.clamp(-1, 1)).detach()

    # A scale for each output channel, whichever axis of the weight that is; the mean of its filter's magnitudes.
    scale = filters(float_layer, float_layer.weight.detach()).abs().mean(1)
    torch.testing.assert_close(layer.weight_quant.modulation.detach().flatten(), scale)
    latent = float_layer.weight.detach().clone().requires_grad_()
    bias = layer.bias.detach().reshape(-1, *[1] * len(size))
    nn.init.zeros_(plain.bias)
    sums = torch.func.functional_call(plain, {"weight": ste(latent)}, (ste(inputs[0]),))
    expected, found = sums * scale.reshape(bias.shape) + bias, layer(inputs[1])
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close((found - bias) / scale.reshape(bias.shape), sums.round())
    grad = torch.randn_like(expected)
    expected.backward(grad)
    found.backward(grad)
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
    torch.testing.assert_close(layer.weight.grad, latent.grad)


def test_a_transposed_layer_makes_the_size_that_it_is_asked_for():
    for make, size in ((nn.ConvTranspose1d, (5,)), (nn.ConvTranspose2d, (5, 4)), (nn.ConvTranspose3d, (3, 2, 4))):
        float_layer = make(6, 4, 3, 2, 1)
        layer, x = binary_form(float_layer, BARE), torch.randn(2, 6, *size)
        for asked in (None, [2 * n for n in size], torch.Size([2, 4, *[2 * n - 1 for n in size]])):
            assert layer(x, output_size=asked).shape == layer(x, asked).shape == float_layer(x, asked).shape
        with pytest.raises(ValueError, match="requested an output size"):
            layer(x, output_size=[9 * n for n in size])


@pytest.mark.parametrize("kind", OTHERS)
def test_a_scale_map_is_averaged_over_the_inputs_of_each_output(kind):
    make, options, size = OTHERS[kind]
    layer = binary_form(
        make(6, 8, 3, bias=False, **options), replace(find_scheme("xnor").configure({"input_scale": True}), norm=None)
    ).eval()
    x = torch.randn(2, 6, *size)
    magnitudes = x.abs().mean(1, keepdim=True)
    once = make(1, 1, 3, bias=False, **{k: v for k, v in options.items() if k != "groups"})
    nn.init.ones_(once.weight)
    counts = once(torch.ones_like(magnitudes)).clamp(min=1) if layer.transposed else 3 ** len(size)
    without = copy.deepcopy(layer)
    without.input_quant = bonn_qat.quantizers.SteSign()
    torch.testing.assert_close(layer(x), without(x) * once(magnitudes) / counts)


@pytest.mark.parametrize("kind", ["1d", "3d"])
def test_an_input_without_a_batch_is_refused(kind):
    make, _, size = OTHERS[kind]
    with pytest.raises(ValueError, match=f"expected {len(size) + 2}D input"):
        binary_form(make(6, 8, 3), BARE)(torch.randn(6, *size))


@pytest.mark.parametrize("kind", STANDARDIZING)
@pytest.mark.parametrize("stride", [1, 2])
def test_kernels_are_standardized_before_the_sign_and_the_gain_comes_after(kind, stride):
    torch.manual_seed(0)
    conv = STANDARDIZING[kind](stride=stride)
    if hasattr(conv, "gain"):
        nn.init.uniform_(conv.gain, -2, 2)
    with torch.no_grad():
        conv.weight.add_(torch.rand(8, 1, 1, 1) - 0.5)  # without standardizing most signs were one
    layer = binary_form(conv, BARE)
    kernels = conv.weight.detach()
    mean, var = kernels.mean((1, 2, 3), keepdim=True), kernels.var((1, 2, 3), keepdim=True, unbiased=False)
    latent = (kernels - mean) / (var + conv.eps).sqrt() * getattr(conv, "scale", 1.0)
    torch.testing.assert_close(layer.latent(), latent)
    x = torch.randn(2, 6, 8, 8)
    plain = nn.Conv2d(6, 8, 3, stride, 0 if getattr(conv, "same_pad", False) else conv.padding)
    with torch.no_grad():
        plain.weight.copy_(sign(latent) * latent.abs().mean() * getattr(conv, "gain", torch.ones(())))
        plain.bias.copy_(conv.bias)
    signs = sign(x)
    if getattr(conv, "same_pad", False):
        signs = timm.layers.pad_same(signs, (3, 3), (stride, stride))
    torch.testing.assert_close(layer(x), plain(signs))
    layer(x).square().sum().backward()
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("kind", STANDARDIZING)
def test_a_standardized_layers_latents_get_their_scale_and_keep_their_signs(kind):
    torch.manual_seed(0)
    conv = STANDARDIZING[kind]()
    before = conv.weight.clone()
    layer = binary_form(conv, replace(BARE, latent_std=0.01))
    signs, modulation = sign(layer.latent()), layer.weight_quant.modulation.clone()
    layer.adopt()
    assert layer.latent().std(unbiased=False).item() == pytest.approx(0.01, rel=1e-3)
    assert torch.equal(sign(layer.latent()), signs)
    assert torch.equal(layer.weight_quant.modulation, modulation)
    assert torch.equal(layer.weight, before)
    again = copy.deepcopy(layer)
    again.adopt()
    assert torch.equal(again.weight_quant.modulation, modulation)


SCALED = ["bonn", "xnor", "bwn", "bireal", "pcnn", "recu", "adabin", "tbn", "dorefa", "abcnet-5-5", "mcn", "reactnet"]


@pytest.mark.parametrize("name", SCALED)
@pytest.mark.parametrize("make", [*STANDARDIZING.values(), lambda: nn.Conv2d(6, 8, 3), lambda: nn.Linear(6, 8)])
def test_every_scheme_can_start_with_the_output_of_hes_initialization(name, make):
    torch.manual_seed(0)
    module = make()
    with torch.no_grad():
        module.weight.mul_(10 ** torch.randn(()))
    layer = binary_form(module, replace(find_scheme(name), latent_std="equal-output"), normalize=False)
    signs = sign(layer.latent())
    layer.adopt()
    values, _ = layer.weight_quant.quantize(layer.latent())
    assert values.square().mean().sqrt().item() == pytest.approx((2 / values[0].numel()) ** 0.5, rel=1e-4)
    assert torch.equal(sign(layer.latent()), signs)


@pytest.mark.parametrize("name", ["bnn", "irnet", "dorefa:weight_bits=2"])
def test_a_start_with_equal_output_is_refused_where_values_do_not_follow_the_latents(name):
    name, _, option = name.partition(":")
    scheme = find_scheme(name).configure({"latent_std": "equal-output", **({"weight_bits": 2} if option else {})})
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 2, 1))
    before = [parameter.clone() for parameter in net.parameters()]
    with pytest.raises(InvalidRecipe, match=f"'{name}' cannot start with the latents 'equal-output'"):
        bonn_qat.binarize(net, scheme, input_size=(3, 4, 4), inplace=True)
    assert type(net[1]) is nn.Conv2d
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


@pytest.mark.parametrize("size", [(7, 7), (8, 8), (9, 12)])
@pytest.mark.parametrize(
    ("kernel", "stride", "dilation"), [(3, 2, 1), (5, 2, 1), (3, 1, 2), (2, 3, 1), ((3, 5), (2, 1), 1)]
)
def test_same_padding_is_that_of_timm(size, kernel, stride, dilation):
    conv = timm.layers.Conv2dSame(4, 6, kernel, stride, dilation=dilation)
    layer = binary_form(conv, BARE)
    with torch.no_grad():
        conv.weight.copy_(sign(conv.weight) * conv.weight.abs().mean())
    x = torch.randn(2, 4, *size)
    torch.testing.assert_close(layer(x), conv(sign(x)))


def test_a_layer_keeps_what_others_ask_it_and_hang_on_it():
    conv = timm.layers.StdConv2dSame(3, 4, 3, stride=2)
    conv.note = "asked by others"
    seen = []
    conv.register_forward_hook(lambda *_: seen.append("after"))
    conv.register_forward_pre_hook(lambda *_, **__: seen.append("before"), with_kwargs=True)
    layer = binary_form(conv, BONN)
    assert isinstance(layer, nn.Conv2d)
    assert (layer.note, layer.same_pad, layer.eps) == ("asked by others", conv.same_pad, conv.eps)
    assert (layer.in_channels, layer.out_channels, layer.stride) == (3, 4, (2, 2))
    layer(torch.randn(2, 3, 8, 8))
    assert seen == ["before", "after"]


@pytest.mark.parametrize("name", sorted(schemes()))
@pytest.mark.parametrize(
    "make", [lambda: nn.Conv2d(6, 8, 3, padding=1), lambda: nn.Linear(6, 8)], ids=["conv", "linear"]
)
def test_freezing_changes_no_output_and_leaves_no_latents(name, make):
    scheme = find_scheme(name)
    if scheme.weight is None:
        pytest.skip("float weights")
    torch.manual_seed(0)
    layer = binary_form(make(), scheme).eval()
    layer.adopt()
    x = torch.randn(3, 6, 6, 6)
    expected, bits = layer(x), layer.weight_quant.bits
    layer.freeze()
    torch.testing.assert_close(layer(x), expected)
    assert not layer.weight.requires_grad
    assert layer.weight_quant.bits == bits
    assert not list(layer.weight_quant.parameters())
    if layer.weight_quant.scaled_sign:
        assert layer.weight.dtype == torch.int8
        assert set(layer.weight.unique().tolist()) <= {-1, 1}
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


def test_a_frozen_layer_of_standardized_kernels_is_the_same():
    torch.manual_seed(0)
    layer = binary_form(timm.layers.ScaledStdConv2d(6, 8, 3), BONN).eval()
    layer.adopt()
    x = torch.randn(2, 6, 5, 5)
    expected = layer(x)
    layer.freeze()
    torch.testing.assert_close(layer(x), expected)


class Fussy(WeightQuantizer):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        if weight.shape[2:] == (1, 1):
            raise ValueError("a kernel of one pixel has nothing to project")

    def quantize(self, x):
        return bonn_qat.functional.ste_sign(x), x.new_ones(())


def test_a_scheme_that_does_not_fit_a_layer_names_both_and_changes_nothing():
    fussy = replace(BONN, name="fussy", weight=Fussy)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3)
    )
    kinds = [type(module) for module in model.modules()]
    with pytest.raises(
        InvalidModel, match=r"4: the scheme 'fussy' does not fit Conv2d\(8, 8.*one pixel.*skip='4' leaves"
    ):
        bonn_qat.binarize(model, fussy, include=["5"], inplace=True)
    assert [type(module) for module in model.modules()] == kinds
    assert not hasattr(model, "binarization")
    assert bonn_qat.binarize(model, fussy, skip="4", include=["5"]).binarization.binary == ("2", "5")


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        (nn.Bilinear(3, 4, 2), "is neither a convolution nor a Linear"),
        (nn.Embedding(3, 4), "looks up rows of its weight and multiplies nothing"),
        (nn.MultiheadAttention(4, 2), "multiplies by its weights inside one function of torch"),
        (nn.LSTM(3, 4), "multiplies by its weights inside one function of torch"),
    ],
)
def test_other_layers_have_no_binary_form(layer, words):
    with pytest.raises(InvalidModel, match=f"{type(layer).__name__} {words}"):
        binary_form(layer, BONN)


def test_layers_with_a_forward_or_a_weight_of_their_own_have_no_binary_form():
    class Doubled(nn.Conv2d):
        def forward(self, input):
            return 2 * super().forward(input)

    with pytest.raises(InvalidModel, match="Doubled has a forward of its own"):
        binary_form(Doubled(3, 4, 3), BONN)
    for normed in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm):
        with pytest.raises(InvalidModel, match="computes its weight"):
            binary_form(normed(nn.Linear(3, 4)), BONN)
    with pytest.raises(InvalidModel, match="leaves weights float"):
        binary_form(nn.Linear(3, 4), replace(BONN, name="float", weight=None))


def test_the_kernel_loss_sees_standardized_latents():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), timm.layers.StdConv2d(6, 8, 3), nn.Linear(8, 6), nn.Flatten(), nn.LazyLinear(2)
    )
    model(torch.randn(2, 3, 10, 10))
    binary = bonn_qat.binarize(model, input_size=(3, 10, 10))
    assert binary.binarization.binary == ("1", "2")
    loss = bonn_qat.KernelLoss(binary)
    latents = [layer.latent().detach().flatten(1) for layer in (binary[1], binary[2])]
    torch.testing.assert_close(loss.mu.detach(), torch.cat([x.abs().mean(1) for x in latents]))
    loss().backward()
    assert all(binary[i].weight.grad.any() for i in (1, 2))


def test_a_scale_map_multiplies_each_token():
    xnor = find_scheme("xnor").configure({"input_scale": True})
    torch.manual_seed(0)
    layer = binary_form(nn.Linear(8, 3), replace(xnor, norm=None))
    x = torch.randn(2, 5, 8)
    alpha = layer.weight.detach().abs().mean(1)
    expected = F.linear(sign(x), sign(layer.weight) * alpha[:, None]) * x.abs().mean(-1, keepdim=True) + layer.bias
    torch.testing.assert_close(layer(x), expected)


def test_the_layers_say_what_they_are():
    assert isinstance(binary_form(nn.Conv2d(3, 4, 3), BONN), BinaryConv2d)
    assert isinstance(binary_form(timm.layers.Linear(3, 4), BONN), BinaryLinear)
    assert math.prod(binary_form(nn.Linear(3, 4), BONN).weight_quant.modulation.shape) == 3


class Breach(WeightQuantizer):
    """Returns what the option says, for kernels ``(O, I, kh, kw)``."""

    def __init__(self, weight: Tensor, *, returns: str) -> None:
        super().__init__()
        self.returns = returns

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        scale = x.detach().abs().mean((1, 2, 3), keepdim=True)
        value = scale * bonn_qat.functional.ste_sign(x)
        return {
            "no pair": value,
            "flat scale": (value, scale.flatten()),
            "flat value": (value.flatten(), scale),
            "other values": (value + 1, scale),
        }[self.returns]


@pytest.mark.parametrize(
    ("returns", "words"),
    [
        ("no pair", "does not return a pair of tensors"),
        ("flat scale", r"returns a scale of shape \(4,\) for x of shape \(O, I, kh, kw\); give \(\) or \(O, 1, 1, 1\)"),
        ("flat value", r"returns a value of shape \(108,\) for x of shape \(4, 3, 3, 3\)"),
        ("other values", "returns values other than scale .*; set scaled_sign = False"),
    ],
)
def test_a_quantizer_that_breaks_the_contract_is_told(returns: str, words: str) -> None:
    scheme = replace(BONN, name="mine", weight=partial(Breach, returns=returns))
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 10))
    with pytest.raises(PluginError, match=f"the weight of the scheme 'mine' {words}.*docs/plugins.md"):
        bonn_qat.binarize(net, scheme, input_size=(3, 8, 8))
    with pytest.raises(PluginError, match="the activation of the scheme 'bonn' makes a Identity, which is not a "):
        bonn_qat.binarize(net, replace(BONN, activation=lambda channels: nn.Identity()), input_size=(3, 8, 8))
