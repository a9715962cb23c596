import copy
import dataclasses
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import bonn_qat
from bonn_qat import Regularizer, Step, functional, hookimpl, plugins
from bonn_qat.bonn import BONN
from bonn_qat.errors import BonnQatError, InvalidData, InvalidModel, TrainingDiverged, UnknownName
from bonn_qat.objective import Objective, parameter_groups
from bonn_qat.quantizers import WeightQuantizer


@pytest.fixture
def model() -> nn.Module:
    return bonn_qat.binarize(
        nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(8, 4),
        )
    )  # fmt: skip


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 3, 8, 8), torch.tensor([0, 1, 2, 3, 0, 1])


def test_the_total_is_the_sum_of_the_terms(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    losses = Objective(model)(*batch)
    assert set(losses.terms) == {"task", "kernel", "feature"}
    torch.testing.assert_close(losses.total, sum(losses.terms.values()))
    torch.testing.assert_close(losses.terms["task"], nn.functional.cross_entropy(losses.logits, batch[1]))


def test_it_equals_the_terms_used_one_by_one(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    images, targets = batch
    model.eval()  # so that both forward passes see the same batch norms
    whole = Objective(model)(images, targets).total
    kernel, feature = bonn_qat.KernelLoss(model), bonn_qat.FeatureLoss(model)
    task = nn.functional.cross_entropy(model(images), targets)
    torch.testing.assert_close(whole, task + kernel() + feature(targets))


def test_every_parameter_learns(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    objective = Objective(model)
    objective(*batch).total.backward()
    still = [name for name, p in objective.named_parameters() if p.grad is None or not p.grad.any()]
    # Behind the first convolution stands a batch norm, which takes its bias away again.
    assert set(still) <= {"model.0.bias"}


def test_a_weight_of_zero_switches_a_term_and_its_parameters_off(
    model: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    objective = Objective(model)
    objective.set_weights({"kernel": 1e-3})
    losses = objective(*batch)
    assert set(losses.terms) == {"task", "kernel"}
    losses.total.backward()
    feature = objective.regularizers["feature"]
    assert all(not p.requires_grad and p.grad is None for p in feature.parameters())
    objective.set_weights({"feature": 1e-3})
    assert set(objective(*batch).terms) == {"task", "feature"}


def test_regularizers_can_be_chosen_and_a_float_model_has_none(batch: tuple[Tensor, Tensor], model: nn.Module) -> None:
    assert set(Objective(model, regularizers={"center": 0.1})(*batch).terms) == {"task", "center"}
    plain = nn.Sequential(nn.Flatten(), nn.Linear(192, 4))
    assert set(Objective(plain)(*batch).terms) == {"task"}
    with pytest.raises(UnknownName, match="unknown regularizer 'kernal'; did you mean 'kernel'"):
        Objective(model, regularizers={"kernal": 1.0})


def test_a_model_around_a_binarized_part_has_the_losses_of_its_scheme(batch: tuple[Tensor, Tensor]) -> None:
    def part(scheme: str) -> nn.Module:
        layers = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        return bonn_qat.binarize(nn.Sequential(*layers), scheme, input_size=(3, 8, 8), include=["1"])

    whole = nn.Sequential(part("bonn"), nn.Linear(8, 4))
    assert set(Objective(whole)(*batch).terms) == {"task", "kernel", "feature"}
    with pytest.raises(InvalidModel, match=r"binarized with bonn and float, which have other losses; name them"):
        Objective(nn.ModuleList([part("bonn"), part("float")]))


def test_a_head_that_is_changed_later_is_found_or_its_loss_says_so(batch: tuple[Tensor, Tensor]) -> None:
    layers = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    model = bonn_qat.binarize(nn.Sequential(*layers), input_size=(3, 8, 8))
    objective = Objective(model)
    model[4] = nn.Sequential(nn.Dropout(0.1), nn.Linear(8, 4))  # type: ignore[index]
    with pytest.raises(InvalidModel, match="make the loss after the last change of the head"):
        objective(*batch)
    assert set(Objective(model)(*batch).terms) == {"task", "kernel", "feature"}


# ---------------------------------------------------------------------------------------------- a task of one's own


def _float_net(outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(8, outputs),
    )  # fmt: skip


class _Shaped(nn.Module):
    """A network whose output has another shape: a tuple, a table, a bare vector."""

    def __init__(self, outputs: int, shape: str) -> None:
        super().__init__()
        self.net, self.shape = _float_net(outputs), shape

    def forward(self, x: Tensor) -> Any:
        y = self.net(x)
        return {"tensor": y, "tuple": (y, 2 * y), "dict": {"logits": y}, "vector": y[:, 0]}[self.shape]


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output["logits"] if isinstance(output, dict) else output[0]


TASKS: dict[str, tuple[Callable[[Any, Any], Tensor], Callable[[int, int], Any]]] = {
    "ignored labels": (
        lambda y, t: F.cross_entropy(_first(y), t, ignore_index=-1),
        lambda b, c: torch.where(torch.arange(b) % 3 == 1, -1, torch.randint(c, (b,))),
    ),
    "soft": (lambda y, t: F.cross_entropy(_first(y), t), lambda b, c: torch.rand(b, c).softmax(1)),
    "several labels": (
        lambda y, t: F.binary_cross_entropy_with_logits(_first(y), t), lambda b, c: (torch.rand(b, c) > 0.5).float(),
    ),
    "yes or no": (
        lambda y, t: F.binary_cross_entropy_with_logits(_first(y).reshape(len(t), -1)[:, 0], t.float()),
        lambda b, c: torch.randint(2, (b,)).bool(),
    ),
    "regression": (lambda y, t: F.mse_loss(_first(y).reshape(len(t), -1), t), lambda b, c: torch.randn(b, c)),
    "large labels": (lambda y, t: (_first(y).sum() - t.double().mean()).square(), lambda b, c: torch.full((b,), 999)),
    "a table": (lambda y, t: F.cross_entropy(_first(y), t["class"]), lambda b, c: {"class": torch.arange(b) * 0}),
    "none": (lambda y, t: _first(y).square().mean(), lambda b, c: None),
}  # fmt: skip


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(list(TASKS)), shape=st.sampled_from(["tensor", "tuple", "dict"]), batch=st.integers(2, 5),
    classes=st.integers(1, 5), seed=st.integers(0, 99),
)  # fmt: skip
def test_the_loss_of_any_task_is_the_tasks(name: str, shape: str, batch: int, classes: int, seed: int) -> None:
    torch.manual_seed(seed)
    task, make = TASKS[name]
    model = bonn_qat.binarize(_Shaped(classes, shape), input_size=(3, 8, 8)).eval()
    images, targets = torch.randn(batch, 3, 8, 8), make(batch, classes)
    losses = Objective(model, task, regularizers={"kernel": 1e-4})(images, targets)
    assert torch.equal(losses.terms["task"], task(model(images), targets))
    assert type(losses.logits) is type(model(images))
    losses.total.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(("returned", "words"), [(torch.ones(3), r"float32 \(3,\)"), (1.5, "an object of type float")])
def test_a_task_that_returns_no_scalar_is_told(model: nn.Module, batch: tuple[Tensor, Tensor], returned, words) -> None:
    with pytest.raises(InvalidModel, match=f"the task returned {words}; it must return a scalar tensor"):
        Objective(model, lambda *_: returned)(*batch)


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool]


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from([*INTEGERS, torch.float32, torch.float16, torch.complex64]),
    shape=st.sampled_from([(6,), (5,), (7,), (6, 1), (6, 4), (1, 6), (), (6, 2, 2)]),
    highest=st.integers(0, 6), negative=st.booleans(), term=st.sampled_from(["task", "feature", "center"]),
)  # fmt: skip
def test_class_indices_of_any_integer_type_are_taken_and_all_else_is_told(
    dtype: torch.dtype, shape: tuple[int, ...], highest: int, negative: bool, term: str
) -> None:
    model = bonn_qat.binarize(_float_net(4)).eval()
    images, numbers = torch.randn(6, 3, 8, 8), torch.randint(highest + 1, shape)
    if numbers.numel():
        numbers.view(-1)[0] = highest
    if negative and dtype in (torch.int8, torch.int64) and numbers.numel() > 1:
        numbers.view(-1)[-1] = -100
    targets = numbers.to(dtype)
    task = None if term == "task" else lambda y, t: y.square().mean()
    objective = Objective(model, task, regularizers={} if term == "task" else {term: 1.0}).eval()
    fits = shape == (6,) and dtype in INTEGERS and int(targets.max()) < 4
    soft = term == "task" and shape == (6, 4) and dtype in (torch.float32, torch.float16)
    targets = targets.softmax(1) if soft else targets
    if not fits and not soft:
        with pytest.raises(InvalidData, match=r"needs class indices \(6,\)|labels run from \d") as told:
            objective(images, targets)
        assert "\n" not in str(told.value)
        return
    found = objective(images, targets).terms[term]
    with torch.no_grad():
        logits, features = model(images), model[:-1](images)
        labels, centres = targets if soft else targets.long(), torch.zeros(4, 8)
        known = labels >= 0  # -100 belongs to no class
        expected = {
            "task": lambda: F.cross_entropy(logits, labels.to(logits.dtype) if soft else labels),
            "feature": lambda: functional.feature_loss(features[known], labels[known], centres, torch.ones(4, 8)),
            "center": lambda: features[known].square().sum(1).mean() / 2,
        }[term]()
    torch.testing.assert_close(found, expected)


PROBABILITIES = ["softmax", "mixed", "smooth", "one hot"]
OTHERS = ["a long row", "a negative", "nan", "several labels", "regression"]


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]), classes=st.integers(2, 300),
    shape=st.sampled_from([(3,), (1,), (2, 4, 5), (0,)]), seed=st.integers(0, 99),
    kind=st.sampled_from(PROBABILITIES + OTHERS),
)  # fmt: skip
def test_targets_like_the_logits_are_probabilities_or_refused(dtype, classes, shape, seed, kind) -> None:
    torch.manual_seed(seed)
    whole = (shape[0], classes, *shape[1:])
    soft, spot = torch.randn(whole).softmax(1), torch.zeros(whole)
    one_hot = spot.scatter(1, torch.randint(classes, (shape[0], 1, *shape[1:])), 1.0)
    spot[-1:, 0] = 1.0
    targets = {
        "softmax": soft, "mixed": 0.3 * soft + 0.7 * one_hot, "smooth": 0.9 * one_hot + 0.1 / classes,
        "one hot": one_hot, "a long row": soft + 0.1 * spot, "a negative": soft + 2 * spot - 2 * spot.roll(1, 1),
        "nan": soft + spot.log() * 0, "several labels": one_hot + one_hot.roll(1, 1), "regression": torch.randn(whole),
    }[kind].to(dtype)  # fmt: skip
    logits, task = torch.randn(whole, dtype=dtype), bonn_qat.objective.CrossEntropy()
    if kind in PROBABILITIES or not shape[0]:
        torch.testing.assert_close(task(logits, targets), F.cross_entropy(logits, targets), equal_nan=True)
        return
    with pytest.raises(InvalidData, match=r"takes targets like the logits as probabilities, .* give a task") as told:
        task(logits, targets)
    assert "\n" not in str(told.value)


