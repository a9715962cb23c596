import math
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bonn_qat.errors import InvalidData, UnknownName
from bonn_qat.training import data


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _images(root: Path, classes: int = 2, count: int = 5, size: int = 20) -> Path:
    rng = np.random.default_rng(0)
    for label in range(classes):
        folder = root / f"class{label}"
        folder.mkdir(parents=True)
        for index in range(count):
            pixels = rng.integers(0, 255, (size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


def test_digits_are_complete_split_and_standardized() -> None:
    digits = data.load("digits")
    assert (digits.train_size + digits.test_size, digits.classes, digits.image) == (1797, 10, (1, 8, 8))
    images = torch.cat([images for images, _ in digits.measure_batches()])
    torch.testing.assert_close(images.mean(), torch.tensor(0.0), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std(), torch.tensor(1.0), atol=1e-3, rtol=0)


def test_order_and_augmentation_depend_on_the_generator_alone() -> None:
    digits = data.load("digits", train_images=64)
    torch.manual_seed(1)
    first = list(digits.train_batches(32, _generator(), augment=True))
    torch.manual_seed(2)
    second = list(digits.train_batches(32, _generator(), augment=True))
    other = list(digits.train_batches(32, _generator(5), augment=True))
    assert all(torch.equal(a, b) and torch.equal(c, d) for (a, c), (b, d) in zip(first, second, strict=True))
    assert not torch.equal(first[0][0], other[0][0])


def test_an_epoch_holds_every_image_once() -> None:
    digits = data.load("digits", train_images=100)
    seen = torch.cat([images for images, _ in digits.train_batches(32, _generator(), augment=False)])
    expected = torch.cat([images for images, _ in digits.measure_batches()])
    assert sorted(map(tuple, seen.flatten(1).tolist())) == sorted(map(tuple, expected.flatten(1).tolist()))


def test_a_last_batch_of_one_image_is_left_out() -> None:
    digits = data.load("digits", train_images=33)
    assert [len(targets) for _, targets in digits.train_batches(32, _generator(), augment=False)] == [32]


def test_augmentation_crops_from_the_reflected_image_and_mirrors() -> None:
    image = torch.arange(36, dtype=torch.uint8).reshape(1, 1, 6, 6)
    padded = torch.nn.functional.pad(image.float(), [2] * 4, mode="reflect").to(torch.uint8)
    crops = {tuple(padded[0, 0, r : r + 6, c : c + 6].flatten().tolist()) for r in range(5) for c in range(5)}
    mirrored = {tuple(torch.tensor(crop).reshape(6, 6).flip(-1).flatten().tolist()) for crop in crops}
    views = data.random_views(200, _generator(), pad=2, flip=True)
    made = data.augmented(image.expand(200, 1, 6, 6), views)
    found = {tuple(crop.flatten().tolist()) for crop in made}
    assert found <= crops | mirrored
    assert found & crops
    assert found & mirrored


def test_a_part_of_the_data_is_the_same_in_every_call() -> None:
    first, second = (list(data.load("digits", train_images=20).measure_batches()) for _ in range(2))
    assert torch.equal(first[0][0], second[0][0])
    with pytest.raises(InvalidData, match="5000 images were requested, but there are only 1438"):
        data.load("digits", train_images=5000)


def _write_cifar10(root: Path) -> None:
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in [*(f"data_batch_{part}" for part in range(1, 6)), "test_batch"]:
        content = {"data": rng.integers(0, 255, (20, 3072), dtype=np.uint8), "labels": [n % 10 for n in range(20)]}
        (folder / name).write_bytes(pickle.dumps(content))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [str(n) for n in range(10)]}))


