"""What a caller has set in torch changes neither a packed network, nor its outputs, nor a file."""

import contextlib
import copy
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from generated import SIZE, network, odd_images
from torch import Tensor, nn

import bonn_qat
from bonn_qat import PackedModel, pack
from bonn_qat.exporting.export import FORMATS, export


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic(warn_only: bool) -> Iterator[None]:
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def flushing() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def precision(value: str) -> Iterator[None]:
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision("highest")


STATES: dict[str, Callable[[], contextlib.AbstractContextManager[object]]] = {
    "autocast to bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast to float16": lambda: torch.autocast("cpu", torch.float16),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "no gradients": torch.no_grad,
    "gradients": torch.enable_grad,
    "deterministic": lambda: deterministic(False),
    "deterministic, warnings": lambda: deterministic(True),
    "denormals are 0": flushing,
    "medium precision": lambda: precision("medium"),
    "anomalies": torch.autograd.detect_anomaly,
}


def ambient() -> tuple[object, ...]:
    """All that a call could leave behind."""
    return (
        torch.get_default_dtype(), torch.get_default_device(), torch.is_inference_mode_enabled(),
        torch.is_grad_enabled(), torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"),
        torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.get_float32_matmul_precision(), torch.is_anomaly_enabled(), torch.get_num_threads(),
        float.fromhex("0x1p-1022") * 0.5 == 0,
    )  # fmt: skip


class Given(NamedTuple):
    """A network packed in no surroundings at all, and what it gives."""

    model: nn.Module
    packed: PackedModel
    path: Path
    images: Tensor
    expected: Tensor


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> list[Given]:
    made = []
    for seed, scheme in ((1, "bonn"), (5, "adabin"), (8, "reactnet")):
        model, _ = network(seed, scheme)
        packed, x = pack(model), odd_images(5, seed)
        path = packed.save(tmp_path_factory.mktemp("packed") / "outside.safetensors")
        made.append(Given(model, packed, path, x, packed(x)))
    return made


def agrees(result: Tensor, each: Given) -> bool:
    """Whether a result is the expected one, bit for bit."""
    return result.dtype == torch.float32 and torch.equal(result.nan_to_num(7, 8, 9), each.expected.nan_to_num(7, 8, 9))


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("name", STATES)
def test_whatever_is_set_around_a_call_or_a_file_the_result_is_the_same(given, name, tmp_path):
    for each in given:
        with STATES[name]():
            before = ambient()
            found = [each.packed(each.images), PackedModel.load(each.path)(each.images)]
            saved = each.packed.save(tmp_path / "within.safetensors").read_bytes()
            copied = copy.deepcopy(each.packed)
            assert ambient() == before
        assert all(agrees(result, each) for result in (*found, copied(each.images)))
        assert saved == each.path.read_bytes()


MIXED = random.Random(0).sample(list(STATES), len(STATES))


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("part", range(3))
def test_several_states_at_once_change_neither_packing_nor_exporting(given, part, tmp_path):
    each = given[part]
    export(each.model, tmp_path / "outside.pt2", "pt2")
    with contextlib.ExitStack() as stack:
        for name in MIXED[part::3]:
            stack.enter_context(STATES[name]())
        before = ambient()
        made = pack(each.model)
        export(each.model, tmp_path / "within.pt2", "pt2")
        assert agrees(made(each.images), each)
        assert ambient() == before
    assert made.dump() == each.path.read_bytes()
    programs = [FORMATS["pt2"].run(tmp_path / f"{where}.pt2", each.images)[0] for where in ("within", "outside")]
    assert torch.equal(*(result.nan_to_num(7, 8, 9) for result in programs))
    # What was made within can be changed outside.
    made.load_state_dict({name: tensor.clone() for name, tensor in made.state_dict().items()})
    assert agrees(made(each.images), each)


def test_threads_in_other_surroundings_do_not_disturb_each_other(given):
    wrong = list[str]()

    def work(name: str) -> None:
        with STATES[name]():
            for _ in range(30):
                if not agrees(given[0].packed(given[0].images), given[0]):
                    wrong.append(name)

    names = ["autocast to bfloat16", "inference", "meta", "denormals are 0", "medium precision", "gradients"]
    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert torch.get_float32_matmul_precision() == "highest"


def test_a_compiled_one_does_not_see_autocast(given):
    compiled = torch.compile(given[0].packed, backend="aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        assert agrees(compiled(given[0].images), given[0])


class Positions(nn.Module):
    """Its numbers depend on torch's default type, and on the batch, so that they cannot be computed beforehand."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.third(self.second(self.first(x)))
        batch = torch.arange(x.shape[0])[:, None, None]
        return x.argmax(1) / 3 + torch.full((4, 4), 0.3).sum() * 0.1 + batch * 0.7 + (x > 0).sum(1) ** 0.5


def test_types_that_come_from_the_default_are_written_down():
    model = bonn_qat.binarize(Positions(), input_size=SIZE).eval().requires_grad_(False)
    x = odd_images(3, 0)
    packed, expected = pack(model), model(x)
    assert torch.equal(packed(x), expected)
    with default_dtype(torch.float64):
        assert torch.equal(packed(x), expected)
        assert packed(x).dtype == torch.float32
