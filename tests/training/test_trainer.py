import dataclasses
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from bonn_qat import binarize, hookimpl, objective, plugins, regularizers
from bonn_qat.errors import InvalidData, InvalidModel, InvalidRecipe, TrainingDiverged
from bonn_qat.scheme import Stage
from bonn_qat.training import data
from bonn_qat.training.checkpoint import read_state
from bonn_qat.training.network import build, save
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.train import train
from bonn_qat.training.trainer import Trainer

BOTH = (Stage(regularizers={"kernel": 1e-4, "feature": 1e-3}),)
RECIPE = Recipe(model="wrn10_16", epochs=1, batch_size=32, train_images=96, test_images=64, latents="0.01", stages=BOTH)


@pytest.fixture(scope="module")
def digits() -> data.Data:
    return data.load("digits", train_images=96, test_images=64)


def _manager(*observers: object) -> Any:
    manager = plugins.create_manager(entry_points=False)
    for observer in observers:
        manager.register(observer)
    return manager


def test_the_layout_of_tensors_changes_no_more_than_the_rounding(digits: data.Data) -> None:
    models, results = [], []
    for channels_last in (True, False):
        recipe = dataclasses.replace(RECIPE, channels_last=channels_last)
        models.append(build(recipe, digits, _manager()))
        results.append(train(models[-1], recipe, digits, pm=_manager()))
    first, second = (result.epochs[0] for result in results)
    assert first["train/task"] == pytest.approx(second["train/task"], rel=1e-3)
    assert all(parameter.is_contiguous() for parameter in models[0].parameters())  # safetensors takes no other


class _Looks:
    """Remembers how tensors lie and what products are made of, while a run goes on."""

    @hookimpl
    def bonn_qat_before_run(self, recipe: Recipe, model: nn.Module) -> None:
        self.layouts = {p.is_contiguous(memory_format=torch.channels_last) for p in model.parameters() if p.ndim == 4}

    @hookimpl
    def bonn_qat_after_epoch(self, epoch: int) -> None:
        self.products = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32


def test_layout_and_products_are_those_of_the_recipe_for_the_length_of_a_run(digits: data.Data) -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    for precision, expected in (
        ("tf32", ("high", True)),
        ("float32", ("highest", False)),
        ("bfloat16", ("high", True)),
    ):
        recipe, looks = dataclasses.replace(RECIPE, precision=precision), _Looks()
        train(build(recipe, digits, _manager()), recipe, digits, pm=_manager(looks))
        assert looks.layouts == {True}
        assert looks.products == expected
        assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


def test_a_compiled_run_is_the_run(digits: data.Data, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[type, str]] = []
    compile_ = torch.compile

    def eager(module: nn.Module, *, mode: str) -> Any:
        compiled.append((type(module), mode))
        return compile_(module, backend="eager", fullgraph=True)  # what it would run, without a compiler

    monkeypatch.setattr(torch, "compile", eager)
    stages = (Stage(share=0.5, regularizers={"kernel": 1e-4}), Stage(share=0.5, regularizers={"feature": 1e-3}))
    recipe = dataclasses.replace(RECIPE, epochs=2, stages=stages)
    plain = train(build(recipe, digits, _manager()), recipe, digits, pm=_manager())
    recipe = dataclasses.replace(recipe, compile="reduce-overhead")
    result = train(build(recipe, digits, _manager()), recipe, digits, pm=_manager())
    assert compiled == [(objective.Objective, "reduce-overhead")] * 2  # once for each stage
    assert result.epochs == plain.epochs


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, True), (0.9, False), (0.0, True)])
@pytest.mark.parametrize("norm_decay", [True, False])
def test_the_optimizer_is_what_the_recipe_says(
    digits: data.Data, momentum: float, nesterov: bool, norm_decay: bool
) -> None:
    recipe = dataclasses.replace(RECIPE, momentum=momentum, nesterov=nesterov, norm_decay=norm_decay, stages=())
    trainer = Trainer(
        build(recipe, digits, _manager()), recipe, digits, torch.device("cpu"), task=nn.CrossEntropyLoss()
    )
    norms = {id(p) for m in trainer.model.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()}
    assert norms
    for group in trainer.optimizer.param_groups:
        assert (group["momentum"], group["nesterov"]) == (momentum, nesterov and momentum > 0)
        if norms & {id(p) for p in group["params"]}:
            assert group["weight_decay"] == (recipe.weight_decay if norm_decay else 0.0)


