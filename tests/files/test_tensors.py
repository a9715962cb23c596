"""Tensor files: round trips, errors that name a damaged file, and failed saves that keep the old file."""

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from bonn_qat.errors import BonnQatError, InvalidData
from bonn_qat.files.tensors import read_tensors, write_tensors

DTYPES = [
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
]  # fmt: skip


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def identical(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(tensor, other[name]) and tensor.dtype == other[name].dtype and tensor.shape == other[name].shape
        for name, tensor in one.items()
    )


# ---------------------------------------------------------------------------------------------- the round trip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (7,), (2, 3, 5)], ids=str)
def test_every_dtype_and_shape_comes_back(dtype, shape, path):
    tensors = {"x": torch.randint(0, 2, shape).to(dtype), "rest": torch.arange(5)}
    assert write_tensors(path, tensors) == path
    read, header = read_tensors(path)
    assert identical(read, tensors)
    assert header == {}


def test_floats_of_8_bits_come_back_in_16_with_the_same_values(path):
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e5m2)
    read, _ = read_tensors(write_tensors(path, {"x": every}))
    assert read["x"].dtype == torch.float16
    torch.testing.assert_close(read["x"].float(), every.float(), rtol=0, atol=0, equal_nan=True)


def test_the_ends_of_a_dtype_come_back_bit_for_bit(path):
    info, whole = torch.finfo(torch.float64), torch.iinfo(torch.int64)
    tensors = {
        "floats": torch.tensor([info.max, info.tiny, 5e-324, -0.0, torch.inf, 0.1], dtype=torch.float64),
        "integers": torch.tensor([whole.min, whole.max, -1]),
        "nan": torch.tensor([torch.nan]),
    }
    read, _ = read_tensors(write_tensors(path, tensors))
    for name, tensor in tensors.items():
        assert read[name].numpy().tobytes() == tensor.numpy().tobytes()


def test_a_transposed_or_expanded_tensor_comes_back_by_its_values(path):
    base = torch.arange(6.0).reshape(2, 3)
    tensors = {"turned": base.t(), "stride": torch.arange(10)[::3], "wide": torch.ones(1).expand(4)}
    read, _ = read_tensors(write_tensors(path, tensors))
    assert identical(read, tensors)


def test_tensors_that_share_their_memory_come_back_each_on_its_own(path):
    linear = nn.Linear(3, 3)
    tied = nn.ModuleDict({"first": linear, "second": linear})
    read, _ = read_tensors(write_tensors(path, tied.state_dict()))
    assert identical(read, dict(tied.state_dict()))
    read["first.weight"].zero_()
    assert read["second.weight"].any()


def test_a_view_is_written_without_the_rest_of_its_memory(path):
    write_tensors(path, {"x": torch.zeros(1_000_000)[:3]})
    assert path.stat().st_size < 1000


def test_parameters_are_read_without_gradient(path):
    weight = nn.Parameter(torch.ones(2))
    read, _ = read_tensors(write_tensors(path, {"w": weight}))
    assert not read["w"].requires_grad
    assert weight.requires_grad


HEADER = {
    "recipe": {"model": "wrn10_16", "skip": ["a", "b"], "stages": [], "nothing": None},
    "epochs": [{"loss": 0.1 + 0.2, "top1": 1e-300}],
    "words": 'Gr\u00f6\u00dfe "in" \u4e8c\n',
    "stage": 2,
    "on": True,
}


def test_the_header_comes_back(path):
    _, header = read_tensors(write_tensors(path, {"x": torch.ones(2)}, HEADER))
    assert header == HEADER


@pytest.mark.parametrize("header", [None, {}, HEADER], ids=["none", "empty", "full"])
def test_a_file_without_tensors_is_a_file(header, path):
    assert read_tensors(write_tensors(path, {}, header)) == ({}, header or {})


def test_folders_are_made_and_a_file_is_replaced(tmp_path):
    path = tmp_path / "a" / "b" / "model.safetensors"
    write_tensors(path, {"x": torch.zeros(3)}, {"epoch": 1})
    before, _ = read_tensors(path)
    write_tensors(path, {"y": torch.ones(2)}, {"epoch": 2})
    read, header = read_tensors(path)
    assert identical(read, {"y": torch.ones(2)})
    assert header == {"epoch": 2}
    assert before["x"].tolist() == [0, 0, 0]  # what was read before does not change with the file
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


# --------------------------------------------------------------------------------------------------- damage


def told(path: Path) -> str:
    with pytest.raises(InvalidData, match=re.escape(str(path))) as caught:
        read_tensors(path)
    assert isinstance(caught.value, BonnQatError)
    return str(caught.value)


