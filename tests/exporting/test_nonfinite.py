"""NaN and infinities in exported files: each runtime gives what the model gives."""

import pytest
import torch
from generated import SIZE, network, odd_images, same
from torch import nn

import bonn_qat
from bonn_qat.errors import InvalidModel
from bonn_qat.exporting.export import FORMATS, export
from bonn_qat.packing.pack import pack

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("qonnx.util.inference_cost")
# Other runtimes add floats in another order: no sum may come near the largest number.
LARGE = 1e30


def pooled(model: nn.Module) -> bool:
    return any(isinstance(module, nn.MaxPool2d) for module in model.modules())


@pytest.mark.parametrize("seed", [0, 4, 13, 24])
def test_onnxruntime_takes_odd_numbers_as_the_model_does(tmp_path, seed):
    model, _ = network(seed)
    x = odd_images(6, seed).contiguous()
    x[x.isfinite() & (x.abs() > LARGE)] = 0
    path = export(model, tmp_path / "net.onnx", "onnx")
    (ours,) = FORMATS["onnx"].run(path, x)
    assert same(ours, model(x), 1e-4)


def test_qonnx_takes_odd_numbers_as_the_model_does(tmp_path):
    """Without max pools, whose NaN qonnx leaves to onnxruntime."""
    for seed in range(40, 100):
        model, _ = network(seed, "bonn")
        if not pooled(model):
            break
    x = odd_images(4, seed).contiguous()
    x[x.isfinite() & (x.abs() > LARGE)] = 0
    (ours,) = FORMATS["qonnx"].run(export(model, tmp_path / "net.onnx", "qonnx"), x)
    assert same(ours, model(x), 1e-4)


def test_a_comparison_that_is_no_sign_stays_one(tmp_path):
    """A model's own ``sign((x >= a) - b)`` with other numbers."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x):
            x = self.second(self.first(x))
            return torch.sign((x >= 2).float() - 0.5), torch.sign((x >= 0).float() - 1.5), torch.sign((x >= 0).float())

    model = bonn_qat.binarize(Own(), include=["second"], input_size=SIZE).eval().requires_grad_(False)
    x = odd_images(3, 0).contiguous()
    path = export(model, tmp_path / "net.onnx", "onnx")
    assert all(torch.equal(*pair) for pair in zip(FORMATS["onnx"].run(path, x), model(x), strict=True))


class Uneven(nn.Module):
    """What it does depends on the images; torch prints its graph where it fails."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x):
        x = self.third(self.second(self.first(x))).flatten()
        kept = torch.cat([x[x > 0.1 * i] for i in range(60)]) if torch.compiler.is_exporting() else x
        return kept if kept.shape[0] > 5 else 2 * kept


@pytest.mark.parametrize("format", ["pack", "pt2", "onnx", "c"])
def test_what_torch_cannot_trace_is_one_line(tmp_path, format, capfd):
    model = bonn_qat.binarize(Uneven(), input_size=SIZE).eval()
    with pytest.raises(InvalidModel, match=r"torch.export (does not take this|cannot trace) Uneven") as caught:
        pack(model) if format == "pack" else export(model, tmp_path / "file", format)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)
    printed = capfd.readouterr()
    assert not printed.out + printed.err
    assert not list(tmp_path.iterdir())
