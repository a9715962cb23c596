"""The backbones: their sizes, their blocks against the formulas, their timm interface, float and binary."""

from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

import bonn_qat
from bonn_qat.bonn import BONN
from bonn_qat.errors import InvalidRecipe
from bonn_qat.models.birealnet import BiRealNet, OneConvBlock
from bonn_qat.models.wide_resnet import BasicBlock, WideResNet

POSITIONS = ["after_add", "before_add"]
NORMS = ["before_sign", "after_conv", "both"]


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def sign(x: Tensor) -> Tensor:
    return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)


def norm(x: Tensor, bn: nn.Module) -> Tensor:
    scale = bn.weight / torch.sqrt(bn.running_var + bn.eps)
    return (x - bn.running_mean[:, None, None]) * scale[:, None, None] + bn.bias[:, None, None]


def norms(position: str, *bns: nn.Module) -> list:
    """The block's norms as functions: those before the signs (the first half), then those after the convolutions.

    Those that the position does without are the identity, and have no parameters.
    """
    used = {"before_sign": [True, False], "after_conv": [False, True], "both": [True, True]}[position]
    assert [isinstance(bn, nn.BatchNorm2d) for bn in bns] == [u for u in used for _ in range(len(bns) // 2)]
    return [lambda x, bn=bn: norm(x, bn) if isinstance(bn, nn.BatchNorm2d) else x for bn in bns]


def binary_conv(x: Tensor, conv: nn.Module) -> Tensor:
    kernels = sign(conv.weight) * conv.weight_quant.modulation.mean()
    return F.conv2d(sign(x), kernels, None, conv.stride, 1)


def join(y: Tensor, shortcut: Tensor, slope: Tensor, position: str) -> Tensor:
    slope = slope[:, None, None]
    if position == "after_add":
        y = y + shortcut
        return torch.where(y > 0, y, slope * y)
    return torch.where(y > 0, y, slope * y) + shortcut


def binarized(block: nn.Module, **options: object) -> nn.Module:
    """The binary form of one block, in float64, with every parameter and statistic away from its start."""
    model = bonn_qat.binarize(nn.Sequential(nn.Conv2d(3, 3, 1), block), replace(BONN, **options)).double().eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point() and tensor.ndim == 1:
                tensor.uniform_(0.2, 1.5) if "var" in name or "weight" in name else tensor.normal_()
    return model[1]


@pytest.mark.parametrize(
    ("name", "classes", "count"),
    [
        ("wrn22_16", 10, 272_282),
        ("wrn22_64", 10, 4_326_986),
        ("wrn22_16", 100, 278_132),
        ("wrn22_64", 100, 4_350_116),
        ("wrn40_16", 10, 563_930),
        # The ResNet-18 of torchvision has 11,689,512; a BN of a block's input has fewer channels where the
        # width changes (-448), the PReLUs are new (64 + 4 * 960 = 3,904), minus the BN after each convolution.
        ("birealnet18", 1000, 11_689_512 - 2 * 448 + 3_904),
    ],
)
def test_parameter_counts(name, classes, count):
    assert parameters(timm.create_model(name, num_classes=classes)) == count


@pytest.mark.parametrize("name", ["wrn10_16", "wrn16_16", "wrn22_16", "wrn22_64", "wrn40_16", "wrn40_64"])
def test_wide_resnets_have_the_depth_and_widths_of_their_name(name):
    model = timm.create_model(name)
    depth, width = (int(part) for part in name.removeprefix("wrn").split("_"))
    convolutions = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3)]
    assert len(convolutions) == depth - 3  # the depth also counts the classifier and the two projections
    assert model.conv1.out_channels == width
    assert model.num_features == 4 * width
    assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {0.3 if width == 64 else 0.0}


def test_bireal_nets_have_the_convolutions_of_their_name():
    for name, blocks in (("birealnet18", 16), ("birealnet34", 32)):
        model = timm.create_model(name, num_classes=2)
        assert sum(isinstance(module, OneConvBlock) for module in model.modules()) == blocks


