"""Pieces that blocks of several families share."""

import torch
from timm.layers import DropPath
from torch import Tensor, nn

__all__ = ["ScaledResidual2d"]


class ScaledResidual2d(nn.Module):
    """``x + drop_path(gamma * branch)`` on maps, in one pass over memory where no path is dropped.

    Args:
        dim: Channels; ``gamma`` is the learned layer scale of each.
        init_value: What ``gamma`` starts at.
        drop_path: Probability of leaving the branch out of a training sample.
    """

    def __init__(self, dim: int, init_value: float, drop_path: float = 0.0, device=None, dtype=None) -> None:
        super().__init__()
        self.init_value = init_value
        self.drop_prob = drop_path
        self.gamma = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.gamma, self.init_value)

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """Shortcut and branch, both [B, C, H, W], to their sum."""
        gamma = self.gamma[:, None, None]
        if self.training and self.drop_prob > 0.0:
            return x + self.drop_path(branch * gamma)
        return torch.addcmul(x, branch, gamma)
