"""Image classification with any timm model."""

from collections import Counter
from typing import Any

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from lightning.pytorch.strategies import ModelParallelStrategy
from timm.data import Mixup
from timm.optim import list_optimizers
from torch import Tensor
from torchmetrics import MeanMetric

from visionattn.train.data.sampling import IGNORED, global_seed, seed_random
from visionattn.train.errors import UserError
from visionattn.train.flops import training_flops
from visionattn.train.optim import create_optimizer, warmup_cosine
from visionattn.train.weights import CARD, build, load_weights


class Classification(pl.LightningModule):
    """Train a timm model to classify images.

    Args:
        name: Any timm model, ours included.
        num_classes: Number of classes; taken from the data.
        model_args: Arguments of the model, such as ``drop_path_rate``, ``depths`` or ``img_size``.
        pretrained: Start from the published weights.
        weights: Start from the weights in this file (timm, plain, safetensors, or a checkpoint of an earlier run).
        reset_head: Let ``weights`` of a model with other classes in, with a new classifier.
        optimizer: A name that ``timm.optim.list_optimizers()`` knows.
        optimizer_args: Further arguments of the optimizer, such as ``betas``.
        lr: Peak learning rate.
        lr_batch: If given, ``lr`` is for this global batch size and is scaled in proportion to the real one.
        weight_decay: Weight decay, except on biases, norms and other vectors.
        layer_decay: Factor from each layer's learning rate to that of the layer before it.
        warmup_epochs: Epochs of linear warm-up.
        warmup_lr: First learning rate of the warm-up.
        min_lr: Last learning rate of the cosine.
        cooldown_epochs: Epochs at ``min_lr`` after the cosine.
        label_smoothing: Share of the target spread over all classes.
        mixup: Alpha of Mixup; 0 for none.
        cutmix: Alpha of CutMix; 0 for none.
        mixup_prob: Share of batches that are mixed.
        mixup_switch_prob: Share of mixed batches that get CutMix, if both are on.
        channels_last: Keep images and weights in channels-last memory, which is faster for most networks on a GPU.
        compile: Compile the model with ``torch.compile``.
    """

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
        warmup_epochs: float = 5.0,
        warmup_lr: float = 1e-6,
        min_lr: float = 1e-6,
        cooldown_epochs: float = 0.0,
        label_smoothing: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        mixup_prob: float = 1.0,
        mixup_switch_prob: float = 0.5,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if not name:
            raise UserError("no model: give a timm model with --model.name, such as van_b0")
        if lr <= 0:
            raise UserError(f"model.lr is {lr}: it must be greater than 0")
        if optimizer not in list_optimizers():
            raise UserError(f"unknown optimizer {optimizer!r}: timm.optim.list_optimizers() lists all names")
        if pretrained and weights:
            raise UserError("model.pretrained and model.weights both say where to start: give one of them")
        self.card = dict(name=name, model_args=model_args or {}, num_classes=num_classes)
        self.net = build(self.card, pretrained)
        if weights:
            load_weights(self.net, weights, reset_head)
        if channels_last:
            self.net.to(memory_format=torch.channels_last)
        self.mixup = None
        if mixup > 0 or cutmix > 0:
            self.mixup = Mixup(
                mixup_alpha=mixup,
                cutmix_alpha=cutmix,
                prob=mixup_prob,
                switch_prob=mixup_switch_prob,
                label_smoothing=label_smoothing,
                num_classes=num_classes,
            )
        self.metrics = torch.nn.ModuleDict({name: MeanMetric() for name in ("loss", "acc1", "acc5")})
        self.unreadable: Counter[str] = Counter()

    # Set-up

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule
        self.card |= dict(class_names=list(data.class_names), preprocess=dict(data.preprocess))

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
        image = torch.zeros(1, *self.card["preprocess"]["input_size"], device=self.device)
        self.flops_per_batch = training_flops(self.net, image) * self.trainer.datamodule.batch_size
        if self.hparams.compile:
            # In place: wrapping the model in torch.compile() would put "_orig_mod." into every checkpoint key.
            self.net.compile()

    def configure_optimizers(self) -> dict[str, Any]:
        p, trainer = self.hparams, self.trainer
        lr = p.lr
        if p.lr_batch:
            batch = trainer.datamodule.batch_size * trainer.world_size * trainer.accumulate_grad_batches
            lr = p.lr * batch / p.lr_batch
            self.print(f"learning rate {p.lr:g} for a batch of {p.lr_batch} is {lr:g} for {batch}")
        optimizer = create_optimizer(
            self.net, p.optimizer, lr, p.weight_decay, p.layer_decay, **(p.optimizer_args or {})
        )
        steps = int(trainer.estimated_stepping_batches)
        epoch = steps / max(1, trainer.max_epochs or 1)
        warmup, total = round(p.warmup_epochs * epoch), round(steps - p.cooldown_epochs * epoch)
        start, end = min(1.0, p.warmup_lr / lr), min(1.0, p.min_lr / lr)
        schedule = warmup_cosine(optimizer, min(warmup, steps), total, start, end)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"}}

    # Steps

    def forward(self, images: Tensor) -> Tensor:
        if self.hparams.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return self.net(images)

    def on_train_epoch_start(self) -> None:
        data = self.trainer.train_dataloader.dataset
        if hasattr(data, "set_epoch"):
            data.set_epoch(self.current_epoch)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # A step's dropout and Mixup depend on its place in the run only, so that a resumed run repeats them exactly.
        seed_random(global_seed(), self.current_epoch, batch_idx, self.global_rank)

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> Tensor:
        images, targets, unreadable = batch
        self.unreadable["train"] += int(unreadable.sum())
        smoothing = self.hparams.label_smoothing
        if self.mixup is not None and len(images) > 1:
            even = len(images) // 2 * 2  # Mixup pairs the images up
            images, targets = self.mixup(images[:even], targets[:even])
            smoothing = 0.0  # already in the mixed targets
        loss = F.cross_entropy(self(images), targets, label_smoothing=smoothing)
        self.log("train/loss", loss, on_step=True, on_epoch=False, prog_bar=True)
        self.log("train/loss_epoch", loss, on_step=False, on_epoch=True, sync_dist=True, batch_size=len(images))
        return loss

    def on_train_epoch_end(self) -> None:
        self._report_unreadable("train")

    def on_validation_epoch_start(self) -> None:
        # Without SyncBatchNorm each process has its own running statistics; the checkpoint holds those of the first.
        if self.trainer.world_size > 1:
            for buffer in self.net.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def test_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch[0]).softmax(-1)

    def _evaluate(self, batch: tuple[Tensor, Tensor, Tensor]) -> None:
        images, targets, unreadable = batch
        self.unreadable["eval"] += int(unreadable.sum())
        logits = self(images).float()
        # Entries that only pad the last batch carry weight 0, so any number of processes counts every image once.
        counts = (targets != IGNORED).float()
        order = logits.topk(min(5, logits.shape[1])).indices == targets[:, None]
        loss = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
        self.metrics["loss"].update(loss, counts)
        self.metrics["acc1"].update(100 * order[:, 0].float(), counts)
        self.metrics["acc5"].update(100 * order.any(1).float(), counts)

    def _report(self, stage: str) -> None:
        for name, metric in self.metrics.items():
            self.log(f"{stage}/{name}", metric, prog_bar=name != "acc5")
        self._report_unreadable(stage, "eval")

    def _report_unreadable(self, stage: str, counter: str | None = None) -> None:
        count = float(self.unreadable.pop(counter or stage, 0))
        self.log(f"{stage}/unreadable_images", count, sync_dist=True, reduce_fx="sum")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint[CARD] = self.card
