"""What the data of every run share: loaders, checks, and what a model must know about its images."""

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from visionattn.errors import UserError, some
from visionattn.train.data.sampling import NOT_COUNTED, EpochSampler, Samples, Stream, global_seed


class Data(pl.LightningDataModule):
    """Base of the data modules; a subclass fills the three attributes and ``dataset``.

    Attributes:
        num_classes: Number of classes; the model takes it over.
        class_names: One name per class.
        preprocess: What inference does to an image; for classification the arguments of
            ``timm.data.create_transform``. A checkpoint carries both of these, so that it can predict by itself.

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
        self.names: dict[bool, Callable[[int], str]] = {}
        self.resume_at = {"epoch": 0, "batch": 0}

    def dataset(self, split: str) -> tuple[Any, Callable[[int], str]]:
        """The data set of ``split`` (``"train"``, ``"val"`` or ``"test"``), and what names its images."""
        raise NotImplementedError

    def origin(self, split: str) -> str:
        """Where the images of ``split`` come from, to be said with a score; generated data tests on validation's."""
        return f"the {'training' if split == 'train' else 'validation'} images of {type(self).__name__}"

    def check(self, splits: list[str]) -> None:
        """Look for damaged data before any work starts; raises ``UserError``."""

    def card(self) -> dict[str, Any]:
        """What a checkpoint must know about the data to predict."""
        return dict(class_names=list(self.class_names), preprocess=dict(self.preprocess))

    def samples(self, dataset: Any, name: Callable[[int], str], training: bool) -> Samples:
        """The data set with seeded augmentation, and with unreadable images handled."""
        return Samples(dataset, name, training)

    def image_names(self, indices: Tensor, training: bool) -> list[str]:
        """The files of a batch's ``indices``, as far as they are known."""
        return [self.names[training](index) for index in indices.tolist() if index != NOT_COUNTED]

    def collate(self, training: bool) -> Callable | None:
        """What makes a batch of entries; None for the usual stacking."""
        return None

    def state_dict(self) -> dict[str, int]:
        """Where training is: the epoch, and how many of its batches are done."""
        done = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        epoch, batch = divmod(done, int(self.trainer.num_training_batches))
        return {"epoch": epoch, "batch": batch}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        # Lightning's own protocol, a loader with state, comes too late: asking for the number of steps to plan the
        # learning rate creates the loader, whose workers then fetch ahead, before Lightning restores its state.
        self.resume_at = state_dict

    def train_dataloader(self) -> DataLoader:
        loader = self._loader("train", self.batch_size, training=True)
        if isinstance(loader.sampler, EpochSampler):
            loader.sampler.set_epoch(self.resume_at["epoch"])
            loader.sampler.skip = self.resume_at["batch"] * self.batch_size
        return loader

    def val_dataloader(self) -> DataLoader:
        return self._loader("val", self.eval_batch_size, training=False)

    def test_dataloader(self) -> DataLoader:
        return self._loader("test", self.eval_batch_size, training=False)

    def _loader(self, split: str, batch_size: int, training: bool) -> DataLoader:
        dataset, name = self.dataset(split)
        world, rank = (self.trainer.world_size, self.trainer.global_rank) if self.trainer else (1, 0)
        common = dict(
            batch_size=batch_size,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )
        if isinstance(dataset, torch.utils.data.IterableDataset):
            return DataLoader(Stream(dataset), **common)
        # Smaller sets than a batch are used whole; otherwise every step has the full batch, as schedules assume.
        full_batches = training and len(dataset) >= batch_size * world
        sampler = EpochSampler(dataset, world, rank, shuffle=training, seed=global_seed())
        self.names[training] = name
        samples = self.samples(dataset, name, training)
        common["collate_fn"] = self.collate(training)
        return DataLoader(samples, sampler=sampler, drop_last=full_batches, **common)


def require_distinct(names: list[str], where: object) -> None:
    """Refuse classes of one name; ``where`` they are named is in the ``UserError``."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"{where} names classes twice: {some(twice)}. Give each class a name of its own")
