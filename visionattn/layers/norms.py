"""Norms that end as batch norm: RepBN and its progressive form (SLAB, arXiv 2405.11582), and folding them away.

RepBN(x) = BN(x) + alpha * x
PRepBN(x) = lambda * LN(x) + (1 - lambda) * RepBN(x), lambda falling from 1 to 0 while training
"""

from collections.abc import Callable, Iterable

import torch
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from visionattn.layers.checks import declared
from visionattn.layers.intact import hooked, intact
from visionattn.layers.tracing import opaque

__all__ = [
    "Affine",
    "FoldError",
    "PRepBN",
    "RepBN",
    "check_foldable",
    "create_norm",
    "estimate_statistics",
    "fold_after",
    "fold_before",
    "fold_into",
    "folded",
]

NORMS = ("layernorm", "repbn", "prepbn")


class Affine(nn.Module):
    """``x * scale + shift`` per channel: what a batch norm is after training.

    Args:
        scale: [C]
        shift: [C]
        nchw: Whether the channels are axis 1 of maps instead of the last axis.
    """

    def __init__(self, scale: Tensor, shift: Tensor, nchw: bool = False) -> None:
        super().__init__()
        self.nchw = nchw
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, x: Tensor) -> Tensor:
        return _affine(x, self.scale, self.shift, self.nchw)


