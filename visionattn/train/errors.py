"""The one exception that ends a command with a single line instead of a traceback."""

import difflib

import timm

import visionattn  # noqa: F401  (registers our models)
from visionattn.weights.errors import one_line, some

__all__ = ["UserError", "check_model_name", "one_line", "some"]


class UserError(Exception):
    """Something the user can fix; the message says what is wrong and how to fix it, in one line."""


def check_model_name(name: str) -> None:
    """Refuse a model that timm does not know, naming the closest ones it does.

    Args:
        name: A timm model name, with or without a tag, or a ``hf-hub:``/``local-dir:`` source.

    Raises:
        UserError: If there is no such model.
    """
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")) or timm.is_model(name):
        return
    close = difflib.get_close_matches(name.split(".")[0], timm.list_models(), n=3)
    hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() lists all names."
    raise UserError(f"unknown model {name!r}: {hint}")
