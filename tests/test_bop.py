"""Bop against its rule in plain Python, and what a training loop asks of an optimizer."""

import copy
import itertools
import math
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn

import bonn_qat
from bonn_qat import functional
from bonn_qat.bop import Bop, binary_parameters
from bonn_qat.errors import BonnQatError
from bonn_qat.quantizers import SteSign, WeightQuantizer


class PlainSign(WeightQuantizer):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return functional.ste_sign(x), x.new_ones(())


SCHEME = bonn_qat.Scheme(name="signs", title="Signs", reference="ours", weight=PlainSign, activation=SteSign)


def parameter(values: object, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(torch.tensor(values, dtype=dtype))


def gradients(steps: int, size: int, seed: int = 0) -> Tensor:
    """(steps, size) in float64, with a drift for each weight, so that averages cross a threshold and come back."""
    generator = torch.Generator().manual_seed(seed)
    drift = torch.sin(torch.arange(steps, dtype=torch.float64)[:, None] / 15 + torch.arange(size))
    return drift + torch.randn(steps, size, generator=generator, dtype=torch.float64)


def play(optimizer: Bop, weight: nn.Parameter, steps: Tensor) -> list[list[float]]:
    """The weights after each step."""
    seen = []
    for gradient in steps:
        weight.grad = gradient.clone()
        optimizer.step()
        seen.append(weight.tolist())
    return seen


def by_the_rule(weights: list[float], steps: Tensor, threshold: float, gamma: float) -> tuple[list[list[float]], list]:
    """The weights after each step, and the averages at the end."""
    weights, averages, seen = list(weights), [0.0] * len(weights), []
    for gradient in steps.tolist():
        for i, g in enumerate(gradient):
            averages[i] = (1 - gamma) * averages[i] + gamma * g
            if abs(averages[i]) > threshold and math.copysign(1, averages[i]) == weights[i]:
                weights[i] = -weights[i]
        seen.append(list(weights))
    return seen, averages


@pytest.mark.parametrize(("threshold", "gamma"), [(0.05, 0.1), (0.0, 0.02), (0.6, 1.0)])
def test_many_steps_are_the_rule_exactly(threshold, gamma):
    steps = gradients(400, 37)
    start = functional.sign(gradients(1, 37, seed=1)[0])
    weight = nn.Parameter(start.clone())
    optimizer = Bop([weight], threshold=threshold, gamma=gamma)
    expected, averages = by_the_rule(start.tolist(), steps, threshold, gamma)
    seen = play(optimizer, weight, steps)
    assert seen == expected
    assert optimizer.state[weight]["momentum"].tolist() == averages
    flips = sum(a != b for before, after in itertools.pairwise(seen) for a, b in zip(before, after, strict=True))
    assert 100 < flips < len(steps) * 37 / 2  # the rule both flips and holds in this test
    assert {value for row in seen for value in row} == {-1.0, 1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threshold", [0.0, 0.25, 1e-8])
def test_a_weight_flips_above_the_threshold_and_not_at_it(threshold, dtype):
    at = torch.tensor(threshold, dtype=dtype)
    above = torch.nextafter(at, torch.tensor(torch.inf, dtype=dtype))
    averages = torch.stack([at, above, -at, -above, torch.zeros_like(at), -torch.zeros_like(at)])
    for start in (1.0, -1.0):
        weight = parameter([start] * len(averages), dtype)
        weight.grad = averages.clone()
        Bop([weight], threshold=threshold, gamma=1.0).step()  # with gamma 1 the average is the gradient
        flipped = [value == -start for value in weight.tolist()]
        assert flipped == [False, start == 1, False, start == -1, False, False]


def test_a_weight_against_its_average_stays_however_large_that_is():
    weight = parameter([1.0, -1.0])
    weight.grad = torch.tensor([-1e6, 1e6], dtype=torch.float64)
    Bop([weight], gamma=1.0).step()
    assert weight.tolist() == [1, -1]


def test_the_average_outlives_a_flip():
    weight = parameter([1.0])
    optimizer = Bop([weight], threshold=0.1, gamma=0.5)
    # 0.5 flips +1; 0.25 leaves -1; -0.375 flips it back.
    assert play(optimizer, weight, torch.tensor([[1.0], [0.0], [-1.0]], dtype=torch.float64)) == [[-1], [-1], [1]]
    assert optimizer.state[weight]["momentum"].item() == -0.375


def test_making_it_makes_signs_in_place_also_of_a_later_group():
    first, later = parameter([[0.3, -0.2], [0.0, -0.0]], torch.float32), parameter([-7.0, 1e-30], torch.float32)
    address = first.data_ptr()
    optimizer = Bop([first])
    assert first.tolist() == [[1, -1], [1, 1]]
    assert later[0] == -7
    optimizer.add_param_group({"params": [later], "gamma": 0.5})
    assert later.tolist() == [-1, 1]
    assert first.data_ptr() == address
    assert optimizer.param_groups[0]["params"][0] is first
    assert [group["gamma"] for group in optimizer.param_groups] == [1e-4, 0.5]
    assert [group["threshold"] for group in optimizer.param_groups] == [1e-8, 1e-8]


def test_each_group_has_its_own_threshold_and_gamma():
    steps = gradients(60, 20)
    settings = [{"threshold": 0.3, "gamma": 0.4}, {"threshold": 0.0, "gamma": 0.05}, {}]
    weights = [parameter([1.0] * 20) for _ in settings]
    optimizer = Bop(
        [{"params": [w], **own} for w, own in zip(weights, settings, strict=True)], threshold=0.1, gamma=0.2
    )
    for gradient in steps:
        for weight in weights:
            weight.grad = gradient.clone()
        optimizer.step()
    ends = []
    for weight, own in zip(weights, settings, strict=True):
        expected, averages = by_the_rule([1.0] * 20, steps, **{"threshold": 0.1, "gamma": 0.2, **own})
        assert weight.tolist() == expected[-1]
        assert optimizer.state[weight]["momentum"].tolist() == averages
        ends.append(weight.tolist())
    assert ends[0] != ends[1] != ends[2] != ends[0]


def test_a_schedule_sets_gamma_in_the_group():
    steps = gradients(50, 11)
    weight = parameter([1.0] * 11)
    optimizer = Bop([weight], threshold=0.0, gamma=0.5)
    averages = [0.0] * 11
    for index, gradient in enumerate(steps):
        gamma = 0.5 / (1 + index)
        optimizer.param_groups[0]["gamma"] = gamma
        play(optimizer, weight, gradient[None])
        averages = [(1 - gamma) * m + gamma * g for m, g in zip(averages, gradient.tolist(), strict=True)]
        assert optimizer.state[weight]["momentum"].tolist() == averages


def test_a_saved_state_goes_on_along_the_same_trajectory(tmp_path: Path):
    steps = gradients(200, 23)
    whole = parameter([1.0] * 23)
    expected = play(Bop([whole], threshold=0.02, gamma=0.05), whole, steps)

    first = parameter([1.0] * 23)
    optimizer = Bop([first], threshold=0.02, gamma=0.05)
    begun = play(optimizer, first, steps[:90])
    torch.save({"weight": first.data, "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint.pt")

    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    second = nn.Parameter(saved["weight"])
    resumed = Bop([second])  # the group's threshold and gamma come with the state
    resumed.load_state_dict(saved["optimizer"])
    assert begun + play(resumed, second, steps[90:]) == expected
    forgetful = nn.Parameter(first.data.clone())
    assert begun + play(Bop([forgetful], threshold=0.02, gamma=0.05), forgetful, steps[90:]) != expected


def test_a_parameter_without_gradient_rests_and_has_no_state():
    moved, resting = parameter([1.0]), parameter([1.0])
    optimizer = Bop([moved, resting], gamma=1.0)
    moved.grad = torch.ones_like(moved)
    optimizer.step()
    assert (moved.item(), resting.item()) == (-1, 1)
    assert moved in optimizer.state
    assert resting not in optimizer.state


def test_a_closure_gives_the_gradients_and_its_loss_comes_back():
    weight = parameter([1.0, -1.0])

    def closure() -> float:
        loss = (weight * torch.tensor([2.0, 3.0], dtype=torch.float64)).sum()
        loss.backward()
        return loss.item()

    assert Bop([weight], gamma=1.0).step(closure) == -1.0
    assert weight.tolist() == [-1, -1]
    assert weight.grad_fn is None


def test_a_step_never_waits_for_a_value():
    # A meta tensor has no values: any look at one, which on a GPU would be a synchronization, is an error.
    weight = nn.Parameter(torch.empty(3, 2, 3, 3, device="meta"))
    with pytest.raises(RuntimeError, match="meta"):
        bool(weight.sum() > 0)
    optimizer = Bop([weight])
    for _ in range(2):
        weight.grad = torch.empty_like(weight)
        optimizer.step()
    assert optimizer.state[weight]["momentum"].device.type == "meta"


@pytest.mark.parametrize("threshold", [-1e-9, math.inf, math.nan])
def test_an_impossible_threshold_is_told(threshold):
    with pytest.raises(ValueError, match=rf"threshold of Bop is {threshold}; allowed: a number, at least 0"):
        Bop([parameter([1.0])], threshold=threshold)


@pytest.mark.parametrize("gamma", [0.0, -0.1, 1.0001, math.nan])
def test_an_impossible_gamma_is_told(gamma):
    with pytest.raises(ValueError, match=rf"gamma of Bop is {gamma}; allowed: above 0 and at most 1"):
        Bop([parameter([1.0])], gamma=gamma)


def test_a_refused_group_changes_nothing():
    optimizer = Bop([parameter([1.0])])
    other, narrow = parameter([0.3]), parameter([0.3], torch.bfloat16)
    refused = [
        ({"params": [other], "gamma": 2.0}, "gamma of Bop is 2.0"),
        ({"params": [other], "threshold": -1.0}, "threshold of Bop is -1.0"),
        ({"params": [other, narrow]}, r"is torch.bfloat16; allowed: torch.float32 and torch.float64"),
    ]
    for group, words in refused:
        with pytest.raises(ValueError, match=words):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    assert other.item() == 0.3
    optimizer.add_param_group({"params": [other]})
    assert other.item() == 1


# ------------------------------------------------------------------------------------------- with a binarized model


def network() -> nn.Module:
    return bonn_qat.binarize(timm.create_model("wrn10_16", num_classes=10, in_chans=1), SCHEME)


def test_binary_parameters_are_the_weights_of_the_binary_layers_and_the_others_all_the_rest():
    model = network()
    binary, others = binary_parameters(model)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(p)] for p in binary} == {f"{name}.weight" for name in model.binarization.binary}
    assert [id(p) for p in model.parameters() if p.ndim == 4 and p.shape[-1] == 3][1:] == [id(p) for p in binary]
    assert len(binary) + len(others) == len(names) == len({id(p) for p in (*binary, *others)})


def test_a_shared_layer_counts_once():
    conv = nn.Conv2d(4, 4, 3, padding=1)
    model = bonn_qat.binarize(
        nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), conv, nn.ReLU(), conv), SCHEME, include=["2"]
    )
    binary, others = binary_parameters(model)
    assert len(binary) == 1
    assert len(others) == len(list(model.parameters())) - 1


