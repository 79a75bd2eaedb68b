"""Whether a module still computes what its class says, so that others may read its weights instead of calling it.

Pruning, weight and spectral norms, adapters, quantizers and feature extractors change a module from outside: by hooks,
by parametrizations, by another module in its place. What reads weights would pass all of that by without a word. Hence
the one rule of fused paths: weights of another module are read only while it is intact; otherwise it is called.
"""

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

__all__ = ["hooked", "intact", "pointwise", "same_size_depthwise"]


def hooked(module: nn.Module) -> bool:
    """Whether calling a module runs hooks, or a ``forward`` that was set on the module itself."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def intact(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling a module is nothing but ``kind.forward`` of its weights.

    Parametrizations and wrappers change the class, weight norm and pruning of old add hooks. For ``torch.compile`` the
    answer is a constant of the graph. Not for TorchScript: ask behind ``torch.jit.is_scripting()``.
    """
    return type(module) is kind and not hooked(module) and not _has_any_global_hook()


def same_size_depthwise(module: nn.Module) -> bool:
    """Whether a module is an intact ``nn.Conv2d`` that convolves every channel alone, keeps the size and pads zeros."""
    if not intact(module, nn.Conv2d):
        return False
    margin = (module.dilation[0] * (module.kernel_size[0] // 2),) * 2
    return (
        module.groups == module.in_channels == module.out_channels
        and module.kernel_size[0] == module.kernel_size[1]
        and module.kernel_size[0] % 2 == 1
        and module.dilation[0] == module.dilation[1]
        and module.stride == (1, 1)
        and module.padding == margin
        and module.padding_mode == "zeros"
    )


def pointwise(module: nn.Module) -> bool:
    """Whether a module is an intact ``nn.Conv2d`` that is a linear map of every position's channels."""
    if not intact(module, nn.Conv2d):
        return False
    geometry = (module.kernel_size, module.stride, module.padding, module.groups)
    return geometry == ((1, 1), (1, 1), (0, 0), 1)
