import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import timm
import torch
from bonn_qat_runtime import Network

import bonn_qat
from bonn_qat import PackedModel
from bonn_qat.errors import InvalidData, InvalidModel
from bonn_qat.training import hub


def network(scheme="bonn", **options):
    model = bonn_qat.binarize(timm.create_model("wrn10_16", num_classes=5, in_chans=2), scheme, input_size=(2, 16, 16))
    with torch.no_grad():
        for x in model.state_dict().values():
            if x.is_floating_point():
                x += 0.01 * torch.randn_like(x)
    return model.eval()


IMAGES = torch.randn(3, 2, 16, 16)


@pytest.fixture
def folder(tmp_path):
    return bonn_qat.save_pretrained(network(), tmp_path / "net", card={"top1": 12.5, "note": "two\nlines | more"})


@torch.no_grad()
@pytest.mark.parametrize("scheme", ["reactnet", "bonn:estimator=approx_sign"])
def test_a_network_comes_back_from_a_folder_of_ours_and_of_timm(scheme, tmp_path):
    name, _, option = scheme.partition(":")
    found = bonn_qat.plugins.find_scheme(name)
    model = network(found.configure(dict([option.split("=")])) if option else found)
    bonn_qat.save_pretrained(model, tmp_path / "ours")
    config = hub.timm_config(model)
    timm.models.save_for_hf(model, tmp_path / "timm", model_config=config, safe_serialization=True)
    for folder in (tmp_path / "ours", tmp_path / "timm"):
        assert torch.equal(bonn_qat.from_pretrained(folder)(IMAGES), model(IMAGES))
        again = timm.create_model(f"local-dir:{folder}", pretrained=True)
        assert again.training
        assert torch.equal(again.eval()(IMAGES), model(IMAGES))
        other = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3, in_chans=1)
        assert other(IMAGES[:, :1]).shape == (3, 3)


@torch.no_grad()
def test_a_folder_has_the_bits_and_says_what_it_is(folder):
    model = bonn_qat.from_pretrained(folder)
    assert model.card == {"top1": 12.5, "note": "two\nlines | more"}
    assert torch.equal(PackedModel.load(folder / hub.PACKED)(IMAGES).argmax(1), model(IMAGES).argmax(1))
    assert Network(folder / hub.PACKED).input_size == (2, 16, 16)
    config = json.loads((folder / hub.CONFIG).read_text())
    assert config[hub.ARCHITECTURE]["recipe"]["scheme"] == "bonn"
    assert config["pretrained_cfg"]["input_size"] == [2, 16, 16]
    rows = [line for line in (folder / hub.CARD).read_text().splitlines() if line.startswith("| note")]
    assert rows == ["| note | two lines \\| more |"]


def test_a_card_that_is_there_stays(folder):
    (folder / hub.CARD).write_text("mine")
    bonn_qat.save_pretrained(network(), folder, packed=False)
    assert (folder / hub.CARD).read_text() == "mine"


@pytest.fixture
def repositories(tmp_path, monkeypatch):
    """A hub that is a folder."""
    root = tmp_path / "hub"

    class Api:
        def __init__(self, token, library_name):
            assert library_name == "bonn-qat"

        def create_repo(self, name, private, exist_ok):
            (root / name).mkdir(parents=True, exist_ok=exist_ok)
            return SimpleNamespace(repo_id=name)

        def file_exists(self, repo_id, filename, revision):
            return (root / repo_id / filename).exists()

        def upload_folder(self, repo_id, folder_path, revision, commit_message, ignore_patterns):
            leave = shutil.ignore_patterns(*ignore_patterns or ())
            shutil.copytree(folder_path, root / repo_id, dirs_exist_ok=True, ignore=leave)

    def download(name, revision, cache_dir, allow_patterns):
        assert set(allow_patterns) == {hub.WEIGHTS, hub.CONFIG}
        return root / name

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return root


@torch.no_grad()
def test_a_network_comes_back_from_the_hub(repositories):
    model = network()
    bonn_qat.push_to_hub(model, "somebody/net")
    assert torch.equal(bonn_qat.from_pretrained("somebody/net")(IMAGES), model(IMAGES))
    card = repositories / "somebody/net" / hub.CARD
    assert 'from_pretrained("somebody/net")' in card.read_text()
    card.write_text("mine")
    bonn_qat.push_to_hub(network(), "somebody/net")
    assert card.read_text() == "mine"


def test_what_cannot_be_written_leaves_no_folder(tmp_path):
    with pytest.raises(InvalidModel, match="it is not binarized"):
        bonn_qat.save_pretrained(timm.create_model("wrn10_16"), tmp_path / "net")
    assert not (tmp_path / "net").exists()


def without_header(folder: Path, config: object) -> Path:
    """A folder as timm writes it, with another ``config.json``."""
    timm.models.save_for_hf(network(), folder, model_config={}, safe_serialization=True)
    (folder / hub.CONFIG).write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("{", "config.json is not JSON"),
        ([], "does not describe the network"),
        ({hub.ARCHITECTURE: [1]}, "does not describe the network"),
        ({hub.ARCHITECTURE: {"format": 1, "recipe": {"model": 3}}}, "is not a weights file"),
    ],
)
def test_a_folder_that_does_not_say_what_it_holds_is_refused(config, reason, tmp_path):
    with pytest.raises(InvalidData, match=reason):
        bonn_qat.from_pretrained(without_header(tmp_path, config))


def test_what_is_not_there_is_named(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InvalidData, match="somebody/net is no folder, and cannot be read from the Hugging Face Hub"):
        bonn_qat.from_pretrained("somebody/net", cache_dir=tmp_path)
    with pytest.raises(InvalidData, match="is a folder, which has no revisions"):
        bonn_qat.from_pretrained(folder, revision="main")
    with pytest.raises(InvalidModel, match="name one: local-dir:FOLDER"):
        timm.create_model("bonn_qat")
