from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import bonn_qat


def random_norms(model: nn.Module) -> None:
    """Statistics as after a training, so that no channel is like another."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias):
                assert tensor is not None
                nn.init.normal_(tensor, std=0.3)
            assert module.running_var is not None
            nn.init.uniform_(module.running_var, 0.5, 2.0)
            nn.init.uniform_(module.weight, -1.5, 1.5)


Packed = Callable[[str, str, int], Path]


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    """The file of a packed network with random weights and norms, by timm's name, scheme and pixels."""
    folder, made = tmp_path_factory.mktemp("packed"), {}

    def pack(name: str, scheme: str, pixels: int) -> Path:
        key = (name, scheme, pixels)
        if key not in made:
            torch.manual_seed(0)
            model = bonn_qat.binarize(timm.create_model(name, num_classes=10), scheme)
            random_norms(model)
            network = bonn_qat.pack(model.eval(), input_size=(3, pixels, pixels))
            made[key] = network.save(folder / f"{name}-{scheme}-{pixels}.safetensors")
        return made[key]

    return pack
