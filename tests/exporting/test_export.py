"""Export: each format gives the model's outputs in its own runtime; what a format cannot express is an error."""

import copy
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import bonn_qat
from bonn_qat import plugins
from bonn_qat.binarization.binarize import binary_layers
from bonn_qat.errors import BonnQatError, InvalidData, InvalidModel, UnknownName
from bonn_qat.exporting import export as exporting
from bonn_qat.exporting.export import FORMATS, PackageMissing, export, verify
from bonn_qat.runtime.packed import PackedModel
from bonn_qat.scheme import Stage
from bonn_qat.training.recipe import Recipe

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
qonnx_cost = pytest.importorskip("qonnx.util.inference_cost")

PAGE = Path(__file__).parents[2] / "docs" / "export.md"

# How onnx stores the weights, what of it qonnx refuses, how pt2 stores the weights, what pack makes of the layer.
SIGNS, NO_INPUTS = ("bits", "yes", "int8", "bits"), ("bits", "inputs", "int8", "weights")
TWO_VALUES, MORE_VALUES = ("bits", "weights", "float32", "weights"), ("float32", "weights", "float32", "float")
FLOAT_INPUTS = (*SIGNS[:3], "weights")
SCHEMES: Mapping[str, tuple[str, str, str, str]] = {
    "bonn": SIGNS,
    "bonn-plus": SIGNS,
    "bnn": SIGNS,
    "bwn": FLOAT_INPUTS,
    "xnor": SIGNS,
    "xnor:input_scale=true": SIGNS,
    "bireal": SIGNS,
    "bireal-staged": SIGNS,
    "pcnn": SIGNS,
    "pcnn:projections=3": TWO_VALUES,  # for as long as the means of its projections have one sign
    "reactnet": SIGNS,
    "irnet": SIGNS,
    "recu": SIGNS,
    "tbn": NO_INPUTS,
    "dorefa": NO_INPUTS,
    "dorefa:weight_bits=2": MORE_VALUES,
    "abcnet": (*NO_INPUTS[:3], "bits"),
    "abcnet-5-5": MORE_VALUES,
    "mcn": (*MORE_VALUES[:3], "weights"),
    "adabin": TWO_VALUES,
}
IN_QONNX = [variant for variant, (_, cell, *_) in SCHEMES.items() if cell == "yes"]


class Branches(nn.Module):
    """One stem, and a binary layer of each scheme on it: ``(B, 3, H, W) -> (B, schemes, 5, H, W)``.

    No layer has a number of weights that fills its last byte.
    """

    def __init__(self, names: list[str]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 7, 3, padding=1)
        self.branches = nn.ModuleList(nn.Sequential(nn.Conv2d(7, 5, 3, padding=1), nn.ReLU()) for _ in names)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return torch.stack([branch(x) for branch in self.branches], 1)


def scheme_of(variant: str) -> bonn_qat.Scheme:
    recipe = Recipe().with_scheme(variant)
    return plugins.find_scheme(recipe.scheme).configure(recipe.scheme_options)


def branches(variants: list[str]) -> nn.Module:
    """A worn net with a branch for each scheme."""
    schemes = {f"branches.{index}": scheme_of(variant) for index, variant in enumerate(variants)}
    net = bonn_qat.binarize(Branches(variants), schemes=schemes, include=["branches"], input_size=(3, 6, 6))
    return worn(net)


@torch.no_grad()
def worn(model: nn.Module) -> nn.Module:
    """``model`` with norms, slopes, thresholds and scales off their start, as after a training."""
    latents = {id(module.weight) for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)}
    for parameter in model.parameters():
        if id(parameter) not in latents:
            parameter.add_(0.1 * torch.rand_like(parameter) + 0.02)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.1)
            module.running_var.uniform_(0.5, 1.5)
    return model.eval()


