"""What a user may change about downloads; what is not set follows the environment."""

import os
import sys
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Settings", "settings"]

_TRUE = {"1", "true", "yes", "on"}


@dataclass
class Settings:
    """How weights are fetched; every field that is None follows the environment.

    Args:
        mirror: Where to look first: one place or several, separated by commas. A folder, ``file://`` or ``https://``
            prefix to which the file name is appended, or a pattern with ``{name}`` (the file name), ``{path}`` (path
            of the original URL) or ``{url}``. Environment: ``VISIONATTN_WEIGHTS_MIRROR``.
        offline: Use only what is in the cache or in a mirror on this machine. Environment: ``VISIONATTN_OFFLINE``,
            ``HF_HUB_OFFLINE``.
        cache_dir: Folder of the downloads; PyTorch's and timm's own if None, which follows ``TORCH_HOME``.
        progress: Show a bar on terminals.
        retries: Attempts in a row that bring no byte before a download is given up.
        timeout: Seconds without a byte that end an attempt.
        backoff: Seconds before the second attempt; they double with every further one.
    """

    mirror: str | None = None
    offline: bool | None = None
    cache_dir: str | Path | None = None
    progress: bool = True
    retries: int = 4
    timeout: float = 30.0
    backoff: float = 1.0

    def mirrors(self) -> list[str]:
        """The mirrors in the order they are asked."""
        places = self.mirror if self.mirror is not None else os.environ.get("VISIONATTN_WEIGHTS_MIRROR", "")
        return [place.strip() for place in places.split(",") if place.strip()]

    def is_offline(self) -> bool:
        """Whether the network must not be used."""
        if self.offline is not None:
            return self.offline
        return any(os.environ.get(name, "").lower() in _TRUE for name in ("VISIONATTN_OFFLINE", "HF_HUB_OFFLINE"))

    def folder(self) -> Path:
        """Where downloads are kept."""
        return Path(self.cache_dir or os.path.join(_hub(), "checkpoints"))


def _hub() -> str:
    """``torch.hub.get_dir()``, without PyTorch where nothing else has imported it: then nobody has set another."""
    if "torch" in sys.modules:
        return sys.modules["torch"].hub.get_dir()
    cache = os.getenv("XDG_CACHE_HOME", "~/.cache")
    return os.path.join(os.path.expanduser(os.getenv("TORCH_HOME", os.path.join(cache, "torch"))), "hub")


settings = Settings()
