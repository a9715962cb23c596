"""Common operations on torch models, applied to binary networks of five kinds: each works as on a float network."""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bonn_qat
from bonn_qat.binarization.binarize import binary_layers
from bonn_qat.bonn import BONN
from bonn_qat.engine import operators
from bonn_qat.layers import binary_form

SIZE = (3, 32, 32)


class Mixed(nn.Module):
    """Binary layers of all kinds but Conv2d, on maps that are signals and volumes too."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.signal = nn.Conv2d(3, 8, 4, 4), nn.Conv1d(8, 8, 3, padding=1)
        self.volume, self.finer = nn.Conv3d(8, 8, 3, padding=1, groups=2), nn.ConvTranspose3d(8, 8, 3, 1, 1)
        self.up, self.longer = nn.ConvTranspose2d(8, 8, 3, 2, 1, 1, groups=2), nn.ConvTranspose1d(8, 8, 2, 2)
        self.act, self.head, self.saves = nn.ReLU(), nn.Linear(8, 10), False

    def set_grad_checkpointing(self, enable: bool) -> None:
        self.saves = enable

    def features(self, x: Tensor) -> Tensor:
        x = self.act(self.signal(x.flatten(2))).unflatten(2, (4, 4, 4))
        x = self.act(self.finer(self.volume(x))).flatten(3)[:, :, :, ::2]
        return self.longer(self.up(x).flatten(2)).mean(2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(checkpoint(self.features, x, use_reentrant=False) if self.saves else self.features(x))


NETS: dict[str, Callable[[], nn.Module]] = {
    "resnet": partial(
        timm.create_model, "resnet18", num_classes=10, layers=(1, 1, 1, 1), channels=(8, 8, 16, 16), stem_width=8
    ),
    "vit": partial(timm.create_model, "test_vit", num_classes=10, img_size=32, patch_size=8, depth=2),
    "efficientnet": partial(timm.create_model, "test_efficientnet", num_classes=10, pad_type="same"),
    "wrn": partial(timm.create_model, "wrn10_16", num_classes=10),
    "mixed": Mixed,
}
CONVOLUTIONAL = [name for name in NETS if name not in ("vit", "mixed")]
KINDS = {
    "vit": {"BinaryLinear"},
    "mixed": {"BinaryConv1d", "BinaryConv3d", *(f"BinaryConvTranspose{axes}d" for axes in (1, 2, 3))},
}
EVERY_NET = pytest.mark.parametrize("net", NETS)


@pytest.fixture(scope="module")
def trained() -> Callable[[str], nn.Module]:
    """A net after a few steps, so that no norm and no modulation is at its start; a new copy at each call."""
    made: dict[str, nn.Module] = {}

    def get(net: str) -> nn.Module:
        if net not in made:
            torch.manual_seed(1)
            made[net] = binarized(net)
            steps(made[net], 2)
        return copy.deepcopy(made[net])

    return get


def binarized(net: str) -> nn.Module:
    return bonn_qat.binarize(NETS[net](), input_size=SIZE)


def steps(model: nn.Module, count: int) -> None:
    objective = bonn_qat.Objective(model).train()
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.05)
    for _ in range(count):
        optimizer.zero_grad()
        objective(*batch()).total.backward()
        optimizer.step()
    optimizer.zero_grad()


def batch(count: int = 8) -> tuple[Tensor, Tensor]:
    return torch.randn(count, *SIZE), torch.randint(10, (count,))


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def latents(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.weight for name, layer in binary_layers(model)}


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@EVERY_NET
def test_the_nets_are_what_they_stand_for(net, trained):
    model = trained(net)
    kinds = {type(layer).__name__ for _, layer in binary_layers(model)}
    assert kinds == KINDS.get(net, {"BinaryConv2d"})
    assert len(latents(model)) >= 4


def test_one_of_the_nets_pads_as_tensorflow_does():
    assert any(type(module).__name__ == "Conv2dSame" for module in NETS["efficientnet"]().modules())


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    "net", [pytest.param(net, marks=[pytest.mark.slow] if net not in ("wrn", "mixed") else []) for net in NETS]
)
def test_it_compiles_without_a_break(net, training, trained):
    model, other = (trained(net).train(training) for _ in range(2))
    images, _ = batch()
    torch.compiler.reset()
    # The graph of the gradients and the statistics that a step writes are AOTAutograd's, the rest is Dynamo's.
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager" if training else "eager")
    for module in (model, compiled):
        module(images).square().sum().backward()
    torch.testing.assert_close(compiled(images), model(images))
    found, expected = gradients(other), gradients(model)
    assert found.keys() == expected.keys()
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():  # sums in another order; some gradients are zero but for rounding
        assert (found[name] - gradient).abs().max() <= 4e-6 * largest, name
    torch.testing.assert_close(state(other), state(model))


@pytest.mark.slow
def test_inductor_gives_the_same():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 2)
    )
    model = bonn_qat.binarize(net, input_size=(3, 8, 8))
    other = copy.deepcopy(model)
    images = torch.randn(4, 3, 8, 8)
    torch.compiler.reset()
    compiled = torch.compile(other, fullgraph=True)
    for module in (model, compiled):
        module(images).square().sum().backward()
    torch.testing.assert_close(gradients(other), gradients(model), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(compiled.eval()(images), model.eval()(images), rtol=1e-4, atol=1e-4)


LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@LOW
@EVERY_NET
def test_a_binary_layer_under_autocast_errs_by_its_rounding_alone(net, dtype, trained):
    # Signs are exact in both types and their sums are added up in float32; rounded, by half an eps, are the sum and
    # what it is scaled to, and backward the incoming gradient and the outgoing one. Whole nets cannot be compared so: a
    # share p of wrong signs makes an error of about 2 sqrt(p) in the sums, and that more wrong signs in the next layer.
    model = trained(net).eval()
    seen: dict[str, Tensor] = {}
    for name, layer in binary_layers(model):
        # Clones, because what follows may be computed in place.
        layer.register_forward_pre_hook(lambda _, inputs, name=name: seen.update({name: inputs[0].detach().clone()}))
    model(batch()[0])
    for name, layer in binary_layers(model):
        output = layer(seen[name])
        with torch.autocast("cpu", dtype):
            low = layer(seen[name])
        toward = torch.randn_like(output)
        (expected,) = torch.autograd.grad(output, layer.weight, toward)
        (grad,) = torch.autograd.grad(low.float(), layer.weight, toward)
        eps = torch.finfo(dtype).eps
        assert (low - output).abs().max() <= eps * output.abs().max(), name
        assert (grad - expected).norm() <= eps * expected.norm(), name


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("kernels", [True, False], ids=["kernels", "no kernels"])
@pytest.mark.parametrize("kind", ["convolution", "linear"])
def test_a_binary_layer_in_bfloat16_rounds_its_scaled_sums_once(kind, kernels, training, monkeypatch):
    monkeypatch.setattr(operators, "AVAILABLE", kernels and operators.AVAILABLE)
    float_layer = nn.Conv2d(512, 8, 3, padding=1) if kind == "convolution" else nn.Linear(4001, 8)
    layer = binary_form(float_layer, BONN, normalize=False).train(training)
    with torch.no_grad():
        layer.bias.zero_()
    value, scale = layer.weight_quant.quantize(layer.latent().detach())
    signs = torch.where(value >= 0, 1.0, -1.0).double()
    # Most inputs have the sign of the first kernel's weights, which makes its sums large.
    noisy = torch.rand((2, 512, 5, 5) if kind == "convolution" else (6, 4001)) - 0.1
    along = signs[0].sum((1, 2)).float()
    x = (noisy * (along[:, None, None] if kind == "convolution" else along)).requires_grad_()
    if kind == "convolution":
        sums = F.conv2d(torch.where(x >= 0, 1.0, -1.0).double(), signs, padding=1)
    else:
        sums = F.linear(torch.where(x >= 0, 1.0, -1.0).double(), signs.flatten(1))
    assert sums.abs().max() > 256  # from where bfloat16 holds only every second integer
    expected = (sums.float() * scale.abs().flatten().expand(8).reshape(-1, *[1] * (sums.ndim - 2))).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)
    y.float().sum().backward()
    assert x.grad.isfinite().all()


@LOW
@EVERY_NET
def test_autocast_trains(net, dtype, trained):
    objective = bonn_qat.Objective(trained(net))
    with torch.autocast("cpu", dtype):
        losses = objective(*batch())
    losses.total.backward()
    assert losses.total.isfinite()
    assert losses.total.dtype == torch.float32
    assert all(grad.isfinite().all() for grad in gradients(objective).values())
    assert all(weight.grad.any() for weight in latents(objective.model).values())


@pytest.mark.parametrize("net", CONVOLUTIONAL)
def test_channels_last_is_kept_and_changes_no_value(net, trained):
    model, other = trained(net), trained(net).to(memory_format=torch.channels_last)
    images, _ = batch()
    layouts: dict[str, bool] = {}
    for name, layer in binary_layers(other):
        layer.register_forward_hook(
            lambda _, inputs, output, name=name: layouts.update(
                {name: all(x.is_contiguous(memory_format=torch.channels_last) for x in (*inputs, output))}
            )
        )
    other(images.to(memory_format=torch.channels_last)).square().sum().backward()
    model(images).square().sum().backward()
    assert layouts == dict.fromkeys(latents(model), True)
    torch.testing.assert_close(state(other), state(model))
    torch.testing.assert_close(gradients(other), gradients(model), rtol=1e-4, atol=1e-4)


@EVERY_NET
def test_accumulated_gradients_are_those_of_the_whole_batch(net, trained):
    # In evaluation mode: in training each part would be normalized by its own statistics, in float as well, and would
    # move the centres of the feature loss.
    whole, parts = (bonn_qat.Objective(trained(net)).eval() for _ in range(2))
    images, targets = batch(8)
    whole(images, targets).total.backward()
    for part in zip(images.chunk(4), targets.chunk(4), strict=True):
        (parts(*part).total / 4).backward()
    torch.testing.assert_close(gradients(parts), gradients(whole), rtol=1e-4, atol=1e-5)


@EVERY_NET
def test_checkpointed_gradients_are_the_same(net, trained):
    plain, saving = (bonn_qat.Objective(trained(net)) for _ in range(2))
    saving.model.set_grad_checkpointing(True)
    images, targets = batch()
    results = []
    for objective in (plain, saving):
        losses = objective(images, targets)
        losses.total.backward()
        results.append((losses.total.detach(), gradients(objective)))
    torch.testing.assert_close(results[1], results[0])


@EVERY_NET
def test_an_average_of_the_weights_averages_latents_and_quantizers(net, trained):
    model = trained(net)
    ema = ModelEmaV3(model, decay=0.75)
    before = state(model)
    steps(model, 1)
    ema.update(model)
    after = model.state_dict()
    for name, average in ema.module.state_dict().items():
        if average.is_floating_point():
            torch.testing.assert_close(average, 0.75 * before[name] + 0.25 * after[name], msg=name)
    assert all(not torch.equal(before[f"{name}.weight"], after[f"{name}.weight"]) for name in latents(model))
    images, _ = batch()
    expected = ema.module(images)  # in evaluation mode, as ModelEmaV3 sets it
    restored = binarized(net).eval()
    restored.load_state_dict(ema.module.state_dict())
    torch.testing.assert_close(restored(images), expected, rtol=0, atol=0)


@EVERY_NET
def test_a_deep_copy_is_equal_and_independent(net, trained):
    model = trained(net)
    other = copy.deepcopy(model)
    images, _ = batch()
    assert torch.equal(other.eval()(images), model.eval()(images))
    before = state(model)
    steps(other, 1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(not torch.equal(weight, before[f"{name}.weight"]) for name, weight in latents(other).items())
    assert not gradients(model)


@EVERY_NET
def test_safetensors_hold_the_model(net, trained, tmp_path: Path):
    model = trained(net).eval()
    file = tmp_path / "model.safetensors"
    safetensors.torch.save_file(model.state_dict(), file)
    fresh = binarized(net).eval()
    images, _ = batch()
    assert not torch.equal(fresh(images), model(images))
    fresh.load_state_dict(safetensors.torch.load_file(file))
    assert torch.equal(fresh(images), model(images))


@EVERY_NET
def test_a_model_without_memory_gets_its_values_from_a_state_dict(net, trained):
    model = trained(net).eval()
    with torch.device("meta"):
        empty = NETS[net]()
    empty = bonn_qat.binarize(empty, input_size=SIZE).eval()
    assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}
    assert empty.binarization.binary == model.binarization.binary
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    images, _ = batch()
    assert torch.equal(empty(images), model(images))
