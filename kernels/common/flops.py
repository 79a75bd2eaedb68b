"""FLOP formulas of the operators, for ``torch.utils.flop_counter``.

That module imports Triton, which takes a second. ``import timm`` has done so already, and ``import visionattn`` imports
timm, so the formulas are there before anybody counts. Only where the operators are imported by themselves do they
wait: until an operator's file is imported after Triton or the counter.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable

import torch

from visionattn.kernels.common.jit import TRITON_INSTALLED

_COUNTER = "torch.utils.flop_counter"
_waiting: dict[str, Callable[..., int]] = {}


def flop_formula(op: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorate the formula of ``torch.ops.visionattn.<op>``, a function of the shapes of the operator's tensors.

    An operator of PyTorch that it does not count itself is named with its namespace, as in ``mkldnn.op``.
    """

    def add(formula: Callable[..., int]) -> Callable[..., int]:
        _waiting[op] = formula
        if not TRITON_INSTALLED or "triton" in sys.modules or _COUNTER in sys.modules:
            _register()
        return formula

    return add


def _register() -> None:
    counter = _import_counter()
    while _waiting:
        op, formula = _waiting.popitem()
        namespace, _, name = op.rpartition(".")
        counter.register_flop_formula(getattr(getattr(torch.ops, namespace or "visionattn"), name))(formula)


def _import_counter():
    """The counter, without the warning that it cannot count Triton kernels where Triton is missing: none run there."""
    log = logging.getLogger(_COUNTER)
    disabled, log.disabled = log.disabled, True
    try:
        return importlib.import_module(_COUNTER)
    finally:
        log.disabled = disabled
