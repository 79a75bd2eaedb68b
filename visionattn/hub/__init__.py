"""Published weights: where they lie, fetching them, reading them without running anything that they hold."""

from visionattn.hub.download import fetch
from visionattn.hub.errors import WeightsError
from visionattn.hub.load import with_weights
from visionattn.hub.locate import locate, weights_file
from visionattn.hub.reader import read_checkpoint, read_weights
from visionattn.hub.settings import settings

__all__ = [
    "WeightsError",
    "fetch",
    "locate",
    "read_checkpoint",
    "read_weights",
    "settings",
    "weights_file",
    "with_weights",
]
