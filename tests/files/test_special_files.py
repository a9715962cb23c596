"""What has a path and is no regular file is neither read, waited for, nor replaced."""

import os
import signal
import socket
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path

import pytest
from torch import nn

from bonn_qat import PackedModel, cli, load
from bonn_qat.errors import BonnQatError
from bonn_qat.files.atomic import check_writable, read_json, write_bytes
from bonn_qat.files.plain import open_regular, read_text
from bonn_qat.studies import study
from bonn_qat.studies.comparison import MANIFEST, read_comparison
from bonn_qat.training.checkpoint import read_state
from bonn_qat.training.network import load_file
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.results import RUNS, read_run


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it waits"))
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(path))  # such a name is short


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**42)


def _linked(path: Path) -> None:
    os.mkfifo(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


KINDS: dict[str, Callable[[Path], None]] = {
    "pipe": os.mkfifo,
    "link to a pipe": _linked,
    "socket": _socket,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "terminal": lambda path: path.symlink_to("/dev/tty"),
    "link to itself": lambda path: path.symlink_to(path),
    "sparse": _sparse,
}
READERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "manifest": (MANIFEST, lambda path: read_comparison(path.parent)),
    "result": (f"{RUNS}/x.json", read_run),
    "json": ("x.json", read_json),
    "recipe": ("x.toml", Recipe.from_toml),
    "study": ("x.toml", study.load),
    "weights": ("x.safetensors", load),
    "checkpoint": ("x.safetensors", read_state),
    "start": ("x.safetensors", lambda path: load_file(nn.Linear(1, 1), path)),
    "packed": ("x.safetensors", PackedModel.load),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", KINDS)
def test_only_a_regular_file_is_read(kind: str, reader: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    name, read = READERS[reader]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    KINDS[kind](path)
    with pytest.raises(BonnQatError) as caught:
        read(path)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sparse"])
def test_a_regular_file_is_opened_and_others_are_not(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    KINDS[kind](tmp_path / "x")
    with pytest.raises(OSError, match=r"x'$"):
        open_regular(tmp_path / "x")
    with pytest.raises(OSError, match=r"x'$"):
        read_text(tmp_path / "x", 10)
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to("file")
    assert read_text(tmp_path / "link", 10) == "text"


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "socket", "folder", "device"])
def test_what_is_no_file_is_not_replaced_by_one(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x"
    KINDS[kind](path)
    known = attrgetter("st_mode", "st_ino", "st_mtime_ns")  # not the time of access: following a link changes it
    before, files = known(path.lstat()), sorted(tmp_path.iterdir())
    for refuse in (check_writable, lambda path: write_bytes(path, b"content")):
        with pytest.raises(OSError, match=r"x'$"):
            refuse(path)
    assert (known(path.lstat()), sorted(tmp_path.iterdir())) == (before, files)


def test_a_pipe_in_place_of_the_temporary_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / f".x.{os.getpid()}")
    assert write_bytes(tmp_path / "x", b"content").read_bytes() == b"content"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("kind", ["pipe", "socket", "folder"])
@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        (["report", "."], MANIFEST),
        (["train", "--resume", "."], MANIFEST),
        (["compare", "--output", "."], MANIFEST),
        (["train", "--recipe", "x"], "x"),
        (["reproduce", "x.toml"], "x.toml"),
        (["export", "x.safetensors", "--format", "packed", "--output", "net"], "x.safetensors"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_command_says_so_in_one_line(
    kind: str, arguments: list[str], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    KINDS[kind](tmp_path / name)
    assert cli.main(arguments) == 2
    told = capsys.readouterr().err
    assert told.startswith("bonn-qat: ")
    assert name in told
    assert told.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [name]
