"""Trained networks by name: their files, ours and timm's way to create them, and what fits them to other data."""

import pluggy
import pytest
import timm
import torch
from torch import nn

import bonn_qat
from bonn_qat import Pretrained, hookimpl, plugins
from bonn_qat.errors import InvalidData, InvalidRecipe, PluginConflict, UnknownName
from bonn_qat.files.preprocessing import Preprocessing
from bonn_qat.files.tensors import read_tensors, write_tensors
from bonn_qat.training.network import check

NAME = "wrn10_16.mine_data"
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
KNOWN = Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.1, 0.2, 0.3), labels=("a", "b", "c"))


class Plugin:
    def __init__(self, *offers: Pretrained) -> None:
        self.offers = offers

    @hookimpl
    def bonn_qat_pretrained(self):
        return self.offers


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    model = timm.create_model("wrn10_16", num_classes=3)
    model = bonn_qat.binarize(model, "xnor", input_size=(3, 8, 8))
    for _ in range(3):
        model.train()(torch.randn(16, 3, 8, 8))  # statistics of the norms that no fresh network has
    model.preprocessing = KNOWN
    return model.eval()


@pytest.fixture
def pm(trained, tmp_path) -> pluggy.PluginManager:
    path = bonn_qat.save(trained, tmp_path / "net.safetensors", card={"top1": 12.5, "data": "mine"})
    manager = plugins.create_manager()
    manager.register(Plugin(Pretrained(NAME, path)), name="mine")
    return manager


@pytest.fixture
def everywhere(pm, monkeypatch) -> None:
    """The plugin is installed, as for code that gives no plugin manager."""
    monkeypatch.setattr(plugins, "manager", lambda: pm)


def test_a_name_gives_the_trained_network(pm, trained):
    model = bonn_qat.create_model(NAME, pretrained=True, pm=pm)
    assert model.training
    assert torch.equal(model.eval()(IMAGES), trained(IMAGES))
    assert model.binarization.scheme.name == "xnor"
    assert (model.preprocessing, model.card) == (KNOWN, {"top1": 12.5, "data": "mine"})


def test_timm_creates_the_same_network(everywhere, trained):
    model = timm.create_model(NAME, pretrained=True).eval()
    assert torch.equal(model(IMAGES), trained(IMAGES))
    narrower = timm.create_model(NAME, pretrained=True, num_classes=2, drop_rate=0.25)
    assert narrower.get_classifier().out_features == 2
    assert narrower.layer1[0].dropout.p == 0.25
    with pytest.raises(InvalidRecipe, match=r"has its scheme already; leave out scheme='bonn'"):
        timm.create_model(NAME, pretrained=True, scheme="bonn")


def test_without_its_weights_the_network_is_as_its_training_began(pm, trained):
    model, again = (bonn_qat.create_model(NAME, pm=pm) for _ in range(2))
    assert model.binarization.scheme.name == "xnor"
    assert all(map(torch.equal, model.state_dict().values(), again.state_dict().values()))
    assert not torch.equal(model.eval()(IMAGES), trained(IMAGES))


def test_another_number_of_classes_gives_a_new_classifier_and_keeps_the_features(pm, trained):
    model = bonn_qat.create_model(NAME, pretrained=True, num_classes=7, pm=pm).eval()
    assert model(IMAGES).shape == (2, 7)
    assert torch.equal(model.forward_features(IMAGES), trained.forward_features(IMAGES))
    assert model.preprocessing.labels == ()
    same = bonn_qat.create_model(NAME, pretrained=True, num_classes=3, pm=pm).eval()
    assert torch.equal(same(IMAGES), trained(IMAGES))


def test_one_channel_sees_what_three_equal_ones_would(pm, trained):
    model = bonn_qat.create_model(NAME, pretrained=True, in_chans=1, pm=pm).eval()
    assert model.binarization.input_size == (1, 8, 8)
    assert model.preprocessing is None  # that of three channels
    first = IMAGES[:, :1]
    torch.testing.assert_close(model.conv1(first), trained.conv1(first.expand(-1, 3, -1, -1)))


