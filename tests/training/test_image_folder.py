"""Image folders: generated layouts against the rule, and every kind of picture against its pixels."""

import io
import os
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bonn_qat.errors import InvalidData
from bonn_qat.training import data
from bonn_qat.training.image_folder import read_image, read_layout
from bonn_qat.training.network import build
from bonn_qat.training.recipe import Recipe
from bonn_qat.training.train import train

NAMES = ["a", "B", "cat", "Dog", "n01440764", "with space", "é", "zebra", "10", "9", "trains", "value", "x.y"]
SUFFIXES = [".png", ".JPG", ".jpeg", ".TIF", ".webp", ".Bmp", ".gif"]
JUNK = [
    ".DS_Store", "._1.png", "Thumbs.db", "desktop.ini", "README.md", "labels.csv", ".ipynb_checkpoints/1.png",
    "__MACOSX/._1.png", "__MACOSX/1.png", "@eaDir/1.jpg", ".git/a/1.png",
]  # fmt: skip


def _write(path: Path, content: bytes = b"content") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _fill(root: Path, counts: dict[str, int], draw: random.Random) -> None:
    """Images in each class, some in folders within it, and junk at every level."""
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for index in range(count):
            inner = draw.choice(["", "", f"of {name}", f"of {name}/deeper"])
            _write(root / name / inner / f"{index}{draw.choice(SUFFIXES)}")
        if draw.random() < 0.5:
            _write(root / name / draw.choice(JUNK))
    for _ in range(draw.randrange(3)):
        _write(root / draw.choice(JUNK))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Path]:
    made: list[Path] = []

    def make() -> Path:
        if made:
            shutil.rmtree(made.pop())
        made.append(tmp_path_factory.mktemp("images"))
        return made[-1] / "set"

    return make


@settings(max_examples=120, deadline=None)
@given(
    classes=st.lists(st.sampled_from(NAMES), min_size=2, max_size=5, unique_by=str.casefold),
    train=st.sampled_from([None, "train", "Train", "training"]),
    held_out=st.sampled_from([None, "val", "valid", "validation", "dev", "test", "Test", "VAL"]),
    seed=st.integers(0, 2**32),
)
def test_every_image_has_the_label_of_its_class_in_train(
    folder: Callable[[], Path], classes: list[str], train: str | None, held_out: str | None, seed: int
) -> None:
    root, draw = folder(), random.Random(seed)
    counts = {name: draw.randrange(1, 4) for name in classes}
    _fill(root / train if train else root, counts, draw)
    kept = {name: count for name, count in counts.items() if draw.random() < 0.7} or counts
    if train and held_out:
        _fill(root / held_out, kept, draw)
    found = read_layout(root)
    assert found.classes == sorted(classes)
    for samples, expected, where in ((found.train, counts, train), (found.held_out, kept, held_out)):
        if samples is None:
            assert not (train and held_out)
            continue
        inside = [path.relative_to(root / where if where else root) for path, _, _ in samples]
        assert [sorted(classes)[label] for _, label, _ in samples] == [path.parts[0] for path in inside]
        assert {name: sum(path.parts[0] == name for path in inside) for name in expected} == expected
        assert len(samples) == sum(expected.values())
        assert not any(part.startswith((".", "__", "@")) for path in inside for part in path.parts)
        assert all(size == len(b"content") for _, _, size in samples)


def _odd_class(root: Path) -> Path:
    return _write(root / "val" / "more" / "1.png").parent


def _other_case(root: Path) -> Path:
    return _write(root / "train" / "CAT" / "1.png").parent


def _empty_class(root: Path) -> Path:
    (root / "train" / "none").mkdir()
    _write(root / "train" / "none" / ".hidden.png")
    return root / "train" / "none"


def _same_folder(root: Path) -> Path:
    (root / "train" / "link").symlink_to(root / "train" / "cat")
    return root / "train" / "link"


def _no_classes(root: Path) -> Path:
    shutil.rmtree(root / "train")
    _write(root / "train" / "1.png")
    return root / "val"


def _unlabelled(root: Path) -> Path:
    shutil.rmtree(root / "val")
    return _write(root / "test" / "1.png").parent


def _unknown_set(root: Path) -> Path:
    (root / "val").rename(root / "holdout")
    return root / "holdout"


def _two_of_one_name(root: Path) -> Path:
    shutil.copytree(root / "train", root / "training")
    return root / "training"


def _only_held_out(root: Path) -> Path:
    shutil.rmtree(root / "train")
    return root / "val"


def _renamed_sets(root: Path) -> Path:
    (root / "train").rename(root / "part one")
    (root / "val").rename(root / "part two")
    return root / "part two"


