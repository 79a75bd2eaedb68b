"""The one exception of finding, reading and loading weights."""

from visionattn.errors import UserError

__all__ = ["WeightsError"]


class WeightsError(UserError, RuntimeError):
    """Weights that cannot be had or must not be read; the message says why and what to do, in one line."""
