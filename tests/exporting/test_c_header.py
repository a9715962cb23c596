"""C headers: C code computes the same as the packed network, to the last bit."""

import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import bonn_qat
from bonn_qat import PackedModel, Stage, pack
from bonn_qat.binarization.binarize import binary_layers
from bonn_qat.errors import InvalidModel
from bonn_qat.exporting.c.header import FORMAT, c_header
from bonn_qat.runtime.epilogue import ADD, CLAMP, FMA, PRELU, RESIDUAL, ROWS, SCALE
from bonn_qat.runtime.layout import Geometry, encode_weight, unpack_words

ops = torch.ops.bonn_qat
STRICT = ["-std=c99", "-Wall", "-Wextra", "-Werror", "-pedantic", "-O2"]
# GNU's own C may join a product and a sum, and keeps longer numbers than float32 in the registers of the x87.
LOOSE = ["-std=gnu99", "-O3", "-ffp-contract=fast", "-DBONN_QAT_PORTABLE"]
X87 = [*LOOSE, "-mfpmath=387"]
SIZE = (5, 15, 12)
# Each takes what the one before it gives, so that channels fit.
GEOMETRIES = [
    Geometry(70, 5, (3, 3), (1, 1), (1, 1, 1, 1)),
    Geometry(33, 70, (3, 3), (2, 2), (1, 1, 1, 1)),
    Geometry(64, 33, (1, 1)),
    Geometry(24, 64, (2, 3), (1, 2), (0, 1, 2, 0)),
    Geometry(40, 24, (3, 3), (1, 1), (2, 2, 2, 2), (2, 2), 2),
    Geometry(15, 40, (7, 7), (1, 1), (3, 3, 3, 3)),
    Geometry(9, 15, (3, 3), (1, 1), (2, 0, 1, 3), (1, 2), 3),
    Geometry(130, 9, (1, 1), (1, 1), (1, 0, 0, 2), groups=1),
    Geometry(130, 130, (3, 3), (1, 1), (1, 1, 1, 1), groups=130),
    Geometry(1, 130, (3, 3), (1, 1), (4, 4, 4, 4)),  # windows without a pixel
]
PROGRAMS = {
    "all": [SCALE, 0, ADD, 1, FMA, 2, RESIDUAL, 0, PRELU, 4, CLAMP, 5],
    "signed zeros": [PRELU, 4, CLAMP, 5, SCALE, 0],
}
# All convolutions of a network and what they give, for floats from stdin to stdout.
EACH = """
#include <stdio.h>
#define BONN_QAT_REFERENCE
#include "network.h"

static float map[1 << 20], residual[1 << 20], output[1 << 20];
static uint64_t signs[NETWORK_SIGN_WORDS], window[NETWORK_WINDOW_WORDS];

static size_t size(bonn_qat_size of) { return (size_t)of.channels * of.height * of.width; }

static int wants_residual(const bonn_qat_epilogue *epilogue)
{
    for (int32_t step = 0; step < epilogue->steps; step++)
        if (epilogue->program[step].operation == BONN_QAT_RESIDUAL)
            return 1;
    return 0;
}

int main(void)
{
    for (int i = 0; i < NETWORK_CONVOLUTIONS; i++) {
        const bonn_qat_convolution *layer = network_convolutions[i];
        const size_t in = size(layer->input), out = size(layer->output);
        if (fread(map, sizeof(float), in, stdin) != in || fread(residual, sizeof(float), out, stdin) != out)
            return 1;
        bonn_qat_sign(layer, map, signs);
        bonn_qat_convolve(layer, signs, wants_residual(&layer->epilogue) ? residual : NULL, output, window);
        fwrite(output, sizeof(float), out, stdout);
    }
    return 0;
}
"""


def compiler(name: str = "cc") -> str:
    found = shutil.which(name) or shutil.which({"cc": "gcc", "c++": "g++"}[name])
    if found is None:
        pytest.skip(f"no {name} on this machine")
    return found


def takes(flag: str) -> bool:
    """Whether the compiler knows ``flag`` on this machine."""
    command = [compiler(), flag, "-x", "c", "-fsyntax-only", "-"]
    return subprocess.run(command, input=b"", capture_output=True, check=False).returncode == 0


