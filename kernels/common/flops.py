"""FLOP formulas of the operators, for ``torch.utils.flop_counter``.

That module imports Triton, so the formulas are handed to it when somebody imports it, not before.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable

import torch

_COUNTER = "torch.utils.flop_counter"
_formulas: dict[str, Callable[..., int]] = {}


def flop_formula(op: str) -> Callable[[Callable[..., int]], Callable[..., int]]:
    """Decorate the formula of ``torch.ops.visionattn.<op>``, a function of the shapes of the operator's tensors."""

    def add(formula: Callable[..., int]) -> Callable[..., int]:
        _formulas[op] = formula
        if _COUNTER in sys.modules:
            _register(sys.modules[_COUNTER])
        return formula

    return add


def _register(counter) -> None:
    while _formulas:
        op, formula = _formulas.popitem()
        counter.register_flop_formula(getattr(torch.ops.visionattn, op))(formula)


class _AfterImport:
    """An entry of ``sys.meta_path`` that leaves it once the counter is imported."""

    def find_spec(self, name, path=None, target=None):
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module

        def run_and_register(module):
            run(module)
            _register(module)

        spec.loader.exec_module = run_and_register
        return spec


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _AfterImport())