def test_the_centres_of_classes_do_not_move_for_images_of_none(model: nn.Module) -> None:
    images, labels = torch.randn(6, 3, 8, 8), torch.tensor([0, -1, 2, -100, 0, -1])
    with_all, known = (
        Objective(copy.deepcopy(model).eval(), lambda y, t: y.sum(), regularizers={"feature": 1.0}) for _ in range(2)
    )
    with_all.regularizers.train()
    known.regularizers.train()
    with_all(images, labels)
    known(images[labels >= 0], labels[labels >= 0])
    one, two = with_all.regularizers["feature"], known.regularizers["feature"]
    torch.testing.assert_close(one.centres, two.centres)
    one.start([(images, labels)])
    two.start([(images[labels >= 0], labels[labels >= 0])])
    torch.testing.assert_close(one.centres, two.centres)
    torch.testing.assert_close(one.sigma, two.sigma)


@pytest.mark.parametrize("shape", ["tuple", "dict", "vector"])
def test_cross_entropy_says_which_outputs_it_takes(shape: str) -> None:
    model = bonn_qat.binarize(_Shaped(3, shape), input_size=(3, 8, 8))
    with pytest.raises(InvalidModel, match=r"cross entropy needs logits .B, classes. of at least 2 classes; the model"):
        Objective(model, regularizers={})(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]))
    one = bonn_qat.binarize(_Shaped(1, "tensor"), input_size=(3, 8, 8))  # its cross entropy is 0 whatever it says
    with pytest.raises(InvalidModel, match=r"the model returned float32 \(2, 1\); give a task"):
        Objective(one, regularizers={})(torch.randn(2, 3, 8, 8), torch.tensor([0, 0]))


