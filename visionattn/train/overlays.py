"""Predictions drawn over images: classes as colours, objects as outlined boxes and masks with their names."""

from collections.abc import Sequence

import torch
from matplotlib import font_manager
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks

Palette = Sequence[Sequence[int]]


def paint(classes: Tensor, palette: Palette) -> Tensor:
    """A class map [H, W] as an image [3, H, W]; what is no class is black."""
    colors = torch.zeros(256, 3, dtype=torch.uint8)
    colors[: len(palette)] = torch.tensor([list(color) for color in palette], dtype=torch.uint8)
    return colors[classes.long().cpu()].permute(2, 0, 1)


def overlay_classes(image: Tensor, classes: Tensor, palette: Palette, strength: float = 0.6) -> Tensor:
    """An image [3, H, W], uint8, with its class map [H, W] painted over it.

    What is no class, or one whose colour is black, such as VOC's background, stays as it is.
    """
    image, painted = image.cpu(), paint(classes, palette)
    mixed = torch.lerp(image.float(), painted.float(), strength).round().to(torch.uint8)
    return torch.where((painted > 0).any(0), mixed, image)


def overlay_objects(
    image: Tensor,
    boxes: Tensor,
    labels: Tensor,
    names: Sequence[str],
    palette: Palette,
    scores: Tensor | None = None,
    masks: Tensor | None = None,
) -> Tensor:
    """An image [3, H, W], uint8, with boxes [N, 4] and, if given, masks [N, H, W] and scores [N]."""
    image, labels = image.cpu(), labels.tolist()
    if not labels:
        return image
    colors = [tuple(palette[label]) for label in labels]
    text = [names[label] for label in labels]
    if scores is not None:
        text = [f"{name} {100 * score:.0f}%" for name, score in zip(text, scores.tolist(), strict=True)]
    if masks is not None:
        image = draw_segmentation_masks(image, masks.bool().cpu(), alpha=0.6, colors=colors)
    longest = max(image.shape[-2:])
    return draw_bounding_boxes(
        image,
        boxes.cpu(),
        text,
        colors=colors,
        width=max(1, round(longest / 150)),
        font=font_manager.findfont("DejaVu Sans"),  # comes with Matplotlib
        font_size=max(9, longest // 20),
        label_colors="black",
        label_background_colors=colors,
        fill_labels=True,
    )


def side_by_side(images: Sequence[Tensor], height: int = 256, gap: int = 4) -> Tensor:
    """Images [3, H, W] in a row, at one height, with white between them."""
    sized = [F.resize_image(i, [height, max(1, round(height * i.shape[-1] / i.shape[-2]))]) for i in images]
    space = torch.full((3, height, gap), 255, dtype=torch.uint8)
    return torch.cat([part for image in sized for part in (image, space)][:-1], 2)


def stacked(rows: Sequence[Tensor], gap: int = 4) -> Tensor:
    """Rows [3, H, W] one below the other, left aligned on white."""
    width = max(row.shape[-1] for row in rows)
    return torch.cat([F.pad(row, [0, 0, width - row.shape[-1], gap], fill=255) for row in rows], 1)


def to_pil(image: Tensor) -> Image.Image:
    """An image [3, H, W], uint8, for Pillow."""
    return Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
