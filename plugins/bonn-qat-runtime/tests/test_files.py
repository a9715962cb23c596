import json
from pathlib import Path

import bonn_qat_runtime
import numpy as np
import pytest
from bonn_qat_runtime.cli import main
from bonn_qat_runtime.files import digest, read_packed
from PIL import Image

import bonn_qat
from bonn_qat.files.preprocessing import Preprocessing
from bonn_qat.training.evaluate import predict


@pytest.fixture
def content(packed):
    return packed("wrn10_16", "bonn", 16).read_bytes()


def split(content):
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def joined(entries, data):
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_the_checksum_is_bonn_qats(packed):
    path = packed("wrn10_16", "bonn", 16)
    file = read_packed(path)
    assert (file.name, file.scheme, file.input_size) == ("WideResNet", "bonn", (3, 16, 16))
    assert file.tensors.keys() == bonn_qat.PackedModel.load(path).tensors().keys()


def test_a_truncated_file_is_refused(content, tmp_path):
    path = tmp_path / "net.safetensors"
    for length in (0, 7, 8, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(bonn_qat_runtime.InvalidFile, match=str(path)):
            bonn_qat_runtime.Network(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(bonn_qat_runtime.InvalidFile, match="does not end where"):
        bonn_qat_runtime.Network(path)


def test_an_altered_file_is_refused(content, tmp_path):
    path, random = tmp_path / "net.safetensors", np.random.default_rng(0)
    for place in random.integers(0, len(content), 200):
        altered = bytearray(content)
        altered[place] ^= 1 << random.integers(8)
        path.write_bytes(altered)
        try:
            bonn_qat_runtime.Network(path)
        except bonn_qat_runtime.InvalidFile:
            continue
        assert split(bytes(altered)) == split(content)  # as a blank that became a tab


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda table: table.update(kind="weights"), "not a packed network"),
        (lambda table: table.update(format=3), "of format 3; .* reads 2"),
        (lambda table: table.update(scheme="xnor"), "altered after it was written"),
    ],
)
def test_another_kind_or_version_is_refused(content, tmp_path, change, reason):
    path = tmp_path / "net.safetensors"
    entries, data = split(content)
    table = json.loads(entries["__metadata__"]["bonn_qat"])
    change(table)
    entries["__metadata__"]["bonn_qat"] = json.dumps(table)
    path.write_bytes(joined(entries, data))
    with pytest.raises(bonn_qat_runtime.InvalidFile, match=reason):
        bonn_qat_runtime.Network(path)


def test_nodes_with_a_right_checksum_that_make_no_sense_are_refused(packed, tmp_path):
    path = packed("wrn10_16", "bonn", 16)
    entries, data = split(path.read_bytes())
    table = json.loads(entries["__metadata__"]["bonn_qat"])
    tensors, random = read_packed(path).tensors, np.random.default_rng(0)
    table.pop("sha256")
    new, calls = tmp_path / "net", [node for node in table["nodes"] if "args" in node]
    messages = []
    odd = [None, -1, 0, 2**40, 1.5, "x", [], [3, 3], {"node": "x"}, {"node": "nobody"}, {"dtype": "float32"}, True]
    for _ in range(300):
        node = calls[random.integers(len(calls))]
        place, value = int(random.integers(len(node["args"]))), odd[random.integers(len(odd))]
        before, node["args"][place] = node["args"][place], value
        text = json.dumps(table | {"sha256": digest(tensors, table)})
        node["args"][place] = before
        new.write_bytes(joined(entries | {"__metadata__": {"bonn_qat": text}}, data))
        try:
            network = bonn_qat_runtime.Network(new)
        except (bonn_qat_runtime.InvalidFile, bonn_qat_runtime.UnsupportedOperator) as error:
            messages.append(str(error))
        else:
            assert len(network(np.zeros((1, 3, 16, 16), np.float32))) == 1
    assert len(messages) > 200
    assert all(str(new) in message for message in messages)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    for path in (tmp_path / "none", tmp_path):
        with pytest.raises(bonn_qat_runtime.InvalidFile, match=str(path)):
            bonn_qat_runtime.Network(path)


@pytest.fixture
def known(packed, tmp_path):
    """A packed network that knows its images and classes, and some images."""
    model = bonn_qat.PackedModel.load(packed("wrn10_16", "bonn", 16))
    labels = tuple(f"kind {i}" for i in range(10))
    model.preprocessing = Preprocessing(mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4), labels=labels, crop=0.875)
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 4), np.uint8)
    images = {"rgb.png": pixels[..., :3], "rgba.png": pixels, "grey.png": pixels[..., 0]}
    images["deep.png"] = pixels[..., 0].astype(np.uint16) * 257
    for name, array in images.items():
        Image.fromarray(array).save(tmp_path / name)
    return model.save(tmp_path / "net.safetensors"), [tmp_path / name for name in images]


def test_the_command_sees_what_bonn_qat_predict_sees(known, capsys):
    path, images = known
    assert main([str(path), *map(str, images), "--top", "2"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for line, image, guesses in zip(lines, images, predict(bonn_qat.PackedModel.load(path), images), strict=True):
        shown = ", ".join(f"{guess.label} {100 * guess.probability:.1f}%" for guess in guesses[:2])
        assert line == f"{image}: {shown}"


def test_the_command_names_what_it_cannot_read(known, packed, capsys, tmp_path):
    path, images = known
    broken = Path(tmp_path / "broken.png")
    broken.write_bytes(images[0].read_bytes()[:200])
    for arguments in ([str(path), str(broken)], [str(broken), str(images[0])],
                      [str(packed("wrn10_16", "bonn", 16)), str(images[0])]):  # fmt: skip
        assert main(arguments) == 1
        assert capsys.readouterr().err.startswith("bonn-qat-run: ")
