"""A sample of timm's families: each runs, has live layers, loads, is still a timm model. docs/coverage.md has all."""

import copy
import importlib.util
import sys
import warnings
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from timm.models import group_parameters
from torch import nn
from torchvision.models.convnext import CNBlockConfig

import bonn_qat
from bonn_qat.binarization.binarize import BypassedLayers, MostlyFloat, UnseenModel, binary_layers
from bonn_qat.errors import InvalidModel
from bonn_qat.inspection.diagnose import DeadLayers

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "backbones.py"
spec = importlib.util.spec_from_file_location("coverage_of_timm", SCRIPT)
assert spec
assert spec.loader
coverage = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = coverage  # where dataclasses look their module up
spec.loader.exec_module(coverage)

# Members that cost the least, down to a second, with one block of a kind where several are alike.
SAMPLE = {
    "byobnet": ("test_byobnet", {}),
    "coat": ("coat_lite_tiny", {"serial_depths": (1, 1, 1, 1), "img_size": 64}),
    "convnext": ("test_convnext", {}),
    "crossvit": ("crossvit_9_240", {"depth": ((1, 1, 1),)}),
    "cspnet": ("cs3darknet_focus_s", {}),
    "cspnext": ("cspnext_tiny", {}),
    "deit": ("deit_tiny_distilled_patch16_224", {"depth": 2}),
    "densenet": ("densenet121", {"block_config": (2, 2, 2, 2)}),
    "dla": ("dla46x_c", {}),
    "edgenext": ("edgenext_xx_small", {"depths": (1, 1, 2, 1)}),
    "efficientformer_v2": ("efficientformerv2_s0", {"depths": (1, 1, 1, 1), "num_vit": 1}),
    "efficientnet": ("test_efficientnet_gn", {}),
    "efficientvit_mit": ("efficientvit_b0", {"depths": (1, 1, 1, 1)}),
    "efficientvit_msra": ("efficientvit_m0", {"depth": (1, 1, 1), "num_heads": (2, 2, 2)}),
    "eva": ("eva02_tiny_patch14_224", {"depth": 2}),
    "fasternet": ("fasternet_t0", {"depths": (1, 1, 1, 1)}),
    "ghostnet": ("ghostnet_050", {}),
    "hardcorenas": ("hardcorenas_a", {}),
    "hgnet": ("hgnetv2_b0", {}),
    "lcnetv2": ("lcnetv2_small", {}),
    "levit": ("levit_128s", {"depth": (1, 1, 1), "img_size": 64}),
    "mambaout": ("test_mambaout", {}),
    "mlp_mixer": ("mixer_s32_224", {"img_size": 64}),
    "mobilenetv3": ("tf_mobilenetv3_small_minimal_100", {}),
    "mobilevit": ("mobilevit_xxs", {}),
    "nfnet": ("test_nfnet", {}),
    "pit": ("pit_ti_224", {"depth": (1, 1, 1), "img_size": 64}),
    "pvt_v2": ("pvt_v2_b0", {"depths": (1, 1, 1, 1)}),
    "regnet": ("regnetx_002", {}),
    "repghost": ("repghostnet_050", {}),
    "resnest": ("resnest14d", {}),
    "resnet": ("test_resnet", {}),
    "resnetv2": ("resnetv2_18", {"layers": (1, 1, 1, 1)}),
    "senet": ("legacy_seresnet18", {"layers": (1, 1, 1, 1)}),
    "shvit": ("shvit_s1", {"depth": (1, 1, 1)}),
    "sknet": ("skresnet18", {"layers": (1, 1, 1, 1)}),
    "starnet": ("starnet_s050", {}),
    "swin_transformer": (
        "swin_tiny_patch4_window7_224",
        {"depths": (2, 1), "num_heads": (3, 6), "img_size": 64, "window_size": 4},
    ),
    "vision_transformer": ("test_vit3", {"depth": 2}),
    "vovnet": ("ese_vovnet19b_slim_dw", {}),
}


def test_the_sample_is_of_forty_families_and_the_script_knows_all():
    found = coverage.families()
    assert len(SAMPLE) == 40
    assert all(name in found[family] for family, (name, _) in SAMPLE.items())
    assert set(found) == set(coverage.MODELS)
    assert all(name in found[family] for family, (name, _) in coverage.MODELS.items())


@pytest.mark.parametrize("family", SAMPLE)
def test_a_family_runs_is_alive_and_loads(family, monkeypatch):
    monkeypatch.setitem(coverage.MODELS, family, SAMPLE[family])
    row = coverage.examine(family, quick=True)
    assert row.finite
    assert row.binary_layers > 0
    assert row.parameters_binary > 0.3
    assert row.macs_binary > 0.3
    assert not row.dead
    assert not row.unreached
    assert not row.without_gradient
    assert row.state


