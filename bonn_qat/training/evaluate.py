"""Evaluate: the accuracy of a trained network on labelled images, and its answers for image files."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from bonn_qat.errors import InvalidData, InvalidModel, check_model
from bonn_qat.files.plain import shown
from bonn_qat.files.preprocessing import Preprocessing, preprocessing_of
from bonn_qat.modes import modes
from bonn_qat.training.data import Batch, Data

TOP = 5


class Accuracy(NamedTuple):
    """``top1`` and ``top5`` in percent, the latter None for up to five classes; the mean cross entropy ``loss``."""

    top1: float
    top5: float | None
    loss: float
    images: int


class Guess(NamedTuple):
    """A class, by its name or else its number, and its probability."""

    label: str
    probability: float


def evaluate(model: nn.Module, data: Data) -> Accuracy:
    """The accuracy of a network, trained or packed, on the test set of ``data``, computed in evaluation mode.

    Images are standardized as in the network's training, ``model.preprocessing``, where that is known. The model and
    its mode stay as they are.

    >>> data = bonn_qat.load_data("digits")  # doctest: +SKIP
    >>> bonn_qat.evaluate(bonn_qat.load("runs/bonn-0.01-seed0.safetensors"), data).top1  # doctest: +SKIP
    93.59

    Raises InvalidData for images or classes that the network was not made for, and for images with NaN. Warns if the
    network and the data have other names for their classes.
    """
    check_model(model)
    known, size = preprocessing_of(model), _input_size(model)
    channels = len(known.mean) if known else size[0] if size and len(size) == 3 else data.image[0]
    if channels != data.image[0]:
        raise InvalidData(
            f"the network takes images with {channels} channel(s); those of the data have {data.image[0]}"
        )
    device = _device(model)
    adapt = restandardize(data.preprocessing, known, device)
    batches = ((adapt(images.to(device)), targets) for images, targets in data.test_batches())
    with modes(model), torch.no_grad():
        sums = tally(model, batches, data.classes)
    top1, top5, loss, spoilt = (sums / data.test_size).tolist()
    if spoilt:
        raise InvalidData(f"images of the test set of {data.name} hold NaN or infinity; remove them")
    warn_of_other_labels(known, data, "the accuracy counts the numbers of classes, not their names")
    return Accuracy(100 * top1, 100 * top5 if data.classes > TOP else None, loss, data.test_size)


def tally(model: nn.Module, batches: Iterable[Batch], classes: int | None = None) -> Tensor:
    """Sums over the images: right answers, right ones among the first five, cross entropy, batches with NaN: ``(4,)``.

    Raises InvalidData for logits that are not ``(B, classes)``, if ``classes`` are given.
    """
    device = _device(model)
    sums = torch.zeros(4, device=device)
    for images, targets in batches:
        logits = model(images.to(device))
        if classes is not None and logits.shape != (len(targets), classes):
            raise InvalidData(
                f"the data have {classes} classes; the network returns {tuple(logits.shape)} for {len(targets)} images"
            )
        targets = targets.to(device)
        right = logits.topk(min(TOP, logits.shape[1])).indices == targets[:, None]
        loss = nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        sums += torch.stack([right[:, 0].sum(), right.sum(), loss, ~images.sum().isfinite().to(device)])
    return sums


def predict(model: nn.Module, paths: Sequence[str | Path], *, top: int = TOP) -> Iterator[list[Guess]]:
    """For each image file the ``top`` classes that a network, trained or packed, gives the highest probability.

    Of an image the part ``model.preprocessing.crop``, in its middle, is scaled so that it covers the network's image
    size, and what juts out is cut off on both sides, as in the evaluation of image folders.

    Raises InvalidModel for a network that does not know its images' size and standardization, InvalidData naming a file
    that cannot be read as an image.
    """
    from PIL import Image, ImageOps

    from bonn_qat.training.image_folder import read_image

    check_model(model)
    size, known = _input_size(model), preprocessing_of(model)
    if size is None or len(size) != 3 or size[0] not in (1, 3) or known is None or len(known.mean) != size[0]:
        raise InvalidModel(
            f"{type(model).__name__} does not say which images it takes; predict needs model.preprocessing, which "
            "weights files of training runs have"
        )
    for path in paths:
        image = read_image(Path(path)).convert("L" if size[0] == 1 else "RGB")
        image = ImageOps.fit(image, (size[2], size[1]), Image.Resampling.BILINEAR, bleed=(1 - known.crop) / 2)
        pixels = torch.tensor(np.asarray(image), dtype=torch.float32).view(size[1], size[2], size[0])
        mean, std = _statistics(known, pixels.device)
        batch = (pixels.permute(2, 0, 1)[None] / 255 - mean) / std
        with modes(model), torch.no_grad():
            chances = model(batch.to(_device(model)))[0].float().softmax(0)
        found = chances.topk(min(top, len(chances)))
        names = known.labels if len(known.labels) == len(chances) else [f"class {i}" for i in range(len(chances))]
        yield [Guess(names[i], p) for i, p in zip(found.indices.tolist(), found.values.tolist(), strict=True)]


def _input_size(model: nn.Module) -> tuple[int, ...] | None:
    size: tuple[int, ...] | None = getattr(getattr(model, "binarization", model), "input_size", None)
    return size


def warn_of_other_labels(known: Preprocessing | None, data: Data, consequence: str) -> None:
    """Warn, with the ``consequence``, if a network's classes have other names than those of ``data``."""
    own, given = (of.labels if of else () for of in (known, data.preprocessing))
    if own and given and own != given:
        place = next((i for i, (a, b) in enumerate(zip(own, given, strict=False)) if a != b), 0)
        warnings.warn(
            f"class {place} is {shown(own[place])} for the network and {shown(given[place])} in {data.name}; "
            f"{consequence}",
            stacklevel=3,
        )


def restandardize(
    given: Preprocessing | None, wanted: Preprocessing | None, device: torch.device
) -> Callable[[Tensor], Tensor]:
    """A function of images ``(B, C, H, W)`` on ``device`` that are standardized as ``given``: makes them ``wanted``.

    It changes nothing where either is None.
    """
    if given is None or wanted is None or (given.mean, given.std) == (wanted.mean, wanted.std):
        return lambda images: images
    (mean, std), (own_mean, own_std) = (_statistics(of, device) for of in (given, wanted))
    return lambda images: (images * std + mean - own_mean) / own_std


def _statistics(of: Preprocessing, device: torch.device) -> Tensor:
    """Mean and standard deviation of each channel, ``(2, C, 1, 1)``."""
    return torch.tensor([of.mean, of.std], device=device)[..., None, None]


def _device(model: nn.Module) -> torch.device:
    for tensor in (*model.parameters(), *model.buffers()):
        return tensor.device
    return torch.device("cpu")