def test_cifar10_is_opened_by_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _write_cifar10(tmp_path)
    monkeypatch.setattr("torchvision.datasets.CIFAR10._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    cifar = data.load("cifar10", directory=tmp_path)
    assert (cifar.train_size, cifar.test_size, cifar.image, cifar.classes) == (100, 20, (3, 32, 32), 10)


def test_data_that_cannot_be_downloaded_names_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr("torchvision.datasets.CIFAR10.download", refuse)
    with pytest.raises(InvalidData, match=r"cifar10 is not in .* could not be downloaded \(no route\)"):
        data.load("cifar10", directory=tmp_path)


def test_an_image_folder_with_its_own_split(tmp_path: Path) -> None:
    _images(tmp_path / "train")
    _images(tmp_path / "val", count=2)
    folder = data.load(str(tmp_path), size=16)
    assert (folder.train_size, folder.test_size, folder.classes, folder.image) == (10, 4, 2, (3, 16, 16))
    images, targets = next(iter(folder.train_batches(4, _generator(), augment=True)))
    assert images.shape == (4, 3, 16, 16)
    assert set(targets.tolist()) <= {0, 1}
    again, _ = next(iter(folder.train_batches(4, _generator(), augment=True)))
    assert torch.equal(images, again)


def test_an_image_folder_is_cropped_and_mirrored_or_with_the_other_augmentation_scaled_and_coloured(
    tmp_path: Path,
) -> None:
    """A crop is a window of the resized image, 18 = 16 / 0.875 pixels wide; the other augmentation's is not."""
    _images(tmp_path / "train", count=8, size=32)
    _images(tmp_path / "val", count=1, size=32)
    folder = data.load(str(tmp_path), size=16)
    mean, std = (torch.tensor(x)[:, None, None] for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))  # ImageNet's
    pixels = [
        np.asarray(Image.open(path).resize((18, 18), Image.Resampling.BILINEAR)) for path in tmp_path.glob("train/*/*")
    ]
    resized = [(torch.tensor(x).permute(2, 0, 1) / 255 - mean) / std for x in pixels]
    windows = [image[:, y : y + 16, x : x + 16] for image in resized for y in range(3) for x in range(3)]
    known = torch.stack([view for window in windows for view in (window, window.flip(2))])

    def distances(augmentation: str) -> torch.Tensor:
        batches = folder.train_batches(4, _generator(), augment=True, augmentation=augmentation)
        return torch.stack([(known - image).abs().amax((1, 2, 3)).min() for images, _ in batches for image in images])

    assert distances("crop").max() < 1e-5
    assert distances("resized_crop").min() > 1e-2
    with pytest.raises(UnknownName, match="augmentation 'resized'; did you mean 'resized_crop'"):
        next(folder.train_batches(4, _generator(), augment=True, augmentation="resized"))
    with pytest.raises(InvalidData, match="digits has the augmentation 'crop' only; got 'resized_crop'"):
        next(data.load("digits").train_batches(4, _generator(), augment=True, augmentation="resized_crop"))


def test_an_image_folder_without_a_split_holds_a_fifth_out(tmp_path: Path) -> None:
    folder = data.load(str(_images(tmp_path)), size=16)
    assert (folder.train_size, folder.test_size) == (8, 2)
    assert sum(len(targets) for _, targets in folder.test_batches()) == 2


@pytest.mark.parametrize(
    ("name", "error", "words"),
    [
        ("digitz", UnknownName, "unknown data set 'digitz'; did you mean 'digits'"),
        ("no/such/folder", InvalidData, "the image folder no/such/folder does not exist"),
    ],
)
def test_unknown_data_is_told(name: str, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        data.load(name)


def test_a_folder_without_images_is_told(tmp_path: Path) -> None:
    (tmp_path / "class0").mkdir()
    with pytest.raises(InvalidData, match="one folder of images for each class"):
        data.load(str(tmp_path))


def test_labels_out_of_range_are_told() -> None:
    images = torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    good, bad = torch.tensor([0, 1, 0, 1]), torch.tensor([0, 1, 2, 1])
    with pytest.raises(InvalidData, match="labels of the training set of 'x' run from 0 to 2, not 0 to 1"):
        data.TensorData("x", (images, bad), (images, good), classes=2, pad=0, flip=False)
    with pytest.raises(InvalidData, match="the test set of 'x' holds no images"):
        data.TensorData("x", (images, good), (images[:0], good[:0]), classes=2, pad=0, flip=False)


INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool]


