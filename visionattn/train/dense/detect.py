"""Detection and instance segmentation with any timm backbone."""

from typing import Any, Literal

import torch
from torch import Tensor

from visionattn.errors import UserError
from visionattn.train.data.base import Data
from visionattn.train.data.dense import DenseBatch
from visionattn.train.data.detection import DetectionData
from visionattn.train.data.objects import mask_tools
from visionattn.train.data.sampling import NOT_COUNTED
from visionattn.train.dense.detector import Detector
from visionattn.train.dense.task import DenseTask
from visionattn.train.overlays import overlay_objects, side_by_side


class Detection(DenseTask):
    """Train one of torchvision's detectors on a backbone.

    Args:
        detector: "faster_rcnn", "mask_rcnn", "retinanet" or "fcos".
        detector_args: Further arguments of torchvision's class, such as ``box_detections_per_img``, and
            ``anchor_size``, the side of the smallest anchors.
        min_size: Short side that images are resized to; one of several at random in training, the last in evaluation.
        max_size: Largest long side.
        fpn_channels: Channels of the feature pyramid.
        draw_above: Least score of the objects in the pictures of a run.
        **kwargs: What every dense task takes.
    """

    monitor = "val/AP"
    label = "AP"
    summary = {"val/AP": "AP {:.2f}", "val/AP50": "AP50 {:.2f}", "val/mask_AP": "mask AP {:.2f}"}

    def __init__(
        self,
        detector: Literal["faster_rcnn", "mask_rcnn", "retinanet", "fcos"] = "faster_rcnn",
        detector_args: dict[str, Any] | None = None,
        min_size: list[int] = [800],  # noqa: B006  (never changed; the parser wants a list)
        max_size: int = 1333,
        fpn_channels: int = 256,
        draw_above: float = 0.5,
        **kwargs,
    ) -> None:
        super().__init__(**kwargs)
        p = self.hparams
        self.require(0, "draw_above", most=1)
        if not min_size or min(min_size) < 1 or max_size < max(min_size):
            raise UserError(f"model.min_size is {min_size} and model.max_size {max_size}: sides, the largest last")
        mask_tools()  # for its error, before any work starts
        self.card = dict(
            task="detect",
            name=p.name,
            num_classes=p.num_classes,
            model_args=p.model_args or {},
            backbone_args=p.backbone_args or {},
            detector=detector,
            detector_args=detector_args or {},
            min_size=list(min_size),
            max_size=max_size,
            fpn_channels=fpn_channels,
        )
        self.net = Detector.from_card(self.card, p.pretrained)
        self.start()
        self.precision = MeanAP(self.net.has_masks)

    def check(self, data: Data, splits: list[str]) -> None:
        super().check(data, splits)
        if not isinstance(data, DetectionData):
            raise UserError(f"{type(data).__name__} has no boxes: choose another --data")
        if self.net.has_masks and not data.has_masks:
            raise UserError("mask_rcnn learns masks, but the data has none: add --data.masks true")

    @property
    def compiled(self) -> torch.nn.Module:
        return self.net.get_submodule(self.net.backbone_path)

    # Steps

    def training_step(self, batch: DenseBatch, batch_idx: int) -> Tensor:
        self.unreadable["train"] += int(batch.unreadable.sum())
        parts = self.net.losses(self._images(batch.images), batch.targets)
        loss = sum(parts.values())
        self.require_finite(loss, batch.indices, batch_idx, parts=parts)
        self.log_loss(loss, len(batch.images))
        return loss

    def validation_step(self, batch: DenseBatch, batch_idx: int) -> list[dict[str, Tensor]]:
        return self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def test_step(self, batch: DenseBatch, batch_idx: int) -> list[dict[str, Tensor]]:
        return self._evaluate(batch)

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def picture(self, image: Tensor, target: dict[str, Tensor], found: dict[str, Tensor]) -> Tensor:
        """The objects that are there, and those that were found."""
        names, palette = self.card["class_names"], self.card["palette"]
        keep = found["scores"] >= self.hparams.draw_above
        found = {key: value[keep] for key, value in found.items()}
        true = overlay_objects(image, target["boxes"], target["labels"], names, palette)
        masks = found.get("masks")
        drawn = overlay_objects(image, found["boxes"], found["labels"], names, palette, found["scores"], masks)
        return side_by_side([true, drawn])

    def _images(self, images: list[Tensor]) -> list[Tensor]:
        dtype = self.dtype if self.dtype.is_floating_point else torch.float32
        return [image.to(dtype) / 255 for image in images]

    def _evaluate(self, batch: DenseBatch) -> list[dict[str, Tensor]]:
        self.unreadable["eval"] += int(batch.unreadable.sum())
        found = self.net(self._images(batch.images))
        self.precision.update(found, batch.targets, batch.indices.tolist())
        return found

    def _report(self, stage: str) -> None:
        for name, value in self.precision.compute().items():
            self.log(f"{stage}/{name}", value, prog_bar=name in ("AP", "AP50"))
        self.report_unreadable(stage, "eval")


