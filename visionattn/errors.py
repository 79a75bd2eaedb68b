"""The error that ends a command with a single line instead of a traceback, and how such lines put things."""

from collections.abc import Iterable

__all__ = ["UserError", "amount", "one_line", "some"]


class UserError(Exception):
    """Something the user can fix; the message says what is wrong and how to fix it, in one line."""


def one_line(message: object) -> str:
    """``message`` with its white space collapsed, so that it fits the last line on the screen."""
    return _shown(" ".join(str(message).split()))


def _shown(text: str) -> str:
    """``text`` without what a terminal would obey."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def some(names: Iterable[object], most: int = 3) -> str:
    """The first few of ``names`` and how many more there are."""
    names = [name if len(name) <= 200 else name[:200] + "…" for name in (_shown(str(name)) for name in names)]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def amount(size: float) -> str:
    """A number of bytes as people read it."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"
