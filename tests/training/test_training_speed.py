"""The scripts that measure training: their arithmetic, and that profiles and memory leave nothing out."""

import json
import mmap
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
from bonn_qat.binarization.binarize import binary_layers
from bonn_qat.models.wide_resnet import BasicBlock  # and wrn10_16 for timm

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"


def script(name: str) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        return __import__(name)


measuring, profile_step, same_training = script("measuring"), script("profile_step"), script("same_training")
training_memory, training_step = script("training_memory"), script("training_step")
Variant = measuring.Variant


@pytest.fixture
def options() -> Namespace:
    return Namespace(
        model="wrn10_16", size=8, classes=10, channels_last=True, device="cpu", warmup=1, profiled=2, rounds=1,
        repeat=1, clock="wall",
    )  # fmt: skip


def training(arm: str, options: Namespace, precision: str = "float32", mode: str | None = None):
    return measuring.Training(Variant(arm, mode, precision), options.model, (3, 8, 8), options.classes, options)


def test_a_summary_is_the_arithmetic_of_its_times():
    base, compiled = Variant("float", None, "float32"), Variant("float", "default", "float32")
    now, half = Variant("bonn", None, "float32"), Variant("bonn", None, "bfloat16")
    before = now._replace(checkout="before")
    times = {
        base.name: [0.2, 0.1, 0.1], compiled.name: [0.1, 0.1, 0.2], now.name: [0.3, 0.2, 0.1],
        before.name: [0.6, 0.2, 0.2], half.name: [0.1, 0.1, 0.1],
    }  # fmt: skip
    known = {variant: {"tflop": 0.4} for variant in (base, compiled, now, before, half)}
    rows = {row["name"]: row for row in training_step.summarize(known, times, 50)}
    row = rows["bonn"]
    assert (row["median_ms"], row["images_per_second"], row["tflops"]) == pytest.approx((200, 250, 2))
    assert row["ratios"]["to float, eager, of its precision"] == pytest.approx([1.25, 1.5, 1.75])
    assert row["ratios"]["to float, compiled, of its precision"] == pytest.approx([1.25, 2, 2.5])
    assert row["ratios"]["to itself before"] == pytest.approx([0.5, 0.5, 0.75])
    assert rows["bonn, bfloat16"]["ratios"] == {"to itself in float32": pytest.approx([5 / 12, 0.5, 0.75])}
    assert set(rows["bonn, before"]["ratios"]) == set(row["ratios"]) - {"to itself before"}


def test_every_form_of_every_arm_is_a_variant_and_the_float_network_has_no_before():
    options = ["--arms", "xnor", "--compile", "--precision", "float32", "bfloat16", "--against", ".."]
    found = measuring.variants(training_step.arguments(options))
    assert len({variant.name for variant in found}) == len(found) == 4 + 2 * 4
    assert {variant.checkout for variant in found if variant.arm == "float"} == {""}


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(("arm", "losses"), [("float", 0), ("bonn", 2), ("bonn, no losses", 0), ("xnor", 0)])
def test_a_step_trains_everything(arm, losses, precision, options):
    subject = training(arm, options, precision)
    before = {name: p.detach().clone() for name, p in subject.objective.model.named_parameters()}
    loss = subject.step(*subject.batch(4))
    assert loss.isfinite()
    assert {name for name, p in subject.objective.model.named_parameters() if torch.equal(p, before[name])} == set()
    assert {name for name, p in subject.objective.named_parameters() if p.grad is None} == set()
    assert len(subject.objective.regularizers) == losses
    assert subject.macs == bonn_qat.summary(timm.create_model("wrn10_16", num_classes=10), (3, 8, 8)).macs


def test_autocast_multiplies_in_its_precision(options):
    seen = []
    for precision in ("float32", "bfloat16"):
        subject = training("float", options, precision)
        first = next(module for module in subject.objective.modules() if isinstance(module, nn.Conv2d))
        first.register_forward_hook(lambda layer, inputs, output: seen.append(output.dtype))
        subject.step(*subject.batch(2))
    assert seen == [torch.float32, torch.bfloat16]