def test_the_augmentation_is_the_recipes(digits: data.Data) -> None:
    recipe = dataclasses.replace(RECIPE, augmentation="resized_crop")
    with pytest.raises(InvalidData, match="digits has the augmentation 'crop' only; got 'resized_crop'"):
        train(build(recipe, digits, _manager()), recipe, digits, pm=_manager())


@pytest.mark.parametrize(("precision", "is_scaled"), [("float16", True), ("bfloat16", False)])
def test_a_run_under_autocast_resumes_exactly_from_a_checkpoint_in_float32(
    tmp_path: Path, digits: data.Data, precision: str, is_scaled: bool
) -> None:
    recipe = dataclasses.replace(RECIPE, precision=precision, epochs=2, batch_size=48)
    whole = build(recipe, digits, _manager())
    undisturbed = train(whole, recipe, digits, pm=_manager())
    path = tmp_path / "run.safetensors"
    with pytest.raises(KeyboardInterrupt):
        train(build(recipe, digits, _manager()), recipe, digits, checkpoint=path, pm=_manager(_Interrupt()))
    kept = read_state(path)
    assert bool(kept.progress.scaler) == is_scaled
    assert {x.dtype for x in kept.part("objective").values() if x.is_floating_point()} == {torch.float32}
    model = build(recipe, digits, _manager())
    result = train(model, recipe, digits, checkpoint=path, pm=_manager())
    assert result.epochs == undisturbed.epochs
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), model.parameters(), strict=True))
    assert 0 < result.epochs[0]["train/task"] < 4


def test_bfloat16_is_that_of_steps_not_of_the_test_and_recomputed_norms(digits: data.Data) -> None:
    stages = (Stage(regularizers={"kernel": 1e-4, "feature": 1e-3}, recompute_norms=True),)
    recipe = dataclasses.replace(RECIPE, precision="bfloat16", stages=stages)
    model = build(recipe, digits, _manager())
    seen: list[tuple[bool, torch.dtype]] = []
    layer = model.get_submodule("layer2.0.conv2")
    layer.register_forward_hook(lambda layer, inputs, output: seen.append((torch.is_grad_enabled(), output.dtype)))
    result = train(model, recipe, digits, pm=_manager())
    assert set(seen) == {(True, torch.bfloat16), (False, torch.float32)}
    assert all(math.isfinite(value) for value in result.epochs[0].values())
    assert {x.dtype for x in model.state_dict().values() if x.is_floating_point()} == {torch.float32}


class _Interrupt:
    @hookimpl
    def bonn_qat_after_epoch(self, epoch: int) -> None:
        raise KeyboardInterrupt


