"""What the data of every classification run share: loaders, checks, and what a model must know about its images."""

import functools
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from visionattn.train.data.sampling import (
    EpochSampler,
    ResumableLoader,
    Samples,
    Stream,
    global_seed,
    training_progress,
)
from visionattn.train.errors import UserError


class ClassificationData(pl.LightningDataModule):
    """Base of the data modules; a subclass fills the three attributes and ``dataset``.

    Attributes:
        num_classes: Number of classes; the model takes it over.
        class_names: One name per class.
        preprocess: Arguments of ``timm.data.create_transform`` for inference. A checkpoint carries both of these,
            so that it can predict by itself.

    Args:
        batch_size: Images per step and process.
        eval_batch_size: The same for validation and test; ``batch_size`` if not given.
        num_workers: Processes that load images, for each training process.
    """

    num_classes: int
    class_names: list[str]
    preprocess: dict[str, Any]

    def __init__(self, batch_size: int, eval_batch_size: int | None, num_workers: int) -> None:
        super().__init__()
        for name, value in (("batch_size", batch_size), ("eval_batch_size", eval_batch_size)):
            if value is not None and value < 1:
                raise UserError(f"data.{name} is {value}: it must be at least 1")
        if num_workers < 0:
            raise UserError(f"data.num_workers is {num_workers}: it must be 0 (load in the main process) or more")
        self.batch_size, self.num_workers = batch_size, num_workers
        self.eval_batch_size = eval_batch_size or batch_size

    def dataset(self, split: str) -> tuple[Any, Callable[[int], str]]:
        """The data set of ``split`` (``"train"``, ``"val"`` or ``"test"``), and what names its images."""
        raise NotImplementedError

    def check(self, splits: list[str]) -> None:
        """Look for damaged data before any work starts; raises ``UserError``."""

    def train_dataloader(self) -> DataLoader:
        loader = self._loader("train", self.batch_size, training=True)
        loader.progress = functools.partial(training_progress, self.trainer)
        return loader

    def val_dataloader(self) -> DataLoader:
        return self._loader("val", self.eval_batch_size, training=False)

    def test_dataloader(self) -> DataLoader:
        return self._loader("test", self.eval_batch_size, training=False)

    def _loader(self, split: str, batch_size: int, training: bool) -> ResumableLoader:
        dataset, name = self.dataset(split)
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        common = dict(
            batch_size=batch_size,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )
        if isinstance(dataset, torch.utils.data.IterableDataset):
            return ResumableLoader(Stream(dataset), **common)
        # Smaller sets than a batch are used whole; otherwise every step has the full batch, as schedules assume.
        full_batches = training and len(dataset) >= batch_size * world
        sampler = EpochSampler(dataset, world, rank, shuffle=training, seed=global_seed())
        return ResumableLoader(Samples(dataset, name, training), sampler=sampler, drop_last=full_batches, **common)
