"""Untrusted files: each is read, or refused with a one-line error, and none can run code."""

import copy
import functools
import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from bonn_qat import PackedModel
from bonn_qat.errors import BonnQatError, InvalidData, InvalidRecipe
from bonn_qat.files import plain
from bonn_qat.files.atomic import read_json, write_json
from bonn_qat.files.tensors import read_tensors, write_tensors
from bonn_qat.runtime import allowed
from bonn_qat.runtime import graph as graphs
from bonn_qat.runtime.dry_run import dry_run
from bonn_qat.scheme import Stage
from bonn_qat.studies.comparison import Comparison, read_comparison, write_manifest
from bonn_qat.training.network import check
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.results import read_run, write_run

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def script(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return __import__(name)


fuzz, hostile = script("fuzz"), script("hostile")


def short(value: object) -> str:
    """What a case is called."""
    return repr(value)[:30]


@functools.cache
def kind(name: str) -> Any:
    return fuzz.KINDS[name]()


# --------------------------------------------------------------------------------------------- a share of the benchmark


@pytest.mark.parametrize(("name", "files"), [("packed", 200), ("runtime", 300), ("checkpoint", 150), ("weights", 100),
                                             ("recipe", 300), ("results", 300)])  # fmt: skip
def test_damaged_and_hostile_files_are_read_or_refused_in_a_line(name, files, tmp_path):
    reader = kind(name)
    for number, sample in enumerate(reader.samples):
        assert fuzz.outcome(reader, fuzz.write(tmp_path / f"whole{number}", sample)) == "read"
    for index in range(files):
        content = reader.mutated(fuzz.number_of(name, 1, index))
        assert "failed" not in fuzz.outcome(reader, fuzz.write(tmp_path / "case", content)), f"seed 1, number {index}"


def test_a_reader_that_crashes_hangs_or_raises_is_found(tmp_path, monkeypatch):
    def read(path: Path) -> None:
        content = path.read_bytes()
        if content.startswith(b"3"):
            import ctypes

            ctypes.string_at(0)
        if content.startswith(b"5"):
            while True:
                pass
        if content.startswith(b"7"):
            bytearray(2**36)
        if content.startswith(b"8"):
            raise InvalidData("two\nlines")

    class Numbered:
        samples: list[Any] = []  # noqa: RUF012

        def mutated(self, chance: Any) -> Mapping[str, bytes]:
            return {"x": chance.name}

    numbered = Numbered()
    numbered.read = read  # type: ignore[attr-defined]
    monkeypatch.setitem(fuzz.KINDS, "numbered", lambda: numbered)
    monkeypatch.setattr(fuzz, "SECONDS", 0.5)
    monkeypatch.setattr(fuzz, "PATIENCE", 60)  # a busy machine may take long for half a second of CPU time
    chance = type("Chance", (), {})
    monkeypatch.setattr(fuzz, "number_of", lambda *key: setattr(made := chance(), "name", str(key[2]).encode()) or made)
    found = dict(fuzz.Reader("numbered", 0, tmp_path).run(range(10)))
    assert found.pop(3).startswith("failed: the process ended, SIGSEGV")
    assert found.pop(5).startswith("failed: more than 0.5 seconds")
    assert found.pop(7).startswith("failed: MemoryError")
    assert found.pop(8) == "failed: not a line"
    assert found == dict.fromkeys((0, 1, 2, 4, 6, 9), "read")


# ------------------------------------------------------------------------------------------------------ packed networks

Header = dict[str, Any]
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def whole() -> tuple[Tensors, Header]:
    return fuzz.split(kind("packed").samples[0]["packed.safetensors"])


def loaded(tmp_path: Path, whole: tuple[Tensors, Header], change: Callable[[Header, Tensors], Any]) -> PackedModel:
    """The network with another header or other tensors, its checksum right."""
    tensors, header = dict(whole[0]), copy.deepcopy(whole[1])
    change(header, tensors)
    path = tmp_path / "packed.safetensors"
    path.write_bytes(fuzz.joined(tensors, json.dumps(fuzz._signed(tensors, header))))
    return PackedModel.load(path)


def at(header: Header, op: str) -> dict[str, Any]:
    return next(node for node in header["nodes"] if node["op"].startswith(op))


def ending(*calls: tuple[str, list[Any]], **kwargs: Any) -> Callable[[Header, Tensors], None]:
    """The network gives what the last call gives; ``"x"`` among the arguments are the images, ``0`` the first call."""

    def change(header: Header, tensors: Tensors) -> None:
        def ready(argument: Any) -> Any:
            if isinstance(argument, list):
                return [ready(item) for item in argument]
            return {"node": "x" if argument == "x" else f"call{argument[1:]}"} if isinstance(argument, str) and (
                argument == "x" or argument.startswith("#")) else argument  # fmt: skip

        tensors.clear()
        nodes = [{"op": "input", "name": "x"}]
        for place, (op, args) in enumerate(calls):
            own = kwargs if place == len(calls) - 1 else {}
            nodes.append({"op": op, "name": f"call{place}", "args": ready(args), "kwargs": own})
        header["nodes"] = [*nodes, {"op": "output", "name": "output", "args": [{"node": f"call{len(calls) - 1}"}]}]
        header["batch"] = None

    return change


def test_a_file_runs_no_code(tmp_path, whole):
    """Names of arguments and of nodes are parts of the code that torch.fx writes of a graph."""
    trap = tmp_path / "sprung"
    code = f"approximate=open({str(trap)!r}, 'w').close(), approximate"
    with pytest.raises(InvalidData, match=r"aten\.gelu\.default has no argument"):
        loaded(tmp_path, whole, ending(("aten.gelu.default", ["x"]), **{code: "none"}))
    for name in (
        "self",
        "None",
        "import",
        "x y",
        "x\n",
        "\u00b2",
        "torch",
        "print",
        "x;y",
        "__import__('os')",
        3,
        None,
    ):
        with pytest.raises(InvalidData, match="is not a valid name of a node"):
            loaded(tmp_path, whole, lambda h, t, name=name: h["nodes"][0].update(name=name))
    assert not trap.exists()


def test_texts_among_the_arguments_stay_texts(tmp_path, whole):
    model = loaded(tmp_path, whole, ending(("aten.gelu.default", ["x"]), approximate="tanh"))
    x = torch.randn(2, *model.input_size)
    torch.testing.assert_close(model(x), torch.nn.functional.gelu(x, approximate="tanh"))


def test_whatever_torch_takes_as_a_number_and_reads_as_something_else_is_known():
    found = set()
    for name in allowed.GROUP_OF:
        arguments = [a for a in graphs._function(name)._schema.arguments if str(a.type) != str(a.real_type)]
        found |= {str(a.real_type).removeprefix("Optional[").removesuffix("]") for a in arguments}
    assert found == {"ScalarType", "Layout", "MemoryFormat"}
    assert found < graphs._KINDS.keys()


def deep(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value


POWERS = [("aten.sym_numel.default", ["x"]), *(("python.mul", [f"#{i}", f"#{i}"]) for i in range(5))]
HOSTILE: Mapping[str, tuple[Callable[[Header, Tensors], Any], str]] = {
    # what a graph calls
    "memory as it is": (ending(("aten.empty.memory_format", [[4]])), "cannot call"),
    "like it": (ending(("aten.empty_like.default", ["x"])), "cannot call"),
    "memory of others": (ending(("aten.as_strided.default", ["x", [99999], [1]])), "cannot call"),
    "another type": (ending(("aten.view.dtype", ["x"])), "cannot call"),
    "random numbers": (ending(("aten.rand_like.default", ["x"])), "cannot call"),
    "dropout": (ending(("aten.native_dropout.default", ["x", 0.5, True])), "cannot call"),
    "a file": (ending(("aten.from_file.default", ["/etc/passwd"])), "cannot call"),
    "backward": (ending(("aten.gelu_backward.default", ["x", "x"])), "cannot call"),
    "a list operation": (ending(("aten.mul.left_t", [[1], 2**40])), "cannot call"),
    "a number": (ending(("aten._local_scalar_dense.default", ["x"])), "cannot call"),
    "no operator": (ending(("bonn_qat.__init__.default", ["x"])), "cannot call"),
    "half a name": (ending(("aten.\ud83d\ude00.default", ["x"])), "cannot call"),
    "python": (ending(("python.eval", ["x"])), "cannot call"),
    "a number for a type": (ending(("aten.full.default", [[1], 1.0]), dtype=1000), "does not take 1000 for dtype"),
    "a number for a type, at its place": (ending(("aten.softmax.int", ["x", 0, 200])), "does not take 200 for dtype"),
    "a size for a type": (
        ending(("aten.sym_numel.default", ["x"]), ("aten.softmax.int", ["x", 0, "#0"])), "does not take call0 for dtype"
    ),
    "a number for a layout": (ending(("aten.zeros_like.default", ["x"]), layout=77), "does not take 77 for layout"),
    "a number for a memory format": (
        ending(("aten.zeros_like.default", ["x"]), memory_format=77), "does not take 77 for memory_format"
    ),
    "a number for a device": (ending(("aten.zeros_like.default", ["x"]), device=3), "does not take 3 for device"),
    # how much
    "zeros": (ending(("aten.zeros.default", [[2**40]])), "would need too much"),
    "expanded": (ending(("aten.expand.default", ["x", [2**40, -1, -1, -1]])), "would need too much"),
    "beyond 64 bits": (ending(("aten.full.default", [[2**62, 2**62], 1.0])), "does not take .* for size; allowed: "),
    "many at once": (ending(*[("aten.repeat.default", ["x", [2**21, 1, 1, 1]]) for _ in range(6)],
                            ("aten.cat.default", [[f"#{i}" for i in range(6)]])), "would need too much"),
    "many pieces": (ending(("aten.zeros.default", [[2**20]]), ("aten.unbind.int", ["#0", 0])), "too many pieces"),
    "as many as one likes": (ending(("aten.chunk.default", ["x", 2**40])), "allowed: 1 to 65,536"),
    "powers of a number": (ending(*POWERS), "more than 64 bits"),
    "a long text": (ending(("python.mod", ["%99999999d", 1])), "does not take"),
    "a long list": (ending(("python.mul", [[0], 2**40])), "does not take"),
    "lists that double": (ending(("python.add", [[1], [1]])), "does not take"),
    "rows of nothing": (ending(("aten.zeros.default", [[2**40, 0]]), ("aten.relu.default", ["#0"])), "would need too"),
    "norms of nothing": (
        ending(("aten.zeros.default", [[2**30, 0]]), ("aten.layer_norm.default", ["#0", [0]])), "for normalized_shape"
    ),
    "a long name": (lambda h, t: h["nodes"][0].update(name="x" * 501), "not a valid name"),
    "shifts in thousands": (ending(("aten.roll.default", ["x", [1] * 20_000, [0] * 20_000])), "a list of at most 16"),
    "a scale of nothing": (
        ending(("aten.upsample_bilinear2d.default", ["x", [16, 16], False, 1e-6, 1e-6])), "for scales_h; allowed: 0.0"
    ),
    "a scale of another size": (
        ending(("aten.upsample_bilinear2d.default", ["x", [16, 16], False, 3.0, 3.0])), "does not make images of size"
    ),
    "a product of three": (ending(("aten.einsum.default", ["ab,cd,ef->", ["x", "x", "x"]])), "allowed: 1 or 2"),
    "dropout in attention": (
        ending(("aten.scaled_dot_product_attention.default", ["x", "x", "x", None, 0.5])), "for dropout_p; allowed: 0"
    ),
    "many axes": (ending(("aten.reshape.default", ["x", [1] * 20 + [-1]])), "a list of at most 16"),
    "many nodes": (lambda h, t: h.update(nodes=h["nodes"][:1] * 20_001), "at most 20,000"),
    "many small groups": (
        lambda h, t: (at(h, "tensor").update(geometry=[2**18, 2**18, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 2**18]),
                      t.update({at(h, "tensor")["tensor"]: torch.zeros(2**12, dtype=torch.int64)})),
        "at most 65,536",
    ),
    "small groups, filled up": (
        lambda h, t: (at(h, "tensor").update(geometry=[2**20, 2**20, 1, 3, 1, 1, 0, 0, 0, 0, 1, 1, 2**20]),
                      t.update({at(h, "tensor")["tensor"]: torch.zeros(3 * 2**14, dtype=torch.int64)})),
        "would need 201,328,512 bytes in memory",
    ),
    # what ends a process
    "the least by -1": (
        ending(("aten.full.default", [[8], -(2**63)]), ("aten.div.Scalar_mode", ["#0", -1]), rounding_mode="trunc"),
        "division by a number above 0",
    ),
    # what does not fit
    "another kernel": (lambda h, t: t.update({"stem.weight": torch.zeros(8, 4, 3, 3)}), "with kernels"),
    "another type of kernel": (lambda h, t: t.update({"stem.weight": t["stem.weight"].double()}), "several types"),
    "fewer thresholds": (lambda h, t: t.update({"conv1.thresholds": torch.zeros(7)}), "the thresholds: expected"),
    "other vectors": (lambda h, t: t.update({"qkv.epilogue": torch.zeros(1, 23)}), "the vectors: expected"),
    "vectors of one axis": (lambda h, t: t.update({"qkv.epilogue": torch.zeros(24)}), "the vectors: expected"),
    "another program": (lambda h, t: at(h, "bonn_qat.elementwise")["args"].__setitem__(1, [2, 9]), "no operation 2"),
    "another geometry": (lambda h, t: at(h, "bonn_qat.sign_codes")["args"][2].__setitem__(4, 0), "not the geometry"),
    "a wide geometry": (lambda h, t: at(h, "bonn_qat.sign_codes")["args"][2].__setitem__(6, 2**40), "a number above"),
    "another window": (lambda h, t: at(h, "bonn_qat.max_pool2d")["args"].__setitem__(1, [2**40, 2**40]), "not valid w"),
    "too few arguments": (lambda h, t: at(h, "aten.linear").update(args=[{"node": "x"}]), "takes 2 arguments"),
    "a list for a tensor": (lambda h, t: at(h, "aten.linear")["args"].__setitem__(0, [1]), "cannot be computed"),
    "a node from below": (lambda h, t: at(h, "aten.conv2d")["args"].__setitem__(0, {"node": "linear"}), "the argument"),
    "a number as the result": (ending(("aten.sym_size.int", ["x", 0])), "returns a tensor, or a list"),
    "nothing as the result": (lambda h, t: h["nodes"][-1].update(args=[[]]), "returns a tensor, or a list"),
    # arguments and headers
    "a sparse layout": (ending(("aten.zeros_like.default", ["x"]), layout={"layout": "sparse_coo"}), "the argument"),
    "a quantized type": (ending(("aten._to_copy.default", ["x"]), dtype={"dtype": "quint8"}), "the argument"),
    "a complex type": (ending(("aten._to_copy.default", ["x"]), dtype={"dtype": "complex64"}), "the argument"),
    "a module as a type": (ending(("aten._to_copy.default", ["x"]), dtype={"dtype": "nn"}), "the argument"),
    "depth": (ending(("aten.reshape.default", ["x", deep(1, 30)])), "are nested more than"),
    "65 bits": (ending(("aten.reshape.default", ["x", [2**63]])), "more than 64 bits"),
    "no channels": (lambda h, t: h.update(input_size=[0, 8, 8]), r"input_size is \(0, 8, 8\)"),
    "fewer than no pixels": (lambda h, t: h.update(input_size=[3, -8, 8]), r"input_size is \(3, -8, 8\)"),
    "large images": (lambda h, t: h.update(input_size=[3, 2**62, 2**62]), r"input_size is \(3, 4611686018427387904, 4"),
    "half pixels": (lambda h, t: h.update(input_size=[3, 8.5, 8]), r"input_size\.1 is 8\.5"),
    "a size in words": (lambda h, t: h.update(input_size="388"), "input_size is '388'"),
    "true channels": (lambda h, t: h.update(input_size=[True, 8, 8]), r"input_size\.0 is True"),
    "an empty batch": (lambda h, t: h.update(batch=0), "batch is 0; allowed: 1 to 65,536"),
    "a batch of truth": (lambda h, t: h.update(batch=True), "batch is True; a value of type int"),
    "a large batch": (lambda h, t: h.update(batch=2**40), "batch is 1099511627776; allowed"),
    "another kind of layer": (lambda h, t: h["layers"][0].update(kind="bytes"), "kind is 'bytes'; allowed: bits"),
    "a layer with more": (lambda h, t: h["layers"][0].update(__class__="x"), r"layers\.0 differ in \['__class__'\]"),
    "layers without words": (lambda h, t: h["layers"][0].update(reason=None), r"layers\.0\.reason is None"),
    "one layer": (lambda h, t: h.update(layers={"name": "x"}), "layers is"),
    "a name that clears the screen": (lambda h, t: h.update(name="\x1b[2J"), "name is .*; allowed: characters"),
    "a name that is none": (lambda h, t: h.update(name=["x"]), "name is"),
    "more in the header": (lambda h, t: h.update(more=1), r"its keys differ in \['more'\]"),
    "an op that is none": (lambda h, t: h["nodes"][0].update(op=3), "each with an op"),
    "a node with more": (lambda h, t: h["nodes"][0].update(type="x"), "unknown key 'type'"),
    "kwargs that are not a table": (lambda h, t: at(h, "aten.linear").update(kwargs=[]), "are not a table"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_network_is_refused_when_it_is_loaded(name, tmp_path, whole):
    change, words = HOSTILE[name]
    with pytest.raises(InvalidData, match=words) as caught:
        loaded(tmp_path, whole, change)
    assert "\n" not in str(caught.value)


def test_a_number_that_explodes_for_three_images_is_refused_for_three(tmp_path, whole):
    # (B - 1) (B - 2) 2**40 zeros
    calls = [
        ("aten.sym_size.int", ["x", 0]), ("python.sub", ["#0", 1]), ("python.sub", ["#0", 2]),
        ("python.mul", ["#1", "#2"]), ("python.mul", ["#3", 2**40]), ("aten.zeros.default", [["#4"]]),
    ]  # fmt: skip
    model = loaded(tmp_path, whole, ending(*calls))
    for count in (1, 2):
        assert len(model(torch.zeros(count, *model.input_size))) == 0
    with pytest.raises(InvalidData, match="would need too much"):
        model(torch.zeros(3, *model.input_size))


def test_a_place_beyond_a_table_is_told_when_it_is_looked_up(tmp_path, whole):
    calls = [
        ("aten.zeros.default", [[3]]),
        ("aten.full.default", [[1], 7]),
        ("aten.index_select.default", ["#0", 0, "#1"]),
    ]
    model = loaded(tmp_path, whole, ending(*calls))
    with pytest.raises(InvalidData, match="Tiny cannot be computed on these images: "):
        model(torch.zeros(1, *model.input_size))


def test_a_dry_run_counts_what_a_run_needs():
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    twice = graph.call_function(torch.ops.aten.cat.default, ([x, x],))
    small = graph.call_function(torch.ops.aten.mean.dim, (twice, [1, 2, 3]))
    graph.output(graph.call_function(torch.ops.aten.relu.default, (small,)))
    image = 4 * 3 * 8 * 8
    for batch in (0, 1, 5):
        # The mean may copy what it takes.
        assert dry_run(graph, {}, [((3, 8, 8), torch.float32)], batch) == 2 * (2 * image + 8) * batch


def test_every_function_that_a_graph_may_call_is_one_of_tensors():
    names = hostile.functions()
    assert {"aten.conv2d.default", "aten.add.Tensor", "aten.sym_size.int"} <= set(names)
    words = ("backward", "empty", "strided", "resize", "rand", "bernoulli", "dropout", "file", "storage", "nonzero")
    assert not [name for name in names if any(word in name for word in words)]
    for name in allowed.GROUP_OF:
        function = graphs._function(name)
        kinds = {str(argument.type) for argument in function._schema.returns}
        assert kinds <= {"Tensor", "List[Tensor]"} or name in ("aten.sym_size.int", "aten.sym_numel.default")
        assert not function._schema.is_mutable
        assert torch.Tag.nondeterministic_seeded not in function.tags or "attention" in name


def test_every_argument_of_every_operator_has_a_range():
    for name in allowed.GROUP_OF:
        function = graphs._function(name)
        for argument in function._schema.arguments:
            assert "Tensor" in str(argument.type) or allowed.range_of(function, argument.name).allowed
    words = {name for names in allowed.GROUPS.values() for name in names.split()}
    assert len(words) == sum(len(names.split()) for names in allowed.GROUPS.values())


# ---------------------------------------------------------------------------------------------------- files of tensors


def safetensors_file(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def tensor(kind: str, shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}


def own(text: str) -> dict[str, Any]:
    return {"__metadata__": {"bonn_qat": text}}


CRAFTED: Mapping[str, bytes] = {
    "terabytes": safetensors_file({"x": tensor("F32", [2**40], 0, 2**42)}, bytes(8)),
    "terabytes in eight": safetensors_file({"x": tensor("F32", [2**40], 0, 8)}, bytes(8)),
    "a size that overflows": safetensors_file({"x": tensor("F32", [2**62, 4], 0, 0)}),
    "nothing, of 64 bits": safetensors_file({"x": tensor("F32", [0, 2**64 - 1], 0, 0)}),
    "nothing, of 63 bits": safetensors_file({"x": tensor("F32", [0, 2**62], 0, 0)}),
    "a hundred thousand axes": safetensors_file({"x": tensor("F32", [1] * 100_000, 0, 4)}, bytes(4)),
    "less than nothing": safetensors_file({"x": tensor("F32", [-2], 0, 8)}, bytes(8)),
    "half a byte": safetensors_file({"x": tensor("F4", [16], 0, 8)}, bytes(8)),
    "six bits": safetensors_file({"x": tensor("F6_E2M3", [4], 0, 3)}, bytes(3)),
    "complex": safetensors_file({"x": tensor("C64", [1], 0, 8)}, bytes(8)),
    "no truth values": safetensors_file({"x": tensor("BOOL", [4], 0, 4)}, bytes([0, 1, 2, 255])),
    "two in one place": safetensors_file({"x": tensor("U8", [8], 0, 8), "y": tensor("U8", [8], 0, 8)}, bytes(8)),
    "a hole": safetensors_file({"x": tensor("U8", [8], 8, 16)}, bytes(16)),
    "backwards": safetensors_file({"x": tensor("U8", [8], 8, 0)}, bytes(8)),
    "a long header": safetensors_file({}, length=2**64 - 1),
    "a longer header": safetensors_file({}, length=99_000_000),
    "a header in depth": safetensors_file(b"[" * 200_000),
    "tables in depth": safetensors_file(b'{"x":' * 200_000),
    "ours in depth": safetensors_file(own("[" * 100_000)),
    "ours, closed": safetensors_file(own('{"a":' * 5000 + "1" + "}" * 5000)),
    "ours, a little too deep": safetensors_file(own("[" * (plain.DEPTH + 1) + "]" * (plain.DEPTH + 1))),
    "ours, a key twice": safetensors_file(own('{"a": 1, "a": 2}')),
    "ours, a long number": safetensors_file(own(f'{{"a": {"9" * 5000}}}')),
    "ours, 65 bits": safetensors_file(own(f'{{"a": {2**64}}}')),
    "ours, half a character": safetensors_file(own('{"a": "\\ud800"}')),
    "ours, no table": safetensors_file(own("[1]")),
    "metadata of numbers": safetensors_file({"__metadata__": {"bonn_qat": 3}}),
    "metadata of bytes": safetensors_file(b'{"__metadata__": {"bonn_qat": "\xff"}}'),
    "metadata twice": safetensors_file(b'{"__metadata__": {"a": "1"}, "__metadata__": {"a": "2"}}'),
    "many tensors": safetensors_file({f"t{i}": tensor("U8", [0], 0, 0) for i in range(2**15 + 1)}),
}


@pytest.mark.parametrize("name", CRAFTED)
def test_a_crafted_file_of_tensors_is_refused(name, tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(CRAFTED[name])
    with pytest.raises(InvalidData, match=r"x\.safetensors"):
        read_tensors(path)


def test_tensors_do_not_change_with_their_file_and_lie_where_numbers_do(tmp_path):
    """A file whose header has an odd length, and one that is written over in place after it was read."""
    text = json.dumps({"x": tensor("F32", [2], 0, 8)}).encode()
    for space in range(8):
        path = tmp_path / "x.safetensors"
        path.write_bytes(safetensors_file(text + b" " * space, struct.pack("<2f", 1.5, -2)))
        x = read_tensors(path)[0]["x"]
        with path.open("r+b") as file:
            file.truncate(9)
        assert x.tolist() == [1.5, -2]
        assert x.data_ptr() % x.element_size() == 0


def test_what_is_no_file_is_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero"), tmp_path / ("x" * 300), tmp_path / "x\0y"):
        with pytest.raises(InvalidData, match="cannot read"):
            read_tensors(path)


def test_the_deepest_header_that_is_read(tmp_path):
    header = {"x": deep(1, plain.DEPTH - 1)}
    assert read_tensors(write_tensors(tmp_path / "x.safetensors", {}, header))[1] == header


# ------------------------------------------------------------------------------------------------------------- recipes


def recipe(tmp_path: Path, text: str | bytes) -> Recipe:
    path = tmp_path / "r.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return Recipe.from_toml(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("x = " + "[" * 50_000, "r.toml is not TOML: tables and lists"),
        ("scheme_options = {a = " + "[" * 30 + "]" * 30 + "}", "nested more than 24 levels"),
        (".".join("a" * 5000) + " = 1", "nested more than 24 levels"),
        (f"lr = {10**400}", "more than 64 bits"),
        (f"seed = {2**63}", "more than 64 bits"),
        ("seed = -1", "seed in the recipe is -1; allowed: at least 0, below"),
        (f"epochs = {2**31}", "epochs in the recipe is 2147483648; allowed: at least 1, below"),
        (f"batch_size = {2**62}", "batch_size in the recipe is"),
        (f"train_images = {2**62}", "train_images in the recipe is"),
        ("milestones = [0]", "milestones in the recipe is"),
        ("milestones = [-3]", "milestones in the recipe is"),
        *((f"{name} = {value}", f"{name} in the recipe")
          for name in ("lr", "momentum", "weight_decay", "modulation_lr_scale", "modulation_decay_scale", "warmup",
                       "gamma", "label_smoothing", "distillation", "temperature") for value in ("nan", "inf", "-inf")),
        ("milestones = [1]\nfactors = [nan]", "factors in the recipe"),
        ("milestones = [1]\nfactors = [inf]", "factors in the recipe"),
        ("[[stages]]\nlr_scale = inf", "lr_scale must be a number above 0"),
        ("[[stages]]\nlr_scale = nan", "lr_scale must be a number above 0"),
        ("[[stages]]\nshare = nan", "share must be a fraction of the epochs"),
        ("[[stages]]\nregularizers = {kernel = nan}", "a number of at least 0; got nan"),
        ("[[stages]]\nregularizers = {kernel = -1}", "a number of at least 0; got -1"),
        ("[[stages]]\nregularizers = {kernel = 'x'}", r"regularizers\.kernel of a stage is 'x'"),
        ("regularizer_options = {kernel = {nu = nan}}", "other than NaN"),
        ("scheme_options = {clip = 1979-05-27}", "not a string, number, list or table"),
        ("scheme_options = {clip = 07:32:00}", "not a string, number, list or table"),
        ("scheme = 'a\\u0000'", "scheme"),
        ('scheme = "a\\u0000"', "strings without the null character"),
        ('checkpoint = "a\\u0000"', "strings without the null character"),
        ('skip = ["a\\u0000"]', "strings without the null character"),
        ('model_options = {a = "\\u0000"}', "strings without the null character"),
        ('scheme = "\\ud800"', "is not TOML"),
        (f'scheme_options = {{a = "{"x" * 300}"}}', "has 320 bytes; a file name can have 200"),
        ('scheme_options = {"' + "x" * 100 + '" = "' + "\u00e9" * 90 + '"}', "bytes; a file name can have 200"),
        ("# " + "x" * 2**16, "larger than 65,536 bytes"),
        (b"scheme = '\xff'", "is not TOML"),
        ("skip = [1]", r"skip\.0 of a recipe is 1"),
        ("milestones = [true]", r"milestones\.0 of a recipe is True"),
        *((f"model_options = {{{name} = {value}}}", f"model_options.{name} in the recipe is .*key checkpoint")
          for name, value in (("checkpoint_path", "'/etc/passwd'"), ("pretrained_cfg", "{file = '/etc/passwd'}"),
                              ("pretrained_cfg", "'x'"), ("pretrained_cfg_overlay", "{url = 'x'}"),
                              ("cache_dir", "'/tmp'"))),
    ],
    ids=short,
)  # fmt: skip
def test_a_hostile_recipe_is_refused(text, words, tmp_path):
    with pytest.raises(BonnQatError, match=words) as caught:
        check(recipe(tmp_path, text))
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_options_that_name_no_file_stay(tmp_path):
    options = recipe(
        tmp_path, "model_options = {pretrained = true, checkpoint_path = '', drop_rate = 0.1}"
    ).model_options
    assert options == {"pretrained": True, "checkpoint_path": "", "drop_rate": 0.1}


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18", "hf_hub:x/y", "local-dir:/etc", "file:///etc/passwd", "../x"])
def test_a_model_is_a_name_and_never_a_place(name):
    with pytest.raises(BonnQatError, match="unknown model"):
        check(Recipe(model=name))


def test_the_longest_name_of_a_run_and_the_largest_numbers_stay():
    name = "x" * (200 - len("bonn:o=-scheme-seed0"))
    assert len(Recipe(scheme_options={"o": name}).name) == 200
    with pytest.raises(InvalidRecipe, match="has 201 bytes"):
        Recipe(scheme_options={"o": name + "x"})
    assert Recipe(seed=2**63 - 1, epochs=2**31 - 1, stages=(Stage(lr_scale=1e30),)).seed == 2**63 - 1


def test_depth_is_refused_wherever_it_comes_from():
    nested = deep(1, 5000)
    for content in ({"scheme_options": {"a": nested}}, {"stages": nested}, {"skip": nested}, {"x": nested}):
        with pytest.raises(InvalidRecipe, match="nested more than 24 levels"):
            Recipe.from_dict(content)
    with pytest.raises(InvalidRecipe, match="bytes; a file name can have"):
        Recipe().with_scheme("xnor:a=" + "[" * 5000)


# ------------------------------------------------------------------------------------------------------------- results


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return fuzz.write(tmp_path, kind("results").samples[0]).parent


def rewritten(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = read_json(path)
    change(content)
    write_json(path, content)


def test_results_come_back(directory):
    found = read_comparison(directory)
    assert [run.name for run in found.results] == list(found.planned)
    other = Comparison(**{**vars(found), "directory": directory / "again"})
    write_manifest(other)
    for run in found.results:
        write_run(other.directory, run)
    assert read_comparison(other.directory) == other


def test_what_an_earlier_version_did_not_write_takes_its_default(directory):
    rewritten(directory / "comparison.json", lambda content: content.pop("recipes"))
    for path in (directory / "runs").iterdir():
        rewritten(path, lambda content: [content.pop(key) for key in ("histograms", "run_id", "started", "times")])
    found = read_comparison(str(directory))
    assert found.recipes == {}
    for run in found.results:
        assert (run.histograms, run.run_id, run.started, list(run.times)) == ({}, "", 0.0, [])


@pytest.mark.parametrize(
    "name", ["../x", "..", ".", "", "/etc/passwd", "a/b", "a\\b", "a\0", "a\n", "x" * 241, "C:x", "\u00e9" * 121]
)
def test_a_planned_run_leads_nowhere_else(name, directory):
    (directory.parent / "x.json").write_text("{}")
    rewritten(directory / "comparison.json", lambda content: content["planned"].append(name))
    with pytest.raises(InvalidData, match=r"comparison\.json is not a comparison: it plans the run"):
        read_comparison(directory)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("data"), "its keys differ in \\['data'\\]"),
        (lambda c: c.update(more=1), "its keys differ in \\['more'\\]"),
        (lambda c: c.update(planned="abc"), "planned is 'abc'; a value of type list"),
        (lambda c: c.update(planned=[1]), r"planned\.0 is 1; a value of type str"),
        (lambda c: c.update(planned=c["planned"] * 2), "twice, or under"),
        (lambda c: c.update(failures=[]), "failures is \\[\\]; a value of type table"),
        (lambda c: c.update(failures={"x": 1}), r"failures\.x is 1"),
        (lambda c: c["data"].pop("name"), r"its data are .*: its keys differ in \['name'\]"),
        (lambda c: c["data"].update(test=0), "its data are"),
        (lambda c: c["data"].update(image=[1, 2]), "its data are"),
        (lambda c: c["data"].update(image=["x", 1, 1]), r"image\.0 is 'x'"),
    ],
)
def test_a_damaged_comparison_is_refused(change, words, directory):
    rewritten(directory / "comparison.json", change)
    with pytest.raises(InvalidData, match=words):
        read_comparison(directory)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("size"), "its keys differ in \\['size'\\]"),
        (lambda c: c.update(seed="0"), "seed is '0'; a value of type int"),
        (lambda c: c.update(seed=True), "seed is True; a value of type int"),
        (lambda c: c.update(seconds=None), "seconds is None; a value of type float"),
        (lambda c: c.update(epochs={}), "epochs is {}; a value of type list"),
        (lambda c: c["epochs"].append({"lr": "x"}), r"epochs\.2\.lr is 'x'"),
        (lambda c: c["epochs"].append({"epoch": 3}), r"epochs\.2 lacks an epoch number, or a test/top1"),
        (lambda c: c["epochs"][0].update({"test/top1": 101}), r"epochs\.0 lacks an epoch number"),
        (lambda c: c["epochs"][0].update({"test/top1": math.nan}), r"epochs\.0 lacks an epoch number"),
        (lambda c: c["epochs"][0].update(epoch=math.inf), r"epochs\.0 lacks an epoch number"),
        (lambda c: c.update(times=[1.0]), "it has 1 times for 2 epochs"),
        (lambda c: c.update(started=math.nan), "started is nan; allowed: seconds since 1970"),
        (lambda c: c.update(times=["x", 1.0]), r"times\.0 is 'x'"),
        (lambda c: c["size"].pop("mbit"), "its size lacks mbit"),
        (lambda c: c.update(name="other"), "its name is 'other'"),
        (lambda c: c.update(title="\x1b]0;x\x07"), "title is"),
        (lambda c: c["environment"].update(x=1), r"environment\.x is 1"),
        (lambda c: c["histograms"]["conv"].update(x={"edges": [0, 1], "counts": [1]}), "no histogram for 'x'"),
        (lambda c: c["histograms"]["conv"]["0"].update(counts=[1]), "no histogram for '0'"),
        (lambda c: c["histograms"]["conv"]["0"].update(edges=[math.nan] * 3), "no histogram for '0'"),
        (lambda c: c["histograms"]["conv"]["0"].update(more=[]), "no histogram for '0'"),
        (lambda c: c["histograms"].update(conv=3), r"histograms\.conv is 3"),
    ],
)
def test_a_damaged_run_is_refused(change, words, directory):
    path = next((directory / "runs").iterdir())
    rewritten(path, change)
    with pytest.raises(InvalidData, match=words) as caught:
        read_comparison(directory)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"a":' * 5000, '{"format": 1, "format": 1}', '{"format": 1' + "0" * 400 + "}",
     '{"format": 1, "x": "\\ud800"}', "[]", "1", "nul"],
    ids=short,
)  # fmt: skip
def test_json_that_is_none_of_ours_is_refused(text, tmp_path):
    path = tmp_path / "x.json"
    path.write_text(text)
    for read in (read_json, read_run):
        with pytest.raises(InvalidData, match=r"x\.json"):
            read(path)


def test_half_a_character_does_not_keep_results_from_being_read(tmp_path):
    """As in the name of a file that a failure speaks of."""
    path = write_json(tmp_path / "x.json", {"failures": {"a": "no such file: \udcff"}})
    assert read_json(path) == {"failures": {"a": "no such file: ?"}}