def _within_one(root: Path) -> Path:
    inner = root.parent / "inner"
    root.rename(inner)
    root.mkdir()
    inner.rename(root / "images")
    return root / "images"


FAULTS = [
    (_odd_class, "is a class that .*train does not have"),
    (_other_case, "holds the classes 'CAT' and 'cat'"),
    (_empty_class, "holds no images, so its class cannot be learned"),
    (_same_folder, "a link makes .* a folder of .*cat too|both hold a folder"),
    (_no_classes, "holds val, but no folder train with one folder of images for each class"),
    (_unlabelled, "with folders in it, and test: if test is the held-out set"),
    (_unknown_set, "with folders in it, and holdout: if holdout is the held-out set"),
    (_two_of_one_name, "holds train and training; rename one"),
    (_only_held_out, "holds val, but no folder train"),
    (_renamed_sets, "which both hold a folder cat"),
    (_within_one, "if its classes are in .*images, give that path"),
    (lambda root: _write(root / "train" / "1.png"), "lies beside the folders of the classes"),
    (lambda root: _write(root / "train" / "cat" / "1.heic"), "a format that is not read; convert it to PNG"),
]


@pytest.mark.parametrize(("fault", "words"), FAULTS, ids=lambda value: getattr(value, "__name__", "")[1:])
def test_a_layout_that_is_not_clear_is_told_in_a_line_that_names_the_folder(
    tmp_path: Path, fault: Callable[[Path], Path], words: str
) -> None:
    root = tmp_path / "set"
    for part in ("train", "val"):
        _fill(root / part, {"cat": 2, "dog": 2}, random.Random(0))
    read_layout(root)
    named = fault(root)
    with pytest.raises(InvalidData, match=words) as told:
        read_layout(root)
    assert named.name in str(told.value)
    assert "\n" not in str(told.value)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32), kind=st.sampled_from(["empty", "broken link", "fifo"]))
def test_a_file_that_holds_nothing_is_named_before_anything_is_read(
    folder: Callable[[], Path], seed: int, kind: str
) -> None:
    root, draw = folder(), random.Random(seed)
    for part in ("train", "val"):
        _fill(root / part, {"a": 3, "b": 2}, draw)
    samples = read_layout(root)
    path = draw.choice([*samples.train, *(samples.held_out or [])]).path
    path.unlink()
    {"empty": path.touch, "broken link": lambda: path.symlink_to("nowhere"), "fifo": lambda: os.mkfifo(path)}[kind]()
    with pytest.raises(
        InvalidData, match={"empty": "is empty", "broken link": "link to a file", "fifo": "not a file"}[kind]
    ) as told:
        read_layout(root)
    assert str(path) in str(told.value)


def test_a_link_that_leads_back_adds_nothing(tmp_path: Path) -> None:
    _fill(tmp_path, {"a": 3, "b": 2}, random.Random(1))
    before = read_layout(tmp_path)
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    (tmp_path / "b" / "self").symlink_to(tmp_path / "b")
    assert read_layout(tmp_path) == before
    (tmp_path / "a" / "of b").symlink_to(tmp_path / "b")
    with pytest.raises(InvalidData, match=r"a link makes .* a folder of .*a too"):
        read_layout(tmp_path)


# ---------------------------------------------------------------------------------------------------------- pictures


def _grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[:, :, None], 3, 2)


def _over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[:, :, None] / 255
    return colour * share + 255 * (1 - share)


def _palette(rng: np.random.Generator) -> tuple[Image.Image, np.ndarray]:
    colours = rng.integers(0, 256, (4, 3), dtype=np.uint8)
    places = rng.integers(0, 4, (5, 7), dtype=np.uint8)
    image = Image.fromarray(places, "P")
    image.putpalette(colours.tobytes())
    return image, colours[places]


