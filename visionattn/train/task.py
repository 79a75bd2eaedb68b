"""What every task shares: the network's start, its optimizer and schedule, and what a checkpoint says about it."""

import math
from collections import Counter
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from timm.optim import list_optimizers
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from visionattn.errors import UserError, one_line, some
from visionattn.train.data.base import Data
from visionattn.train.data.sampling import global_seed, seed_random
from visionattn.train.flops import training_flops
from visionattn.train.optim import create_optimizer
from visionattn.weights.card import CARD, settled
from visionattn.weights.load import refuse_unusable

ADVICE = "Look at the images and their targets, lower --model.lr, or train with --trainer.precision 32"


class Task(pl.LightningModule):
    """Base of the tasks; a subclass builds ``net`` and ``card``, and fills in the steps and the schedule.

    Attributes:
        monitor: The logged metric that says which checkpoint is best; higher is better.
        label: What the names of the best checkpoints call it.
        summary: Format of each metric in the line that an epoch prints.
        net: The network; its bare weights are what a run exports.
        card: Describes the network, so that a checkpoint is enough to predict.

    Args:
        name: Any timm model, ours included.
        num_classes: Number of classes; taken from the data.
        model_args: Arguments of the model, such as ``drop_path_rate``, ``depths`` or ``img_size``.
        pretrained: Start from the published weights.
        weights: Start from the weights in this file (timm's, a state dict, safetensors, or an earlier run's).
        reset_head: Let ``weights`` of a model with other classes in, with a new classifier.
        optimizer: A name that ``timm.optim.list_optimizers()`` knows.
        optimizer_args: Further arguments of the optimizer, such as ``betas``.
        lr: Peak learning rate.
        lr_batch: If given, ``lr`` is for this global batch size and is scaled in proportion to the real one.
        weight_decay: Weight decay, except on biases, norms and other vectors.
        layer_decay: Factor from each layer's learning rate to that of the layer before it.
        channels_last: Keep images and weights in channels-last memory, which is faster for most networks on a GPU.
        compile: Compile the model with ``torch.compile``.
    """

    monitor: str
    label: str
    summary: dict[str, str]
    net: nn.Module
    card: dict[str, Any]

    def __init__(
        self,
        name: str = "",
        num_classes: int = 1000,
        model_args: dict[str, Any] | None = None,
        pretrained: bool = False,
        weights: str | None = None,
        reset_head: bool = False,
        optimizer: str = "adamw",
        optimizer_args: dict[str, Any] | None = None,
        lr: float = 1e-3,
        lr_batch: int | None = None,
        weight_decay: float = 0.05,
        layer_decay: float | None = None,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if not name:
            raise UserError("no model: give a timm model with --model.name, such as van_b0")
        if not 0 < lr < math.inf:
            raise UserError(f"model.lr is {lr}: it must be greater than 0")
        self.require(0, "weight_decay")
        self.require(1, "lr_batch")
        self.require(0, "layer_decay", most=1)
        if optimizer not in list_optimizers():
            raise UserError(f"unknown optimizer {optimizer!r}: timm.optim.list_optimizers() lists all names")
        if pretrained and weights:
            raise UserError("model.pretrained and model.weights both say where to start: give one of them")
        self.unreadable: Counter[str] = Counter()

    def require(self, least: float, *names: str, most: float = math.inf) -> None:
        """Refuse settings, where they are given, outside of a range.

        Args:
            least: Smallest value that makes sense.
            *names: Of hyperparameters.
            most: Largest.

        Raises:
            UserError: With the setting, its value and the range.
        """
        for name in names:
            value = self.hparams[name]
            if value is not None and not least <= value <= most:
                allowed = f"at least {least:g}" if most == math.inf else f"between {least:g} and {most:g}"
                raise UserError(f"model.{name} is {value}: it must be {allowed}")

    def check(self, data: Data, splits: list[str]) -> None:
        """Refuse data that this task cannot train on or evaluate; raises ``UserError``."""

    def schedule(self, optimizer: torch.optim.Optimizer, lr: float) -> LambdaLR:
        """The learning rate of every step relative to the peak ``lr``."""
        raise NotImplementedError

    def example(self) -> Any:
        """What ``net`` takes for one image, to count its operations."""
        return torch.zeros(1, *self.card["preprocess"]["input_size"], device=self.device)

    @property
    def compiled(self) -> nn.Module:
        """The part of ``net`` that ``torch.compile`` takes."""
        return self.net

    # Set-up

    def setup(self, stage: str) -> None:
        self.card = settled(self.card) | self.trainer.datamodule.card()

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            from torch.distributed.fsdp import FSDPModule, fully_shard

            mesh, world = self.device_mesh["data_parallel"], self.trainer.world_size
            if mesh.size() != world:  # Lightning's default is tensor parallelism within a node
                fix = f"--trainer.strategy.data_parallel_size {world} --trainer.strategy.tensor_parallel_size 1"
                raise UserError(f"{mesh.size()} of {world} processes would share the data: add {fix}")
            if not isinstance(self.net, FSDPModule):
                fully_shard(self.net, mesh=mesh)

    def on_fit_start(self) -> None:
        self.flops_per_batch = training_flops(self.net, self.example()) * self.trainer.datamodule.batch_size
        if self.hparams.compile:
            # In place: wrapping the model in torch.compile() would put "_orig_mod." into every checkpoint key.
            self.compiled.compile()

    def configure_optimizers(self) -> dict[str, Any]:
        p, trainer = self.hparams, self.trainer
        lr = p.lr
        if p.lr_batch:
            batch = trainer.datamodule.batch_size * trainer.world_size * trainer.accumulate_grad_batches
            lr = p.lr * batch / p.lr_batch
            self.print(f"learning rate {p.lr:g} for a batch of {p.lr_batch} is {lr:g} for {batch}")
        given = p.optimizer_args or {}
        try:
            optimizer = create_optimizer(self.net, p.optimizer, lr, p.weight_decay, p.layer_decay, **given)
        except (TypeError, ValueError) as error:
            if not given:
                raise
            raise UserError(f"{p.optimizer} does not take model.optimizer_args {given}: {one_line(error)}") from error
        schedule = self.schedule(optimizer, lr)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"}}

    # Steps

    def on_train_epoch_start(self) -> None:
        data = self.trainer.train_dataloader.dataset
        if hasattr(data, "set_epoch"):
            data.set_epoch(self.current_epoch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # A step's dropout and Mixup depend on its place in the run only, so that a resumed run repeats them exactly.
        seed_random(global_seed(), self.current_epoch, batch_idx, self.global_rank)

    def log_loss(self, loss: Tensor, images: int) -> None:
        """Log the loss of a training step, and its mean over the epoch."""
        self.log("train/loss", loss, on_step=True, on_epoch=False, prog_bar=True)
        self.log("train/loss_epoch", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=images)

    def on_train_epoch_end(self) -> None:
        self.report_unreadable("train")

    def on_test_start(self) -> None:
        self._say_origin("test")

    def on_validation_start(self) -> None:
        if self.trainer.state.fn == "validate":
            self._say_origin("val")

    def _say_origin(self, split: str) -> None:
        """Print which images the scores that follow are of."""
        if isinstance(self.trainer.datamodule, Data):
            self.print(f"{split} scores are of {self.trainer.datamodule.origin(split)}")

    def on_validation_epoch_start(self) -> None:
        # Without SyncBatchNorm each process has its own running statistics; the checkpoint holds those of the first.
        if self.trainer.world_size > 1:
            for buffer in self.net.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def report_unreadable(self, stage: str, counter: str | None = None) -> None:
        """Log how many images could not be read, over all processes."""
        count = float(self.unreadable.pop(counter or stage, 0))
        self.log(f"{stage}/unreadable_images", count, sync_dist=True, reduce_fx="sum")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if broken := self.broken():
            raise UserError(
                f"the weights are no numbers any more ({some(broken, 1)}) after step {self.global_step}, so they are "
                f"not saved. {ADVICE}"
            )
        checkpoint[CARD] = self.card

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        own = self.state_dict()
        for state in (checkpoint.get("state_dict") or {}, checkpoint.get("current_model_state") or {}):
            refuse_unusable(str(self.trainer.ckpt_path), state, own)

    # Numbers

    def broken(self) -> list[str]:
        """The names of the parameters that are no finite numbers, and of the buffers that are no numbers."""
        parameters = [name for name, p in self.net.named_parameters() if not p.isfinite().all()]
        return parameters + [name for name, b in self.net.named_buffers() if b.is_floating_point() and b.isnan().any()]

    def require_finite(
        self,
        loss: Tensor,
        indices: Tensor,
        batch_idx: int,
        bad: Tensor | None = None,
        parts: dict[str, Tensor] | None = None,
    ) -> None:
        """Stop with the names of the images if the loss of a training step is no number.

        Args:
            loss: The step's loss.
            indices: Places of the batch's images in the data set. [B]
            batch_idx: Which batch of the epoch it is.
            bad: Which of the images have outputs that are no numbers, if that is known. [B]
            parts: What the loss consists of.

        Raises:
            UserError: With the step, the batch and the images.
        """
        if torch.isfinite(loss):
            return
        named = indices if bad is None or not bad.any() else indices[bad.to(indices.device)]
        names = self.trainer.datamodule.image_names(named, training=True)
        where = some(names, 16) if names else f"{len(named)} of its {len(indices)} images"
        values = ", ".join(f"{name} {float(value):g}" for name, value in (parts or {}).items())
        broken = self.broken()
        raise UserError(
            f"the loss is {float(loss)}{f' ({values})' if values else ''} in batch {batch_idx + 1} of epoch "
            f"{self.current_epoch + 1}, at step {self.global_step}, on {where}"
            f"{f'; the weights are damaged already ({some(broken, 1)})' if broken else ''}. {ADVICE}"
        )
