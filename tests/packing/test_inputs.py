"""Networks of tokens, of several inputs, and of outputs by name: binarized, packed, exported and measured."""

import json
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bonn_qat
from bonn_qat import PackedModel, pack
from bonn_qat.bench import BACKENDS, bench
from bonn_qat.errors import InvalidData, InvalidModel
from bonn_qat.exporting.export import verify
from bonn_qat.files.tensors import digest
from bonn_qat.inputs import Inputs

IDS = torch.randint(50, (4, 7), generator=torch.Generator().manual_seed(0))
BATCH = {"ids": IDS, "mask": IDS > 10}


class Reader(nn.Module):
    """Reads tokens, and leaves out those that a mask hides."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm, self.head = nn.Embedding(50, 32), nn.LayerNorm(32), nn.Linear(32, 3)
        self.first, self.act, self.second = nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        x = self.table(ids)
        x = x + self.second(self.act(self.first(self.norm(x))))
        shown = torch.ones_like(x[..., :1]) if mask is None else mask[..., None].to(x.dtype)
        return {"logits": self.head((x * shown).mean(1)), "tokens": x}


class Backbone(nn.Sequential):
    """Maps of two resolutions by name, as torchvision's detectors take them."""

    def __init__(self) -> None:
        super().__init__(*(nn.Conv2d(3 if i == 0 else 16, 16, 3, 2, 1) for i in range(4)))

    def forward(self, x: Tensor) -> Any:
        high = self[1](self[0](x))
        return OrderedDict(low=self[3](self[2](high)), high=high)


class Detector(nn.Module):
    """Boxes and scores of any number of objects, which no packed network can return."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = Backbone(), nn.Conv2d(16, 5, 1)

    def forward(self, x: Tensor) -> list[dict[str, Tensor]]:
        maps = self.backbone(x)
        cells = torch.cat([self.head(each).flatten(2) for each in maps.values()], 2)
        return [{"boxes": each[:4, each[4] > 0], "scores": each[4, each[4] > 0]} for each in cells]


@pytest.fixture(scope="module")
def reader() -> nn.Module:
    torch.manual_seed(0)
    return bonn_qat.binarize(Reader(), example_inputs=BATCH).eval().requires_grad_(False)


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert list(ours) == list(theirs)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value)


def test_tokens_are_looked_up_and_a_mask_is_not_the_input_of_a_layer(reader: nn.Module) -> None:
    assert reader.binarization.binary == ("first", "second")  # type: ignore[union-attr]
    assert bonn_qat.summary(reader).input_size == (7,)


def test_a_network_of_several_inputs_is_packed_and_its_outputs_keep_their_names(reader, tmp_path) -> None:
    made = pack(reader)
    assert [str(each) for each in made.inputs] == ["int64 ids (B, 7)", "bool mask (B, 7)"]
    read = PackedModel.load(made.save(tmp_path / "a.safetensors"))
    for network in (made, read):
        same(network(IDS, mask=IDS > 30), reader(IDS, IDS > 30))
        same(network(mask=IDS[:1] > 9, ids=IDS[:1]), reader(IDS[:1], IDS[:1] > 9))
        assert network(IDS[:0], BATCH["mask"][:0])["logits"].shape == (0, 3)
    assert bonn_qat.summary(read).macs == bonn_qat.summary(reader).macs


def test_one_tensor_of_tokens_is_enough_where_the_model_needs_no_more(reader: nn.Module) -> None:
    made = pack(reader, example_inputs=IDS)
    same(made(IDS), reader(IDS))
    with pytest.raises(InvalidData, match=r"packed for int64 ids \(B, 7\); got torch.int32 \(4, 7\); convert them"):
        made(IDS.int())


@pytest.mark.parametrize(
    ("args", "kwargs", "words"),
    [
        ((IDS,), {}, r"packed for int64 ids \(B, 7\), bool mask \(B, 7\); got 1 by position$"),
        ((IDS,), {"masc": IDS > 1}, "got 1 by position and masc by name"),
        ((IDS, IDS), {}, r"packed for bool mask \(B, 7\); got torch.int64 \(4, 7\)"),
        ((IDS, IDS[:2] > 1), {}, "inputs are of one batch; got 4, 2 samples"),
        ((IDS.tolist(), IDS > 1), {}, "takes a tensor of ids; got list"),
    ],
)
def test_other_inputs_are_refused_in_a_line(reader, args, kwargs, words) -> None:
    with pytest.raises(InvalidData, match=words):
        pack(reader)(*args, **kwargs)


def test_exports_take_the_inputs_too(reader: nn.Module, tmp_path) -> None:
    for format in ("pt2", "packed", "onnx"):
        path = bonn_qat.export(reader, tmp_path / f"a.{format}", format)
        assert verify(reader, path, format).difference < 1e-5
    with pytest.raises(InvalidModel, match=r"'c' cannot hold this network: the network takes inputs \[7\], not images"):
        bonn_qat.export(reader, tmp_path / "c", "c")


def test_the_benchmark_takes_the_inputs_too(reader: nn.Module) -> None:
    backends = {name: BACKENDS[name] for name in ("onnxruntime float", "packed")}
    report = bench(Reader(), reader, batches=[2], threads=[1], rounds=1, backends=backends, turn_seconds=0)
    assert {x.backend for x in report.latencies} == set(backends), report.failures


def test_a_part_is_packed_in_its_place_and_the_rest_stays() -> None:
    torch.manual_seed(0)
    model = bonn_qat.binarize(Detector(), input_size=(3, 32, 32), include=["backbone.3"]).eval().requires_grad_(False)
    x = torch.randn(2, 3, 32, 32)
    expected = model(x)
    with pytest.raises(InvalidModel, match=r"pack a part of it, as in model\.backbone = "):
        pack(model)
    model.backbone = pack(model.backbone, (3, 32, 32))
    for ours, theirs in zip(model(x), expected, strict=True):
        same(ours, theirs)


class Siamese(nn.Module):
    """How far two images are apart."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*(nn.Conv2d(3 if i == 0 else 8, 8, 3) for i in range(3)))

    def forward(self, one: Tensor, other: Tensor) -> Tensor:
        return (self.net(one) - self.net(other)).mean((2, 3))


