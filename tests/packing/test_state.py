"""A packed network's tensors: every change is seen, no output is one of them, casts; and batches of any size."""

import copy
import itertools
import random
import threading
from collections.abc import Callable

import pytest
import torch
from generated import SCHEMES, SIZE, network, odd_images, same
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bonn_qat
from bonn_qat import PackedModel, pack
from bonn_qat.errors import InvalidData, InvalidModel
from bonn_qat.runtime import planned, products

ROUNDING = 1e-5


def fresh(packed: PackedModel) -> PackedModel:
    """A network of the same tensors that was never called."""
    return copy.deepcopy(packed)


def other_values(tensor: Tensor, source: torch.Generator) -> Tensor:
    if tensor.is_floating_point():
        return tensor.nan_to_num(0, 1, -1) + torch.randn(tensor.shape, generator=source)
    return torch.randint(0, 200, tensor.shape, generator=source).to(tensor.dtype)


def replace(packed: PackedModel, name: str, new: Tensor) -> None:
    packed.network.register_buffer(name, new)


CHANGES: dict[str, Callable[[PackedModel, str, Tensor], object]] = {
    "copy_": lambda packed, name, new: packed.network.get_buffer(name).copy_(new),
    "other data": lambda packed, name, new: setattr(packed.network.get_buffer(name), "data", new),
    "set_": lambda packed, name, new: packed.network.get_buffer(name).set_(new),
    "load_state_dict": lambda packed, name, new: packed.load_state_dict(
        {**packed.state_dict(), f"network.{name}": new}
    ),
    "assign": lambda packed, name, new: packed.load_state_dict(
        {**packed.state_dict(), f"network.{name}": new}, assign=True
    ),
    "replace": replace,
}


@pytest.mark.parametrize(("seed", "scheme"), [(8, "bonn"), (8, "reactnet"), (8, "bwn"), (11, "bonn")])
def test_any_change_of_any_tensor_is_seen(seed, scheme):
    """Random values into random tensors, in every way, of a network that was called before."""
    model, _ = network(seed, scheme)
    packed, x, draw = pack(model), odd_images(2, 0), random.Random(0)
    source, changed = torch.Generator().manual_seed(0), 0
    names = list(packed.network._buffers)
    for name, way in draw.sample(list(itertools.product(names, CHANGES)), 24):
        before = packed(x)
        CHANGES[way](packed, name, other_values(packed.network.get_buffer(name), source))
        after = packed(x)
        assert same(after, fresh(packed)(x)), (name, way)
        changed += not torch.equal(before.nan_to_num(), after.nan_to_num())
    assert changed > 5


class Watching(TorchDispatchMode):
    """Sees torch's operations, and so has a packed network run node by node."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("seed", [7, 11, 19])
def test_in_c_the_whole_network_gives_what_it_gives_node_by_node(seed, monkeypatch):
    packed, x = pack(network(seed, "bonn")[0]), odd_images(5, seed)
    assert packed.runtime == "C"
    with Watching() as watching:
        expected = packed(x)
    assert watching.seen
    for images in (x, x.contiguous(memory_format=torch.channels_last), x.clone().requires_grad_()):
        assert same(packed(images), expected, ROUNDING)
        assert not packed(images).requires_grad
    monkeypatch.setattr(planned, "_package", lambda: None)
    other = fresh(packed)
    assert "bonn-qat-runtime is not installed" in other.runtime
    assert same(other(x), expected)


def test_what_the_c_runtime_lacks_is_named_and_runs_node_by_node():
    model = bonn_qat.binarize(Kinds(), include=["conv", "positions", "image"], input_size=SIZE).eval()
    packed = pack(model.requires_grad_(False))
    assert packed.runtime == "the network returns something else than a tensor for each image"
    assert len(packed(odd_images(2, 0))) == 6
    lacking = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3), nn.LogSoftmax(1), nn.Conv2d(16, 4, 1))
    packed = pack(bonn_qat.binarize(lacking, input_size=SIZE).eval())
    assert packed.runtime.startswith("bonn-qat-runtime cannot run the node 'log_softmax'")
    assert packed(odd_images(2, 0)).shape[:2] == (2, 4)


def test_in_c_several_outputs_are_in_the_container_that_they_are_in_node_by_node(tmp_path):
    model = bonn_qat.binarize(Two(), include=["conv", "positions", "image"], input_size=SIZE).eval()
    packed = pack(model.requires_grad_(False))
    for made in (packed, PackedModel.load(packed.save(tmp_path / "two.safetensors"))):
        assert made.runtime == "C"
        for count in (0, 1, 3):
            x = odd_images(3, 0)[:count]
            with Watching():
                expected = made(x)
            assert type(made(x)) is type(expected)
            assert all(same(ours, theirs, ROUNDING) for ours, theirs in zip(made(x), expected, strict=True))


def test_a_state_that_is_loaded_is_the_one_that_is_used_also_by_other_threads():
    packed = [pack(network(8, "bonn")[0]) for _ in range(2)]
    x = odd_images(2, 0)
    for tensor in packed[1].buffers():
        if tensor.is_floating_point():
            tensor.add_(0.5)
    first, second = packed[0](x), packed[1](x)
    assert not same(first, second)
    packed[0].load_state_dict(packed[1].state_dict())
    results = list[Tensor]()
    threads = [threading.Thread(target=lambda: results.append(packed[0](x))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(result, second) for result in (*results, packed[0](x)))
    packed[0].share_memory()
    assert same(packed[0](x), second)


def test_a_state_dict_of_a_network_that_was_called_is_plain_tensors(tmp_path):
    packed, x = pack(network(8, "bonn")[0]), odd_images(2, 0)
    expected = packed(x)
    torch.save(packed.state_dict(), tmp_path / "state.pt")
    read = torch.load(tmp_path / "state.pt", weights_only=True)
    packed.load_state_dict(read)
    assert same(packed(x), expected)


CASTS: dict[str, Callable[[PackedModel], object]] = {
    "double": lambda packed: packed.double(),
    "half": lambda packed: packed.half(),
    "bfloat16": lambda packed: packed.bfloat16(),
    "to float64": lambda packed: packed.to(torch.float64),
    "type": lambda packed: packed.type(torch.float16),
    "meta": lambda packed: packed.to("meta"),
    "within another": lambda packed: nn.Sequential(packed).double(),
}


@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_is_refused_and_changes_nothing(cast):
    packed, x = pack(network(8, "bonn")[0]), odd_images(2, 0)
    expected, before = packed(x), packed.dump()
    with pytest.raises(InvalidModel, match=r"a packed network") as caught:
        CASTS[cast](packed)
    assert "\n" not in str(caught.value)
    assert packed.dump() == before
    assert same(packed(x), expected)


def test_what_changes_no_value_is_allowed():
    packed, x = pack(network(8, "bonn")[0]), odd_images(2, 0)
    expected = packed(x)
    changed = packed.float().cpu().to(torch.float32).to(memory_format=torch.channels_last).train().requires_grad_()
    assert same(changed(x), expected, ROUNDING)
    if not torch.cuda.is_available():
        before = packed.dump()
        with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
            packed.cuda()
        assert packed.dump() == before


@pytest.mark.parametrize("index", range(0, len(SCHEMES), 2))
def test_any_number_of_images_gives_what_the_model_gives(index):
    model, _ = network(100 + index, SCHEMES[index])
    packed = pack(model)
    x = odd_images(4, index)
    for count in (0, 1, 3, 0, 4):
        ours, theirs = packed(x[:count]), model(x[:count])
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert same(ours, theirs, ROUNDING)


class Kinds(nn.Module):
    """A convolution, positions with a linear layer, and a linear layer for the image; several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3)
        self.positions, self.image, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.register_buffer("table", torch.arange(4.0))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = self.conv(self.stem(x))
        tokens = self.positions(y.flatten(2).transpose(1, 2))
        return self.head(self.image(tokens.mean(1))), tokens, y.flatten(0, 1), self.table.view(2, 2), self.table, x


