"""Data modules."""

from visionattn.train.data.digits import Digits
from visionattn.train.data.images import Images

__all__ = ["Digits", "Images"]
