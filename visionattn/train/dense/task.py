"""What segmentation and detection share: weights to start from, and schedules by step."""

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from visionattn.errors import UserError
from visionattn.train.data.base import Data
from visionattn.train.data.dense import DenseData
from visionattn.train.dense.segmenter import DenseNet
from visionattn.train.optim import warmup_cosine, warmup_poly, warmup_step_decay
from visionattn.train.task import Task
from visionattn.weights.load import load_weights
from visionattn.weights.read import fitting_weights, local_file


class DenseTask(Task):
    """Base of the dense tasks.

    Args:
        backbone_args: Arguments of ``visionattn.features.FeatureBackbone``: ``out_indices``, ``output_norm``,
            ``frozen_stages``, ``norm_eval``, ``grad_checkpointing``.
        schedule: "poly" and "cosine" fall to ``min_lr``; "step" divides by 10 at each of ``milestones``.
        warmup: Steps of linear warm-up.
        warmup_lr: First learning rate of the warm-up.
        min_lr: Last learning rate of "poly" and "cosine".
        power: Exponent of "poly".
        milestones: Epochs at which "step" divides the learning rate.
        **kwargs: What every task takes.
    """

    net: DenseNet

    def __init__(
        self,
        backbone_args: dict[str, Any] | None = None,
        schedule: Literal["poly", "cosine", "step"] = "poly",
        warmup: int = 0,
        warmup_lr: float = 1e-6,
        min_lr: float = 0.0,
        power: float = 1.0,
        milestones: list[int] | None = None,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        self.require(0, "warmup", "warmup_lr", "min_lr", "power")
        if schedule == "step" and not milestones:
            raise UserError("model.schedule 'step' needs --model.milestones, such as [8, 11]")

    def start(self) -> None:
        """Load ``weights``: a run of this task, a classification model, or the authors' detector or segmenter."""
        p = self.hparams
        self.card |= dict(zip(("mean", "std"), self.net.normalized_by, strict=True))
        if p.weights:
            backbone = self.net.get_submodule(self.net.backbone_path)

            def is_run(state: dict[str, Tensor]) -> bool:
                return any(key.startswith(f"{self.net.backbone_path}.model.") for key in state)

            def fits(state: dict[str, Tensor]) -> bool:
                try:
                    return is_run(state) or backbone.fitted(state) is not None
                except Exception:  # rules meet the names and shapes of another model
                    return False

            state, stripped = fitting_weights(local_file(p.weights), fits)
            if is_run(state):
                load_weights(self.net, p.weights, p.reset_head)
            else:
                if stripped:
                    print(f"{p.weights}: took the weights behind {stripped}")
                try:
                    backbone.load(state)
                except ValueError as error:
                    raise UserError(f"{p.weights}: {error}. Set model.name and model.model_args as trained") from error
        if p.channels_last:
            self.net.to(memory_format=torch.channels_last)

    def check(self, data: Data, splits: list[str]) -> None:
        if not isinstance(data, DenseData):
            raise UserError(f"{type(data).__name__} has no data for {type(self).__name__}: choose another --data")

    def schedule(self, optimizer: torch.optim.Optimizer, lr: float) -> LambdaLR:
        p, steps = self.hparams, int(self.trainer.estimated_stepping_batches)
        start, end, warmup = min(1.0, p.warmup_lr / lr), min(1.0, p.min_lr / lr), min(p.warmup, steps)
        if p.schedule == "poly":
            return warmup_poly(optimizer, warmup, steps, start, end, p.power)
        if p.schedule == "cosine":
            return warmup_cosine(optimizer, warmup, steps, start, end)
        epoch = self.trainer.num_training_batches / self.trainer.accumulate_grad_batches
        return warmup_step_decay(optimizer, warmup, [round(n * epoch) for n in p.milestones], start)
