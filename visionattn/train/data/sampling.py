"""Which image comes when: an order and an augmentation that depend on the seed and the epoch alone.

Neither the number of processes, the number of workers nor a restart in between changes what an epoch shows.
"""

import concurrent.futures
import itertools
import os
import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from PIL import Image
from torch.utils.data import Dataset, DistributedSampler, IterableDataset

from visionattn.errors import one_line

IGNORED = -1
"""Target of an entry that must not count: padding of the last batch, or an image that cannot be read."""

NOT_COUNTED = -1
"""Index of an entry that must not count, or whose place in the data set is not known."""

# What Pillow raises on damaged files; anything else is a bug and is not swallowed.
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


def reason(error: Exception) -> str:
    """What is wrong with an unreadable image, in one line and without its name."""
    return getattr(error, "why", "") or one_line(error)


def unreadable(read: Callable[[int], Any], indices: Sequence[int], threads: int = 16) -> dict[int, str]:
    """Which of ``indices`` the function ``read`` cannot read, and why; it is called in up to ``threads`` threads."""

    def attempt(index: int) -> str | None:
        try:
            read(index)
            return None
        except UNREADABLE as error:
            return reason(error)

    with concurrent.futures.ThreadPoolExecutor(min(threads, 2 * (os.cpu_count() or 1))) as pool:
        reasons = zip(indices, pool.map(attempt, indices), strict=True)
        return {index: why for index, why in reasons if why is not None}


def spread(length: int, count: int) -> range:
    """``count`` indices or more, evenly spread over ``length``; all of them for -1, none for 0."""
    step = 1 if count < 0 else max(1, length // max(1, count))
    return range(0, length if count else 0, step)


def global_seed() -> int:
    """The run's seed, as ``seed_everything`` set it."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def seed_random(*key: int) -> None:
    """Seed Python, NumPy and torch (CPU, and CUDA where it is in use) from a tuple of integers."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


class Key(NamedTuple):
    """One entry of an epoch.

    Attributes:
        index: Position in the data set.
        seed: Seeds the augmentation of this entry.
        counts: False for an entry that only fills the last batch up.
    """

    index: int
    seed: tuple[int, ...]
    counts: bool


class EpochSampler(DistributedSampler):
    """Shuffles by (seed, epoch), deals batches over processes, and can start in the middle of an epoch.

    Process r of n takes every n-th entry, so n processes with batch size b see the same global batches as one
    process with n * b.
    """

    skip = 0

    def __iter__(self) -> Iterator[Key]:
        skip, self.skip = self.skip, 0
        positions = itertools.count(self.rank, self.num_replicas)
        keys = (
            Key(index, (self.seed, self.epoch, index), position < len(self.dataset))
            for index, position in zip(super().__iter__(), positions, strict=False)
        )
        return itertools.islice(keys, skip, None)


class Samples(Dataset):
    """A map-style data set read by :class:`Key`: seeded augmentation, unreadable images named and replaced.

    An entry is ``(image, target, index, unreadable)``. In training an unreadable image is replaced by the next readable
    one; otherwise the entry is blank and its target is ``IGNORED``, so that no image counts twice in a metric.

    Args:
        dataset: Gives ``(image, target)`` with the transform applied.
        name: Names the image at an index, for the message.
        training: Whether to replace unreadable images.
    """

    def __init__(self, dataset: Any, name: Callable[[int], str], training: bool) -> None:
        self.dataset, self.name, self.training = dataset, name, training
        self.reported: set[int] = set()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key) -> tuple:
        with isolate_rng(include_cuda=False):
            seed_random(*key.seed)
            for attempt in range(len(self)):
                index = (key.index + attempt) % len(self)
                try:
                    image, target = self.dataset[index]
                except UNREADABLE as error:
                    self._report(index, error)
                    if not self.training:
                        return self.blank(index, key.counts)
                else:
                    return self.entry(image, target, index, key.counts, attempt > 0)
        raise RuntimeError("not one image of the data set can be read")

    def entry(self, image: torch.Tensor, target: Any, index: int, counts: bool, replaced: bool) -> tuple:
        """One entry of a batch."""
        return image, int(target) if counts else IGNORED, index if counts else NOT_COUNTED, int(replaced)

    def blank(self, index: int, counts: bool) -> tuple:
        """The entry in place of an unreadable image that is not replaced."""
        return torch.zeros_like(next(image for image in self._readable())), IGNORED, NOT_COUNTED, int(counts)

    def _report(self, index: int, error: Exception) -> None:
        if index not in self.reported:
            self.reported.add(index)
            text = f"warning: skipped unreadable image {self.name(index)} ({reason(error)})"
            print(text, file=sys.stderr, flush=True)

    def _readable(self) -> Iterator[torch.Tensor]:
        for index in range(len(self)):
            try:
                yield self.dataset[index][0]
            except UNREADABLE:
                continue


class Stream(IterableDataset):
    """A streaming data set in the form of :class:`Samples`; its reader shares the work out over processes itself."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[torch.Tensor, int, int, int]]:
        return ((image, int(target), NOT_COUNTED, 0) for image, target in self.dataset)

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)
