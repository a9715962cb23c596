"""dry_run: what it records, and that it neither allocates memory nor changes the model."""

import pytest
import torch
from torch import Tensor, nn

import bonn_qat
from bonn_qat.binarization.dry_run import dry_run


class Net(nn.Module):
    """A gate, a table of positions, a layer that is read past its forward, one that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.squeeze, self.excite = nn.Linear(8, 2), nn.Linear(2, 8)
        self.read = nn.Linear(8, 8)
        self.table = nn.Linear(1, 8)
        self.unused = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)
        self.register_buffer("positions", torch.arange(4.0)[:, None])
        self.cache: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        gate = self.excite(self.squeeze(x.mean((2, 3))).relu()).sigmoid()
        self.cache["gate"] = gate
        x = (x * gate[:, :, None, None]).flatten(2).transpose(1, 2)
        x = nn.functional.linear(x, self.read.weight) + self.table(self.positions).mean(0)
        assert self.unused.weight.dtype == x.dtype  # asking is not reading
        return self.head(x.mean(1))


LAYERS = ["stem", "squeeze", "excite", "read", "table", "unused", "head"]


def test_calls_shapes_order_and_readers_are_seen():
    run = dry_run(Net(), LAYERS, (3, 9, 9))
    assert list(run.uses) == ["stem", "squeeze", "excite", "table", "head"]
    assert [use.order for use in run.uses.values()] == [0, 1, 2, 3, 4]
    assert (run.uses["stem"].input, run.uses["stem"].output) == ((2, 3, 9, 9), (2, 8, 4, 4))
    assert {name: use.sees_image for name, use in run.uses.items()} == {
        "stem": True, "squeeze": True, "excite": True, "table": False, "head": True,
    }  # fmt: skip
    assert run.readers == {"read": ""}


def test_the_reader_is_named():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.attention = nn.Conv2d(3, 8, 4, stride=4), attention

        def forward(self, x: Tensor) -> Tensor:
            x = self.patch(x).flatten(2).transpose(1, 2)
            return self.attention(x, x, x)[0]

    run = dry_run(nn.Sequential(Block()), ["0.patch", "0.attention.out_proj"], (3, 8, 8))
    assert run.readers == {"0.attention.out_proj": "0.attention"}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_is_not_touched(device, dtype):
    model = Net().to(device, dtype)
    before = {name: (id(tensor), tensor._version) for name, tensor in model.state_dict(keep_vars=True).items()}
    assert list(dry_run(model, LAYERS, (3, 9, 9)).uses)
    assert {n: (id(x), x._version) for n, x in model.state_dict(keep_vars=True).items()} == before
    assert model.cache == {}
    assert model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_large_model_costs_no_memory():
    with torch.device("meta"):
        model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 2**10, 2**20), nn.Linear(2**20, 2**20))  # 4 TiB
    run = dry_run(model, ["1", "2"], (3, 32, 32))
    assert run.uses["2"].output == (2, 2**20)


def test_what_the_model_raises_comes_through_silently(capfd):
    with pytest.raises(RuntimeError, match=r"mat1|reduction dim"):
        dry_run(nn.Sequential(nn.Flatten(), nn.Linear(4, 4)), ["1"], (3, 9, 9))
    assert capfd.readouterr() == ("", "")


class Nonlinearities(nn.Module):
    """ReLUs behind convolutions, a sum, a concatenation and linear layers, of other layouts, and one for two widths."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.stem, self.a, self.b = nn.ReLU(), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 16, 1)
        self.map, self.sum, self.both, self.permuted, self.tokens, self.last = (nn.ReLU() for _ in range(6))
        self.shared, self.features = nn.ReLU(inplace=True), nn.ReLU()
        self.mix, self.fc, self.head = nn.Linear(24, 24), nn.Linear(24, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.map(self.stem(self.image(x)))
        y = self.shared(self.b(x))
        x = self.sum(x + self.shared(self.a(x)))
        x = self.permuted(self.both(torch.cat([x, y], 1)).permute(0, 2, 3, 1))
        x = self.tokens(self.mix(self.last(x.flatten(1, 2))))
        return self.head(self.features(self.fc(x.mean(1))))


def test_the_channels_that_a_nonlinearity_reads_are_seen_where_they_are_axis_1():
    layers = ["stem", "a", "b", "mix", "fc", "head"]
    run = dry_run(Nonlinearities(), layers, (3, 10, 12))  # maps with as many rows as channels
    assert {name: count for name, count in run.channels.items() if name} == {
        "map": 8, "sum": 8, "both": 24, "features": 12,
    }  # fmt: skip


class Viewed(nn.Module):
    """The way of old code from maps to features, which refuses maps in channels_last."""

    def __init__(self, axes: int = 2) -> None:
        super().__init__()
        conv, pool = (nn.Conv1d, nn.AvgPool1d) if axes == 1 else (nn.Conv2d, nn.AvgPool2d)
        self.features = nn.Sequential(conv(3, 8, 3), nn.ReLU(), conv(8, 8, 3, padding=1), nn.ReLU(), pool(2))
        self.classifier = nn.Linear(8 * 3**axes, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).view(len(x), -1))


@pytest.mark.parametrize("axes", [1, 2])
@pytest.mark.parametrize("views", [True, False])
def test_a_model_that_views_maps_runs_as_a_binary_one(views, axes):
    model, size = Viewed(axes) if views else nn.Sequential(Viewed(axes).features, nn.Flatten()), (3, *[8] * axes)
    binary = bonn_qat.binarize(model, input_size=size, include=["*2"])
    (layer,) = (layer for _, layer in bonn_qat.binary_layers(binary))
    assert layer.any_layout == (not views and axes == 2)
    for training in (True, False):
        binary.train(training)(torch.randn(2, *size)).sum().backward()
