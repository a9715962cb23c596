import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bonn_qat import data, distributed
from bonn_qat.results import read_comparison


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def _folder(root: Path, count: int) -> Path:
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for label in range(2):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for index in range(count):
                Image.fromarray(rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    return root


@pytest.mark.parametrize("world", [2, 3])
def test_the_shares_of_a_batch_are_equal_and_together_the_batch(world: int) -> None:
    digits = data.load("digits", train_images=71)
    whole = list(digits.train_batches(16, _generator(), augment=True))
    shares = [list(digits.train_batches(16, _generator(), augment=True, share=(rank, world))) for rank in range(world)]
    for batch, parts in zip(whole, zip(*shares, strict=True), strict=True):
        sizes = {len(targets) for _, targets in parts}
        assert sizes == {len(batch[0]) // world}
        together = torch.cat([images for images, _ in parts])
        kept = batch[0][: sum(len(images) for images, _ in parts)]
        assert sorted(map(tuple, together.flatten(1).tolist())) == sorted(map(tuple, kept.flatten(1).tolist()))


@pytest.mark.parametrize("kind", ["digits", "folder"])
def test_every_test_image_is_in_one_share(tmp_path: Path, kind: str) -> None:
    found = data.load("digits", test_images=7) if kind == "digits" else data.load(str(_folder(tmp_path, 5)), size=16)
    for batches in (found.test_batches, found.measure_batches):
        whole = torch.cat([targets for _, targets in batches()])
        shares = [torch.cat([targets for _, targets in batches(share=(rank, 3))]) for rank in range(3)]
        assert sum(map(len, shares)) == len(whole)
        assert all(torch.equal(share, whole[rank::3]) for rank, share in enumerate(shares))


def test_the_shares_of_a_folder_are_other_images_of_the_same_order(tmp_path: Path) -> None:
    folder = data.load(str(_folder(tmp_path, 7)), size=16)
    whole = [targets for _, targets in folder.train_batches(4, _generator(), augment=False)]
    first, second = (
        [targets for _, targets in folder.train_batches(4, _generator(), augment=False, share=(rank, 2))]
        for rank in range(2)
    )
    assert [len(targets) for targets in first] == [2, 2, 2]  # of the last two images, one each would be no statistics
    for batch, *parts in zip(whole, first, second, strict=False):
        assert torch.equal(batch[0::2], parts[0])
        assert torch.equal(batch[1::2], parts[1])


def test_alone_there_is_one_process() -> None:
    with distributed.process_group():
        assert (distributed.rank(), distributed.world()) == (0, 1)
        assert distributed.add_up(torch.ones(2)).tolist() == [1, 1]
        assert distributed.agreed("here") == "here"


# A network without batch statistics, so that the mean of two gradients is that of the whole batch.
TWO_PROCESSES = """
import dataclasses, sys
import torch
from torch import nn
from bonn_qat import binarize, data, distributed, train
from bonn_qat.bonn import BONN
from bonn_qat.recipe import Recipe
from bonn_qat.scheme import Stage

recipe = Recipe(
    epochs=2, batch_size=16, lr=0.05, train_images=64, test_images=33, momentum=0.0,
    stages=(
        Stage(share=0.5, regularizers={"kernel": 1e-2}),
        Stage(share=0.5, regularizers={"kernel": 1e-2, "feature": 1e-2}),
    ),
)
with distributed.process_group():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)
    )
    model = binarize(net, dataclasses.replace(BONN, norm=None)).double()
    digits = data.load("digits", train_images=64, test_images=33)
    standardise = digits._standardise
    digits._standardise = lambda images: standardise(images).double()
    result = train(model, recipe, digits)
    parameters = torch.cat([p.detach().flatten() for p in model.parameters()])
    both = [parameters]
    if distributed.world() > 1:
        both = [torch.empty_like(parameters) for _ in range(2)]
        torch.distributed.all_gather(both, parameters)
        assert torch.equal(*both)
    if distributed.rank() == 0:
        torch.save((parameters, result.epochs), sys.argv[1])
"""


def _launch(arguments: list[str], processes: int) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MLFLOW_DISABLE_TELEMETRY": "true"}
    done = subprocess.run(
        [*command, *arguments], env=environment, capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_two_processes_train_as_one_with_the_whole_batch(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TWO_PROCESSES)
    for processes in (1, 2):
        _launch([str(script), str(tmp_path / f"{processes}.pt")], processes)
    (alone, epochs), (together, epochs_of_two) = (torch.load(tmp_path / f"{count}.pt") for count in (1, 2))
    # All in float64 but the features in their loss, which are float32.
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-9)
    for one, two in zip(epochs, epochs_of_two, strict=True):
        assert one.keys() == two.keys()
        for name in ("train/loss", "train/top1", "test/loss", "test/top1", "test/top5"):
            assert two[name] == pytest.approx(one[name], rel=1e-5), name


@pytest.mark.slow
def test_table4_reads_a_folder_under_torchrun(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "images", 9)
    command = ["-m", "bonn_qat", "reproduce", "table4", "--data", str(folder), "--img-size", "32", "--workers", "0"]
    settings = ["epochs=1", "batch_size=8", "lr=0.01", "model=wrn10_16"]
    output = tmp_path / "results"
    _launch([*command, *(part for s in settings for part in ("--set", s)), "--output", str(output)], 2)
    comparison = read_comparison(output / "imagenet-birealnet18")
    assert not comparison.missing
    assert not comparison.failures
    assert [run.scheme for run in comparison.results] == [
        "float", "bwn", "dorefa", "tbn", "bnn", "abcnet", "xnor", "bireal", "pcnn", "bonn",
    ]  # fmt: skip
    assert comparison.data["train"] == comparison.data["test"] == 18
    page = (output / "table4.md").read_text()
    assert "59.30" in page
    assert "model wrn10_16 instead of birealnet18" in page