def quietly(model: nn.Module, *args, **kwargs) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BypassedLayers)
        return bonn_qat.binarize(model, *args, **kwargs)


INTERFACE = ["test_resnet", "test_vit", "test_convnext", "test_efficientnet", "test_nfnet", "test_mambaout"]


@pytest.mark.parametrize("name", INTERFACE)
def test_a_binarized_model_is_a_timm_model_still(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7)
    binary = quietly(model).eval()
    side = model.pretrained_cfg["input_size"][1]
    x = torch.randn(2, 3, side, side)
    assert (binary.num_features, binary.num_classes) == (model.num_features, 7)
    assert binary.pretrained_cfg == model.pretrained_cfg
    features = binary.forward_features(x)
    assert features.shape == model.eval().forward_features(x).shape
    pooled = binary.forward_head(features, pre_logits=True)
    assert pooled.shape == (2, binary.head_hidden_size)
    torch.testing.assert_close(binary.forward_head(features), binary(x))
    final, between = binary.forward_intermediates(x, indices=2)
    torch.testing.assert_close(final, features)
    assert len(between) == 2
    if hasattr(model, "feature_info"):
        assert len(binary.feature_info) == len(model.feature_info)
    assert isinstance(binary.get_classifier(), nn.Linear)
    groups = group_parameters(binary, binary.group_matcher(coarse=False))
    assert sorted(n for names in groups.values() for n in names) == sorted(n for n, _ in binary.named_parameters())
    binary.set_grad_checkpointing(True)
    binary.train()(x).sum().backward()
    assert all(layer.weight.grad.isfinite().all() for _, layer in binary_layers(binary))
    binary.set_grad_checkpointing(False)
    binary.reset_classifier(3)
    assert binary.eval()(x).shape == (2, 3)
    assert type(binary.get_classifier()) is nn.Linear
    pooled = binary.forward_head(binary.forward_features(x), pre_logits=True)
    binary.reset_classifier(0)
    torch.testing.assert_close(binary(x), pooled)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "tf_mobilenetv3_small_minimal_100"])
def test_features_only_gives_the_feature_maps_of_a_binary_backbone(name):
    torch.manual_seed(0)
    model = timm.create_model(name, features_only=True)
    binary = quietly(model)
    side = 160 if "vit" in name else 64
    x = torch.randn(2, 3, side, side)
    shapes = [y.shape for y in model(x)]
    features = binary(x)
    assert [y.shape for y in features] == shapes
    assert binary.feature_info.channels() == model.feature_info.channels() == [y.shape[1] for y in features]
    sum(y.square().mean() for y in features).backward()
    layers = dict(binary_layers(binary))
    assert len(layers) > 1
    assert all(layer.weight.grad.isfinite().all() for layer in layers.values())
    last = list(layers.values())[-1]
    assert last.weight.grad.any()  # no classifier, so that the last layer is a part of the backbone


def test_a_backbone_in_a_users_segmentation_net():
    class Segmenter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = timm.create_model("test_resnet", features_only=True, out_indices=(1, 3))
            first, last = self.backbone.feature_info.channels()
            self.lateral, self.predict = nn.Conv2d(last, first, 3, padding=1), nn.Conv2d(first, 4, 1)

        def forward(self, x):
            first, last = self.backbone(x)
            up = nn.functional.interpolate(self.lateral(last), first.shape[2:])
            return nn.functional.interpolate(self.predict(up + first), x.shape[2:])

    binary = bonn_qat.binarize(Segmenter())
    assert "first layer" in binary.binarization.kept.values()
    assert binary.binarization.kept["predict"] == "produces an output"
    assert "lateral" in binary.binarization.binary
    assert binary(torch.randn(2, 3, 64, 64)).shape == (2, 4, 64, 64)


@pytest.mark.parametrize("name", ["repvgg_a0", "levit_128s", "repghostnet_050"])
def test_blocks_that_fold_are_folded_before_or_not_at_all(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=4)
    binary = quietly(model)
    for one in (binary, copy.deepcopy(binary)):
        with pytest.raises(InvalidModel, match=r"folds float weights.*timm\.utils\.reparameterize_model"):
            timm.utils.reparameterize_model(one)
    folded = quietly(timm.utils.reparameterize_model(model.eval()))
    assert len(folded.binarization.binary) <= len(binary.binarization.binary)
    side = model.pretrained_cfg["input_size"][1]
    assert folded(torch.randn(1, 3, side, side)).isfinite().all()


