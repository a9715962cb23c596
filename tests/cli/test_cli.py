import errno
import importlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import bonn_qat
from bonn_qat import cli, plugins
from bonn_qat.cli import options
from bonn_qat.cli.exits import one_line_warnings
from bonn_qat.exporting.export import FORMATS
from bonn_qat.files.locks import locked
from bonn_qat.studies.comparison import MANIFEST, PAGE, read_comparison
from bonn_qat.studies.on_ray import RayCluster
from bonn_qat.studies.run import in_turn
from bonn_qat.training.checkpoint import read_state
from bonn_qat.training.results import RUNS
from bonn_qat.training.trainer import Trainer

TINY = ["--train-images", "32", "--test-images", "16", "--epochs", "1", "-b", "16"]
TWO_EPOCHS = ["--train-images", "32", "--test-images", "16", "--epochs", "2", "-b", "16"]
BONN = "bonn-0.01-seed0"
COMMANDS = cli.app.commands


@pytest.fixture(autouse=True)
def _wide_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options.console(), "_width", 200)


@pytest.fixture
def other_plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A test that changes which plugins are loaded; the ones after it have theirs."""
    monkeypatch.setenv("BONN_QAT_PLUGINS", os.environ["BONN_QAT_PLUGINS"])
    plugins.manager.cache_clear()
    yield monkeypatch
    plugins.manager.cache_clear()


def test_compare_prints_the_table_and_writes_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "results"
    assert cli.main(["compare", "--schemes", "float,bonn", *TINY, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "digits: 32 training and 16 test images; wrn10_16, 1 epoch; 2 runs" in printed
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
        (["compare", "--set", "seed=3"], 2, "seed=3 cannot be set; use --seeds"),
        (["compare", "--train-images", "99999"], 2, "99999 images were requested, but there are only 1438"),
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
            "run.safetensors holds its scheme and classes; leave out --scheme and --num-classes",
        ),
        (["report", "\x1b[2J\udcff"], 2, r"cannot read \x1b[2J\udcff"),
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
    assert re.search("failed: bonn-0.01-seed0: .* held NaN or infinity in step 2", capsys.readouterr().out)


def test_what_a_file_says_gives_the_terminal_no_orders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *TINY, "--output", str(tmp_path)]) == 0
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    manifest["failures"] = {"\x1b[2Jother": "ends\x07 in\x9b31m \u202ered"}
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    assert cli.main(["train", "--resume", str(tmp_path)]) == 1
    assert r"failed: \x1b[2Jother: ends\x07 in\x9b31m \u202ered" in capsys.readouterr().out.splitlines()
    manifest["data"]["name"] = "\x1b]0;title\x07"
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    assert cli.main(["report", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert r"compared on \x1b]0;title\x07" in printed
    assert printed.replace("\n", "").isprintable()


def test_settings_and_jobs_reach_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def at_once(*args: Any, jobs: int, around: Any, **others: Any) -> None:
        asked.append(jobs)
        in_turn(*args, **others)

    monkeypatch.setattr("bonn_qat.studies.compare.at_once", at_once)
    settings = ["--set", "momentum=0.5", "--set", "scheme_options.clip=0.5", "--set", "validation_images=8"]
    arguments = ["--schemes", "bonn", *TINY, *settings, "--jobs", "3", "--output", str(tmp_path)]
    assert cli.main(["compare", *arguments]) == 0
    found = read_comparison(tmp_path)
    (result,) = found.results
    assert (result.recipe["momentum"], result.scheme) == (0.5, "bonn:clip=0.5")
    assert (found.data["train"], found.data["test"]) == (24, 8)
    assert asked == [3]


def test_a_cluster_and_what_a_run_takes_of_it_reach_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[RayCluster] = []

    def on_ray(*args: Any, cluster: RayCluster, **others: Any) -> None:
        asked.append(cluster)
        in_turn(*args, **others)

    monkeypatch.setattr("bonn_qat.studies.compare.on_ray", on_ray)
    monkeypatch.setattr("bonn_qat.studies.on_ray._is_installed", lambda: True)
    options = ["--ray", "head:6379", "--cores-per-run", "4", "--gpus-per-run", "0.5", "--output", str(tmp_path)]
    assert cli.main(["compare", "--schemes", "bonn", *TINY, *options]) == 0
    assert cli.main(["compare", "--resume", str(tmp_path), "--ray", "auto"]) == 0
    assert asked == [RayCluster(address="head:6379", cores=4, gpus=0.5), RayCluster(address="auto")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A training that nobody disturbed."""
    output = tmp_path_factory.mktemp("whole")
    assert cli.main(["train", *TWO_EPOCHS, "--output", str(output)]) == 0
    return output


