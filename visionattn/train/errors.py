"""The one exception that ends a command with a single line instead of a traceback."""

import difflib
from collections.abc import Iterable

import timm

import visionattn  # noqa: F401  (registers our models)


class UserError(Exception):
    """Something the user can fix; the message says what is wrong and how to fix it, in one line."""


def one_line(message: object) -> str:
    """``message`` with its white space collapsed, so that it fits the last line on the screen."""
    return " ".join(str(message).split())


def some(names: Iterable[object], most: int = 3) -> str:
    """The first few of ``names`` and how many more there are."""
    names = [str(name) for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


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
