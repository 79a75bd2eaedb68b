"""Call every operator with kernels once, in Triton's interpreter, and print how its kernels are launched, as JSON.

python -m tests.kernels.record_launches
"""

import json
from contextlib import contextmanager

import torch

from tests.kernels.launch_lists import launched, modules
from visionattn import kernels
from visionattn.kernels.common import custom_op
from visionattn.kernels.common.jit import LazyKernel, load_kernels
from visionattn.kernels.common.launch import NAMES

ROWS = []
GUARDED: list[torch.device] = []


@contextmanager
def stand_in(x: torch.Tensor):
    """For what makes a tensor's device the current one: a CPU has no such thing."""
    GUARDED.append(x.device)
    yield
    GUARDED.pop()


class Recorder:
    """Stands for a kernel where it is launched, and notes the types of the arguments."""

    def __init__(self, kernel: LazyKernel) -> None:
        function = kernel.fn
        load_kernels(function.__globals__)
        self.kernel = function.__globals__[function.__name__]
        self.name = (function.__module__, function.__name__)
        self.parameters = function.__code__.co_varnames[: function.__code__.co_argcount]

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            assert GUARDED[-1:] == [next(a.device for a in arguments if isinstance(a, torch.Tensor))], self.name
            types = {name: type_of(value) for name, value in zip(self.parameters, arguments, strict=False)}
            ROWS.append({"kernel": self.name, "types": types})
            return self.kernel[grid](*arguments, **constants)

        return launch


def type_of(value):
    if isinstance(value, torch.Tensor):
        return "*" + NAMES[value.dtype]
    if isinstance(value, tuple):
        return [type_of(item) for item in value]
    return "fp32" if isinstance(value, float) else "i32"


def record() -> None:
    """Put a recorder in the place of every kernel, in every module that launches it."""
    wanted = launched()
    found = [
        (module, name, value)
        for module in modules()
        for name, value in vars(module).items()
        if isinstance(value, LazyKernel) and (value.fn.__module__, value.fn.__name__) in wanted
    ]
    for module, name, kernel in [(module, name, Recorder(kernel)) for module, name, kernel in found]:
        setattr(module, name, kernel)


def step(function, *shapes, **options) -> None:
    """Forward and backward of a call in the kernels."""
    tensors = [torch.randn(shape, requires_grad=True) for shape in shapes]
    function(*tensors, **options, backend="triton").sum().backward()


def main() -> None:
    record()
    custom_op.on_device_of = stand_in
    step(kernels.depthwise_conv2d, (1, 4, 5, 6), (4, 1, 3, 3), (4,))
    step(kernels.gated_pointwise, (1, 4, 5, 6), (4, 4, 1, 1), (4,), (1, 4, 5, 6))
    step(kernels.focused, (1, 5, 2, 16))
    tables = kernels.rotary_tables(3, 4, 16)
    weights = torch.rand(1, 12, 1, requires_grad=True)
    qkv = ((1, 12, 1, 16),) * 3
    step(
        lambda q, k, v, residual, gate, backend: kernels.linear_attention(
            q, k, v, "elu+1", rotary=tables, key_weights=weights, residual=residual, gate=gate, backend=backend
        ),
        *qkv,
        *qkv[:2],
    )
    heads = ((1, 8, 9, 1, 16),) * 3
    for biased in (True, False):  # without bias the gradient of the queries is another launch of the same kernel
        bias = ((1, 5, 5),) if biased else ()
        step(
            lambda q, k, v, bias=None, backend=None: kernels.neighborhood_attention(
                q, k, v, 3, 2, bias, backend=backend
            ),
            *heads,
            *bias,
        )
    step(kernels.bilevel_routing_attention, *heads, region=(4, 3), topk=2)
    for side in (4, 7):  # the gradients of a whole window in one program, or in blocks
        step(
            lambda qkv, bias, padding, side, backend: kernels.window_attention(
                qkv, side, side // 2, bias, padding, backend=backend
            ),
            (1, 5, 9, 3, 1, 16 if side == 4 else 32),
            ((2 * side - 1) ** 2, 1),
            (3, 1, 16 if side == 4 else 32),
            side=side,
        )
    print(json.dumps(ROWS))


if __name__ == "__main__":
    main()