@pytest.mark.parametrize(("stride", "channels"), [(1, 8), (2, 16)])
def test_float_wide_block_is_its_formula(stride, channels):
    block = BasicBlock(8, channels, stride, 0.0).eval()
    x = torch.randn(2, 8, 7, 7)
    y = norm(x, block.bn1).relu()
    shortcut = x if stride == 1 else F.conv2d(y, block.shortcut.weight, stride=stride)
    y = norm(F.conv2d(y, block.conv1.weight, stride=stride, padding=1), block.bn2).relu()
    torch.testing.assert_close(block(x), F.conv2d(y, block.conv2.weight, padding=1) + shortcut)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("norm_position", NORMS)
@pytest.mark.parametrize("projection", ["pool_conv", "conv_norm_pool"])
@pytest.mark.parametrize(("stride", "channels", "size"), [(1, 8, 6), (1, 16, 6), (2, 16, 6), (2, 16, 7)])
def test_block_with_one_shortcut_per_convolution_is_its_formula(
    position, norm_position, projection, stride, channels, size
):
    options = {"nonlinearity_position": position, "norm_position": norm_position, "projection": projection}
    block = binarized(BasicBlock(8, channels, stride, 0.3), shortcut="conv", **options)
    x = torch.randn(2, 8, size, size, dtype=torch.float64)

    def pool(x: Tensor) -> Tensor:  # at an edge it averages what is there
        return x if stride == 1 else F.avg_pool2d(F.pad(x, (0, size % 2, 0, size % 2), mode="replicate"), 2)

    if channels == 8:
        shortcut = x
    elif projection == "pool_conv":
        shortcut = F.conv2d(pool(x), block.shortcut.weight)
    else:
        shortcut = pool(norm(F.conv2d(x, block.shortcut.weight), block.shortcut_bn))
    assert isinstance(block.shortcut_bn, nn.Identity) == (channels == 8 or projection == "pool_conv")
    first, second, third, fourth = norms(norm_position, block.bn1, block.bn2, block.bn1_after, block.bn2_after)
    y = join(third(binary_conv(first(x), block.conv1)), shortcut, block.act1.weight, position)
    y = join(fourth(binary_conv(second(y), block.conv2)), y, block.act2.weight, position)
    torch.testing.assert_close(block(x), y)


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("norm_position", NORMS)
@pytest.mark.parametrize(("stride", "channels", "size"), [(1, 8, 6), (2, 16, 7)])
def test_block_with_the_float_shortcut_is_its_formula(position, norm_position, stride, channels, size):
    options = {"shortcut": "block", "nonlinearity_position": position, "norm_position": norm_position}
    block = binarized(BasicBlock(8, channels, stride, 0.3), **options)
    x = torch.randn(2, 8, size, size, dtype=torch.float64)
    before, after = norms(norm_position, block.bn1, block.bn2_after)
    y = before(x)
    shortcut = x if stride == 1 else F.conv2d(y, block.shortcut.weight, stride=2)
    y = after(binary_conv(norm(binary_conv(y, block.conv1), block.bn2), block.conv2))
    torch.testing.assert_close(block(x), join(y, shortcut, block.act2.weight, position))


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("norm_position", NORMS)
@pytest.mark.parametrize("shortcut", ["conv", "block"])
@pytest.mark.parametrize(("stride", "channels", "size"), [(1, 8, 6), (2, 16, 6), (2, 16, 7)])
def test_bireal_block_is_its_formula(position, norm_position, shortcut, stride, channels, size):
    options = {"shortcut": shortcut, "nonlinearity_position": position, "norm_position": norm_position}
    block = binarized(OneConvBlock(8, channels, stride), **options)
    x = torch.randn(2, 8, size, size, dtype=torch.float64)
    side = x
    if stride == 2:
        projected = norm(F.conv2d(x, block.shortcut[0].weight), block.shortcut[1])
        side = F.avg_pool2d(F.pad(projected, (0, size % 2, 0, size % 2), mode="replicate"), 2)
    before, after = norms(norm_position, block.bn, block.bn_after)
    y = after(binary_conv(before(x), block.conv))
    torch.testing.assert_close(block(x), join(y, side, block.act.weight, position))


