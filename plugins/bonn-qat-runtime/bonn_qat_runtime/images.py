"""Images: files as the input of a network, and the classes that it finds in them."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from bonn_qat_runtime.errors import InvalidFile, RuntimeFailure, UnsupportedOperator
from bonn_qat_runtime.files import Preprocessing
from bonn_qat_runtime.network import Network


class Guess(NamedTuple):
    """A class, by its name or else its number, and its probability."""

    label: str
    probability: float


def predict(network: Network, paths: Sequence[str | Path], *, top: int = 5) -> Iterator[list[Guess]]:
    """For each image file the ``top`` classes that a network gives the highest probability.

    Of an image the part ``network.preprocessing.crop``, in its middle, is scaled so that it covers the network's image
    size, and what juts out is cut off on both sides. Needs Pillow, ``pip install bonn-qat-runtime[images]``.

    Raises InvalidFile for a network that does not know its images' standardization, and for a file that cannot be read
    as an image; UnsupportedOperator for a network that gives no logits.
    """
    known, channels = network.preprocessing, network.input_size[0]
    if known is None or channels not in (1, 3) or len(known.mean) != channels:
        raise InvalidFile("the network does not say how images are standardized; Network(path)(images) runs it")
    for path in paths:
        logits = network(read_image(path, network.input_size, known)[None])[0].astype(np.float64)
        if logits.ndim != 1:
            raise UnsupportedOperator(f"the network gives {logits.shape} for an image, not a number for each class")
        chances = np.exp(logits - logits.max())
        chances /= chances.sum()
        best = np.argsort(-chances, kind="stable")[:top]
        names = known.labels if len(known.labels) == len(chances) else [f"class {i}" for i in range(len(chances))]
        yield [Guess(names[i], float(chances[i])) for i in best]


def read_image(path: str | Path, size: tuple[int, int, int], known: Preprocessing) -> NDArray[np.float32]:
    """A file as float32 ``(C, H, W)``, standardized. Raises InvalidFile naming a file that cannot be read."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise RuntimeFailure("images need Pillow: pip install bonn-qat-runtime[images]") from error
    channels, height, width = size
    try:
        with Image.open(path) as file:
            image: Any = _rgb(ImageOps.exif_transpose(file)).convert("L" if channels == 1 else "RGB")
            image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR, bleed=(1 - known.crop) / 2)
    except MemoryError:
        raise
    except Exception as error:  # whatever a decoder makes of a damaged file
        reason = " ".join(str(error).split())[:300] or repr(error)
        raise InvalidFile(f"{path} cannot be read as an image: {reason}") from error
    pixels = np.asarray(image, np.float32).reshape(height, width, channels).transpose(2, 0, 1) / np.float32(255)
    mean, std = (np.array(numbers, np.float32).reshape(-1, 1, 1) for numbers in (known.mean, known.std))
    return np.ascontiguousarray((pixels - mean) / std)


def _rgb(image: Any) -> Any:
    """8 bits for each channel, as in training: transparent pixels on white, 16-bit grey divided by 257."""
    from PIL import Image

    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.asarray(image)
        most = 1 if image.mode == "F" else 65_535
        if not (pixels.min() >= 0 and pixels.max() <= most):
            raise ValueError(f"its pixels are not from 0, black, to {most:,}, white")
        image = Image.fromarray(np.rint(pixels * (255.0 / most)).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")