@pytest.mark.parametrize("model", [nn.Linear(2, 2), nn.Conv2d(1, 1, 1)])
def test_a_float_model_has_no_binary_parameters(model):
    with pytest.raises(BonnQatError, match=f"no binary weights in {type(model).__name__}; binarize it"):
        binary_parameters(model)


@pytest.mark.slow
def test_training_keeps_signs_and_lowers_the_loss_and_leaves_the_others_to_another():
    model = network()
    binary, others = binary_parameters(model)
    bop = Bop(binary, threshold=1e-6, gamma=1e-3)
    images, targets = torch.randn(32, 1, 8, 8), torch.arange(32) % 10
    start, kept = [p.detach().clone() for p in binary], copy.deepcopy(others)
    losses = []
    for _ in range(40):
        loss = nn.functional.cross_entropy(model(images), targets)
        model.zero_grad()
        loss.backward()
        bop.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    assert all(set(p.unique().tolist()) == {-1.0, 1.0} for p in binary)
    assert all(not torch.equal(p, before) for p, before in zip(binary, start, strict=True))
    assert all(torch.equal(p, before) for p, before in zip(others, kept, strict=True))


def test_what_bop_keeps_is_what_the_layer_computes_with():
    model = network()
    Bop(binary_parameters(model)[0])
    layer = model.get_submodule(model.binarization.binary[0])
    x = torch.randn(2, layer.in_channels, 6, 6)
    expected = torch.conv2d(functional.sign(layer.norm(x)), layer.weight, None, layer.stride, layer.padding)
    assert torch.equal(layer(x), expected)
