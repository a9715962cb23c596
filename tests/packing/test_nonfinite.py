"""NaN, infinities, denormals and the largest numbers: every backend gives what the model gives."""

import math

import pytest
import torch
from generated import SCHEMES, network, odd_images, same
from torch import Tensor

from bonn_qat import PackedModel, Scheme, pack
from bonn_qat.engine import operators as engine
from bonn_qat.functional import sign, ste_sign
from bonn_qat.quantizers import ActivationQuantizer, BonnWeight

ROUNDING = 1e-5  # of float layers, which torch adds up in an order of its own


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_sign_of_every_number(dtype):
    x = torch.tensor([math.nan, -math.nan, -math.inf, -1e-7, -0.0, 0.0, 1e-7, math.inf] * 9, dtype=dtype)
    expected = torch.tensor([-1.0, -1, -1, -1, 1, 1, 1, 1] * 9, dtype=dtype)
    assert torch.equal(sign(x), expected)
    assert torch.equal(sign(x[::3]), expected[::3])
    assert torch.equal(torch.compile(sign, backend="aot_eager")(x), expected)


@pytest.mark.parametrize("index", range(len(SCHEMES)), ids=SCHEMES)
def test_generated_networks_take_odd_numbers_as_the_model_does(index, monkeypatch):
    model, _ = network(index, SCHEMES[index])
    x = odd_images(6, index)
    expected, made = model(x), pack(model)
    ours = made(x)
    assert same(ours, expected, ROUNDING)
    assert same(PackedModel._from_file(*made._as_data())(x), expected, ROUNDING)
    # Node by node, also those that run in C.
    assert same(made.network(x), expected, ROUNDING)
    monkeypatch.setattr(engine, "AVAILABLE", False)
    assert same(made.network(x), expected, ROUNDING)


class Low(ActivationQuantizer):
    """A plugin's sign that takes NaN for +1."""

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(x < 0, -1.0, 1.0) + 0 * ste_sign(x.nan_to_num()), x.new_ones(())


class Nowhere(ActivationQuantizer):
    """A plugin's sign whose value for NaN is NaN."""

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return sign(x) + 0 * x.clamp(-1, 1), x.new_ones(())


@pytest.mark.parametrize(("quantizer", "kind"), [(Low, "bits"), (Nowhere, "weights")])
def test_a_quantizer_with_another_rule_for_nan_keeps_it(quantizer, kind):
    scheme = Scheme(name="odd", title="Odd", reference="ours", weight=BonnWeight, activation=quantizer)
    model, _ = network(3, scheme)
    made, x = pack(model), odd_images(6, 3)
    assert {layer.kind for layer in made.layers} == {kind}
    assert same(made(x), model(x), ROUNDING)
