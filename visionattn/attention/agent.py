"""Agent attention: a few agents pool the values, every token reads from the agents. M agents, p * p = M."""

import math

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from visionattn.attention.mixer import Mixer
from visionattn.kernels import agent_attention
from visionattn.layers.blocks import DepthwiseConv, resize_table
from visionattn.layers.checks import check_side, declared
from visionattn.layers.tracing import opaque

__all__ = ["AgentAttention"]

TABLE = 7  # side of the coarse bias tables


@opaque  # whether tables are resized depends on the size of the map
@declared
class AgentAttention(Mixer):
    """``softmax(s q a^T + B2) softmax(s a k^T + B1) v + dwc(v)`` with agents a pooled from q (arXiv 2312.08874).

    Tables of positions are made for ``input_size``. On another map they are resized bilinearly, as the authors'
    detectors do.

    Args:
        num_agents: M, a square number.
        agent_shape: Rows and columns that agents are pooled to, if not to p * p; the tables follow bilinearly.
        host: Arguments of ``Mixer``.

    Raises:
        ValueError: If ``num_agents`` is no square number or ``agent_shape`` not positive.
    """

    short_name = "agent"

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_agents: int = 49,
        agent_shape: int | tuple[int, int] | None = None,
        *,
        input_size: tuple[int, int] = (14, 14),
        num_prefix_tokens: int = 0,
        device=None,
        dtype=None,
        **host,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__(dim, num_heads, input_size=input_size, num_prefix_tokens=num_prefix_tokens, **host, **dd)
        p = math.isqrt(num_agents) if type(num_agents) is int and num_agents > 0 else 0
        if p == 0 or p * p != num_agents:
            raise ValueError(f"num_agents must be a square number, got {num_agents!r}")
        shape = (p, p) if agent_shape is None else agent_shape
        check_side("agent_shape", shape)
        self.agent_shape = (shape, shape) if isinstance(shape, int) else (int(shape[0]), int(shape[1]))
        self.table_shape = (p, p)
        h, M, (H, W) = num_heads, num_agents, input_size
        self.dwc = DepthwiseConv(dim, 3, **dd)
        self.an_bias = nn.Parameter(torch.empty(h, M, TABLE, TABLE, **dd))
        self.na_bias = nn.Parameter(torch.empty(h, M, TABLE, TABLE, **dd))
        self.ah_bias = nn.Parameter(torch.empty(1, h, M, H, 1, **dd))
        self.aw_bias = nn.Parameter(torch.empty(1, h, M, 1, W, **dd))
        self.ha_bias = nn.Parameter(torch.empty(1, h, H, 1, M, **dd))
        self.wa_bias = nn.Parameter(torch.empty(1, h, 1, W, M, **dd))
        # Keys and queries of the prefix tokens.
        P = num_prefix_tokens
        self.ac_bias = nn.Parameter(torch.empty(1, h, M, P, **dd)) if P else None
        self.ca_bias = nn.Parameter(torch.empty(1, h, P, M, **dd)) if P else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The authors' initialisation of the tables; convolution and projections keep theirs."""
        for table in self.parameters(recurse=False):
            trunc_normal_(table, std=0.02)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, H: int, W: int, context: Tensor) -> Tensor:
        agents = F.adaptive_avg_pool2d(self.map(q, H, W).permute(0, 3, 1, 2), self.agent_shape)
        agents = agents.flatten(2).transpose(1, 2)  # B M C
        heads = [self.num_heads, self.head_dim]
        q, k, values, agents = (
            q.unflatten(2, heads),
            k.unflatten(2, heads),
            v.unflatten(2, heads),
            agents.unflatten(2, heads),
        )
        to_agents, to_tokens = self.biases(H, W)
        y = agent_attention(q, k, values, agents, to_agents, to_tokens, self.scale).flatten(2)
        local = self.dwc(self.map(v, H, W)).flatten(1, 2)
        if self.num_prefix_tokens == 0:
            return y + local
        return torch.cat([y[:, : self.num_prefix_tokens], y[:, self.num_prefix_tokens :] + local], 1)

    def biases(self, H: int, W: int) -> tuple[Tensor, Tensor]:
        """Of the logits from agents to tokens and from tokens to agents. [1, h, M, N], [1, h, N, M]"""
        to_agents = self._on_map(self.an_bias, (self.ah_bias + self.aw_bias)[0], H, W)
        sides = (self.ha_bias + self.wa_bias)[0].permute(0, 3, 1, 2)
        to_tokens = self._on_map(self.na_bias, sides, H, W).transpose(1, 2)
        if self.ac_bias is not None and self.ca_bias is not None:
            ac, ca = self._agents(self.ac_bias[0]), self._agents(self.ca_bias[0].transpose(1, 2)).transpose(1, 2)
            to_agents, to_tokens = torch.cat([ac, to_agents], 2), torch.cat([ca, to_tokens], 1)
        return to_agents[None], to_tokens[None]

    def _on_map(self, coarse: Tensor, sides: Tensor, H: int, W: int) -> Tensor:
        """Coarse table plus table of rows and columns at the size of the map. [h, M, ...] -> [h, M, H * W]"""
        bias = resize_table(coarse, H, W, "bilinear") + resize_table(sides, H, W, "bilinear")
        return self._agents(bias.flatten(2))

    def _agents(self, bias: Tensor) -> Tensor:
        """From the agents of the tables to those that are pooled. [h, M, n]"""
        p, q = self.agent_shape
        if (p, q) == self.table_shape:
            return bias
        grid = bias.transpose(1, 2).unflatten(2, [self.table_shape[0], self.table_shape[1]])
        return resize_table(grid, p, q, "bilinear").flatten(2).transpose(1, 2)
