"""The adapter for Brevitas: one test per trap that its host sets."""

import copy
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bonn_qat import BonnQatError, FeatureLoss, KernelLoss, Objective, binarize
from bonn_qat.bonn import BONN
from bonn_qat.errors import InvalidModel, UnknownName
from bonn_qat.layers import BinaryConv2d, BinaryLinear
from bonn_qat.quantizers import ApproxSign, BonnWeight, SteSign
from bonn_qat.scheme import PReLU, Scheme

qnn = pytest.importorskip("brevitas.nn")
adapter = pytest.importorskip("bonn_qat.adapters.brevitas")

import brevitas.config  # noqa: E402
from brevitas.proxy import ActQuantProxyFromInjector, WeightQuantProxyFromInjector  # noqa: E402
from brevitas.quant import SignedBinaryActPerTensorConst, SignedBinaryWeightPerTensorConst  # noqa: E402

WEIGHT = adapter.SignedBinaryBonnWeightPerTensorFloat
ACT = adapter.SignedBinaryBonnActPerTensorConst


class FloatNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.sign: nn.Module = nn.Identity()
        self.conv: nn.Module = nn.Conv2d(6, 4, 3, padding=1, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(self.sign(self.norm(self.stem(x)))).mean((2, 3)))


class Net(FloatNet):
    def __init__(self, weight: Any = WEIGHT, act: Any = ACT, **kwargs: Any) -> None:
        super().__init__()
        self.sign = qnn.QuantIdentity(act_quant=act)
        self.conv = qnn.QuantConv2d(6, 4, 3, padding=1, bias=False, weight_quant=weight, **kwargs)


def quantizer(net: nn.Module) -> BonnWeight:
    return net.get_submodule("conv.weight_quant.tensor_quant")  # type: ignore[return-value]


def images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 5, 5, generator=torch.Generator().manual_seed(0))


def test_importing_the_package_leaves_brevitas_unloaded(run_scripts, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys, bonn_qat; sys.exit('brevitas' in sys.modules)")
    (done,) = run_scripts([str(script)], cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_tensor_quantizers_are_the_package_s_in_brevitas_own_proxies() -> None:
    net = Net()
    assert type(quantizer(net)) is BonnWeight
    assert type(net.conv.weight_quant) is WeightQuantProxyFromInjector
    assert type(net.sign.act_quant) is ActQuantProxyFromInjector
    assert type(net.sign.act_quant.fused_activation_quant_proxy.tensor_quant) is SteSign


@pytest.mark.parametrize(
    ("layer", "x"),
    [(lambda **k: qnn.QuantConv2d(4, 6, 3, **k), (2, 4, 5, 5)), (lambda **k: qnn.QuantLinear(8, 5, **k), (2, 8))],
    ids=["conv", "linear"],
)
def test_weights_are_a_binary_quant_tensor_and_the_latents_stay(layer: Any, x: tuple[int, ...]) -> None:
    layer = layer(bias=False, weight_quant=WEIGHT)
    with torch.no_grad():
        layer.weight.mul_(20)
    latent = layer.weight.detach().clone()
    weight = layer.quant_weight()
    assert (weight.bit_width, weight.signed, weight.zero_point, weight.is_valid) == (1, True, 0, True)
    assert weight.scale.shape == ()
    assert weight.int().unique().tolist() == [-1, 1]
    torch.testing.assert_close(weight.int() * weight.scale, weight.value)
    layer(torch.randn(x)).square().sum().backward()
    assert layer.weight.grad is not None
    assert layer.weight_quant.tensor_quant.modulation.grad is not None
    assert torch.equal(layer.weight, latent)


def test_integers_come_out_of_a_layer_with_binary_inputs_and_weights() -> None:
    conv = qnn.QuantConv2d(
        16, 4, 3, bias=False, weight_quant=WEIGHT, input_quant=ACT, bias_quant=None, return_quant_tensor=True
    )
    out = conv(torch.randn(2, 16, 5, 5))
    assert out.bit_width == 8
    torch.testing.assert_close((out.value / out.scale).round().int(), out.int().int())


def test_activations_are_signs_with_a_masked_gradient() -> None:
    x = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0], requires_grad=True)
    y = qnn.QuantIdentity(act_quant=ACT, return_quant_tensor=True)(x)
    assert y.value.tolist() == [-1, -1, -1, 1, 1, 1, 1]
    assert (y.bit_width, y.scale, y.signed, y.is_valid) == (1, 1, True, True)
    y.value.sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 0]


