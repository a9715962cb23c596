"""Which layers stay float, and why."""

from collections import Counter

import pytest
import timm
import torch
import torchvision
from torch import nn

from bonn_qat.binarization.policy import decide, float_layers, named
from bonn_qat.errors import InvalidModel, UnknownName
from bonn_qat.heads import classifier


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
    grouped, depthwise = nn.Conv2d(8, 8, 3, groups=4), nn.Conv2d(8, 16, 3, groups=8)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), grouped, depthwise, nn.Conv2d(16, 3, 3))
    assert float_layers(model) == {"0": "first layer", "2": "depthwise", "3": "produces an output"}


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


class Gated(nn.Module):
    """A stem, a gate of another name than timm's, a binary layer behind it, a hidden layer of the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.a, self.b = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)
        self.conv = nn.Conv2d(8, 8, 3)
        self.hidden, self.head = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.stem(x)
        x = self.conv(x * self.b(self.a(x.mean((2, 3), keepdim=True)).relu()).sigmoid())
        return self.head(self.hidden(x.mean((2, 3))))


def test_gates_are_found_by_what_comes_in_and_what_comes_later():
    decided = decide(Gated())
    assert decided.kept == {"stem": "first layer", "a": "gate", "b": "gate", "head": "classifier"}
    assert decided.binary == ("conv", "hidden")  # pooled too, but nothing unpooled comes after it
    assert decided.input_size == (3, 224, 224)


def test_gates_are_found_by_class_where_the_maps_are_single_pixels():
    model = timm.create_model("seresnet18" if timm.is_model("seresnet18") else "legacy_seresnet18", num_classes=4)
    kept = decide(model, input_size=(3, 32, 32)).kept
    gates = [name for name, _ in model.named_modules() if name.endswith((".fc1", ".fc2"))]
    assert len(gates) == 16
    assert all(kept[name] == "gate" for name in gates)
    assert "layer4.1.conv2" not in kept


@pytest.mark.parametrize(
    ("name", "options", "reasons"),
    [
        ("test_vit", {}, {"first layer": 1, "classifier": 1}),
        ("mixer_s32_224", {}, {"first layer": 1, "classifier": 1}),
        ("swinv2_cr_tiny_ns_224", {}, {"first layer": 1, "does not see the image": 24, "classifier": 1}),
        ("csatv2", {}, {"first layer": 3, "depthwise": 18, "single input channel": 42, "classifier": 1}),
        ("eca_resnext26ts", {}, {"first layer": 1, "shortcut projection": 4, "gate": 8, "classifier": 1}),
        ("resnet18", {"features_only": True}, {"first layer": 1, "shortcut projection": 3, "produces an output": 1}),
        ("test_vit", {"features_only": True}, {"first layer": 1, "produces an output": 1}),
        (
            "tf_efficientnet_b0",
            {"features_only": True},
            {"first layer": 1, "depthwise": 16, "gate": 32, "produces an output": 2},
        ),
        ("test_vit", {"num_classes": 0}, {"first layer": 1, "produces an output": 1}),
        ("gcvit_xxtiny", {}, {"first layer": 1, "depthwise": 11, "gate": 22, "classifier": 1}),
    ],
)
def test_what_timms_nets_keep(name, options, reasons):
    with torch.device("meta"):
        model = timm.create_model(name, **options)
    decided = decide(model)
    found = Counter(reason for reason in decided.kept.values())
    assert found == reasons
    assert decided.binary
    assert decided.input_size is not None


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("resnet18", "conv1", "fc"),
        ("vgg11_bn", "features.0", "classifier.6"),
        ("mobilenet_v2", "features.0.0", "classifier.1"),
        ("squeezenet1_1", "features.0", "classifier.1"),
        ("vit_b_16", "conv_proj", "heads.head"),
        ("convnext_tiny", "features.0.0", "classifier.2"),
        ("swin_t", "features.0.0", "head"),
        ("segmentation.fcn_resnet50", "backbone.conv1", "classifier.4"),
    ],
)
def test_torchvisions_nets_have_no_metadata_and_keep_their_ends(name, first, last):
    module = torchvision.models.segmentation if "." in name else torchvision.models
    arguments = {"weights": None, **({"weights_backbone": None} if "." in name else {})}
    with torch.device("meta"):
        model = getattr(module, name.rsplit(".", 1)[-1])(**arguments)
    decided = decide(model)
    assert decided.kept[first] == "first layer"
    assert decided.kept[last] in ("classifier", "produces an output")
    assert sum(why in ("first layer", "classifier", "produces an output") for why in decided.kept.values()) == 2


def test_auxiliary_heads_that_evaluation_does_not_reach_stay_float():
    with torch.device("meta"):
        model = torchvision.models.googlenet(weights=None, aux_logits=True, init_weights=False)
    kept = decide(model).kept
    assert {name for name, why in kept.items() if why == "not reached by a forward pass"} == {
        f"aux{i}.{layer}" for i in (1, 2) for layer in ("conv.conv", "fc1", "fc2")
    }


def test_a_model_that_takes_no_image_is_decided_by_names_and_classes():
    class Two(Gated):
        def forward(self, x, y):
            return x + y

    decided = decide(Two())
    assert decided.input_size is None
    assert decided.kept == {"stem": "first layer", "head": "classifier"}


@pytest.mark.parametrize(
    ("name", "readers"),
    [
        ("beit_base_patch16_224", {f"blocks.{i}.attn.qkv": f"blocks.{i}.attn" for i in range(2)}),
        ("eva02_tiny_patch14_224", {f"blocks.{i}.attn.qkv": f"blocks.{i}.attn" for i in range(2)}),
        ("vit_tiny_patch16_224", {}),
        ("swinv2_tiny_window8_256", None),
    ],
)
def test_layers_that_others_read_are_told(name, readers):
    with torch.device("meta"):
        model = timm.create_model(name, **({} if readers is None else {"depth": 2}))
    decided = decide(model)
    if readers is None:
        readers = {n: n[: -len(".qkv")] for n, _ in model.named_modules() if n.endswith(".qkv")}
        assert len(readers) == 12
    assert decided.bypassed == readers
    assert all(decided.kept[layer] == f"{reader} reads its weight itself" for layer, reader in readers.items())
    assert decide(model, skip=["*.qkv"]).bypassed == {}  # who names them knows


def test_weights_that_two_layers_share_stay_float():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[2].weight = model[1].weight
    assert decide(model).kept == {
        "0": "first layer", "1": "shares its weight with 2", "2": "shares its weight with 1", "4": "classifier",
    }  # fmt: skip


def test_include_overrules_the_rules_and_skip_overrules_include(resnet):
    assert "conv1" in decide(resnet, include=["conv1"]).binary
    assert "layer2.0.downsample.0" in decide(resnet, include="layer2").binary
    assert (
        decide(resnet, include=["layer2"], skip=["layer2.0.downsample"])
        .kept["layer2.0.downsample.0"]
        .startswith("skip")
    )
    assert "layer2.0.conv1" in decide(resnet, include=iter(["layer2", "layer2.0.conv1"])).binary  # one within the other
    mobile = timm.create_model("mobilenetv2_035", num_classes=2)
    assert not any(why == "depthwise" for why in decide(mobile, include=["*.conv_dw"]).kept.values())


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("1", r"include '1' names no layer that can be binary: 1: Embedding looks up rows of its weight"),
        ("2", r"include '2' names no layer that can be binary: there is no layer with weights"),
    ],
)
def test_a_layer_that_cannot_be_binary_but_is_asked_for_is_an_error(pattern, message):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Embedding(4, 4), nn.ReLU(), nn.Conv2d(4, 4, 3))
    with pytest.raises(InvalidModel, match=message):
        decide(model, include=[pattern])
    with pytest.raises(UnknownName, match="in include '9'"):
        decide(model, include=["9"])


class Kinds(nn.Module):
    """A stem, one layer of each rule and a head, all of one kind."""

    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.stem, self.body, self.depthwise = kind(3, 8, 1), kind(8, 8, 3), kind(8, 8, 3, groups=8)
        self.downsample, self.head = kind(8, 8, 1), kind(8, 2, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.depthwise(self.body(x)).mean() + self.downsample(x))


@pytest.mark.parametrize("sizes", [True, False])
@pytest.mark.parametrize(
    ("kind", "axes"),
    [(nn.Conv1d, 1), (nn.Conv3d, 3), (nn.ConvTranspose1d, 1), (nn.ConvTranspose2d, 2), (nn.ConvTranspose3d, 3)],
)
def test_the_rules_are_those_of_every_kind(kind, axes, sizes):
    decided = decide(Kinds(kind), input_size=(3, *[8] * axes) if sizes else None)
    assert decided.binary == ("body",)
    assert decided.kept == {
        "stem": "first layer", "depthwise": "depthwise", "downsample": "shortcut projection",
        "head": "produces an output",
    }  # fmt: skip
    assert len(decided.input_size) == axes + 1


def test_the_predicate_decides_between_skip_and_the_rules(resnet):
    asked = []

    def predicate(name, layer):
        asked.append(name)
        return {"layer1.0.conv1": False, "conv1": True, "layer2.0.conv1": True}.get(name)

    decided = decide(resnet, skip=["layer2.0.conv1"], predicate=predicate)
    assert decided.kept["layer1.0.conv1"] == "predicate"
    assert decided.kept["layer2.0.conv1"] == "skip 'layer2.0.conv1'"
    assert "conv1" in decided.binary
    assert "layer2.0.conv1" not in asked
    assert decided.kept["fc"] == "classifier"  # no opinion
    assert decide(resnet, predicate=lambda name, layer: isinstance(layer, nn.Linear)).binary == ("fc",)


def test_a_size_that_the_model_refuses_is_named():
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224", depth=1)
    with pytest.raises(InvalidModel, match=r"VisionTransformer does not take an image of \(3, 64, 64\).*input_size"):
        decide(model, input_size=(3, 64, 64))


def test_the_size_that_a_model_was_made_for_is_found():
    assert decide(timm.create_model("test_vit", img_size=64)).input_size == (3, 64, 64)
    for channels in (1, 13):
        assert decide(timm.create_model("resnet10t", in_chans=channels)).input_size == (channels, 176, 176)
