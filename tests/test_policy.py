"""Which layers stay float, and why."""

import pytest
import timm
import torch
from torch import nn

from bonn_qat.errors import InvalidModel, UnknownName
from bonn_qat.policy import classifier, float_layers, named


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return timm.create_model("resnet18", num_classes=10)


def plain() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 1), nn.Flatten(), nn.Linear(8, 2)
    )


def test_a_timm_resnet_keeps_its_ends_and_its_projections(resnet):
    assert float_layers(resnet) == {
        "conv1": "first layer",
        "fc": "classifier",
        "layer2.0.downsample.0": "shortcut projection",
        "layer3.0.downsample.0": "shortcut projection",
        "layer4.0.downsample.0": "shortcut projection",
    }


def test_without_metadata_the_first_convolution_and_the_last_linear_layer_are_kept():
    model = plain()
    model.insert(4, nn.Linear(8, 8))
    assert float_layers(model) == {
        "0": "first layer",
        "6": "classifier",
        "2": "depthwise",
    }


def test_grouped_convolutions_are_not_depthwise():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 16, 3, groups=8))
    assert float_layers(model) == {"0": "first layer", "2": "depthwise"}


@pytest.mark.parametrize("name", ["downsample", "shortcut", "skip_proj", "conv_skip", "residual_conv", "projection"])
def test_shortcut_projections_are_known_by_name_and_kernel(name):
    block = nn.Module()
    block.conv = nn.Conv2d(8, 8, 1)
    block.add_module(name, nn.Conv2d(8, 8, 1))
    block.add_module(name + "3x3", nn.Conv2d(8, 8, 3))
    kept = float_layers(nn.Sequential(nn.Conv2d(3, 8, 3), block))
    assert kept == {"0": "first layer", f"1.{name}": "shortcut projection"}


def test_a_stage_that_is_only_called_downsample_is_no_shortcut():
    model = nn.Module()
    model.stem = nn.Conv2d(3, 8, 3)
    model.downsample = nn.Sequential(*(nn.Conv2d(8, 8, 1) for _ in range(3)))
    assert float_layers(model) == {"stem": "first layer"}


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("layer1.0.conv1", {"layer1.0.conv1"}),
        ("layer1.*.conv2", {"layer1.0.conv2", "layer1.1.conv2"}),
        ("layer1.0", {"layer1.0.conv1", "layer1.0.conv2"}),
        ("layer?", {f"layer{i}.{j}.conv{k}" for i in range(1, 5) for j in range(2) for k in (1, 2)}),
    ],
)
def test_skip_names_layers_parents_and_globs(resnet, pattern, names):
    without = float_layers(resnet)
    kept = float_layers(resnet, [pattern])
    assert {name for name, why in kept.items() if why == f"skip {pattern!r}"} >= names
    assert set(kept) == names | set(without)
    assert float_layers(resnet, pattern) == kept  # one pattern need not stand in a list


def test_a_name_is_no_prefix_of_another():
    model = nn.ModuleDict({"a": nn.Conv2d(3, 8, 3), "b": nn.Conv2d(8, 8, 3), "bc": nn.Conv2d(8, 8, 3)})
    assert set(float_layers(model, ["b"])) == {"a", "b"}


def test_the_first_pattern_gives_the_reason(resnet):
    kept = float_layers(resnet, ["layer1.0", "layer1", "conv1"])
    assert kept["layer1.0.conv1"] == "skip 'layer1.0'"
    assert kept["layer1.1.conv1"] == "skip 'layer1'"
    assert kept["conv1"] == "skip 'conv1'"


def test_skipped_names_every_module_below():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()))
    assert named(model, ["1"], "skip") == {"1": "skip '1'", "1.0": "skip '1'", "1.1": "skip '1'"}


def test_a_shared_layer_can_be_skipped_by_each_of_its_names():
    conv = nn.Conv2d(8, 8, 3)
    model = nn.ModuleDict({"stem": nn.Conv2d(3, 8, 3), "a": conv, "b": conv, "c": nn.Conv2d(8, 8, 3)})
    assert float_layers(model, ["b"]) == float_layers(model, ["a"]) | {"a": "skip 'b'"}


def test_a_skip_pattern_that_matches_nothing_is_an_error_that_names_near_ones(resnet):
    with pytest.raises(UnknownName, match=r"ResNet in skip 'layer1\.0\.conv_1'; did you mean 'layer1\.0\.conv1'"):
        float_layers(resnet, ["conv1", "layer1.0.conv_1"])


def test_classifier_by_metadata_and_by_order(resnet):
    name, layer = classifier(resnet)
    assert (name, layer) == ("fc", resnet.fc)
    assert classifier(plain())[0] == "5"
    metadata = timm.create_model("test_vit", num_classes=4)
    assert classifier(metadata) == ("head", metadata.head)


def test_a_convolution_can_be_the_classifier():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1))
    model.pretrained_cfg = {"first_conv": "0", "classifier": "1"}
    assert classifier(model) == ("1", model[1])
    assert float_layers(model) == {"0": "first layer", "1": "classifier"}


def test_a_model_without_a_classifier_or_with_two_needs_help():
    with pytest.raises(InvalidModel, match=r"Sequential needs one classifier layer, has none"):
        classifier(nn.Sequential(nn.Conv2d(3, 8, 3)))
    model = nn.ModuleDict({"head": nn.Linear(8, 2), "head_dist": nn.Linear(8, 2)})
    model.pretrained_cfg = {"classifier": ("head", "head_dist")}
    with pytest.raises(InvalidModel, match=r"has 2 \(head, head_dist\)"):
        classifier(model)


def test_looking_changes_nothing(resnet):
    before = {name: tensor.clone() for name, tensor in resnet.state_dict().items()}
    kinds = [type(module) for module in resnet.modules()]
    float_layers(resnet, ["layer1"])
    assert [type(module) for module in resnet.modules()] == kinds
    assert all(torch.equal(tensor, before[name]) for name, tensor in resnet.state_dict().items())