class MeanAP:
    """COCO's average precision over a whole data set, in percent, however many processes share it.

    Args:
        masks: Also for masks.
    """

    NAMES = {
        "map": "AP",
        "map_50": "AP50",
        "map_75": "AP75",
        "map_small": "APs",
        "map_medium": "APm",
        "map_large": "APl",
    }

    def __init__(self, masks: bool) -> None:
        self.kinds = {"bbox": "", "segm": "mask_"} if masks else {"bbox": ""}
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        from torchmetrics.detection import MeanAveragePrecision

        # Processes are joined below: torchmetrics gathers image by image, and hangs if one has more of them.
        self.metric = MeanAveragePrecision(
            iou_type=tuple(self.kinds), backend="faster_coco_eval", sync_on_compute=False, distributed_available_fn=bool
        )
        self.metric.warn_on_many_detections = False
        self.indices: list[int] = []

    def update(self, found: list[dict], targets: list[dict], indices: list[int]) -> None:
        """Add images.

        Args:
            found: ``boxes``, ``labels``, ``scores`` and maybe ``masks`` of each image.
            targets: ``boxes``, ``labels``, ``iscrowd`` and maybe ``masks`` of each image.
            indices: Place of each in the data set; those that must not count are left out.
        """
        for prediction, target, index in zip(found, targets, indices, strict=True):
            if index != NOT_COUNTED:
                keys = ("boxes", "labels", "scores", "masks", "iscrowd")
                both = [
                    {key: part[key].cpu() for key in keys if key in part and (key != "masks" or len(self.kinds) > 1)}
                    for part in (prediction, target)
                ]
                for part in both:
                    if "masks" in part:
                        part["masks"] = part["masks"].bool()
                self.metric.update(both[:1], both[1:])
                self.indices.append(index)

    def compute(self) -> dict[str, float]:
        """The scores of all processes together; forgets everything."""
        states = {name: value for name, value in self.metric.metric_state.items() if len(value) == len(self.indices)}
        parts = [(self.indices, states)]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, (self.indices, states))
        # In the order of the data set: among equal scores the first image comes first.
        order = sorted((index, n, i) for n, (indices, _) in enumerate(parts) for i, index in enumerate(indices))
        names = {name for _, states in parts for name in states}
        for name in names:
            setattr(self.metric, name, [parts[n][1][name][i] for _, n, i in order])
        scores = {}
        if order:
            values = self.metric.compute()
            for kind, prefix in self.kinds.items():
                for name, ours in self.NAMES.items():
                    value = float(values[f"{kind}_{name}" if len(self.kinds) > 1 else name])
                    scores[prefix + ours] = 100 * value if value >= 0 else 0.0  # -1: no object of that size
        self.reset()
        return scores
