"""Mixers of the library in models that people already have: timm's ViT, DeiT and Swin, pretrained or not."""

from visionattn.convert.replace import replace_attention
from visionattn.convert.report import Replacement

__all__ = ["Replacement", "replace_attention"]
