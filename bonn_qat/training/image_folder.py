"""Image folders: which files are the images of which class, and a file as an 8-bit RGB image.

A folder has one folder of images for each class, or ``train`` and a held-out set (``val``, ``valid``, ``validation``,
``dev``, ``test`` or ``testing``, in this order if there are several) which have these. The classes are those of
``train``, in the order of their names; the held-out set may lack some of them. Images may lie in folders within a
class. Hidden files and folders and those that operating systems and archives leave are skipped, and so are files that
are no images.

Of an animation the first frame counts, and an image is turned as its EXIF orientation says. Transparent pixels are
shown on white. 16-bit greyscale is divided by 257, so that 65,535 is white, and float greyscale is multiplied by 255.
Of other 16-bit images the upper 8 bits are read.
"""

import contextlib
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
from PIL import Image, ImageOps
from torchvision.datasets import ImageFolder

from bonn_qat.errors import InvalidData
from bonn_qat.files.plain import one_line, shown

_TRAIN = ("train", "training")
_HELD_OUT = ("val", "valid", "validation", "dev", "test", "testing")
# What macOS, Windows, Synology and Python leave beside the images; names with a dot in front are skipped anyway.
_LEFT = {"__macosx", "@eadir", "__pycache__", "$recycle.bin", "system volume information", "lost+found"}
# The suffixes of torchvision's ImageFolder and further ones that Pillow reads; then those of images that it does not.
_SUFFIXES = {
    ".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".ppm", ".pgm", ".pbm", ".pnm", ".bmp", ".tif", ".tiff", ".webp",
    ".gif", ".tga", ".jp2", ".avif",
}  # fmt: skip
_UNREAD = {
    ".heic", ".heif", ".jxl", ".svg", ".psd", ".xcf", ".exr", ".hdr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf",
    ".rw2", ".ico", ".dcm", ".npy",
}  # fmt: skip


class Sample(NamedTuple):
    """An image file, its class and its size in bytes."""

    path: Path
    label: int
    size: int


class Layout(NamedTuple):
    """The classes by name, the training images, and the held-out ones; None if the folder has no set of them."""

    classes: list[str]
    train: list[Sample]
    held_out: list[Sample] | None


def read_layout(root: Path) -> Layout:
    """Find the images of a folder. Looks at names and sizes, not into the files.

    Raises InvalidData naming the folder or file: for a layout that is not clear, fewer than two classes, names that
    differ in case only, a class without images, a class of the held-out set that ``train`` does not have, empty files,
    links to nowhere, and images of a format that is not read.
    """
    folders = _folders(root)
    train, held_out = _named(root, folders, _TRAIN), None
    for name in _HELD_OUT:
        held_out = held_out or _named(root, folders, (name,))
    if train is None:
        if odd := next((path for name, path in folders.items() if name.casefold() in _HELD_OUT and _first(path)), None):
            raise InvalidData(
                f"{root} holds {odd.name}, but no folder train with one folder of images for each class; if {odd.name} "
                "is a class, give it another name"
            )
        classes = _classes(root)
        words = {name: set(re.split("[^a-z]+", name.casefold())) for name in classes}
        parts = [next((n for n in words if not words[n].isdisjoint(kind)), "") for kind in (_TRAIN, _HELD_OUT)]
        if all(parts):
            raise InvalidData(
                f"{root} holds {parts[0]} and {parts[1]}, which are parts of a data set by their names, not classes; "
                "name them train and val, each with one folder of images for each class"
            )
        return Layout(list(classes), _samples(root, classes), None)
    if held_out is None:
        for name, path in folders.items():
            if path != train and _first(path):
                raise InvalidData(
                    f"{root} holds {train.name} with folders in it, and {name}: if {name} is the held-out set, give it "
                    f"one folder for each class and the name val; if {train.name} is a class, put its images directly "
                    f"into it; otherwise move {name} away"
                )
    classes = _classes(train)
    return Layout(
        list(classes), _samples(train, classes), None if held_out is None else _samples(held_out, classes, of=train)
    )


