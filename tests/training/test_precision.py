import dataclasses
import warnings
from collections.abc import Iterator

import pytest
import torch

from bonn_qat import plugins
from bonn_qat.studies import jobs
from bonn_qat.training import data, precision
from bonn_qat.training.network import build
from bonn_qat.training.precision import SlowPrecision, autocast, warn_if_slow
from bonn_qat.training.recipe import PRECISIONS, Recipe
from bonn_qat.training.train import train


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    yield
    warn_if_slow.cache_clear()


CPU, GPU = torch.device("cpu"), torch.device("cuda")


def has(monkeypatch: pytest.MonkeyPatch, *names: str) -> None:
    warn_if_slow.cache_clear()
    monkeypatch.setattr(precision, "instructions", lambda: frozenset(names))


def said(name: str, device: torch.device) -> list[str]:
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        warn_if_slow(name, device)
    return [str(warning.message) for warning in found if warning.category is SlowPrecision]


@pytest.mark.parametrize("name", PRECISIONS)
def test_a_precision_is_that_of_its_name(name: str) -> None:
    x = torch.ones(2, 2)
    with autocast(name, CPU):
        expected = getattr(torch, name, torch.float32)
        assert (x @ x).dtype == expected
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("instruction", ["avx512_bf16", "amx_bf16", "bf16"])
def test_a_cpu_without_instructions_for_bfloat16_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, instruction: str
) -> None:
    has(monkeypatch, "avx2", "avx512f")
    (line,) = said("bfloat16", CPU)
    assert "\n" not in line
    assert 'precision = "bfloat16" is slower than "float32" here' in line
    assert said("float16", CPU)
    assert said("float32", CPU) == said("tf32", CPU) == said("bfloat16", GPU) == []
    has(monkeypatch, "avx2", instruction)
    assert said("bfloat16", CPU) == []


def test_nothing_is_said_where_the_instructions_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch)
    assert said("bfloat16", CPU) == []


def test_two_runs_say_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, "avx2")
    digits = data.load("digits", train_images=32, test_images=16)
    recipe = Recipe(model="wrn10_16", epochs=1, batch_size=32, precision="bfloat16")
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        for seed in (0, 1):
            changed = dataclasses.replace(recipe, seed=seed)
            train(build(changed, digits), changed, digits)
    assert [warning.category for warning in found].count(SlowPrecision) == 1


def test_the_process_that_starts_jobs_says_it_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, torch.device]] = []
    monkeypatch.setattr(jobs, "warn_if_slow", lambda *arguments: told.append(arguments))

    def end(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(jobs, "_start", end)
    recipes = [Recipe(seed=seed, precision="bfloat16") for seed in range(3)]
    digits = data.load("digits", train_images=32, test_images=16)
    pm = plugins.create_manager(entry_points=False)
    with pytest.raises(KeyboardInterrupt):
        jobs.at_once(recipes, digits, None, jobs=2, pm=pm)  # type: ignore[arg-type]
    assert [name for name, _ in told] == ["bfloat16"]
