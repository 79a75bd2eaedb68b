"""Rotation of pairs in compiled graphs."""

import pytest
import torch

from visionattn.kernels import linear_attention, rotary_tables
from visionattn.kernels.linear_attn import rotate_pairs


def step(function, inputs):
    out = function(*inputs)
    wanted = [t for t in inputs if t.requires_grad]
    return out, *torch.autograd.grad(out, wanted, torch.cos(torch.arange(out.numel())).view(out.shape).to(out.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("odd", [False, True])  # views whose pairs do not begin at even elements
@pytest.mark.parametrize("trained_tables", [False, True])
def test_compiled_equals_eager_forward_and_gradients(dtype, odd, trained_tables):
    wide = torch.randn(2, 15, 3, 9 if odd else 8).to(dtype).requires_grad_()
    precise = torch.promote_types(dtype, torch.float32)
    tables = [t.to(precise).requires_grad_(trained_tables) for t in rotary_tables(3, 5, 8)]

    def turn(wide, cos, sin):
        return 2 * rotate_pairs(wide[..., -8:], cos, sin)

    torch.compiler.reset()  # else every case counts as one more version of the function
    compiled = torch.compile(turn, fullgraph=True, backend="aot_eager")
    found, expected = step(compiled, (wide, *tables)), step(turn, (wide, *tables))
    rounded = dtype == torch.bfloat16 and trained_tables  # then each half of a gradient is, before they are added
    torch.testing.assert_close(found, expected, **(dict(rtol=0.02, atol=0.02) if rounded else {}))


@pytest.mark.parametrize("batch", [0, 2])
def test_passes_opcheck(batch):
    x = torch.randn(batch, 15, 2, 8).transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    torch.library.opcheck(torch.ops.visionattn.rotate_pairs.default, (x, *rotary_tables(3, 5, 8)))


def test_a_compiled_training_step_of_linear_attention_rotates_by_the_operator():
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    def attend(x, cos, sin):
        return linear_attention(*x.unbind(2), feature_map="elu+1", rotary=(cos, sin))

    inputs = torch.randn(2, 15, 3, 2, 8, requires_grad=True), *rotary_tables(3, 5, 8)
    compiled = torch.compile(attend, fullgraph=True, backend=keep)
    torch.testing.assert_close(step(compiled, inputs), step(attend, inputs))
    called = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("visionattn.rotate_pairs" in name for name in called) == 2, called


def test_compiled_per_sample_gradients():
    x, tables = torch.randn(3, 15, 2, 8), rotary_tables(3, 5, 8)
    per_sample = torch.func.vmap(torch.func.grad(lambda x: rotate_pairs(x[None], *tables).sin().sum()))
    compiled = torch.compile(per_sample, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), per_sample(x))


@pytest.mark.parametrize("compiled", [False, True])
def test_double_precision_is_not_rounded_to_the_tables(compiled):
    """Differences of gradients showed the rounding as an error of second derivatives."""
    torch.compiler.reset()
    x, tables = torch.randn(2, 15, 3, 8, dtype=torch.float64), rotary_tables(3, 5, 8)
    turn = torch.compile(rotate_pairs, fullgraph=True, backend="aot_eager") if compiled else rotate_pairs
    found, exact = turn(x, *tables), rotate_pairs(x, *(t.double() for t in tables))
    assert found.dtype == torch.float64 and torch.equal(found, exact)