def run(folder: Path, header: str, program: str, flags: Sequence[str], *inputs: Tensor) -> bytes:
    """Compile ``program`` with the header ``network.h``; what it makes of maps ``(C, H, W)``."""
    (folder / "network.h").write_text(header)
    (folder / "main.c").write_text(program)
    command = [compiler(), *flags, "main.c", "-o", "main", "-lm"]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return subprocess.run([folder / "main"], input=as_c(inputs), capture_output=True, check=True).stdout


def as_c(maps: Sequence[Tensor]) -> bytes:
    """Float32 maps ``(C, H, W)`` as C has them; bytes, so that zeros have signs."""
    return b"".join(x.permute(1, 2, 0).contiguous().numpy().tobytes() for x in maps)


def equal(given: bytes, maps: Sequence[Tensor]) -> bool:
    """Whether C gave these maps to the last bit; a NaN may have any sign."""
    ours, theirs = (np.frombuffer(each, np.float32) for each in (given, as_c(maps)))
    kept = ~np.isnan(theirs)
    return np.array_equal(np.isnan(ours), ~kept) and ours[kept].tobytes() == theirs[kept].tobytes()


def chain(geometries: Sequence[Geometry], program: Sequence[int]) -> PackedModel:
    """A packed network of convolutions, one after the other; each takes what it gives itself as its residual."""
    graph, tensors = fx.Graph(), dict[str, Tensor]()
    images = value = graph.placeholder("images")

    def held(name: str, tensor: Tensor) -> fx.Node:
        tensors[name] = tensor
        with graph.inserting_before(images):
            return graph.create_node("get_attr", name)

    for i, own in enumerate(geometries):
        bits, thresholds = torch.randn(own.weight_shape) >= 0, torch.randn(2, own.in_channels).sort(0).values
        thresholds[0, ::3], thresholds[1, ::2] = -torch.inf, torch.inf
        thresholds[:, :1] = torch.tensor([[torch.inf], [-torch.inf]])
        vectors = torch.randn(7, own.out_channels) / 3
        vectors[5:] = torch.stack([-vectors[5].abs(), 2 * vectors[5].abs()])
        vectors[5:, ::2] = torch.tensor([[0.0], [torch.inf]])  # a ReLU
        codes = graph.call_function(ops.sign_codes.default, (value, held(f"{i}.thresholds", thresholds), own.numbers))
        weight = held(f"{i}.weight", encode_weight(bits, own.groups))
        before = (codes, weight, own.numbers, [SCALE, 0], held(f"{i}.ones", torch.ones(1, own.out_channels)), None)
        beside = graph.call_function(ops.binary_conv2d.default, before)
        args = (codes, weight, own.numbers, list(program), held(f"{i}.epilogue", vectors), beside)
        value = graph.call_function(ops.binary_conv2d.default, args)
    graph.output(value)
    weights = {f"{i}.weight": own for i, own in enumerate(geometries)}
    return PackedModel(
        graph, tensors, weights, name="Chain", scheme="bonn", input_size=SIZE, batch=None, layers=[]
    )  # fmt: skip


