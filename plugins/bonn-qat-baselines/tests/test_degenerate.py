"""Weights and inputs whose statistics are 0, missing or at the ends of the number range: everything stays finite.

For every scheme, with its options: value, scale and gradients of both quantizers, a float layer's adoption with each
start of the latents, and the loss of the kernels.
"""

import itertools
import warnings
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import bonn_qat
from bonn_qat import KernelLoss, Recipe, Scheme, plugins
from bonn_qat.layers import binary_form

VARIANTS = [
    *("bonn", "bonn:reading=inverse", "bonn:granularity=filter", "bonn:gradient=derivative+start=msra"),
    *("bnn", "bnn:gradient=clipped", "bwn", "xnor", "xnor:gradient=printed+centre=true+input_scale=true", "dorefa"),
    *("dorefa:weight_bits=2+activation_bits=2+gradient_bits=6", "dorefa:weight_bits=32", "tbn", "tbn:variant=tbnv2"),
    *("abcnet", "abcnet-5-5", "abcnet:centre=false+weight_bases=3", "bireal", "bireal:gradient=clipped", "pcnn"),
    *("pcnn:projections=3+magnitude=norm", "mcn", "mcn:centres=sign+modulation=mean", "reactnet", "irnet", "recu"),
    *("adabin", "adabin:centre=code"),
]


@pytest.fixture(scope="module")
def pm():
    return plugins.create_manager()


def scheme_of(variant: str, pm) -> Scheme:
    recipe = Recipe().with_scheme(variant)
    return plugins.find_scheme(recipe.scheme, pm).configure(recipe.scheme_options)


