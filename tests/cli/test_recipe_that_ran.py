"""The recipe that ran is the recipe's file with the options that were given, for every key, option and command."""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from bonn_qat import cli, load, plugins
from bonn_qat.binarization.binarize import Binarization
from bonn_qat.cli.options import _KEYS
from bonn_qat.files.tensors import read_tensors
from bonn_qat.files.validate import OneOf
from bonn_qat.studies.comparison import read_comparison
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.results import RUNS
from bonn_qat.training.trainer import Trainer

FLAGS = {key: f"--{key.replace('_', '-')}" for key in _KEYS}
SHORT = st.text("abcxyz019", min_size=1, max_size=5)
NUMBERS = {bool: st.booleans(), int: st.integers(0, 10**6), float: st.floats(1e-6, 5)}
OWN: dict[str, st.SearchStrategy[Any]] = {
    "scheme": st.sampled_from(["bonn", "xnor", "float", "bnn"]),
    "latents": st.sampled_from(["scheme", "float", "0.5", "1e-3"]),
    "stages": st.sampled_from([[{"share": 1.0, "lr_scale": 0.5}], [{"share": 0.25}, {"share": 0.75}]]),
    "regularizer_options": st.dictionaries(SHORT, st.dictionaries(SHORT, NUMBERS[float], max_size=2), max_size=2),
}  # fmt: skip


def values(name: str, hint: Any) -> st.SearchStrategy[Any]:
    """Values that the field of a recipe may have, as TOML has them."""
    if name in OWN:
        return OWN[name]
    rules = ()
    if get_origin(hint) is Annotated:
        hint, *rules = get_args(hint)
    if names := [rule.names for rule in rules if isinstance(rule, OneOf)]:
        return st.sampled_from(sorted(names[0]))
    if get_origin(hint) is tuple:
        found: st.SearchStrategy[Any] = st.lists(
            SHORT if get_args(hint)[0] is str else NUMBERS[get_args(hint)[0]], max_size=3
        )
    elif get_origin(hint) is Mapping:
        found = st.dictionaries(SHORT, NUMBERS[float] | NUMBERS[bool] | SHORT | st.lists(NUMBERS[int]), max_size=2)
    else:
        found = SHORT if hint is str else NUMBERS[hint]
    return found.filter(lambda value: all(rule(name, value) is None for rule in rules))


HINTS = get_type_hints(Recipe, include_extras=True)
KEYS = {f.name: values(f.name, HINTS[f.name]) for f in fields(Recipe)}