@declared
class RepBN(nn.Module):
    """``BN(x) + alpha * x`` over the last axis, with one learned alpha.

    Args:
        dim: Channels.
        eps: Of the batch norm.
        nchw: Whether the channels are axis 1 of maps [B, C, H, W] instead of the last axis.
    """

    def __init__(self, dim: int, eps: float = 1e-5, nchw: bool = False, device=None, dtype=None) -> None:
        super().__init__()
        self.nchw = nchw
        self.alpha = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.bn = nn.BatchNorm1d(dim, eps=eps, device=device, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.ones_(self.alpha)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training and not self.bn.training and self.unchanged():
            scale, shift = self.affine()
            return _affine(x, scale, shift, self.nchw)
        y = x.permute(0, 2, 3, 1) if self.nchw else x
        y = self.bn(y.reshape(-1, y.shape[-1])).reshape(y.shape)
        if self.nchw:
            y = y.permute(0, 3, 1, 2)
        return torch.addcmul(y, x, self.alpha.to(x.dtype))

    def unchanged(self) -> bool:
        """Whether the batch norm is nothing but its weights and statistics."""
        if torch.jit.is_scripting():
            return True
        else:
            return intact(self.bn, nn.BatchNorm1d) or intact(self.bn, nn.SyncBatchNorm)

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift of every channel in evaluation. [C], [C]"""
        bn = self.bn
        scale = bn.weight * torch.rsqrt(bn.running_var + bn.eps)
        return scale + self.alpha, bn.bias - bn.running_mean * scale

    @torch.no_grad()
    def fuse(self) -> Affine:
        """The module that computes the same in evaluation (timm's ``reparameterize_model`` calls this)."""
        return Affine(*self.affine(), self.nchw)


@opaque  # a traced graph would keep the step of the schedule
@declared
class PRepBN(nn.Module):
    """Layer norm that turns into RepBN: in training ``lerp(RepBN(x), LN(x), step / total_step)``, then RepBN alone.

    ``step`` starts at ``total_step`` and falls by one with every forward pass in training, recomputation under
    gradient checkpointing aside. Evaluation always takes RepBN, so it is meaningful from the end of the schedule on.

    Args:
        dim: Channels.
        eps: Of the layer norm.
        total_step: Forward passes from layer norm to RepBN.
        warmup: Forward passes with the layer norm alone, before those.
        nchw: Whether the channels are axis 1 of maps [B, C, H, W] instead of the last axis.

    Raises:
        ValueError: If ``total_step`` is not positive or ``warmup`` negative.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        total_step: int = 300_000,
        warmup: int = 0,
        nchw: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        if total_step < 1 or warmup < 0:
            raise ValueError(f"total_step must be positive and warmup not negative, got {total_step} and {warmup}")
        self.nchw = nchw
        self.steps = total_step
        self.warmup = warmup
        self.warming = warmup > 0
        self.norm1 = LayerNorm2d(dim, eps=eps, **dd) if nchw else nn.LayerNorm(dim, eps=eps, **dd)
        self.norm2 = RepBN(dim, nchw=nchw, **dd)
        # The authors' names and types, so that runs can be resumed from their checkpoints.
        for name in ("warm", "iter", "total_step"):
            self.register_buffer(name, torch.empty((), dtype=torch.long, device=device))
        self.register_buffer("share", torch.empty((), dtype=torch.float32, device=device), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start the schedule."""
        self.warming = self.warmup > 0
        self.warm.fill_(self.warmup)
        self.iter.fill_(self.steps)
        self.total_step.fill_(self.steps)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        self.share.fill_(1.0)

    def _load_from_state_dict(self, *args, **kwargs) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self.warming = not self.warm.is_meta and bool(self.warm > 0)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return self.norm2(x)
        first = not self._recomputing()
        if self.warming and first and bool(self.warm > 0):  # a branch on a tensor only where there is a warm-up
            self.warm -= 1
            return self.norm1(x)
        if first:
            self.share.copy_(self.iter / self.total_step)
            self.iter.copy_((self.iter - 1).clamp(min=0))
        share = self.share.clone().to(x.dtype)  # the next pass may come before the backward pass of this one
        return torch.lerp(self.norm2(x), self.norm1(x).to(x.dtype), share)

    def unchanged(self) -> bool:
        """Whether the batch norm is nothing but its weights and statistics."""
        return self.norm2.unchanged()

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift of every channel in evaluation. [C], [C]"""
        return self.norm2.affine()

    def fuse(self) -> Affine:
        """The module that computes the same in evaluation (timm's ``reparameterize_model`` calls this)."""
        return self.norm2.fuse()

    def _recomputing(self) -> bool:
        """Whether this is the second forward pass of a checkpointed segment, which runs inside the backward pass."""
        if torch.jit.is_scripting():
            return False
        return self._in_backward()

    @torch.jit.unused
    def _in_backward(self) -> bool:
        return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def create_norm(kind: str, dim: int, eps: float, nchw: bool = False, device=None, dtype=None, **kwargs) -> nn.Module:
    """A norm of the host backbones.

    Args:
        kind: ``"layernorm"``, ``"prepbn"`` or ``"repbn"``.
        dim: Channels.
        eps: Of the layer norm.
        nchw: Whether the channels are axis 1 of maps instead of the last axis.
        kwargs: Further arguments of ``PRepBN``.

    Raises:
        ValueError: If there is no such norm.
    """
    dd = {"device": device, "dtype": dtype}
    if kind == "layernorm":
        return LayerNorm2d(dim, eps=eps, **dd, **kwargs) if nchw else nn.LayerNorm(dim, eps=eps, **dd, **kwargs)
    if kind == "prepbn":
        return PRepBN(dim, eps=eps, nchw=nchw, **dd, **kwargs)
    if kind == "repbn":
        return RepBN(dim, nchw=nchw, **dd, **kwargs)
    raise ValueError(f"norm_layer must be one of {', '.join(NORMS)}, got {kind!r}")


@torch.no_grad()
def estimate_statistics(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Run images through a trained model for the running statistics of its batch norms alone.

    Everything else is in evaluation, so nothing is dropped and no schedule goes on. The statistics move by each norm's
    momentum, as in the 10 passes over the training set that end the authors' training.

    Args:
        model: Its modes are as before afterwards.
        batches: Images. [B, C, H, W] each
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for module in modes:
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    for images in batches:
        model(images)
    for module, training in modes.items():
        module.training = training


class FoldError(ValueError):
    """An affine map cannot be folded into a layer."""


def check_foldable(*layers: nn.Module) -> None:
    """Check that layers are linear in weights of their own: no adapter, hook or parametrization makes others of them.

    Raises:
        FoldError: Naming the class of the first that is not.
    """
    for layer in layers:
        linear = isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)) and not is_parametrized(layer)
        if not linear or hooked(layer) or "weight" not in layer._parameters:
            raise FoldError(
                f"layer must be nn.Linear or a convolution without hooks and parametrizations, got {type(layer)}"
            )


def folded(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Scale and shift of a norm that is affine in evaluation, None for other modules."""
    with torch.no_grad():
        return norm.affine() if isinstance(norm, (RepBN, PRepBN)) and norm.unchanged() else None


def fold_into(norm: nn.Module, fold: Callable[[Tensor, Tensor], None] | None) -> nn.Module:
    """Fold a norm that is affine in evaluation into the layer beside it.

    Args:
        norm: Any module.
        fold: Lets the layer take over scale and shift, such as a partial of ``fold_before``; None if nothing can.

    Returns:
        What takes the place of the norm: ``nn.Identity``, its ``Affine`` where the layer cannot take it over, and
        ``norm`` itself where it is no such norm.
    """
    affine = folded(norm)
    if affine is None:
        return norm
    try:
        if fold is not None:
            fold(*affine)
            return nn.Identity()
    except FoldError:
        pass
    return norm.fuse()


@torch.no_grad()
def fold_before(layer: nn.Linear | nn.Conv2d, scale: Tensor, shift: Tensor) -> None:
    """Let a layer compute of ``x`` what it computed of ``x * scale + shift``. A convolution must not pad.

    Raises:
        FoldError: If the layer has other weights than its own. Nothing is changed then.
    """
    check_foldable(layer)
    weight = layer.weight
    extra = [1] * (weight.dim() - 2)
    bias = (weight * shift.reshape(-1, *extra)).flatten(1).sum(1)
    layer.weight = nn.Parameter(weight * scale.reshape(-1, *extra), weight.requires_grad)
    layer.bias = nn.Parameter(bias if layer.bias is None else layer.bias + bias, weight.requires_grad)


@torch.no_grad()
def fold_after(layer: nn.Linear | nn.Conv2d, scale: Tensor, shift: Tensor) -> None:
    """Let a layer return ``y * scale + shift`` per channel of what it returned.

    Raises:
        FoldError: If the layer has other weights than its own. Nothing is changed then.
    """
    check_foldable(layer)
    weight = layer.weight
    layer.weight = nn.Parameter(weight * scale.reshape(-1, *[1] * (weight.dim() - 1)), weight.requires_grad)
    bias = shift if layer.bias is None else torch.addcmul(shift, layer.bias, scale)
    layer.bias = nn.Parameter(bias, weight.requires_grad)


def _affine(x: Tensor, scale: Tensor, shift: Tensor, nchw: bool) -> Tensor:
    scale, shift = scale.to(x.dtype), shift.to(x.dtype)
    if nchw:
        return torch.addcmul(shift, x.permute(0, 2, 3, 1), scale).permute(0, 3, 1, 2)
    return torch.addcmul(shift, x, scale)