@pytest.mark.parametrize("shortcut", ["conv", "block"])
def test_the_first_wide_block_normalizes_its_input_once_where_the_norms_come_after_the_convolutions(shortcut):
    block = binarized(BasicBlock(8, 8, 1, 0.0, follows_stem=True), shortcut=shortcut, norm_position="after_conv")
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    first = norm(x, block.bn1)
    if shortcut == "conv":
        y = join(norm(binary_conv(first, block.conv1), block.bn1_after), first, block.act1.weight, "after_add")
        y = join(norm(binary_conv(y, block.conv2), block.bn2_after), y, block.act2.weight, "after_add")
    else:
        y = binary_conv(norm(binary_conv(first, block.conv1), block.bn2), block.conv2)
        y = join(norm(y, block.bn2_after), first, block.act2.weight, "after_add")
    torch.testing.assert_close(block(x), y)


NETWORKS = [
    ("wrn10_16", {}, (3, 16, 16), {"shortcut": "conv"}),
    ("wrn10_16", {}, (3, 18, 18), {"shortcut": "conv", "projection": "conv_norm_pool"}),
    ("wrn10_16", {}, (3, 16, 16), {"shortcut": "block"}),
    ("birealnet18", {"stem": "cifar"}, (3, 16, 16), {"shortcut": "conv"}),
]


@pytest.mark.parametrize("norm_position", NORMS)
@pytest.mark.parametrize(("name", "options", "size", "form"), NETWORKS, ids=lambda x: str(x) if x else "")
def test_networks_of_every_norm_position_load_pack_and_are_measured(name, options, size, form, norm_position):
    torch.manual_seed(0)
    scheme = replace(BONN, norm_position=norm_position, **form)
    network = timm.create_model(name, num_classes=4, **options)
    model = bonn_qat.binarize(network, scheme, input_size=size)
    loaded = timm.create_model(name, num_classes=4, scheme=scheme, **options)
    loaded.load_state_dict(network.state_dict())  # strictly: norms that moved start anew
    assert model.state_dict().keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, loaded.state_dict()[key]) for key, value in model.state_dict().items())
    assert not bonn_qat.diagnose(model, torch.randn(8, *size)).dead
    flips, optimizer = bonn_qat.FlipRatio(model), torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):  # statistics and slopes away from their start
        optimizer.zero_grad()
        model.train()(torch.randn(8, *size)).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad is not None for parameter in model.parameters())
    flips.update()
    assert 0 < flips.compute()[""] < 1
    binary = bonn_qat.summary(model).binary_weights
    assert binary == bonn_qat.summary(bonn_qat.binarize(network, BONN, input_size=size)).binary_weights
    again = timm.create_model(name, num_classes=4, scheme=scheme, **options)
    again.load_state_dict(model.state_dict())
    images = torch.randn(3, *size)
    assert torch.equal(again.eval()(images), model.eval()(images))
    packed = bonn_qat.pack(model, size)
    assert {layer.kind for layer in packed.layers} == {"bits"}
    torch.testing.assert_close(packed(images), model(images), rtol=1e-5, atol=1e-5)
    assert torch.equal(packed(images).argmax(1), model(images).argmax(1))


@pytest.mark.parametrize("norm_position", NORMS)
def test_networks_of_every_norm_position_are_exported(norm_position, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    scheme = replace(BONN, norm_position=norm_position)
    model = bonn_qat.binarize(timm.create_model("wrn10_16", num_classes=4), scheme, input_size=(3, 16, 16))
    model.train()(torch.randn(8, 3, 16, 16))
    images = torch.randn(2, 3, 16, 16)
    expected = model.eval()(images).detach()
    path = bonn_qat.export(model, tmp_path / "net.onnx", "onnx")
    session = runtime.InferenceSession(str(path))
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-4)
    bonn_qat.export(model, tmp_path / "net", "c")
    program = torch.export.load(bonn_qat.export(model, tmp_path / "net.pt2", "pt2"))
    torch.testing.assert_close(program.module()(images), expected, rtol=1e-4, atol=1e-4)


