"""A file is compared with its model: what torch.export does not see is an error, whatever the format."""

import copy
from collections.abc import Callable

import pytest
import torch
from generated import SIZE, network, odd_images, same
from torch import Tensor, nn

from bonn_qat.errors import InvalidModel
from bonn_qat.exporting.export import FORMATS, export

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("qonnx.util.inference_cost")


class Around(nn.Module):
    """A network whose first output ``way(self, images, output)`` changes; it has a buffer and a number of its own."""

    def __init__(self, net: nn.Module, way: Callable[["Around", Tensor, Tensor], Tensor], kind: type) -> None:
        super().__init__()
        self.net, self.way, self.kind, self.calls = net, way, kind, 1.0
        self.binarization = net.binarization
        self.register_buffer("held", torch.ones(()))

    def forward(self, x: Tensor) -> object:
        y = self.way(self, x, self.net(x))
        return {dict: {"a": y, "b": -y}, tuple: (y, -y), Tensor: y}[self.kind]


def counted(model: Around, step: float) -> float:
    model.calls += step
    return model.calls


WRONG: dict[str, Callable[[Around, Tensor, Tensor], Tensor]] = {
    "a buffer that is changed": lambda model, x, y: y * model.held.add_(1),
    "a buffer that moves slowly": lambda model, x, y: y * model.held.mul_(0.99),
    "a number that is changed": lambda model, x, y: y * counted(model, 1),
    "a number that moves slowly": lambda model, x, y: y * counted(model, 0.01),
    "another way while exporting": lambda model, x, y: -y if torch.compiler.is_exporting() else y,
    "another way for one image": lambda model, x, y: -y if len(x) == 1 else y,
    "another way for three": lambda model, x, y: -y if len(x) == 3 else y,
    "one output for all images": lambda model, x, y: y.mean() if len(x) > 1 else y,
    "NaN while exporting": lambda model, x, y: y.log() - y.log() if torch.compiler.is_exporting() else y,
    "random numbers": lambda model, x, y: y * torch.randn(1),
}
RIGHT: dict[str, Callable[[Around, Tensor, Tensor], Tensor]] = {
    "nothing": lambda model, x, y: y,
    "a number that stays": lambda model, x, y: y * model.calls,
    "a buffer that stays": lambda model, x, y: y + model.held,
    "an input changed in place": lambda model, x, y: y + x.mul_(0).sum(),
    "no training": lambda model, x, y: y * counted(model, 1) if model.training else y,
    "zero": lambda model, x, y: y * 0,
}
OWN_TRACE = ["pt2", "onnx", "qonnx"]  # the others are packed first


@pytest.mark.parametrize(("seed", "way"), list(enumerate(WRONG)))
def test_what_torch_does_not_see_is_refused_and_nothing_is_written(seed, way, tmp_path):
    format = OWN_TRACE[seed % 3]
    model = Around(network(seed, "bonn")[0], WRONG[way], [Tensor, tuple, dict][seed // 3 % 3]).eval()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InvalidModel, match=r"Around cannot be exported: |torch.export cannot trace Around") as told:
        export(model, tmp_path / "net", format, input_size=SIZE)
    assert "\n" not in str(told.value)
    assert not list(tmp_path.iterdir())
    assert model.calls == 1
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("seed", "way"), list(enumerate(RIGHT)))
def test_what_torch_sees_is_written(seed, way, tmp_path):
    format = OWN_TRACE[seed % 3]
    model = Around(network(seed, "bonn")[0], RIGHT[way], [Tensor, tuple][format == "pt2"]).eval()
    path = export(model, tmp_path / "net", format, input_size=SIZE)
    images = odd_images(1, 0)
    expected = model(images.clone())
    for ours, theirs in zip(
        FORMATS[format].run(path, images), expected if format == "pt2" else [expected], strict=True
    ):
        assert same(ours, theirs, 1e-4)


def test_a_buffer_that_only_counts_is_saved_as_it_is(tmp_path):
    model = Around(network(0, "bonn")[0], lambda model, x, y: y + 0 * model.held.add_(1), Tensor).eval()
    path = export(model, tmp_path / "net", "pt2", input_size=SIZE)
    assert torch.export.load(str(path.rename(tmp_path / "net.pt2"))).state_dict["held"] == 1


def test_what_onnxruntime_computes_is_compared_too(tmp_path, monkeypatch):
    model = network(0, "bonn")[0]
    monkeypatch.setattr("bonn_qat.exporting.onnx.run_onnx", lambda content, images: [torch.randn(len(images), 4)])
    with pytest.raises(InvalidModel, match="onnxruntime does not compute Net: "):
        export(model, tmp_path / "net", "onnx")