def _modes(mode: str, rng: np.random.Generator) -> tuple[Image.Image, np.ndarray, dict[str, Any]]:
    """An image of 5 by 7 pixels, what it must be read as, and options for Pillow's ``save``."""
    byte = rng.integers(0, 256, (5, 7), dtype=np.uint8)
    rgb, alpha = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8), rng.integers(0, 256, (5, 7), dtype=np.uint8)
    if mode == "1":
        bits = byte > 127
        return Image.fromarray(bits), _grey(bits * 255), {}
    if mode == "L":
        return Image.fromarray(byte), _grey(byte), {}
    if mode == "LA":
        image = Image.merge("LA", [Image.fromarray(byte), Image.fromarray(alpha)])
        return image, _over_white(_grey(byte), alpha), {}
    if mode == "RGBA":
        return Image.fromarray(np.dstack([rgb, alpha])), _over_white(rgb, alpha), {}
    if mode == "P":
        image, pixels = _palette(rng)
        return image, pixels, {}
    if mode == "P with transparency":
        image, pixels = _palette(rng)
        shown = np.array([0, 255, 128, 17], np.uint8)
        return image, _over_white(pixels, shown[np.asarray(image)]), {"transparency": shown.tobytes()}
    if mode == "CMYK":
        image = Image.fromarray(np.dstack([rgb, byte]), "CMYK")
        return image, np.asarray(image.convert("RGB")), {}
    if mode == "I;16":
        wide = rng.integers(0, 2**16, (5, 7), dtype=np.uint16)
        return Image.fromarray(wide), _grey(wide / 257), {}
    if mode == "F":
        share = rng.random((5, 7), dtype=np.float32)
        return Image.fromarray(share), _grey(share * 255), {}
    return Image.fromarray(rgb), rgb, {}


MODES = {
    "png": ["1", "L", "LA", "RGB", "RGBA", "P", "P with transparency", "I;16"],
    "tiff": ["1", "L", "LA", "RGB", "RGBA", "P", "CMYK", "I;16", "F"],
    "webp": ["RGB", "RGBA"],
    "bmp": ["1", "L", "RGB", "P"],
    "gif": ["L", "P"],
}
KINDS = [(suffix, mode) for suffix, modes in MODES.items() for mode in modes]


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(KINDS), orientation=st.sampled_from([0, *range(1, 9)]), seed=st.integers(0, 2**32))
def test_every_kind_of_picture_is_read_as_what_it_shows(
    folder: Callable[[], Path], kind: tuple[str, str], orientation: int, seed: int
) -> None:
    (suffix, mode), path = kind, folder().with_suffix(f".{kind[0].upper()}")
    image, expected, options = _modes(mode, np.random.default_rng(seed))
    if suffix == "webp":
        options |= {"lossless": True, "exact": True}
    if orientation and suffix in ("png", "tiff", "webp"):
        exif = Image.Exif()
        exif[0x0112] = orientation
        options["exif"] = exif
        turned = {
            2: lambda x: x[:, ::-1], 3: lambda x: x[::-1, ::-1], 4: lambda x: x[::-1],
            5: lambda x: x.swapaxes(0, 1), 6: lambda x: np.rot90(x, -1), 7: lambda x: np.rot90(x.swapaxes(0, 1), 2),
            8: np.rot90,
        }  # fmt: skip
        expected = turned.get(orientation, lambda x: x)(expected)
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    found = read_image(path)
    assert (found.mode, found.size) == ("RGB", expected.shape[1::-1])
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, atol=1.01)


def _png(pixels: np.ndarray, depth: int, transparent: tuple[int, ...]) -> bytes:
    """A PNG of greys ``(H, W)`` or colours ``(H, W, 3)``, one of them transparent; Pillow writes none of 16 bits."""
    kind = f">u{depth // 8}"

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", *pixels.shape[1::-1], depth, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(kind).tobytes() for row in pixels)
    colour = np.array(transparent, ">u2").tobytes()
    parts = chunk(b"IHDR", head) + chunk(b"tRNS", colour) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + parts


@settings(max_examples=60, deadline=None)
@given(depth=st.sampled_from([8, 16]), channels=st.sampled_from([1, 3]), seed=st.integers(0, 2**32))
def test_a_transparent_colour_is_shown_on_white(
    folder: Callable[[], Path], depth: int, channels: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 2**depth, (4, 3))
    colours[:, 0] = rng.permutation(2**8)[:4] * (257 if depth == 16 else 1)  # they differ in the 8 bits that are read
    places = rng.integers(0, 4, (5, 7))
    pixels = colours[places] if channels == 3 else colours[places, 0]
    shown = np.atleast_3d(pixels / (257 if depth == 16 else 1)) * np.ones(3)
    shown[places == 0] = 255
    path = _write(folder() / "1.png", _png(pixels, depth, tuple(colours[0, :channels].tolist())))
    np.testing.assert_allclose(np.asarray(read_image(path), np.float64), shown, atol=1.01)


def test_of_an_animation_the_first_frame_counts(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((4, 4, 3), value, np.uint8)) for value in (10, 200)]
    for suffix in ("gif", "png", "webp", "tiff"):
        options = {"lossless": True} if suffix == "webp" else {}
        frames[0].save(tmp_path / f"1.{suffix}", save_all=True, append_images=frames[1:], **options)
        assert np.asarray(read_image(tmp_path / f"1.{suffix}")).max() == 10, suffix