def test_a_network_without_rebuilt_blocks_refuses_another_norm_position():
    network = timm.create_model("resnet18", num_classes=4, channels=(8, 8, 16, 16), stem_width=8)
    with pytest.raises(InvalidRecipe, match=r"'norm_position' .* no effect on ResNet: it has no block whose norms can"):
        bonn_qat.binarize(network, BONN.configure({"norm_position": "after_conv"}))
    assert bonn_qat.binarize(network, replace(BONN, norm_position="after_conv")).layer1[0].bn1 is not None


class Slope(nn.Module):
    """A nonlinearity of a scheme's own, with a parameter for each channel."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.full((channels,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.slope[:, None, None]


@pytest.mark.parametrize(
    ("make", "shortcut", "channels"),
    [
        (lambda: OneConvBlock(8, 16, 2), "conv", [16]),
        (lambda: BasicBlock(8, 16, 2, 0.0), "conv", [16, 16]),
        (lambda: BasicBlock(8, 16, 2, 0.0), "block", [16]),
    ],
)
def test_the_papers_blocks_take_the_nonlinearity_of_the_scheme(make, shortcut, channels):
    block = binarized(make(), nonlinearity=Slope, shortcut=shortcut)
    assert [len(m.slope) for m in block.modules() if isinstance(m, Slope)] == channels
    assert not any(isinstance(m, nn.PReLU | nn.ReLU) for m in block.modules())
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    before = block(x)
    with torch.no_grad():
        for module in block.modules():
            if isinstance(module, Slope):
                module.slope.mul_(2)
    if len(channels) == 1:
        torch.testing.assert_close(block(x), 2 * before)
    assert not torch.equal(block(x), before)


def test_a_float_checkpoint_loads_where_the_scheme_replaces_the_prelu():
    scheme = replace(BONN, nonlinearity=Slope)
    model = timm.create_model("birealnet18", num_classes=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    expected = bonn_qat.binarize(model, scheme)
    loaded = timm.create_model("birealnet18", num_classes=4, scheme=scheme)
    loaded.load_state_dict(model.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), expected.state_dict().values(), strict=True)
    )
    assert sum(isinstance(m, Slope) for m in loaded.modules()) == 16
    assert sum(isinstance(m, nn.PReLU) for m in loaded.modules()) == 1  # the stem, which is float
    again = timm.create_model("birealnet18", num_classes=4, scheme=scheme)
    again.load_state_dict(loaded.state_dict())
    kept = bonn_qat.binarize(model)
    assert torch.equal(kept.layer1[0].act.weight, model.layer1[0].act.weight)


def test_a_block_is_left_alone_by_its_binary_form():
    block = OneConvBlock(8, 8, 1)
    act, keys = block.act, set(block.state_dict())
    form = block.binary_form(replace(BONN, nonlinearity=Slope, nonlinearity_position="before_add"))
    assert form.conv is block.conv
    assert block.act is act
    assert block.act_after_add
    assert set(block.state_dict()) == keys


@pytest.mark.parametrize("shortcut", ["conv", "block"])
def test_a_scheme_without_activations_or_nonlinearity_still_gives_a_nonlinear_network(shortcut):
    float_block = BasicBlock(8, 8, 1, 0.0)
    weights_only = {"activation": None, "shortcut": shortcut}
    assert any(isinstance(m, nn.PReLU) for m in binarized(float_block, **weights_only).modules())
    assert any(isinstance(m, nn.ReLU) for m in binarized(float_block, nonlinearity=None, **weights_only).modules())
    signed = binarized(float_block, nonlinearity=None, shortcut=shortcut)
    assert not any(isinstance(m, nn.ReLU | nn.PReLU) for m in signed.modules())


def test_dropout_acts_between_the_convolutions_in_training_only():
    block = binarized(BasicBlock(8, 8, 1, 0.5))
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(block(x), block(x), rtol=0, atol=0)
    block.dropout.train()
    seen = []
    block.conv2.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    assert not torch.equal(block(x), block(x))
    assert not torch.equal(*seen)


@pytest.mark.parametrize("scheme", [None, "bonn"])
@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 9, 12), (3, 32, 32)])
def test_wide_resnet_takes_any_size(scheme, shape):
    model = timm.create_model("wrn10_16", in_chans=shape[0], scheme=scheme)
    x = torch.randn(2, *shape)
    logits = model(x)
    logits.square().sum().backward()
    assert logits.shape == (2, 10)
    assert model.forward_features(x).shape == (2, 64, -(-shape[1] // 4), -(-shape[2] // 4))
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("scheme", [None, "bonn"])
@pytest.mark.parametrize(("stem", "size", "reduction"), [("imagenet", 70, 32), ("cifar", 17, 8)])
def test_bireal_net_stems(scheme, stem, size, reduction):
    model = timm.create_model("birealnet18", num_classes=4, stem=stem, scheme=scheme)
    x = torch.randn(2, 3, size, size)
    logits = model(x)
    logits.square().sum().backward()
    assert logits.shape == (2, 4)
    assert model.forward_features(x).shape[2:] == (-(-size // reduction),) * 2
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("name", "options", "binary"), [("wrn22_16", {}, 18), ("birealnet18", {"num_classes": 4}, 16)])
def test_binary_backbone_is_binarize_of_the_float_one(name, options, binary):
    torch.manual_seed(0)
    model = timm.create_model(name, scheme="bonn", **options)
    torch.manual_seed(0)
    other = bonn_qat.binarize(timm.create_model(name, **options))
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    assert len(model.binarization.binary) == binary
    reasons = {name: reason for name, reason in model.binarization.kept.items() if "shortcut" not in name}
    assert reasons == {"conv1": "first layer", "fc": "classifier"}
    projections = [name for name in model.binarization.kept if "shortcut" in name]
    assert len(projections) == (2 if name == "wrn22_16" else 3)


def test_bireal_net_has_the_same_parameters_float_and_binary():
    model = timm.create_model("birealnet18", num_classes=4)
    keys = set(bonn_qat.binarize(model).state_dict()) - set(model.state_dict())
    assert {key.rsplit(".", 1)[1] for key in keys} == {"modulation"}


@pytest.mark.parametrize("scheme", [None, "bonn"])
@pytest.mark.parametrize("name", ["wrn10_16", "birealnet18"])
def test_timm_interface(name, scheme):
    options = {"stem": "cifar"} if name == "birealnet18" else {}
    model = timm.create_model(name, num_classes=7, scheme=scheme, **options).eval()
    x = torch.randn(2, 3, 16, 16)
    assert model.get_classifier() is model.fc
    assert model.fc.out_features == model.num_classes == 7
    assert model.default_cfg["first_conv"] == "conv1"
    assert model.get_submodule(model.pretrained_cfg["classifier"]) is model.fc
    features = model.forward_features(x)
    torch.testing.assert_close(model.fc(model.forward_head(features, pre_logits=True)), model(x))
    model.reset_classifier(5)
    assert model(x).shape == (2, 5)
    model.reset_classifier(0)
    assert model(x).shape == (2, model.num_features) == (2, model.head_hidden_size)
    assert len(param_groups_layer_decay(model, layer_decay=0.5)) > 4


@pytest.mark.parametrize("name", ["wrn10_16", "birealnet18"])
def test_feature_extraction_agrees_with_feature_info(name):
    options = {"stem": "cifar"} if name == "birealnet18" else {}
    model = timm.create_model(name, features_only=True, scheme="bonn", **options)
    features = model(torch.randn(1, 3, 16, 16))
    expected = [(info["num_chs"], 16 // info["reduction"]) for info in model.feature_info.get_dicts()]
    assert [(f.shape[1], f.shape[2]) for f in features] == expected


@pytest.mark.parametrize("name", ["wrn10_16", "birealnet18"])
def test_gradient_checkpointing_changes_no_gradient(name):
    options = {"stem": "cifar", "num_classes": 3} if name == "birealnet18" else {}
    model = timm.create_model(name, scheme="bonn", **options)
    x = torch.randn(2, 3, 8, 8)
    gradients = []
    for enable in (False, True):
        model.zero_grad()
        model.set_grad_checkpointing(enable)
        model(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1])


def test_impossible_configurations_are_refused():
    with pytest.raises(ValueError, match="6n \\+ 4, at least 10; got 20"):
        WideResNet(20)
    with pytest.raises(ValueError, match="got 'small'"):
        BiRealNet(stem="small")