class Small(nn.Module):
    """Two binary convolutions, the second beside a shortcut, and names that C cannot tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.conv = nn.ModuleDict({"a": nn.Conv2d(16, 24, 3, padding=1)})
        self.conv_a, self.Conv_A = nn.Conv2d(24, 16, 3, padding=1), nn.PReLU(16)
        self.bn1, self.act1, self.bn2 = nn.BatchNorm2d(24), nn.ReLU(), nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x))
        y = self.act1(self.bn1(self.conv["a"](x)))
        return self.head(self.Conv_A(self.bn2(self.conv_a(y)) + x).mean((2, 3)))


def small(scheme: str) -> PackedModel:
    model = bonn_qat.binarize(Small(), scheme, input_size=(3, 12, 12))
    for _, layer in binary_layers(model):
        layer.enter(Stage())
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.normal_(0.5, 1)
                module.bias.normal_(0, 0.3)
                module.running_mean.normal_(0, 0.3)
    return pack(model.eval())


@pytest.fixture(scope="module")
def packed() -> PackedModel:
    torch.manual_seed(0)
    return small("bonn")


class Values(fx.Interpreter):
    """Keeps what the nodes of a packed network give for an image."""

    def __init__(self, packed: PackedModel, image: Tensor) -> None:
        super().__init__(packed.network)
        self.found: dict[fx.Node, Tensor] = {}
        self.run(image.contiguous(memory_format=torch.channels_last))

    def run_node(self, n: fx.Node) -> Tensor:
        self.found[n] = super().run_node(n)
        return self.found[n]


def problems(packed: PackedModel) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """For each convolution an input, near its thresholds and sometimes on them, a residual, and what torch makes."""
    values = Values(packed, torch.zeros(1, *packed.input_size)).found
    for node in packed.network.graph.find_nodes(op="call_function", target=ops.binary_conv2d.default):
        codes, weight, numbers, program, vectors, residual = node.args
        x, thresholds = values[codes.args[0]], values[codes.args[1]]
        edges = thresholds.nan_to_num(0, 0, 0)[torch.randint(2, x.shape[1:2]), torch.arange(x.shape[1])]
        x = edges[:, None, None] + torch.randn_like(x).mul(2).round().div(2)
        odd = torch.rand_like(x)
        for place, value in enumerate((torch.nan, torch.inf, -torch.inf)):
            x[(odd > 0.02 * place) & (odd < 0.02 * (place + 1))] = value
        written = ops.sign_codes(x, thresholds, numbers)
        beside = torch.randn_like(values[node])
        odd = torch.rand_like(beside)
        for place, value in enumerate((torch.nan, torch.inf, -torch.inf)):
            beside[(odd > 0.02 * place) & (odd < 0.02 * (place + 1))] = value
        expected = ops.binary_conv2d(
            written, values[weight], numbers, program, values[vectors], None if residual is None else beside
        )
        yield x[0], beside[0], expected[0]


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize("flags", [STRICT, LOOSE, X87], ids=["strict", "loose", "x87"])
def test_c_gives_what_torch_gives_for_any_geometry(tmp_path, flags, program):
    if not takes(flags[-1]):
        pytest.skip(f"no {flags[-1]} here")
    packed = chain(GEOMETRIES, PROGRAMS[program])
    inputs, residuals, expected = zip(*problems(packed), strict=True)
    given = [x for pair in zip(inputs, residuals, strict=True) for x in pair]
    assert equal(run(tmp_path, c_header(packed), EACH, flags, *given), expected)


TRUNK = """
#include <stdio.h>
#define BONN_QAT_REFERENCE
#include "network.h"

static float map[16 * 12 * 12], between[24 * 12 * 12];
static uint64_t signs[NETWORK_SIGN_WORDS], window[NETWORK_WINDOW_WORDS];

