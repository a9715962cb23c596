"""Data: labelled images by name or path, in batches. The loaders are torchvision's, scikit-learn's and timm's."""

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor

from bonn_qat.errors import InvalidData, UnknownName

Batch = tuple[Tensor, Tensor]
_TORCHVISION = {"cifar10": "CIFAR10", "cifar100": "CIFAR100", "fashion-mnist": "FashionMNIST"}
NAMES = ("digits", *_TORCHVISION)
_SPLIT_SEED = 0


class Data(ABC):
    """A training and a test set. Images come as ``(B, C, H, W)`` float32, standardised; targets as ``(B,)`` int64."""

    name: str
    classes: int
    image: tuple[int, int, int]
    train_size: int
    test_size: int

    @abstractmethod
    def train_batches(self, batch_size: int, generator: torch.Generator, *, augment: bool) -> Iterator[Batch]:
        """One epoch in an order, and with augmentations, that the generator alone decides."""

    @abstractmethod
    def test_batches(self, batch_size: int = 500) -> Iterator[Batch]:
        """The test set in its order, without augmentation."""

    @abstractmethod
    def measure_batches(self, batch_size: int = 500) -> Iterator[Batch]:
        """The training set in its order, without augmentation."""


@final
class TensorData(Data):
    """Images held in memory as uint8 ``(N, C, H, W)``, augmented in whole batches: pad, crop at random, flip."""

    def __init__(self, name: str, train: Batch, test: Batch, *, classes: int, pad: int, flip: bool) -> None:
        self.name, self.classes = name, classes
        self._train, self._test, self._pad, self._flip = train, test, pad, flip
        self.image = tuple(train[0].shape[1:])  # type: ignore[assignment]
        self.train_size, self.test_size = len(train[0]), len(test[0])
        for part, (images, targets) in (("training", train), ("test", test)):
            if not len(images):
                raise InvalidData(f"the {part} set of {name!r} holds no images")
            low, high = int(targets.min()), int(targets.max())
            if low < 0 or high >= classes:
                raise InvalidData(
                    f"labels of the {part} set of {name!r} run from {low} to {high}, not 0 to {classes - 1}"
                )
        pixels = train[0].transpose(0, 1).flatten(1).float()
        self._mean = pixels.mean(1).view(1, -1, 1, 1)
        self._std = pixels.std(1).clamp(min=1e-3).view(1, -1, 1, 1)

    def _standardise(self, images: Tensor) -> Tensor:
        return (images.float() - self._mean) / self._std

    def train_batches(self, batch_size: int, generator: torch.Generator, *, augment: bool) -> Iterator[Batch]:
        images, targets = self._train
        for indices in torch.split(torch.randperm(len(images), generator=generator), batch_size):
            if len(indices) == 1 < len(images):
                continue  # batch statistics of one image are no statistics
            batch = images[indices]
            if augment:
                batch = augmented(batch, generator, pad=self._pad, flip=self._flip)
            yield self._standardise(batch), targets[indices]

    def test_batches(self, batch_size: int = 500) -> Iterator[Batch]:
        return self._in_order(self._test, batch_size)

    def measure_batches(self, batch_size: int = 500) -> Iterator[Batch]:
        return self._in_order(self._train, batch_size)

    def _in_order(self, part: Batch, batch_size: int) -> Iterator[Batch]:
        for images, targets in zip(*(torch.split(tensor, batch_size) for tensor in part), strict=True):
            yield self._standardise(images), targets


def augmented(images: Tensor, generator: torch.Generator, *, pad: int, flip: bool) -> Tensor:
    """Crop each image at random from itself padded by ``pad`` pixels of reflection, then mirror half of them."""
    count, _, height, width = images.shape
    if pad:
        padded = F.pad(images.float(), [pad] * 4, mode="reflect").to(images.dtype)
        offsets = torch.randint(0, 2 * pad + 1, (2, count, 1), generator=generator)
        rows = (torch.arange(height) + offsets[0])[:, None, :, None]
        columns = (torch.arange(width) + offsets[1])[:, None, None, :]
        channels = torch.arange(images.shape[1])[None, :, None, None]
        images = padded[torch.arange(count)[:, None, None, None], channels, rows, columns]
    if flip:
        mirrored = torch.rand(count, generator=generator) < 0.5
        images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
    return images


@final
class FolderData(Data):
    """An image folder read from disk batch by batch, with timm's transforms for training and evaluation."""

    def __init__(self, root: Path, *, size: int, train_images: int = 0, test_images: int = 0, workers: int = 0) -> None:
        from timm.data import create_transform

        self.name, self.image, self._workers = root.name, (3, size, size), workers
        plain = create_transform((3, size, size), is_training=False)
        train, test = _split_folder(root, train=create_transform((3, size, size), is_training=True), test=plain)
        measure, _ = _split_folder(root, train=plain, test=plain)
        self.classes = len(_classes(train))
        self._train, self._test = _part(train, train_images), _part(test, test_images)
        self._measure = _part(measure, train_images)
        self.train_size, self.test_size = len(self._train), len(self._test)

    def _loader(self, dataset: Any, batch_size: int, **options: Any) -> Iterator[Batch]:
        loader = torch.utils.data.DataLoader(dataset, batch_size, num_workers=self._workers, **options)
        return iter(loader)

    def train_batches(self, batch_size: int, generator: torch.Generator, *, augment: bool) -> Iterator[Batch]:
        # timm's transforms draw from the global generators, which a DataLoader's workers seed from this one.
        with _seeded(int(torch.randint(2**31, (), generator=generator))):
            drop = self.train_size > batch_size and self.train_size % batch_size == 1
            part = self._train if augment else self._measure
            yield from self._loader(part, batch_size, shuffle=True, generator=generator, drop_last=drop)

    def test_batches(self, batch_size: int = 100) -> Iterator[Batch]:
        return self._loader(self._test, batch_size)

    def measure_batches(self, batch_size: int = 100) -> Iterator[Batch]:
        return self._loader(self._measure, batch_size)


