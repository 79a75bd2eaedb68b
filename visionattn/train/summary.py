"""Pictures of a whole run, drawn at its end: curves, and for classification the confusions and the worst images."""

import heapq
import itertools
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image
from torch import Tensor

from visionattn.train.data.sampling import IGNORED

MOST_CLASSES = 60
"""With more, the squares of a confusion matrix are too small to read."""


class Summary(Callback):
    """Writes ``curves.png`` and, for classification, ``confusion.png`` and ``predictions.png`` when training ends.

    The last two are of the best validation that this process has seen; with several processes of the first one's share.

    Args:
        count: Images to show, the worst of the validation set.
    """

    def __init__(self, count: int = 40) -> None:
        self.count, self.best = count, -1.0
        self.seen: Validation | None = None
        self.kept: Validation | None = None

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.seen = Validation(self.count) if hasattr(pl_module, "predict_step") and trainer.is_global_zero else None

    def on_validation_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, *_: Any, **__: Any
    ) -> None:
        if self.seen is not None and isinstance(outputs, Tensor) and not trainer.sanity_checking:
            self.seen.add(batch[0], batch[1], outputs.float().softmax(-1))

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        value = float(trainer.callback_metrics.get(pl_module.monitor, -1.0))
        if not trainer.sanity_checking and value > self.best:
            self.best, self.kept = value, self.seen
        self.seen = None

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:
            return
        from visionattn.train.figures import draw_confusion, draw_curves, draw_predictions  # Matplotlib takes a second

        folder, card = Path(trainer.default_root_dir), pl_module.card
        folder.mkdir(parents=True, exist_ok=True)  # with loggers of the user's own nothing may have been there
        log = folder / "metrics.csv"
        if log.exists():
            unit = {"val/acc1": "top-1 accuracy, %"}.get(pl_module.monitor, f"{pl_module.label}, %")
            draw_curves(log, folder / "curves.png", card["name"], pl_module.monitor, unit)
        if self.kept is not None and self.kept.targets:
            names, (targets, predicted) = card["class_names"], self.kept.classes()
            if len(names) <= MOST_CLASSES:
                draw_confusion(targets, predicted, names, folder / "confusion.png")
            images, worst, scores = self.kept.worst(card["preprocess"])
            counts = len(targets), int((targets != predicted).sum())
            draw_predictions(images, worst, scores, names, folder / "predictions.png", counts)


class Validation:
    """What a classifier made of the images of one validation, and the worst of them.

    Args:
        count: Images to keep.
    """

    def __init__(self, count: int) -> None:
        self.count, self.order = count, itertools.count()
        self.targets: list[int] = []
        self.predicted: list[int] = []
        self.heap: list[tuple] = []

    def add(self, images: Tensor, targets: Tensor, scores: Tensor) -> None:
        """Take a batch in: normalised images [B, C, H, W], their classes [B] and probabilities [B, classes]."""
        certainty, predicted = scores.max(1)
        rows = zip(targets.tolist(), predicted.tolist(), certainty.tolist(), strict=True)
        for n, (target, guess, sure) in enumerate(rows):
            if target == IGNORED:
                continue
            self.targets.append(target)
            self.predicted.append(guess)
            badness = (guess != target, -sure, -next(self.order))
            if len(self.heap) < self.count or badness > self.heap[0][0]:
                push = heapq.heappush if len(self.heap) < self.count else heapq.heapreplace
                push(self.heap, (badness, target, scores[n].cpu().numpy(), images[n].cpu()))

    def classes(self) -> tuple[np.ndarray, np.ndarray]:
        """True and predicted classes of all images. [N] and [N]"""
        return np.array(self.targets), np.array(self.predicted)

    def worst(self, preprocess: dict[str, Any]) -> tuple[list[Image.Image], np.ndarray, np.ndarray]:
        """The kept images as they were before normalisation, their classes [N] and probabilities [N, classes]."""
        rows = sorted(self.heap, key=lambda row: row[0], reverse=True)
        mean, std = (torch.tensor(preprocess[key])[:, None, None] for key in ("mean", "std"))
        pixels = [((image.float() * std + mean).clamp(0, 1) * 255).round().to(torch.uint8) for *_, image in rows]
        images = [Image.fromarray(p.permute(1, 2, 0).expand(-1, -1, 3).contiguous().numpy()) for p in pixels]
        return images, np.array([row[1] for row in rows]), np.stack([row[2] for row in rows])
