import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bonn_qat import distributed, plugins
from bonn_qat.studies.comparison import read_comparison
from bonn_qat.training import data


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
    shares = [list(digits.train_batches(16, _generator(), augment=True, shard=(rank, world))) for rank in range(world)]
    for batch, parts in zip(whole, zip(*shares, strict=True), strict=True):
        sizes = {len(targets) for _, targets in parts}
        assert sizes == {len(batch[0]) // world}
        together = torch.cat([images for images, _ in parts])
        kept = batch[0][: sum(len(images) for images, _ in parts)]
        assert sorted(map(tuple, together.flatten(1).tolist())) == sorted(map(tuple, kept.flatten(1).tolist()))


@pytest.mark.parametrize("kind", ["digits", "folder"])
def test_every_batch_of_the_other_sets_is_in_one_share(tmp_path: Path, kind: str) -> None:
    found = data.load("digits", test_images=23) if kind == "digits" else data.load(str(_folder(tmp_path, 9)), size=16)
    for batches in (found.test_batches, found.measure_batches):
        whole = [targets.tolist() for _, targets in batches(5)]
        shares = [[targets.tolist() for _, targets in batches(5, shard=(rank, 3))] for rank in range(3)]
        assert shares == [whole[rank::3] for rank in range(3)]


@pytest.mark.parametrize("kind", ["digits", "folder"])
def test_an_epoch_that_is_begun_in_the_middle_is_the_rest_of_the_whole(tmp_path: Path, kind: str) -> None:
    found = data.load("digits", train_images=23) if kind == "digits" else data.load(str(_folder(tmp_path, 9)), size=16)
    for share in ((0, 1), (1, 2)):
        whole = list(found.train_batches(5, _generator(), augment=True, shard=share))
        for start in (0, 2, len(whole)):
            rest = list(found.train_batches(5, _generator(), augment=True, shard=share, start=start))
            assert len(rest) == len(whole) - start
            for one, other in zip(whole[start:], rest, strict=True):
                assert torch.equal(one[0], other[0])
                assert torch.equal(one[1], other[1])


@pytest.mark.parametrize("workers", [0, 2])
def test_the_augmentation_of_an_image_depends_on_neither_processes_nor_workers(tmp_path: Path, workers: int) -> None:
    root = str(_folder(tmp_path, 8))
    whole = list(data.load(root, size=16).train_batches(6, _generator(), augment=True))
    folder = data.load(root, size=16, workers=workers)
    before = torch.get_rng_state()
    for rank in range(2):
        part = list(folder.train_batches(6, _generator(), augment=True, shard=(rank, 2)))
        for (images, _), (own, _) in zip(whole, part, strict=False):
            assert torch.equal(images[rank::2], own)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_shares_of_a_folder_are_other_images_of_the_same_order(tmp_path: Path) -> None:
    folder = data.load(str(_folder(tmp_path, 7)), size=16)
    whole = [targets for _, targets in folder.train_batches(4, _generator(), augment=False)]
    first, second = (
        [targets for _, targets in folder.train_batches(4, _generator(), augment=False, shard=(rank, 2))]
        for rank in range(2)
    )
    assert [len(targets) for targets in first] == [2, 2, 2]  # of the last two images, one each would be no statistics
    for batch, *parts in zip(whole, first, second, strict=False):
        assert torch.equal(batch[0::2], parts[0])
        assert torch.equal(batch[1::2], parts[1])


def test_alone_there_is_one_process() -> None:
    with distributed.process_group():
        assert (distributed.rank(), distributed.world()) == (0, 1)
        assert distributed.all_reduce(torch.ones(2)).tolist() == [1, 1]
        assert distributed.broadcast("here") == "here"
        assert distributed.average(torch.ones(2)).tolist() == [1, 1]
        assert [part.tolist() for part in distributed.all_gather(torch.ones(2))] == [[1, 1]]


def _launch(arguments: list[str], processes: int, folder: Path) -> str:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MLFLOW_DISABLE_TELEMETRY": "true"}
    done = subprocess.run(
        [*command, *arguments],
        cwd=folder,  # where MLflow's database comes to lie
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What ``two_processes.py`` found; one launch for all, for each costs the imports."""
    found = tmp_path_factory.mktemp("two") / "found.json"
    _launch([str(Path(__file__).with_name("two_processes.py")), str(found)], 2, found.parent)
    content: dict[str, Any] = json.loads(found.read_text())
    return content


@pytest.mark.parametrize("scheme", sorted(plugins.schemes()))
def test_two_processes_train_as_one_with_the_whole_batch(both: dict[str, Any], scheme: str) -> None:
    found = both["schemes"][scheme]
    assert found["ranks_agree"]
    # In float64, where the order of a sum is all that differs: some 1e-15, which a few steps of PCNN's projection, a
    # division by it, make 1e-10 of. A statistic of half a batch would show at 1e-2.
    assert found["state"] < 1e-8
    assert found["metrics"] < 1e-9
    assert found["top1"] == 0


def test_synchronized_norms_are_those_of_the_whole_batch_however_it_is_shared(both: dict[str, Any]) -> None:
    assert len(both["batch_norms"]) == 6
    assert max(both["batch_norms"].values()) < 1e-13  # outputs, gradients and statistics, in float64


def test_norms_with_statistics_of_their_own_are_another_run(both: dict[str, Any]) -> None:
    assert both["own_norms"] > 1e-3


def test_two_processes_in_bfloat16_agree_and_have_the_loss_of_one(both: dict[str, Any]) -> None:
    assert both["bfloat16"]["ranks_agree"]
    together, alone = both["bfloat16"]["losses"]
    assert together == pytest.approx(alone, rel=2e-2)  # sums over half a batch are rounded to 8 bits in either process


def test_recomputed_norms_are_those_of_one_process(both: dict[str, Any]) -> None:
    assert both["norms"]["batches"] == [2, 1]
    assert both["norms"]["difference"] < 1e-12


def test_a_run_of_two_processes_goes_on_with_two_and_with_one(both: dict[str, Any]) -> None:
    assert both["resumed"]["at"] == [1, 1]  # epochs, steps
    assert both["resumed"]["by_two"] == 0
    assert both["resumed"]["by_one"] < 1e-8


def test_a_pixel_that_is_nan_in_one_process_ends_the_run_in_both_with_the_same_words(both: dict[str, Any]) -> None:
    first, second = both["diverged"]
    assert first == second
    assert "epoch 1: the images and the input of layer1.0.conv1 held NaN or infinity in step 1" in first


def test_a_signal_to_one_process_stops_both_at_the_same_step_with_a_checkpoint(both: dict[str, Any]) -> None:
    assert both["stopped"]["codes"] == [143, 143]
    assert both["stopped"]["difference"] == 0


def test_a_network_that_fsdp2_spreads_over_two_processes_learns_as_in_one(both: dict[str, Any]) -> None:
    assert both["sharded"] < 1e-12


@pytest.mark.slow
def test_table4_reads_a_folder_under_torchrun(tmp_path: Path) -> None:
    folder = _folder(tmp_path / "images", 9)
    command = ["-m", "bonn_qat", "reproduce", "table4", "--data", str(folder), "--img-size", "32", "--workers", "0"]
    settings = ["epochs=1", "batch_size=8", "lr=0.01", "model=wrn10_16"]
    output = tmp_path / "results"
    _launch([*command, *(part for s in settings for part in ("--set", s)), "--output", str(output)], 2, tmp_path)
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