def test_the_arm_of_brevitas_has_its_layers_and_is_for_convolutions(options):
    theirs = training("brevitas", options).objective.model
    ours = bonn_qat.binarize(timm.create_model("wrn10_16", num_classes=10), input_size=(3, 8, 8))
    assert not list(binary_layers(theirs))
    kinds = [type(module).__name__ for module in theirs.modules()]
    assert kinds.count("QuantConv2d") == len(list(binary_layers(ours))) == 6
    with pytest.raises(ValueError, match="is a BinaryLinear: leave it out"):
        measuring.Training(Variant("brevitas", None, "float32"), "test_vit", (3, 160, 160), 10, options)


def test_an_unknown_arm_is_an_error(options):
    with pytest.raises(bonn_qat.errors.UnknownName, match="no such scheme"):
        training("no such scheme", options)


@pytest.mark.parametrize(("evaluation", "passes"), [(False, 3), (True, 1)])
def test_a_checkout_takes_turns_in_a_process_of_its_own(options, evaluation, passes):
    child = measuring.Child(str(ROOT / "benchmarks" / "training_step.py"), ROOT)
    try:
        assert child.package["torch"] == torch.__version__.partition("+")[0]
        child.call("reset", 1)
        facts = child.call("add", Variant("bonn", None, "float32"), {**vars(options), "evaluation": evaluation}, 2)
        assert facts["tflop"] == passes * 2e-12 * 2 * training("bonn", options).macs
        assert child.call("time", "bonn") > 0
    finally:
        child.close()


@pytest.mark.parametrize(
    ("code", "message"), [('print(\'{"path": "/no/bonn_qat"}\')', "/no/bonn_qat"), ("exit(3)", "3")]
)
def test_a_process_that_uses_another_package_or_ends_is_an_error(code, message, tmp_path):
    (tmp_path / "script.py").write_text(code)
    with pytest.raises(RuntimeError, match=f"the .*package of .*{message}$"):
        measuring.Child(str(tmp_path / "script.py"), tmp_path)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("arm", ["float", "bonn", "xnor"])
def test_what_is_kept_for_backward_is_the_same_by_both_methods(arm, precision, options):
    subject = training(arm, options, precision)
    batch = subject.batch(8)
    subject.step(*batch)
    subject.optimizer.zero_grad()
    by_allocator = training_memory.kept(lambda: subject.loss(*batch), "cpu")
    by_storages = training_memory.kept_storages(lambda: subject.loss(*batch))
    # The profiler attributes a few scalars to no operator.
    assert by_allocator == pytest.approx(by_storages, abs=256)


