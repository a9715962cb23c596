"""What a recipe may build is bounded, and memory that runs out at any point is an error of one line."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from bonn_qat import cli, load, load_data
from bonn_qat.errors import InvalidData, InvalidRecipe, is_out_of_memory
from bonn_qat.files.tensors import write_tensors
from bonn_qat.training import network
from bonn_qat.training.recipe import Recipe

DATA = load_data("digits", train_images=8, test_images=4)
NETWORKS = {
    "resnet18": ["layers", "channels"],
    "resnet50": ["base_width", "cardinality", "layers"],
    "vit_tiny_patch16_224": ["img_size", "embed_dim", "depth", "mlp_ratio", "patch_size"],
    "swin_tiny_patch4_window7_224": ["img_size", "embed_dim", "depths", "mlp_ratio"],
    "convnext_tiny": ["depths", "dims", "kernel_sizes"],
    "densenet121": ["growth_rate", "block_config"],
    "mixer_s16_224": ["img_size", "embed_dim", "num_blocks"],
}  # fmt: skip
HUGE = st.integers(10**5, 10**12) | st.floats(1e5, 1e300) | st.just(float("inf"))


@st.composite
def absurd(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """A network with an option, or a list of them, that is far too large."""
    model = draw(st.sampled_from(sorted(NETWORKS)))
    option, value = draw(st.sampled_from(NETWORKS[model])), draw(HUGE)
    # An image of one row has no patches, and its network is small.
    lists = [[value, value]] if option == "img_size" else [[value, 1, 1, 1], [1, value]]
    return model, {option: draw(st.sampled_from([value, *lists]))}


@settings(max_examples=40, deadline=None)
@given(case=absurd())
def test_a_network_of_absurd_size_is_refused_before_it_is_built(case: tuple[str, dict[str, Any]]) -> None:
    model, options = case
    recipe = Recipe(model=model, model_options=options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "_MOST_MODULES", 500)
        # What timm refuses at once is left to timm.
        patch.setattr(network, "_build", lambda *_: network.float_network(recipe, 10, 1))
        began = time.thread_time()
        with pytest.raises(InvalidRecipe) as caught:
            network.build(recipe, DATA)
        assert time.thread_time() - began < 10
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1500


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers": [1_000_000, 1, 1, 1]}, "add up to 1e+06; allowed: at most 131,072"),
        ({"layers": [20_000, 1, 1, 1]}, "has too many modules; allowed: at most 8,192"),
        ({"layers": [100, 1, 1, 1], "channels": [20_000, 64, 64, 64]}, "this machine has memory for "),
    ],
)
def test_the_message_names_what_is_too_large(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRecipe) as caught:
        network.build(Recipe(model="resnet18", model_options=options), DATA)
    assert words in str(caught.value)


def test_a_network_that_takes_too_long_to_make_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network, "_MOST_SECONDS", 0)
    with pytest.raises(InvalidRecipe, match="'resnet18' with its model_options takes too long to make; allowed: 0"):
        network.build(Recipe(model="resnet18"), DATA)


# -------------------------------------------------------------------------------------------------------------- memory


class Full(TorchDispatchMode):
    """From the ``last`` operation on, which is counted from 0, there is no memory for another tensor."""

    def __init__(self, last: int, failure: Exception | None) -> None:
        super().__init__()
        self.last, self.failure, self.count = last, failure, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        if self.failure is not None and self.count > self.last:
            raise self.failure
        return func(*args, **(kwargs or {}))


FAILURES: dict[str, Callable[[], Exception]] = {
    "python": MemoryError,
    "torch": lambda: RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to "
        "allocate 8000 bytes. Error code 12 (Cannot allocate memory)"
    ),
    "gpu": lambda: torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "c++": lambda: RuntimeError("std::bad_alloc"),
    "system": lambda: OSError(12, "Cannot allocate memory"),
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = Recipe(model="wrn10_16", scheme="bonn")
    model = network.build(recipe, DATA)
    path = tmp_path_factory.mktemp("memory") / "x.safetensors"
    return write_tensors(path, model.state_dict(), network.weights_header(recipe, DATA))


@pytest.mark.parametrize("failure", FAILURES)
def test_memory_that_runs_out_while_loading_is_an_error_that_names_the_file(failure: str, weights: Path) -> None:
    whole = load(weights).state_dict()  # the first time takes more operations
    with Full(0, None) as counted:
        load(weights)
    assert is_out_of_memory(FAILURES[failure]())
    for last in range(0, counted.count, counted.count // 12):
        with Full(last, FAILURES[failure]()), pytest.raises(InvalidData) as caught:
            load(weights)
        assert str(weights) in str(caught.value), last
        assert "\n" not in str(caught.value)
    assert all(torch.equal(tensor, whole[name]) for name, tensor in load(weights).state_dict().items())


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("verb", ["summary", "export", "bench"])
def test_memory_that_runs_out_in_a_command_is_one_line(
    failure: str, verb: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = ["--format", "packed", "--output", str(tmp_path / "net")]
    arguments = {
        "summary": ["summary", "wrn10_16", "--img-size", "32"],
        "export": ["export", str(weights), *output],
        "bench": ["bench", "wrn10_16", "--img-size", "32"],
    }
    for last in (0, 50):
        with Full(last, FAILURES[failure]()):
            assert cli.main(arguments[verb]) in (1, 2)
        told = capsys.readouterr().err
        assert "memory" in told
        assert told.count("\n") == 1
    assert not list(tmp_path.iterdir())
