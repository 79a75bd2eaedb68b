"""The one door through which images and class maps of files come: regular files, upright, deep pixels scaled."""

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

from visionattn.errors import UserError, one_line

# Pillow hands EPS to Ghostscript, another program, and only names what MPEG holds.
_NOT_READ = {"EPS", "MPEG"}
_SIDES_SWAPPED = {5, 6, 7, 8}  # of EXIF's orientations


class UnreadableImage(ValueError):
    """An image that cannot be read, or not without guessing.

    Attributes:
        file: Its name.
        why: What is wrong with it.
    """

    def __init__(self, file: object, why: str = "") -> None:
        super().__init__(str(file), why)
        self.file, self.why = str(file), why

    def __str__(self) -> str:
        return f"{self.file} ({self.why})" if self.why else self.file


def formats() -> list[str]:
    """Pillow's names of the formats that count as images, those of its plugins included."""
    Image.init()
    return [name for name in Image.ID if name not in _NOT_READ and not _is_stub(Image.OPEN[name][0])]


def _is_stub(factory: Any) -> bool:
    """Whether Pillow only knows the name of a format."""
    return isinstance(factory, type) and issubclass(factory, ImageFile.StubImageFile)


def open_image(source: Any, mode: str = "RGB") -> Image.Image:
    """Read an image as it is to be looked at: upright, the first of several frames, 16-bit pixels scaled to 8.

    Args:
        source: A path, or an open binary file, which is closed.
        mode: Pillow's mode of the result.

    Raises:
        UnreadableImage: If it is no regular file, no image or a damaged one, or has numbers for pixels of which no one
            knows where white is.
    """
    with _opened(source) as image:
        return as_seen(image, mode)


def as_seen(image: Image.Image, mode: str = "RGB") -> Image.Image:
    """A decoded image upright and in ``mode``, deeper pixels scaled to 8 bits; the argument may be changed.

    Raises:
        UnreadableImage: If no one knows which of its numbers is white.
    """
    _turn(image)
    return (image if image.mode == mode else _in_bytes(image)).convert(mode)


def open_classes(file: Path) -> np.ndarray:
    """Read a class map [H, W], uint8: the values as they are in the file, upright as the image.

    Raises:
        UnreadableImage: If it is no regular file, no image or a damaged one.
        UserError: If it has more than a byte per pixel, or was stored with losses.
    """
    with _opened(file) as image:
        if image.mode not in ("L", "P", "1"):
            raise UserError(f"{file} is {image.mode}, not a class map: it must have one byte per pixel")
        if image.format in ("JPEG", "MPO"):
            raise UserError(f"{file} is JPEG, which changes the values of a class map: save the classes as PNG")
        _turn(image)
        return np.array(image, np.uint8)


def turned(file: Any) -> str:
    """What to add to a message on the size of ``file`` if its EXIF orientation swaps its sides; empty if not."""
    with Image.open(file) as image:
        if image.getexif().get(ExifTags.Base.Orientation) not in _SIDES_SWAPPED:
            return ""
        width, height = image.size
    return (
        f". It is stored as {width} x {height} and turned upright by its EXIF orientation: make boxes and masks on the "
        "upright picture"
    )


@contextmanager
def _opened(source: Any) -> Iterator[Image.Image]:
    """The decoded image; whatever Pillow raises is an :class:`UnreadableImage`."""
    is_path = isinstance(source, (str, os.PathLike))
    name = source if is_path else getattr(source, "name", "an image")
    if is_path:
        _require_regular(source)
    try:
        # A file that was open already is not closed by Pillow.
        with open(source, "rb") if is_path else source as file, Image.open(file, formats=formats()) as image:
            image.load()
            yield image
    except (UserError, MemoryError):
        raise
    except UnreadableImage as error:
        raise UnreadableImage(name, error.why) from error
    except UnidentifiedImageError as error:
        raise UnreadableImage(name, "no image that Pillow reads") from error
    except Exception as error:  # a damaged file makes Pillow's plugins fail in any way
        raise UnreadableImage(name, one_line(error) or type(error).__name__) from error


def _require_regular(path: Any) -> None:
    """Refuse what is no regular file before it is opened: opening a named pipe waits for ever."""
    try:
        mode = os.stat(path).st_mode
    except (OSError, ValueError) as error:
        raise UnreadableImage(path, getattr(error, "strerror", None) or one_line(error)) from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
        raise UnreadableImage(path, f"{kinds.get(stat.S_IFMT(mode), 'a device')}, not a regular file")


def _turn(image: Image.Image) -> None:
    """Turn the image upright, in place."""
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # noqa: S110  damaged EXIF says nothing about the orientation, and the pixels are in order
        pass


def _in_bytes(image: Image.Image) -> Image.Image:
    """An image of 8 bits per channel. Pillow would clip deeper pixels at 255.

    16-bit pixels are scaled by the range of their type, one scale for a whole data set. Of other integers only 0 to 255
    is known, of floats 0 to 1 and, where that is exceeded, 0 to 255.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;"):
        return image
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if image.mode.startswith("I;16"):
        if 0 < high <= 255:  # as good as black, or bytes that were saved in the wrong type
            raise UnreadableImage("an image", f"its 16-bit pixels reach {high} of 65535 only: save bytes with 8 bits")
        bits = image.tag_v2.get(258, (16,))[0] if image.format == "TIFF" else 16
        white = 2**bits - 1
    elif image.mode == "I" and image.format == "PPM":
        white = 65535  # Pillow scales what is deeper than a byte to this
    elif low >= 0 and high <= 255:  # false for what is no number
        white = 1 if image.mode == "F" and high <= 1 else 255
    else:
        kind = f"{'floats' if image.mode == 'F' else 'integers'} from {low:g} to {high:g}"
        raise UnreadableImage("an image", f"no one knows which of its {kind} is white: save it with 8 or 16 bits")
    return Image.fromarray((values * (255 / white)).round().clip(0, 255).astype(np.uint8))
