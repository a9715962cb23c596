"""What is shipped: every file is whole, small, and as good as its card says."""

import csv
from pathlib import Path

import bonn_qat_weights
import pytest
import torch

import bonn_qat
from bonn_qat import plugins
from bonn_qat.files.tensors import read_tensors

PLUGIN = Path(__file__).parents[1]
# Whatever the tests before have left in BONN_QAT_PLUGINS.
SCHEMES = ("bireal", "bonn-plus", "float", "pcnn", "reactnet", "xnor")
PM = plugins.create_manager(entry_points=["weights", *(f"baselines.{scheme}" for scheme in SCHEMES)])
NETWORKS = {network.name: network for network in bonn_qat_weights.bonn_qat_pretrained()}


def test_the_plugin_offers_every_file():
    pm = plugins.create_manager(entry_points=["weights"])
    assert plugins.pretrained(pm) == NETWORKS
    offered = {path for network in NETWORKS.values() for path in (network.weights, network.packed) if path}
    assert offered == set(bonn_qat_weights.FILES.iterdir())


def test_all_files_together_are_small():
    assert sum(path.stat().st_size for path in bonn_qat_weights.FILES.iterdir()) < 4e6


def test_every_network_has_a_card_and_a_row():
    with (PLUGIN / "results.csv").open(newline="", encoding="utf-8") as file:
        rows = {row.pop("model"): row for row in csv.DictReader(file)}
    assert rows.keys() == NETWORKS.keys() == {path.stem for path in (PLUGIN / "cards").iterdir()}
    for name, network in NETWORKS.items():
        card = read_tensors(network.weights)[1]["card"]
        assert rows[name] == {key: "" if value is None else str(value) for key, value in card.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_is_what_its_packed_file_and_its_card_say(name):
    network, generator = NETWORKS[name], torch.Generator().manual_seed(0)
    model = bonn_qat.create_model(name, pretrained=True, pm=PM).eval()
    images = torch.randn(3, *model.binarization.input_size, generator=generator)
    networks = [model]
    if network.packed:
        networks.append(bonn_qat.PackedModel.load(network.packed))
        with torch.no_grad():
            torch.testing.assert_close(networks[1](images), model(images), rtol=1e-4, atol=1e-4)
    assert bool(network.packed) == bool(list(bonn_qat.binary_layers(model)))
    if model.card["data"] == "digits":  # the data that are always there
        data = bonn_qat.load_data("digits")
        assert len(model.preprocessing.labels) == data.classes
        keys = ("top1", "packed_top1")
        for found, key in zip(networks, keys, strict=False):
            assert bonn_qat.evaluate(found, data).top1 == pytest.approx(model.card[key], abs=0.3)  # one image of 359
