"""binarize: what is replaced, what stays, and that the result is an ordinary module in every other way."""

import copy
import io
from dataclasses import replace

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

import bonn_qat
from bonn_qat import plugins
from bonn_qat.binarization.binarize import Binarization, binary_layers
from bonn_qat.bonn import BONN
from bonn_qat.errors import InvalidModel, InvalidRecipe, UnknownName
from bonn_qat.layers import BinaryConv2d

# Without the head, whose 100 M parameters would take seconds to make.
VGG11 = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["A"], batch_norm=True)
FLOAT = replace(BONN, name="float", weight=None, activation=None)


def small(channels: int = 8) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, channels, 3, padding=1),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, channels, 3, padding=1),
        nn.ReLU6(),
        nn.Conv2d(channels, channels, 3, stride=2, bias=False),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 5),
    )


class Tied(nn.Module):
    """One convolution and one ReLU, each at two places of one parent, and the convolution in another parent too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.first = self.second = nn.Conv2d(8, 8, 3, padding=1, bias=False)
        self.act1 = self.act2 = nn.ReLU()
        self.tail = nn.Sequential(self.first, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.fc = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.tail(self.act2(self.second(self.act1(self.first(self.stem(x)))))))


MODELS = {
    "sequential": small,
    "tied": Tied,
    "wrn10_16": lambda: timm.create_model("wrn10_16"),
    "birealnet18": lambda: timm.create_model("birealnet18", num_classes=5, stem="cifar"),
    "resnet10t": lambda: timm.create_model("resnet10t", num_classes=5),
    "timm resnet18": lambda: timm.create_model("resnet18", num_classes=5),
    "vgg11_bn": lambda: nn.Sequential(VGG11, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 5)),
    "torchvision resnet18": lambda: torchvision.models.resnet18(num_classes=5),
    "timm mobilenetv2_035": lambda: timm.create_model("mobilenetv2_035", num_classes=5),
}
FAST = ["sequential", "tied", "wrn10_16", "resnet10t"]


def equal(a: nn.Module | dict[str, Tensor], b: nn.Module | dict[str, Tensor]) -> bool:
    a, b = (m.state_dict() if isinstance(m, nn.Module) else m for m in (a, b))
    return a.keys() == b.keys() and all(torch.equal(tensor, b[key]) for key, tensor in a.items())


def trained(model: nn.Module) -> nn.Module:
    """``model`` with every number away from its start."""
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.add_(torch.rand_like(tensor) + 0.1)
            else:
                tensor.add_(3)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_forward_and_backward_are_finite_and_reach_every_binary_weight_at_the_first_step(name):
    torch.manual_seed(0)
    model = bonn_qat.binarize(MODELS[name]())
    logits = model(torch.randn(4, 3, 32, 32))
    nn.functional.cross_entropy(logits, torch.tensor([0, 1, 2, 3])).backward()
    assert logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    layers = dict(binary_layers(model))
    assert tuple(layers) == model.binarization.binary
    assert len(layers) > 0
    for layer in layers.values():
        assert layer.weight.grad.any()
        assert layer.weight_quant.modulation.grad.any()


@pytest.mark.parametrize("name", MODELS)
def test_signs_carry_information(name):
    torch.manual_seed(0)
    model = bonn_qat.binarize(MODELS[name]())
    shares = bonn_qat.diagnose(model, torch.randn(8, 3, 32, 32)).shares
    assert shares.keys() == set(model.binarization.binary)
    assert all(0.05 < share < 0.95 for share in shares.values())


@pytest.mark.parametrize("name", ["timm resnet18", "torchvision resnet18"])
def test_resnet18_has_sixteen_binary_convolutions(name):
    model = bonn_qat.binarize(MODELS[name]())
    binary = [f"layer{i}.{j}.conv{k}" for i in range(1, 5) for j in range(2) for k in (1, 2)]
    assert list(model.binarization.binary) == binary
    projections = {f"layer{i}.0.downsample.0": "shortcut projection" for i in (2, 3, 4)}
    assert model.binarization.kept == {"conv1": "first layer", "fc": "classifier"} | projections
    page = model.binarization._repr_html_()
    assert all(word in page for word in ("<td", ", ".join(binary), ">float: shortcut projection<"))
    assert all(type(model.get_submodule(name)) in (nn.Conv2d, nn.Linear) for name in model.binarization.kept)
    assert not any(isinstance(module, nn.ReLU) for module in model.modules())


def test_depthwise_convolutions_stay_float():
    model = bonn_qat.binarize(MODELS["timm mobilenetv2_035"]())
    depthwise = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1]
    assert depthwise
    assert all(model.binarization.kept[name] == "depthwise" for name in depthwise)
    assert not any(isinstance(model.get_submodule(name), BinaryConv2d) for name in depthwise)


@pytest.mark.parametrize("name", FAST)
def test_the_float_model_is_untouched(name):
    model = MODELS[name]()
    kinds = [type(module) for module in model.modules()]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    storage = {key: tensor.data_ptr() for key, tensor in model.state_dict().items()}
    x = torch.randn(1, 3, 32, 32)
    expected = copy.deepcopy(model).eval()(x)
    binary = bonn_qat.binarize(model)
    assert equal(model, before)
    assert [type(module) for module in model.modules()] == kinds
    assert not hasattr(model, "binarization")
    assert torch.equal(model.eval()(x), expected)
    assert not {tensor.data_ptr() for tensor in binary.state_dict().values()} & set(storage.values())


def test_inplace_returns_the_same_object_and_the_same_result():
    model = MODELS["wrn10_16"]()
    copied = bonn_qat.binarize(model)
    stem = model.conv1
    assert bonn_qat.binarize(model, inplace=True) is model
    assert model.conv1 is stem
    assert equal(model, copied)


def test_weights_are_taken_over_and_latents_rescaled():
    model = MODELS["wrn10_16"]()
    binary = bonn_qat.binarize(model)
    for name, layer in binary_layers(binary):
        weight = model.get_submodule(name).weight
        torch.testing.assert_close(layer.weight, weight * 0.01 / weight.std())
        torch.testing.assert_close(
            layer.weight_quant.modulation, weight.abs().mean().expand_as(layer.weight_quant.modulation)
        )
    plain = bonn_qat.binarize(model, replace(BONN, latent_std=None))
    assert all(torch.equal(layer.weight, model.get_submodule(name).weight) for name, layer in binary_layers(plain))


@pytest.mark.parametrize("name", FAST)
def test_the_state_dict_is_complete_from_construction_and_round_trips(name):
    model = bonn_qat.binarize(MODELS[name]())
    keys = list(model.state_dict())
    model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert list(model.state_dict()) == keys
    other = trained(copy.deepcopy(model))
    model.load_state_dict(other.state_dict())
    assert equal(model, other)


def test_shared_modules_stay_shared():
    model = bonn_qat.binarize(Tied())
    assert isinstance(model.first, BinaryConv2d)
    assert model.first is model.second is model.tail[0]
    assert model.act1 is model.act2
    assert isinstance(model.act1, nn.PReLU)
    assert model.binarization.binary == ("first",)
    with pytest.raises(InvalidModel, match=r"first \(skip 'tail\.0'\)"):  # skipped at one place is skipped at all
        bonn_qat.binarize(Tied(), skip=["tail.0"])


@pytest.mark.parametrize(
    ("skip", "float_names"),
    [
        (["layer1.0.conv1"], ["layer1.0.conv1"]),
        (["layer*.conv2"], ["layer1.0.conv2", "layer2.0.conv2", "layer3.0.conv2"]),
        (["layer2"], ["layer2.0.conv1", "layer2.0.conv2"]),
        ("layer2", ["layer2.0.conv1", "layer2.0.conv2"]),
        (iter(["layer2"]), ["layer2.0.conv1", "layer2.0.conv2"]),
    ],
)
def test_skip_by_name_glob_and_parent(skip, float_names):
    model = bonn_qat.binarize(MODELS["wrn10_16"](), skip=skip)
    everything = {f"layer{i}.0.conv{k}" for i in (1, 2, 3) for k in (1, 2)}
    assert set(model.binarization.binary) == everything - set(float_names)
    assert all(type(model.get_submodule(name)) is nn.Conv2d for name in float_names)
    assert all(model.binarization.kept[name].startswith("skip ") for name in float_names)
    assert model(torch.randn(2, 3, 8, 8)).isfinite().all()


@pytest.mark.parametrize("skip", ["layer2", "layer2.0", "layer2.0.*"])
def test_a_skipped_block_computes_what_it_did(skip):
    model = MODELS["wrn10_16"]().eval()
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(bonn_qat.binarize(model, skip=[skip]).layer2(x), model.layer2(x))


def test_a_skip_pattern_that_matches_nothing_names_near_names():
    with pytest.raises(UnknownName, match=r"WideResNet in skip 'layer1\.0\.conv3'; did you mean 'layer1\.0\.conv"):
        bonn_qat.binarize(MODELS["wrn10_16"](), skip=["layer1.0.conv3"])


def test_an_unknown_scheme_names_near_names():
    with pytest.raises(UnknownName, match="scheme 'bon'; did you mean 'bonn'"):
        bonn_qat.binarize(small(), "bon")


def test_nothing_to_binarize_is_an_error_that_says_why():
    with pytest.raises(InvalidModel, match=r"in Linear: no module inside it has weights"):
        bonn_qat.binarize(nn.Linear(2, 2))
    with pytest.raises(InvalidModel, match=r"Flatten: no module inside it has weights"):
        bonn_qat.binarize(nn.Flatten())
    with pytest.raises(InvalidModel, match=r"0 \(first layer\), 1 \(depthwise\), 2 \(produces an output\)"):
        bonn_qat.binarize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 8, 3)))
    with pytest.raises(InvalidModel, match=r"layer1\.0\.conv1 \(skip 'layer\*'\)"):
        bonn_qat.binarize(MODELS["wrn10_16"](), skip=["layer*"])


def test_an_error_leaves_an_inplace_model_as_it_was():
    model = small()
    with pytest.raises(UnknownName):
        bonn_qat.binarize(model, skip=["nowhere"], inplace=True)
    assert not hasattr(model, "binarization")
    assert not any(binary_layers(model))


def test_already_binarized_is_an_error():
    model = bonn_qat.binarize(small())
    with pytest.raises(InvalidModel, match=r"already binarized \(bonn\)"):
        bonn_qat.binarize(model)


def test_a_scheme_without_weights_leaves_the_network_as_it_is():
    model = small()
    result = bonn_qat.binarize(model, FLOAT)
    assert result is not model
    assert equal(model, result)
    assert equal(bonn_qat.binarize(result), bonn_qat.binarize(model))
    assert result.binarization.binary == ()
    assert str(result) == str(model)


def test_zero_norms_are_revived():
    model = MODELS["timm resnet18"]()
    zero = [name for name, module in model.named_modules() if name.endswith("bn2") and not module.weight.any()]
    assert len(zero) == 8
    binary = bonn_qat.binarize(model)
    assert list(binary.binarization.revived) == zero
    assert all((binary.get_submodule(name).weight == 1).all() for name in zero)
    assert not any(model.get_submodule(name).weight.any() for name in zero)


def test_relu_becomes_the_schemes_nonlinearity_and_a_norm_stands_before_each_sign():
    model = bonn_qat.binarize(small())
    assert [type(model[i]).__mro__[1] for i in (2, 4, 7)] == [nn.PReLU] * 3
    assert isinstance(model[3].norm, nn.BatchNorm2d)
    bare = bonn_qat.binarize(small(), replace(BONN, norm=None, nonlinearity=None))
    assert [type(bare[i]) for i in (2, 4, 7)] == [nn.ReLU, nn.ReLU6, nn.ReLU]
    assert isinstance(bare[3].norm, nn.Identity)


def test_conv_sums_before_scaling_are_exact_integers():
    model = bonn_qat.binarize(small(64))
    for _, layer in binary_layers(model):
        layer.weight_quant.modulation.data.fill_(1.0)
        layer.bias = None
        sums = layer(torch.randn(2, 64, 9, 9))
        assert torch.equal(sums, sums.round())
        assert sums.abs().max() <= 9 * 64


@pytest.mark.parametrize("padding", [1, "same", "valid", (2, 0)])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "circular"])
def test_geometry_and_bias_are_those_of_the_convolution(padding, mode):
    conv = nn.Conv2d(4, 6, 3, padding=padding, padding_mode=mode, dilation=2, groups=2)
    model = bonn_qat.binarize(nn.Sequential(nn.Conv2d(3, 4, 1), conv), replace(BONN, norm=None), include=["1"])
    with torch.no_grad():
        x = torch.randn(2, 4, 9, 9)
        kernels = torch.where(conv.weight >= 0, 1.0, -1.0)
        scale = model[1].weight_quant.modulation.mean()
        conv.weight.copy_(kernels * scale)
        torch.testing.assert_close(model[1](x), conv(torch.where(x >= 0, 1.0, -1.0)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_new_parameters_follow_the_models_type_and_mode(training, dtype):
    for name in ("sequential", "wrn10_16"):
        model = bonn_qat.binarize(MODELS[name]().to(dtype).train(training))
        assert {p.dtype for p in model.parameters()} == {dtype}
        assert {layer.training for _, layer in binary_layers(model)} == {training}
        assert model.training == training


class _Nested(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))
        self.act = nn.Sequential(nn.PReLU())

    def forward(self, x):
        return self.act(x - self.shift)


def test_new_modules_with_parts_of_their_own_follow_too():
    model = bonn_qat.binarize(MODELS["sequential"]().double(), replace(BONN, nonlinearity=_Nested))
    assert any(isinstance(module, _Nested) for module in model.modules())
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_new_parameters_follow_the_models_device():
    with torch.device("meta"):
        model = MODELS["wrn10_16"]()
    assert {p.device.type for p in bonn_qat.binarize(model).parameters()} == {"meta"}


@pytest.mark.parametrize("name", FAST)
def test_deepcopy_and_pickle_keep_everything(name):
    model = trained(bonn_qat.binarize(MODELS[name]())).eval()
    x = torch.randn(2, 3, 32, 32)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert equal(model, other)
        assert torch.equal(model(x), other(x))
        assert other.binarization.binary == model.binarization.binary
        donor = trained(MODELS[name]())
        other.load_state_dict(donor.state_dict())  # the copy's hook works on the copy
        assert equal(other, bonn_qat.binarize(donor))
        assert not equal(other, model)


def test_compiles_whole_with_the_same_result_and_gradients():
    model = bonn_qat.binarize(MODELS["sequential"]())  # whole networks: test_torch_features.py
    other = copy.deepcopy(model)
    x = torch.randn(2, 3, 16, 16)
    torch.compiler.reset()
    compiled = torch.compile(other, backend="eager", fullgraph=True)
    expected, actual = model(x), compiled(x)
    torch.testing.assert_close(actual, expected)
    expected.square().sum().backward()
    actual.square().sum().backward()
    torch.testing.assert_close([p.grad for p in other.parameters()], [p.grad for p in model.parameters()])


@pytest.mark.parametrize("name", ["sequential", "wrn10_16"])
def test_exports_with_the_same_result(name):
    model = bonn_qat.binarize(MODELS[name]()).eval()
    x = torch.randn(2, 3, 16, 16)
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x))


class Rename:
    """A plugin that answers for one layer and leaves the others."""

    asked: list[str]

    def __init__(self) -> None:
        self.asked = []

    @bonn_qat.hookimpl
    def bonn_qat_binarize_layer(self, scheme, name, layer, parent):
        self.asked.append(name)
        return nn.Sequential() if name == "7" else None


def test_layers_are_asked_about_once_from_the_outside_in_and_the_answer_stands():
    manager = plugins.create_manager(entry_points=False)
    plugin = Rename()
    manager.register(plugin)
    model = bonn_qat.binarize(nn.Sequential(*small(), nn.Sequential(nn.ReLU())), pm=manager)
    assert plugin.asked == ["1", "2", "3", "4", "5", "6", "7", "8", "9", "11", "11.0"]
    assert isinstance(model[7], nn.Sequential)  # an empty module is an answer, though it is false
    plugin.asked.clear()
    bonn_qat.binarize(Tied(), pm=manager)
    assert plugin.asked == ["first", "act1", "tail", "tail.1", "tail.2"]


def test_the_record_says_what_was_done():
    record = bonn_qat.binarize(small(), skip=["5"]).binarization
    assert isinstance(record, Binarization)
    assert record.scheme is BONN
    assert record.binary == ("3",)
    assert record.kept == {"5": "skip '5'", "0": "first layer", "10": "classifier"}
    assert record.revived == ()
    assert {key.split(".")[0] for key in record.added} == {"2", "3", "4", "7"}


def test_a_resnet_compiles_whole_and_exports_with_equal_outputs():
    model = bonn_qat.binarize(timm.create_model("resnet18", num_classes=10, layers=(2, 1, 1, 1)))
    x = torch.randn(2, 3, 64, 64)
    model(x)  # running statistics other than the initial ones
    model.eval()
    with torch.no_grad():
        expected = model(x)
        torch.compiler.reset()
        compiled = torch.compile(model, backend="eager", fullgraph=True)(x)
        exported = torch.export.export(model, (x,)).module()(x)
    torch.testing.assert_close(compiled, expected)
    torch.testing.assert_close(exported, expected)


RELU_FREE = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Conv2d(4, 8, 3), nn.Flatten(), nn.Linear(8 * 24**2, 2))


@pytest.mark.parametrize(
    ("make", "option", "value", "why"),
    [
        (lambda: RELU_FREE, "nonlinearity", "identity", "no ReLU"),
        (lambda: RELU_FREE, "shortcut", "block", "no block whose shortcut can be changed"),
        (lambda: RELU_FREE, "nonlinearity_position", "before_add", "no block whose nonlinearity can be moved"),
        (MODELS["birealnet18"], "shortcut", "block", "no block whose shortcut"),
        (MODELS["birealnet18"], "projection", "conv_norm_pool", "no block whose shortcut is a projection"),
        (MODELS["birealnet18"], "norm", nn.InstanceNorm2d, "no binary layer takes a norm"),
        (MODELS["wrn10_16"], "norm", None, "no binary layer takes a norm"),
    ],
)
def test_an_option_without_effect_is_an_error(make, option, value, why):
    scheme = BONN.configure({option: value, "clip": 0.5})
    model = make()
    before = list(model.modules())
    words = f"the option '{option}' of the scheme 'bonn' has no effect on {type(model).__name__}: .*{why}.*leave it out"
    with pytest.raises(InvalidRecipe, match=words):
        bonn_qat.binarize(model, scheme, inplace=True)
    assert list(model.modules()) == before
    bonn_qat.binarize(model, replace(BONN, **{option: scheme.__dict__[option]}))  # not asked for by a user: no error


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sequential", {"nonlinearity": "identity", "norm": nn.InstanceNorm2d, "latent_std": 0.5}),
        ("birealnet18", {"nonlinearity": "identity", "nonlinearity_position": "before_add"}),
        ("wrn10_16", {"nonlinearity": "identity", "shortcut": "block", "nonlinearity_position": "before_add"}),
        ("resnet10t", {"clip": 0.5, "granularity": "plane", "kernel": 0.0, "latent_std": 0.5}),
    ],
)
def test_an_option_with_an_effect_is_none(name, options):
    scheme = BONN.configure(options)
    assert scheme.given == options.keys()
    model = bonn_qat.binarize(MODELS[name](), scheme)
    assert model.binarization.scheme is scheme
    assert all(layer.input_quant.clip == scheme.activation(1).clip for _, layer in binary_layers(model))


def test_an_option_of_a_scheme_for_some_layers_counts_there():
    scheme = BONN.configure({"clip": 0.5})
    model = bonn_qat.binarize(small(), schemes={"3": scheme})
    assert [layer.input_quant.clip for _, layer in binary_layers(model)] == [0.5, 1.0]
    with pytest.raises(InvalidRecipe, match="the option 'clip' of the scheme 'bonn' has no effect on Sequential"):
        bonn_qat.binarize(small(), scheme, schemes={"*": BONN})


TAKES_A_MODEL = {
    "binarize": bonn_qat.binarize,
    "binary_layers": lambda model: list(binary_layers(model)),
    "pack": bonn_qat.pack,
    "summary": bonn_qat.summary,
    "diagnose": lambda model: bonn_qat.diagnose(model, torch.randn(2, 3, 8, 8)),
    "export": lambda model: bonn_qat.export(model, "net.pt2", "pt2"),
    "save": lambda model: bonn_qat.save(model, "net.safetensors"),
    "Objective": bonn_qat.Objective,
    "KernelLoss": bonn_qat.KernelLoss,
    "FeatureLoss": bonn_qat.FeatureLoss,
    "CenterLoss": bonn_qat.CenterLoss,
    "FlipRatio": bonn_qat.FlipRatio,
    "constrain_": bonn_qat.constrain_,
    "advance": lambda model: bonn_qat.advance(model, 0.5),
    "parameter_groups": lambda model: bonn_qat.parameter_groups(model, lr=0.1, weight_decay=0.0),
    "binary_parameters": lambda model: list(bonn_qat.binary_parameters(model)),
}


@pytest.mark.parametrize("name", TAKES_A_MODEL)
@pytest.mark.parametrize("wrong", ["resnet18", nn.Conv2d, None, torch.ones(3)], ids=["name", "class", "None", "tensor"])
def test_what_is_no_model_is_told(wrong, name):
    advice = "create it first: timm.create_model.'resnet18'." if wrong == "resnet18" else "give a torch.nn.Module"
    with pytest.raises(InvalidModel, match=f"this takes a model; got .*{advice}"):
        TAKES_A_MODEL[name](wrong)


def test_lazy_layers_are_told():
    with pytest.raises(InvalidModel, match="Sequential has lazy layers without weights yet; call it once"):
        bonn_qat.binarize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.LazyConv2d(8, 3), nn.LazyConv2d(8, 3)))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:FutureWarning")
def test_what_torchscript_made_has_nothing_to_binarize():
    with pytest.raises(InvalidModel, match=r"RecursiveScriptModule: 0 \(RecursiveScriptModule is neither"):
        bonn_qat.binarize(torch.jit.script(small()))


@pytest.mark.parametrize("wrong", [16, 16.0, "16", ("3", 8, 8), (3, 0, 8), torch.Size, {3, 8}])
def test_an_input_size_that_is_none_is_told(wrong):
    with pytest.raises(InvalidModel, match=r"input_size is \(C, H, W\), such as \(3, 224, 224\); got"):
        bonn_qat.binarize(small(), input_size=wrong)