@settings(max_examples=60, deadline=None)
@given(
    dtype=st.sampled_from([*INTEGERS, torch.float32, torch.complex64]),
    shape=st.sampled_from([(6,), (5,), (7,), (6, 1), (6, 4), ()]),
    highest=st.integers(0, 5),
    part=st.sampled_from(["training", "test"]),
)
def test_labels_of_any_integer_type_are_class_indices_and_all_else_is_told(
    dtype: torch.dtype, shape: tuple[int, ...], highest: int, part: str
) -> None:
    images, good = torch.randint(256, (6, 1, 8, 8), dtype=torch.uint8), torch.arange(6) % 4
    labels = (torch.arange(math.prod(shape)) % (highest + 1)).reshape(shape).to(dtype)
    sets = {"training": (images, good), "test": (images, good), part: (images, labels)}

    def make() -> data.TensorData:
        return data.TensorData("x", sets["training"], sets["test"], classes=4, pad=0, flip=False)

    if shape == (6,) and dtype in INTEGERS and int(labels.max()) < 4:
        batches = make().measure_batches() if part == "training" else make().test_batches()
        ((_, found),) = list(batches)
        assert torch.equal(found, labels.long())
        return
    with pytest.raises(InvalidData, match=rf"labels of the {part} set of 'x' (are .*; give class indices|run from 0)"):
        make()


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (torch.zeros(4, 8, 8), r"are float32 \(4, 8, 8\); give uint8 \(N, C, H, W\)"),
        (torch.zeros(4, 1, 8, 8).index_fill(0, torch.tensor(2), math.nan), "image 2 of the test set .* holds NaN"),
        (torch.zeros(4, 1, 9, 8), r"are \(1, 8, 8\) in the training set and \(1, 9, 8\) in the test set"),
        ([[0]], "are an object of type list; give"),
    ],
)
def test_images_that_are_none_are_told(images: Any, words: str) -> None:
    good = torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, 0, 1])
    with pytest.raises(InvalidData, match=words):
        data.TensorData("x", good, (images, good[1]), classes=2, pad=0, flip=False)


def test_validation_images_are_held_out_of_the_training_images() -> None:
    whole, part = data.load("digits", train_images=90), data.load("digits", train_images=90, validation_images=30)
    assert (part.train_size, part.test_size) == (60, 30)

    def pixels(found: data.Data, batches: Iterator[data.Batch]) -> set[tuple[float, ...]]:
        images = torch.cat([images for images, _ in batches]) * found._std + found._mean
        return {tuple(row) for row in images.round().flatten(1).tolist()}

    everything, trained = pixels(whole, whole.measure_batches()), pixels(part, part.measure_batches())
    held_out = pixels(part, part.test_batches())
    assert trained | held_out == everything
    assert not trained & held_out
    with pytest.raises(InvalidData, match="cannot hold out 90 of 90 training images"):
        data.load("digits", train_images=90, validation_images=90)


def test_validation_images_of_a_folder_come_without_augmentation(tmp_path: Path) -> None:
    _images(tmp_path / "train", count=6)
    _images(tmp_path / "val", count=2)
    folder = data.load(str(tmp_path), size=16, validation_images=4)
    assert (folder.train_size, folder.test_size) == (8, 4)
    first, second = (torch.cat([images for images, _ in folder.test_batches()]) for _ in range(2))
    assert torch.equal(first, second)


def test_data_on_a_device_give_the_same_batches() -> None:
    digits = data.load("digits", train_images=40)
    moved = digits.to(torch.device("cpu"))
    for one, two in zip(
        digits.train_batches(16, _generator(), augment=True), moved.train_batches(16, _generator(), augment=True),
        strict=True,
    ):  # fmt: skip
        assert torch.equal(one[0], two[0])
        assert torch.equal(one[1], two[1])
    meta = digits.to(torch.device("meta"))  # all tensors have moved, or this would mix devices
    assert {images.device.type for images, _ in meta.train_batches(16, _generator(), augment=True)} == {"meta"}