def test_what_is_kept_counts_all_that_a_function_hides_and_nothing_from_before():
    class Hidden(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.anything = [x.new_ones(1000)]  # not by save_for_backward
            return x.sum()

        @staticmethod
        def backward(ctx, grad):
            return ctx.anything[0] * grad

    x = torch.randn(1000, requires_grad=True)

    def forward():
        with torch.autograd.graph.saved_tensors_hooks(lambda kept: kept.bfloat16(), lambda kept: kept.float()):
            y = x.exp()
        return Hidden.apply(y)

    expected = 1000 * 2 + 1000 * 4 + 4  # y as bfloat16, the hidden ones, and the result; neither x nor y itself
    assert training_memory.kept(forward, "cpu") == expected
    assert training_memory.kept_storages(forward) == expected


def test_the_peak_is_that_since_the_reset():
    size = 64 * 2**20
    torch.ones(2 * size, dtype=torch.uint8)
    before = training_memory.reset_peak("cpu")
    held = torch.frombuffer(mmap.mmap(-1, size), dtype=torch.uint8).fill_(1)  # the allocator may have some to spare
    assert training_memory.largest_so_far("cpu") - before == pytest.approx(len(held), rel=0.1)


@pytest.mark.parametrize("limit", [90, 100, 130, 147, 148, 1000, 5000])
@pytest.mark.parametrize("curve", [0, 0.01])
def test_the_largest_batch_fits_and_the_next_does_not(limit, curve):
    asked = []

    def peak(size: int) -> int:
        asked.append(size)
        return int(92 + 7 * size + curve * size**2)

    found = training_memory.largest_batch(peak, limit)
    assert found == 0 or peak(found) <= limit
    assert peak(found + max(1, found // 100)) > limit
    assert len(asked) < 20


def test_the_memory_table_is_relative_to_the_float_network_of_the_same_form():
    names = [("float", None, "float32"), ("float", None, "bfloat16"), ("bonn", None, "bfloat16")]
    kept = dict(zip(names, [400, 200, 100], strict=True))
    keys = "kept_bytes", "peak_bytes", "uncached_bytes", "tight_bytes"
    rows = [
        {"name": Variant(*name).name, **Variant(*name)._asdict()}
        | {key: times * n * 2**20 for times, key in enumerate(keys, 1)}
        for name, n in kept.items()
    ]
    result = {
        "case": training_memory.Case("net", 8, 2)._asdict(),
        "rows": rows,
        "largest_batch": {"float": {"default": 3, "uncached": 4, "tight": 5}},
    }
    document = {
        "options": {"channels_last": True, "limit": 4.0}, "environment": {"torch": "2", "commit": "c"},
        "machine": {"processor": "p"}, "before": None, "results": [result],
    }  # fmt: skip
    table = training_memory.tables(document)
    assert "| bonn, bfloat16 | 100.0 (0.50) | 200.0 (0.50) | 300.0 (0.50) | 400.0 (0.50) |" in table
    assert "| net, 8x8, default | 3 |" in table
    assert "| net, 8x8, tight | 5 |" in table


def test_a_document_names_no_path_of_the_machine():
    args = same_training.arguments(["--against", "/one/place", "--data-dir", "/another", "--output", "/third.json"])
    assert "/" not in json.dumps(measuring.heading(args)["options"])


def test_losses_that_differ_are_found():
    assert "bit for bit, in all 2 steps" in same_training.differences([1.0, 2.0], [1.0, 2.0])
    words = same_training.differences([1.0, 2.0, 3.0, 4.0], [1.0, 2.5, 2.0, 4.0])
    assert "before step 2" in words
    assert "in 4 steps is 1.0e+00, in step 3" in words


def test_two_trainings_from_the_same_seeds_have_the_same_losses(options):
    chosen = vars(options) | {"data": "digits", "data_dir": None, "batch": 16, "steps": 3, "lr": 0.1, "threads": 1}
    first, second = (same_training.train(Variant("bonn", None, "float32"), chosen) for _ in range(2))
    assert first == second
    assert len(set(first)) == 3


@pytest.mark.parametrize("arguments", [["--against", str(ROOT)], ["--clock", "process", "--threads", "1", "2"]])
def test_options_that_make_no_sense_are_errors(arguments, capsys):
    with pytest.raises(SystemExit):
        training_step.arguments(arguments)
    assert "give another one" in (words := capsys.readouterr().err) or "--clock wall" in words


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
    text = measuring.PAGE.read_text(encoding="utf-8")
    document = json.loads((RESULTS / "2026-12-01-training-step-profile.json").read_text())
    page = measuring.section(text, "profile_step.py", profile_step.tables(document))
    assert text == page, "run: python benchmarks/profile_step.py --input FILE --page"
    assert len(document["results"]) == 2
    for result in document["results"]:
        assert sum(part["share"] for part in result["parts"].values()) == pytest.approx(1)


@pytest.mark.parametrize("name", ["training_step", "training_memory", "profile_step", "same_training"])
def test_the_page_has_a_place_for_each_script(name):
    text = measuring.PAGE.read_text(encoding="utf-8")
    page = measuring.section(text, f"{name}.py", "a table\n")
    assert f"{name}.py -->\na table\n<!-- end -->" in page
    with pytest.raises(ValueError, match="no place for other"):
        measuring.section(text, "other.py", "")
