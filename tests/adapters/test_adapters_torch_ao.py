"""The adapter for torch.ao: a QConfig gives binarize's layers beside torch.ao's own; the deprecation warns once."""

import importlib
import sys
import warnings
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import bonn_qat
from bonn_qat.binarization.binarize import binary_layers
from bonn_qat.errors import InvalidModel, UnknownName
from bonn_qat.layers import BinaryConv2d

ao = pytest.importorskip("torch.ao.quantization")
timm = pytest.importorskip("timm")
adapter = pytest.importorskip("bonn_qat.adapters.torch_ao")


@pytest.fixture(autouse=True)
def _warned() -> Iterator[None]:
    adapter._warn_once.cache_clear()
    with pytest.warns(DeprecationWarning, match="in new code use"):
        adapter._warn_once()
    yield
    adapter._warn_once.cache_clear()


@pytest.fixture
def model() -> nn.Module:
    return timm.create_model("test_resnet", num_classes=5)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32)


def test_the_layers_are_those_of_binarize(model: nn.Module, images: Tensor) -> None:
    expected = bonn_qat.binarize(model, "xnor", skip=("layer1.*",), include=("fc",))
    adapter.assign_qconfig(model, "xnor", skip=("layer1.*",), include=("fc",))
    prepared = adapter.prepare_qat(model)
    state, wanted = prepared.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key]) for key in state)
    assert torch.equal(prepared(images), expected(images))
    layouts = [(name, layer.any_layout) for name, layer in binary_layers(prepared)]
    assert layouts == [(name, layer.any_layout) for name, layer in binary_layers(expected)]
    assert dict(layouts) == {name: name != "fc" for name, _ in layouts}
    assert [name for name, _ in binary_layers(model)] == []  # a copy was prepared


def test_single_layers_have_schemes_of_their_own(model: nn.Module) -> None:
    adapter.assign_qconfig(model, schemes={"layer2.*": "xnor"})
    expected = bonn_qat.binarize(model, schemes={"layer2.*": "xnor"})
    prepared = adapter.prepare_qat(model, inplace=True)
    assert prepared is model
    assert {n: type(layer.weight_quant) for n, layer in binary_layers(prepared)} == {
        n: type(layer.weight_quant) for n, layer in binary_layers(expected)
    }


def test_inputs_and_weights_are_binary_and_learn(model: nn.Module, images: Tensor) -> None:
    adapter.assign_qconfig(model)
    prepared = adapter.prepare_qat(model)
    layer = prepared.layer2[0].conv1
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(
        lambda _, args: seen.append(layer.input_quant.quantize(layer.norm(args[0]))[0])
    )
    prepared(images).square().sum().backward()
    handle.remove()
    assert set(seen[0].unique().tolist()) == {-1, 1}
    assert set(layer.weight_quant.quantize(layer.latent())[0].sign().unique().tolist()) == {-1, 1}
    assert layer.weight.grad.any()
    assert layer.weight_quant.modulation.grad.any()


@pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning")  # torch.ao's own observers
def test_other_layers_keep_the_qconfig_that_they_have(model: nn.Module) -> None:
    model.layer1[0].conv1.qconfig = None
    model.layer1[0].conv2.qconfig = eight_bits = ao.get_default_qat_qconfig()
    adapter.assign_qconfig(model)
    prepared = adapter.prepare_qat(model)
    first, second = prepared.layer1[0].conv1, prepared.layer1[0].conv2
    assert type(first) is nn.Conv2d
    assert type(second) is ao.get_default_qat_module_mappings()[nn.Conv2d]
    assert type(second.weight_fake_quant) is type(eight_bits.weight())
    assert type(prepared.layer2[0].conv1) is BinaryConv2d


def test_hooks_of_a_layer_run_once(model: nn.Module, images: Tensor) -> None:
    calls: list[str] = []
    model.layer2[0].conv1.register_forward_pre_hook(lambda *_: calls.append("before"))
    model.layer2[0].conv1.register_forward_hook(lambda *_: calls.append("after"))
    adapter.assign_qconfig(model)
    calls.clear()
    adapter.prepare_qat(model)(images)
    assert calls == ["before", "after"]


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
def test_torch_ao_s_convert_leaves_the_layers_as_they_are(model: nn.Module, images: Tensor) -> None:
    adapter.assign_qconfig(model)
    prepared = adapter.prepare_qat(model).eval()
    expected = prepared(images)
    assert torch.equal(ao.convert(prepared)(images), expected)


def test_the_deprecation_is_told_once_and_torch_s_own_words_are_not(model: nn.Module) -> None:
    adapter._warn_once.cache_clear()
    adapter.assign_qconfig(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            adapter.prepare_qat(model)
    assert [(w.category, w.filename) for w in caught] == [(DeprecationWarning, __file__)]
    assert "bonn_qat.adapters.torchao" in str(caught[0].message)


def test_bad_input_is_told(model: nn.Module) -> None:
    with pytest.raises(UnknownName, match="scheme 'bon'; did you mean 'bonn'"):
        adapter.bonn_qconfig("bon")
    with pytest.raises(UnknownName, match="in skip 'layr1'"):
        adapter.assign_qconfig(model, skip=("layr1",))
    model.bn1.qconfig = adapter.bonn_qconfig()
    with pytest.raises(InvalidModel, match=r"does not fit BatchNorm2d.*neither a convolution nor a Linear"):
        adapter.prepare_qat(model)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
def test_torch_ao_s_own_prepare_is_refused(model: nn.Module) -> None:
    adapter.assign_qconfig(model)
    with pytest.raises(InvalidModel, match=r"needs bonn_qat\.adapters\.torch_ao\.prepare_qat"):
        ao.prepare_qat(model)


def test_a_torch_without_torch_ao_is_told_what_to_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.ao.quantization", None)
    monkeypatch.delitem(sys.modules, "bonn_qat.adapters.torch_ao")
    with pytest.raises(ImportError, match=r"has no torch\.ao\.quantization; use bonn_qat\.binarize"):
        importlib.import_module("bonn_qat.adapters.torch_ao")
