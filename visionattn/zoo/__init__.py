"""What one does with checkpoints: list, convert, check, publish; the command ``visionattn weights``."""

from visionattn.zoo.convert import Conversion, add, convert
from visionattn.zoo.publish import push
from visionattn.zoo.table import find, markdown
from visionattn.zoo.verify import verify

__all__ = ["Conversion", "add", "convert", "find", "markdown", "push", "verify"]