@pytest.mark.parametrize(
    ("pixels", "words"),
    [
        (np.array([[0.0, 255.0]], np.float32), "run from 0 to 255, where 0 is black and 1 white"),
        (np.array([[0.0, np.nan]], np.float32), "run from nan to nan"),
        (np.array([[0, 70_000]], np.int32), r"run from 0 to 70000, where 0 is black and 65,535 white"),
        (np.array([[-5, 7]], np.int32), "run from -5 to 7"),
    ],
)
def test_pixels_of_an_unknown_range_are_told(tmp_path: Path, pixels: np.ndarray, words: str) -> None:
    path = tmp_path / "1.tiff"
    Image.fromarray(pixels).save(path)
    with pytest.raises(InvalidData, match=f"1.tiff cannot be read as an image: its pixels {words}"):
        read_image(path)


@settings(max_examples=80, deadline=None)
@given(
    suffix=st.sampled_from(["png", "jpeg", "gif", "webp", "bmp", "tiff", "ppm", "tga"]),
    share=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 2**32),
)
def test_a_picture_that_is_cut_off_is_named_or_whole(
    folder: Callable[[], Path], suffix: str, share: float, seed: int
) -> None:
    path = folder().with_suffix(f".{suffix}")
    pixels = np.random.default_rng(seed).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    whole = io.BytesIO()
    Image.fromarray(pixels).save(whole, suffix)
    _write(path, whole.getvalue())
    expected = np.asarray(read_image(path))
    _write(path, whole.getvalue()[: int(share * len(whole.getvalue()))])
    told = ""
    try:
        np.testing.assert_array_equal(np.asarray(read_image(path)), expected)
    except InvalidData as error:
        told = str(error)
    assert not told or (str(path) in told and "\n" not in told)


# ------------------------------------------------------------------------------------------------------- in a training


def _images(root: Path, count: int = 6) -> Path:
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        for index in range(count):
            path = root / name / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (40, 24, 3), dtype=np.uint8)).save(path)
    return root


@pytest.mark.parametrize("workers", [0, 2])
def test_a_broken_picture_ends_the_run_with_its_name_and_the_last_checkpoint_stays(
    tmp_path: Path, workers: int
) -> None:
    images = data.load(_images(tmp_path / "set"), size=32, workers=workers)
    recipe = Recipe(model="wrn10_16", epochs=2, batch_size=5, data="set")
    path, broken = tmp_path / "run.safetensors", images._measure.samples[4].path  # type: ignore[attr-defined]
    whole, steps = broken.read_bytes(), list[None]()

    def tick() -> None:
        steps.append(None)
        if len(steps) == 2:  # the first epoch has read it, the second will
            broken.write_bytes(whole[:300])

    with pytest.raises(InvalidData) as told:
        train(build(recipe, images), recipe, images, checkpoint=path, tick=tick)
    assert str(told.value).count(str(broken)) == 1
    assert "\n" not in str(told.value)
    broken.write_bytes(whole)
    again = data.load(tmp_path / "set", size=32)
    result = train(build(recipe, again), recipe, again, checkpoint=path)
    assert len(result.epochs) == 2


def test_a_resume_on_other_pictures_is_refused(tmp_path: Path) -> None:
    root = _images(tmp_path / "set")
    prints = {data.load(root, size=32).fingerprint, data.load(root, size=32).fingerprint}
    assert len(prints) == 1
    for change in (
        lambda: (root / "a" / "0.png").rename(root / "a" / "zero.png"),
        lambda: (root / "a" / "1.png").rename(root / "b" / "1b.png"),
        lambda: _images(root, 1),
        lambda: Image.fromarray(np.zeros((40, 24, 3), np.uint8)).save(root / "b" / "3.png"),
    ):
        change()
        prints.add(data.load(root, size=32).fingerprint)
    assert len(prints) == 5


@pytest.mark.parametrize(
    ("first", "second"),
    [("train_images", "test_images"), ("seg_train/seg_train/a", "seg_test/seg_test/a"), ("train", "test1"),
     ("training_set/training_set/cats", "test_set/test_set/cats"), ("My-Train", "my-VAL")],
)  # fmt: skip
def test_sets_are_not_taken_for_classes(tmp_path: Path, first: str, second: str) -> None:
    for place in (first, second):
        for index in range(2):
            (tmp_path / place).mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / place / f"{index}.png")
    with pytest.raises(InvalidData, match="parts of a data set by their names, not classes") as caught:
        read_layout(tmp_path)
    assert first.split("/")[0] in str(caught.value)
    assert second.split("/")[0] in str(caught.value)
