"""Data modules."""

from visionattn.train.data.detection import Objects, SceneObjects
from visionattn.train.data.digits import Digits
from visionattn.train.data.images import Images
from visionattn.train.data.segmentation import Masks, SceneMasks

__all__ = ["Digits", "Images", "Masks", "Objects", "SceneMasks", "SceneObjects"]