def test_two_images_are_two_images_also_where_the_runtime_in_c_takes_one() -> None:
    torch.manual_seed(0)
    one, other = torch.randn(2, 3, 3, 9, 9)
    model = bonn_qat.binarize(Siamese(), example_inputs=(one, other)).eval().requires_grad_(False)
    made = pack(model)
    assert made.runtime != "C"
    torch.testing.assert_close(made(one, other), model(one, other))
    torch.testing.assert_close(made(other, other=one), model(other, one))


Pair = namedtuple("Pair", ["one", "two"])


class Returns(nn.Sequential):
    """What a convolution gives, in the form of ``how``."""

    def __init__(self, how: Any) -> None:
        super().__init__(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
        self.how = how

    def forward(self, x: Tensor) -> Any:
        return self.how(super().forward(x))


def test_a_named_tuple_is_a_tuple_and_what_is_nested_is_refused() -> None:
    x = torch.randn(2, 3, 9, 9)
    model = bonn_qat.binarize(Returns(lambda y: Pair(y, -y)), input_size=(3, 9, 9)).eval()
    ours = pack(model)(x)
    assert isinstance(ours, tuple)
    assert torch.equal(ours[1], -ours[0])
    model.how = lambda y: {"maps": [y, y], "none": None}
    with pytest.raises(InvalidModel, match=r"this one returns dict\[list\[tensor\], None\]; pack a part of it"):
        pack(model)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("ids", "are a tensor, a tuple of tensors, or a dict"),
        ({}, "got nothing"),
        ((IDS, IDS[:2]), "are of one batch; got 4, 2 samples"),
        (IDS.double(), "are of float32, int64, int32 or bool; got torch.float64"),
        (IDS.float(), r"Reader does not take the example_inputs float32 \(B, 7\): "),
    ],
)
def test_other_examples_are_refused(given: Any, words: str) -> None:
    with pytest.raises(InvalidModel, match=words):
        bonn_qat.binarize(Reader(), example_inputs=given)


def test_random_inputs_are_numbers_of_the_example() -> None:
    drawn = Inputs.of(BATCH).drawn(100, seed=1)
    assert set(drawn.kwargs["ids"].unique().tolist()) <= set(IDS.unique().tolist())
    assert drawn.kwargs["mask"].dtype == torch.bool
    assert torch.equal(drawn.kwargs["ids"], Inputs.of(BATCH).drawn(100, seed=1).kwargs["ids"])


@pytest.mark.parametrize("key", ["inputs", "outputs"])
def test_a_file_whose_names_do_not_match_its_nodes_is_refused(reader: nn.Module, key: str) -> None:
    tensors, header = pack(reader)._as_data()
    del header["sha256"]
    header[key] = header[key][:1]
    header["sha256"] = digest(tensors, json.loads(json.dumps(header)))
    with pytest.raises(InvalidData, match=f"its {key} do not match its nodes"):
        PackedModel._from_file(tensors, json.loads(json.dumps(header)))