@contextlib.contextmanager
def _seeded(seed: int) -> Iterator[None]:
    import random

    state = random.getstate()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(state)


def load(
    name: str, *, directory: Path | None = None, train_images: int = 0, test_images: int = 0, size: int = 224
) -> Data:
    """Load data by name (``digits``, ``cifar10``, ``cifar100``, ``fashion-mnist``) or by the path of an image folder.

    ``directory`` is where the named sets lie or are downloaded to, by default ``data`` or ``BONN_QAT_DATA``.
    ``train_images`` and ``test_images`` take a random part that is the same in every call, 0 all. ``size`` is
    the height and width that an image folder's pictures are brought to.

    Raises UnknownName, or InvalidData for a path that does not exist or holds no images.
    """
    if name == "digits":
        return _digits(train_images, test_images)
    if name in _TORCHVISION:
        root = directory or Path(os.environ.get("BONN_QAT_DATA", "data"))
        return _torchvision(name, root, train_images, test_images)
    path = Path(name)
    if path.is_dir():
        return FolderData(path, size=size, train_images=train_images, test_images=test_images)
    if os.sep in name or path.exists():
        raise InvalidData(f"the image folder {name} does not exist" if not path.exists() else f"{name} is no folder")
    raise UnknownName("data set", name, [*NAMES, "the path of an image folder"])


def _digits(train_images: int, test_images: int) -> Data:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise InvalidData("the digits come with scikit-learn: pip install 'bonn-qat[compare]'") from error
    bunch = load_digits()
    images = torch.tensor(bunch.images * (255 / 16), dtype=torch.float32).round().to(torch.uint8)[:, None]
    targets = torch.tensor(bunch.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    held_out = len(images) // 5
    test, train = order[:held_out], order[held_out:]
    return TensorData(
        "digits",
        _part_of_tensors((images[train], targets[train]), train_images),
        _part_of_tensors((images[test], targets[test]), test_images),
        classes=10, pad=1, flip=False,
    )  # fmt: skip


def _torchvision(name: str, root: Path, train_images: int, test_images: int) -> Data:
    import torchvision

    maker = getattr(torchvision.datasets, _TORCHVISION[name])
    parts = []
    for train, count in ((True, train_images), (False, test_images)):
        dataset = _open_or_download(maker, name, root, train)
        images = torch.as_tensor(dataset.data)
        images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
        parts.append(_part_of_tensors((images, torch.as_tensor(dataset.targets)), count))
        classes = len(dataset.classes)
    return TensorData(name, parts[0], parts[1], classes=classes, pad=4, flip=True)


def _open_or_download(maker: Any, name: str, root: Path, train: bool) -> Any:
    with contextlib.suppress(RuntimeError):
        return maker(root, train=train, download=False)
    try:
        return maker(root, train=train, download=True)
    except (OSError, RuntimeError) as error:
        raise InvalidData(
            f"{name} is not in {root} and could not be downloaded ({error}); name the folder that holds it"
        ) from error


def _part_of_tensors(part: Batch, count: int) -> Batch:
    images, targets = part
    chosen = _chosen(len(images), count)
    return (images, targets) if chosen is None else (images[chosen], targets[chosen])


def _chosen(total: int, count: int) -> Tensor | None:
    if not count:
        return None
    if count > total:
        raise InvalidData(f"{count} images were asked for, there are {total}")
    return torch.randperm(total, generator=torch.Generator().manual_seed(_SPLIT_SEED))[:count]


def _part(dataset: Any, count: int) -> Any:
    chosen = _chosen(len(dataset), count)
    return dataset if chosen is None else torch.utils.data.Subset(dataset, chosen.tolist())


def _split_folder(root: Path, *, train: Any, test: Any) -> tuple[Any, Any]:
    """Training and test set of an image folder: its own ``train`` and ``val`` or ``test``, else a fixed fifth."""
    held_out = next((root / part for part in ("val", "validation", "test") if (root / part).is_dir()), None)
    if (root / "train").is_dir() and held_out is not None:
        return _image_folder(root / "train", train), _image_folder(held_out, test)
    first, second = _image_folder(root, train), _image_folder(root, test)
    order = torch.randperm(len(first), generator=torch.Generator().manual_seed(_SPLIT_SEED)).tolist()
    count = max(1, len(order) // 5)
    return torch.utils.data.Subset(first, order[count:]), torch.utils.data.Subset(second, order[:count])


def _image_folder(root: Path, transform: Any) -> Any:
    from torchvision.datasets import ImageFolder

    try:
        return ImageFolder(root, transform=transform)
    except FileNotFoundError as error:
        raise InvalidData(f"{root} holds no images in one folder for each class: {error}") from error


def _classes(dataset: Any) -> list[str]:
    classes: list[str] = getattr(dataset, "dataset", dataset).classes
    return classes
