"""Data: labelled images by name or path, in batches, read by torchvision, scikit-learn, Pillow and timm."""

import contextlib
import copy
import functools
import hashlib
import math
import os
import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from bonn_qat.errors import InvalidData, UnknownName
from bonn_qat.files.plain import one_line, printable
from bonn_qat.files.preprocessing import Preprocessing
from bonn_qat.regularizers import class_indices, described

Batch = tuple[Tensor, Tensor]
Shard = tuple[int, int]
WHOLE: Shard = (0, 1)
_TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion-mnist": "FashionMNIST"}
NAMES = ("digits", *_TORCHVISION)
_SPLIT_SEED = 0
CROP = 0.875  # of the scaled images of a folder, as timm has it


class Data(ABC):
    """A training and a test set. Images are ``(B, C, H, W)`` float32, standardized; targets are ``(B,)`` int64.

    ``shard`` is (rank, world size). Each process gets an equal part of every training batch, so that up to
    ``world - 1`` images of the last batch are left out, and every ``world``-th batch of the other sets.
    ``preprocessing`` says how its images were standardized and what its classes are called; None if it is not known.
    """

    name: str
    classes: int
    image: tuple[int, int, int]
    train_size: int
    test_size: int
    preprocessing: Preprocessing | None = None

    def describe(self) -> dict[str, Any]:
        """What identifies the data: ``name``, ``classes``, ``image`` ``[C, H, W]``, ``train`` and ``test`` (sizes)."""
        return {
            "name": self.name,
            "classes": self.classes,
            "image": list(self.image),
            "train": self.train_size,
            "test": self.test_size,
        }

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the content, so that no run goes on with other data; by default of the first batch of each set.

        Equal for equal data, and for data that differ only in what is not hashed.
        """
        firsts = [next(iter(batches)) for batches in (self.measure_batches(), self.test_batches())]
        return _digest([tensor for batch in firsts for tensor in batch])

    def to(self, device: torch.device) -> "Data":
        """The same data in the memory of ``device``, if this kind of data can be held there."""
        return self

    @abstractmethod
    def train_batches(
        self,
        batch_size: int,
        generator: torch.Generator,
        *,
        augment: bool,
        augmentation: str = "crop",
        shard: Shard = WHOLE,
        start: int = 0,
    ) -> Iterator[Batch]:
        """One epoch, shuffled and augmented by ``generator`` alone, from the batch with the index ``start`` on.

        Batches do not depend on ``start``. ``augmentation`` is that of a recipe, used if ``augment`` is true. Raises
        InvalidData for one that this data does not have.
        """

    @abstractmethod
    def test_batches(self, batch_size: int = 500, *, shard: Shard = WHOLE) -> Iterator[Batch]:
        """The test set in its order, without augmentation."""

    @abstractmethod
    def measure_batches(self, batch_size: int = 500, *, shard: Shard = WHOLE) -> Iterator[Batch]:
        """The training set in its order, without augmentation."""


@final
class TensorData(Data):
    """Images in memory as uint8 ``(N, C, H, W)``, augmented in whole batches: pad, random crop, random flip.

    ``to`` moves them into a GPU's memory; then only the random numbers of an epoch are copied there. ``train`` and
    ``test`` are images and class indices ``(N,)`` of any integer type or bool, ``labels`` the names of the classes.

    Raises InvalidData for empty sets, images of another shape, that are not numbers or hold NaN, and for other labels.
    """

    def __init__(
        self, name: str, train: Batch, test: Batch, *, classes: int, pad: int, flip: bool, labels: Sequence[str] = ()
    ) -> None:
        train = _checked(f"training set of {name!r}", *train, classes)
        test = _checked(f"test set of {name!r}", *test, classes)
        if test[0].shape[1:] != train[0].shape[1:]:
            raise InvalidData(
                f"the images of {name!r} are {tuple(train[0].shape[1:])} in the training set and "
                f"{tuple(test[0].shape[1:])} in the test set; give both one size"
            )
        self.name, self.classes = name, classes
        self._train, self._test, self._pad, self._flip = train, test, pad, flip
        self.image = tuple(train[0].shape[1:])  # type: ignore[assignment]
        self.train_size, self.test_size = len(train[0]), len(test[0])
        pixels = train[0].transpose(0, 1).flatten(1).float()
        self._mean = pixels.mean(1).view(1, -1, 1, 1)
        self._std = pixels.std(1).clamp(min=1e-3).view(1, -1, 1, 1)
        mean, std = ((statistic.flatten() / 255).tolist() for statistic in (self._mean, self._std))
        self.preprocessing = Preprocessing(mean=tuple(mean), std=tuple(std), labels=tuple(labels))

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of all images and labels."""
        return _digest([*self._train, *self._test])

    def to(self, device: torch.device) -> "TensorData":
        moved = copy.copy(self)
        moved._train, moved._test = (
            (images.to(device), targets.to(device)) for images, targets in (self._train, self._test)
        )
        moved._mean, moved._std = self._mean.to(device), self._std.to(device)
        return moved

    def _standardize(self, images: Tensor) -> Tensor:
        return (images.float() - self._mean).div_(self._std)

    def train_batches(
        self,
        batch_size: int,
        generator: torch.Generator,
        *,
        augment: bool,
        augmentation: str = "crop",
        shard: Shard = WHOLE,
        start: int = 0,
    ) -> Iterator[Batch]:
        if augment and augmentation != "crop":
            raise InvalidData(f"{self.name} has the augmentation 'crop' only; got {augmentation!r}")
        images, targets = self._train
        order = torch.randperm(len(images), generator=generator)
        views = random_views(len(images), generator, pad=self._pad, flip=self._flip) if augment else None
        # All at once, because a copy from pageable memory makes the GPU wait.
        order = order.to(images.device)
        views = views and Views(*(part.to(images.device) for part in views))
        for first in range(start * batch_size, len(images), batch_size):
            end = min(first + batch_size, len(images))
            own = slice(first + shard[0], end - (end - first) % shard[1], shard[1])
            chosen = order[own]
            if len(chosen) < _least(batch_size, len(images), shard[1]):
                continue
            batch = images[chosen]
            if views:
                batch = augmented(batch, Views(*(part[own] for part in views)))
            yield self._standardize(batch), targets[chosen]

    def test_batches(self, batch_size: int = 500, *, shard: Shard = WHOLE) -> Iterator[Batch]:
        return self._in_order(self._test, batch_size, shard)

    def measure_batches(self, batch_size: int = 500, *, shard: Shard = WHOLE) -> Iterator[Batch]:
        return self._in_order(self._train, batch_size, shard)

    def _in_order(self, part: Batch, batch_size: int, shard: Shard) -> Iterator[Batch]:
        for images, targets in _sharded(
            list(zip(*(torch.split(tensor, batch_size) for tensor in part), strict=True)), shard
        ):
            yield self._standardize(images), targets