class Margins(TorchDispatchMode):
    """How near each of the first axis' images comes to a threshold: of signs, comparisons and roundings."""

    def __init__(self, images: int) -> None:
        super().__init__()
        self.nearest = torch.full((images,), float("inf"))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name in ("sign", "round", "ge", "gt", "le", "lt") and args[0].ndim and len(args[0]) % len(self.nearest) == 0:
            distance = {"sign": lambda x: x, "round": lambda x: x - x.floor() - 0.5}.get(name, lambda x: x - args[1])
            distances = distance(args[0]).abs().float().reshape(len(self.nearest), -1)
            self.nearest = torch.minimum(self.nearest, distances.amin(1))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def steady(model: nn.Module, images: Tensor) -> Tensor:
    """Those of ``images`` with no value within the rounding of a threshold, most of them."""
    frozen = copy.deepcopy(model)
    for _, layer in binary_layers(frozen):
        layer.freeze()
    with Margins(len(images)) as margins:
        frozen(images)
    kept = images[margins.nearest > 2e-6]
    assert len(kept) > len(images) / 2
    return kept


def check(model: nn.Module, path: Path, format: str, images: Tensor, tolerance: float = 1e-5) -> None:
    """The file gives what the model gives, for as many images at once as the format takes."""
    images = steady(model, images)
    with torch.no_grad():
        expected = model(images)
    (output,) = FORMATS[format].run(path, images)
    torch.testing.assert_close(output, expected, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------------- every scheme


@pytest.fixture(scope="module")
def every() -> nn.Module:
    torch.manual_seed(0)
    return branches(list(SCHEMES))


@pytest.fixture(scope="module")
def every_onnx(every: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(every, tmp_path_factory.mktemp("onnx") / "net.onnx", "onnx")


def test_the_table_has_every_scheme_and_says_what_is_tested() -> None:
    rows = re.findall(r"^\| `([^`]+)`" + 4 * r" \| (\w+)" + r" \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert {name: tuple(cells) for name, *cells in rows} == SCHEMES
    assert {name.partition(":")[0] for name in SCHEMES} == plugins.schemes().keys() - {"float"}


def test_onnxruntime_gives_what_every_scheme_gives(every: nn.Module, every_onnx: Path) -> None:
    check(every, every_onnx, "onnx", torch.randn(8, 3, 6, 6))


def test_onnx_stores_one_bit_for_a_weight_of_two_values(every: nn.Module, every_onnx: Path) -> None:
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(every_onnx).graph.initializer}
    for (name, layer), (cell, *_) in zip(binary_layers(every), SCHEMES.values(), strict=True):
        weight = stored.get(f"{name}.weight")
        bits = stored.get(f"bonn_qat.{name}.weight.bits")
        assert (bits is not None, weight is not None) == (cell == "bits", cell == "float32"), name
        assert bits is None or bits.nbytes == -(-layer.weight.numel() // 8)


def kernels(path: Path, folder: Path) -> list["np.ndarray[Any, Any]"]:
    """The weights of products after onnxruntime's own changes of the graph."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    # Beyond that a CPU's own layouts come.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    graph = onnx.load(options.optimized_model_filepath).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type.endswith(("Conv", "Gemm", "MatMul"))]
    return [constants[node.input[1]] for node in products]


def test_onnxruntime_leaves_signs_signs_so_that_their_sums_are_exact(every_onnx: Path, tmp_path: Path) -> None:
    binary = [kernel for kernel in kernels(every_onnx, tmp_path) if kernel.shape == (5, 7, 3, 3)]
    signs = [kernel for kernel in binary if (abs(kernel) == 1).all()]
    assert len(binary) == len(SCHEMES)
    assert len(signs) == sum(cells[1] != "weights" for cells in SCHEMES.values())


def test_qonnx_gives_what_its_schemes_give(tmp_path: Path) -> None:
    net = branches(IN_QONNX)
    path = export(net, tmp_path / "net.onnx", "qonnx")
    check(net, path, "qonnx", torch.randn(3, 3, 6, 6))
    nodes = [node.op_type for node in onnx.load(path).graph.node]
    assert nodes.count("BipolarQuant") == 2 * len(IN_QONNX) - 1  # bwn's inputs stay float
    assert not {"Sign", "Where"} & set(nodes)


@pytest.mark.parametrize("variant", [variant for variant in SCHEMES if variant not in IN_QONNX])
def test_qonnx_refuses_what_is_not_bipolar(variant: str, tmp_path: Path) -> None:
    net, scheme = branches(["bonn", variant]), variant.partition(":")[0]
    words = {"weights": "its weights are not a scale times a sign", "inputs": r"its inputs are not -1 and \+1"}
    expected = (
        rf"the format 'qonnx' cannot hold branches\.1\.0, of the scheme '{scheme}': {words[SCHEMES[variant][1]]}; "
        r"'onnx', 'pt2', 'packed' can, and skip='branches\.1\.0' in binarize leaves it float"
    )
    with pytest.raises(InvalidModel, match=expected):
        export(net, tmp_path / "net.onnx", "qonnx")
    assert not list(tmp_path.iterdir())


def test_pt2_gives_what_every_scheme_gives_to_the_last_bit(every: nn.Module, tmp_path: Path) -> None:
    program = torch.export.load(export(every, tmp_path / "net.pt2", "pt2"))
    images, kinds = torch.randn(8, 3, 6, 6), {"int8": torch.int8, "float32": torch.float32}
    assert torch.equal(program.module()(images), every(images))
    for (name, _), (_, _, cell, _) in zip(binary_layers(every), SCHEMES.values(), strict=True):
        assert program.state_dict[f"{name}.weight"].dtype == kinds[cell], name


def test_packed_gives_what_every_scheme_gives(every: nn.Module, tmp_path: Path) -> None:
    packed = PackedModel.load(export(every, tmp_path / "net.safetensors", "packed"))
    assert {layer.name: layer.kind for layer in packed.layers} == {
        name: cell for (name, _), (*_, cell) in zip(binary_layers(every), SCHEMES.values(), strict=True)
    }
    images = steady(every, torch.randn(8, 3, 6, 6))
    torch.testing.assert_close(packed(images), every(images), rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------------------------------------- whole networks


def wrn(scheme: str) -> nn.Module:
    net = timm.create_model("wrn10_16", num_classes=10)
    return bonn_qat.binarize(net, scheme_of(scheme), input_size=(3, 16, 16))


def mixer(scheme: str) -> nn.Module:
    net = MlpMixer(num_classes=10, img_size=16, patch_size=8, num_blocks=1, embed_dim=24)
    net.head.reset_parameters()  # timm starts it at zero, and no output would depend on the image
    return bonn_qat.binarize(net, scheme_of(scheme), input_size=(3, 16, 16))


@pytest.mark.parametrize(
    ("make", "scheme", "format"), [(wrn, "xnor:input_scale=true", "onnx"), (mixer, "reactnet", "qonnx")]
)
def test_a_whole_network_gives_the_same(make: Any, scheme: str, format: str, tmp_path: Path) -> None:
    net = worn(make(scheme))
    check(net, export(net, tmp_path / "net", format), format, torch.randn(6, 3, 16, 16), tolerance=1e-4)


@pytest.mark.parametrize("format", ["c", "wasm"])
def test_a_folder_gives_the_same_and_says_nothing_of_the_machine(format: str, tmp_path: Path) -> None:
    if format == "wasm" and shutil.which("node") is None:
        pytest.skip("no Node")
    net = worn(wrn("reactnet"))
    path = tmp_path / "Net-1"
    path.mkdir()
    for name in ("app.c", "app.h", "app.js"):  # a project of one's own
        path.joinpath(name).write_text("mine")
    for _ in range(2):  # the second time in place of the first
        assert export(net, path, format) == path
    check(net, path, format, torch.randn(6, 3, 16, 16), tolerance=1e-4)
    content = b"".join(file.read_bytes() for file in path.iterdir())
    for place in (Path(bonn_qat.__file__).parent, Path(torch.__file__).parents[1], tmp_path):
        assert str(place).encode() not in content
    assert path.joinpath(f"net_1.{'js' if format == 'wasm' else 'c'}").exists()
    assert path.joinpath("app.c").read_text() == "mine"


def test_a_folder_with_a_file_of_the_same_name_is_refused_and_stays(tmp_path: Path) -> None:
    tmp_path.joinpath("main.c").write_text("mine")
    with pytest.raises(
        InvalidData, match=r"already holds main.c, and no earlier export of this name; give a folder of"
    ):
        export(small(), tmp_path / ".", "c")
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("main.c", "mine")]


def test_one_number_for_each_image_is_verified(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 1), nn.Flatten(0))
    net = bonn_qat.binarize(net, input_size=(3, 8, 8)).eval()
    assert verify(net, export(net, tmp_path / "net", "packed"), "packed").difference < 1e-5


def test_a_folder_refuses_what_the_runtime_lacks_and_names_that_are_none(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.LogSigmoid(), nn.Conv2d(4, 2, 3))
    net = bonn_qat.binarize(net, "bonn", input_size=(3, 8, 8)).eval()
    with pytest.raises(
        InvalidModel, match=r"'c' cannot hold this network: .* node 'log_sigmoid', .*; 'packed', 'onnx'"
    ):
        export(net, tmp_path / "net", "c")
    net[2] = nn.Identity()
    with pytest.raises(InvalidModel, match="'1net' cannot name a network in C"):
        export(net, tmp_path / "1net", "c")
    assert not list(tmp_path.iterdir())


class Kinds(nn.Module):
    """A binary layer of every kind but Conv2d on the maps of one stem: ``(B, 3, 4, 8) -> (B, 5, numbers)``."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.signals = nn.ModuleList([nn.Conv1d(6, 5, 3, 2, 1), nn.ConvTranspose1d(6, 5, 3, 2)])
        self.images = nn.ModuleList([nn.ConvTranspose2d(6, 5, 3, 2, 1, 1)])
        self.volumes = nn.ModuleList([nn.Conv3d(6, 5, 3, padding=1), nn.ConvTranspose3d(6, 5, 2, 2)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        shapes = (x.flatten(2), self.signals), (x, self.images), (x.unflatten(2, (2, 2)), self.volumes)
        return torch.cat([layer(y).flatten(2) for y, layers in shapes for layer in layers], 2)


@pytest.mark.parametrize("format", ["onnx", "pt2"])
@pytest.mark.parametrize("scheme", ["bonn", "xnor:input_scale=true", "adabin"])
def test_layers_of_every_kind_give_the_same(scheme: str, format: str, tmp_path: Path) -> None:
    kinds = ["signals", "images", "volumes"]
    net = worn(bonn_qat.binarize(Kinds(), scheme_of(scheme), include=kinds, input_size=(3, 4, 8)))
    assert len(net.binarization.binary) == 5
    check(net, export(net, tmp_path / "net", format), format, torch.randn(12, 3, 4, 8))


# ------------------------------------------------------------------------------------------------- what a file is


def small(scheme: str = "bonn") -> nn.Module:
    """Three binary layers, of both kinds, on an exact one: the stem passes its input on."""
    net = nn.Sequential(
        nn.Conv2d(3, 3, 1, bias=False), nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding="same", bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 5),
    )  # fmt: skip
    with torch.no_grad():
        net[0].weight.copy_(torch.eye(3)[:, :, None, None])
    return bonn_qat.binarize(net, scheme, input_size=(3, 8, 8)).eval()


@pytest.fixture(scope="module")
def net() -> nn.Module:
    torch.manual_seed(0)
    return worn(small())


@pytest.fixture(scope="module")
def files(net: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    return {format: export(net, folder / f"net.{format}", format) for format in FILES}


FILES = [name for name, format in FORMATS.items() if format.files is None]
EVERY_FORMAT = pytest.mark.parametrize("format", FILES)


@EVERY_FORMAT
def test_a_file_is_alone_and_says_nothing_of_the_machine(format: str, files: dict[str, Path]) -> None:
    assert sorted(files[format].parent.iterdir()) == sorted(files.values())
    content = files[format].read_bytes()
    for place in (Path(bonn_qat.__file__).parent, Path(torch.__file__).parents[1], Path(__file__).parent):
        assert str(place).encode() not in content


def test_onnxruntime_leaves_the_signs_of_linear_layers_signs(files: dict[str, Path], tmp_path: Path) -> None:
    signs = [kernel.size for kernel in kernels(files["onnx"], tmp_path) if (abs(kernel) == 1).all()]
    assert signs == [3 * 8 * 9, 8 * 8 * 9, 8 * 6]


def test_qonnx_counts_the_binary_macs_and_bits_of_the_summary(net: nn.Module, files: dict[str, Path]) -> None:
    own = bonn_qat.summary(net)
    other = qonnx_cost.inference_cost(str(files["qonnx"]), discount_sparsity=False)["total_cost"]
    assert own.macs == other["total_macs"]
    assert own.binary_macs == other["op_mac_BIPOLAR_BIPOLAR"] > 0
    assert own.binary_weights == other["mem_w_BIPOLAR"]


def test_onnx_has_no_operators_but_its_own(files: dict[str, Path]) -> None:
    model = onnx.load(files["onnx"])
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert [opset.domain for opset in model.opset_import] == [""]


def test_the_input_says_which_images_it_takes(files: dict[str, Path]) -> None:
    (given,) = onnxruntime.InferenceSession(files["onnx"]).get_inputs()
    assert (given.name, given.type, given.shape) == ("images", "tensor(float)", ["batch", 3, 8, 8])
    (given,) = onnx.load(files["qonnx"]).graph.input
    assert [size.dim_value for size in given.type.tensor_type.shape.dim] == [1, 3, 8, 8]


def test_onnx_means_to_its_reference_what_it_means_to_onnxruntime(files: dict[str, Path]) -> None:
    from onnx.reference import ReferenceEvaluator

    images = torch.randn(2, 3, 8, 8)
    (expected,) = FORMATS["onnx"].run(files["onnx"], images)
    (output,) = ReferenceEvaluator(onnx.load(files["onnx"])).run(None, {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("format", ["onnx", "pt2", "packed"])
def test_the_batch_has_any_size(format: str, count: int, net: nn.Module, files: dict[str, Path]) -> None:
    check(net, files[format], format, torch.randn(count, 3, 8, 8))


class Pairs(nn.Module):
    """A network whose own code fixes the batch: to 1, or an even number."""

    def __init__(self) -> None:
        super().__init__()
        self.net = worn(small())

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if len(x) == 1 else self.net(x).reshape(-1, 2, 5).flatten(0, 1)


class Branching(Pairs):
    """A network whose way depends on the values of its images."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) if x.sum() > 0 else -self.net(x)


def test_a_network_that_fixes_its_batch_becomes_a_file_for_one_image(tmp_path: Path) -> None:
    model = Pairs().eval()
    path = export(model, tmp_path / "net.pt2", "pt2", input_size=(3, 8, 8))
    check(model, path, "pt2", torch.randn(4, 3, 8, 8))
    with pytest.raises(AssertionError, match="Guard failed"):
        torch.export.load(path).module()(torch.randn(2, 3, 8, 8))


@EVERY_FORMAT
def test_the_sign_of_zero_is_plus_one_and_sums_of_signs_are_exact(format: str, tmp_path: Path) -> None:
    # Norms at their start pass zeros on, and sums of few signs are zero often: one that is not exact would change the
    # signs after it, and the outputs by far more than their rounding.
    model = small()
    images = torch.randint(-1, 2, (4, 3, 8, 8)).float()
    images[0], images[1] = 0.0, -0.0
    zeros: list[Tensor] = []
    for _, layer in binary_layers(model):
        layer.norm.register_forward_hook(lambda _, inputs, output: zeros.append((output == 0).float().mean()))
    path = export(model, tmp_path / "net", format)
    zeros.clear()
    with torch.no_grad():
        expected = model(images)
    assert all(share > 0.02 for share in zeros[:2])
    (output,) = FORMATS[format].run(path, images)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output[1], output[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_the_model_stays_as_it_is_and_its_losses_may_live_on(format: str, tmp_path: Path) -> None:
    model = small().train()
    objective = bonn_qat.Objective(model)
    model[1].norm.eval()
    objective(torch.randn(4, 3, 8, 8), torch.randint(5, (4,))).total.backward()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    flags = [(module, module.training) for module in model.modules()]
    path = export(model, tmp_path / "net", format)
    agreement = verify(model, path, format, images=2)
    assert [(module, module.training) for module in model.modules()] == flags
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert agreement.difference < 1e-5
    assert agreement.same == 1
    objective(torch.randn(4, 3, 8, 8), torch.randint(5, (4,))).total.backward()


def test_a_frozen_model_is_exported_as_one_that_is_not(net: nn.Module, files: dict[str, Path], tmp_path: Path) -> None:
    frozen = copy.deepcopy(net)
    for _, layer in binary_layers(frozen):
        layer.freeze()
    assert export(frozen, tmp_path / "net.onnx", "onnx").read_bytes() == files["onnx"].read_bytes()


def test_verify_sees_another_network(net: nn.Module, files: dict[str, Path]) -> None:
    same = 0.0
    for shift in 9 * torch.eye(5):
        other = copy.deepcopy(net)
        with torch.no_grad():
            other[9].bias += shift
        agreement = verify(other, files["onnx"], "onnx", images=3)
        assert agreement.difference == pytest.approx(9, abs=1e-3)
        assert agreement.median == pytest.approx(9, abs=1e-3)
        same += agreement.same
    assert same == pytest.approx(1)  # each of them gives one class to all images, and the network one of them to each


# ------------------------------------------------------------------------------------------------------------ errors


def in_a_float_stage() -> nn.Module:
    model = small()
    model[1].enter(Stage(weights="float"))
    return model


@pytest.mark.parametrize(
    ("make", "format", "error", "words"),
    [
        (small, "onx", UnknownName, "unknown format 'onx'; did you mean 'onnx' or 'qonnx'"),
        (lambda: nn.Linear(2, 2), "pt2", InvalidModel, r"Linear is not binarized; export\(binarize\(model\), ...\)"),
        (
            in_a_float_stage,
            "pt2",
            InvalidModel,
            "1 is in a stage of the training that leaves weights or activations float",
        ),
        (
            lambda: bonn_qat.pack(small(), (3, 8, 8)),
            "c",
            InvalidModel,
            r"a packed network cannot be exported again; .*c_files",
        ),
        (Branching, "pt2", InvalidModel, r"torch.export cannot trace Branching for float32 \(B, 3, 8, 8\): "),
    ],
    ids=["format", "float", "stage", "packed", "branching"],
)
def test_what_cannot_be_exported_is_told(
    make: Any, format: str, error: type[BonnQatError], words: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=words):
        export(make(), tmp_path / "net", format, input_size=(3, 8, 8))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("format", "package"), [("onnx", "onnxscript"), ("qonnx", "qonnx")])
def test_a_missing_package_is_told_with_its_command(
    format: str, package: str, net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == package else object())
    with pytest.raises(
        PackageMissing, match=rf"the format '{format}' needs {package}: pip install 'bonn-qat\[export\]'"
    ):
        export(net, tmp_path / "net", format)


def test_a_missing_runtime_is_told_with_its_command(
    net: nn.Module, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "onnxruntime" else object())
    with pytest.raises(PackageMissing, match=r"the format 'onnx' needs onnxruntime: pip install 'bonn-qat\[export\]'"):
        verify(net, files["onnx"], "onnx")


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_is_text_or_a_path(kind: type, net: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "made" / "net.safetensors"
    assert export(net, kind(path), "packed") == path
    assert verify(net, kind(path), "packed", images=2).same == 1


def test_a_path_that_cannot_be_written_is_refused_before_any_work(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work(model: nn.Module, size: tuple[int, ...]) -> bytes:
        raise AssertionError("it wrote the file's content first")

    monkeypatch.setattr(exporting, "FORMATS", {"pt2": FORMATS["pt2"]._replace(write=work)})
    (tmp_path / "file").touch()
    with pytest.raises(IsADirectoryError, match=re.escape(str(tmp_path))):
        export(net, tmp_path, "pt2")
    with pytest.raises(NotADirectoryError, match="file"):
        export(net, str(tmp_path / "file" / "net.pt2"), "pt2")
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(PermissionError, match=re.escape(str(tmp_path))):
        export(net, tmp_path / "made" / "net.pt2", "pt2")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_a_failed_write_leaves_the_old_file(net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.pt2"
    path.write_bytes(b"old")

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        export(net, path, "pt2")
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("net.pt2", b"old")]
