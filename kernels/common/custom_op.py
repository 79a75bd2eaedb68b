"""Operators that launch Triton kernels: where they run, and how what they are given lies in memory."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from visionattn.kernels.common.layout import last_contiguous

__all__ = ["custom_op"]


def on_device_of(x: Tensor) -> AbstractContextManager:
    """Make the device of ``x`` the current one, on which, and on whose current stream, Triton launches."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def custom_op(name: str, rows: Sequence[str] = (), whole: Sequence[str] = ()) -> Callable[[Callable], Callable]:
    """Decorate the body of an operator, ``visionattn::name``, that launches kernels and changes none of its arguments.

    The body runs on the device of its first argument, a tensor. Whoever calls the operator, such as a compiler, may
    give tensors of any strides.

    Args:
        name: Of the operator, in the namespace of the library.
        rows: Tensors that the body gets with a contiguous last axis.
        whole: Tensors that it gets contiguous.
    """

    def register(body: Callable) -> Callable:
        names = list(inspect.signature(body).parameters)
        arrangements = [(names.index(n), last_contiguous) for n in rows]
        arrangements += [(names.index(n), Tensor.contiguous) for n in whole]

        @functools.wraps(body)
        def on_device(*arguments):
            given = list(arguments)
            with on_device_of(given[0]):
                for i, arrange in arrangements:
                    if given[i] is not None:
                        given[i] = arrange(given[i])
                return body(*given)

        schema = torch.library.infer_schema(body, mutates_args=())
        return torch.library.custom_op(f"visionattn::{name}", mutates_args=(), schema=schema)(on_device)

    return register