def test_gradients_are_those_of_the_binary_layer() -> None:
    ours = BinaryConv2d.from_float(nn.Conv2d(6, 4, 3, stride=2, padding=1), BONN, normalize=False)
    theirs = qnn.QuantConv2d(6, 4, 3, stride=2, padding=1, weight_quant=WEIGHT, input_quant=ACT, bias_quant=None)
    theirs.load_state_dict({"weight": ours.weight, "bias": ours.bias})
    results = []
    for layer in (ours, theirs):
        x = torch.randn(2, 6, 7, 7, generator=torch.Generator().manual_seed(1), requires_grad=True)
        y = layer(x)
        y.square().sum().backward()
        results.append((y, x.grad, layer.weight.grad, layer.weight_quant.get_parameter(_path(layer)).grad))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)


def _path(layer: nn.Module) -> str:
    return "modulation" if isinstance(layer, BinaryConv2d) else "tensor_quant.modulation"


def test_the_state_dict_is_complete_from_construction_on() -> None:
    net = Net()
    before = set(net.state_dict())
    net(images()).sum().backward()
    assert set(net.state_dict()) == before
    assert "conv.weight_quant.tensor_quant.modulation" in before


def test_a_float_state_dict_loads_strictly_and_the_parameters_keep_their_identity() -> None:
    net, float_net = Net(), FloatNet()
    parameter, value = quantizer(net).modulation, quantizer(net).modulation.detach().clone()
    net.load_state_dict(float_net.state_dict())
    assert quantizer(net).modulation is parameter
    assert not torch.equal(parameter, value)
    torch.testing.assert_close(parameter[0, 0, 0, 0], float_net.conv.weight.abs().mean())


def test_a_complete_state_dict_is_restored_exactly() -> None:
    net, other = Net().eval(), Net()
    parameter = quantizer(net).modulation
    with torch.no_grad():
        quantizer(other).modulation.uniform_()
    net.load_state_dict(other.state_dict())
    assert quantizer(net).modulation is parameter
    assert torch.equal(parameter, quantizer(other).modulation)
    assert not any(module.training for module in net.modules())


def test_loading_without_the_weight_leaves_the_quantizer() -> None:
    net = Net()
    with torch.no_grad():
        quantizer(net).modulation.fill_(7)
    net.load_state_dict({"head.bias": torch.zeros(3)}, strict=False)
    assert quantizer(net).modulation.unique().tolist() == [7]


def test_a_missing_weight_is_still_an_error() -> None:
    state = FloatNet().state_dict()
    del state["conv.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*conv\.weight"):
        Net().load_state_dict(state)


def test_the_optimizer_stays_valid_over_loading() -> None:
    net = Net()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    net.load_state_dict(FloatNet().state_dict())
    before = quantizer(net).modulation.detach().clone()
    net(images()).square().sum().backward()
    optimizer.step()
    assert not torch.equal(quantizer(net).modulation, before)


def test_a_deep_copy_has_its_own_quantizer_that_survives_loading() -> None:
    net = Net()
    original = quantizer(net).modulation.detach().clone()
    twin = copy.deepcopy(net)
    parameter = quantizer(twin).modulation
    assert parameter is not quantizer(net).modulation
    twin.load_state_dict(FloatNet().state_dict())
    assert quantizer(twin).modulation is parameter
    assert torch.equal(quantizer(net).modulation, original)
    twin.conv.weight = nn.Parameter(torch.full_like(twin.conv.weight, 0.25))  # type: ignore[arg-type]
    assert quantizer(twin).modulation.unique().tolist() == [0.25]
    assert torch.equal(quantizer(net).modulation, original)


def test_a_new_weight_gives_new_values() -> None:
    net = Net()
    net.conv.weight = nn.Parameter(torch.full_like(net.conv.weight, 0.5))  # type: ignore[arg-type]
    assert quantizer(net).modulation.unique().tolist() == [0.5]


def test_options_of_the_weight_quantizer_are_keywords_of_the_layer() -> None:
    net = Net(weight_granularity="plane")
    assert quantizer(net).modulation.shape == (1, 1, 3, 3)
    net.load_state_dict(FloatNet().state_dict())
    assert quantizer(copy.deepcopy(net)).modulation.shape == (1, 1, 3, 3)
    with pytest.raises(TypeError, match="granularty"):
        Net(weight_granularty="plane")


