"""Checks of arguments that layers and networks share: ``ValueError`` with name, value and what is allowed."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from inspect import Parameter, signature
from numbers import Integral, Real
from typing import TypeVar, get_args

import torch
from torch import Tensor
from torch.fx import Proxy

__all__ = [
    "LARGEST",
    "check_counts",
    "check_declared",
    "check_heads",
    "check_images",
    "check_map",
    "check_shares",
    "check_side",
    "check_tensor",
    "declared",
    "guarded",
]

C = TypeVar("C", bound=type[torch.nn.Module])

# What an argument of a layer means beyond its annotation, by its name; other integers are at least 1.
FROM_ZERO = ("num_prefix_tokens", "height", "width", "split_size", "halo_size", "window", "side_dwconv", "warmup")
FROM_ZERO += ("lepe_kernel", "mixer_depth", "num_classes")
SIDES = ("window_size", "radius", "split_size", "sr_ratio", "block_size", "halo_size", "height", "width")
SIDES += ("side_dwconv", "lepe_kernel")
LARGEST = 1024  # of what is laid over a map: padding a small one to more fills the memory
OWN_SENTENCE = ("dim", "num_heads", "num_agents", "axes", "topk")
SHARES = ("drop", "proj_drop", "attn_drop", "drop_path", "alpha")
POSITIVE = ("eps", "scale", "qk_scale", "rope_theta", "mlp_ratio")


WORDS = {
    "int": "an integer",
    "bool": "True or False",
    "str": "a string",
    "Sequence": "a list",
    "Mapping": "a mapping",
    "dict": "a mapping",
}


def declared(cls: C) -> C:
    """Class decorator: the constructor refuses arguments that are not what its signature declares.

    Checked are those annotated as a number, a flag, a string, a sequence or a mapping, also ``| None``: their kind, and
    that counts, shares and divisors are in their range.

    Raises:
        ValueError: From the constructor, with name, value and what is allowed.
    """
    cls.__init__ = guarded(cls.__init__, check_declared)
    return cls


def guarded(
    init: Callable[..., None], check: Callable[[Mapping[str, object], Mapping[str, Parameter]], None]
) -> Callable[..., None]:
    """A constructor behind a check of its arguments, which is told their values, defaults too, and the parameters."""
    found = signature(init)

    @wraps(init)
    def __init__(self, *args, **kwargs) -> None:
        try:
            bound = found.bind(self, *args, **kwargs)
        except TypeError:  # which the constructor itself tells best
            pass
        else:
            bound.apply_defaults()
            check(bound.arguments, found.parameters)
        init(self, *args, **kwargs)

    return __init__


def check_declared(arguments: Mapping[str, object], parameters: Mapping[str, Parameter]) -> None:
    """Check arguments by the annotations of their parameters, those that are left out here pass."""
    for name, parameter in parameters.items():
        value, kind = arguments.get(name), parameter.annotation
        whole = str(kind) if get_args(kind) else getattr(kind, "__name__", str(kind))
        kinds = [kind.split("[")[0].rpartition(".")[2] for kind in re.split(r" \| (?![^\[]*\])", whole)]
        if name not in arguments or (value is None and "None" in kinds):
            continue
        kinds = [kind for kind in kinds if kind != "None"]
        if kinds == ["int"]:
            if name in OWN_SENTENCE:
                continue
            check_counts(0 if name in FROM_ZERO else 1, **{name: value})
            if name in SIDES and value > LARGEST:
                raise ValueError(f"{name} must be at most {LARGEST}, got {value}")
        elif kinds == ["float"]:
            _check_number(name, value)
        elif all(kind in WORDS for kind in kinds) and not any(_is(value, kind) for kind in kinds):
            raise ValueError(f"{name} must be {' or '.join(WORDS[kind] for kind in kinds)}, got {value!r}")


def _is(value: object, kind: str) -> bool:
    if kind == "Sequence":
        return isinstance(value, Sequence) and not isinstance(value, (str, bytes))
    if kind == "int":
        return isinstance(value, Integral) and not isinstance(value, bool)
    return isinstance(value, {"bool": bool, "str": str}.get(kind, Mapping))


def _check_number(name: str, value: object) -> None:
    if name in SHARES:
        check_shares(**{name: value})
        return
    least = "positive" if name in POSITIVE else "a finite number"
    if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value) or (
        name in POSITIVE and value <= 0
    ):  # fmt: skip
        raise ValueError(f"{name} must be {least}, got {value!r}")


def check_counts(least: int = 1, **counts: object) -> None:
    """Check that arguments are integers of at least ``least``."""
    for name, value in counts.items():
        if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
            kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
            raise ValueError(f"{name} must be {kind}, got {value!r}")


def check_heads(dim: object, num_heads: object) -> None:
    """Check that channels split into heads."""
    check_counts(dim=dim)
    if not isinstance(num_heads, Integral) or isinstance(num_heads, bool) or num_heads < 1 or dim % num_heads:
        raise ValueError(f"num_heads must divide dim = {dim}, got {num_heads!r}")


def check_shares(**shares: object) -> None:
    """Check that arguments are numbers from 0 to 1."""
    for name, value in shares.items():
        if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value <= 1:
            raise ValueError(f"{name} must be a number from 0 to 1, got {value!r}")


def check_side(name: str, value: int | Sequence[int], pair: bool = False) -> None:
    """Check that an argument is two positive integers, rows and columns, or, unless it has to be a ``pair``, one."""
    sides = list(value) if isinstance(value, (tuple, list, torch.Size)) else [value] * (1 if pair else 2)
    if len(sides) != 2 or not all(isinstance(n, Integral) and not isinstance(n, bool) and n > 0 for n in sides):
        kinds = "two positive integers, rows and columns" if pair else "a positive integer or two, rows and columns"
        raise ValueError(f"{name} must be {kinds}, got {value!r}")


def check_map(x: Tensor) -> None:
    """Check that the input of a layer is a map [B, H, W, C]. TorchScript compiles it, too."""
    if torch.jit.is_scripting():
        if x.dim() != 4:
            raise ValueError(f"x must be a map [B, H, W, C], got {x.dim()} axes")
    else:
        _check_axes(x, "a map [B, H, W, C]")


def check_images(x: Tensor) -> None:
    """Check that the input of a network is images [B, C, H, W] with pixels."""
    _check_axes(x, "images [B, C, H, W]")
    if type(x) is Tensor and not torch.compiler.is_compiling() and not torch.jit.is_tracing():
        if x.shape[2] == 0 or x.shape[3] == 0:
            raise ValueError(f"x must be images of at least one pixel, got shape {tuple(x.shape)}")


def check_tensor(x: object, what: str) -> None:
    """Check that an input is a tensor; ``what`` says which."""
    if not isinstance(x, (Tensor, Proxy)):  # the latter of a symbolic tracer, which knows nothing yet
        raise ValueError(f"x must be a tensor, {what}, got {type(x).__name__}")


def _check_axes(x: object, what: str) -> None:
    check_tensor(x, what)
    if isinstance(x, Tensor) and x.dim() != 4:
        raise ValueError(f"x must be {what}, got shape {tuple(x.shape)}")