class _NoWaiting(TorchDispatchMode):
    """Refuses every operation whose result the host must wait for."""

    _WAITS = re.compile(r"_local_scalar_dense|nonzero|masked_select|is_nonzero|equal\.default|unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not self._WAITS.search(str(func)), f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def test_a_step_never_waits_for_the_device(digits: data.Data, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a CPU targets and what was noted are looked at, for looking costs nothing there.
    for module in (objective, regularizers):
        monkeypatch.setattr(module, "may_look", lambda tensor: False)
    for scheme in ("bonn", "xnor", "pcnn", "bireal"):
        recipe = dataclasses.replace(RECIPE, scheme=scheme)
        model = build(recipe, digits)
        trainer = Trainer(model, recipe, digits, torch.device("cpu"), task=nn.CrossEntropyLoss())
        trainer.set_stage(0)
        images, targets = next(digits.train_batches(8, torch.Generator().manual_seed(0), augment=True))
        with _NoWaiting():
            trainer.step(images, targets)
    with pytest.raises(AssertionError, match="waits for the device"), _NoWaiting():
        _ = float(images.sum())


def test_options_of_regularizers_reach_them(digits: data.Data) -> None:
    recipe = dataclasses.replace(RECIPE, regularizer_options={"kernel": {"nu": 0.5}, "feature": {"alpha": 0.25}})
    trainer = Trainer(build(recipe, digits), recipe, digits, torch.device("cpu"), task=nn.CrossEntropyLoss())
    terms: Any = trainer.objective.regularizers
    assert (terms["kernel"].nu, terms["feature"].alpha) == (0.5, 0.25)
    recipe = dataclasses.replace(RECIPE, regularizer_options={"kernel": {"mu": 0.5}})
    with pytest.raises(InvalidRecipe, match=r"the options of the regularizer 'kernel' do not fit: .*'mu'"):
        Trainer(build(recipe, digits), recipe, digits, torch.device("cpu"), task=nn.CrossEntropyLoss())


def test_options_of_a_scheme_weigh_the_regularizers_of_a_recipes_own_stages(digits: data.Data) -> None:
    recipe = dataclasses.replace(RECIPE, scheme_options={"feature": 0})
    model = build(recipe, digits)
    trainer = Trainer(model, recipe, digits, torch.device("cpu"), task=nn.CrossEntropyLoss())
    assert [dict(stage.regularizers) for stage in trainer.stages] == [{"kernel": 1e-4, "feature": 0}]
    assert "train/feature" not in train(model, recipe, digits, pm=_manager()).epochs[0]


def test_top5_counts_the_first_five(digits: data.Data) -> None:
    model: Any = build(RECIPE, digits)
    trainer = Trainer(model, RECIPE, digits, torch.device("cpu"), task=nn.CrossEntropyLoss())
    metrics = trainer._test()
    with torch.no_grad():
        parts: list[tuple[Tensor, Tensor]] = [(model(images), targets) for images, targets in digits.test_batches()]
    logits, targets = (torch.cat(list(part)) for part in zip(*parts, strict=True))
    ranks = (logits > logits.gather(1, targets[:, None])).sum(1)
    assert metrics["test/top1"] == pytest.approx(100 * float((ranks == 0).float().mean()))
    assert metrics["test/top5"] == pytest.approx(100 * float((ranks < 5).float().mean()))


# --------------------------------------------------------------------------------------------------- NaN and infinity


class _Spoilt(data.Data):
    """The data with ``value`` in one pixel of one batch of the training or test set."""

    def __init__(self, of: data.Data, part: str, value: float, batch: int, draw: random.Random) -> None:
        self._of, self._part, self._value, self._batch, self._draw = of, part, value, batch, draw
        self.name, self.classes, self.image = of.name, of.classes, of.image
        self.train_size, self.test_size = of.train_size, of.test_size

    def _batches(self, part: str, batches: Iterator[data.Batch]) -> Iterator[data.Batch]:
        for number, (images, targets) in enumerate(batches, 1):
            if part == self._part and number == self._batch:
                images.view(-1)[self._draw.randrange(images.numel())] = self._value
            yield images, targets

    def train_batches(self, *args: Any, **options: Any) -> Iterator[data.Batch]:
        return self._batches("train", self._of.train_batches(*args, **options))

    def test_batches(self, *args: Any, **options: Any) -> Iterator[data.Batch]:
        return self._batches("test", self._of.test_batches(20))

    def measure_batches(self, *args: Any, **options: Any) -> Iterator[data.Batch]:
        return self._of.measure_batches(*args, **options)


def _small(scheme: str = "bonn") -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
    )  # fmt: skip
    return binarize(net, scheme, input_size=(1, 8, 8))


