"""Do the signs carry information? A naive replacement's do not, the default's do."""

import copy
import dataclasses
import warnings

import pytest
import timm
import torch
from torch import nn

from bonn_qat import FeatureLoss, binarize
from bonn_qat.bonn import BONN
from bonn_qat.errors import InvalidData, InvalidModel
from bonn_qat.inspection.diagnose import DeadLayers, Diagnosis, diagnose

NAIVE = dataclasses.replace(BONN, norm=None, nonlinearity=None)


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet18", num_classes=10, drop_rate=0.5)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def test_the_default_scheme_has_no_dead_layer(resnet18, images):
    model = binarize(resnet18)
    diagnosis = diagnose(model, images)  # a warning would be an error
    assert diagnosis.dead == ()
    assert tuple(diagnosis.shares) == model.binarization.binary
    assert all(0.05 <= share <= 0.95 for share in diagnosis.shares.values())


def test_a_naive_replacement_is_dead_behind_its_relus(resnet18, images):
    model = binarize(resnet18, NAIVE)
    with pytest.warns(DeadLayers, match=r"cannot learn.*layer1\.0\.conv1 \(100\.0%\)") as caught:
        diagnosis = diagnose(model, images)
    assert len(caught) == 1
    assert diagnosis.dead == model.binarization.binary
    assert all(name in str(caught[0].message) for name in diagnosis.dead)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("kind", "axes"),
    [(nn.Conv1d, 1), (nn.Conv3d, 3), (nn.ConvTranspose1d, 1), (nn.ConvTranspose2d, 2), (nn.ConvTranspose3d, 3)],
)
def test_layers_of_every_kind_are_measured(kind, axes):
    model = binarize(
        nn.Sequential(kind(3, 4, 1), kind(4, 6, 3, groups=2), kind(6, 2, 1)), NAIVE, input_size=(3, *[5] * axes)
    )
    x = torch.randn(2, 3, *[5] * axes)
    assert diagnose(model, x).shares == {"1": pytest.approx((model[0](x) >= 0).float().mean().item())}


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_it_was(resnet18, images, training):
    model = binarize(resnet18).train(training)
    model.bn1.train(not training)
    before = copy.deepcopy(model.state_dict())
    buffers = {name: id(buffer) for name, buffer in model.named_buffers()}
    flags = [module.training for module in model.modules()]
    hooks = [len(module._forward_hooks) for module in model.modules()]
    diagnose(model, images)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert {name: id(buffer) for name, buffer in model.named_buffers()} == buffers
    assert [module.training for module in model.modules()] == flags
    assert [len(module._forward_hooks) for module in model.modules()] == hooks
    assert all(p.grad is None for p in model.parameters())


def test_the_measure_does_not_depend_on_mode_or_chance(resnet18, images):
    model = binarize(resnet18)
    assert diagnose(model.train(), images) == diagnose(model.eval(), images)


def test_shares_are_those_of_a_norm_with_the_statistics_of_the_batch():
    model = binarize(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3)), include=["1"])
    images = torch.randn(3, 3, 6, 6) + 5
    features = model[0](images)
    normed = features - features.mean((0, 2, 3), keepdim=True)
    share = (normed >= 0).float().mean().item()
    assert diagnose(model, images).shares == {"1": pytest.approx(share, abs=0.01)}


def test_dropout_is_off():
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout(0.9), nn.Conv2d(3, 3, 3))
    model = binarize(net, NAIVE, include=["2"])
    images = torch.randn(4, 3, 9, 9)
    share = (model[0](images) >= 0).float().mean().item()
    assert diagnose(model, images).shares == {"2": pytest.approx(share)}


def test_a_norm_outside_the_binary_layer_counts():
    class Block(nn.Module):
        normalizes_input = True

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(self.norm(x))

    model = binarize(nn.Sequential(nn.Conv2d(3, 3, 1), Block()), include=["1"])
    diagnosis = diagnose(model, torch.rand(4, 3, 6, 6))
    assert 0.3 < diagnosis.shares["1.conv"] < 0.7


def test_a_layer_at_two_places_counts_both():
    conv = nn.Conv2d(3, 3, 3)
    model = binarize(nn.Sequential(nn.Conv2d(3, 3, 1), conv, nn.ReLU(), conv), NAIVE, include=["1"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeadLayers)
        diagnosis = diagnose(model, torch.randn(4, 3, 6, 6))
    assert tuple(diagnosis.shares) == ("1",)
    assert diagnosis.shares["1"] > 0.5  # behind the ReLU all are +1


def test_float_inputs_have_no_sign_to_look_at(resnet18, images):
    with pytest.raises(InvalidModel, match="ResNet has no binary activations"):
        diagnose(resnet18, images)
    with pytest.raises(InvalidModel, match="no binary activations"):
        diagnose(binarize(resnet18, dataclasses.replace(BONN, activation=None)), images)


def test_a_failing_forward_leaves_no_trace(resnet18):
    model = binarize(resnet18)
    hooks = [len(module._forward_hooks) for module in model.modules()]
    with pytest.raises(
        InvalidModel, match=r"ResNet does not take images of \(2, 5, 64, 64\): Given groups=1.*3 channels"
    ):
        diagnose(model, torch.randn(2, 5, 64, 64))
    assert model.training
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


def test_a_tap_of_the_feature_loss_does_not_disturb(resnet18, images):
    model = binarize(resnet18)
    FeatureLoss(model)
    assert diagnose(model, images).dead == ()


@pytest.mark.parametrize("size", [(12,), (5, 12), (2, 3, 12), (3, 9, 9)])
def test_inputs_may_have_any_number_of_axes(size):
    layers = [nn.Conv2d(3, 12, 9), nn.Flatten()] if size == (3, 9, 9) else [nn.Linear(12, 12)]
    model = binarize(nn.Sequential(*layers, nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 3)), input_size=size)
    names = tuple(str(len(layers) + i) for i in range(2))
    assert tuple(diagnose(model, torch.randn(8, *size)).shares) == names == model.binarization.binary


@pytest.mark.parametrize("images", [torch.randn(1, 3, 8, 8), torch.randn(0, 3, 8, 8), torch.randn(3), [1.0], None])
def test_less_than_two_images_are_told(resnet18, images):
    with pytest.raises(InvalidData, match="diagnose takes a batch of at least 2 images"):
        diagnose(binarize(resnet18), images)


@pytest.mark.parametrize(("share", "dead"), [(0.04, True), (0.05, False), (0.5, False), (0.95, False), (0.96, True)])
def test_dead_is_beyond_five_percent_at_either_end(share, dead):
    diagnosis = Diagnosis(shares={"layer1.conv": share, "a": 0.5})
    assert diagnosis.dead == (("layer1.conv",) if dead else ())
    text = str(diagnosis)
    assert f"{share:.1%}" in text
    assert ("dead\n" in text) == dead
    assert f"{int(dead)} of 2 binary layers are dead" in text
