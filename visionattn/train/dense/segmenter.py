"""A segmentation network: a timm backbone, a head, and how it is run over images of any size."""

from collections.abc import Sequence
from typing import Any

import torch
from timm.data import resolve_data_config
from torch import Tensor, nn

from visionattn.errors import UserError
from visionattn.features import FeatureBackbone, prefixed
from visionattn.train.dense.heads import HEADS, FCNHead, init_head, resize
from visionattn.weights.card import check_model_name


class DenseNet(nn.Module):
    """Base of the dense networks: what the optimizer asks, with the backbone as ``backbone_path``.

    Images are RGB in [0, 1]; they are normalised inside, as the backbone was trained.
    """

    backbone_path = "backbone"
    normalized_by: tuple[list[float], list[float]]
    """Mean and deviation of images, which a checkpoint keeps."""

    def no_weight_decay(self) -> set[str]:
        """Parameters of the backbone to keep from weight decay."""
        backbone = self.get_submodule(self.backbone_path)
        return {f"{self.backbone_path}.{name}" for name in backbone.no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict:
        """The backbone's groups for layer-wise learning-rate decay; the head comes after the last one."""
        backbone = self.get_submodule(self.backbone_path)
        return prefixed(backbone.group_matcher(coarse=coarse), self.backbone_path.replace(".", r"\."))


def normalization(
    backbone: FeatureBackbone, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
) -> tuple[list[float], list[float]]:
    """Mean and deviation per channel of the images that a backbone was trained on.

    Args:
        backbone: Its model has timm's cfg, of a hub or folder where it is of one.
        mean: What a checkpoint says, which names the registered model and not where its weights began.
        std: Likewise.

    Raises:
        UserError: If these are something else than one number a channel.
    """
    config = resolve_data_config({}, pretrained_cfg=getattr(backbone.model, "pretrained_cfg", None) or {})
    found = []
    for key, given in (("mean", mean), ("std", std)):
        values = list(config[key] if given is None else given)
        if len(values) not in (1, len(config[key])) or not all(isinstance(value, int | float) for value in values):
            raise UserError(f"the description of the model has {key} {values!r:.80}: one number a channel is needed")
        found.append(values)
    return found[0], found[1]


def create_backbone(
    name: str, pretrained: bool, arguments: dict[str, Any], features: dict[str, Any]
) -> FeatureBackbone:
    """A backbone from the arguments of the model and of :class:`FeatureBackbone`.

    Raises:
        UserError: If either does not take them.
    """
    check_model_name(name)
    try:
        return FeatureBackbone(name, pretrained=pretrained, **features, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{name} does not take model.model_args {arguments} with model.backbone_args {features}: {error}"
        ) from error


class Segmenter(DenseNet):
    """Images to a score per class and pixel.

    Args:
        name: The timm model.
        num_classes: Number of classes.
        head: ``"upernet"``, ``"fpn"`` or ``"mlp"``.
        head_args: Further arguments of the head, such as ``width``.
        aux: Add the auxiliary head on the second coarsest map.
        model_args: Arguments of the timm model.
        backbone_args: Arguments of :class:`FeatureBackbone`.
        pretrained: Start from the backbone's published weights.
        mean: Of images, by channel; the backbone's if not given.
        std: Likewise.
    """

    def __init__(
        self,
        name: str,
        num_classes: int,
        head: str = "upernet",
        head_args: dict[str, Any] | None = None,
        aux: bool = False,
        model_args: dict[str, Any] | None = None,
        backbone_args: dict[str, Any] | None = None,
        pretrained: bool = False,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = create_backbone(name, pretrained, model_args or {}, backbone_args or {})
        create, width = HEADS[head]
        arguments = {"width": width, "num_classes": num_classes, **(head_args or {})}
        if head == "upernet" and len(self.backbone.norms):
            arguments.setdefault("input_norm", False)
        try:
            self.head = create(self.backbone.channels, **arguments)
        except TypeError as error:
            raise UserError(f"the head {head!r} does not take model.head_args {head_args}: {error}") from error
        self.aux = FCNHead(self.backbone.channels[-2], num_classes) if aux else None
        init_head(self.head)
        if self.aux is not None:
            init_head(self.aux)
        self.normalized_by = normalization(self.backbone, mean, std)
        for key, value in zip(("mean", "std"), self.normalized_by, strict=True):
            self.register_buffer(key, torch.tensor(value).view(-1, 1, 1), persistent=False)

    @classmethod
    def from_card(cls, card: dict[str, Any], pretrained: bool = False) -> "Segmenter":
        """The network that a checkpoint's card describes."""
        keys = ("name", "num_classes", "head", "head_args", "aux", "model_args", "backbone_args")
        return cls(
            **{key: card[key] for key in keys}, pretrained=pretrained, mean=card.get("mean"), std=card.get("std")
        )

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        """Names what depends on the number of classes, as timm's models do."""
        return {"classifier": ("head.classify.1", "aux.2")}

    def forward(self, images: Tensor, with_aux: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Images [B, 3, H, W] in [0, 1] to logits [B, num_classes, H / 4, W / 4].

        Args:
            images: Of any size.
            with_aux: Also return the logits of the auxiliary head, at its own stride.
        """
        maps = self.backbone((images - self.mean) / self.std)
        logits = self.head(list(maps))
        return (logits, self.aux(maps[-2])) if with_aux else logits


def whole(net: nn.Module, images: Tensor, size: Sequence[int]) -> Tensor:
    """Logits [B, C, *size] from one pass over whole images."""
    return resize(net(images).float(), size)


def sliding(net: nn.Module, images: Tensor, size: Sequence[int], window: int, stride: int, batch: int = 8) -> Tensor:
    """Logits [B, C, *size] averaged over overlapping windows; the last window of a row ends at the border.

    Args:
        net: Images to logits at any stride.
        images: [B, 3, H, W]
        size: Of the result.
        window: Side of the square windows; shorter images are taken whole along that axis.
        stride: From one window to the next.
        batch: Windows at a time.
    """
    height, width = images.shape[-2:]
    tall, wide = min(window, height), min(window, width)
    rows = sorted({min(y, height - tall) for y in range(0, height - tall + stride, stride)})
    columns = sorted({min(x, width - wide) for x in range(0, width - wide + stride, stride)})
    places = [(y, x) for y in rows for x in columns]
    total, count = None, images.new_zeros(1, 1, height, width)
    for start in range(0, len(places), batch):
        group = places[start : start + batch]
        windows = torch.cat([images[..., y : y + tall, x : x + wide] for y, x in group])
        logits = resize(net(windows).float(), (tall, wide)).chunk(len(group))
        if total is None:
            total = logits[0].new_zeros(len(images), logits[0].shape[1], height, width)
        for (y, x), part in zip(group, logits, strict=True):
            total[..., y : y + tall, x : x + wide] += part
            count[..., y : y + tall, x : x + wide] += 1
    return resize(total / count, size)


def multi_scale(run, images: Tensor, size: Sequence[int], scales: Sequence[float], flip: bool) -> Tensor:
    """Probabilities [B, C, *size] averaged over scaled and mirrored copies of the images.

    Args:
        run: ``run(images, size)`` gives logits, such as :func:`whole`.
        images: [B, 3, H, W]
        size: Of the result.
        scales: Of the copies.
        flip: Whether to add mirror images.
    """
    total, copies = 0.0, 0
    for scale in scales:
        sides = [max(1, round(side * scale)) for side in images.shape[-2:]]
        scaled = images if scale == 1 else resize(images, sides)
        total, copies = total + run(scaled, size).softmax(1), copies + 1
        if flip:
            total, copies = total + run(scaled.flip(-1), size).softmax(1).flip(-1), copies + 1
    return total / copies
