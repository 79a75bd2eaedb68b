"""What the data of segmentation and detection share: entries that carry the image's index, batches of any size."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from visionattn.train.data.base import Data
from visionattn.train.data.sampling import NOT_COUNTED, Samples


class DenseBatch(NamedTuple):
    """A batch of images with targets.

    Attributes:
        images: RGB, uint8; one tensor [B, 3, H, W] if all have one size and training asks for it, else a list.
        targets: A class map or a dictionary of objects for each image.
        indices: Place of each image in the data set, ``NOT_COUNTED`` for entries that must not count. [B]
        unreadable: 1 where an image could not be read. [B]
    """

    images: Tensor | list[Tensor]
    targets: Any
    indices: Tensor
    unreadable: Tensor


class DenseSamples(Samples):
    """Entries of any target.

    Args:
        empty: Makes the target of an image [3, H, W] in which nothing counts.
    """

    def __init__(
        self, dataset: Any, name: Callable[[int], str], training: bool, empty: Callable[[Tensor], Any]
    ) -> None:
        super().__init__(dataset, name, training)
        self.empty = empty

    def entry(self, image: Tensor, target: Any, index: int, counts: bool, replaced: bool) -> tuple:
        return image, target if counts else self.empty(image), index if counts else NOT_COUNTED, int(replaced)

    def blank(self, index: int, counts: bool) -> tuple:
        image = torch.zeros(3, 64, 64, dtype=torch.uint8)
        return image, self.empty(image), NOT_COUNTED, int(counts)


def collate(entries: list[tuple], stack: bool) -> DenseBatch:
    """Entries to a batch; ``stack`` makes one tensor of the images, and of targets that are tensors."""
    images, targets, indices, unreadable = (list(part) for part in zip(*entries, strict=True))
    if stack:
        images = torch.stack(images)
        targets = torch.stack(targets) if isinstance(targets[0], Tensor) else targets
    return DenseBatch(images, targets, torch.tensor(indices), torch.tensor(unreadable))


class DenseData(Data):
    """Base of the data modules of dense tasks."""

    def empty(self, image: Tensor) -> Any:
        """The target of an image in which nothing counts."""
        raise NotImplementedError

    def samples(self, dataset: Any, name: Callable[[int], str], training: bool) -> Samples:
        return DenseSamples(dataset, name, training, self.empty)
