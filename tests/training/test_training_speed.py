"""The two scripts that time a training step: their arithmetic, and that a profile leaves nothing out."""

import json
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest
import timm
import torch
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.decomposition import select_decomp_table

import bonn_qat
from bonn_qat.models.wide_resnet import BasicBlock  # and wrn10_16 for timm

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def script(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return __import__(name)


training_step, profile_step = script("training_step"), script("profile_step")


@pytest.fixture
def options() -> Namespace:
    return Namespace(
        model="wrn10_16", scheme="bonn", size=8, classes=10, channels_last=True, precision="float32", device="cpu",
        warmup=1, profiled=2, rounds=1, repeat=1, clock="wall",
    )  # fmt: skip


def test_a_summary_is_the_arithmetic_of_its_times():
    times = {"float": [0.2, 0.1, 0.1], "float, compiled": [0.1, 0.1, 0.2], "binary": [0.3, 0.2, 0.1]}
    row = training_step.summarize(times, 50, dict.fromkeys(times, 4e11), 8.0)["binary"]
    assert row["median_ms"] == pytest.approx(200)
    assert row["images_per_second"] == pytest.approx(250)
    assert row["epoch_seconds"] == pytest.approx(50_000 / 250)
    assert (row["tflops"], row["share_of_peak"]) == pytest.approx((2.0, 0.25))
    assert row["to"]["float"] == pytest.approx({"median": 1.5, "min": 1.0, "max": 2.0})
    assert row["to"]["float, compiled"] == pytest.approx({"median": 2.0, "min": 0.5, "max": 3.0})


@pytest.mark.parametrize("arm", [arm for arm in training_step.ARMS if not arm.startswith("brevitas")])
def test_a_step_trains_and_its_flops_are_six_for_each_mac(arm, options, monkeypatch):
    made = []

    def keep(*args, **kwargs):
        made.append(bonn_qat.objective.Objective(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr(bonn_qat, "Objective", keep)
    step, flops = training_step.make_step(arm, options, 4, None)
    before = {name: p.detach().clone() for name, p in made[0].model.named_parameters()}
    step()
    assert {name for name, p in made[0].model.named_parameters() if torch.equal(p, before[name])} == set()
    assert {name for name, p in made[0].named_parameters() if p.grad is None} == set()
    assert set(made[0].regularizers) == set(training_step.REGULARIZERS.get(arm, {}))
    assert flops == 6 * 4 * bonn_qat.summary(timm.create_model("wrn10_16", num_classes=10), (3, 8, 8)).macs


@pytest.mark.parametrize("net", profile_step.NETS)
def test_the_parts_of_a_profile_are_the_whole_step(net, options):
    parts, whole = profile_step.profiled_parts(profile_step._Training(net, 4, options, ranges=True), options)
    assert sum(map(sum, parts.values())) == pytest.approx(whole, rel=0.02)
    binary = {
        profile_step.BINARY_CONVOLUTION,
        profile_step.QUANTIZERS,
        profile_step.KERNEL_LOSS,
        profile_step.FEATURE_LOSS,
    }
    assert set(parts) == set(profile_step.PARTS) - {profile_step.WAITING} - (binary if net == "float" else set())
    once = {profile_step.DATA, profile_step.OPTIMIZER}
    assert {part for part, (forward, backward) in parts.items() if not backward} == once
    assert all(forward > 0 for forward, _ in parts.values())


def test_a_compiled_step_keeps_no_mask():
    # Where a compiler keeps the mask of a sign as booleans, a CPU takes ten times as long to write it as the sign.
    kept: list[torch.dtype] = []

    def keep(graph: torch.fx.GraphModule, inputs: object) -> object:
        (output,) = (node for node in graph.graph.nodes if node.op == "output")
        values = (getattr(node, "meta", {}).get("val") for node in output.args[0])
        kept.extend(value.dtype for value in values if isinstance(value, torch.Tensor))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=keep, bw_compiler=lambda graph, inputs: make_boxed_func(graph.forward),
        decompositions=select_decomp_table, partition_fn=min_cut_rematerialization_partition,
    )  # fmt: skip
    blocks = BasicBlock(4, 4, 1, 0.0), BasicBlock(4, 8, 2, 0.0)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2)
    net = bonn_qat.binarize(nn.Sequential(nn.Conv2d(3, 4, 3), *blocks, *head), input_size=(3, 8, 8))
    torch.compile(net, backend=backend)(torch.randn(2, 3, 8, 8)).sum().backward()
    assert torch.float32 in kept
    assert torch.bool not in kept


def test_the_page_is_that_of_the_recorded_profile():
    text = profile_step.PAGE.read_text(encoding="utf-8")
    document = json.loads((RESULTS / "2026-11-25-training-step-profile.json").read_text())
    assert text == profile_step.page(text, document), "run: python benchmarks/profile_step.py --input FILE --page"
    assert len(document["results"]) == 2
    for result in document["results"]:
        assert sum(part["share"] for part in result["parts"].values()) == pytest.approx(1)
