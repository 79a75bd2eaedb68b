"""The one exception of downloading and reading weights, and how messages put things."""

from collections.abc import Iterable


class WeightsError(RuntimeError):
    """Weights that cannot be had or must not be read; the message says why and what to do, in one line."""


def one_line(message: object) -> str:
    """``message`` with its white space collapsed, so that it fits the last line on the screen."""
    return " ".join(str(message).split())


def some(names: Iterable[object], most: int = 3) -> str:
    """The first few of ``names`` and how many more there are."""
    names = [str(name) for name in names]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def amount(size: float) -> str:
    """A number of bytes as people read it."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