def _checked(part: str, images: Any, targets: Any, classes: int) -> Batch:
    """Images and labels in the types that batches are made of."""
    if not isinstance(images, Tensor) or images.ndim != 4 or images.is_complex():
        raise InvalidData(f"the images of the {part} are {described(images)}; give uint8 (N, C, H, W)")
    if not len(images):
        raise InvalidData(f"the {part} holds no images")
    if not bool(images.sum(dtype=torch.float64).isfinite()):
        first = int((~images.flatten(1).isfinite().all(1)).nonzero()[0])
        raise InvalidData(f"image {first} of the {part}, counted from 0, holds NaN or infinity; remove such images")
    indices = class_indices(targets, images.shape[:1])
    if indices is None:
        raise InvalidData(
            f"the labels of the {part} are {described(targets)}; give class indices ({len(images)},), whole numbers: "
            "labels.long() of floats, labels.argmax(1) of one-hot labels"
        )
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= classes:
        raise InvalidData(f"labels of the {part} run from {low} to {high}, not 0 to {classes - 1}")
    return images, indices


def _digest(tensors: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _least(batch_size: int, total: int, world: int) -> int:
    """The fewest images that a process trains on at once: 2, because one has no batch statistics, unless all have 1."""
    return min(2, min(batch_size, total) // world)


def _sharded(batches: list[Any], shard: Shard) -> list[Any]:
    # Whole batches, so that batch statistics do not depend on the number of processes.
    rank, world = shard
    return batches[rank::world]


class Views(NamedTuple):
    """The shift of each image in pixels and whether it is mirrored: ``(B,)`` each."""

    down: Tensor
    right: Tensor
    mirrored: Tensor


def random_views(count: int, generator: torch.Generator, *, pad: int, flip: bool) -> Views:
    """Random shifts from ``-pad`` to ``pad``, and with ``flip`` half of the images mirrored."""
    down, right = torch.randint(-pad, pad + 1, (2, count), generator=generator)
    return Views(down, right, (torch.rand(count, generator=generator) < 0.5) & flip)


def augmented(images: Tensor, views: Views) -> Tensor:
    """Shift each image ``(B, C, H, W)``, filling up with its reflection, then mirror it."""
    (count, channels, height, width), device = images.shape, images.device
    columns = torch.arange(width, device=device)
    columns = torch.where(views.mirrored[:, None], columns.flip(0), columns)
    rows = _reflected(torch.arange(height, device=device) + views.down[:, None], height)
    columns = _reflected(columns + views.right[:, None], width)
    places = (rows[:, :, None] * width + columns[:, None]).view(count, 1, -1).expand(-1, channels, -1)
    return images.flatten(2).gather(2, places).view_as(images)


def _reflected(places: Tensor, length: int) -> Tensor:
    return (length - 1) - ((length - 1) - places.abs()).abs()


@final
class FolderData(Data):
    """An image folder, read from disk in batches, with timm's transforms for training and evaluation.

    :mod:`bonn_qat.training.image_folder` says which layouts and files it reads. Without a held-out set a fixed random
    fifth of the images is held out. Raises InvalidData for a layout that is not clear; iterating over batches raises
    InvalidData naming a file that cannot be read.
    """

    def __init__(
        self,
        root: str | Path,
        *,
        size: int,
        train_images: int = 0,
        test_images: int = 0,
        validation_images: int = 0,
        workers: int = 0,
        crop: float = CROP,
    ) -> None:
        from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, create_transform

        from bonn_qat.training.image_folder import Images, read_layout

        layout = read_layout(Path(root))
        self.name, self.image, self._workers = Path(root).name, (3, size, size), workers
        self.classes = len(layout.classes)
        self.preprocessing = Preprocessing(
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            labels=tuple(one_line(printable(name)) for name in layout.classes),
            crop=crop,
        )
        train, test = layout.train, layout.held_out
        if test is None:
            if len(train) < 2:
                raise InvalidData(f"{root} holds {len(train)} image; at least two are needed, one of them to test with")
            order = torch.randperm(len(train), generator=torch.Generator().manual_seed(_SPLIT_SEED)).tolist()
            count = max(1, len(order) // 5)
            train, test = [train[i] for i in order[count:]], [train[i] for i in order[:count]]
        train, test = _part(train, train_images), _part(test, test_images)
        if validation_images:
            kept, held_out = _held_out(len(train), validation_images)
            train, test = [train[i] for i in kept.tolist()], [train[i] for i in held_out.tolist()]
        plain = create_transform((3, size, size), is_training=False, crop_pct=crop)
        images = functools.partial(Images, Path(root), layout.classes)
        self._augmented = {name: images(train, transform) for name, transform in _augmentations(size, crop).items()}
        self._train, self._measure, self._test = self._augmented["crop"], images(train, plain), images(test, plain)
        self.train_size, self.test_size = len(train), len(test)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the names, labels and sizes of all files, and of the content of 64 files spread over them."""
        samples = self._measure.samples + self._test.samples
        parts = [f"{path.parent.name}/{path.name} {label} {size}" for path, label, size in samples]
        digest = hashlib.sha256("\n".join([*map(str, self.image), str(self.train_size), *parts]).encode())
        for path, _, _ in samples[:: math.ceil(len(samples) / 64)]:
            digest.update(path.read_bytes())
        return digest.hexdigest()

    def _loader(self, dataset: Any, batches: list[Any]) -> Iterator[Batch]:
        # With its own generator a loader does not draw from the global one.
        loader = torch.utils.data.DataLoader(
            dataset, batch_sampler=batches, num_workers=self._workers, generator=torch.Generator(),
            pin_memory=torch.cuda.is_available(), collate_fn=_collate,
        )  # fmt: skip
        for batch in loader:
            if isinstance(batch, InvalidData):
                raise batch
            yield batch

    def train_batches(
        self,
        batch_size: int,
        generator: torch.Generator,
        *,
        augment: bool,
        augmentation: str = "crop",
        shard: Shard = WHOLE,
        start: int = 0,
    ) -> Iterator[Batch]:
        if augmentation not in self._augmented:
            raise UnknownName("augmentation", augmentation, self._augmented)
        part = self._augmented[augmentation] if augment else self._measure
        order = torch.randperm(self.train_size, generator=generator).tolist()
        seeds = torch.randint(2**32, (self.train_size,), generator=generator).tolist()
        images = list(zip(order, seeds, strict=True))
        rank, world = shard
        whole = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
        batches = [batch[: len(batch) - len(batch) % world][rank::world] for batch in whole]
        least = _least(batch_size, len(images), world)
        own = [batch for batch in batches if len(batch) >= least]
        return self._loader(_SeededImages(part), own[start:])

    def test_batches(self, batch_size: int = 100, *, shard: Shard = WHOLE) -> Iterator[Batch]:
        return self._in_order(self._test, batch_size, shard)

    def measure_batches(self, batch_size: int = 100, *, shard: Shard = WHOLE) -> Iterator[Batch]:
        return self._in_order(self._measure, batch_size, shard)

    def _in_order(self, part: Any, batch_size: int, shard: Shard) -> Iterator[Batch]:
        places = range(len(part))
        batches = [places[i : i + batch_size] for i in range(0, len(part), batch_size)]
        return self._loader(part, _sharded(batches, shard))


class _SeededImages(torch.utils.data.Dataset[Any]):
    """Images by (index, seed): the random transforms of an image depend on its seed alone.

    They depend neither on earlier images nor on the worker process.
    """

    def __init__(self, images: Any) -> None:
        self._images = images

    def __getitem__(self, item: tuple[int, int]) -> Any:
        place, seed = item
        with _seeded(seed):
            return self._images[place]


def _augmentations(size: int, share: float) -> dict[str, Any]:
    """The transforms of a recipe's ``augmentation``.

    ``"crop"`` resizes as for evaluation, then crops and mirrors at random; ``"resized_crop"`` is timm's.
    """
    from timm.data import create_transform
    from torchvision.transforms import CenterCrop, Compose, RandomCrop, RandomHorizontalFlip

    crop = Compose([RandomCrop(size), RandomHorizontalFlip()])
    plain = create_transform((3, size, size), is_training=False, crop_pct=share)
    return {
        "crop": Compose([crop if isinstance(part, CenterCrop) else part for part in plain.transforms]),
        "resized_crop": create_transform((3, size, size), is_training=True),
    }


def _collate(items: list[Any]) -> Any:
    broken = next((item for item in items if isinstance(item, InvalidData)), None)
    return torch.utils.data.default_collate(items) if broken is None else broken


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed the global generators, which timm's transforms draw from, within the block."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def load(
    name: str | Path,
    *,
    directory: str | Path | None = None,
    train_images: int = 0,
    test_images: int = 0,
    validation_images: int = 0,
    size: int = 224,
    workers: int = 0,
    crop: float = CROP,
) -> Data:
    """Load data by name (``digits``, ``cifar10``, ``cifar100``, ``fashion-mnist``) or by the path of an image folder.

    A folder has one folder of images for each class, or ``train`` and ``val`` with these in them
    (:mod:`bonn_qat.training.image_folder`). ``directory`` holds the named sets, or they are downloaded to it; by
    default ``BONN_QAT_DATA`` or else ``data``. ``train_images`` and ``test_images`` take a fixed random part, 0 all.
    With ``validation_images``, a fixed random part of the training images is held out and replaces the test set.
    ``size`` is the height and width of the images of a folder: each is scaled to cover ``size / crop``, and the middle
    of it is cut out. ``workers`` is the number of processes that read them.

    >>> data = load("digits", train_images=100)
    >>> data.image, data.classes, data.train_size
    ((1, 8, 8), 10, 100)

    Raises UnknownName, and InvalidData for a path that does not exist, a folder whose layout is not clear, and too many
    images.
    """
    name = str(name)
    parts = train_images, test_images, validation_images
    if name == "digits":
        return _digits(parts)
    if name in _TORCHVISION:
        root = Path(directory or os.environ.get("BONN_QAT_DATA", "data"))
        return _torchvision(name, root, parts)
    path = Path(name)
    if path.is_dir():
        return FolderData(
            path,
            size=size,
            train_images=train_images,
            test_images=test_images,
            validation_images=validation_images,
            workers=workers,
            crop=crop,
        )
    if os.sep in name or path.exists():
        raise InvalidData(f"the image folder {name} does not exist" if not path.exists() else f"{name} is not a folder")
    raise UnknownName("data set", name, [*NAMES, "the path of an image folder"])


def _digits(parts: tuple[int, int, int]) -> Data:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InvalidData("the digits are part of scikit-learn: pip install 'bonn-qat[compare]'") from error
    bunch = load_digits()
    images = torch.tensor(bunch.images * (255 / 16), dtype=torch.float32).round().to(torch.uint8)[:, None]
    targets = torch.tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    held_out = len(images) // 5
    test, train = order[:held_out], order[held_out:]
    chosen = _chosen_tensors((images[train], targets[train]), (images[test], targets[test]), parts)
    return TensorData("digits", *chosen, classes=10, pad=1, flip=False, labels=[str(digit) for digit in range(10)])


def _torchvision(name: str, root: Path, parts: tuple[int, int, int]) -> Data:
    import torchvision

    maker = getattr(torchvision.datasets, _TORCHVISION[name])
    tensors = []
    for train in (True, False):
        dataset = _open_or_download(maker, name, root, train)
        images = torch.as_tensor(dataset.data)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        tensors.append((images, torch.as_tensor(dataset.targets)))
    chosen = _chosen_tensors(tensors[0], tensors[1], parts)
    return TensorData(name, *chosen, classes=len(dataset.classes), pad=4, flip=True, labels=dataset.classes)


def _open_or_download(maker: Any, name: str, root: Path, train: bool) -> Any:
    with contextlib.suppress(RuntimeError):
        return maker(root, train=train, download=False)
    try:
        return maker(root, train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise InvalidData(
            f"{name} is not in {root} and could not be downloaded ({one_line(error)}); name the folder that holds it"
        ) from error


def _chosen_tensors(train: Batch, test: Batch, parts: tuple[int, int, int]) -> tuple[Batch, Batch]:
    train_images, test_images, validation_images = parts
    train, test = (_part_of_tensors(part, count) for part, count in ((train, train_images), (test, test_images)))
    if not validation_images:
        return train, test
    kept, held_out = _held_out(len(train[0]), validation_images)
    return (train[0][kept], train[1][kept]), (train[0][held_out], train[1][held_out])


def _held_out(total: int, count: int) -> tuple[Tensor, Tensor]:
    """Indices of the images to train on, and of those held out."""
    if count >= total:
        raise InvalidData(f"cannot hold out {count} of {total} training images for validation")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(_SPLIT_SEED + 1))
    return order[count:], order[:count]


def _part_of_tensors(part: Batch, count: int) -> Batch:
    images, targets = part
    chosen = _chosen(len(images), count)
    return (images, targets) if chosen is None else (images[chosen], targets[chosen])


def _chosen(total: int, count: int) -> Tensor | None:
    if not count:
        return None
    if count > total:
        raise InvalidData(f"{count} images were requested, but there are only {total}")
    return torch.randperm(total, generator=torch.Generator().manual_seed(_SPLIT_SEED))[:count]


def _part(samples: list[Any], count: int) -> list[Any]:
    chosen = _chosen(len(samples), count)
    return samples if chosen is None else [samples[i] for i in chosen.tolist()]
