"""FlipRatio against flips that are counted by hand."""

import math

import pytest
import torch
from torch import Tensor, nn

import bonn_qat
from bonn_qat import functional
from bonn_qat.errors import BonnQatError
from bonn_qat.inspection.flips import FlipRatio
from bonn_qat.quantizers import BonnWeight, SteSign, WeightQuantizer


class Plain(WeightQuantizer):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return functional.ste_sign(x), x.new_ones(())


class Centred(Plain):
    """The sign of what is left when the layer's mean is taken away."""

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return super().quantize(x - x.mean())


SIZES = {"2": 72, "4": 54}


def network(weight: type[WeightQuantizer] = Plain) -> nn.Module:
    """Two binary layers, of 72 and 54 weights; every latent is +0.5."""
    scheme = bonn_qat.Scheme(name="s", title="s", reference="ours", weight=weight, activation=SteSign)
    convs = [nn.Conv2d(1, 4, 3), nn.Conv2d(4, 2, 3), nn.Conv2d(2, 3, 3)]
    model = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])
    for conv in convs:
        nn.init.constant_(conv.weight, 0.5)
    return bonn_qat.binarize(model, scheme, include=["4"])


def flat(model: nn.Module, layer: str) -> Tensor:
    """A layer's latent weights as a vector that writes through."""
    return model.get_submodule(layer).weight.detach().view(-1)


def test_the_binary_layers_are_those_of_the_hand_computation():
    model = network()
    assert {name: flat(model, name).numel() for name in model.binarization.binary} == SIZES


@pytest.mark.parametrize(
    ("kind", "axes"),
    [(nn.Conv1d, 1), (nn.Conv3d, 3), (nn.ConvTranspose1d, 1), (nn.ConvTranspose2d, 2), (nn.ConvTranspose3d, 3)],
)
def test_layers_of_every_kind_flip(kind, axes):
    model = nn.Sequential(kind(3, 4, 1), kind(4, 6, 3, groups=2), kind(6, 2, 1))
    model = bonn_qat.binarize(model, input_size=(3, *[5] * axes))
    ratio = FlipRatio(model)
    flat(model, "1")[:7] *= -1
    ratio.update()
    assert ratio.compute()["1"] == 7 / (4 * 3 * 3**axes)


def test_a_ratio_is_the_flips_over_the_weights_and_layers_count_by_their_size():
    model = network()
    ratio = FlipRatio(model)
    flat(model, "2")[:9] *= -1
    ratio.update()
    assert ratio.compute() == {"": 9 / 126, "2": 9 / 72, "4": 0.0}


def test_intervals_are_averaged():
    model = network()
    ratio = FlipRatio(model)
    for flips_of_2, flips_of_4 in ((9, 0), (18, 27), (0, 0), (72, 54)):
        flat(model, "2")[:flips_of_2] *= -1
        flat(model, "4")[:flips_of_4] *= -1
        ratio.update()
    expected = {"": (9 + 45 + 0 + 126) / (4 * 126), "2": (9 + 18 + 72) / (4 * 72), "4": (27 + 54) / (4 * 54)}
    assert ratio.compute() == expected
    assert ratio.compute() == expected  # asking changes nothing


def test_only_the_signs_at_the_updates_count():
    model = network()
    ratio = FlipRatio(model)
    flat(model, "2").mul_(-1).mul_(-3)  # there and back, and a magnitude
    ratio.update()
    assert ratio.compute() == {"": 0.0, "2": 0.0, "4": 0.0}


def test_zero_counts_as_plus():
    model = network()
    ratio = FlipRatio(model)
    weights = flat(model, "4")
    for value, flips in ((0.0, 0), (-0.0, 0), (-1e-30, 54), (0.0, 54), (1e-30, 0)):
        ratio.reset()
        weights.fill_(value)
        ratio.update()
        assert ratio.compute()["4"] == flips / 54, value


def test_reset_forgets_the_intervals_and_keeps_the_signs_seen_last():
    model = network()
    ratio = FlipRatio(model)
    flat(model, "2").neg_()
    ratio.update()
    ratio.reset()
    with pytest.raises(ValueError, match=r"FlipRatio.compute\(\) comes after at least one update\(\)"):
        ratio.compute()
    ratio.update()
    assert ratio.compute() == {"": 0.0, "2": 0.0, "4": 0.0}  # not the flips from before
    flat(model, "2")[:36].neg_()
    ratio.update()
    assert ratio.compute() == {"": 36 / (2 * 126), "2": 36 / (2 * 72), "4": 0.0}


