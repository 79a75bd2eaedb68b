"""Agent attention (arXiv 2312.08874): a few agents pool the values, every token reads from the agents.

    pooled = softmax(scale * a k^T + to_agents) v,   out = softmax(scale * q a^T + to_tokens) pooled

Shapes: B batch, N tokens, M agents, h heads, D head dim.
"""

import torch
from torch import Tensor

from visionattn.kernels.common.attend import attend
from visionattn.kernels.common.mode import autocasting, eager

__all__ = ["agent_attention"]

# Tokens an agent, from which on weights are kept agent by agent. Measured on an AMD EPYC, batch 8: 3 times the speed of
# attention by tokens in inference, 1.3 in training, for 9 agents on 56x56; none for 16 on 28x28 or 49 on 14x14.
MANY_TOKENS = 64


def agent_attention(
    q: Tensor, k: Tensor, v: Tensor, agents: Tensor, to_agents: Tensor, to_tokens: Tensor, scale: float
) -> Tensor:
    """Both attentions, from tokens to agents and from agents to tokens, in the fastest form known.

    All of it is PyTorch's own operators; TorchScript compiles it, too.

    Args:
        q: Queries. [B, N, h, D]
        k: Keys. [B, N, h, D]
        v: Values. [B, N, h, D]
        agents: [B, M, h, D]
        to_agents: Added to the logits of the agents' attention to tokens. [1, h, M, N]
        to_tokens: Added to the logits of the tokens' attention to agents. [1, h, N, M]
        scale: Factor of the logits.

    Returns:
        [B, N, h, D]
    """
    q, k, v, agents = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), agents.transpose(1, 2)
    if not torch.jit.is_scripting():
        few = agents.shape[2] * MANY_TOKENS <= q.shape[2] and q.dtype == to_agents.dtype
        if few and q.device.type == "cpu" and q.dtype.itemsize >= 4 and eager(q) and not autocasting(q):
            return _few_agents(q, k, v, agents * scale, to_agents, to_tokens.transpose(2, 3)).transpose(1, 2)
    pooled = _softmax(agents, k, v, to_agents, scale)
    return _softmax(q, agents, pooled, to_tokens, scale).transpose(1, 2)


def _softmax(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float) -> Tensor:
    # A trained bias would send PyTorch's fused attention to its slow path, which stores the logits, too.
    if bias.requires_grad:
        return ((q * scale) @ k.transpose(-1, -2) + bias).softmax(-1) @ v
    return attend(q, k, v, bias.to(q.dtype), scale)


def _few_agents(q: Tensor, k: Tensor, v: Tensor, agents: Tensor, to_agents: Tensor, to_tokens: Tensor) -> Tensor:
    """Both attentions by weights [M, N]: a softmax over the few columns of [N, M] would not use a processor's vectors.

    Args:
        q: [B, h, N, D], as k and v
        agents: Scaled. [B, h, M, D]
        to_agents: [1, h, M, N]
        to_tokens: [1, h, M, N]
    """
    if torch.is_grad_enabled():
        pooled = (agents @ k.transpose(2, 3) + to_agents).softmax(3) @ v
        return (agents @ q.transpose(2, 3) + to_tokens).softmax(2).transpose(2, 3) @ pooled
    # Sample by sample, products read queries and keys where they are: the stride of heads is that of one sample.
    y = torch.empty(q.transpose(1, 2).shape, dtype=v.dtype, device=v.device).transpose(1, 2)
    first, second = to_agents[0], to_tokens[0].contiguous()
    for i, a in enumerate(agents):
        pooled = torch.baddbmm(first, a, k[i].transpose(1, 2)).softmax(2) @ v[i]
        weights = torch.baddbmm(second, a, q[i].transpose(1, 2)).softmax(1)
        y[i] = weights.transpose(1, 2) @ pooled
    return y