TORCHVISION = {
    "resnet": torchvision.models.resnet18,
    "mobilenet": torchvision.models.mobilenet_v3_small,
    "vit": partial(
        torchvision.models.VisionTransformer,
        image_size=64, patch_size=16, num_layers=6, num_heads=4, hidden_dim=64, mlp_dim=128,
    ),
    "swin": partial(
        torchvision.models.SwinTransformer,
        patch_size=[4, 4], embed_dim=48, depths=[2, 2, 2], num_heads=[3, 6, 12], window_size=[4, 4],
    ),
    "convnext": partial(
        torchvision.models.ConvNeXt, [CNBlockConfig(48, 96, 2), CNBlockConfig(96, 192, 2), CNBlockConfig(192, None, 2)]
    ),
    "densenet": partial(torchvision.models.DenseNet, block_config=(2, 2, 2, 2)),
}  # fmt: skip


@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision(name):
    torch.manual_seed(0)
    model = TORCHVISION[name](num_classes=5)
    with warnings.catch_warnings():
        warnings.simplefilter("error", MostlyFloat)
        warnings.simplefilter("error", UnseenModel)
        binary = quietly(model)
    x = coverage.photographs(64)
    binary(x).sum().backward()
    layers = dict(binary_layers(binary))
    assert len(layers) > 10
    assert all(layer.weight.grad.isfinite().all() for layer in layers.values())
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeadLayers)
        bonn_qat.diagnose(binary, x)


def test_layers_that_are_bypassed_are_told_once_and_stay_as_they_were():
    torch.manual_seed(0)
    model = timm.create_model("beit_base_patch16_224", depth=2, num_classes=4)
    with pytest.warns(
        BypassedLayers,
        match=r"blocks\.0\.attn\.qkv stays float because blocks\.0\.attn reads its weight directly, and 1 more",
    ):
        binary = bonn_qat.binarize(model)
    assert type(binary.blocks[0].attn.qkv) is nn.Linear
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bonn_qat.binarize(model, skip=["*.attn.qkv"])


def test_each_layer_can_have_a_scheme_of_its_own():
    model = timm.create_model("test_resnet", num_classes=4)
    binary = bonn_qat.binarize(model, "bonn", schemes={"layer2": "xnor", "layer2.0.conv1": "float", "layer3.*": "bnn"})
    record = binary.binarization
    assert record.kept["layer2.0.conv1"] == "scheme 'float'"
    assert {name: scheme.name for name, scheme in record.schemes.items()} == {
        name: "xnor" if name.startswith("layer2") else "bnn"
        for name in record.binary
        if name[:6] in ("layer2", "layer3")
    }
    fresh = timm.create_model("test_resnet", num_classes=4)
    loaded = copy.deepcopy(binary)
    loaded.load_state_dict(fresh.state_dict())
    again = bonn_qat.binarize(fresh, "bonn", schemes={"layer2": "xnor", "layer2.0.conv1": "float", "layer3.*": "bnn"})
    assert all(torch.equal(x, again.state_dict()[key]) for key, x in loaded.state_dict().items())
    with pytest.raises(bonn_qat.BonnQatError, match="in schemes 'layer9'"):
        bonn_qat.binarize(model, schemes={"layer9": "xnor"})


def test_an_all_float_policy_says_what_every_layer_is_kept_for():
    model = timm.create_model("test_vit", num_classes=4)
    with pytest.raises(
        InvalidModel, match=r"nothing to binarize in VisionTransformer: patch_embed\.proj \(first layer\).*predicate"
    ):
        bonn_qat.binarize(model, predicate=lambda name, _: None if name.startswith(("patch", "head")) else False)


ACTIVATIONS = [*timm.layers.create_act._ACT_LAYER_DEFAULT, "star_relu", "squared_relu"]


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_signs_carry_information_behind_every_activation_that_timm_has(name):
    from timm.models.metaformer import SquaredReLU, StarReLU

    classes = {"star_relu": StarReLU, "squared_relu": SquaredReLU}
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4, act_layer=name if name not in classes else None)
    if name in classes:
        for parent in list(model.modules()):
            for child, module in parent.named_children():
                if isinstance(module, nn.ReLU):
                    setattr(parent, child, classes[name]())
    binary = bonn_qat.binarize(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DeadLayers)
        shares = bonn_qat.diagnose(binary, coverage.photographs(64)).shares
    assert len(shares) > 3
    act1 = {type(m) for n, m in model.named_modules() if n.endswith("act1")}
    assert act1 - {nn.ReLU, nn.ReLU6} <= {type(m) for m in binary.modules()}  # others stay
