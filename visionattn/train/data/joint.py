"""Transforms of an image together with its class map, on torchvision's tv_tensors."""

from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

IGNORE = 255
"""Class of pixels that neither train nor count."""


class RandomScaleCrop(v2.Transform):
    """Resize so that the short side is a random multiple of ``short_side``, then crop a random square.

    Both are one resampling of the cropped region, so that no pixel outside of it is ever computed.

    Args:
        size: Side of the crop. What is smaller is padded, right and bottom, with grey and ``IGNORE``.
        short_side: Of the resized image at scale 1.
        scale: Smallest and largest scale.
        most: A crop in which one class covers more than this share of the pixels is drawn again, up to 9 times.
    """

    def __init__(self, size: int, short_side: int, scale: tuple[float, float], most: float = 0.75) -> None:
        super().__init__()
        self.size, self.short_side, self.scale, self.most = size, short_side, scale, most

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.query_size(flat_inputs)
        factor = self.short_side * torch.empty(()).uniform_(*self.scale).item() / min(height, width)
        tall, wide = (min(self.size, max(1, round(side * factor))) for side in (height, width))
        rows, columns = (max(1, min(side, round(n / factor))) for side, n in ((height, tall), (width, wide)))
        classes = next((x for x in flat_inputs if isinstance(x, tv_tensors.Mask)), None)
        for _ in range(10):
            top, left = (int(torch.randint(n + 1, ())) for n in (height - rows, width - columns))
            if classes is None or self.most >= 1:
                break
            seen = classes[..., top : top + rows, left : left + columns]
            counts = torch.bincount(seen[..., ::4, ::4].flatten())[:IGNORE]  # every fourth pixel tells enough
            if len(counts.nonzero()) > 1 and counts.max() < self.most * counts.sum():
                break
        return dict(region=(top, left, rows, columns), inner=(tall, wide))

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        tall, wide = params["inner"]
        out = F.resized_crop(inpt, *params["region"], size=[tall, wide], antialias=True)
        if (tall, wide) != (self.size, self.size):
            fill = IGNORE if isinstance(inpt, tv_tensors.Mask) else 124
            out = F.pad(out, [0, 0, self.size - wide, self.size - tall], fill=fill)
        return out


def train_segmentation(
    size: int, short_side: int, scale: tuple[float, float], most: float, hflip: float, photometric: bool
) -> v2.Transform:
    """Scale jitter, crop, mirror image and changes of brightness, contrast, saturation and hue."""
    steps: list[v2.Transform] = [RandomScaleCrop(size, short_side, scale, most)]
    steps += [v2.RandomHorizontalFlip(hflip)] if hflip else []
    steps += [v2.RandomPhotometricDistort(p=0.5)] if photometric else []
    return v2.Compose(steps)


def eval_size(height: int, width: int, short_side: int, long_side: int) -> list[int]:
    """Size at which an image is evaluated: the short side as asked, unless the long one would exceed its limit."""
    factor = min(short_side / min(height, width), long_side / max(height, width))
    return [max(1, round(height * factor)), max(1, round(width * factor))]


def eval_image(image: torch.Tensor, short_side: int, long_side: int) -> torch.Tensor:
    """The image [3, H, W] at the size of :func:`eval_size`."""
    size = eval_size(*image.shape[-2:], short_side, long_side)
    return image if list(image.shape[-2:]) == size else F.resize_image(image, size, antialias=True)
