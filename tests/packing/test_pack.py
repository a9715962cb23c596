"""Packed networks: the function of the binarized model, bit for bit in the binary layers; and their files."""

import copy
import gc
import json
import linecache
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import Tensor, fx, nn

import bonn_qat
from bonn_qat import PackedModel, Stage, pack, plugins
from bonn_qat.binarization.binarize import binary_layers
from bonn_qat.engine import operators as engine
from bonn_qat.errors import InvalidData, InvalidModel
from bonn_qat.layers import BinaryLayer
from bonn_qat.plugins import find_scheme

SIZE = (3, 32, 32)
# What is said in docs/packed.md: schemes by what their layers become.
KINDS = {
    "bits": [
        "abcnet",
        "bireal",
        "bireal-staged",
        "bnn",
        "bonn",
        "bonn-plus",
        "irnet",
        "pcnn",
        "reactnet",
        "recu",
        "xnor",
    ],
    "weights": ["adabin", "bwn", "dorefa", "mcn", "tbn"],
    "float": ["abcnet-5-5"],
}


def shaken(model: nn.Module) -> nn.Module:
    """As after a training: no norm, slope, bias or threshold at its start, norms of either sign."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.normal_(0.5, 1)
                module.bias.normal_(0, 0.3)
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[2] in ("threshold", "gamma", "zeta", "slope", "bias", "m_filter") or "act" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))
    return model.eval().requires_grad_(False)


class Small(nn.Module):
    """Two binary convolutions, the second beside a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv1, self.bn1, self.act1 = nn.Conv2d(16, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU()
        self.conv2, self.bn2, self.act2 = nn.Conv2d(24, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        y = self.act1(self.bn1(self.conv1(x)))
        return self.head(self.act2(self.bn2(self.conv2(y)) + x).mean((2, 3)))


def small(scheme: Any) -> nn.Module:
    model = bonn_qat.binarize(Small(), scheme, input_size=(3, 12, 12))
    for _, layer in binary_layers(model):
        layer.enter(Stage())  # a scheme may begin with float weights or activations
    return shaken(model)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return shaken(bonn_qat.binarize(timm.create_model("wrn10_16"), input_size=SIZE))


@pytest.fixture(scope="module")
def packed(model: nn.Module) -> PackedModel:
    return pack(model)


def images(count: int = 3, size: tuple[int, ...] = SIZE) -> Tensor:
    return torch.randn(count, *size).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize(("kind", "scheme"), [(kind, name) for kind, names in KINDS.items() for name in names])
def test_every_scheme_packs_to_the_same_function(kind, scheme):
    model = small(scheme)
    made = pack(model)
    assert [layer.kind for layer in made.layers] == [kind, kind]
    assert all(bool(layer.reason) == (kind != "bits") for layer in made.layers)
    x = images(8, (3, 12, 12))
    # Bits make the same sums in any order; floats, beside them, are summed up in the order of torch's choice.
    assert (made(x) - model(x)).abs().max() <= 1e-6 * model(x).abs().max()
    counted, own = bonn_qat.summary(model), bonn_qat.summary(made)
    assert own.macs == counted.macs
    assert own.binary_macs == (counted.binary_macs if kind == "bits" else 0)
    if kind != "float":
        assert own.binary_weights == counted.binary_weights


def test_no_scheme_is_forgotten():
    assert sorted(name for names in KINDS.values() for name in names) == sorted(set(plugins.schemes()) - {"float"})


class Odd(nn.Module):
    """A float convolution, a binary one of any kind, and its output as it is."""

    def __init__(self, channels: int, convolution: nn.Module) -> None:
        super().__init__()
        self.first, self.conv = nn.Conv2d(3, channels, 3), convolution

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.first(x))


CONVOLUTIONS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "stride": (70, lambda: nn.Conv2d(70, 33, 3, 2, 1)),
    "dilation, groups, bias": (24, lambda: nn.Conv2d(24, 40, 3, 1, 2, 2, groups=2)),
    "odd groups": (15, lambda: nn.Conv2d(15, 9, 3, padding=1, groups=3)),
    "padding same": (8, lambda: nn.Conv2d(8, 8, 4, padding="same")),
    "padding reflect": (8, lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect")),
    "padding circular": (8, lambda: nn.Conv2d(8, 8, (3, 5), padding=(1, 2), padding_mode="circular")),
    "as TensorFlow": (8, lambda: timm.layers.Conv2dSame(8, 12, 3, stride=2)),
    "standardized": (8, lambda: timm.layers.ScaledStdConv2d(8, 12, 3)),
    "7x7": (65, lambda: nn.Conv2d(65, 3, 7, padding=3)),
    "1x1": (130, lambda: nn.Conv2d(130, 5, 1)),
}


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("scheme", ["bonn", "xnor:input_scale"])
def test_a_binary_layer_is_the_same_to_the_last_bit(kind, scheme):
    channels, make = CONVOLUTIONS[kind]
    chosen = find_scheme("xnor").configure({"input_scale": True}) if ":" in scheme else scheme
    size = (3, 15, 12)
    model = shaken(bonn_qat.binarize(Odd(channels, make()), chosen, skip=["first"], include=["conv"], input_size=size))
    made = pack(model, size)
    assert [layer.kind for layer in made.layers] == ["bits"]
    x = images(2, size)
    assert torch.equal(made(x), model(x))


class Signal(nn.Module):
    """Layers of one axis, all of which but the ends can be binary."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(3, 16, 5, 2), nn.BatchNorm1d(16))
        self.body = nn.Sequential(
            nn.Conv1d(16, 24, 3, 2, 4, 2, groups=2), nn.ReLU(), nn.Conv1d(24, 8, 4, padding="same"), nn.ReLU(),
            nn.Conv1d(8, 8, 3, padding=2, padding_mode="reflect", bias=False), nn.BatchNorm1d(8), nn.ReLU(),
            nn.ConvTranspose1d(8, 16, 3, 2, groups=2),
        )  # fmt: skip
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(self.stem(x)).mean(2))


@pytest.mark.parametrize("scheme", ["bonn", "xnor:input_scale", "adabin"])
def test_signals_run_on_bits_too_and_transposed_layers_keep_bits(scheme, tmp_path):
    name, _, option = scheme.partition(":")
    chosen = find_scheme(name).configure({option: True} if option else {})
    model = shaken(bonn_qat.binarize(Signal(), chosen, input_size=(3, 60)))
    made = pack(model)
    of_signals = "weights" if scheme == "adabin" else "bits"
    assert [layer.kind for layer in made.layers] == [*[of_signals] * 3, "weights"]
    assert made.layers[3].reason.startswith("its weights" if scheme == "adabin" else "it is a transposed convolution")
    made.save(tmp_path / "net.safetensors")
    again, x = PackedModel.load(tmp_path / "net.safetensors"), torch.randn(5, 3, 60)
    assert torch.equal(again(x), made(x))
    assert (made(x) - model(x)).abs().max() <= 1e-6 * model(x).abs().max()
    counted, own = bonn_qat.summary(model), bonn_qat.summary(made)
    assert (own.macs, own.binary_weights) == (counted.macs, counted.binary_weights)


def test_a_network_with_volumes_is_refused_by_the_name_of_its_layer():
    class Volumes(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x[:, :, None])

    net = bonn_qat.binarize(
        Volumes(nn.Conv3d(3, 3, 1), nn.Conv3d(3, 9, 3, padding=1), nn.Conv3d(9, 3, 1)), input_size=(3, 4, 4)
    )
    with pytest.raises(InvalidModel, match=r"^1 is a BinaryConv3d, and packed networks have no .* 'pt2'\) or 'onnx'"):
        pack(net)


def test_linear_layers_are_the_same_to_the_last_bit():
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 30), nn.ReLU(), nn.Linear(30, 70), nn.ReLU(), nn.Linear(70, 3))
    model = shaken(bonn_qat.binarize(net, input_size=(3, 4, 4)))
    made = pack(model, (3, 4, 4))
    assert [(layer.name, layer.kind) for layer in made.layers] == [("3", "bits")]
    x = torch.randn(5, 3, 4, 4)
    assert torch.equal(made.network(x), model(x))
    torch.testing.assert_close(made(x), model(x))  # in C


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "vit": (partial(timm.create_model, "test_vit", img_size=32, patch_size=8), SIZE),
    "efficientnet": (partial(timm.create_model, "test_efficientnet"), (3, 64, 64)),
    "resnet": (partial(timm.create_model, "test_resnet"), (3, 64, 64)),
}


@pytest.mark.parametrize("net", NETS)
def test_networks_give_the_same(net, tmp_path):
    make, size = NETS[net]
    model = shaken(bonn_qat.binarize(make(), input_size=size))
    made = pack(model)
    x = images(2, size)
    assert (made(x) - model(x)).abs().max() <= 1e-5 * model(x).abs().max()
    assert torch.equal(PackedModel.load(made.save(tmp_path / "packed.safetensors"))(x), made(x))


def test_the_batch_is_free(packed, model):
    for count in (1, 5, 64):
        assert (packed(images(count))).shape == (count, 10)
    assert packed(torch.zeros(0, *SIZE)).shape == (0, 10)


def test_images_may_have_either_layout(packed):
    x = images()
    assert torch.equal(packed(x), packed(x.contiguous()))


def test_a_copy_and_a_pickled_one_give_the_same(packed):
    x = images()
    expected = packed(x)
    for other in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert torch.equal(other(x), expected)
        assert other.layers == packed.layers
        assert {id(tensor) for tensor in other.buffers()}.isdisjoint(map(id, packed.buffers()))
        assert other.dump() == packed.dump()


def test_the_model_stays_as_it_is(model):
    before = copy.deepcopy(model.state_dict())
    pack(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(isinstance(layer, BinaryLayer) for _, layer in binary_layers(model))


def test_between_binary_layers_nothing_but_codes_is_written(packed):
    """Norms are thresholds, and scale, shortcut and nonlinearity are epilogues."""
    called = {str(node.target) for node in packed.network.graph.nodes if node.op == "call_function"}
    assert not any("norm" in name or "prelu" in name or "mul" in name for name in called)
    signs = packed.network.graph.find_nodes(op="call_function", target=torch.ops.bonn_qat.sign_codes.default)
    assert len(signs) == 1  # the first; a convolution writes all others


def test_without_kernels_plain_torch_gives_the_same(packed, monkeypatch):
    x = images()
    compiled = torch.compile(packed, backend="aot_eager")  # which runs node by node
    with_kernels = compiled(x)
    monkeypatch.setattr(engine, "AVAILABLE", False)
    assert torch.equal(compiled(x), with_kernels)


def test_compiled_and_exported_it_is_the_same(packed):
    x = images()
    expected = packed(x)
    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")(x)
    assert torch.equal(torch.export.export(packed, (x,)).module()(x), compiled)
    assert torch.allclose(compiled, expected, atol=1e-6)  # in C, where floats are added in another order


def test_layers_that_share_their_weights_are_packed_once():
    conv = nn.Conv2d(8, 8, 3, padding=1)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), conv, nn.ReLU(), conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    )
    model = shaken(bonn_qat.binarize(net, input_size=(3, 9, 9)))
    made = pack(model)
    x = images(2, (3, 9, 9))
    assert torch.allclose(made(x), model(x), atol=1e-6)
    assert sum(tensor.dtype == torch.int64 for tensor in made.tensors().values()) == 1


def test_several_outputs_come_as_a_tuple():
    net = timm.create_model("wrn10_16", features_only=True)
    model = shaken(bonn_qat.binarize(net, input_size=SIZE))
    x = images()
    for ours, theirs in zip(pack(model)(x), model(x), strict=True):
        assert torch.equal(ours, theirs)


class Stem(nn.Module):
    """As a ResNet begins, with norms of either sign."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(3, 40, 5, 2, 2), nn.BatchNorm2d(40), nn.ReLU()
        self.pool, self.next = nn.MaxPool2d(3, 2, 1), nn.Conv2d(40, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.next(self.pool(self.act(self.norm(self.conv(x)))))


def test_maxima_are_taken_before_what_rises():
    model = shaken(bonn_qat.binarize(Stem(), include=["next"], input_size=SIZE))
    with torch.no_grad():
        model.act.weight.abs_()
    assert (model.norm.weight < 0).any()
    made = pack(model)
    called = [str(node.target) for node in made.network.graph.nodes if node.op == "call_function"]
    assert called.index("bonn_qat.max_pool2d.default") < called.index("bonn_qat.elementwise.default")
    x = images()
    assert torch.equal(made(x), model(x))
    with torch.no_grad():
        model.act.weight[0] = -0.5
    made = pack(model)
    called = [str(node.target) for node in made.network.graph.nodes if node.op == "call_function"]
    assert called.index("aten.max_pool2d.default") > called.index("bonn_qat.elementwise.default")
    assert torch.equal(made(x), model(x))


# --- the file


def test_a_file_gives_the_network_back(packed, tmp_path):
    path = packed.save(tmp_path / "a" / "packed.safetensors")
    read = PackedModel.load(path)
    x = images()
    assert torch.equal(read(x), packed(x))
    assert (read.layers, read.scheme, read.input_size, read.name) == (packed.layers, "bonn", SIZE, "WideResNet")
    assert read.save(tmp_path / "again.safetensors").read_bytes() == path.read_bytes()


def test_bits_are_bits_on_disk_and_in_memory(packed, model, tmp_path):
    binary = sum(layer.weight.numel() for _, layer in binary_layers(model))
    words = [tensor for tensor in packed.tensors().values() if tensor.dtype == torch.int64]
    assert 64 * sum(map(len, words)) == binary
    in_memory = [tensor for tensor in packed.network.buffers() if tensor.dtype == torch.int32]
    # Channels are filled up to 32: here 16 of them in each of five layers.
    assert binary <= 32 * sum(tensor.numel() for tensor in in_memory) <= 2 * binary
    report = bonn_qat.summary(packed)
    held = sum(tensor.numel() * tensor.element_size() for tensor in packed.tensors().values())
    assert report.mbit == pytest.approx(8e-6 * held)
    assert report.binary_macs == bonn_qat.summary(model).binary_macs
    assert report.macs == bonn_qat.summary(model).macs
    header = 250 * len(packed.network.graph.nodes)
    assert held < packed.save(tmp_path / "packed.safetensors").stat().st_size < held + header


def test_torch_keeps_no_source_of_networks_that_are_gone(packed, tmp_path):
    path, sources = packed.save(tmp_path / "packed.safetensors"), fx.graph_module._loader.eval_cache
    before = set(sources)
    loaded = [PackedModel.load(path) for _ in range(3)]
    assert len(sources.keys() - before) == 3
    del loaded
    gc.collect()
    assert sources.keys() <= before
    assert not any(name.startswith("<eval_with_key>") and name not in before for name in linecache.cache)


def test_a_file_needs_neither_timm_nor_brevitas_nor_mlflow_nor_the_c_runtime_nor_a_compiler(packed, tmp_path):
    path, x = packed.save(tmp_path / "packed.safetensors"), images(1)
    safetensors.torch.save_file({"x": x.contiguous(), "y": packed(x)}, tmp_path / "io.safetensors")
    code = f"""
import sys
for name in ("timm", "brevitas", "mlflow", "bonn_qat_runtime", "torchvision"):
    sys.modules[name] = None
import safetensors.torch, torch
from bonn_qat import PackedModel
io = safetensors.torch.load_file({str(tmp_path / "io.safetensors")!r})
ours = PackedModel.load({str(path)!r})(io["x"])
# Nor does it load torch's compiler, which takes seconds.
assert not {{"sympy", "torch._dynamo", "torch._inductor"}} & set(sys.modules)
# The last, float layer rounds by where its memory lies.
assert (ours - io["y"]).abs().max() <= 1e-6 * io["y"].abs().max()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def rewritten(path: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> Path:
    """The file with another header or other tensors, without a new checksum."""
    with safetensors.safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["bonn_qat"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(header, tensors)
    safetensors.torch.save_file(tensors, path, {"bonn_qat": json.dumps(header)})
    return path


def signed(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    from bonn_qat.files.tensors import digest

    header.pop("sha256")
    header["sha256"] = digest(tensors, header)


def drop(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    tensors.popitem()


def flip(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    next(tensor for tensor in tensors.values() if tensor.dtype == torch.int64)[0] ^= 1


def nodes(change: Callable[[list[dict[str, Any]]], Any]) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def edit(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        change(header["nodes"])
        signed(header, tensors)

    return edit


def resigned(
    change: Callable[[dict[str, Any], dict[str, Tensor]], Any],
) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def edit(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        change(header, tensors)
        signed(header, tensors)

    return edit


def shorten(header: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    name = next(name for name, tensor in tensors.items() if tensor.dtype == torch.int64)
    tensors[name] = tensors[name][1:].clone()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (flip, "altered"),
        (drop, "altered"),
        (lambda h, t: h.update(name="Other"), "altered"),
        (lambda h, t: h.update(format=1), "of format 1; this version of bonn-qat reads 2"),
        (lambda h, t: h.pop("kind"), "not a packed network"),
        (resigned(drop), "do not match its nodes"),
        (resigned(shorten), "words; got"),
        (resigned(lambda h, t: h.pop("layers")), "its header is invalid: its keys differ"),
        (resigned(lambda h, t: h.update(input_size=[3, 0, 9])), r"input_size is \(3, 0, 9\)"),
        (resigned(lambda h, t: h.update(nodes=None)), "a list of tables"),
        (nodes(lambda n: n.pop()), "inputs, and one output at its end"),
        (nodes(lambda n: n[-2].update(op="aten.from_file.default")), "cannot call"),
        (nodes(lambda n: n[-2].update(op="aten.add_.Tensor")), "cannot call"),
        (nodes(lambda n: n[-2].update(op="os.system")), "cannot call"),
        (nodes(lambda n: n[-2].update(op="aten.__class__.default")), "cannot call"),
        (nodes(lambda n: n[-2].update(args=[{"node": "nobody"}])), "cannot have the argument"),
        (nodes(lambda n: n[-2].update(args=[{"dtype": "nn"}])), "cannot have the argument"),
        (nodes(lambda n: n[0].update(name="import os")), "not a valid name of a node"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_what_was_written_is_refused(packed, tmp_path, change, message):
    path = rewritten(packed.save(tmp_path / "packed.safetensors"), change)
    with pytest.raises(InvalidData, match=message) as caught:
        PackedModel.load(path)
    assert str(path) in str(caught.value)


def test_a_truncated_file_is_refused(packed, tmp_path):
    path = packed.save(tmp_path / "packed.safetensors")
    whole = path.read_bytes()
    for length in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InvalidData, match=r"packed\.safetensors"):
            PackedModel.load(path)


def test_other_files_are_refused(tmp_path, model):
    with pytest.raises(InvalidData, match="no such file"):
        PackedModel.load(tmp_path / "absent")
    safetensors.torch.save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(InvalidData, match=r"bonn_qat.pack\(model\).save\(path\) writes one"):
        PackedModel.load(tmp_path / "x.safetensors")


# --- what cannot be packed


def test_a_float_model_is_refused():
    with pytest.raises(InvalidModel, match=r"no binary layer to pack; binarize it first.*from_brevitas"):
        pack(timm.create_model("wrn10_16"))


def test_a_packed_network_is_refused_and_its_file_is_no_weights_file(model, tmp_path):
    packed = pack(model)
    with pytest.raises(InvalidModel, match="the network is packed already"):
        pack(packed)
    with pytest.raises(InvalidData, match=r"is a packed network, which bonn_qat\.PackedModel\.load"):
        bonn_qat.load(packed.save(tmp_path / "net.safetensors"))


def test_a_stage_with_float_weights_is_refused(model):
    other = copy.deepcopy(model)
    next(layer for _, layer in binary_layers(other)).binary_weight = False
    with pytest.raises(InvalidModel, match=r"layer1.0.conv1 is in a stage of its training"):
        pack(other)


def test_images_of_another_size_or_type_are_refused(packed):
    for x in (torch.zeros(1, 3, 33, 32), torch.zeros(3, 32, 32), torch.zeros(1, *SIZE, dtype=torch.float64)):
        with pytest.raises(InvalidData, match=r"packed for float32 images \(B, 3, 32, 32\); got"):
            packed(x)


class Fickle(Small):
    """What it does depends on the images."""

    fickle = False

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(-x if self.fickle and x.sum() > 0 else x)


def test_a_model_that_torch_cannot_export_is_refused():
    model = bonn_qat.binarize(Fickle(), input_size=(3, 9, 9))
    model.fickle = True  # type: ignore[assignment]
    with pytest.raises(InvalidModel, match=r"torch.export does not take this Fickle"):
        pack(model)


class Random(Small):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.rand_like(x))


def test_a_model_that_draws_random_numbers_is_refused():
    with pytest.raises(InvalidModel, match=r"Random calls aten.rand_like.default, which a packed network cannot call"):
        pack(bonn_qat.binarize(Random(), input_size=(3, 9, 9)))


def test_a_model_may_read_the_attributes_of_its_layers():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, (3, 5))

        def forward(self, x):
            height, width = self.second.kernel_size
            x = nn.functional.pad(self.first(x), (width // 2, width // 2, height // 2, height // 2))
            return self.second(x.to(self.second.weight.dtype)).mean((2, 3)) * self.second.weight.shape[0]

    padded = bonn_qat.binarize(Padded(), include=["second"]).eval()
    x = images(2)
    with torch.no_grad():
        packed, expected = pack(padded, tuple(x.shape[1:])), padded(x)
        assert torch.equal(packed.network(x), expected)
        torch.testing.assert_close(packed(x), expected)  # in C


def test_a_part_without_autocast_is_packed_too():
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

        def forward(self, x):
            x = self.first(x)
            with torch.autocast("cpu", enabled=False):
                return self.second(x.float()).mean((2, 3))

    careful = bonn_qat.binarize(Careful(), include=["second"]).eval()
    x = images(2)
    with torch.no_grad():
        assert torch.allclose(pack(careful, tuple(x.shape[1:]))(x), careful(x), atol=1e-6)


def _normalized(net, x):
    return net(x.sub_(0.5).div_(0.2))


# What torch.export cannot see, because it follows one number of images.
OF_THE_BATCH = {
    "every other": lambda net, x: net(x)[::2],
    "times the number": lambda net, x: net(x) * float(len(x)),
    "one alone": lambda net, x: 2 * net(x) if len(x) == 1 else net(x),
    "more than one": lambda net, x: net(x).flip(1) if len(x) > 1 else net(x),
    "of the largest": lambda net, x: (lambda y: y / y.abs().max())(torch.stack(list(net(x)))),
    "sequence first": lambda net, x: torch.stack([y.flatten(1).T for y in net(x)], 1),
    "a list": lambda net, x: list(net(x)),
    "nothing": lambda net, x: (net(x), None),
    "its statistics": lambda net, x: nn.functional.batch_norm(net(x), None, None, training=True),
}  # fmt: skip


class Of(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
        self.function = function
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def forward(self, x):
        return self.function(self.net, x)


@pytest.mark.parametrize("name", OF_THE_BATCH)
def test_a_model_that_is_no_function_of_each_image_is_refused(name):
    model = bonn_qat.binarize(Of(OF_THE_BATCH[name]), include=["net.1"], input_size=(3, 8, 8))
    with pytest.raises(InvalidModel, match=r"Of cannot be packed: |this one returns tuple\[tensor, None\]"):
        pack(model)


def test_images_may_be_changed_in_place_but_no_buffer():
    model = bonn_qat.binarize(Of(_normalized), include=["net.1"], input_size=(3, 8, 8)).eval()
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        # Its float convolutions add in the order of channels_last, which not every CPU's kernels share.
        torch.testing.assert_close(pack(model)(x), model(x.clone()))

    class Counts(Of):
        def forward(self, x):
            self.calls += 1
            return super().forward(x)

    with pytest.raises(InvalidModel, match="the model changes its buffer calls in each call"):
        pack(bonn_qat.binarize(Counts(lambda net, x: net(x)), include=["net.1"], input_size=(3, 8, 8)))


def test_what_is_sent_to_a_process_holds_no_shared_memory():
    """torch's own reduction of tensors is of files that are gone when a process that was not forked looks for them."""
    packed = pack(bonn_qat.binarize(Of(lambda net, x: net(x)), include=["net.1"], input_size=(3, 8, 8)))
    content = ForkingPickler.dumps(packed)
    assert b"rebuild" not in bytes(content)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(pickle.loads(content)(x), packed(x))


def shared_keys(net, x):
    """The attention of four heads that share keys and values, as MobileNetV5 has it."""
    tokens = net(x).flatten(2).transpose(1, 2)
    keys = tokens[:, None, ::2]
    heads = tokens.unflatten(2, (4, 2)).transpose(1, 2)
    return nn.functional.scaled_dot_product_attention(heads, keys[..., :2], keys).transpose(1, 2).flatten(2)


def test_heads_may_share_their_keys(tmp_path):
    model = bonn_qat.binarize(Of(shared_keys), include=["net.1"], input_size=(3, 8, 8)).eval()
    packed = PackedModel.load(pack(model).save(tmp_path / "net"))
    assert packed.runtime == "C"
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(x.contiguous(memory_format=torch.channels_last))
        torch.testing.assert_close(packed(x), expected)
        torch.testing.assert_close(packed.network(x.contiguous(memory_format=packed.layout)), expected)


def test_a_network_is_not_refused_for_what_rounds_otherwise_in_c(monkeypatch):
    """There one more sign may change, and of a network of random weights that may be another output."""
    monkeypatch.setattr("bonn_qat.runtime.planned.Planned.run", lambda self, images: images + 1e3)
    assert pack(bonn_qat.binarize(Of(lambda net, x: net(x)), include=["net.1"], input_size=(3, 8, 8))).runtime == "C"


def test_a_network_of_the_scheme_float_is_packed_as_it_is(tmp_path):
    model = bonn_qat.binarize(timm.create_model("wrn10_16", num_classes=4), "float", input_size=(3, 16, 16)).eval()
    packed = PackedModel.load(pack(model).save(tmp_path / "net"))
    assert (packed.runtime, packed.scheme, packed.layers) == ("C", "float", ())
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(packed(x), model(x).detach())


class Viewed(nn.Module):
    """The way of old code from maps to features, in one of its forms."""

    def __init__(self, shape: Callable[[Tensor], tuple[int, ...]]) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.AvgPool2d(2)
        )
        self.classifier, self.shape = nn.Linear(72, 5), shape

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).view(self.shape(x)))


@pytest.mark.parametrize(
    ("shape", "batch"), [(lambda x: (x.size(0), -1), None), (lambda x: (-1, 72), None), (lambda x: (len(x), 72), 1)]
)
def test_a_model_that_views_maps_is_packed(shape, batch):
    model = shaken(bonn_qat.binarize(Viewed(shape), input_size=(3, 8, 8))).eval()
    packed, images = pack(model), torch.randn(3, 3, 8, 8)
    assert packed.batch == batch
    torch.testing.assert_close(packed(images), model(images))
    assert {layer.kind for layer in packed.layers} == {"bits"}