def test_there_is_no_ratio_before_the_first_update():
    ratio = FlipRatio(network())
    with pytest.raises(ValueError, match=r"FlipRatio.compute\(\) comes after at least one update\(\)"):
        ratio.compute()


@pytest.mark.parametrize("model", [nn.Conv2d(1, 1, 3), nn.Sequential(nn.Linear(2, 2))])
def test_a_model_without_binary_weights_is_told(model):
    with pytest.raises(BonnQatError, match=f"no binary weights in {type(model).__name__}; binarize it before"):
        FlipRatio(model)


def test_the_float_scheme_has_no_binary_weights():
    scheme = bonn_qat.Scheme(name="float", title="Float", reference="", weight=None, activation=None)
    with pytest.raises(BonnQatError, match="no binary weights in Conv2d"):
        FlipRatio(bonn_qat.binarize(nn.Conv2d(1, 1, 3), scheme))


def test_a_sign_is_that_of_the_quantized_weight_and_not_of_the_latent():
    model = network(BonnWeight)
    ratio = FlipRatio(model)
    with torch.no_grad():  # X^ = mean(w) sign(X): a negative mean turns every weight, no latent has moved
        model.get_submodule("2").weight_quant.modulation.neg_()
    ratio.update()
    assert ratio.compute() == {"": 72 / 126, "2": 1.0, "4": 0.0}
    flat(model, "2").neg_()
    with torch.no_grad():
        model.get_submodule("2").weight_quant.modulation.neg_()
    ratio.update()  # both turned: the product is as before
    assert ratio.compute()["2"] == 0.5


def test_a_centred_weight_flips_when_the_mean_passes_it():
    model = network(Centred)
    weights = flat(model, "4")
    weights.copy_(torch.tensor([1.0, 2.0]).repeat(27))  # mean 1.5: -1, +1
    ratio = FlipRatio(model)
    weights[0] = 100.0  # itself, and by the mean, which is now above 3, the 27 that were +1
    ratio.update()
    assert ratio.compute()["4"] == 28 / 54


def test_a_layer_at_two_places_counts_once():
    scheme = network().binarization.scheme
    conv = nn.Conv2d(2, 2, 3)
    model = bonn_qat.binarize(
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), conv, nn.ReLU(), conv), scheme, include=["2"]
    )
    ratio = FlipRatio(model)
    flat(model, "2").copy_(-functional.sign(flat(model, "2")))
    ratio.update()
    assert ratio.compute() == {"": 1.0, "2": 1.0}


def test_measuring_leaves_the_model_and_its_gradients_alone():
    model = network(BonnWeight)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ratio = FlipRatio(model)
    ratio.update()
    ratio.compute()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_a_step_of_training_is_one_interval():
    torch.manual_seed(3)
    model = network()
    with torch.no_grad():
        for name in SIZES:
            nn.init.uniform_(model.get_submodule(name).weight, -0.02, 0.02)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ratio, expected = FlipRatio(model), dict.fromkeys(SIZES, 0)
    for _ in range(5):
        signs = {name: [math.copysign(1, x) for x in flat(model, name).tolist()] for name in SIZES}
        optimizer.zero_grad()
        model(torch.randn(8, 1, 9, 9)).square().mean().backward()
        optimizer.step()
        ratio.update()
        for name, before in signs.items():
            after = [math.copysign(1, x) for x in flat(model, name).tolist()]
            expected[name] += sum(a != b for a, b in zip(before, after, strict=True))
    assert min(expected.values()) > 0
    computed = ratio.compute()
    assert {name: computed[name] for name in SIZES} == {name: n / (5 * SIZES[name]) for name, n in expected.items()}
    assert computed[""] == sum(expected.values()) / (5 * sum(SIZES.values()))


class Offset(Plain):
    """Two values of one sign, as AdaBin's can be."""

    scaled_sign = False

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return 3 + torch.where(x >= 0, 1.0, -1.0), x.new_ones(())


def test_two_values_of_one_sign_flip_where_one_becomes_the_other():
    model = network(Offset)
    with torch.no_grad():
        flat(model, "2")[::2] *= -1
    ratio = FlipRatio(model)
    with torch.no_grad():
        flat(model, "2")[:2] *= -1
    ratio.update()
    assert ratio.compute() == {"": 2 / 126, "2": 2 / 72, "4": 0}


def test_a_quantized_weight_of_zero_counts_as_plus():
    model = network(BonnWeight)
    modulation = model.get_submodule("4").weight_quant.modulation
    flat(model, "4")[:20] *= -1
    ratio = FlipRatio(model)
    with torch.no_grad():
        modulation.zero_()  # the 20 that were -mean(w) are 0 now, as the others are
    ratio.update()
    assert ratio.compute()["4"] == 20 / 54
