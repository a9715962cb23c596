"""A command that prints a path has written it, whatever happens to the directory or the disk meanwhile."""

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bonn_qat import cli, load
from bonn_qat.cli import options
from bonn_qat.files import atomic
from bonn_qat.studies.comparison import MANIFEST, PAGE, read_comparison
from bonn_qat.training.results import RUNS, RunResult

RUN = ["--train-images", "32", "--test-images", "16", "--epochs", "1", "-b", "16"]
TABLE = """
title = "Small"
recipe = "recipe.toml"
settings = [{name = "one", arms = [{scheme = "bonn"}]}, {name = "two", arms = [{scheme = "bonn"}]}]
"""
RECIPE = "epochs = 1\ntrain_images = 32\ntest_images = 16\nbatch_size = 16\n"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("finished")
    assert cli.main(["train", *RUN, "--output", str(output)]) == 0
    return output


@pytest.fixture
def _quick(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs whose training is a checkpoint and a result that is there already; no figures."""
    (result,) = read_comparison(finished).results
    model = load(next((finished / RUNS).glob("*.safetensors")))

    def train(model: Any, recipe: Any, data: Any, *, checkpoint: Path, **_: Any) -> RunResult:
        atomic.write_bytes(checkpoint, b"state")
        atomic.write_bytes(checkpoint, b"later state")
        return replace(result, name=recipe.name, seed=recipe.seed, recipe=recipe.to_dict(), scheme=recipe.scheme)

    monkeypatch.setattr("bonn_qat.studies.run.train", train)
    monkeypatch.setattr("bonn_qat.studies.figures.pictures", lambda _: [])
    monkeypatch.setattr("bonn_qat.studies.run.build", lambda *_: model)
    monkeypatch.setattr(options.console(), "_width", 400)


def _removed(place: Path) -> None:
    shutil.rmtree(place)


def _moved(place: Path) -> None:
    place.rename(place.with_name("elsewhere"))


def _emptied(place: Path) -> None:
    for path in place.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _became_a_file(place: Path) -> None:
    _moved(place)
    place.write_text("mine")


HARM: dict[str, Callable[[Path], None] | int] = {
    "removed": _removed, "moved": _moved, "emptied": _emptied, "a file": _became_a_file,
    **{name: getattr(errno, name) for name in ("ENOSPC", "ENOTDIR")},
}  # fmt: skip


def harmed(what: Callable[[Path], None] | int, place: Path, after: int) -> Callable[[Path, Path], Path]:
    """In place of ``Path.replace``, which ends each write: ``what`` happens to ``place`` after that many writes."""
    whole, done = Path.replace, 0

    def replace_file(path: Path, target: Path) -> Path:
        nonlocal done
        if isinstance(what, int) and done >= after:
            raise OSError(what, os.strerror(what), str(target))
        moved = whole(path, target)
        if done == after and not isinstance(what, int):
            what(place)
        done += 1
        return moved

    return replace_file


def commands(finished: Path, place: Path) -> dict[str, list[str]]:
    shutil.copytree(finished, place / "old", dirs_exist_ok=True)
    (place / "small.toml").write_text(TABLE)
    (place / "recipe.toml").write_text(RECIPE)
    weights = str(next((finished / RUNS).glob("*.safetensors")))
    output = ["--output", str(place / "out")]
    return {
        "train": ["train", *RUN, *output],
        "compare": ["compare", "--schemes", "bonn,float", *RUN, *output],
        "reproduce": ["reproduce", str(place / "small.toml"), *output],
        "export": ["export", weights, "--format", "packed", "--output", str(place / "out" / "net.safetensors")],
        "report": ["report", str(place / "old")],
    }


# After how many writes the harm is done.
WRITES = {
    "train": range(1, 8, 2),
    "compare": range(2, 14, 3),
    "reproduce": (0, 4, 9, 14),
    "export": (0,),
    "report": (0,),
}


@pytest.mark.usefixtures("_quick")
@pytest.mark.parametrize("harm", HARM)
@pytest.mark.parametrize("verb", WRITES)
def test_a_path_that_is_printed_is_there(
    harm: str, verb: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for after in WRITES[verb]:
        folder = tmp_path / str(after)
        folder.mkdir()
        arguments = commands(finished, folder)[verb]
        place = folder / ("old" if verb == "report" else "out")
        with monkeypatch.context() as patch:
            patch.setattr(Path, "replace", harmed(HARM[harm], place, after))
            code = cli.main(arguments)
        printed, told = capsys.readouterr()
        assert code in (0, 2, 3), (after, told)
        assert (told.count("\n"), told.startswith("bonn-qat: ")) == ((0, False) if code == 0 else (1, True)), after
        for path in re.findall(r"^(?:report: )?(/\S+?)(?:: [\d.]+ MB)?$", printed, re.MULTILINE):
            assert Path(path).is_file(), (after, path)
        if code == 0 and verb in ("train", "compare"):
            assert not read_comparison(place).missing
            assert (place / PAGE).is_file()
        if code == 3 and verb in ("train", "compare") and not place.is_file():
            # The same command goes on with what is left.
            assert cli.main(arguments) == 0
            assert not read_comparison(place).missing
            capsys.readouterr()


@pytest.mark.parametrize("verb", ["train", "compare", "reproduce", "export", "bench"])
@pytest.mark.parametrize("kind", ["a file", "below a file", "a pipe"])
def test_an_output_that_cannot_be_is_told_before_any_work(
    kind: str, verb: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    place = tmp_path / "out"
    os.mkfifo(place) if kind == "a pipe" else place.write_text("mine")
    arguments = {**commands(finished, tmp_path), "bench": ["bench", "wrn10_16", "--output", str(place)]}[verb]
    if kind == "below a file":
        arguments[-1] = str(place / "deeper" / "out")
    monkeypatch.setattr("bonn_qat.studies.run.train", pytest.fail)
    monkeypatch.setattr("bonn_qat.bench.bench", pytest.fail)
    if verb == "export" and kind != "below a file":
        arguments[-1] = str(place / "net")
    assert cli.main(arguments) in (2, 3)
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "out" in told
    assert place.exists()
    assert kind == "a pipe" or place.read_text() == "mine"
    assert json.loads((finished / MANIFEST).read_text())["planned"]
