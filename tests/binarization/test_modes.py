"""A layer that any code path reads past its forward stays float, or the path is closed."""

import itertools
import random

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import bonn_qat
from bonn_qat.binarization.binarize import BypassedLayers
from bonn_qat.binarization.policy import decide
from bonn_qat.bonn import BONN

WAYS = {
    "gradients": lambda m, x: torch.is_grad_enabled(),
    "no gradients": lambda m, x: not torch.is_grad_enabled(),
    "training": lambda m, x: m.training,
    "evaluation": lambda m, x: not m.training,
    "a layer in training": lambda m, x: m.fc.training,
    "no hooks": lambda m, x: not any(part._forward_hooks or part._forward_pre_hooks for part in m.modules()),
    "no global hooks": lambda m, x: not nn.modules.module._has_any_global_hook(),
    "inputs that need no gradient": lambda m, x: not x.requires_grad,
    "as torch's fast path": lambda m, x: (
        not (m.training or torch.is_grad_enabled())
        and x.device.type in ("cpu", "cuda")
        and not torch.overrides.has_torch_function((x, m.fc.weight))
    ),
    "no gradients, outside autocast": lambda m, x: not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu"),
    "inference mode": lambda m, x: torch.is_inference_mode_enabled(),
    "inference tensors": lambda m, x: x.is_inference(),
    "autocast": lambda m, x: torch.is_autocast_enabled("cpu"),
    "activations of 16 bits": lambda m, x: m.other(x).dtype == torch.bfloat16,
    "one image": lambda m, x: len(x) == 1,
    "several images": lambda m, x: len(x) > 1,
}
READS = {
    "linear": lambda x, fc: F.linear(x, fc.weight, fc.bias),
    "data": lambda x, fc: F.linear(x, fc.weight.data, fc.bias),
    "product": lambda x, fc: x @ fc.weight.t() + fc.bias,
    "addmm": lambda x, fc: torch.addmm(fc.bias, x, fc.weight.mT),
    "copy": lambda x, fc: F.linear(x, fc.weight.detach().clone() * 1, fc.bias),
    "parts": lambda x, fc: torch.cat([F.linear(x, rows) for rows in fc.weight.chunk(2)], 1) + fc.bias,
    "einsum": lambda x, fc: torch.einsum("bi,oi->bo", x, fc.weight) + fc.bias,
}


class Branching(nn.Module):
    """Reads the weight of one of two layers in one case, and calls the layer in the other."""

    def __init__(self, way: str, read: str) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)
        self.fc, self.other, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)
        self.way, self.read = WAYS[way], READS[read]

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(self.stem(x)).mean((2, 3))
        x = self.read(x, self.fc) if self.way(self, x) else self.fc(x)
        return self.head(self.other(x))


@pytest.mark.parametrize(("way", "read"), random.Random(0).sample([*itertools.product(WAYS, READS)], 50))
def test_a_layer_that_one_path_reads_stays_float(way, read):
    model = Branching(way, read)
    decided = decide(model, input_size=(3, 8, 8))
    assert decided.kept == {"stem": "first layer", "fc": "the model reads its weight itself", "head": "classifier"}
    with pytest.warns(BypassedLayers, match="fc stays float because the model reads its weight directly"):
        binary = bonn_qat.binarize(model, input_size=(3, 8, 8))
    x = torch.randn(4, 3, 8, 8)
    binary(x)
    binary.eval()
    with torch.no_grad():
        without = binary(x)
    with torch.inference_mode():
        inferred = binary(x)
    torch.testing.assert_close(without, binary(x))
    torch.testing.assert_close(inferred.clone(), without)


def test_what_is_asked_of_a_weight_but_its_numbers_reads_nothing():
    class Asks(Branching):
        def forward(self, x: Tensor) -> Tensor:
            weight = self.fc.weight
            x = self.conv(self.stem(x)).mean((2, 3)).to(weight.dtype).type_as(weight)
            x = x.to(weight).mean(0).expand_as(weight)[:2]
            x = x + weight.new_zeros(len(weight)) + torch.zeros_like(weight)[0]
            return self.head(self.other(self.fc(x)))

    assert decide(Asks("training", "linear"), input_size=(3, 8, 8)).bypassed == {}


told = pytest.mark.filterwarnings("ignore::bonn_qat.binarization.binarize.BypassedLayers")


class Encoder(nn.Module):
    def __init__(self, activation: object, norm_first: bool, masked: bool, wrapped: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        layer = nn.TransformerEncoderLayer(
            16, 2, 32, batch_first=True, activation=activation, norm_first=norm_first, dropout=0.1
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first) if wrapped else layer
        self.head, self.masked = nn.Linear(16, 4), masked

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        mask = (torch.arange(x.shape[1]) > 11).expand(len(x), -1) if self.masked else None
        return self.head(self.encoder(x, src_key_padding_mask=mask)[:, :10].mean(1))


@told
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu", "module"])
def test_torchs_encoders_give_the_same_with_and_without_gradients(norm_first, masked, wrapped, activation):
    model = Encoder(nn.ReLU() if activation == "module" else activation, norm_first, masked, wrapped)
    binary = bonn_qat.binarize(model, input_size=(3, 16, 16))
    inner = ["encoder.layers.0", "encoder.layers.1"] if wrapped else ["encoder"]
    assert binary.binarization.binary == tuple(f"{name}.linear{i}" for name in inner for i in (1, 2))
    kept = {n: why for n, why in binary.binarization.kept.items() if n.endswith("out_proj")}
    assert kept == {f"{n}.self_attn.out_proj": f"{n}.self_attn reads its weight itself" for n in inner}
    x = torch.randn(4, 3, 16, 16)
    binary(x)
    binary.eval()
    with torch.no_grad():
        without = binary(x)
    torch.testing.assert_close(without, binary(x))
    assert model.encoder.layers[0].activation_relu_or_gelu if wrapped else model.encoder.activation_relu_or_gelu


@told
def test_an_encoder_of_which_nothing_changes_keeps_its_fast_path():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.TransformerEncoderLayer(8, 2, 8, batch_first=True))
    model.append(nn.Linear(8, 8))
    binary = bonn_qat.binarize(model, BONN, skip=["2"], input_size=(5, 8))
    assert binary[2].activation_relu_or_gelu == 1


@told
def test_a_packed_encoder_gives_the_models_outputs():
    binary = bonn_qat.binarize(Encoder("gelu", False, False, True), input_size=(3, 16, 16))
    x = torch.randn(4, 3, 16, 16)
    binary(x)
    with torch.no_grad():
        torch.testing.assert_close(bonn_qat.pack(binary.eval())(x), binary(x))