def _weights(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / RUNS / f"{BONN}.safetensors")


def _assert_same(one: Path, other: Path) -> None:
    first, second = _weights(one), _weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    epochs = [next(run.epochs for run in read_comparison(place).results if run.name == BONN) for place in (one, other)]
    assert epochs[0] == epochs[1]


class Asked(Exception):
    """In place of a comparison."""


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the runs that a command plans; it ends before the first one."""
    names: list[str] = []

    def compare(recipes: Any, *args: Any, **kwargs: Any) -> None:
        names.extend(recipe.name for recipe in recipes)
        raise Asked

    def reproduce(*args: Any, **kwargs: Any) -> None:
        raise Asked

    monkeypatch.setattr("bonn_qat.studies.compare.compare", compare)
    monkeypatch.setattr("bonn_qat.studies.reproduce.reproduce", reproduce)
    return names


def test_train_is_a_comparison_of_one_arm(whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = read_comparison(whole)
    assert found.planned == [result.name for result in found.results] == [BONN]
    files = {path: path.stat().st_mtime_ns for path in (whole / RUNS).iterdir()}
    assert cli.main(["compare", "--schemes", "bonn", *TWO_EPOCHS, "--output", str(whole)]) == 0
    assert {path: path.stat().st_mtime_ns for path in (whole / RUNS).iterdir()} == files
    assert f"report: {whole / PAGE}" in capsys.readouterr().out


def test_train_takes_a_scheme_with_options_and_a_seed(tmp_path: Path, planned: list[str]) -> None:
    arguments = ["--scheme", "xnor:input_scale=true", "--seed", "7", "--set", "latents=float"]
    with pytest.raises(Asked):
        cli.main(["train", *TINY, *arguments, "--output", str(tmp_path)])
    assert planned == ["xnor_input_scale=true-float-seed7"]


@pytest.mark.parametrize(
    ("number", "begun", "words", "code"),
    [
        (signal.SIGINT, ["compare", "--schemes", "bonn,float"], "interrupted", 130),
        (signal.SIGTERM, ["train"], "terminated", 143),
    ],
    ids=["ctrl-c", "sigterm"],
)
def test_what_a_signal_stopped_goes_on_with_resume_alone(
    number: signal.Signals, begun: list[str], words: str, code: int, whole: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    step, before = Trainer.step, signal.getsignal(number)

    def hit(self: Trainer, images: Tensor, targets: Tensor) -> Any:
        if self.epochs and not self.done:
            os.kill(os.getpid(), number)  # in the first step of the second epoch
        return step(self, images, targets)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", hit)
        assert cli.main([*begun, *TWO_EPOCHS, "--output", str(tmp_path)]) == code
    assert signal.getsignal(number) is before
    command = f"bonn-qat compare --resume {tmp_path}"
    assert capsys.readouterr().err.splitlines() == [
        f"bonn-qat: {words}; finished runs are kept, and the current run up to its last checkpoint; "
        f"{command} continues from there"
    ]
    state = tmp_path / RUNS / f"{BONN}.unfinished.safetensors"
    assert (len(read_state(state).progress.epochs), read_state(state).progress.step) == (1, 1)
    names = read_comparison(tmp_path).planned
    assert read_comparison(tmp_path).missing == names

    assert cli.main([begun[0], *shlex.split(command)[2:]]) == 0
    found = read_comparison(tmp_path)
    assert found.planned == [result.name for result in found.results] == names
    assert not state.exists()
    _assert_same(tmp_path, whole)


def _options(verb: str) -> list[str]:
    kept = ("resume", "jobs", "ray", "cores_per_run", "gpus_per_run", "data_dir", "no_plugins")
    return [max(option.opts, key=len) for option in COMMANDS[verb].params if option.name not in kept]


@pytest.mark.parametrize(
    ("verb", "option"), [(verb, option) for verb in ("train", "compare") for option in _options(verb)]
)
def test_resume_refuses_what_would_be_another_plan_by_its_name(
    verb: str, option: str, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([verb, "--resume", str(whole), option, "1"]) == 2
    assert (
        capsys.readouterr().err == f"bonn-qat: --resume continues the runs as they were planned; leave out {option}\n"
    )


def test_resume_takes_what_does_not_change_the_plan(
    whole: Path, tmp_path: Path, planned: list[str], other_plugins: pytest.MonkeyPatch
) -> None:
    options = ["--jobs", "2", "--data-dir", str(tmp_path), "--no-plugins"]
    with pytest.raises(Asked):
        cli.main(["compare", "--resume", str(whole), *options])
    assert planned == [BONN]


@pytest.mark.parametrize("verb", ["train", "compare"])
@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        (None, "cannot read {}/comparison.json: No such file or directory"),
        ({"planned": []}, "no runs were planned in {}; start a comparison with --output"),
        (
            {"planned": [BONN]},
            f"{{}} has no recipe for {BONN}, because an earlier version began it; repeat the same command "
            "with --output {}",
        ),
    ],
    ids=["nothing", "no run", "an earlier version"],
)
def test_resume_refuses_a_directory_without_a_plan(
    verb: str, manifest: dict[str, Any] | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if manifest is not None:
        data = {"name": "digits", "classes": 10, "train": 32, "test": 16, "image": [1, 8, 8]}
        content = {"format": 1, "data": data, "failures": {}, **manifest}
        (tmp_path / MANIFEST).write_text(json.dumps(content))
    files = list(tmp_path.iterdir())
    assert cli.main([verb, "--resume", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"bonn-qat: {words.format(tmp_path, tmp_path)}\n"
    assert list(tmp_path.iterdir()) == files


def test_a_run_that_another_process_is_at_is_no_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / RUNS).mkdir()
    with locked(tmp_path / RUNS / f".{BONN}.lock", waits=False):
        assert cli.main(["train", *TINY, "--output", str(tmp_path)]) == 0
    assert f"running in another process: {BONN}" in capsys.readouterr().out.splitlines()
    assert read_comparison(tmp_path).missing == [BONN]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EROFS, "{}: Read-only file system"),
        (errno.EACCES, "{}: Permission denied"),
        (errno.EIO, "{}: Input/output error"),
    ],
)
def test_results_that_cannot_be_written_give_exit_code_3(
    number: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(path: Path, content: bytes) -> Path:
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr("bonn_qat.files.tensors.write_bytes", fail)
    assert cli.main(["train", *TINY, "--output", str(tmp_path)]) == 3
    told = capsys.readouterr().err
    state = tmp_path / RUNS / f"{BONN}.unfinished.safetensors"
    assert told.startswith(f"bonn-qat: {words.format(state)}; finished runs are kept")
    assert told.endswith(f"; bonn-qat compare --resume {tmp_path} continues from there\n")
    assert told.count("\n") == 1
    assert read_comparison(tmp_path).missing == [BONN]


def test_another_error_of_the_system_is_not_taken_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> Path:
        raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))

    monkeypatch.setattr("bonn_qat.files.tensors.write_bytes", fail)
    with pytest.raises(TimeoutError):
        cli.main(["train", *TINY, "--output", str(tmp_path)])


@pytest.mark.parametrize("verb", ["report", "export"])
def test_a_report_or_an_export_that_cannot_be_written_gives_exit_code_3_too(
    verb: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(path: Path, content: bytes) -> Path:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    for module in ("files.atomic", "exporting.export"):
        monkeypatch.setattr(importlib.import_module(f"bonn_qat.{module}"), "write_bytes", fail)
    monkeypatch.setitem(FORMATS, "pt2", FORMATS["pt2"]._replace(write=lambda model, size: b""))
    weights, net = str(whole / RUNS / f"{BONN}.safetensors"), str(tmp_path / "net.pt2")
    arguments = {"report": [str(whole)], "export": [weights, "--format", "pt2", "--output", net]}
    assert cli.main([verb, *arguments[verb]]) == 3
    file = {"report": whole / PAGE, "export": net}[verb]
    assert capsys.readouterr().err.startswith(f"bonn-qat: {file}: Read-only file system")


def test_ctrl_c_in_any_command_gives_exit_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS["schemes"], "callback", interrupted)
    assert cli.main(["schemes"]) == 130
    assert capsys.readouterr().err.strip() == "bonn-qat: interrupted"


ASK = """
import sys
from bonn_qat.cli import main
sys.argv[0] = "bonn-qat"
try:
    code = main()
