"""Agent attention against its formula, by tokens and agent by agent."""

import pytest
import torch

from visionattn.kernels import agent, agent_attention


def make(B, N, M, h, D, dtype=torch.float64):
    tokens = [torch.randn(B, N, h, D, dtype=dtype) for _ in range(3)]
    rest = (
        torch.randn(B, M, h, D, dtype=dtype),
        torch.randn(1, h, M, N, dtype=dtype),
        torch.randn(1, h, N, M, dtype=dtype),
    )
    return [t.requires_grad_() for t in (*tokens, *rest)]


def formula(q, k, v, agents, to_agents, to_tokens, scale):
    pooled = torch.einsum("bmhd,bnhd->bhmn", agents, k) * scale + to_agents
    read = torch.einsum("bnhd,bmhd->bhnm", q, agents) * scale + to_tokens
    return torch.einsum("bhnm,bhmk,bkhd->bnhd", read.softmax(-1), pooled.softmax(-1), v)


@pytest.mark.parametrize("shape", [(2, 9, 1, 2, 4), (1, 7, 5, 3, 2), (2, 70, 1, 1, 8), (1, 1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("many", [1, 64, 10**6])
def test_equals_its_formula_forward_and_gradients(shape, many, monkeypatch):
    monkeypatch.setattr(agent, "MANY_TOKENS", many)
    tensors = make(*shape)
    results = [function(*tensors, 0.3) for function in (agent_attention, formula)]
    torch.testing.assert_close(*results)
    with torch.no_grad():
        torch.testing.assert_close(agent_attention(*tensors, 0.3), results[1])
    weight = torch.randn_like(results[0])
    torch.testing.assert_close(*[torch.autograd.grad(out, tensors, weight) for out in results])


def test_gradcheck():
    tensors = make(1, 5, 2, 1, 2)
    assert torch.autograd.gradcheck(lambda *t: agent_attention(*t, 0.5), tensors)
    assert torch.autograd.gradgradcheck(lambda *t: agent_attention(*t, 0.5), tensors, fast_mode=True)


def test_scripts_and_compiles():
    tensors = make(2, 70, 1, 2, 4, torch.float32)
    expected = agent_attention(*tensors, 0.3)
    torch.testing.assert_close(torch.jit.script(agent_attention)(*tensors, 0.3), expected)
    torch.testing.assert_close(
        torch.compile(agent_attention, fullgraph=True, backend="aot_eager")(*tensors, 0.3), expected
    )


def test_half_precision_with_tables_in_full():
    tensors = make(1, 70, 1, 2, 8, torch.float32)
    exact = agent_attention(*tensors, 0.3)
    half = [t.detach().bfloat16() for t in tensors[:4]]
    out = agent_attention(*half, *(t.detach() for t in tensors[4:]), 0.3)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=3e-2, atol=3e-2)  # a few roundings of 2 ** -8