@st.composite
def tables(draw: st.DrawFn, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Some keys of a recipe with their values."""
    chosen = draw(st.sets(st.sampled_from(sorted(set(KEYS) - {"factors", *without})), max_size=8))
    table = {key: draw(KEYS[key]) for key in sorted(chosen)}
    if "milestones" in table and draw(st.booleans()):
        table["factors"] = [draw(NUMBERS[float]) for _ in table["milestones"]]
    return table


def toml(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + "}"
    return f"[{', '.join(map(toml, value))}]" if isinstance(value, list) else json.dumps(value)


def write(path: Path, table: Mapping[str, Any]) -> str:
    path.write_text("".join(f"{key} = {toml(value)}\n" for key, value in table.items()))
    return str(path)


def options(flags: Mapping[str, Any], sets: Mapping[str, Any]) -> list[str]:
    given = [part for key, value in flags.items() for part in (FLAGS[key], str(value))]
    return given + [part for key, value in sets.items() for part in ("--set", f"{key}={toml(value)}")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("recipes")


class Asked(Exception):
    """In place of a comparison; its argument is the recipes."""


def planned(arguments: list[str]) -> list[dict[str, Any]]:
    """The recipes that a command would run. No data is loaded and no run begins."""

    def compare(recipes: Any, *_: Any, **__: Any) -> None:
        raise Asked(recipes)

    data = SimpleNamespace(name="data", train_size=1, test_size=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bonn_qat.training.data.load", lambda *_, **__: data)
        patch.setattr("bonn_qat.studies.compare.compare", compare)
        with pytest.raises(Asked) as caught:
            cli.main(arguments)
    return [recipe.to_dict() for recipe in caught.value.args[0]]


EXAMPLES = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
FLAG_VALUES = st.fixed_dictionaries({}, optional={key: KEYS[key] for key in FLAGS})


def recipe_of(*tables: Mapping[str, Any]) -> Recipe:
    merged: dict[str, Any] = {}
    for table in tables:
        merged |= table
    if "milestones" in merged and len(merged.get("factors", [])) != len(merged["milestones"]):
        merged["factors"] = []
    return Recipe.from_dict(merged)


@EXAMPLES
@given(file=tables(), flags=FLAG_VALUES, sets=tables(("scheme", "seed", "milestones", *FLAGS)), own=st.data())
def test_train_runs_the_file_and_what_the_command_line_changes(
    file: dict[str, Any], flags: dict[str, Any], sets: dict[str, Any], own: st.DataObject, place: Path
) -> None:
    arguments = ["train", "--recipe", write(place / "train.toml", file), *options(flags, sets)]
    assert planned(arguments) == [recipe_of(file, flags, sets).to_dict()]
    scheme = own.draw(st.sampled_from(["bonn", "xnor"]))
    changed = {"scheme": scheme, "seed": own.draw(KEYS["seed"])}
    spelt = ["--scheme", scheme, "--seed", str(changed["seed"])]
    assert planned([*arguments, *spelt]) == [recipe_of(file, flags, sets, changed).to_dict()]


@EXAMPLES
@given(file=tables(), flags=FLAG_VALUES, sets=tables(("scheme", "seed", "milestones", *FLAGS)), seeds=st.integers(1, 3))
def test_compare_runs_the_files_scheme_from_its_seed_on(
    file: dict[str, Any], flags: dict[str, Any], sets: dict[str, Any], seeds: int, place: Path
) -> None:
    arguments = ["compare", "--recipe", write(place / "compare.toml", file), *options(flags, sets)]
    first = recipe_of(file, flags, sets)
    found = planned([*arguments, "--seeds", str(seeds)])
    assert {recipe["seed"] for recipe in found} == set(range(first.seed, first.seed + seeds))
    common = [{**recipe, "scheme": first.scheme, "seed": first.seed, "latents": first.latents} for recipe in found]
    assert all(recipe == first.to_dict() for recipe in common)
    if "scheme" in file:
        assert [(recipe["scheme"], recipe["latents"]) for recipe in found] == [(first.scheme, first.latents)] * seeds
    chosen = planned([*arguments, "--schemes", "xnor,bonn", "--latents", "float,0.25"])
    assert [(recipe["scheme"], recipe["latents"]) for recipe in chosen] == [
        (scheme, latents) for scheme in ("xnor", "bonn") for latents in ("float", "0.25")
    ]


@EXAMPLES
@given(flags=FLAG_VALUES.filter(bool), data=st.data())
def test_an_option_and_a_setting_of_one_key_are_refused(flags: dict[str, Any], data: st.DataObject) -> None:
    key = data.draw(st.sampled_from(sorted(flags)))
    for verb in ("train", "compare"):
        assert cli.main([verb, *options(flags, {key: data.draw(KEYS[key])})]) == 2


@st.composite
def small(draw: st.DrawFn) -> dict[str, Any]:
    """A recipe of a short run."""
    scheme = draw(st.sampled_from(["bonn", "xnor", "bnn", "float"]))
    return {
        "model": "wrn10_16", "scheme": scheme, "seed": draw(st.integers(0, 2**62)), "epochs": 1, "batch_size": 8,
        "train_images": 16, "test_images": 8, "optimizer": draw(st.sampled_from(["sgd", "adam"])),
        "lr": draw(st.floats(1e-4, 1e-2)), "momentum": draw(st.floats(0, 0.9)),
        "weight_decay": draw(st.floats(1e-6, 1e-3)), "schedule": "constant", "augment": draw(st.booleans()),
        "latents": draw(st.sampled_from(["scheme", "float", "0.125"])), "channels_last": draw(st.booleans()),
        "skip": draw(st.sampled_from([[], ["layer1.*"]])), "label_smoothing": draw(st.sampled_from([0.0, 0.25])),
        "model_options": draw(st.sampled_from([{}, {"drop_rate": 0.25}])), "sync_norms": draw(st.booleans()),
    }  # fmt: skip


@settings(parent=EXAMPLES, max_examples=2, phases=[Phase.generate])
@given(file=small(), flags=st.fixed_dictionaries({}, optional={"lr": st.floats(1e-4, 1e-2), "batch_size": st.just(4)}))
def test_what_was_trained_is_what_the_recipe_says(
    file: dict[str, Any], flags: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> None:
    place, runs = tmp_path_factory.mktemp("trained"), []
    wanted = recipe_of(file, flags)

    def epoch(self: Trainer, number: int) -> Any:
        runs.append((self, torch.initial_seed()))
        if len(runs) == 1:
            raise KeyboardInterrupt  # so that the run is resumed
        return whole(self, number)

    with pytest.MonkeyPatch.context() as patch:
        whole = Trainer.epoch
        patch.setattr(Trainer, "epoch", epoch)
        patch.setattr("bonn_qat.studies.figures.pictures", lambda _: [])  # which take most of the time
        arguments = ["train", "--recipe", write(place / "r.toml", file), *options(flags, {})]
        assert cli.main([*arguments, "--output", str(place / "out")]) == 130
        assert cli.main(["train", "--resume", str(place / "out")]) == 0
    (result,) = read_comparison(place / "out").results
    assert Recipe.from_dict(result.recipe) == wanted
    weights = place / "out" / RUNS / f"{wanted.name}.safetensors"
    assert Recipe.from_dict(read_tensors(weights)[1]["recipe"]) == wanted
    (first, seed), (run, _) = runs
    assert seed == wanted.seed
    for trainer in (first, run):
        record = trainer.model.binarization
        assert isinstance(record, Binarization)
        scheme = plugins.find_scheme(wanted.scheme)
        assert (record.scheme.name, record.scheme.weight) == (scheme.name, scheme.weight)
        assert record.scheme.latent_std == (scheme.latent_std if wanted.latents == "scheme" else wanted.latent_std)
        assert (record.skip, len(record.binary) > 0) == (wanted.skip, wanted.scheme != "float")
        assert type(trainer.optimizer) is {"sgd": torch.optim.SGD, "adam": torch.optim.AdamW}[wanted.optimizer]
        group = trainer.optimizer.param_groups[0]
        assert group["lr"] == pytest.approx(wanted.lr)
        assert wanted.weight_decay in [group["weight_decay"] for group in trainer.optimizer.param_groups]
        assert group.get("momentum", group.get("betas", [0])[0]) == pytest.approx(wanted.momentum)
        assert trainer.steps_in_epoch == 16 // wanted.batch_size
        assert trainer.objective.task.label_smoothing == wanted.label_smoothing
        assert trainer.layout is (torch.channels_last if wanted.channels_last else torch.contiguous_format)
    trained = load(weights)
    assert trained.binarization.scheme.name == wanted.scheme
    assert all(torch.equal(tensor, trained.state_dict()[name]) for name, tensor in run.model.state_dict().items())
