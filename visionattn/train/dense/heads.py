"""Segmentation heads: from the maps of a backbone to a map with a channel per class, at the finest map's stride.

UPerNet and the light MLP head are the decoders of segmentation_models_pytorch. The Semantic FPN of the papers, batch
norms and no dropout until the end, is in no library.
"""

import importlib
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.layers import ConvNormAct
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork

from visionattn.errors import UserError


def decoder(architecture: str, name: str) -> Callable[..., nn.Module]:
    """A decoder of segmentation_models_pytorch.

    Raises:
        UserError: If it is not installed.
    """
    try:
        module = importlib.import_module(f"segmentation_models_pytorch.decoders.{architecture}.decoder")
    except ImportError as error:
        raise UserError("this head needs segmentation_models_pytorch: pip install 'visionattn[dense]'") from error
    return getattr(module, name)


class Head(nn.Module):
    """Base of the heads; a subclass turns the maps into one of ``width`` channels.

    Args:
        channels: Of each map, finest first.
        width: Channels within the head.
        num_classes: Number of classes.
        dropout: Before the classifier, by whole channels.
    """

    def __init__(self, channels: Sequence[int], width: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.classify = nn.Sequential(nn.Dropout2d(dropout), nn.Conv2d(width, num_classes, 1))

    def decode(self, maps: list[Tensor]) -> Tensor:
        """Maps, finest first, to one map [B, width, H, W]."""
        raise NotImplementedError

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.classify(self.decode(maps))


class UPerNet(Head):
    """Unified perceptual parsing (Xiao et al. 2018, arXiv 1807.10221): pyramid pooling, then a feature pyramid.

    Args:
        input_norm: Layer norm on every map; leave it out if the backbone has norms at its outputs.
    """

    def __init__(
        self, channels: Sequence[int], width: int, num_classes: int, dropout: float = 0.1, input_norm: bool = True
    ) -> None:
        super().__init__(channels, width, num_classes, dropout)
        self.decoder = decoder("upernet", "UPerNetDecoder")(
            (0, 0, *channels), len(channels) + 1, decoder_channels=width
        )
        if not input_norm:
            self.decoder.feature_norms = nn.ModuleList(nn.Identity() for _ in channels)

    def decode(self, maps: list[Tensor]) -> Tensor:
        return self.decoder([None, None, *maps])  # it leaves out the strides 1 and 2


class MLPHead(Head):
    """The head of SegFormer (Xie et al. 2021, arXiv 2105.15203): a linear layer per map, one over all of them."""

    def __init__(self, channels: Sequence[int], width: int, num_classes: int, dropout: float = 0.1) -> None:
        super().__init__(channels, width, num_classes, dropout)
        self.decoder = decoder("segformer", "SegformerDecoder")(
            [0, 0, *channels], len(channels) + 1, segmentation_channels=width
        )

    def decode(self, maps: list[Tensor]) -> Tensor:
        batch, _, height, width = maps[0].shape
        # It takes the size of its result from the image, and a missing map of stride 2 has no channels.
        image = maps[0].new_empty(batch, 0, 4 * height, 4 * width)
        return self.decoder([image, image, *maps])


class SemanticFPN(Head):
    """Semantic FPN (Kirillov et al. 2019, arXiv 1901.02446): a feature pyramid whose levels are summed at the finest.

    Args:
        pyramid: Channels of the pyramid.
    """

    def __init__(
        self, channels: Sequence[int], width: int, num_classes: int, dropout: float = 0.1, pyramid: int = 256
    ) -> None:
        super().__init__(channels, width, num_classes, dropout)
        self.fpn = FeaturePyramidNetwork(channels, pyramid)
        # Level i is i doublings coarser than the finest; each doubling has a convolution of its own.
        self.levels = nn.ModuleList(
            nn.ModuleList(ConvNormAct(width if n else pyramid, width, 3) for n in range(max(1, i)))
            for i in range(len(channels))
        )

    def decode(self, maps: list[Tensor]) -> Tensor:
        pyramid = list(self.fpn({str(i): y for i, y in enumerate(maps)}).values())
        total = None
        for i, (convs, y) in enumerate(zip(self.levels, pyramid, strict=True)):
            for n, conv in enumerate(convs):
                y = conv(y)
                if i:  # towards the size of the next finer level, whatever the rounding of odd sizes made it
                    y = F.interpolate(y, pyramid[i - 1 - n].shape[-2:], mode="bilinear", align_corners=False)
            total = y if total is None else total + y
        return total


class FCNHead(nn.Sequential):
    """The auxiliary head of UPerNet: one 3x3 convolution and a classifier on one map."""

    def __init__(self, channels: int, num_classes: int, width: int = 256, dropout: float = 0.1) -> None:
        super().__init__(ConvNormAct(channels, width, 3), nn.Dropout2d(dropout), nn.Conv2d(width, num_classes, 1))


HEADS: dict[str, tuple[Callable[..., Head], int]] = {
    "upernet": (UPerNet, 512),
    "fpn": (SemanticFPN, 128),
    "mlp": (MLPHead, 256),
}
"""Head by name, and the width that the papers give it."""


def init_head(head: nn.Module) -> None:
    """He initialisation of the convolutions before a norm, small weights in the classifier."""
    for module in head.modules():
        if isinstance(module, nn.Conv2d) and module.bias is None:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Sequential) and len(module) and isinstance(module[-1], nn.Conv2d):
            nn.init.normal_(module[-1].weight, std=0.01)
            nn.init.zeros_(module[-1].bias)


def resize(logits: Tensor, size: Sequence[int] | torch.Size) -> Tensor:
    """Logits [B, C, H, W] at another size, bilinear."""
    return F.interpolate(logits, tuple(size), mode="bilinear", align_corners=False)