@final
class Images(ImageFolder):  # type: ignore[misc]
    """torchvision's ImageFolder for the images of a layout; an image that cannot be read is its InvalidData.

    What a worker process raises would arrive with the traceback in its message.
    """

    def __init__(self, root: Path, classes: list[str], samples: list[Sample], transform: Any) -> None:
        self._given = classes, samples
        super().__init__(root, transform)

    def find_classes(self, directory: Any) -> tuple[list[str], dict[str, int]]:
        classes = self._given[0]
        return classes, {name: label for label, name in enumerate(classes)}

    def make_dataset(self, *_: Any, **__: Any) -> list[Sample]:
        return self._given[1]

    def __getitem__(self, index: int) -> Any:
        sample = self.samples[index]
        try:
            image = read_image(sample.path)
        except InvalidData as error:
            return error
        return self.transform(image), sample.label


def _named(root: Path, folders: dict[str, Path], names: Sequence[str]) -> Path | None:
    """The folder with one of these names, in any case, that holds folders of images; None if there is none."""
    found = [
        path for name, path in folders.items() if name.casefold() in names and any(map(_first, _folders(path).values()))
    ]
    if len(found) > 1:
        raise InvalidData(f"{root} holds {found[0].name} and {found[1].name}; rename one of them")
    if found and (stray := next(_own_images(found[0]), None)):
        raise InvalidData(f"{stray} lies beside the folders of the classes; move it into one, or away")
    return found[0] if found else None


def _classes(root: Path) -> dict[str, Path]:
    """The folders of the classes by name, in the order of the names."""
    folders = _folders(root)
    same: dict[str, str] = {}
    for name in folders:
        other = same.setdefault(_key(name).casefold(), name)
        if other != name:
            raise InvalidData(f"{root} holds the classes {shown(other)} and {shown(name)}; merge or rename them")
    if len(folders) < 2:
        inner = next(
            (f"; if its classes are in {path}, give that path" for path in folders.values() if _folders(path)), ""
        )
        held = f"only the folder {next(iter(folders))}" if folders else "no folder"
        raise InvalidData(
            f"{root} does not have one folder of images for each class: it holds {held}, at least two are needed{inner}"
        )
    # Folders of folders are ambiguous where two have a folder of the same name: these may be the classes.
    seen: dict[str, str] = {}
    for name, path in folders.items():
        for inner in () if any(_own_images(path)) else _folders(path):
            other = seen.setdefault(inner.casefold(), name)
            if other != name:
                raise InvalidData(
                    f"{root} holds {name} and {other}, which both hold a folder {inner}: are they classes or parts of "
                    "the data? Name the parts train and val, or put the images of a class directly into its folder"
                )
    return folders


def _samples(root: Path, classes: dict[str, Path], of: Path | None = None) -> list[Sample]:
    """The images of ``root`` with the labels of ``classes``, which are those of the folder ``of``, or its own."""
    labels = {_key(name): label for label, name in enumerate(classes)}
    samples: list[Sample] = []
    reached: dict[str, Path] = {}
    for name, folder in _folders(root).items():
        label = labels.get(_key(name))
        if label is None:
            if not _first(folder):
                continue
            near = next((known for known in classes if _key(known).casefold() == _key(name).casefold()), None)
            hint = f"{of} has {shown(near)}" if near else f"the classes are those of {of}"
            raise InvalidData(f"{folder} is a class that {of} does not have; {hint}; rename or remove it")
        own = [Sample(path, label, size) for path, size in _images(folder)]
        if not own and of is None:
            raise InvalidData(f"{folder} holds no images, so its class cannot be learned; fill or remove it")
        for inside in {sample.path.parent for sample in own}:
            other = reached.setdefault(os.path.realpath(inside), folder)
            if other != folder:
                raise InvalidData(f"a link makes {inside} a folder of {other} too; remove it: an image has one class")
        samples += own
    if not samples:
        raise InvalidData(
            f"{root} holds no images of the classes of {of or root}; put them into one folder for each class"
        )
    return samples


def _images(folder: Path) -> Iterator[tuple[Path, int]]:
    """The images of a class with their sizes in bytes, also those in folders within it, ordered by folder and name."""
    for here, name, entry in sorted(_files(folder), key=lambda file: (str(file[0]), file[1])):
        yield here / name, _size(entry)