def test_transposed_convolutions_are_refused() -> None:
    with pytest.raises(InvalidModel, match="QuantConvTranspose2d"):
        qnn.QuantConvTranspose2d(4, 6, 3, weight_quant=WEIGHT)


class _Ternary(ApproxSign.__base__):  # type: ignore[misc, name-defined]
    bits = 2

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.sign(), x.new_ones(())


class _TwoBases(BonnWeight.__base__):  # type: ignore[misc, name-defined]
    scaled_sign = False

    def __init__(self, weight: Tensor) -> None:
        super().__init__()

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x.new_ones(())


def test_what_is_not_1_bit_is_refused() -> None:
    scheme = Scheme(name="odd", title="Odd", reference="none", weight=_TwoBases, activation=_Ternary)
    with pytest.raises(InvalidModel, match="activations of the scheme 'odd' have 2 bits"):
        qnn.QuantIdentity(act_quant=adapter.activation_quantizer(scheme))
    with pytest.raises(InvalidModel, match="weights of the scheme 'odd' are not a scale times a sign"):
        qnn.QuantConv2d(3, 4, 3, weight_quant=adapter.weight_quantizer(scheme))


def test_brevitas_jit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(brevitas.config, "JIT_ENABLED", True)
    with pytest.raises(BonnQatError, match="BREVITAS_JIT"):
        qnn.QuantIdentity(act_quant=ACT)


class _LearnedSign(ApproxSign.__base__):  # type: ignore[misc, name-defined]
    def __init__(self, channels: int = 1) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(()))

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(x >= self.shift, 1.0, -1.0) + 0 * self.shift, x.new_ones(())


OTHER = Scheme(name="my_own", title="Other", reference="none", weight=BonnWeight, activation=_LearnedSign)
FLOAT = Scheme(name="float", title="Float", reference="none", weight=None, activation=None)


def test_any_scheme_becomes_a_pair_of_quantizers() -> None:
    assert type(quantizer(Net(adapter.weight_quantizer("bonn"), adapter.activation_quantizer("bonn")))) is BonnWeight
    assert adapter.weight_quantizer(OTHER).__name__ == "SignedBinaryMyOwnWeight"
    net = Net(adapter.weight_quantizer(OTHER), adapter.activation_quantizer(OTHER))
    key = "sign.act_quant.fused_activation_quant_proxy.tensor_quant.shift"
    shift = net.get_parameter(key)
    net.load_state_dict(FloatNet().state_dict())
    assert net.get_parameter(key) is shift
    net.load_state_dict(net.state_dict() | {key: torch.tensor(0.5)})
    assert (net.get_parameter(key) is shift, shift.item()) == (True, 0.5)
    twin = copy.deepcopy(net)
    twin.load_state_dict(FloatNet().state_dict())
    assert twin.get_parameter(key) is not shift


def test_a_scheme_that_leaves_things_float_has_no_quantizer() -> None:
    for function in (adapter.weight_quantizer, adapter.activation_quantizer, adapter.layer_map):
        with pytest.raises(InvalidModel, match="'float' leaves"):
            function(FLOAT)
    with pytest.raises(UnknownName, match="nope"):
        adapter.layer_map("nope")


@pytest.mark.filterwarnings("ignore:brevitas.fx is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:fast_hadamard_transform package not found:UserWarning")
def test_layerwise_quantize_takes_the_layer_map() -> None:
    quantize = pytest.importorskip("brevitas.graph.quantize")
    float_net = FloatNet()
    net = quantize.layerwise_quantize(
        copy.deepcopy(float_net), compute_layer_map=adapter.layer_map("bonn"), name_blacklist=["stem"]
    )
    assert type(net.stem) is nn.Conv2d
    assert torch.equal(net.conv.weight, float_net.conv.weight)
    torch.testing.assert_close(quantizer(net).modulation[0, 0, 0, 0], float_net.conv.weight.abs().mean())
    net(images()).sum().backward()
    net.load_state_dict(float_net.state_dict())


QUIET = pytest.mark.filterwarnings(
    "ignore:brevitas.fx is deprecated:DeprecationWarning",
    "ignore:fast_hadamard_transform package not found:UserWarning",
)


