"""Averaged weights, throughput, exported weights and pictures of what is predicted."""

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.throughput import _plugin_to_compute_dtype
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, ThroughputMonitor, WeightAveraging
from lightning.pytorch.loggers import TensorBoardLogger
from torch.optim.swa_utils import get_ema_multi_avg_fn

from visionattn.errors import UserError, amount
from visionattn.train.flops import peak_flops
from visionattn.train.overlays import stacked, to_pil
from visionattn.train.saving import LastCheckpoint  # noqa: F401  (configurations name it here)
from visionattn.weights.export import export_weights


class EMA(WeightAveraging):
    """Exponential moving average of the weights; it is what is validated, monitored and exported.

    A checkpoint's ``state_dict`` is the average; resuming also restores the raw weights beside it.

    Args:
        decay: Share of the average kept at each step.
        warmup: Start with a short memory, ``(1 + step) / (10 + step)``, until ``decay`` is reached.
    """

    def __init__(self, decay: float = 0.9998, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise UserError(f"decay of EMA is {decay}: it must be at least 0 and less than 1")
        self.swapped = False
        self.decay, self.warmup = decay, warmup
        super().__init__(multi_avg_fn=self._average)

    def _average(self, averages: list[torch.Tensor], values: list[torch.Tensor], _: Any) -> None:
        step = self._latest_update_step
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        get_ema_multi_avg_fn(decay)(averages, values, None)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if stage == "fit" and isinstance(
            trainer.strategy, pl.strategies.ModelParallelStrategy | pl.strategies.FSDPStrategy
        ):
            raise UserError("EMA cannot average sharded weights: remove it, or use --trainer.strategy ddp")
        with warnings.catch_warnings():
            # It warns that configure_model() does not shard here; a sharded model has just been refused.
            warnings.filterwarnings("ignore", "You're using the WeightAveraging callback with a model")
            super().setup(trainer, pl_module, stage)

    def _swap_models(self, pl_module: pl.LightningModule) -> None:
        self.swapped = not self.swapped
        super()._swap_models(pl_module)

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        if self.swapped:  # out of a validation: what is saved now must have the raw weights in their place
            self._swap_models(pl_module)


def images_in(batch: Any) -> int:
    """Number of images in a batch of our data modules."""
    return len(batch[0])


class Throughput(ThroughputMonitor):
    """Logs images per second and, on GPUs, the share of the peak that is used.

    Args:
        window_size: Steps to average over.
    """

    def __init__(self, window_size: int = 20) -> None:
        super().__init__(batch_size_fn=images_in, window_size=window_size, separator="/")

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "FLOPs not found")
            super().setup(trainer, pl_module, stage)
        device = trainer.strategy.root_device
        if self.available_flops is None and device.type == "cuda":
            dtype = _plugin_to_compute_dtype(trainer.precision_plugin)
            self.available_flops = peak_flops(torch.cuda.get_device_name(device), dtype)
            for throughput in self._throughputs.values():
                throughput.available_flops = self.available_flops


class BestCheckpoints(ModelCheckpoint):
    """Keeps the checkpoints with the highest value of the task's metric: ``val/acc1``, ``val/mIoU`` or ``val/AP``.

    Args:
        save_top_k: How many.
    """

    def __init__(self, save_top_k: int = 3) -> None:
        # The metric's name has a "/", which would make folders if it were inserted.
        super().__init__(monitor="of the task", mode="max", save_top_k=save_top_k, auto_insert_metric_name=False)

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self.monitor = pl_module.monitor
        self.filename = f"epoch{{epoch:03d}}-{pl_module.label}{{{self.monitor}:.2f}}"
        super().setup(trainer, pl_module, stage)


class ExportWeights(Callback):
    """Writes the best checkpoint's bare weights to ``model.safetensors`` beside it when training ends."""

    path: str | None = None

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        best = best_checkpoint(trainer)
        if trainer.is_global_zero and best and Path(best).is_file():  # a sharded checkpoint is a folder
            self.path = str(Path(best).with_name("model.safetensors"))
            export_weights(best, self.path)


class Pictures(Callback):
    """Writes ``pictures/epochNNN.png``: validation images with their targets and with what the task predicts.

    Only tasks that can draw one image's predictions, those for segmentation and detection, have any.

    Args:
        count: Images to show, the first of the validation set.
    """

    def __init__(self, count: int = 6) -> None:
        self.count, self.rows = count, []

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not hasattr(pl_module, "picture") or not trainer.is_global_zero or trainer.sanity_checking:
            return
        for image, target, prediction in zip(batch.images, batch.targets, outputs, strict=True):
            if len(self.rows) < self.count:
                self.rows.append(pl_module.picture(image, target, prediction))

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not self.rows:
            return
        picture, self.rows = stacked(self.rows), []
        path = Path(trainer.default_root_dir, "pictures", f"epoch{trainer.current_epoch:03d}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        to_pil(picture).save(path)
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image("val/pictures", picture, trainer.global_step)


def best_checkpoint(trainer: pl.Trainer) -> str | None:
    """The best checkpoint file of a finished run, or the last one if it was never validated."""
    savers = [callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)]
    return next((path for saver in savers if (path := saver.best_model_path or saver.last_model_path)), None)


def check_disk(trainer: pl.Trainer, pl_module: pl.LightningModule, folder: str) -> None:
    """Refuse to start when the checkpoints of the run cannot be written, or cannot fit on the disk.

    Args:
        trainer: Holds the checkpoint and averaging callbacks.
        pl_module: The task, whose weights are counted.
        folder: Where checkpoints go.

    Raises:
        UserError: If the folder cannot be made or written to, or less is free than the checkpoints need.
    """
    existing = next(path for path in (Path(folder).absolute(), *Path(folder).absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"--out {folder}: {existing} is a file. Choose another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--out {folder}: nothing can be written to {existing}. Choose another folder")
    weights = sum(t.numel() * t.element_size() for t in pl_module.state_dict().values())
    copies = 3 + any(isinstance(callback, WeightAveraging) for callback in trainer.callbacks)  # weights, two moments
    savers = [callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)]
    # One more than are kept, because a new file is written before an old one goes.
    files = sum(max(1, saver.save_top_k) + bool(saver.save_last) + 1 for saver in savers)
    needed, free = weights * copies * files, shutil.disk_usage(existing).free
    if needed > free:
        raise UserError(
            f"not enough disk space: the checkpoints need about {amount(needed)} and {existing} has {amount(free)}. "
            "Free some, or choose another disk with --out"
        )