int main(void)
{
    if (fread(map, sizeof map, 1, stdin) != 1)
        return 1;
    bonn_qat_elementwise(&network_norm, map, 12 * 12, NULL, map);
    bonn_qat_sign(&network_conv_a, map, signs);
    bonn_qat_convolve(&network_conv_a, signs, NULL, between, window);
    bonn_qat_sign(&network_conv_a_2, between, signs);
    bonn_qat_convolve(&network_conv_a_2, signs, map, map, window);
    return fwrite(map, sizeof map, 1, stdout) != 1;
}
"""


@pytest.mark.parametrize("scheme", ["bonn", "reactnet"])
def test_c_follows_the_network_from_its_first_layer_to_its_last(tmp_path, scheme):
    packed = small(scheme)
    image = torch.randn(1, 3, 12, 12)
    image[0, 0, 2, 3], image[0, 1, 7, 7], image[0, 2, 9, 1] = torch.nan, torch.inf, -torch.inf
    values = Values(packed, image).found
    (first,) = packed.network.graph.find_nodes(op="call_function", target=torch.ops.aten.conv2d.default)
    (last,) = packed.network.graph.find_nodes(op="call_function", target=ops.binary_conv2d.default)
    assert values[last].isnan().any()
    assert equal(run(tmp_path, c_header(packed), TRUNK, STRICT, values[first][0]), [values[last][0]])
    assert torch.equal(values[packed.network.graph.output_node()].isnan(), packed(image).isnan())


# --- the text


def arrays(header: str) -> dict[str, tuple[str, list[str]]]:
    """Type and items of each array, by its identifier."""
    found = re.findall(r"^static const (.+?) ?(\w+)\[\w+\] = \{\n(.*?)\n\};", header, re.DOTALL | re.MULTILINE)
    return {name: (kind, re.split(r",\s+", items.strip())) for kind, name, items in found}


def values(kind: str, items: list[str]) -> np.ndarray:
    if kind == "uint64_t":
        return np.array([int(item.removesuffix("u"), 16) for item in items], np.uint64)
    return np.array([float(item.removesuffix("f").replace("INFINITY", "inf")) for item in items], np.float32)


def test_the_declarations_are_those_of_the_runtime():
    text = files("bonn_qat.exporting.c").joinpath("declarations.h").read_text()
    found = {name: int(value) for name, value in re.findall(r"^    BONN_QAT_(\w+) = (\d+)", text, re.MULTILINE)}
    assert found == {"SCALE": SCALE, "ADD": ADD, "FMA": FMA, "RESIDUAL": RESIDUAL, "PRELU": PRELU, "CLAMP": CLAMP}
    assert len(found) == len(ROWS)
    assert re.findall(r"BONN_QAT_FORMAT (?:!= )?(\d+)", text) == [str(FORMAT)] * 2


def test_tensors_come_back_from_the_text(packed):
    header, tensors = c_header(packed), packed.tensors()
    found = arrays(header)
    names = dict(re.findall(r"^/\* (\S+): .*\n#define \w+ \d+\nstatic const \S+ (\w+)", header, re.MULTILINE))
    assert set(names) == set(tensors)
    for name, tensor in tensors.items():
        kind, items = found[names[name]]
        assert kind == ("uint64_t" if tensor.dtype == torch.int64 else "float")
        assert values(kind, items).tobytes() == tensor.numpy().tobytes(), name
        assert f"#define {names[name].upper()}_COUNT {tensor.numel()}\n" in header
    bits = unpack_words(tensors["conv_a.signs"], (16, 24, 3, 3))
    word = int(found["network_conv_a_signs_words_2"][1][-1].removesuffix("u"), 16)
    assert [word >> i & 1 for i in range(64)] == bits.flatten()[-64:].int().tolist()


def test_names_are_identifiers_and_each_is_given_once(packed):
    header = c_header(packed, "net_1")
    code = re.sub(r"/\*.*?\*/", "", header, flags=re.DOTALL)
    defined = re.findall(r"^static const [^=]*?(\w+)(?:\[\w+\])? = ", code, re.MULTILINE)
    macros = re.findall(r"^#define (\w+)", code, re.MULTILINE)
    assert len(set(defined)) == len(defined)
    assert len(set(macros)) == len(macros)
    assert all(re.fullmatch(r"net_1(_[a-z0-9]+)+", name) for name in defined)
    assert len(defined) == len(packed.tensors()) + 2 * 3 + 1  # an elementwise, two convolutions, the table of these
    assert all(name.startswith(("NET_1_", "BONN_QAT_")) for name in macros)
    twice = {"net_1_conv_a", "net_1_conv_a_signs_words", "net_1_conv_a_thresholds"}
    assert {*twice, *(f"{name}_2" for name in twice)} <= set(defined)


def test_the_nodes_are_told_in_the_names_of_the_header(packed):
    header = c_header(packed)
    lines = [re.split("  +", line)[1:] for line in header[: header.index("*/")].splitlines()]
    calls = {line[0]: (line[1], line[2]) for line in lines if len(line) == 3}
    assert calls["x"] == ("float32 (1, 3, 12, 12)", "the image")
    assert calls["sign_codes"] == ("signs (1, 16, 12, 12)", "sign(elementwise_default) for network_conv_a")
    assert calls["linear"][1] == "aten.linear.default(mean, network_head_weight, network_head_bias)"
    (sign,) = (call for name, (_, call) in calls.items() if name.startswith("binary_conv2d_sign"))
    assert sign == "sign(convolve(network_conv_a, sign_codes)) for network_conv_a_2"
    assert "Small, scheme bonn: a packed 1-bit network for images of 3 x 12 x 12" in header
    assert f"bonn-qat {version('bonn-qat')}; format 2" in header


def test_a_network_and_its_file_have_the_same_text(packed, tmp_path):
    read = PackedModel.load(packed.save(tmp_path / "packed.safetensors"))
    assert c_header(read) == c_header(packed)
    assert str(tmp_path) not in c_header(read)


def test_weights_that_are_bits_for_a_product_of_floats_are_words_too():
    packed = small("bwn")
    header = c_header(packed)
    kind, items = arrays(header)["network_conv_a_weight_quant_words"]
    assert kind == "uint64_t"
    assert len(items) == 24 * 16 * 9 // 64
    assert "bonn_qat.unpack_signs.default(network_conv_a_weight_quant_words, [24, 16, 3, 3])" in header
    assert "NETWORK_CONVOLUTIONS 0" in header


@pytest.mark.parametrize(("name", "flags"), [("cc", STRICT), ("c++", ["-x", "c++", "-std=c++11", *STRICT[1:-1]])])
def test_two_networks_are_in_one_program_of_c_or_of_cpp(packed, tmp_path, name, flags):
    (tmp_path / "a.h").write_text(c_header(packed, "a"))
    (tmp_path / "b.h").write_text(c_header(small("bwn"), "b"))
    program = (
        '#define BONN_QAT_REFERENCE\n#include "a.h"\n#include "b.h"\n#include "a.h"\nint main(void) { return 0; }\n'
    )
    command = [compiler(name), *flags, "-fsyntax-only", "-x", {"cc": "c", "c++": "c++"}[name], "-"]
    done = subprocess.run(command, cwd=tmp_path, input=program, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def holding(name: str, tensor: Tensor) -> PackedModel:
    """A network that gives a tensor."""
    graph = fx.Graph()
    graph.placeholder("x")
    graph.output(graph.create_node("get_attr", name))
    return PackedModel(
        graph, {name: tensor}, {}, name="*/ int x; /*\n", scheme="\xe9", input_size=(1, 1, 1), batch=1, layers=[]
    )


EXTREMES = {
    "float": torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-45, 3.4028235e38, 1 / 3, -1e10, 16777216]),
    "double": torch.tensor([1 / 3, 5e-324, 1.7976931348623157e308], dtype=torch.float64),
    "int64_t": torch.tensor([-(2**63), 2**63 - 1, 0]),
    "int8_t": torch.tensor([-128, 127], dtype=torch.int8),
    "uint8_t": torch.tensor([True, False]),
}


NUMBERS = """
#include <stdio.h>
#include "network.h"

