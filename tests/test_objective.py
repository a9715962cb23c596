import copy
import dataclasses
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bonn_qat
from bonn_qat import Regularizer, Step, functional, hookimpl, plugins
from bonn_qat.bonn import BONN
from bonn_qat.errors import InvalidData, InvalidModel, UnknownName
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


def test_targets_out_of_range_are_told(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(InvalidData, match="labels run from 0 to 4, the model has 4 classes"):
        Objective(model)(batch[0], torch.tensor([0, 1, 2, 3, 4, 0]))


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