# --------------------------------------------------------------------------------------------------- NaN and infinity

WRONG = st.sampled_from([math.nan, math.inf, -math.inf])
NAMES = [
    "0.weight",
    "1.weight",
    "1.running_mean",
    "1.running_var",
    "3.weight",
    "3.norm.bias",
    "3.norm.running_var",
    "6.bias",
]


@settings(max_examples=25, deadline=None)
@given(
    where=st.sampled_from(["pixel", *NAMES, "3.weight_quant.modulation", "regularizers.kernel.mu"]), value=WRONG,
    step=st.integers(1, 4), place=st.integers(0, 10**6), training=st.booleans(), frozen=st.booleans(),
)  # fmt: skip
def test_what_is_not_finite_is_told_with_its_name(
    where: str, value: float, step: int, place: int, training: bool, frozen: bool
) -> None:
    objective = Objective(bonn_qat.binarize(_float_net(4)))
    objective.train(training)
    objective.model.requires_grad_(not frozen)
    optimizer = torch.optim.SGD(objective.parameters(), lr=0.01)
    tensors = {
        name.removeprefix("model."): t for name, t in (*objective.named_parameters(), *objective.named_buffers())
    }
    told = None
    for at in range(1, 6):
        images = torch.randn(6, 3, 8, 8)
        spoilt = images if where == "pixel" else tensors[where].detach()
        if at == step:
            spoilt.view(-1)[place % spoilt.numel()] = value
        try:
            optimizer.zero_grad()
            objective(images, torch.tensor([0, 1, 2, 3, 0, 1])).total.backward()
            optimizer.step()
        except BonnQatError as error:
            told = error
            break
    if told is None:
        with pytest.raises(TrainingDiverged) as raised:
            objective.check_finite()
        told = raised.value
    words = str(told)
    if where == "pixel":
        assert isinstance(told, InvalidData)
        assert f"the images and the input of 3 held NaN or infinity in step {step}" in words
    else:
        assert isinstance(told, TrainingDiverged)
        # The tensor itself, or an earlier one that it has spoilt in the same step.
        first = next(name for name, t in tensors.items() if not t.isfinite().all())
        assert re.search(rf"(parameter|buffer) {re.escape(first)} holds NaN or infinity", words), words
        # A norm of a binary layer that is evaluated hides it from the loss; the gradients spoil the next step.
        assert "step" not in words or f"in step {step};" in words or f"in step {step + 1};" in words
    objective.model.load_state_dict(_float_net(4).state_dict())
    for buffer in objective.regularizers.buffers():
        buffer.zero_()
    with torch.no_grad():
        for parameter in objective.regularizers.parameters():
            parameter.fill_(1.0)
    objective.check_finite()  # what has been told is not told again


