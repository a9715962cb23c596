"""BONN's block gives what the code of its authors gives; ``official/bonn.json`` says where that is from."""

import json
from pathlib import Path

import torch

from bonn_qat import layers
from bonn_qat.bonn import BONN
from bonn_qat.models.birealnet import OneConvBlock


def test_the_block_of_resnet18_is_the_authors():
    content = json.loads((Path(__file__).parent / "official" / "bonn.json").read_text(encoding="utf-8"))
    block = OneConvBlock(2, 2, 1).binary_form(BONN)
    block.conv = layers.binary_form(block.conv, BONN, normalize=False)
    block.double().train()
    own = dict(block.named_parameters())
    for name, value in {**content["parameters"], "conv.weight": content["latent"]}.items():
        own[name].data.copy_(torch.tensor(value))
    own["conv.weight_quant.modulation"].data.fill_(content["scale"])
    y = block(torch.tensor(content["x"], dtype=torch.float64))
    torch.testing.assert_close(y, torch.tensor(content["y"], dtype=torch.float64), rtol=1e-12, atol=1e-13)
