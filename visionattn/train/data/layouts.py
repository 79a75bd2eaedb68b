"""Where segmentation data sets keep their images and class maps, and what the values in the maps mean."""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from visionattn.errors import UserError, some
from visionattn.train.data.finder import ByStem, Found, find_images
from visionattn.train.data.joint import IGNORE

INVALID = 254
"""What a value that is no class becomes; a class map must not have it."""

VOC = (
    "background aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person "
    "pottedplant sheep sofa train tvmonitor"
).split()
CITYSCAPES = {
    # label id in the files: (class, colour)
    7: ("road", (128, 64, 128)),
    8: ("sidewalk", (244, 35, 232)),
    11: ("building", (70, 70, 70)),
    12: ("wall", (102, 102, 156)),
    13: ("fence", (190, 153, 153)),
    17: ("pole", (153, 153, 153)),
    19: ("traffic light", (250, 170, 30)),
    20: ("traffic sign", (220, 220, 0)),
    21: ("vegetation", (107, 142, 35)),
    22: ("terrain", (152, 251, 152)),
    23: ("sky", (70, 130, 180)),
    24: ("person", (220, 20, 60)),
    25: ("rider", (255, 0, 0)),
    26: ("car", (0, 0, 142)),
    27: ("truck", (0, 0, 70)),
    28: ("bus", (0, 60, 100)),
    31: ("train", (0, 80, 100)),
    32: ("motorcycle", (0, 0, 230)),
    33: ("bicycle", (119, 11, 32)),
}


@dataclass
class Layout:
    """One way to keep a data set.

    Attributes:
        images: Folder of the images of a split, below the root.
        masks: Folder of its class maps.
        splits: The split names of this set for train and val, and for test if its class maps are public.
        rename: What in an image's stem becomes what in the class map's.
        listing: File with the stems of a split, one per line, if not the folder says what belongs to it.
        classes: Class names, if the layout says.
        palette: Colour of each class, if the layout says.
        values: Value in the files of each class, if not 0, 1, 2, ...
        others: Whether values that are no class are ignored; otherwise they are mistakes.
    """

    images: str
    masks: str
    splits: dict[str, str]
    rename: tuple[str, str] = ("", "")
    listing: str | None = None
    classes: list[str] = field(default_factory=list)
    palette: list[tuple[int, int, int]] = field(default_factory=list)
    values: list[int] | None = None
    others: bool = False


LAYOUTS = {
    "folders": Layout("images/{split}", "masks/{split}", dict(train="train", val="val", test="test")),
    "ade20k": Layout(
        "images/{split}",
        "annotations/{split}",
        dict(train="training", val="validation"),
        classes=[str(n) for n in range(1, 151)],
        values=list(range(1, 151)),  # 0 is what belongs to none of the 150 classes
    ),
    "cityscapes": Layout(
        "leftImg8bit/{split}",
        "gtFine/{split}",
        dict(train="train", val="val"),
        rename=("_leftImg8bit", "_gtFine_labelIds"),
        classes=[name for name, _ in CITYSCAPES.values()],
        palette=[color for _, color in CITYSCAPES.values()],
        values=list(CITYSCAPES),
        others=True,
    ),
    "voc": Layout(
        "JPEGImages",
        "SegmentationClass",
        dict(train="train", val="val"),
        listing="ImageSets/Segmentation/{split}.txt",
        classes=VOC,
    ),
}


def lookup(values: Sequence[int], ignored: Sequence[int], others: bool) -> np.ndarray:
    """A table from the 256 values of a file to classes, ``IGNORE`` and ``INVALID``."""
    table = np.full(256, IGNORE if others else INVALID, np.uint8)
    table[list(ignored)] = IGNORE
    table[list(values)] = np.arange(len(values))
    return table


def find_pairs(root: Path, layout: Layout, split: str) -> tuple[list[tuple[Path, Path]], Found]:
    """Images of a split and their class maps, and an account of what is left out.

    Raises:
        UserError: If there are none, or an image has no class map.
    """
    name = layout.splits[split]
    images, masks = (root / folder.format(split=name) for folder in (layout.images, layout.masks))
    for folder in (images, masks):
        if not folder.is_dir():
            raise UserError(f"no folder {folder}: expected images in {images} and class maps in {masks}")
    found = Found()
    if layout.listing:
        files = listed(root / layout.listing.format(split=name), images, name)
    else:
        found = find_images(images)
        files = sorted(map(Path, found.images))
    if not files:
        found.warn(images)
        raise UserError(f"no images in {images}")
    old, new = layout.rename
    pairs = []
    maps: dict[Path, ByStem] = {}
    for file in files:
        folder = masks / file.relative_to(images).parent
        find = maps.setdefault(folder, ByStem(folder, ".png"))
        pairs.append((file, find(file.stem.replace(old, new) if old else file.stem)))
    if missing := [mask for _, mask in pairs if not mask.exists()]:
        raise UserError(f"{len(missing)} of {len(pairs)} images have no class map: {some(missing)}")
    return pairs, found


def listed(listing: Path, images: Path, split: str) -> list[Path]:
    """The images in a folder that a file names, one per line and without ending.

    Raises:
        UserError: If there is no such file, or an image is missing.
    """
    if not listing.is_file():
        raise UserError(f"no file {listing}, which says what belongs to {split}")
    files = list(map(ByStem(images, ".jpg"), read_text(listing).split()))
    if missing := [file for file in files if not file.exists()]:
        raise UserError(f"{listing} names images that are not there: {some(missing)}")
    return files


def read_text(file: Path) -> str:
    """The text of a file, without a byte-order mark.

    Raises:
        UserError: If it is not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not UTF-8 text: save it as such") from error


def bright_palette(count: int) -> list[tuple[int, int, int]]:
    """Bright colours for lines: hues a golden section apart, so that neighbours differ most."""
    hues = [colorsys.hsv_to_rgb(n * 0.61803 % 1, 0.7, 1.0) for n in range(count)]
    return [tuple(round(255 * part) for part in color) for color in hues]


def voc_palette(count: int) -> list[tuple[int, int, int]]:
    """Colours that differ much, by the rule of the VOC development kit: the bits of n dealt to red, green and blue."""
    colors = []
    for n in range(count):
        red = green = blue = 0
        for bit in range(8):
            shift = 3 * bit
            red |= (n >> shift & 1) << 7 - bit
            green |= (n >> shift + 1 & 1) << 7 - bit
            blue |= (n >> shift + 2 & 1) << 7 - bit
        colors.append((red, green, blue))
    return colors
