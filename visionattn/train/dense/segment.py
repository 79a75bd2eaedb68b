"""Semantic segmentation with any timm backbone."""

from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassConfusionMatrix

from visionattn.errors import UserError
from visionattn.train.data.base import Data
from visionattn.train.data.dense import DenseBatch
from visionattn.train.data.joint import IGNORE
from visionattn.train.data.segmentation import SegmentationData
from visionattn.train.dense.heads import resize
from visionattn.train.dense.segmenter import Segmenter, multi_scale, sliding, whole
from visionattn.train.dense.task import DenseTask
from visionattn.train.overlays import overlay_classes, side_by_side


class Segmentation(DenseTask):
    """Train a backbone and a head to tell the class of every pixel.

    Args:
        head: "upernet", "fpn" (Semantic FPN) or "mlp" (SegFormer's).
        head_args: Further arguments of the head: ``width``, ``dropout``, ...
        aux_weight: Weight of the auxiliary head's loss, 0.4 in the papers that use UPerNet; 0 leaves the head out.
        window: Side of the sliding windows in evaluation; whole images if not given.
        window_stride: From one window to the next; two thirds of ``window`` if not given.
        test_scales: Sizes, relative to the usual one, that ``test`` averages over.
        test_flip: Average over mirror images too, in ``test``.
        **kwargs: What every dense task takes.
    """

    monitor = "val/mIoU"
    label = "mIoU"
    summary = {"val/loss": "val loss {:.4f}", "val/mIoU": "mIoU {:.2f} %", "val/aAcc": "pixels right {:.2f} %"}

    def __init__(
        self,
        head: Literal["upernet", "fpn", "mlp"] = "upernet",
        head_args: dict[str, Any] | None = None,
        aux_weight: float = 0.0,
        window: int | None = None,
        window_stride: int | None = None,
        test_scales: list[float] = [1.0],  # noqa: B006  (never changed; the parser wants a list)
        test_flip: bool = False,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        p = self.hparams
        self.require(0, "aux_weight")
        if window is not None and (window < 1 or not 1 <= (window_stride or 1) <= window):
            raise UserError(f"model.window is {window} and model.window_stride {window_stride}: 1 <= stride <= window")
        if not test_scales or min(test_scales) <= 0:
            raise UserError(f"model.test_scales is {test_scales}: give numbers greater than 0")
        self.card = dict(
            task="segment",
            name=p.name,
            num_classes=p.num_classes,
            model_args=p.model_args or {},
            backbone_args=p.backbone_args or {},
            head=head,
            head_args=head_args or {},
            aux=aux_weight > 0,
            window=window,
            window_stride=window_stride or (window and max(1, window * 2 // 3)),
        )
        self.net = Segmenter.from_card(self.card, p.pretrained)
        self.start()
        self.confusion = MulticlassConfusionMatrix(p.num_classes, ignore_index=IGNORE, validate_args=False)
        self.loss = MeanMetric()

    def check(self, data: Data, splits: list[str]) -> None:
        super().check(data, splits)
        if not isinstance(data, SegmentationData):
            raise UserError(f"{type(data).__name__} has no class maps: choose another --data")
        if "train" in splits and self.hparams.head == "upernet" and data.batch_size < 2:
            raise UserError(
                "data.batch_size is 1: batch norm in UPerNet's pooled maps needs at least 2 images in each process"
            )

    # Steps

    def training_step(self, batch: DenseBatch, batch_idx: int) -> Tensor:
        self.unreadable["train"] += int(batch.unreadable.sum())
        aux = self.hparams.aux_weight
        out = self.net(self._images(batch.images), with_aux=aux > 0)
        logits, aux_logits = out if aux > 0 else (out, None)
        targets = batch.targets.long()
        parts = {"loss": self._loss(logits, targets)}
        if aux_logits is not None:
            parts["aux"] = aux * self._loss(aux_logits, targets)
        loss = sum(parts.values())
        self.require_finite(loss, batch.indices, batch_idx, ~logits.flatten(1).isfinite().all(1), parts)
        self.log_loss(loss, len(batch.images))
        return loss

    def validation_step(self, batch: DenseBatch, batch_idx: int) -> list[Tensor]:
        return self._evaluate(batch, [1.0], False)

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def test_step(self, batch: DenseBatch, batch_idx: int) -> list[Tensor]:
        return self._evaluate(batch, self.hparams.test_scales, self.hparams.test_flip)

    def on_test_epoch_end(self) -> None:
        if self.trainer.is_global_zero:
            print_classes(self.confusion.compute(), self.card["class_names"])
        else:
            self.confusion.compute()
        self._report("test")

    def picture(self, image: Tensor, target: Tensor, classes: Tensor) -> Tensor:
        """The image, its class map, and the predicted one."""
        palette = self.card["palette"]
        size = target.shape[-2:]
        image = resize(image[None].float(), size)[0].round().to(torch.uint8)
        classes = torch.where(target.to(classes) == IGNORE, torch.full_like(classes, IGNORE), classes)
        shown = (image.cpu(), overlay_classes(image, target, palette), overlay_classes(image, classes, palette))
        return side_by_side(shown)

    def _images(self, images: Tensor) -> Tensor:
        images = images.to(self.dtype if self.dtype.is_floating_point else torch.float32) / 255
        return images.contiguous(memory_format=torch.channels_last) if self.hparams.channels_last else images

    def _loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean over the pixels that count; 0 if none does, where PyTorch's mean is no number."""
        logits = resize(logits.float(), targets.shape[-2:])
        total = F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
        return total / (targets != IGNORE).sum().clamp(min=1)

    def _evaluate(self, batch: DenseBatch, scales: list[float], flip: bool) -> list[Tensor]:
        self.unreadable["eval"] += int(batch.unreadable.sum())
        predicted = []
        for images, targets in alike(batch.images, batch.targets):
            run = inference(self.net, self.card)
            images, size = self._images(images), targets.shape[-2:]
            if scales == [1.0] and not flip:
                scores = run(images, size)
                loss = F.cross_entropy(scores, targets.long(), ignore_index=IGNORE, reduction="sum")
            else:
                scores = multi_scale(run, images, size, scales, flip)
                loss = F.nll_loss(scores.log(), targets.long(), ignore_index=IGNORE, reduction="sum")
            counted = (targets != IGNORE).sum()
            classes = scores.argmax(1)
            self.loss.update(loss / counted.clamp(min=1), counted)
            self.confusion.update(classes, targets)
            predicted += list(classes.to(torch.uint8))
        return predicted

    def _report(self, stage: str) -> None:
        for name, value in segmentation_scores(self.confusion.compute()).items():
            self.log(f"{stage}/{name}", value, prog_bar=name == "mIoU")
        self.confusion.reset()
        self.log(f"{stage}/loss", self.loss)
        self.report_unreadable(stage, "eval")


def inference(net: Segmenter, card: dict[str, Any]):
    """``run(images, size)``, which gives logits from whole images or from sliding windows, as ``card`` says."""
    if card["window"] is None:
        return partial(whole, net)
    return partial(sliding, net, window=card["window"], stride=card["window_stride"])


def alike(images: list[Tensor], targets: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """One stack of images and one of targets if all have one size, else one stack for each image."""
    if len({tuple(x.shape[-2:]) for x in images}) == 1 == len({tuple(x.shape[-2:]) for x in targets}):
        return [(torch.stack(list(images)), torch.stack(list(targets)))]
    return [(image[None], target[None]) for image, target in zip(images, targets, strict=True)]


def class_scores(confusion: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection over union and accuracy of each class in percent; not a number for a class that never occurs.

    Args:
        confusion: Pixels by true class and predicted class. [C, C]
    """
    confusion = confusion.double()
    right, true, predicted = confusion.diag(), confusion.sum(1), confusion.sum(0)
    return 100 * right / (true + predicted - right), 100 * right / true


def segmentation_scores(confusion: Tensor) -> dict[str, Tensor]:
    """``mIoU``, ``aAcc`` (of all pixels) and ``mAcc`` (mean over classes), in percent, over a whole data set."""
    iou, accuracy = class_scores(confusion)
    everything = 100 * confusion.diag().sum() / confusion.sum().clamp(min=1)
    scores = {"mIoU": iou.nanmean(), "aAcc": everything, "mAcc": accuracy.nanmean()}
    return {name: value.nan_to_num().float() for name, value in scores.items()}


def print_classes(confusion: Tensor, names: list[str]) -> None:
    """A line per class: its intersection over union and its accuracy."""
    width = max(map(len, names))
    print(f"{'class':<{width}}  IoU, %  accuracy, %")
    for name, iou, accuracy in zip(names, *(scores.tolist() for scores in class_scores(confusion)), strict=True):
        print(f"{name:<{width}}  {iou:6.2f}  {accuracy:11.2f}")
