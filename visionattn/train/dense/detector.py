"""torchvision's detectors on any timm backbone."""

import inspect
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torchvision.models.detection import FCOS, FasterRCNN, MaskRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign

from visionattn.errors import UserError
from visionattn.features import FPNBackbone
from visionattn.train.dense.segmenter import DenseNet, create_backbone, normalization

DETECTORS = {"faster_rcnn": FasterRCNN, "mask_rcnn": MaskRCNN, "retinanet": RetinaNet, "fcos": FCOS}


def accepted(kind: type[nn.Module]) -> set[str]:
    """Names of the arguments of one of torchvision's detectors; its own check lets unknown ones through."""
    names = {"size_divisible", "fixed_size"}  # of the transform
    for base in kind.__mro__:
        if base in DETECTORS.values():
            names |= set(inspect.signature(base.__init__).parameters) - {"self", "kwargs"}
    return names


class Detector(DenseNet):
    """Images of any sizes to objects; torchvision's networks resize, normalise and batch them inside.

    Args:
        name: The timm model.
        num_classes: Number of classes, without a background.
        detector: ``"faster_rcnn"``, ``"mask_rcnn"``, ``"retinanet"`` or ``"fcos"``.
        detector_args: Further arguments of torchvision's class, such as ``box_detections_per_img``, and
            ``anchor_size``, the side of the smallest anchors.
        min_size: Short side that images are resized to; one of several at random in training, the last in evaluation.
        max_size: Largest long side.
        fpn_channels: Channels of the feature pyramid.
        model_args: Arguments of the timm model.
        backbone_args: Arguments of :class:`FeatureBackbone`.
        pretrained: Start from the backbone's published weights.
        mean: Of images, by channel; the backbone's if not given.
        std: Likewise.
    """

    backbone_path = "model.backbone.features"

    def __init__(
        self,
        name: str,
        num_classes: int,
        detector: str = "faster_rcnn",
        detector_args: dict[str, Any] | None = None,
        min_size: Sequence[int] = (800,),
        max_size: int = 1333,
        fpn_channels: int = 256,
        model_args: dict[str, Any] | None = None,
        backbone_args: dict[str, Any] | None = None,
        pretrained: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        two_stage = detector in ("faster_rcnn", "mask_rcnn")
        self.has_masks, self.background = detector == "mask_rcnn", int(two_stage)
        features = {"out_indices": 4 if two_stage else 3, **(backbone_args or {})}
        features = create_backbone(name, pretrained, model_args or {}, features)
        backbone = FPNBackbone(features, fpn_channels, "pool" if two_stage else "p6p7")
        self.normalized_by = normalization(features, mean, std)
        mean, std = self.normalized_by
        arguments = dict(min_size=tuple(min_size), max_size=max_size, image_mean=mean, image_std=std)
        further = dict(detector_args or {})
        if unknown := further.keys() - accepted(DETECTORS[detector]) - {"anchor_size"}:
            raise UserError(f"{detector} does not take model.detector_args {sorted(unknown)}")
        if detector == "fcos" and (fpn_channels < 64 or fpn_channels % 32):
            raise UserError(f"model.fpn_channels is {fpn_channels}: FCOS needs a multiple of 32, at least 64")
        # The usual anchors are 8 times the stride of their level, 32 at stride 4; FCOS has points, one per stride.
        smallest = further.pop("anchor_size", {"fcos": 1, "retinanet": 4}.get(detector, 8) * features.strides[0])
        count = len(backbone.levels) + (1 if two_stage else 2)
        sides = [smallest * 2**level for level in range(count)]
        if two_stage:
            arguments["rpn_anchor_generator"] = AnchorGenerator([(s,) for s in sides], [(0.5, 1.0, 2.0)] * count)
            arguments["box_roi_pool"] = MultiScaleRoIAlign(backbone.levels, 7, 2)
            if self.has_masks:
                arguments["mask_roi_pool"] = MultiScaleRoIAlign(backbone.levels, 14, 2)
        elif detector == "retinanet":
            octave = [tuple(round(s * 2 ** (n / 3)) for n in range(3)) for s in sides]
            arguments["anchor_generator"] = AnchorGenerator(octave, [(0.5, 1.0, 2.0)] * count)
        else:
            arguments["anchor_generator"] = AnchorGenerator([(s,) for s in sides], [(1.0,)] * count)
            arguments["score_thresh"] = 0.05  # as in the paper's evaluation; torchvision's 0.2 costs precision
        try:
            self.model = DETECTORS[detector](backbone, num_classes + self.background, **arguments | further)
        except (TypeError, ValueError) as error:
            raise UserError(f"{detector} does not take model.detector_args {detector_args}: {error}") from error

    @classmethod
    def from_card(cls, card: dict[str, Any], pretrained: bool = False) -> "Detector":
        """The network that a checkpoint's card describes."""
        keys = ("name", "num_classes", "detector", "detector_args", "min_size", "max_size", "fpn_channels")
        normalized_by = {key: card.get(key) for key in ("mean", "std")}
        return cls(
            **{key: card[key] for key in (*keys, "model_args", "backbone_args")}, pretrained=pretrained, **normalized_by
        )

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Names what depends on the number of classes, as timm's models do."""
        two_stage = ("model.roi_heads.box_predictor", "model.roi_heads.mask_predictor.mask_fcn_logits")
        return {"classifier": (*two_stage, "model.head.classification_head.cls_logits")}

    def losses(self, images: list[Tensor], targets: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The parts of the loss, for images [3, H, W] in [0, 1] and their objects, labels from 0."""
        keys = ("boxes", "labels", "masks") if self.has_masks else ("boxes", "labels")
        targets = [{key: target[key] for key in keys} for target in targets]
        for target in targets:
            target["labels"] = target["labels"] + self.background
        return self.model(images, targets)

    def forward(self, images: list[Tensor] | Tensor) -> list[dict[str, Tensor]]:
        """The objects of each image [3, H, W] in [0, 1], best first, in its own pixels.

        Returns:
            For each image ``boxes`` [N, 4], ``labels`` [N] from 0, ``scores`` [N] and maybe ``masks`` [N, H, W], bool.
        """
        found = self.model(list(images))
        for objects in found:
            objects["labels"] = objects["labels"] - self.background
            if "masks" in objects:
                objects["masks"] = objects["masks"][:, 0] > 0.5
        return found
