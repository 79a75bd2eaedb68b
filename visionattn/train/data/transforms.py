"""timm's transforms, with the one repair that Pillow 13 needs."""

from typing import Any
from unittest import mock

from PIL import Image, ImageOps
from timm.data import create_transform
from timm.data.auto_augment import NAME_TO_OP


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """Keep the highest bits of each channel; 0 bits is black, as Pillow had it before version 13 refused."""
    if bits_to_keep >= 8:
        return image
    return ImageOps.posterize(image, bits_to_keep) if bits_to_keep > 0 else Image.new(image.mode, image.size)


def train_transform(**arguments: Any):
    """``timm.data.create_transform(is_training=True)`` whose augmentation policies work with every Pillow."""
    repaired = {name: posterize for name in NAME_TO_OP if name.startswith("Posterize")}
    with mock.patch.dict(NAME_TO_OP, repaired):  # read when the policy is built, so nothing stays patched
        return create_transform(is_training=True, **arguments)