def _files(folder: Path) -> Iterator[tuple[Path, str, os.DirEntry[str]]]:
    """Folder, name and entry of each image in ``folder`` and the folders within it, in any order."""
    visited = set(map(str, folder.resolve().parents))  # a link may lead back to where it is
    pending = [folder]
    while pending:
        here = pending.pop()
        if (target := os.path.realpath(here)) in visited:
            continue
        visited.add(target)
        for entry in _entries(here):
            if entry.is_dir():
                pending.append(here / entry.name)
            elif _is_image(entry.name):
                yield here, entry.name, entry


def _size(entry: os.DirEntry[str]) -> int:
    try:
        status = entry.stat()
    except OSError as error:
        why = "is a link to a file that does not exist" if entry.is_symlink() else f"cannot be read: {error.strerror}"
        raise InvalidData(f"{entry.path} {why}; fetch or remove it") from error
    if not stat.S_ISREG(status.st_mode):
        raise InvalidData(f"{entry.path} is not a file; remove it")
    if not status.st_size:
        raise InvalidData(f"{entry.path} is empty; replace or remove it")
    if Path(entry.name).suffix.lower() not in _SUFFIXES:
        raise InvalidData(f"{entry.path} is an image of a format that is not read; convert it to PNG, or remove it")
    return status.st_size


def _is_image(name: str) -> bool:
    return Path(name).suffix.lower() in _SUFFIXES | _UNREAD


def _own_images(folder: Path) -> Iterator[Path]:
    """The images that lie in ``folder`` itself."""
    for entry in _entries(folder):
        if _is_image(entry.name) and not entry.is_dir():
            yield folder / entry.name


def _first(folder: Path) -> Path | None:
    """An image in ``folder`` or the folders within it, if there is one."""
    return next((here / name for here, name, _ in _files(folder)), None)


def _folders(root: Path) -> dict[str, Path]:
    """The folders within ``root`` by name, in the order of the names."""
    return {name: root / name for name in sorted(entry.name for entry in _entries(root) if entry.is_dir())}


def _entries(folder: Path) -> Iterator[os.DirEntry[str]]:
    """What is in ``folder``, apart from what is hidden or left by a system."""
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise InvalidData(f"the folder {folder} cannot be read: {error.strerror}") from error
    for entry in entries:
        if not entry.name.startswith(".") and entry.name.casefold() not in _LEFT:
            yield entry


def _key(name: str) -> str:
    return unicodedata.normalize("NFC", name).strip()  # macOS writes an accent as a character of its own


def read_image(path: Path) -> Image.Image:
    """The file as an 8-bit RGB image, as the module says.

    Raises InvalidData naming the file if it is no image, is damaged or cut off, or has pixels whose range is not known.
    """
    try:
        with path.open("rb") as file, Image.open(file) as image:
            is_wide = any(";16" in str(tile[3]) for tile in image.tile)
            image.load()
            colour = image.info.get("transparency")
            if is_wide and isinstance(colour, tuple):  # Pillow has cut the pixels to 8 bits, but not this
                image.info["transparency"] = tuple(value >> 8 for value in colour)
            with contextlib.suppress(Exception):  # what a damaged EXIF block raises; the pixels are good
                ImageOps.exif_transpose(image, in_place=True)
            return _as_rgb(image)
    except MemoryError:
        raise
    except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
        raise InvalidData(f"cannot read {path}: {one_line(error.strerror or error).lower()}") from error
    except Exception as error:  # whatever a decoder makes of a damaged file
        raise InvalidData(f"{path} cannot be read as an image: {_why(error, path)}; replace or remove it") from error


def _why(error: Exception, path: Path) -> str:
    words = one_line(error).replace(str(path), "it")
    return "it is not one, or of an unknown format" if "cannot identify image" in words else words or repr(error)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        pixels, colour = np.asarray(image), image.info.get("transparency")
        if isinstance(colour, int):
            pixels = np.where(pixels == colour, pixels.dtype.type(65_535), pixels)
        image = Image.fromarray(_eight_bits(pixels))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _eight_bits(pixels: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    low, high = pixels.min(), pixels.max()
    is_float = pixels.dtype.kind == "f"
    limit = 1 if is_float else 65_535
    if not (low >= 0 and high <= limit):
        raise ValueError(f"its pixels run from {low:g} to {high:g}, where 0 is black and {limit:,} white")
    return np.rint(pixels * 255.0 if is_float else pixels / 257.0).astype(np.uint8)
