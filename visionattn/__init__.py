"""Efficient-attention vision backbones for timm.

Importing the package registers every model with timm; it needs neither Lightning, Matplotlib nor Triton.

The doors: ``features`` (maps for dense tasks), ``natten`` (for those who come from it), ``convert`` (mixers in models
of timm), ``weights``, ``train`` and ``benchmark``. Behind them, each made of those before it: ``kernels`` (operators),
``layers`` (building blocks), ``attention`` (one mechanism a file), ``frames`` (the contract of timm), ``hosts``
(networks that take any mixer), ``backbones`` (one architecture a file).
"""

from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "pyproject.toml").is_file() and (_ROOT / "backbones").is_dir():
    # Run from a checkout that is not installed: backbones/, kernels/, configs/ and weights/ lie beside this folder.
    __path__.append(str(_ROOT))

from visionattn import backbones  # noqa: E402  (registers the models)
from visionattn.backbones import list_models  # noqa: E402

__version__ = "0.1.0"
__all__ = ["backbones", "list_models", "__version__"]
