"""The task for timm: what train.py reads, optimizes, averages, clips, saves and restores."""

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import bonn_qat
from bonn_qat.errors import InvalidData, UnknownName

timm = pytest.importorskip("timm")
pytest.importorskip("timm.task")

from timm.optim import create_optimizer_v2  # noqa: E402
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint  # noqa: E402
from timm.utils import CheckpointSaver, unwrap_model  # noqa: E402

from bonn_qat.adapters.timm import BonnTask  # noqa: E402

Batch = tuple[Tensor, Tensor]


@pytest.fixture
def model() -> nn.Module:
    return bonn_qat.binarize(timm.create_model("test_resnet", num_classes=5))


@pytest.fixture
def batch() -> Batch:
    return torch.randn(6, 3, 32, 32), torch.randint(5, (6,))


def train(task: BonnTask, batch: Batch) -> None:
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.1, weight_decay=1e-2)
    task(*batch)["loss"].backward()
    optimizer.step()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_a_step_is_that_of_the_objective_under_the_names_of_timm(model: nn.Module, batch: Batch) -> None:
    model.eval()
    expected = bonn_qat.Objective(model)(*batch)
    result = BonnTask(model)(*batch)
    assert torch.equal(result["loss"], expected.total)
    assert torch.equal(result["output"], expected.logits)
    assert {key: result[key].item() for key in result.keys() - {"loss", "output"}} == {
        f"{name}_loss": term.item() for name, term in expected.terms.items()
    }
    assert result["feature_loss"] > 0 < result["kernel_loss"]


def test_criterion_and_regularizers_are_the_caller_s(model: nn.Module, batch: Batch) -> None:
    task = BonnTask(model, nn.CrossEntropyLoss(label_smoothing=0.5), {"kernel": 1.0})
    result = task(*batch)
    torch.testing.assert_close(
        result["task_loss"], nn.functional.cross_entropy(result["output"], batch[1], label_smoothing=0.5)
    )
    assert result.keys() == {"loss", "output", "task_loss", "kernel_loss"}
    task.objective.set_weights({})
    assert "kernel_loss" not in task(*batch)


def test_a_float_model_trains_with_the_criterion_alone(batch: Batch) -> None:
    result = BonnTask(timm.create_model("test_resnet", num_classes=5))(*batch)
    assert torch.equal(result["loss"], result["task_loss"])


def test_bad_input_is_told(model: nn.Module, batch: Batch) -> None:
    with pytest.raises(UnknownName, match="regularizer 'kernl'; did you mean 'kernel'"):
        BonnTask(model, regularizers={"kernl": 1.0})
    with pytest.raises(InvalidData, match="labels run from 7 to 7, the model has 5 classes"):
        BonnTask(model)(batch[0], torch.full((6,), 7))


def test_timm_s_optimizer_factory_gets_every_parameter_and_decays_what_decays(model: nn.Module, batch: Batch) -> None:
    task = BonnTask(model)
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.1, weight_decay=1e-2)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay.keys() == {id(p) for p in [*model.parameters(), *task.objective.regularizers.parameters()]}
    ours = bonn_qat.parameter_groups(task.objective, lr=0.1, weight_decay=1e-2)
    decays_by_rule = {id(p) for group in ours if group["weight_decay"] for p in group["params"]}
    assert {key for key, value in decay.items() if value} == decays_by_rule


def test_the_model_is_what_is_evaluated(model: nn.Module) -> None:
    task = BonnTask(model)
    assert task.get_eval_model() is model
    assert task.get_eval_model(task.get_trainable_module()) is model
    assert task.get_eval_model(model) is model
    assert task.get_eval_model(ema=True) is None


def test_clipping_sees_all_but_the_head(model: nn.Module) -> None:
    task = BonnTask(model)
    everything = {id(p) for p in task.objective.parameters()}
    assert {id(p) for p in task.get_clip_parameters()} == everything
    head = {id(p) for p in model.get_classifier().parameters()}
    assert {id(p) for p in task.get_clip_parameters(exclude_head=True)} == everything - head