@pytest.fixture
def whole(path: Path) -> bytes:
    tensors = {"x": torch.arange(4.0), "half": torch.ones(3, dtype=torch.float16), "n": torch.tensor(3)}
    return write_tensors(path, tensors, {"epoch": 3}).read_bytes()


def test_a_file_that_ends_early_is_told_wherever_it_ends(whole, path):
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert "not a complete safetensors file" in told(path), length
    path.write_bytes(whole)
    assert len(read_tensors(path)[0]) == 3


def test_a_file_with_more_at_its_end_is_told(whole, path):
    path.write_bytes(whole + b"\0")
    assert "not a complete safetensors file" in told(path)


def test_a_broken_byte_of_the_description_is_told(whole, path):
    for index in range(8 + int.from_bytes(whole[:8], "little")):
        path.write_bytes(whole[:index] + bytes([whole[index] ^ 0xFF]) + whole[index + 1 :])
        assert "not a complete safetensors file" in told(path), index


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 100, b"\xff" * 100, b"epoch 3\n" * 20], ids=["empty", "0", "ff", "text"]
)
def test_a_file_of_something_else_is_told(content, path):
    path.write_bytes(content)
    assert "not a complete safetensors file" in told(path)


def test_of_what_safetensors_quotes_of_a_file_a_message_takes_over_little(path):
    header = b'{"x":{"dtype":"F32\\n' + b"a" * 5000 + b'","shape":[],"data_offsets":[0,0]}}'
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    words = told(path).partition(str(path))[2]
    assert "unknown variant `F32 aaaa" in words
    assert len(words) < 1100


def test_a_pickle_is_told_and_not_run(path):
    class Trap:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return os.mkdir, (str(path.parent / "sprung"),)

    torch.save({"x": Trap()}, path)
    assert "not a complete safetensors file" in told(path)
    assert not (path.parent / "sprung").exists()


def test_a_file_of_another_program_is_read_and_a_header_that_is_no_json_is_told(path):
    from safetensors.torch import save_file

    save_file({"x": torch.ones(2)}, path, metadata={"format": "pt"})
    read, header = read_tensors(path)
    assert identical(read, {"x": torch.ones(2)})
    assert header == {}
    save_file({"x": torch.ones(2)}, path, metadata={"bonn_qat": "{epoch"})
    assert "not a complete safetensors file" in told(path)


def test_a_missing_file_and_a_directory_are_told(tmp_path):
    assert "no such file" in told(tmp_path / "none.safetensors")
    assert "cannot read" in told(tmp_path)


# ---------------------------------------------------------------------------------------------- a failed save


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def raising(code: int) -> Callable[..., None]:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("step", ["os.fsync", "pathlib.Path.replace"])
def test_a_full_disk_leaves_the_old_file_and_nothing_else(step, whole, path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(step, raising(errno.ENOSPC))
        with pytest.raises(OSError, match="No space left") as caught:
            write_tensors(path, {"y": torch.zeros(100)})
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == whole
    assert names(path.parent) == [path.name]
    write_tensors(path, {"y": torch.zeros(100)})
    assert list(read_tensors(path)[0]) == ["y"]


def test_a_first_save_that_fails_leaves_nothing(path, monkeypatch):
    monkeypatch.setattr(os, "fsync", raising(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        write_tensors(path, {"y": torch.zeros(100)})
    assert names(path.parent) == []


def test_what_the_system_refuses_to_write_is_an_error_of_the_system(whole, path):
    # Not simulated: a limit on the size of files, which fails in the middle of the writing as a full disk does.
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(OSError, match=os.strerror(errno.EFBIG)) as caught:
            write_tensors(path, {"y": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert caught.value.errno == errno.EFBIG
    assert path.read_bytes() == whole
    assert names(path.parent) == [path.name]


def test_a_header_that_is_no_json_leaves_the_old_file(whole, path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_tensors(path, {"y": torch.zeros(2)}, {"path": path})
    assert path.read_bytes() == whole
    assert names(path.parent) == [path.name]


def test_a_file_in_the_place_of_a_folder_is_an_error_of_the_system(whole, path):
    with pytest.raises(FileExistsError):
        write_tensors(path / "below.safetensors", {"y": torch.zeros(2)})
    assert path.read_bytes() == whole


def test_a_header_that_is_no_table_is_told(path):
    safetensors.torch.save_file({"x": torch.zeros(1)}, path, metadata={"bonn_qat": "3"})
    with pytest.raises(InvalidData, match=r"model\.safetensors has a bonn-qat header that is not a table"):
        read_tensors(path)


def test_a_missing_file_is_told_once(path):
    with pytest.raises(InvalidData) as caught:
        read_tensors(path)
    assert str(caught.value) == f"cannot read {path}: no such file"