class _Masked(nn.Module):
    """A network with a buffer of infinities that it is made with, or makes in its first pass."""

    def __init__(self, net: nn.Module, held: Tensor | None, when: str) -> None:
        super().__init__()
        self.net = net
        if when != "registered later":
            self.register_buffer("mask", held)

    def forward(self, x: Tensor) -> Tensor:
        if "mask" not in self._buffers:
            self.register_buffer("mask", torch.full((2, 2), -math.inf))
        elif self.mask is None or self.mask.ndim < 2:
            self.mask = torch.full((2, 2), -math.inf)
        return self.net(x)


@pytest.mark.parametrize(
    ("held", "when"),
    [
        (torch.full((2, 2), -math.inf), "made with it"),
        (None, "registered later"),
        (None, "set later"),
        (torch.zeros(0), "enlarged"),
    ],
)
def test_a_mask_may_hold_infinity_and_must_not_hold_nan(
    held: Tensor | None, when: str, model: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    masked = _Masked(model, held, when)
    objective = Objective(masked, regularizers={"kernel": 1e-4})
    for _ in range(2):
        objective(*batch)
        objective.check_finite()
    assert masked.mask.isinf().all()
    masked.mask[0, 0] = math.nan
    with pytest.raises(TrainingDiverged, match="the buffer mask holds NaN or infinity"):
        objective.check_finite()
    masked.mask.fill_(-math.inf)
    model[1].running_var[0] = math.inf
    with pytest.raises(TrainingDiverged, match=r"the buffer net.1.running_var holds NaN or infinity"):
        objective.check_finite()


def test_a_weight_of_a_label_that_is_nan_names_the_loss_and_the_weight(
    model: nn.Module, batch: tuple[Tensor, Tensor]
) -> None:
    objective = Objective(model, nn.CrossEntropyLoss(weight=torch.tensor([1.0, math.nan, 1.0, 1.0])))
    with pytest.raises(TrainingDiverged, match=r"the loss term 'task' held .* in step 1; the buffer task.weight holds"):
        objective(*batch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_infinity_under_autocast_is_told_and_large_sums_are_none(
    model: nn.Module, batch: tuple[Tensor, Tensor], dtype: torch.dtype
) -> None:
    objective, (images, targets) = Objective(model), batch
    with torch.autocast("cpu", dtype):
        objective(images + 100, targets)  # sums beyond float16
    with torch.no_grad():
        model[0].weight.mul_(1e5 if dtype == torch.float16 else 1e38)
    with (
        torch.autocast("cpu", dtype),
        pytest.raises(TrainingDiverged, match="the input of 3 held NaN or infinity in step 2"),
    ):
        objective(100 * images, targets)


def test_compiled_code_and_copies_note_the_same(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    objective = copy.deepcopy(Objective(model))
    compiled = torch.compile(objective, backend="eager", fullgraph=True)
    images = batch[0].clone()
    compiled(*batch)
    images[3, 1, 2, 2] = math.nan
    compiled(images, batch[1])
    compiled(*batch)
    with pytest.raises(InvalidData, match="the images and the input of 3 held NaN or infinity in step 2; the buffer"):
        objective.check_finite()


@pytest.mark.parametrize("norm_decay", [False, True])
def test_parameter_groups_have_the_papers_rates_and_decay_norms_where_told(model: nn.Module, norm_decay: bool) -> None:
    objective = Objective(model)
    groups = parameter_groups(objective, lr=0.1, weight_decay=5e-4, norm_decay=norm_decay)
    settings = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    found = {name: settings[id(p)] for name, p in objective.named_parameters()}
    assert len(found) == sum(len(g["params"]) for g in groups)
    slow = pytest.approx(0.01)
    assert found["model.3.weight"] == found["model.6.weight"] == (0.1, 5e-4)
    assert found["model.3.weight_quant.modulation"] == (slow, 5e-4)
    assert found["regularizers.kernel.sigma"] == (slow, 0.0)
    assert found["regularizers.kernel.mu"] == found["regularizers.feature.sigma"] == (0.1, 0.0)
    rest = [name for name, p in objective.named_parameters() if name.startswith("model.") and p.ndim == 1]
    assert {"model.3.norm.weight", "model.3.norm.bias", "model.2.weight"} < set(rest)  # a norm's, a PReLU's
    for name in rest:
        assert found[name] == (0.1, 5e-4 if norm_decay else 0.0), name


def test_parameter_groups_of_parts_hold_each_parameter_once(model: nn.Module) -> None:
    kernel = bonn_qat.KernelLoss(model)
    groups = parameter_groups(model, kernel, model, lr=0.1, weight_decay=0.0)
    parameters = [id(p) for g in groups for p in g["params"]]
    assert len(parameters) == len(set(parameters)) == len([*model.parameters(), *kernel.parameters()])


class _Scheduled(WeightQuantizer):
    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.heard: list[float] = []

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return functional.ste_sign(x), x.new_ones(())

    def advance(self, progress: float) -> None:
        self.heard.append(progress)

    def constrain(self, weight: Tensor) -> None:
        weight.clamp_(-1, 1)


def test_constrain_and_advance_reach_every_quantizer() -> None:
    net = nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(3)), nn.Flatten(), nn.Linear(16, 2))
    model = bonn_qat.binarize(net, dataclasses.replace(BONN, weight=_Scheduled, latent_std=5.0))
    floats = model[0].weight.detach().clone().mul_(9)
    model[0].weight.data.copy_(floats)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer.register_step_post_hook(lambda *_: bonn_qat.constrain_(model))
    model(torch.randn(2, 4, 8, 8)).sum().backward()
    optimizer.step()
    assert model[1].weight.abs().max() == model[2].weight.abs().max() == 1
    assert torch.equal(model[0].weight, floats)  # not binary
    bonn_qat.advance(model, 0.25)
    assert model[1].weight_quant.heard == model[2].weight_quant.heard == [0.25]
    for wrong in (-0.1, 1.1):
        with pytest.raises(ValueError, match=f"0 to 1; got {wrong}"):
            bonn_qat.advance(model, wrong)


def test_constrain_reaches_brevitas_layers() -> None:
    qnn = pytest.importorskip("brevitas.nn")
    from bonn_qat.adapters.brevitas import weight_quantizer

    layer = qnn.QuantConv2d(2, 2, 3, weight_quant=weight_quantizer(dataclasses.replace(BONN, weight=_Scheduled)))
    layer.weight.data.fill_(3.0)
    bonn_qat.constrain_(layer)
    assert layer.weight.unique().tolist() == [1.0]


class _Size(Regularizer):
    name = "size"

    def loss(self, step: Step) -> Tensor:
        return next(self.model.parameters()).square().sum()


class _Offers:
    @hookimpl
    def bonn_qat_regularizers(self):
        return [_Size]


def test_a_regularizer_has_the_model_which_is_no_part_of_it(model: nn.Module) -> None:
    size = _Size(model, weight=1.0)
    assert size.model is model
    assert not [*size.parameters(), *size.state_dict()]
    assert list(size.modules()) == [size]


def test_the_regularizers_of_a_copy_see_the_copied_model(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    pm = plugins.create_manager(entry_points=False)
    pm.register(_Offers())
    weights = {"size": 1.0, "kernel": 1.0, "feature": 1.0, "center": 1.0}
    objective = Objective(model, regularizers=weights, pm=pm)
    copied = copy.deepcopy(objective)
    for name, regularizer in copied.regularizers.items():
        assert regularizer.model is copied.model is not model, name
    before = {name: value.item() for name, value in objective(*batch).terms.items()}
    with torch.no_grad():
        for parameter in copied.model.parameters():
            parameter.mul_(3)
    changed, after = copied(*batch).terms, objective.eval()(*batch).terms
    for name in weights:
        assert changed[name].item() != pytest.approx(before[name]), name
    for name in ("size", "kernel"):
        assert after[name].item() == pytest.approx(before[name])
    copied(*batch).total.backward()
    assert all(parameter.grad is None for parameter in model.parameters())
    batches = [(batch[0], batch[1])]
    copied.regularizers["feature"].start(batches)
    assert not torch.equal(copied.regularizers["feature"].centres, objective.regularizers["feature"].centres)


@pytest.mark.parametrize(("wrong", "words"), [(torch.ones(1), r"returned shape \(1,\)"), (0, "returned 0")])
def test_a_loss_that_is_no_scalar_is_told(model: nn.Module, wrong: object, words: str) -> None:
    class Wrong(Regularizer):
        name = "wrong"

        def loss(self, step: Step) -> Tensor:
            return wrong

    with pytest.raises(InvalidModel, match=f"the regularizer 'wrong' {words}; loss.step. must return a scalar tensor"):
        Wrong(model, weight=1.0)()


def test_compiled_whole_without_a_graph_break(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    objective = Objective(model)
    expected = objective(*batch)
    compiled = torch.compile(objective, backend="eager", fullgraph=True)
    objective.regularizers["feature"].centres.zero_()
    losses = compiled(*batch)
    torch.testing.assert_close(losses.total, expected.total)
    losses.total.backward()


TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import bonn_qat

rank, store = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
torch.manual_seed(0)
net = nn.Sequential(
    nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
    nn.Linear(8, 4),
)
objective = bonn_qat.Objective(bonn_qat.binarize(net))
wrapped = DistributedDataParallel(objective)
optimizer = torch.optim.SGD(bonn_qat.parameter_groups(objective, lr=0.1, weight_decay=1e-4))
torch.manual_seed(1 + dist.get_rank())
for _ in range(3):
    optimizer.zero_grad()
    wrapped(torch.randn(6, 3, 8, 8), torch.randint(4, (6,))).total.backward()
    optimizer.step()
mine = torch.cat([*(p.detach().flatten() for p in objective.parameters()),
                  objective.regularizers["feature"].centres.flatten()])
both = [torch.empty_like(mine) for _ in range(2)]
dist.all_gather(both, mine)
assert torch.equal(both[0], both[1])
assert objective.regularizers["feature"].centres.any()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_hold_equal_parameters_and_centres(tmp_path: Path, run_scripts) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    commands = [[str(script), str(rank), str(tmp_path / "store")] for rank in range(2)]
    for done in run_scripts(*commands, cwd=tmp_path, env=environment):
        assert done.returncode == 0, done.stderr[-3000:]


class _ByName(nn.Module):
    """Calls its classifier, and a binary layer, with a named argument."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body, self.fc = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Any:
        return self.fc(input=self.body(input=self.stem(x)).mean((2, 3)))


@pytest.mark.parametrize(
    "wrap", [lambda m: m, nn.DataParallel, lambda m: torch.compile(m, backend="eager"),
             lambda m: torch.optim.swa_utils.AveragedModel(m)],
)  # fmt: skip
def test_a_wrapper_keeps_the_losses_of_its_network_and_arguments_may_have_names(wrap: Callable[..., Any]) -> None:
    model = bonn_qat.binarize(_ByName(), input_size=(3, 8, 8))
    images, targets = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    expected = Objective(copy.deepcopy(model))(images, targets).terms
    found = Objective(wrap(model))(images, targets).terms
    assert found.keys() == expected.keys() == {"task", "kernel", "feature"}
    for name, term in expected.items():
        torch.testing.assert_close(found[name], term)


class _Alike(Regularizer):
    """A loss with a product, which autocast would round."""

    name = "alike"

    def loss(self, step: Step) -> Tensor:
        weight = self.model[3].weight.flatten(1)  # type: ignore[index]
        return (weight @ weight.T).square().mean()


class _Offer:
    @hookimpl
    def bonn_qat_regularizers(self) -> list[type[Regularizer]]:
        return [_Alike]


def _surprise(outputs: Any, targets: Tensor) -> Tensor:
    """A task of two outputs whose logarithm autocast on a CPU would leave in bfloat16."""
    return -sum(F.log_softmax(output, 1).gather(1, targets[:, None]).mean() for output in outputs)


@pytest.mark.parametrize("task", [None, _surprise], ids=["cross entropy", "own"])
def test_losses_under_autocast_are_those_in_float32_of_the_same_outputs(
    model: nn.Module, batch: tuple[Tensor, Tensor], task: Callable[[Any, Any], Tensor] | None
) -> None:
    images, targets = batch
    pm = plugins.create_manager()
    pm.register(_Offer())
    outputs: list[Tensor] = []
    features: list[Tensor] = []
    model[-1].register_forward_hook(lambda layer, inputs, output: outputs.append(output))
    model[-1].register_forward_pre_hook(lambda layer, inputs: features.append(inputs[0]))
    if task is not None:
        model.register_forward_hook(lambda model, inputs, output: (output, 2 * output))
    weights = {"kernel": 1e-4, "feature": 1e-3, "alike": 1.0}
    objective = Objective(model, task, regularizers=weights, pm=pm).eval()
    with torch.autocast("cpu", torch.bfloat16):
        losses = objective(images, targets)
    (output,), (given,) = outputs, features
    assert output.dtype == torch.bfloat16
    assert {term.dtype for term in (losses.total, *losses.terms.values())} == {torch.float32}
    expected = F.cross_entropy(output.float(), targets)
    if task is not None:
        expected = _surprise((output.float(), (2 * output).float()), targets)
    feature: Any = objective.regularizers["feature"]
    assert torch.equal(losses.terms["task"], expected)
    assert torch.equal(
        losses.terms["feature"],
        1e-3 * functional.feature_loss(given.float(), targets, feature.centres, feature.sigma),
    )
    for name in ("kernel", "alike"):
        assert torch.equal(losses.terms[name], objective.regularizers[name](targets)), name
