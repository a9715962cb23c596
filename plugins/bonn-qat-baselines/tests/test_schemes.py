"""What holds for every scheme: it is found by its entry point, named in ``binarize``, trained, kept and compiled."""

import copy
import importlib.metadata
import pickle

import pytest
import timm
import torch
from torch import Tensor, nn

import bonn_qat
from bonn_qat import Recipe, Scheme, plugins

FILES = {
    "float": ("float",),
    "bnn": ("bnn",),
    "bwn": ("bwn",),
    "xnor": ("xnor",),
    "dorefa": ("dorefa",),
    "tbn": ("tbn",),
    "abcnet": ("abcnet", "abcnet-5-5"),
    "bireal": ("bireal", "bireal-staged"),
    "pcnn": ("pcnn",),
    "mcn": ("mcn",),
    "reactnet": ("reactnet",),
    "bonn-plus": ("bonn-plus",),
    "irnet": ("irnet",),
    "recu": ("recu",),
    "adabin": ("adabin",),
}
SCHEMES = [name for names in FILES.values() for name in names]
QUANTIZED = [
    *(name for name in SCHEMES if name != "float"),
    "bnn:activations=stochastic+gradient=clipped",
    "xnor:centre=true+gradient=printed+input_scale=true",
    "dorefa:weight_bits=2+activation_bits=2+gradient_bits=6",
    "tbn:variant=tbnv2",
    "bireal:gradient=clipped",
    "pcnn:projections=3",
    "mcn:centres=sign+modulation=mean",
    "adabin:centre=code",
]


@pytest.fixture(scope="module")
def pm():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BONN_QAT_PLUGINS", ",".join(f"baselines.{name}" for name in FILES))
        return plugins.create_manager()


def scheme_of(variant: str, pm) -> Scheme:
    recipe = Recipe().with_scheme(variant)
    return plugins.find_scheme(recipe.scheme, pm).configure(recipe.scheme_options)


def test_a_nonlinearity_keeps_the_dtype_of_a_map(pm):
    # As under autocast: parameters in float32, which must not make the next layers' maps twice as large.
    makes = {name: plugins.find_scheme(name, pm).nonlinearity for name in SCHEMES}
    maps = [torch.randn(shape).bfloat16() for shape in ((2, 4, 3, 3), (2, 4))]
    found = {name: {make(4)(x).dtype for x in maps} for name, make in makes.items() if make is not None}
    assert {"reactnet", "adabin"} <= found.keys()
    assert all(dtypes == {torch.bfloat16} for dtypes in found.values()), found


@pytest.mark.parametrize("file", FILES)
def test_the_schemes_of_a_file_are_found_by_its_entry_point(pm, file):
    (entry,) = importlib.metadata.entry_points(group="bonn_qat", name=f"baselines.{file}")
    assert tuple(scheme.name for scheme in entry.load().bonn_qat_schemes()) == FILES[file]
    for name in FILES[file]:
        scheme = plugins.schemes(pm)[name]
        assert scheme.title
        assert scheme.reference


def test_every_entry_point_is_tested():
    installed = {entry.name for entry in importlib.metadata.entry_points(group="bonn_qat")}
    assert {f"baselines.{name}" for name in FILES} == {name for name in installed if name.startswith("baselines.")}


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
        if "conv" in key and key.endswith("weight"):
            # A BatchNorm's weight before another BatchNorm and a sign has no say, hence no gradient.
            assert not torch.equal(parameter, before[key]) or ".norm." in key, key


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


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(96, 2)
    ).double()


def trained(net: nn.Module, scheme: Scheme) -> nn.Module:
    """``net`` under ``scheme``, after two steps that move everything that it learns."""
    model = bonn_qat.binarize(net, scheme).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        model(images()).square().mean().backward()
        optimizer.step()
    bonn_qat.advance(model, 0.5)
    return model


def images() -> Tensor:
    return torch.randn(4, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("variant", QUANTIZED)
def test_a_state_dict_restores_a_network_and_holds_no_schedule(pm, variant):
    scheme = scheme_of(variant, pm)
    model, fresh = trained(network(0), scheme).eval(), bonn_qat.binarize(network(1), scheme).eval()
    assert not torch.equal(fresh(images()), model(images()))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(images()), model(images()))
    bonn_qat.advance(fresh, 0.9)
    assert torch.equal(fresh(images()), model(images()))  # a schedule is of the backward pass
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("variant", QUANTIZED)
def test_a_float_checkpoint_starts_anew_whatever_was_learned_before(pm, variant):
    scheme, donor = scheme_of(variant, pm), network(1)
    model, expected = trained(network(0), scheme), bonn_qat.binarize(donor, scheme).state_dict()
    learned = {key for key, _ in model[2].weight_quant.named_parameters()}
    assert all(not torch.equal(model.state_dict()[k := f"2.weight_quant.{key}"], expected[k]) for key in learned)
    model.load_state_dict(donor.state_dict())
    assert model.state_dict().keys() == expected.keys()
    for key, value in model.state_dict().items():
        assert torch.equal(value, expected[key]), key


@pytest.mark.parametrize("name", ["bonn-plus", "reactnet", "adabin"])
def test_nonlinearities_start_as_the_scheme_makes_them(pm, name):
    scheme, donor = scheme_of(name, pm), network(0)
    model, restored = bonn_qat.binarize(donor, scheme), bonn_qat.binarize(network(1), scheme)
    restored.load_state_dict(donor.state_dict())
    made = {key: set(value.tolist()) for key, value in scheme.nonlinearity(1).double().state_dict().items()}
    for nonlinearity in (model[1], model[3], restored[1], restored[3]):
        assert {key: set(value.tolist()) for key, value in nonlinearity.state_dict().items()} == made
    assert model.binarization.revived == ()


@pytest.mark.parametrize("variant", QUANTIZED)
def test_a_network_is_copied_and_pickled_with_all_that_it_computes_with(pm, variant):
    model = trained(network(0), scheme_of(variant, pm))
    layer, x = model[2], torch.randn(2, 4, 4, 4, dtype=torch.float64)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert run(other, x, compiled=False) == run(copy.deepcopy(layer), x, compiled=False)


@pytest.mark.parametrize("variant", QUANTIZED)
def test_a_layer_and_its_nonlinearity_compile_whole_with_the_same_values_and_gradients(pm, variant):
    part = trained(network(0), scheme_of(variant, pm))[2:4]
    torch.compiler.reset()
    x = torch.randn(2, 4, 4, 4, dtype=torch.float64)
    eager, compiled = (run(copy.deepcopy(part), x, compiled=flag) for flag in (False, True))
    assert eager.keys() == compiled.keys()
    for key in eager:
        torch.testing.assert_close(torch.tensor(compiled[key]), torch.tensor(eager[key]), rtol=1e-12, atol=1e-12)


def run(part: nn.Module, x: Tensor, *, compiled: bool) -> dict[str, list[float]]:
    """Output and every gradient of ``part`` for ``x``, random numbers being the same."""
    x = x.clone().requires_grad_()
    part.zero_grad()
    torch.manual_seed(7)
    y = (torch.compile(part, backend="eager", fullgraph=True) if compiled else part)(x)
    y.square().sum().backward()
    gradients = {name: p.grad.flatten().tolist() for name, p in part.named_parameters() if p.grad is not None}
    return {"y": y.flatten().tolist(), "x": x.grad.flatten().tolist(), **gradients}
