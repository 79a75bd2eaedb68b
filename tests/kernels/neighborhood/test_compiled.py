"""Neighborhood attention as one operator of a compiled graph: equal to the reference, and what compilers get."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.utils.flop_counter import FlopCounterMode

from visionattn.kernels import neighborhood_attention
from visionattn.kernels.common.checks import per_axis
from visionattn.kernels.neighborhood.compiled import neighborhood_attention_op

# B, spatial, h, D, kernel_size, dilation, is_causal: one tile, tiles of three kinds, residues of two lengths, odd D
SHAPES = [
    (2, (57,), 3, 5, 7, 1, False),
    (2, (40,), 2, 8, 5, 3, True),
    (1, (17, 19), 2, 12, 5, 1, False),
    (3, (13, 17), 2, 7, 3, 2, False),
    (2, (15, 13), 2, 8, 7, 1, (True, False)),
    (2, (14, 21), 1, 8, 7, (2, 3), False),
    (2, (7, 7), 2, 8, 7, 1, False),
    (1, (7, 7), 1, 8, 7, 1, True),
    (1, (1, 30), 2, 4, (1, 5), 1, False),
    (0, (20, 20), 2, 4, 5, 1, False),
    (1, (6, 9, 11), 2, 4, (3, 5, 4), (1, 1, 2), (True, False, False)),
]


def tensors(B, spatial, h, D, K, dtype=torch.float32):
    """Views of one projection, as layers give them, and a bias."""
    sides = per_axis("K", K, len(spatial), int)
    qkv = torch.randn(B, *spatial, 3, h, D, dtype=torch.float64)
    bias = torch.randn(h, *(2 * side - 1 for side in sides), dtype=torch.float64)
    return [t.to(dtype).requires_grad_() for t in (qkv, bias)]


def operator(qkv, bias, K, d, causal):
    axes = qkv.dim() - 4
    K, d, causal = (per_axis("", x, axes, kind) for x, kind in ((K, int), (d, int), (causal, bool)))
    return neighborhood_attention_op(*qkv.unbind(-3), K, d, bias, causal, qkv.shape[-1] ** -0.5)


def reference(qkv, bias, K, d, causal):
    return neighborhood_attention(*qkv.unbind(-3), K, d, bias, causal, backend="reference")


def step(function, qkv, bias, *setting):
    out = function(qkv, bias, *setting)
    wanted = [t for t in (qkv, bias) if t is not None and t.requires_grad]
    return out, *torch.autograd.grad(out, wanted, torch.sin(torch.arange(out.numel())).view(out.shape).to(out.dtype))


@pytest.mark.parametrize("bias", ["trained", "frozen", "none"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_reference_forward_and_gradients(shape, bias, poisoned_empty):
    *sizes, K, d, causal = shape
    qkv, table = tensors(*sizes, K)
    table = {"trained": table, "frozen": table.detach(), "none": None}[bias]
    results = [step(function, qkv, table, K, d, causal) for function in (operator, reference)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
    assert results[0][0].is_contiguous()


def test_only_the_bias_is_trained():
    qkv, bias = tensors(1, (12, 13), 2, 8, 5)
    results = [step(function, qkv.detach(), bias, 5, 1, False) for function in (operator, reference)]
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", [((13,), 5, 2, False), ((10, 8), 3, 1, False), ((4, 5, 4), 2, 1, True)], ids=str)
def test_gradients_are_derivatives(case):
    spatial, *setting = case
    qkv, bias = tensors(1, spatial, 1, 2, setting[0], torch.float64)
    assert gradcheck(lambda *t: operator(*t, *setting), (qkv, bias), fast_mode=True)
    assert gradcheck(lambda t: operator(t, None, *setting), (qkv,), fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_low_precision_is_as_close_to_float64_as_eager_tiles(dtype):
    exact = [t.detach().to(dtype).double().requires_grad_() for t in tensors(2, (20, 19), 2, 16, 7)]
    truth = step(reference, *exact, 7, 1, False)
    inputs = [t.detach().to(dtype).requires_grad_() for t in exact]
    eager = lambda x, *rest: neighborhood_attention(*x.unbind(-3), *rest[1:3], rest[0], rest[3])  # noqa: E731
    errors = [
        [(a.double() - b).norm() / b.norm() for a, b in zip(step(function, *inputs, 7, 1, False), truth, strict=True)]
        for function in (operator, eager)
    ]
    assert all(ours <= 1.2 * tiles for ours, tiles in zip(*errors, strict=True)), errors


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("size", [(9, 8), (7, 7)], ids=str)
def test_passes_opcheck(size, biased):
    qkv, bias = tensors(2, size, 2, 4, 7)
    q, k, v = (t.detach().requires_grad_() for t in qkv.unbind(-3))
    bias = bias if biased else None
    setting = [7, 7], [1, 1], [False, True], 0.5
    ops = torch.ops.visionattn
    torch.library.opcheck(ops.neighborhood_attention_tiles.default, (q, k, v, bias, *setting))
    made = [None if t is None else t.detach() for t in (q, q, k, v, bias)]
    results = [t.detach() for t in ops.neighborhood_attention_tiles(q, k, v, bias, *setting)]
    torch.library.opcheck(ops.neighborhood_attention_tiles_backward.default, (*made, *results, *setting, biased))


def test_a_compiled_training_step_is_one_graph_of_the_operator_for_all_sizes():
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    attend = lambda x, bias: 2 * neighborhood_attention(*x.unbind(3), 5, 1, bias)  # noqa: E731
    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend=keep)
    for B, H, W in ((6, 15, 16), (5, 12, 11), (7, 8, 22)):  # of no two alike, nor 1: a compiler takes notice
        inputs = tensors(B, (H, W), 2, 4, 5)
        torch.testing.assert_close(step(compiled, *inputs), step(attend, *inputs), rtol=1e-4, atol=1e-4)
    called = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert len(graphs) == 1 and sum("neighborhood_attention_tiles" in name for name in called) == 1
    assert not any("softmax" in name or "index" in name for name in called), called


@pytest.mark.parametrize("bias", ["trained", "none"])
def test_compiled_by_inductor_it_has_the_gradients_of_eager(bias):
    qkv, table = tensors(2, (9, 10), 2, 4, 5)
    table = table if bias == "trained" else None
    # Nothing but views around the operator: its own strides are those that the compiler was told.
    attend = lambda x, bias: neighborhood_attention(*x.unbind(3), 5, 1, bias)  # noqa: E731
    compiled = torch.compile(attend, fullgraph=True)
    torch.testing.assert_close(step(compiled, qkv, table), step(attend, qkv, table), rtol=1e-4, atol=1e-4)


def test_compiled_under_autocast():
    inputs = tensors(1, (12, 11), 2, 8, 5)
    attend = lambda x, bias: neighborhood_attention(*x.unbind(3), 5, 1, bias)  # noqa: E731
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = (step(function, *inputs) for function in (compiled, attend))
    assert [t.dtype for t in found] == [torch.bfloat16, torch.float32, torch.float32]
    # They round to bfloat16, by 0.4 %, at other places on the way.
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_compiled_per_sample_gradients():
    qkv, bias = (t.detach() for t in tensors(3, (8, 9), 1, 4, 5))
    loss = lambda b, x: neighborhood_attention(*x[None].unbind(3), 5, 1, b).square().sum()  # noqa: E731
    per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))
    compiled = torch.compile(per_sample, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(bias, qkv), per_sample(bias, qkv), rtol=1e-4, atol=1e-4)


def test_flops_are_those_of_the_windows():
    qkv, bias = tensors(2, (12, 13), 2, 8, 5)
    with FlopCounterMode(display=False) as counter:
        operator(qkv, bias, 5, 1, False).sum().backward()
    assert counter.get_total_flops() == (2 + 5) * 2 * (2 * 12 * 13 * 2 * 8) * 25
