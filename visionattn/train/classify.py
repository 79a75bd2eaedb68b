"""Image classification with any timm model."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.data import Mixup
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from visionattn.errors import UserError
from visionattn.train.data.base import Data
from visionattn.train.data.dense import DenseData
from visionattn.train.data.sampling import IGNORED
from visionattn.train.optim import warmup_cosine, warmup_poly
from visionattn.train.task import Task
from visionattn.weights.card import build
from visionattn.weights.load import load_weights


class Classification(Task):
    """Train a timm model to classify images.

    Args:
        warmup_epochs: Epochs of linear warm-up.
        warmup_lr: First learning rate of the warm-up.
        decay: Way from the peak to ``min_lr``, ``cosine`` or ``linear``.
        min_lr: Last learning rate of the decay.
        cooldown_epochs: Epochs at ``min_lr`` after that.
        label_smoothing: Share of the target spread over all classes.
        mixup: Alpha of Mixup; 0 for none.
        cutmix: Alpha of CutMix; 0 for none.
        mixup_prob: Share of batches that are mixed.
        mixup_switch_prob: Share of mixed batches that get CutMix, if both are on.
        **kwargs: What every task takes.
    """

    monitor = "val/acc1"
    label = "acc"
    summary = {"val/loss": "val loss {:.4f}", "val/acc1": "val top-1 {:.2f} %"}

    def __init__(
        self,
        warmup_epochs: float = 5.0,
        warmup_lr: float = 1e-6,
        decay: str = "cosine",
        min_lr: float = 1e-6,
        cooldown_epochs: float = 0.0,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mixup_prob: float = 1.0,
        mixup_switch_prob: float = 0.5,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        if decay not in ("cosine", "linear"):
            raise UserError(f"model.decay is {decay!r}: it must be cosine or linear")
        self.require(0, "warmup_epochs", "warmup_lr", "min_lr", "cooldown_epochs", "mixup", "cutmix")
        self.require(0, "label_smoothing", "mixup_prob", "mixup_switch_prob", most=1)
        p = self.hparams
        self.card = dict(name=p.name, model_args=p.model_args or {}, num_classes=p.num_classes)
        self.net = build(self.card, p.pretrained)
        if p.weights:
            load_weights(self.net, p.weights, p.reset_head)
        if p.channels_last:
            self.net.to(memory_format=torch.channels_last)
        self.mixup = None
        if mixup > 0 or cutmix > 0:
            self.mixup = Mixup(
                mixup_alpha=mixup,
                cutmix_alpha=cutmix,
                prob=mixup_prob,
                switch_prob=mixup_switch_prob,
                label_smoothing=label_smoothing,
                num_classes=p.num_classes,
            )
        self.metrics = torch.nn.ModuleDict({name: MeanMetric() for name in ("loss", "acc1", "acc5")})

    def check(self, data: Data, splits: list[str]) -> None:
        if isinstance(data, DenseData):
            raise UserError(f"{type(data).__name__} has no class of each image: choose another --data, or --model")
        if self.mixup is not None and "train" in splits and data.batch_size % 2:
            raise UserError(f"Mixup pairs images up, but data.batch_size is {data.batch_size}: make it even")

    def schedule(self, optimizer: torch.optim.Optimizer, lr: float) -> LambdaLR:
        p = self.hparams
        steps = int(self.trainer.estimated_stepping_batches)
        epoch = steps / max(1, self.trainer.max_epochs or 1)
        warmup, total = round(p.warmup_epochs * epoch), round(steps - p.cooldown_epochs * epoch)
        shape = min(warmup, steps), total, min(1.0, p.warmup_lr / lr), min(1.0, p.min_lr / lr)
        return warmup_cosine(optimizer, *shape) if p.decay == "cosine" else warmup_poly(optimizer, *shape, power=1.0)

    # Steps

    def forward(self, images: Tensor) -> Tensor:
        if self.hparams.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets, indices, unreadable = batch
        self.unreadable["train"] += int(unreadable.sum())
        smoothing = self.hparams.label_smoothing
        if self.mixup is not None and len(images) > 1:
            even = len(images) // 2 * 2  # Mixup pairs the images up
            images, targets = self.mixup(images[:even], targets[:even])
            indices = indices[:even]
            smoothing = 0.0  # already in the mixed targets
        logits = self(images)
        loss = F.cross_entropy(logits, targets, label_smoothing=smoothing)
        self.require_finite(loss, indices, batch_idx, ~logits.isfinite().all(1))
        self.log_loss(loss, len(images))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def test_step(self, batch: tuple[Tensor, Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        return self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).softmax(-1)

    def _evaluate(self, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Tensor:
        """Count a batch in; returns its logits."""
        images, targets, _, unreadable = batch
        self.unreadable["eval"] += int(unreadable.sum())
        logits = self(images).float()
        # Entries that only pad the last batch carry weight 0, so any number of processes counts every image once.
        counts = (targets != IGNORED).float()
        order = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        loss = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
        self.metrics["loss"].update(loss, counts)
        self.metrics["acc1"].update(100 * order[:, 0].float(), counts)
        self.metrics["acc5"].update(100 * order.any(1).float(), counts)
        return logits

    def _report(self, stage: str) -> None:
        for name, metric in self.metrics.items():
            self.log(f"{stage}/{name}", metric, prog_bar=name != "acc5")
        self.report_unreadable(stage, "eval")
