"""Scenes for segmentation and detection without a download: real digits pasted on photographs.

The digits are scikit-learn's, the photographs its two sample images. Masks, boxes and labels are exact, because they
are what was pasted. A scene depends on its seed alone.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from visionattn.errors import UserError
from visionattn.train.data.sampling import global_seed

DIGITS = [str(digit) for digit in range(10)]


@dataclass
class Scene:
    """An image and the N objects in it.

    Attributes:
        image: RGB, uint8. [H, W, 3]
        masks: The visible pixels of each object; no pixel belongs to two. [N, H, W]
        labels: The digit of each object. [N]
    """

    image: np.ndarray
    masks: np.ndarray
    labels: np.ndarray

    @property
    def boxes(self) -> np.ndarray:
        """The smallest box (left, top, right, bottom) around each mask, in pixels. [N, 4]"""
        return mask_boxes(self.masks)

    @property
    def classes(self) -> np.ndarray:
        """The class of each pixel: 0 for the photograph, digit + 1 elsewhere. [H, W]"""
        return np.einsum("nhw,n->hw", self.masks, self.labels + 1).astype(np.uint8)


def mask_boxes(masks: np.ndarray) -> np.ndarray:
    """The smallest box (left, top, right, bottom) around each non-empty mask [N, H, W]."""
    boxes = np.zeros((len(masks), 4), np.float32)
    for box, mask in zip(boxes, masks, strict=True):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return boxes


@lru_cache(1)
def photographs() -> list[Image.Image]:
    """The two photographs that come with scikit-learn, 427 x 640."""
    from sklearn.datasets import load_sample_images  # scikit-learn takes half a second

    return [Image.fromarray(image) for image in load_sample_images().images]


@lru_cache(2)
def digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """8x8 digits and their labels; no digit is in both splits."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    parts = train_test_split(data.images, data.target, test_size=0.2, stratify=data.target, random_state=0)
    return (parts[0], parts[2]) if split == "train" else (parts[1], parts[3])


def make_scene(
    rng: np.random.Generator,
    split: str,
    size: int = 128,
    objects: tuple[int, int] = (1, 4),
    sides: tuple[float, float] = (0.2, 0.5),
) -> Scene:
    """Paste digits at random places and scales on a random crop of a photograph.

    Args:
        rng: All randomness comes from it.
        split: ``"train"`` or another: the digits to choose from.
        size: Side of the square image.
        objects: Smallest and largest number of digits.
        sides: Smallest and largest side of a digit, as a share of ``size``.
    """
    photo = photographs()[rng.integers(2)]
    crop = int(rng.integers(min(size, 400), 428))
    left, top = (int(rng.integers(side - crop + 1)) for side in photo.size)
    image = np.asarray(photo.resize((size, size), Image.Resampling.BILINEAR, (left, top, left + crop, top + crop)))
    image = image.astype(np.float32) * rng.uniform(0.3, 0.6)  # dark, so that bright digits stand out
    glyphs, values = digits(split)
    masks, labels = [], []
    wanted = int(rng.integers(objects[0], objects[1] + 1))
    for _ in range(8 * wanted):
        side = max(8, round(size * np.exp(rng.uniform(*np.log(sides)))))
        index, x, y = int(rng.integers(len(glyphs))), *(int(n) for n in rng.integers(0, size - side + 1, 2))
        place = np.s_[y : y + side, x : x + side]
        if any(mask[place].any() for mask in masks):
            continue
        glyph = Image.fromarray(glyphs[index].astype(np.float32) / 16).resize((side, side), Image.Resampling.BICUBIC)
        alpha = np.clip((np.asarray(glyph) - 0.2) / 0.3, 0, 1)[..., None]
        image[place] += alpha * (rng.uniform(140, 255, 3).astype(np.float32) - image[place])
        mask = np.zeros((size, size), bool)
        mask[place] = alpha[..., 0] >= 0.5
        masks.append(mask)
        labels.append(values[index])
        if len(masks) == wanted:
            break
    return Scene(image.round().astype(np.uint8), np.array(masks), np.array(labels, np.int64))


class Scenes:
    """Scenes by index.

    Args:
        split: ``"train"`` or ``"val"``.
        count: How many there are.
        fresh: Make other scenes at every epoch, from NumPy's random numbers, which the loader seeds by epoch.
        size: Side of the images.
        objects: Smallest and largest number of digits.
        sides: Smallest and largest side of a digit, as a share of ``size``.
    """

    def __init__(
        self, split: str, count: int, fresh: bool, size: int, objects: tuple[int, int], sides: tuple[float, float]
    ) -> None:
        if count < 1 or size < 16:
            raise UserError(f"data: {count} scenes of side {size}: at least 1 scene of side 16")
        if not 1 <= objects[0] <= objects[1]:
            raise UserError(f"data.objects is {list(objects)}: the smallest and the largest number, at least 1")
        if not 8 / size <= sides[0] <= sides[1] <= 1:
            raise UserError(f"data.sides is {list(sides)}: shares of the image, from {8 / size:g} to 1")
        self.split, self.count, self.fresh = split, count, fresh
        self.settings = dict(size=size, objects=tuple(objects), sides=tuple(sides))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Scene:
        key = [np.random.randint(2**31)] if self.fresh else [global_seed(), self.split == "train", index]
        return make_scene(np.random.default_rng(key), self.split, **self.settings)
