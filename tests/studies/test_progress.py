import contextlib
import time
from pathlib import Path

import pytest

from bonn_qat import cli, hookimpl, plugins
from bonn_qat.studies.compare import compare
from bonn_qat.studies.progress import EpochLines
from bonn_qat.training import data
from bonn_qat.training.recipe import Recipe

METRICS = {"train/loss": 1.2344, "train/top1": 56.12, "test/top1": 55.0, "lr": 0.12}


def test_a_line_has_loss_accuracies_rate_and_the_time_that_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    recipe, lines = Recipe(epochs=24, latents="0.01"), EpochLines()
    lines.bonn_qat_before_run(recipe)
    now = time.time()
    lines.bonn_qat_after_epoch(recipe, 1, METRICS, now + 100)
    lines.bonn_qat_after_epoch(recipe, 2, METRICS, now + 240)
    lines.bonn_qat_after_epoch(recipe, 24, METRICS, now + 2400)
    head = "bonn-0.01-seed0  epoch"
    tail = "loss 1.234  train 56.1 %  test 55.0 %  lr 0.12  left"
    assert capsys.readouterr().out.splitlines() == [
        f"{head} 1/24  {tail} 0:38:20", f"{head} 2/24  {tail} 0:44:00", f"{head} 24/24  {tail} 0:00:00",
    ]  # fmt: skip


class Stops:
    @hookimpl(trylast=True)
    def bonn_qat_after_epoch(self) -> None:
        raise KeyboardInterrupt


def test_epochs_from_before_a_run_was_resumed_are_not_written_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Recipe(model="wrn10_16", batch_size=16, epochs=3)
    digits = data.load("digits", train_images=32, test_images=16)
    for others in ([Stops()], []):
        pm = plugins.create_manager()
        for plugin in (EpochLines(), *others):
            pm.register(plugin)
        with pytest.raises(KeyboardInterrupt) if others else contextlib.nullcontext():
            compare([recipe], digits, tmp_path, pm=pm)
    told = [line.split("  ")[1] for line in capsys.readouterr().out.splitlines()]
    assert told == ["epoch 1/3", "epoch 2/3", "epoch 3/3"]


def test_commands_write_the_lines_also_without_a_terminal(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--train-images", "32", "--test-images", "16", "--epochs", "2", "-b", "16", "--output", str(tmp_path)]
    assert cli.main(["train", *options]) == 0
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("bonn-0.01-seed0  epoch ")]
    assert [line.split("  ")[1] for line in lines] == ["epoch 1/2", "epoch 2/2"]
    assert all(line.isprintable() for line in lines)
