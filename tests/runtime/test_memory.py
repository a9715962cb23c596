"""Hostile calls and memory: every allowed operator, measured in processes of their own."""

import ctypes
import gc
import json
import os
import random
import resource
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from bonn_qat import PackedModel
from bonn_qat.errors import BonnQatError
from bonn_qat.runtime import planned
from bonn_qat.runtime.dry_run import dry_run
from bonn_qat.runtime.layout import Geometry

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
MIB = 2**20
IMAGE = torch.zeros(1, 3, 8, 8)


def script(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(BENCHMARKS)
        return __import__(name)


fuzz, hostile = script("fuzz"), script("hostile")
pytestmark = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures memory as Linux tells it")


def model_of(call: Any, size: tuple[int, int, int] = (3, 8, 8)) -> PackedModel:
    tensors, header = hostile.as_file(call, size)
    return PackedModel._from_file(tensors, json.loads(json.dumps(header)))


def counted(model: PackedModel) -> int:
    return dry_run(model.network.graph, dict(model.network.named_buffers()), [(model.input_size, torch.float32)], 1)


def isolated(work: Callable[[], Any]) -> str:
    """What ``work`` returns, or the exception that it raises, from a forked process; "died" for one that ends."""
    receiver, sender = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(sender, str(work()).encode())
        except BaseException as error:
            os.write(sender, f"{type(error).__name__}: {error}".encode()[:60_000])
        finally:
            os._exit(0)
    os.close(sender)
    with os.fdopen(receiver, "rb") as file:
        found = file.read().decode()
    _, status = os.waitpid(child, 0)
    return found if os.waitstatus_to_exitcode(status) == 0 and found else f"died: {os.waitstatus_to_exitcode(status)}"


def grown(run: Callable[[], Any]) -> int:
    """Bytes by which this process grows at most during ``run``."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = fuzz._memory("VmRSS")
    result = run()
    taken: int = fuzz._memory("VmHWM") - before
    del result
    return taken


def test_hostile_calls_run_or_are_refused_and_never_end_the_process(tmp_path):
    """Each operator with odd and extreme arguments: equal results of two calls, or one line, within the count."""
    found = Counter(what for _, what in fuzz.Reader("calls", 5, tmp_path).run(range(400)))
    assert not {what: count for what, count in found.items() if what.startswith("failed")}
    assert set(found) == {"read", "InvalidData"}
    assert min(found.values()) > 100


def test_the_generator_reaches_every_argument_of_every_operator():
    """With long lists for lists, extreme numbers for numbers, and other tensors for tensors."""
    chance, seen = random.Random(0), 0
    for name in hostile.functions():
        call, reached = hostile.ordinary(name), set()
        for _ in range(60):
            other = hostile.hostile(chance, name)
            reached |= {
                place for place, (a, b) in enumerate(zip(call.args, other.args, strict=False)) if repr(a) != repr(b)
            }
            seen += sum(isinstance(a, list) and len(a) >= 1000 for a in other.args)
        assert reached == set(range(len(call.args))), name
    assert seen > 50


# Torch splits its work as the sizes of tensors tell it to: more shapes for what needs the most beside its results.
def variants() -> Iterator[tuple[str, Any]]:
    side = 384
    for name in hostile.functions():
        yield name, hostile.ordinary(name, side)
    tensors = dict(hostile.tensors(side))
    plane = torch.ones(1, 1, 400, 400)
    tensors |= {"plane": plane, "one": torch.ones(1, 1, 3, 3), "large": torch.ones(1, 1, 15, 15),
                "deep": torch.ones(1, 64, 48, 48), "each": torch.ones(64, 1, 3, 3), "full": torch.ones(64, 64, 3, 3),
                "dots": torch.ones(1, 2, 60, 60), "dotted": torch.ones(2, 2, 3, 3), "point": torch.ones(1, 1, 1, 1),
                "up": torch.ones(64, 4, 4, 4), "long": torch.ones(1, 4, 500, 8), "few": torch.ones(1, 64, 1, 32),
                "shared": torch.ones(1, 1, 4000, 32)}  # fmt: skip
    for what, args in {
        "a plane": ["$plane", "$one", None, [1, 1], [1, 1], [1, 1], 1],
        "a large kernel": ["$plane", "$large", None, [1, 1], [7, 7], [1, 1], 1],
        "gaps": ["$deep", "$full", None, [1, 1], [4, 4], [4, 4], 1],
        "depthwise": ["$deep", "$each", None, [1, 1], [1, 1], [1, 1], 64],
        "strides": ["$deep", "$full", None, [2, 2], [1, 1], [1, 1], 1],
        "a small image in a wide margin": ["$dots", "$dotted", None, [1, 1], [100, 100], [1, 1], 1],
        "a point in a wide margin": ["$point", "$one", None, [1, 1], [200, 200], [1, 1], 1],
    }.items():
        yield what, hostile.Call("aten.conv2d.default", args, {}, tensors)
    yield "upwards", hostile.Call("aten.conv_transpose2d.input", ["$deep", "$up", None, [2, 2], [1, 1]], {}, tensors)
    attention = "aten.scaled_dot_product_attention.default"
    yield "attention", hostile.Call(attention, ["$long", "$long", "$long"], {}, tensors)
    yield "scores", hostile.Call(attention, ["$long", "$long", "$long", None, 0.0, True], {}, tensors)
    yield "shared keys", hostile.Call(attention, ["$few", "$shared", "$shared"], {}, tensors)
    for equation, args in (("abc,adc->abd", ["$wide", "$wide"]), ("abc,abc->a", ["$wide", "$wide"]),
                           ("abc,dec->", ["$tokens", "$tokens"]), ("abcd->dcba", ["$image"])):  # fmt: skip
        yield equation, hostile.Call("aten.einsum.default", [equation, args], {}, tensors)


def test_no_operator_needs_more_memory_than_the_dry_run_counts():
    def work() -> str:
        planned._package = lambda: None  # in torch; a plan's arena is not counted
        libc = ctypes.CDLL(None)
        libc.mallopt(
            -3, 2**16
        )  # M_MMAP_THRESHOLD: what is freed goes back at once, so that nothing is used again unseen
        gc.freeze()  # a collection looks at everything that was imported, for longer than a call takes
        model_of(hostile.ordinary("aten.conv1d.default", 96))(IMAGE)  # oneDNN compiles kernels for large images
        over = []
        for what, call in variants():
            with fuzz.warnings.catch_warnings():
                fuzz.warnings.simplefilter("ignore")
                model_of(hostile.ordinary(call.op))(IMAGE)  # what torch loads once
                model = model_of(call)
                needed, taken = counted(model), grown(lambda model=model: model(IMAGE))
            if taken > needed + 1.5 * MIB:
                over.append(f"{what}: {taken / MIB:.1f} MiB taken, {needed / MIB:.1f} counted")
        return "; ".join(over) or "within"

    assert isolated(work) == "within"


def test_memory_that_the_system_does_not_give_is_told_wherever_it_is_missed(tmp_path):
    """A network of megabytes is loaded with more and more memory, until there is enough."""
    geometry = Geometry(2048, 256, (3, 3))
    bits = torch.zeros(2048 * 256 * 9 // 64, dtype=torch.int64)
    nodes = [
        {"op": "input", "name": "x"}, {"op": "tensor", "name": "b", "tensor": "b", "geometry": geometry.numbers},
        {"op": "tensor", "name": "v", "tensor": "v"},
        *({"op": "aten.relu.default", "name": f"r{i}", "args": [{"node": "x"}], "kwargs": {}} for i in range(500)),
        {"op": "output", "name": "output", "args": [[{"node": "v"}]]},
    ]  # fmt: skip
    held = {"b": bits, "v": torch.ones(10**6)}
    header = {**hostile.as_file(hostile.ordinary("aten.relu.default"))[1], "nodes": nodes}
    path = tmp_path / "large.safetensors"
    path.write_bytes(fuzz.joined(held, json.dumps(fuzz._signed(held, header))))
    PackedModel.load(path)

    def load(more: int) -> str:
        gc.freeze()
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + more, used + more))
        try:
            PackedModel.load(path)
        except BonnQatError as error:
            return str(error)
        return "loaded"

    found = Counter(isolated(lambda more=more: load(more)) for more in range(0, 64 * MIB, 4 * MIB))
    assert set(found) == {"loaded", f"{path} does not fit into memory"}