except SystemExit as end:  # a completion
    code = end.code
sys.exit("too much is imported" if {"torch", "rich"} & set(sys.modules) else code)
"""


@pytest.mark.parametrize(
    ("arguments", "environment", "answer"),
    [
        ([], {}, "Usage: bonn-qat"),
        (["--help"], {}, "train and compare 1-bit networks"),
        (["compare", "--help"], {}, "--schemes"),
        (["--version"], {}, f"bonn-qat {version('bonn-qat')}\n"),
        ([], {"_BONN_QAT_COMPLETE": "bash_complete", "COMP_WORDS": "bonn-qat rep", "COMP_CWORD": "1"}, "plain,report"),
        (
            [],
            {"_BONN_QAT_COMPLETE": "zsh_complete", "COMP_WORDS": "bonn-qat compare --see", "COMP_CWORD": "2"},
            "--seeds\n",
        ),
    ],
)
def test_help_and_completion_answer_without_torch(
    arguments: list[str], environment: dict[str, str], answer: str
) -> None:
    script = [sys.executable, "-c", ASK, *arguments]
    done = subprocess.run(script, capture_output=True, text=True, env={**os.environ, **environment})
    assert done.returncode == (0 if arguments or environment else 2), done.stderr
    assert answer.lower() in (done.stdout or done.stderr).lower()


@pytest.mark.parametrize("verb", COMMANDS)
def test_every_verb_that_asks_plugins_can_do_without(verb: str) -> None:
    assert any("--no-plugins" in option.opts for option in COMMANDS[verb].params) == (verb != "report")


@pytest.mark.parametrize(
    ("arguments", "wanted", "names"),
    [
        (["--no-plugins"], None, {"bonn"}),
        (["--no-plugins"], "baselines.xnor", {"bonn"}),
        ([], "", {"bonn"}),
        ([], "baselines.xnor, baselines.float", {"bonn", "xnor", "float"}),
    ],
)
def test_schemes_are_those_of_the_plugins_that_are_wanted(
    arguments: list[str], wanted: str | None, names: set[str], other_plugins: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    if wanted is None:
        other_plugins.delenv("BONN_QAT_PLUGINS")
    else:
        other_plugins.setenv("BONN_QAT_PLUGINS", wanted)
    assert cli.main(["schemes", *arguments]) == 0
    assert set(re.findall(r"^(\S+) +\d+/\d+ ", capsys.readouterr().out, re.MULTILINE)) == names


def _told_before(arguments: list[str], output: Path, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines on plugins and observers."""
    with pytest.raises(Asked):
        cli.main([*arguments, "--output", str(output)])
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(("plugins: ", "MLflow: "))]