int main(void)
{
    return !fwrite(network_a_b_c, sizeof network_a_b_c, 1, stdout);
}
"""


@pytest.mark.parametrize("kind", EXTREMES)
def test_numbers_of_every_type_are_exact(tmp_path, kind):
    tensor = EXTREMES[kind]
    header = c_header(holding("a/*b*/.c", tensor))
    assert f"static const {kind} network_a_b_c[NETWORK_A_B_C_COUNT]" in header
    assert run(tmp_path, header, NUMBERS, STRICT) == tensor.numpy().tobytes()


# --- what cannot be written


@pytest.mark.parametrize("name", ["", "Net", "1net", "my net", "_net", "bonn_qat", "a;b", "netz\u00e9"])
def test_a_name_that_is_no_identifier_is_refused(packed, name):
    with pytest.raises(InvalidModel, match="cannot begin the names of a C header"):
        c_header(packed, name)


@pytest.mark.parametrize(
    ("tensor", "said"),
    [(torch.zeros(2, dtype=torch.complex64), r"complex64 \(2,\)"), (torch.zeros(0, 3), r"float32 \(0, 3\)")],
)
def test_a_tensor_that_c_has_not_is_refused(tensor, said):
    with pytest.raises(InvalidModel, match=f"scale is {said}; a C header takes float32"):
        c_header(holding("scale", tensor))


def test_a_convolution_of_other_than_signs_is_refused():
    other = chain([Geometry(8, 5, (1, 1))], [SCALE, 0])
    graph = other.network.graph
    (node,) = list(graph.find_nodes(op="call_function", target=ops.sign_codes.default))
    with graph.inserting_after(node):
        new = graph.call_function(torch.ops.aten.clone.default, (node,))
    node.replace_all_uses_with(new, lambda user: user is not new)
    with pytest.raises(InvalidModel, match=r"binary_conv2d_default reads codes from clone_default; .* of a sign"):
        c_header(other)


def test_codes_for_another_geometry_are_refused():
    other = chain([Geometry(8, 5, (3, 3), padding=(1, 1, 1, 1))], [SCALE, 0])
    (node,) = other.network.graph.find_nodes(op="call_function", target=ops.sign_codes.default)
    node.args = (*node.args[:2], Geometry(8, 5, (3, 3), padding=(2, 0, 1, 1)).numbers)
    with pytest.raises(InvalidModel, match=r"binary_conv2d_default has codes for .*\(2, 0, 1, 1\)"):
        c_header(other)


def test_weights_that_are_no_words_are_refused():
    other = chain([Geometry(8, 5, (1, 1))], [SCALE, 0])
    other._weights.clear()
    with pytest.raises(InvalidModel, match=r"0\.weight is uint8 .*; a C header takes int64 there"):
        c_header(other)