@QUIET
def test_the_layer_map_takes_linear_layers_and_relus() -> None:
    quantize = pytest.importorskip("brevitas.graph.quantize")
    float_net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(54, 8), nn.ReLU6(), nn.Linear(8, 3)
    )
    net = quantize.layerwise_quantize(copy.deepcopy(float_net), adapter.layer_map("bonn"), name_blacklist=["0", "5"])
    assert [type(layer) for layer in net] == [nn.Conv2d, PReLU, nn.Flatten, qnn.QuantLinear, PReLU, nn.Linear]
    assert torch.equal(net[3].weight, float_net[3].weight)
    with torch.no_grad():
        net[1].weight.fill_(0.5)
    net.load_state_dict(float_net.state_dict())
    assert net[1].weight.item() == 0.5
    net(images()).sum().backward()
    assert net[1].weight.grad is not None
    plain = dataclasses.replace(BONN, nonlinearity=None)
    assert set(adapter.layer_map(plain)) == {nn.Conv2d, nn.Linear}


class Mixed(nn.Module):
    """A sign of its own, input quantizers, a linear layer on four axes, a layer at two places, one of Brevitas' own."""

    def __init__(self, scheme: str | Scheme = "bonn", **kwargs: Any) -> None:
        super().__init__()
        weight, act = adapter.weight_quantizer(scheme), adapter.activation_quantizer(scheme)
        self.stem = qnn.QuantConv2d(3, 6, 3, padding=1)
        self.sign = qnn.QuantIdentity(act_quant=act)
        self.conv = qnn.QuantConv2d(
            6, 6, 3, stride=2, padding=1, groups=2, weight_quant=weight, bias_quant=None, **kwargs
        )
        self.linear = qnn.QuantLinear(6, 6, bias=True, weight_quant=weight, input_quant=act, bias_quant=None)
        self.again = self.linear
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.sign(self.stem(x))).movedim(1, -1)
        return self.head(self.again(self.linear(y)).mean((1, 2)))


@pytest.mark.parametrize("scheme", [BONN, OTHER], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("training", [True, False])
def test_from_brevitas_gives_the_same_outputs_and_gradients(scheme: Scheme, training: bool) -> None:
    theirs = Mixed(scheme).train(training)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += 0.1 * torch.rand_like(parameter)
    ours = adapter.from_brevitas(theirs)
    assert [type(m) for m in (ours.stem, ours.conv, ours.linear)] == [qnn.QuantConv2d, BinaryConv2d, BinaryLinear]
    assert ours.again is ours.linear
    assert ours.binarization.binary == ("conv", "linear")
    assert ours.binarization.kept == dict.fromkeys(("stem", "head"), "not binary in Brevitas")
    assert ours.binarization.scheme is scheme
    results = []
    for net in (theirs, ours):
        y = net(images(4))
        y.square().sum().backward()
        results.append((y, net.stem.weight.grad, net.conv.weight.grad, net.linear.weight.grad, net.linear.bias.grad))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other)


def test_from_brevitas_takes_over_options_and_parameters() -> None:
    theirs = Mixed(weight_granularity="plane")
    with torch.no_grad():
        theirs.conv.weight_quant.tensor_quant.modulation.uniform_()
        theirs.linear.weight_quant.tensor_quant.modulation.uniform_()
    ours = adapter.from_brevitas(theirs)
    assert ours.conv.weight_quant.modulation.shape == (1, 1, 3, 3)
    assert torch.equal(ours.conv.weight_quant.modulation, theirs.conv.weight_quant.tensor_quant.modulation)
    assert torch.equal(
        ours.linear.weight_quant.modulation.flatten(), theirs.linear.weight_quant.tensor_quant.modulation.flatten()
    )
    assert Objective(ours).regularizers.keys() == {"kernel", "feature"}
    assert torch.equal(KernelLoss(ours)(), KernelLoss(theirs)())


@QUIET
def test_there_and_back_is_the_float_model_binarized_without_norms() -> None:
    quantize = pytest.importorskip("brevitas.graph.quantize")
    float_net = FloatNet()
    net = quantize.layerwise_quantize(
        copy.deepcopy(float_net), adapter.layer_map("bonn"), name_blacklist=["stem", "head"]
    )
    bare = dataclasses.replace(BONN, norm=None, latent_std=None)
    expected = binarize(float_net, bare)
    x = images().contiguous(memory_format=torch.channels_last)  # in which the float layers round alike
    assert torch.equal(adapter.from_brevitas(net).eval()(x), expected.eval()(x))