class Two(Kinds):
    """Those of the outputs that are tensors for each image."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return super().forward(x)[:2]


def test_no_image_has_outputs_of_every_kind():
    model = bonn_qat.binarize(Kinds(), include=["conv", "positions", "image"], input_size=SIZE).eval()
    packed = pack(model.requires_grad_(False))
    assert [layer.kind for layer in packed.layers] == ["bits"] * 3
    for count in (0, 1, 3):
        x = odd_images(4, 0)[:count]
        for ours, theirs in zip(packed(x), model(x), strict=True):
            assert ours.shape == theirs.shape
            assert same(ours, theirs, ROUNDING)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (None, "takes a tensor of images; got NoneType"),
        ([torch.zeros(3, 12, 11)], "takes a tensor of images; got list"),
        (torch.zeros(1, *SIZE).to_sparse(), "takes a tensor of images; got one of layout torch.sparse_coo"),
        (
            torch.zeros(1, 3, 5, 5),
            r"got torch.float32 \(1, 3, 5, 5\); for another size pack it with input_size=\(C, H, W\)",
        ),
        (torch.zeros(()), r"got torch.float32 \(\)"),
        (torch.zeros(0), r"got torch.float32 \(0,\)"),
        (torch.zeros(0, 0, 0, 0), r"got torch.float32 \(0, 0, 0, 0\)"),
        (torch.zeros(0, *SIZE, 1), r"got torch.float32 \(0, 3, 12, 11, 1\)"),
    ],
)
def test_what_are_no_images_is_told(given, words):
    with pytest.raises(InvalidData, match=words):
        pack(network(8, "bonn")[0])(given)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_of_torchscript_is_refused():
    packed = pack(network(8, "bonn")[0])
    with pytest.raises(InvalidModel, match=r"torch.jit.trace would record .*; use torch.export or torch.compile"):
        torch.jit.trace(packed, odd_images(2, 0))
    assert same(torch.export.export(packed, (odd_images(2, 0),)).module()(odd_images(2, 0)), packed(odd_images(2, 0)))


def test_an_exported_network_has_no_gradients_and_switches_none_off_for_others(monkeypatch):
    packed, x = pack(network(8, "bonn")[0]), odd_images(2, 0)
    exported = torch.export.export(packed, (x,)).module()
    assert not exported(x.clone().requires_grad_()).requires_grad
    monkeypatch.setattr(products, "binary_conv2d", None)
    with pytest.raises(TypeError):
        exported(x)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("compiled", [False, True])
def test_a_caller_that_changes_the_outputs_changes_nothing_else(compiled):
    model = bonn_qat.binarize(Kinds(), include=["conv", "positions", "image"], input_size=SIZE).eval()
    packed, x = pack(model.requires_grad_(False)), odd_images(2, 0)[:1]
    call = torch.compile(packed, backend="aot_eager") if compiled else packed
    given, held, expected = x.clone(), packed.dump(), [output.clone() for output in call(x)]
    for output in call(x):
        output.add_(1)
    assert torch.equal(x, given)
    assert packed.dump() == held
    assert all(same(ours, theirs) for ours, theirs in zip(call(x), expected, strict=True))
