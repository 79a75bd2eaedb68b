"""Modules that a symbolic tracer records as one call."""

from functools import wraps
from typing import TypeVar

from timm.layers import register_notrace_module
from torch import nn

__all__ = ["mark_opaque", "opaque"]

M = TypeVar("M", bound=type[nn.Module])


def opaque(cls: M) -> M:
    """Class decorator: what the module does depends on its input, so no graph with placeholders can follow it.

    timm's feature extractors are told by timm's register. ``torch.fx.symbolic_trace``, and what is built on it, enters
    every module but those whose ``__module__`` starts with ``torch.nn``: so does that of the instances; the class keeps
    its own, by which it is pickled.
    """

    make = cls.__init__

    @wraps(make)  # __new__ would hide the constructor's signature
    def init(self, *args, **kwargs) -> None:
        make(self, *args, **kwargs)
        mark_opaque(self)

    cls.__init__ = init
    return register_notrace_module(cls)


def mark_opaque(module: nn.Module) -> None:
    """Do for one module what ``opaque`` does for all of a class; for modules that change their class."""
    module.__dict__["__module__"] = f"torch.nn, by {type(module).__module__}"