@pytest.mark.usefixtures("planned")
@pytest.mark.parametrize("begun", [["train", *TINY], ["compare", *TINY], ["reproduce", "ablation"]], ids=lambda b: b[0])
def test_plugins_and_what_they_observe_are_told_before_a_run(
    begun: list[str], tmp_path: Path, other_plugins: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    baselines, *observers, weights = (
        f"bonn-qat-{name} {version(f'bonn-qat-{name}')}"
        for name in ("baselines", "csv", "mlflow", "tensorboard", "weights")
    )
    assert _told_before(begun, tmp_path, capsys) == [f"plugins: {baselines}, {weights}"]
    other_plugins.delenv("BONN_QAT_PLUGINS")
    plugins.manager.cache_clear()
    store = f"MLflow: sqlite:///{tmp_path / 'mlflow.db'}, experiment {tmp_path.name}"
    assert _told_before(begun, tmp_path, capsys) == [
        f"plugins: {', '.join([baselines, *observers, weights])}",
        store,
    ]
    assert _told_before([*begun, "--no-plugins"], tmp_path, capsys) == ["plugins: none"]
    assert not list(tmp_path.iterdir())


def test_summary_and_schemes_print_what_they_say(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["summary", "wrn10_16", "--num-classes", "10", "--img-size", "32"]) == 0
    assert "layer1.0.conv1" in capsys.readouterr().out
    assert cli.main(["schemes"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in ("bonn", "xnor", "bireal", "pcnn", "float", "arXiv:1908.06314"))
    assert re.search(r"^xnor +1/1 +Rastegari", printed, re.MULTILINE)
    assert re.search(r"^float +32/32 +the float network", printed, re.MULTILINE)
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
    file, difference = capsys.readouterr().out.splitlines()
    assert file == f"nets/net.pt2: {size:.2f} MB"
    # The file has torch's own convolutions, and float layers round differently where maps have another layout.
    words = (
        r"difference from the network's outputs on random images: at most (.+), median .+; the same class for 100.0%"
    )
    found = re.fullmatch(words, difference)
    assert found is not None
    assert float(found[1]) < 1e-6
    assert 0 < size < 2


@pytest.fixture
def with_weights(other_plugins: pytest.MonkeyPatch) -> None:
    other_plugins.setenv("BONN_QAT_PLUGINS", "baselines.xnor,weights")
    plugins.manager.cache_clear()


@pytest.mark.usefixtures("with_weights")
def test_a_trained_network_is_evaluated_and_asked_by_name_and_as_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "wrn10_16.xnor_digits"
    found = plugins.find_pretrained(name)
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(tmp_path / "black.png")

    def printed(*arguments: str) -> str:
        assert cli.main(list(arguments)) == 0
        return capsys.readouterr().out

    accuracies = [
        printed("evaluate", *source, "--data", "digits")
        for source in ([name], [name, "--packed"], [str(found.weights)], [str(found.packed)])
    ]
    assert len({line.partition(": ")[2] for line in accuracies}) == 1
    assert re.fullmatch(rf"{name}: top-1 \d\d.\d\d %, top-5 .* on 359 images of digits\n", accuracies[0])
    guesses = [
        printed("predict", source, str(tmp_path / "black.png"), "--top", "2").strip()
        for source in (name, str(found.packed))
    ]
    assert re.fullmatch(r".*black.png: \d \d+\.\d%, \d \d+\.\d%", guesses[0])
    assert guesses[0] == guesses[1]
    assert printed("summary", name) == printed("summary", str(found.weights))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["evaluate", "wrn10_16", "--data", "digits"],
            "unknown pretrained network 'wrn10_16'; known: wrn10_16.bonn_digits",
        ),
        (["predict", "wrn10_16.xnor_digits"], "Missing argument 'IMAGE...'"),
        (["predict", "wrn10_16.xnor_digits", "nothing.png"], "cannot read nothing.png: no such file or directory"),
        (["predict", "none.safetensors", "nothing.png"], "cannot read none.safetensors"),
        (
            ["evaluate", "wrn10_16.xnor_digits", "--data", "digits", "--img-size", "16"],
            "--img-size is for image folders; the images of digits have 8 pixels an edge",
        ),
        (["summary", "wrn10_16.xnor_digit"], "unknown pretrained network 'wrn10_16.xnor_digit'; did you mean"),
        (["summary", "wrn10_16", "--img-size", "0"], "0 is not in the range x>=1"),
        (["summary", "wrn10_16", "--num-classes", "-3"], "-3 is not in the range x>=1"),
        (["summary", "wrn10_16.xnor_digits", "--scheme", "bonn"], "holds its scheme and classes; leave out --scheme"),
    ],
)
@pytest.mark.usefixtures("with_weights")
def test_what_cannot_be_evaluated_is_one_line(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("bonn-qat: ")
    assert words in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(("place", "is_ours"), [(bonn_qat.__file__, True), (timm.__file__, False)])
def test_a_warning_of_ours_is_one_line(place: str, is_ours: bool) -> None:
    with one_line_warnings():
        found = warnings.formatwarning("fc starts anew", UserWarning, place, 1)
    assert (found == "bonn-qat: warning: fc starts anew\n") == is_ours


def test_export_of_a_timm_model_without_a_runtime_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(FORMATS, "pt2", FORMATS["pt2"]._replace(runs_in=("no_such_runtime",)))
    arguments = ["export", "wrn10_16", "--scheme", "xnor", "--img-size", "16", "--num-classes", "5"]
    assert cli.main([*arguments, "--format", "pt2", "--output", str(tmp_path / "net.pt2")]) == 0
    (images,), _ = torch.export.load(tmp_path / "net.pt2").example_inputs
    assert images.shape[1:] == (3, 16, 16)
    assert "outputs not compared: the format 'pt2' needs no_such_runtime: pip" in capsys.readouterr().out
