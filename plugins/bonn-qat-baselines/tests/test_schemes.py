"""Each baseline as a user meets it: found by its entry point, named in ``binarize``, trained for two steps."""

import importlib.metadata

import pytest
import timm
import torch
from torch import nn

import bonn_qat
from bonn_qat import plugins

SCHEMES = {"float": "full_precision", "xnor": "xnor", "bireal": "bireal", "pcnn": "pcnn"}


@pytest.fixture
def pm(monkeypatch):
    monkeypatch.setenv("BONN_QAT_PLUGINS", ",".join(f"baselines.{name}" for name in SCHEMES))
    return plugins.create_manager()


@pytest.mark.parametrize("name", SCHEMES)
def test_the_scheme_is_found_by_its_entry_point(pm, name):
    scheme = plugins.schemes(pm)[name]
    (entry,) = importlib.metadata.entry_points(group="bonn_qat", name=f"baselines.{name}")
    assert entry.value == f"bonn_qat_baselines.{SCHEMES[name]}"
    assert scheme in vars(entry.load()).values()
    assert scheme.title
    assert scheme.reference


def test_one_baseline_can_be_chosen_alone(monkeypatch):
    monkeypatch.setenv("BONN_QAT_PLUGINS", "baselines.xnor")
    assert set(plugins.schemes(plugins.create_manager())) == {"bonn", "xnor"}


@pytest.mark.parametrize("name", SCHEMES)
def test_two_steps_of_training_are_finite_and_move_every_kernel(pm, name):
    torch.manual_seed(0)
    net = timm.create_model("resnet18", num_classes=10, channels=(8, 8, 16, 16), stem_width=8)
    model = bonn_qat.binarize(net, name, pm=pm).train()
    assert bool(model.binarization.binary) == (name != "float")
    images, targets = torch.randn(4, 3, 64, 64), torch.randint(10, (4,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    before = {key: value.detach().clone() for key, value in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), targets)
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
    for key, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), key
        assert parameter.isfinite().all(), key
        if "conv" in key:  # a BatchNorm's weight before another BatchNorm and a sign has no say, hence no gradient
            assert not torch.equal(parameter, before[key]), key


@pytest.mark.parametrize("name", ["xnor", "bireal", "pcnn"])
def test_the_layer_has_the_gradients_of_a_convolution_with_the_binary_kernels(pm, name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3, padding=1), nn.Flatten(), nn.Linear(96, 2)).double()
    layer = bonn_qat.binarize(net, name, pm=pm)[1]
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    value, _ = layer.weight_quant.quantize(layer.weight)
    signs = torch.where(layer.norm(x) >= 0, 1.0, -1.0).double()
    expected = torch.conv2d(signs, value, layer.bias, padding=1)
    weights = torch.randn_like(expected)
    (dweight,) = torch.autograd.grad((expected * weights).sum(), layer.weight)
    y = layer(x)
    (y * weights).sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(layer.weight.grad, dweight, rtol=1e-9, atol=1e-12)


def test_a_float_checkpoint_loads_into_every_binary_network(pm):
    net = timm.create_model("resnet10t", num_classes=3)
    other = timm.create_model("resnet10t", num_classes=3)
    for name in ("xnor", "bireal", "pcnn"):
        model = bonn_qat.binarize(net, name, pm=pm)
        model.load_state_dict(other.state_dict())
        expected = bonn_qat.binarize(other, name, pm=pm).state_dict()
        for key, value in model.state_dict().items():
            assert torch.equal(value, expected[key]), (name, key)
