import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bonn_qat import cli
from bonn_qat.export import FORMATS
from bonn_qat.jobs import in_turn
from bonn_qat.results import PAGE, read_comparison

TINY = ["--train-images", "32", "--test-images", "16", "--epochs", "1", "-b", "16"]


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.console, "_width", 200)


def test_compare_prints_the_table_and_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results"
    assert cli.main(["compare", "--schemes", "float,bonn", *TINY, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "digits: 32 training and 16 test images; wrn10_16, 1 epochs; 2 runs" in printed
    assert "BONN" in printed
    assert f"report: {output / PAGE}" in printed
    assert not read_comparison(output).missing
    (output / PAGE).unlink()
    assert cli.main(["report", str(output)]) == 0
    assert (output / PAGE).exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["compare", "--schemes", "bon"], 2, "unknown scheme 'bon'; did you mean 'bonn'"),
        (["compare", "--model", "resnet81"], 2, "unknown model 'resnet81'; did you mean"),
        (["compare", "--data", "digit"], 2, "unknown data set 'digit'; did you mean 'digits'"),
        (["compare", "--data", "no/such/folder"], 2, "the image folder no/such/folder does not exist"),
        (["compare", "--recipe", "none.toml"], 2, "cannot read the recipe none.toml"),
        (["compare", "--epochs", "0"], 2, "epochs in the recipe is 0; allowed: at least 1"),
        (["compare", "--set", "lr"], 2, "the setting 'lr' is not of the form KEY=VALUE"),
        (["compare", "--set", "lrr=1"], 2, "unknown key of a recipe 'lrr'; did you mean 'lr'"),
        (["compare", "--set", "lr=fast"], 2, "lr of a recipe is 'fast'; a value of type float is needed"),
        (["compare", "--set", "seed=3"], 2, "seed is another one in every run of a comparison; use --seeds"),
        (["compare", "--train-images", "99999"], 2, "99999 images were asked for, there are 1438"),
        (["report", "nowhere"], 2, "cannot read nowhere"),
        (["summary", "resnet18", "--scheme", "bon"], 2, "unknown scheme 'bon'"),
        (["summary", "resnet81"], 2, "unknown model 'resnet81'"),
        (["export", "resnet81", "--format", "pt2", "--output", "net"], 2, "unknown model 'resnet81'"),
        (
            ["export", "wrn10_16", "--format", "onxx", "--output", "net"],
            2,
            "unknown format 'onxx'; did you mean 'onnx'",
        ),
        (
            ["export", "run.safetensors", "--format", "pt2", "--output", "net"],
            2,
            "cannot read run.safetensors: no such",
        ),
        (
            ["export", "run.safetensors", "--scheme", "bonn", "--format", "pt2", "--output", "net"],
            2,
            "run.safetensors says itself of which scheme and how many classes it is; leave them out",
        ),
    ],
)
def test_bad_input_gives_one_line_and_an_exit_code(
    arguments: list[str], code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == code
    told = capsys.readouterr().err
    assert words in told
    assert told.startswith("bonn-qat: ")
    assert told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_image_folder_is_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    for label in ("cat", "dog"):
        (tmp_path / "pictures" / label).mkdir(parents=True)
        for index in range(5):
            pixels = rng.integers(0, 255, (20, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / label / f"{index}.png")
    folder, output = str(tmp_path / "pictures"), str(tmp_path / "results")
    arguments = ["--schemes", "bonn", "--model", "wrn10_16", "--epochs", "1", "-b", "4", "--img-size", "16"]
    assert cli.main(["compare", "--data", folder, *arguments, "--output", output]) == 0
    assert "pictures: 8 training and 2 test images" in capsys.readouterr().out


def test_a_failed_run_gives_exit_code_1(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare", "--schemes", "bonn", *TINY, "--lr", "1e30", "--output", str(tmp_path)]) == 1
    assert "failed: bonn-0.01-seed0: the loss term" in capsys.readouterr().out


def test_settings_and_jobs_reach_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def at_once(*args: Any, jobs: int, **others: Any) -> Any:
        asked.append(jobs)
        return in_turn(*args, **others)

    monkeypatch.setattr("bonn_qat.compare.at_once", at_once)
    settings = ["--set", "momentum=0.5", "--set", "scheme_options.clip=0.5", "--set", "validation_images=8"]
    arguments = ["--schemes", "bonn", *TINY, *settings, "--jobs", "3", "--output", str(tmp_path)]
    assert cli.main(["compare", *arguments]) == 0
    found = read_comparison(tmp_path)
    (result,) = found.results
    assert (result.recipe["momentum"], result.scheme) == (0.5, "bonn:clip=0.5")
    assert (found.data["train"], found.data["test"]) == (24, 8)
    assert asked == [3]


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (None, 143, "terminated; finished runs are kept; the same command with --output"),
        (KeyboardInterrupt(), 130, "interrupted; finished runs are kept; the same command with --output"),
        (OSError(28, "No space left on device"), 3, "the disk is full; finished runs are kept"),
    ],
)
def test_stopping_is_told_in_one_line(
    error: BaseException | None, code: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def stop(*args: object, **kwargs: object) -> None:
        if error is None:
            os.kill(os.getpid(), signal.SIGTERM)
        else:
            raise error

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("bonn_qat.worker.train", stop)
    assert cli.main(["compare", "--schemes", "bonn", *TINY, "--output", str(tmp_path)]) == code
    told = capsys.readouterr().err
    assert words in told
    assert told.count("\n") == 1
    assert read_comparison(tmp_path).missing == ["bonn-0.01-seed0"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_summary_and_schemes_print_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["summary", "wrn10_16", "--num-classes", "10", "--img-size", "32"]) == 0
    assert "layer1.0.conv1" in capsys.readouterr().out
    assert cli.main(["schemes"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("bonn", "xnor", "bireal", "pcnn", "float", "arXiv:1908.06314"))
    assert "xnor  1/1 bits W/A" in printed
    assert "float  32/32 bits W/A" in printed
    assert "options: granularity='kernel', " in printed


def test_export_writes_what_a_comparison_left_and_compares_the_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["compare", "--schemes", "bonn", *TINY, "--output", "results"]) == 0
    capsys.readouterr()
    weights = "results/runs/bonn-0.01-seed0.safetensors"
    assert cli.main(["export", weights, "--format", "pt2", "--output", "nets/net.pt2"]) == 0
    size = Path("nets/net.pt2").stat().st_size / 1e6
    assert capsys.readouterr().out.splitlines() == [
        f"nets/net.pt2: {size:.2f} MB",
        "difference from the network's outputs on random images: at most 0, median 0; the same class for 100.0%",
    ]
    assert 0 < size < 2


def test_export_of_a_timm_model_without_a_runtime_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(FORMATS, "pt2", FORMATS["pt2"]._replace(runs_in=("no_such_runtime",)))
    arguments = ["export", "wrn10_16", "--scheme", "xnor", "--img-size", "16", "--num-classes", "5"]
    assert cli.main([*arguments, "--format", "pt2", "--output", str(tmp_path / "net.pt2")]) == 0
    (images,), _ = torch.export.load(tmp_path / "net.pt2").example_inputs
    assert images.shape[1:] == (3, 16, 16)
    assert "not compared with the network: the format 'pt2' needs no_such_runtime: pip" in capsys.readouterr().out
