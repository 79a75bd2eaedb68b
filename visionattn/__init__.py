"""Efficient-attention vision backbones for timm.

Importing the package registers every model with timm; it needs neither Lightning, Matplotlib nor Triton.

The doors: ``features`` (maps for dense tasks), ``natten`` (for those who come from it), ``convert`` (mixers in models
of timm), ``weights``, ``tune``, ``train`` and ``benchmark``. Behind them, each made of those before it: ``kernels``
(operators), ``layers`` (building blocks), ``attention`` (one mechanism a file), ``frames`` (the contract of timm),
``hosts`` (networks that take any mixer), ``backbones`` (one architecture a file).
"""

import sys
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "pyproject.toml").is_file() and (_ROOT / "backbones").is_dir():
    # Run from a checkout that is not installed: backbones/, kernels/, configs/ and weights/ lie beside this folder.
    __path__.append(str(_ROOT))


def _reads_the_manifest_only() -> bool:
    """Whether this process is ``visionattn weights list`` or ``table``, which need neither timm nor PyTorch."""
    words = list(getattr(sys, "argv", ()))  # whose first is -m until Python has found the module of that name
    if words[:1] == ["-m"] and "-m" in sys.orig_argv:
        words[0] = sys.orig_argv[sys.orig_argv.index("-m") + 1]
    return [Path(word).stem for word in words[:1]] + words[1:3] in (
        ["visionattn", "weights", "list"],
        ["visionattn", "weights", "table"],
    )


if not _reads_the_manifest_only():
    from visionattn import backbones  # noqa: F401  (registers the models)
    from visionattn.backbones import list_models  # noqa: F401


def __getattr__(name: str):
    if name not in ("backbones", "list_models"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import visionattn.backbones as late  # not "from visionattn", which would ask here again

    return late if name == "backbones" else late.list_models


__version__ = "0.1.0"
__all__ = ["backbones", "list_models", "__version__"]