def test_latents_in_bfloat16_keep_their_signs(pm, trained, tmp_path):
    tensors, header = read_tensors(plugins.find_pretrained(NAME, pm).weights)
    latents = {f"{name}.weight" for name, _ in bonn_qat.binary_layers(trained)}
    small = {name: tensor.bfloat16() if name in latents else tensor for name, tensor in tensors.items()}
    model = bonn_qat.load(write_tensors(tmp_path / "small.safetensors", small, header))
    for (_, layer), (_, before) in zip(bonn_qat.binary_layers(model), bonn_qat.binary_layers(trained), strict=True):
        assert layer.weight.dtype == torch.float32
        assert torch.equal(layer.weight >= 0, before.weight >= 0)


def test_a_packed_network_and_its_file_know_the_images(trained, tmp_path):
    packed = bonn_qat.pack(trained)
    assert packed.preprocessing == KNOWN
    assert bonn_qat.PackedModel.load(packed.save(tmp_path / "packed.safetensors")).preprocessing == KNOWN
    trained.preprocessing = "what a stranger keeps under this name"
    assert bonn_qat.pack(trained).preprocessing is None
    trained.preprocessing = KNOWN


def test_lists(pm):
    assert NAME in bonn_qat.list_models(pretrained=True, pm=pm)
    assert bonn_qat.list_models("*.mine_*", pm=pm) == [NAME]
    assert "resnet18" in bonn_qat.list_models("resnet*", pm=pm)
    assert "resnet18" not in bonn_qat.list_models(pretrained=True, pm=pm)


def test_any_other_name_is_timms(pm):
    assert type(bonn_qat.create_model("test_resnet", num_classes=3, pm=pm)).__name__ == "ResNet"
    tagged = timm.list_pretrained("test_resnet.*")[0]
    assert type(bonn_qat.create_model(tagged, pm=pm)).__name__ == "ResNet"  # a tag of timm, without its weights


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("wrn10_16.mine_dat", "unknown pretrained network 'wrn10_16.mine_dat'; did you mean 'wrn10_16.mine_data'"),
        ("nothing.mine", "unknown pretrained network 'nothing.mine'"),
        ("resnet1", "unknown model 'resnet1'; did you mean"),
    ],
)
def test_an_unknown_name(pm, name, words):
    with pytest.raises(UnknownName, match=words):
        bonn_qat.create_model(name, pretrained=True, pm=pm)


def test_a_trained_network_is_no_model_of_a_recipe(pm):
    with pytest.raises(
        InvalidRecipe, match=r'start from it with model = "wrn10_16" and checkpoint = "wrn10_16\.mine_data"'
    ):
        check(bonn_qat.Recipe(model=NAME), pm)


def test_a_name_that_two_plugins_offer(pm):
    pm.register(Plugin(plugins.find_pretrained(NAME, pm)), name="other")
    with pytest.raises(PluginConflict, match=r"several plugins offer the pretrained network 'wrn10_16.mine_data'"):
        bonn_qat.create_model(NAME, pretrained=True, pm=pm)


@pytest.mark.parametrize("option", ["num_classes", "in_chans"])
@pytest.mark.parametrize("count", [0, -1, 2**21])
def test_an_impossible_number(pm, option, count):
    with pytest.raises(InvalidRecipe, match=rf"{option} is {count}; allowed: 1 to 1,048,576"):
        bonn_qat.create_model(NAME, pretrained=True, pm=pm, **{option: count})


@pytest.mark.parametrize(
    ("preprocessing", "words"),
    [
        ({"mean": [0.5], "std": [0.0]}, "std is"),
        ({"mean": [], "std": []}, "mean is"),
        ({"mean": [0.5], "std": [1.0], "labels": ["a\nb"]}, "labels"),
        ({"mean": 0.5, "std": [1.0]}, "mean"),
        ({"std": [1.0]}, "mean"),
        ({"mean": [0.5], "std": [1.0, 1.0]}, "mean has 1 channels and std 2"),
    ],
)
def test_a_file_with_an_impossible_preprocessing_is_named(pm, tmp_path, preprocessing, words):
    tensors, header = read_tensors(plugins.find_pretrained(NAME, pm).weights)
    path = write_tensors(tmp_path / "odd.safetensors", tensors, header | {"preprocessing": preprocessing})
    with pytest.raises(InvalidData, match=rf"odd.safetensors is not a weights file.*{words}"):
        bonn_qat.load(path)