def test_what_a_layer_of_ours_cannot_have_is_told() -> None:
    with pytest.raises(InvalidModel, match="FloatNet has no Brevitas layer"):
        adapter.from_brevitas(FloatNet())
    with pytest.raises(InvalidModel, match="Net has no Brevitas layer"):
        adapter.from_brevitas(Net(SignedBinaryWeightPerTensorConst, SignedBinaryActPerTensorConst))
    eight_bits = qnn.QuantReLU().act_quant.quant_injector
    for part in ("input_quant", "output_quant"):
        net = Net(**{part: eight_bits})
        with pytest.raises(InvalidModel, match=f"conv: the {part} of this QuantConv2d has no counterpart"):
            adapter.from_brevitas(net)


def test_the_kernel_loss_is_used_as_brevitas_own_losses() -> None:
    net = Net()
    loss = adapter.BonnKernelLoss(net, reg_coeff=0.25, nu=1e-2)
    expected = 0.25 * KernelLoss(net, weight=1.0, nu=1e-2)()
    net(images())
    assert torch.equal(loss.retrieve(), expected)
    assert torch.equal(loss.log(), expected)
    assert not loss.log().requires_grad
    net(images())
    torch.testing.assert_close(loss.retrieve(), 2 * expected)
    loss.retrieve().backward()
    assert quantizer(net).modulation.grad is not None
    assert loss.loss.mu.grad is not None
    loss.zero_accumulated_values()
    net.eval()(images())
    with torch.no_grad():
        net.train()(images())
    assert loss.retrieve() == 0
    with pytest.raises(InvalidModel, match="no binary weights"):
        adapter.BonnKernelLoss(FloatNet())


def test_without_quant_tensors_the_model_compiles_whole() -> None:
    net = adapter.skip_quant_tensors(Net())
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images()), net(images()))


def test_without_quant_tensors_the_model_exports() -> None:
    net = adapter.skip_quant_tensors(Net().eval())
    exported = torch.export.export(net, (images(),)).module()
    torch.testing.assert_close(exported(images()), net(images()))
    adapter.skip_quant_tensors(net, False)
    assert net.conv.quant_weight().bit_width == 1


@pytest.mark.parametrize(
    ("weight", "act"), [(WEIGHT, ACT), (SignedBinaryWeightPerTensorConst, SignedBinaryActPerTensorConst)]
)
def test_the_losses_see_brevitas_layers(weight: Any, act: Any) -> None:
    net = Net(weight, act)
    latent = net.conv.weight.detach().clone().mul_(30)
    net.conv.weight.data.copy_(latent)  # type: ignore[operator, union-attr]
    kernel, feature = KernelLoss(net, weight=1.0), FeatureLoss(net)
    value = kernel()
    assert torch.equal(net.conv.weight, latent)  # type: ignore[arg-type]
    targets = torch.tensor([0, 1])
    loss = nn.functional.cross_entropy(net(images()), targets) + value + feature(targets)
    loss.backward()
    for parameter in (*net.parameters(), *kernel.parameters(), *feature.parameters()):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


@pytest.mark.parametrize("weight", [WEIGHT, SignedBinaryWeightPerTensorConst])
def test_the_kernel_loss_uses_the_quantizer_in_place_after_loading(weight: Any) -> None:
    net = Net(weight)
    kernel = KernelLoss(net, weight=1.0)
    net.load_state_dict(FloatNet().state_dict())
    fresh = KernelLoss(net, weight=1.0)
    fresh.load_state_dict(kernel.state_dict())
    assert torch.equal(kernel(), fresh())


def test_other_bit_widths_are_not_binary() -> None:
    with pytest.raises(InvalidModel, match="no binary weights"):
        KernelLoss(nn.Sequential(qnn.QuantConv2d(3, 4, 3), qnn.QuantLinear(4, 4, bias=True, weight_quant=None)))


@pytest.mark.filterwarnings("ignore")
def test_qonnx_export_has_a_bipolar_node_for_each_sign(tmp_path: Any) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxoptimizer")
    export = pytest.importorskip("brevitas.export")
    path = tmp_path / "net.onnx"
    try:
        export.export_qonnx(Net().eval(), args=images(), export_path=str(path), dynamo=False)
    finally:
        # A failed export leaves Brevitas in its export mode.
        brevitas.config._ONGOING_EXPORT = None
    nodes = [node.op_type for node in onnx.load(str(path)).graph.node]
    assert nodes.count("BipolarQuant") == 2