def test_the_average_is_the_model_s(model: nn.Module, batch: Batch) -> None:
    task = BonnTask(model)
    task.update_ema()  # no average yet, nothing to do
    task.setup_ema(decay=0.0)
    average = task.get_eval_model(ema=True)
    before = {key: value.clone() for key, value in unwrap_model(average).state_dict().items()}
    train(task, batch)
    assert same(unwrap_model(average).state_dict(), before)
    task.update_ema()
    assert same(unwrap_model(average).state_dict(), model.state_dict())
    assert not same(before, model.state_dict())


def test_a_checkpoint_of_timm_restores_model_regularizers_and_average(
    model: nn.Module, batch: Batch, tmp_path: Path
) -> None:
    task = BonnTask(model)
    task.setup_ema(decay=0.5)
    train(task, batch)
    task.update_ema()
    optimizer = create_optimizer_v2(task.get_trainable_module(), opt="sgd", lr=0.1)
    path = tmp_path / "task.pth.tar"
    CheckpointSaver(task.get_trainable_module(), optimizer, checkpoint_dir=tmp_path, task=task)._save(path, epoch=2)
    assert torch.load(path)["state_dict"].keys() == model.state_dict().keys()

    other = BonnTask(bonn_qat.binarize(timm.create_model("test_resnet", num_classes=5)))
    other.setup_ema(decay=0.5)
    assert resume_task_checkpoint(other, path, log_info=False) == 3
    load_task_ema_checkpoint(other, path)
    assert same(other.objective.state_dict(), task.objective.state_dict())
    assert same(other.get_trainable_module(ema=True).state_dict(), task.get_trainable_module(ema=True).state_dict())


def test_a_checkpoint_without_regularizers_leaves_them(model: nn.Module) -> None:
    task = BonnTask(model)
    before = {key: value.clone() for key, value in task.objective.regularizers.state_dict().items()}
    task.load_checkpoint_state(model.state_dict())
    assert same(task.objective.regularizers.state_dict(), before)


def test_compiling_changes_neither_keys_nor_results(batch: Batch) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(1), nn.LazyLinear(5))
    net(batch[0])
    task = BonnTask(bonn_qat.binarize(net).eval())
    expected, keys = task(*batch)["loss"], set(task.objective.state_dict())
    torch._dynamo.reset()
    assert task.compile(backend="eager", fullgraph=True) is task.get_eval_model()
    task.objective.regularizers["feature"].centres.zero_()
    torch.testing.assert_close(task(*batch)["loss"], expected)
    assert set(task.objective.state_dict()) == keys


TWO_PROCESSES = """
import sys, timm, torch, torch.distributed as dist
import bonn_qat
from bonn_qat.adapters.timm import BonnTask

rank, store = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=int(rank), world_size=2)
torch.manual_seed(0)
task = BonnTask(bonn_qat.binarize(timm.create_model("test_resnet", num_classes=5)), verbose=False)
keys = set(task.get_checkpoint_state()["state_dict"])
optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.1)
task.prepare_distributed()
torch.manual_seed(1 + dist.get_rank())
for _ in range(2):
    with task.no_sync():
        task(torch.randn(6, 3, 32, 32), torch.randint(5, (6,)))["loss"].backward()
    task(torch.randn(6, 3, 32, 32), torch.randint(5, (6,)))["loss"].backward()
    optimizer.step()
    optimizer.zero_grad()
assert set(task.get_checkpoint_state()["state_dict"]) == keys
mine = torch.cat([p.detach().flatten() for p in task.objective.parameters()])
both = [torch.empty_like(mine) for _ in range(2)]
dist.all_gather(both, mine)
assert torch.equal(both[0], both[1])
dist.destroy_process_group()
"""


def test_two_processes_hold_equal_parameters(tmp_path: Path, run_scripts) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    environment = {**os.environ, "GLOO_SOCKET_IFNAME": "lo"}
    commands = [[str(script), str(rank), str(tmp_path / "store")] for rank in range(2)]
    for done in run_scripts(*commands, cwd=tmp_path, env=environment):
        assert done.returncode == 0, done.stderr[-3000:]


def test_a_timm_without_tasks_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm.task", None)
    monkeypatch.delitem(sys.modules, "bonn_qat.adapters.timm")
    with pytest.raises(ImportError, match=r"timm .* has no training tasks.*pip install 'timm>=1\.0\.23'"):
        importlib.import_module("bonn_qat.adapters.timm")