def weights(seed: int) -> dict[str, Tensor]:
    """Kernels ``(O, I, kh, kw)`` of random shapes without a spread, with hardly any, or with extreme magnitudes."""
    generator = torch.Generator().manual_seed(seed)

    def size(most: int) -> int:
        return int(torch.randint(1, most + 1, (), generator=generator))

    shape = (size(6), size(5), size(3), size(3))
    normal = torch.randn(shape, generator=generator)
    constant = float(torch.randn((), generator=generator))
    lonely = torch.zeros(shape)
    lonely.view(-1)[size(lonely.numel()) - 1] = constant
    mixed = normal.clone()
    mixed[: (shape[0] + 1) // 2] = 0
    steps = torch.full(shape, constant).nextafter(normal * 9)  # one rounding step apart
    return {
        "zero": torch.zeros(shape),
        "minus zero": -torch.zeros(shape),
        "constant": torch.full(shape, constant),
        "nearly constant": steps,
        "constant filters": normal.mean((1, 2, 3), keepdim=True).expand(shape).clone(),
        "one element": torch.full((1, 1, 1, 1), constant),
        "filters of one element": normal[:, :1, :1, :1].clone(),
        "one nonzero": lonely,
        "zero filters": mixed,
        "subnormal": normal * 1e-40,
        "tiny": normal * 1e-25,
        "huge": normal * 1e30,
        "huge and zero": mixed * 1e30,
        "huge constant": torch.full(shape, 1e30),
    }


WEIGHTS = [(seed, kind) for seed in range(3) for kind in weights(0)]
INPUTS = {
    "zero": torch.zeros(2, 3, 4, 4),
    "constant": torch.full((2, 3, 4, 4), -0.3),
    "ones": torch.ones(2, 3, 4, 4),
    "one pixel": torch.full((1, 3, 1, 1), 0.1),
    "subnormal": torch.full((2, 3, 4, 4), 1e-40),
    "huge": torch.linspace(-1e30, 1e30, 96).reshape(2, 3, 4, 4),
    "a zero sample": torch.cat([torch.zeros(1, 3, 4, 4), torch.ones(1, 3, 4, 4)]),
}


def check_finite(quantizer: nn.Module, x: Tensor, what: str) -> None:
    """Value, scale, and the gradients of a random function of the value, for ``x`` and every parameter."""
    x = x.clone().requires_grad_()
    quantizer.zero_grad()
    value, scale = quantizer.quantize(x)
    assert value.isfinite().all(), f"{what}: value"
    assert scale.isfinite().all(), f"{what}: scale"
    (value * torch.linspace(-1, 1, value.numel()).reshape(value.shape)).sum().backward()
    for name, tensor in [("x", x), *quantizer.named_parameters()]:
        assert tensor.grad is None or tensor.grad.isfinite().all(), f"{what}: gradient of {name}"


@pytest.mark.parametrize("variant", VARIANTS)
def test_values_scales_and_gradients_of_degenerate_weights_are_finite(pm, variant):
    scheme = scheme_of(variant, pm)
    for (seed, kind), progress in itertools.product(WEIGHTS, (0.0, 0.99)):
        weight = weights(seed)[kind]
        quantizer = scheme.weight(weight)
        quantizer.advance(progress)
        check_finite(quantizer, weight, f"{kind} {tuple(weight.shape)}")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("training", [True, False])
def test_values_scales_and_gradients_of_degenerate_inputs_are_finite(pm, variant, training):
    scheme = scheme_of(variant, pm)
    if scheme.activation is None:
        return
    for kind, x in INPUTS.items():
        check_finite(scheme.activation(x.shape[1]).train(training), x, kind)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("start", [None, 0.01, "equal-output"])
def test_a_degenerate_float_layer_is_adopted_with_finite_latents_and_keeps_its_signs(pm, variant, start):
    scheme = replace(scheme_of(variant, pm), latent_std=start)
    for seed, kind in WEIGHTS:
        weight, what = weights(seed)[kind], f"{kind}, seed {seed}"
        conv = nn.Conv2d(*weight.shape[1::-1], weight.shape[2:], bias=False)
        conv.weight.data.copy_(weight)
        layer = binary_form(conv, scheme, normalize=False)
        layer.adopt()
        assert layer.weight.isfinite().all(), what
        assert all(tensor.isfinite().all() for tensor in layer.state_dict().values()), what
        if kind != "subnormal":
            assert torch.equal(layer.weight >= 0, weight >= 0), what
        if start == 0.01 and kind in ("constant", "one element", "huge constant"):
            torch.testing.assert_close(layer.weight.abs(), torch.full_like(weight, 0.01))


@pytest.mark.parametrize("variant", [name for name in VARIANTS if not name.startswith("dorefa:")])
def test_the_kernel_loss_of_degenerate_weights_is_finite(pm, variant):
    scheme = scheme_of(variant, pm)
    for seed, kind in WEIGHTS:
        weight = weights(seed)[kind]
        if kind.startswith("huge") or scheme.weight(weight).bits != 1:
            continue  # the square of 1e30 is no float32
        conv = nn.Conv2d(*weight.shape[1::-1], weight.shape[2:], bias=False)
        conv.weight.data.copy_(weight)
        layer = binary_form(conv, scheme, normalize=False)
        layer.adopt()
        loss = KernelLoss(layer, weight=1.0)
        value = loss()
        value.backward()
        assert value.isfinite(), f"{kind}, seed {seed}"
        for name, parameter in [*layer.named_parameters(), *loss.named_parameters()]:
            assert parameter.isfinite().all(), f"{kind}: {name}"
            assert parameter.grad is None or parameter.grad.isfinite().all(), f"{kind}: gradient of {name}"


@pytest.mark.parametrize("variant", ["irnet", "recu", "adabin", "abcnet-5-5"])
def test_weights_of_any_magnitude_are_quantized_as_those_of_magnitude_one(pm, variant):
    scheme, normal = scheme_of(variant, pm), torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    expected = scheme.weight(normal).quantize(normal)[0]
    for exponent in (-80, -40, 60, 100):
        scaled = torch.ldexp(normal, torch.tensor(exponent))
        value = scheme.weight(scaled).quantize(scaled)[0]
        if variant != "irnet":
            value = torch.ldexp(value, torch.tensor(-exponent))
        torch.testing.assert_close(value, expected, msg=f"2^{exponent}")


@pytest.mark.parametrize("variant", ["bonn", "irnet", "recu", "adabin", "xnor", "mcn"])
def test_a_network_with_constant_layers_trains_on_black_images_without_nan(pm, variant):
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 1)),
        *(nn.Flatten(), nn.Linear(96, 2)),
    )
    nn.init.constant_(net[2].weight, 0.1)
    nn.init.zeros_(net[4].weight)
    with warnings.catch_warnings(action="ignore", category=UserWarning):
        model = bonn_qat.binarize(net, scheme_of(variant, pm), input_size=(3, 6, 6), pm=pm)
    objective = bonn_qat.Objective(model, pm=pm)
    optimizer = torch.optim.SGD(bonn_qat.parameter_groups(objective, lr=0.1, weight_decay=1e-4), momentum=0.9)
    for _ in range(3):
        optimizer.zero_grad()
        total = objective(torch.zeros(4, 3, 6, 6), torch.tensor([0, 1, 0, 1])).total
        assert total.isfinite()
        total.backward()
        optimizer.step()
    assert all(parameter.isfinite().all() for parameter in objective.parameters())