@pytest.mark.parametrize("seed", range(16))
def test_nothing_that_is_not_finite_goes_unsaid_or_into_a_file(
    digits: data.Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    draw = random.Random(seed)
    where = ["train", "test", "parameter", "buffer"][seed % 4]
    value, step = draw.choice([math.nan, math.inf, -math.inf]), draw.randrange(1, 4)
    model = _small(draw.choice(["bonn", "xnor"]))
    tensors = dict(model.named_parameters() if where == "parameter" else model.named_buffers())
    name = draw.choice([name for name, tensor in tensors.items() if tensor.is_floating_point()])
    run_step = Trainer.step

    def spoilt(self: Trainer, images: Tensor, targets: Tensor) -> Any:
        losses = run_step(self, images, targets)
        if where in ("parameter", "buffer") and self.done == step - 1:
            tensors[name].detach().view(-1)[draw.randrange(tensors[name].numel())] = value
        return losses

    monkeypatch.setattr(Trainer, "step", spoilt)
    path, recipe = tmp_path / "run.safetensors", Recipe(epochs=2, batch_size=32, data="digits")
    with pytest.raises((TrainingDiverged, InvalidData)) as told:
        train(model, recipe, _Spoilt(digits, where, value, step, draw), checkpoint=path, checkpoint_seconds=0.0)
    expected = {
        "train": rf"epoch 1: the images and the input of 3 held NaN or infinity in step {step};",
        "test": r"epoch 1: image \d+ of the test set, counted from 0, holds NaN or infinity",
        "parameter": r"(the parameter|the buffer) .* holds NaN or infinity",
        "buffer": r"(the parameter|the buffer) .* holds NaN or infinity",
    }[where]
    assert re.search(expected, str(told.value)), (name, told.value)
    kept = read_state(path)
    assert len(kept.tensors) > 20
    assert all(tensor.isfinite().all() for tensor in kept.tensors.values() if tensor.is_floating_point())


def test_a_network_that_is_not_finite_is_neither_trained_nor_saved(digits: data.Data, tmp_path: Path) -> None:
    model = build(RECIPE, digits)
    model.get_parameter("layer1.0.conv1.weight").detach()[3, 2, 1, 0] = math.nan
    with pytest.raises(InvalidModel, match=r"the parameter layer1\.0\.conv1\.weight .* before the first step"):
        train(model, RECIPE, digits)
    with pytest.raises(InvalidModel, match=r"the parameter layer1\.0\.conv1\.weight of WideResNet holds NaN"):
        save(model, tmp_path / "net.safetensors")
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------------------------- batches of one image


@pytest.mark.parametrize("scheme", ["float", "bonn", "xnor", "bnn", "tbn", "pcnn", "adabin"])
def test_batches_of_one_image_train(scheme: str) -> None:
    images, labels = torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8), torch.arange(5)
    own = data.TensorData("own", (images, labels), (images, labels), classes=10, pad=1, flip=False)
    steps: list[None] = []
    result = train(_small(scheme), Recipe(epochs=1, batch_size=1, data="own"), own, tick=lambda: steps.append(None))
    assert len(steps) == 5
    assert math.isfinite(result.epochs[0]["train/task"])


def test_a_norm_that_sees_one_value_per_channel_is_told() -> None:
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(8), nn.Flatten(),
        nn.Linear(8, 10),
    )  # fmt: skip
    images, labels = torch.randint(256, (5, 1, 8, 8), dtype=torch.uint8), torch.arange(5)
    own = data.TensorData("own", (images, labels), (images, labels), classes=10, pad=1, flip=False)
    model = binarize(net, input_size=(1, 8, 8))
    with pytest.raises(InvalidRecipe, match=r"batch_size is 1, which leaves a norm .* one value per channel"):
        train(model, Recipe(epochs=1, batch_size=1, data="own"), own)
    train(model, Recipe(epochs=1, batch_size=2, data="own"), own)  # the last image of five is left out
