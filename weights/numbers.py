"""NumPy's numbers and arrays in pickles, read without NumPy: its own ``__setstate__`` believes what a file says.

A file may set the item size and the object flag of a dtype there, after which NumPy reads and frees memory that is not
its own. Here a dtype is what its code says, and bytes are as many as it needs or are refused.
"""

import math
import re
from typing import Any

import numpy as np

__all__ = ["Array", "Dtype", "array", "numpy_globals", "scalar"]

CODE = re.compile(r"[<>|=]?([biufc](1|2|4|8|16)|[SU](\d{1,6}))")
LARGEST = 1 << 27
"""Values of an array that is given as a list."""


class Dtype:
    """Stands for ``numpy.dtype`` while unpickling: a number or text type, never objects, which would be pickles."""

    def __init__(self, code: str = "", *args: Any) -> None:
        if not isinstance(code, str) or not CODE.fullmatch(code):
            raise ValueError(f"numpy values of type {str(code)[:20]!r} are not read")
        self.code = code

    def __setstate__(self, state: Any) -> None:
        _, order, *_ = state
        if order not in ("<", ">", "|", "="):
            raise ValueError("numpy's byte order is damaged")
        self.code = order + self.code.lstrip("<>|=")

    def values(self, content: Any, count: int) -> np.ndarray:
        """``count`` values out of bytes, or out of the text that protocol 2 writes them as."""
        if count == 0:  # protocol 2 writes no bytes as a call
            return np.zeros(0, self.code)
        content = content.encode("latin1") if isinstance(content, str) else content
        dtype = np.dtype(self.code)
        if not isinstance(content, bytes) or count > LARGEST or len(content) != count * dtype.itemsize:
            raise ValueError(f"a numpy value of type {self.code} has not the bytes that it needs")
        return np.frombuffer(content, dtype, count)


def scalar(dtype: Dtype, content: Any = b"") -> Any:
    """A number or text of Python in place of NumPy's."""
    if type(dtype) is not Dtype:
        raise ValueError("a numpy number without a type is not read")
    return dtype.values(content, 1).item()


class Array(list):
    """Nested lists in place of an array."""

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, content = state
        if type(dtype) is not Dtype or len(shape) > 32 or not all(type(n) is int and n >= 0 for n in shape):
            raise ValueError("a numpy array is damaged")
        values = dtype.values(content, math.prod(shape)).reshape(shape, order="F" if fortran else "C").tolist()
        self[:] = values if isinstance(values, list) else [values]

    def tolist(self) -> list:
        """Nested lists, as of an array."""
        return list(self)


def array(*args: Any) -> Array:
    """An array before its state is known."""
    return Array()


def numpy_globals() -> list[tuple[Any, str]]:
    """Substitutes for what rebuilds numbers and arrays, under the names of old and new NumPy."""
    substitutes = [(Array, "numpy.ndarray"), (Dtype, "numpy.dtype")]
    for module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        substitutes += [(scalar, f"{module}.scalar"), (array, f"{module}._reconstruct")]
    return substitutes
