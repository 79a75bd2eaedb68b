"""Aggregated attention: the form from shifted views against the reference, which is compared with brute force."""

import pytest
import torch

from visionattn.kernels import BackendError, aggregated_attention, seen_neighbors


def inputs(B, H, W, h, D, P, dtype=torch.float64):
    torch.manual_seed(0)
    shapes = [*[(B, H, W, h, D)] * 3, *[(B, P, h, D)] * 2, (h, 9), (h, H * W, P), (B, H, W, h, 9)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


SHAPES = [(2, 5, 7, 2, 4, 6), (1, 1, 1, 1, 3, 1), (1, 2, 9, 3, 5, 2), (2, 8, 8, 1, 8, 4)]


def test_reference_is_the_formula_position_by_position():
    q, k, v, pooled_k, pooled_v, bias, pooled_bias, add = given = inputs(1, 3, 4, 2, 5, 2)
    actual = aggregated_attention(*given, backend="reference")
    for y, x, head in [(0, 0, 0), (1, 2, 1), (2, 3, 0)]:
        near = [(s, y + s // 3 - 1, x + s % 3 - 1) for s in range(9)]
        near = [(s, i, j) for s, i, j in near if 0 <= i < 3 and 0 <= j < 4]
        query = q[0, y, x, head]
        logits = [query @ k[0, i, j, head] + bias[head, s] for s, i, j in near]
        logits += [query @ pooled_k[0, p, head] + pooled_bias[head, y * 4 + x, p] for p in range(2)]
        weights = torch.stack(logits).softmax(0)
        expected = sum((weights[n] + add[0, y, x, head, s]) * v[0, i, j, head] for n, (s, i, j) in enumerate(near))
        expected = expected + sum(weights[len(near) + p] * pooled_v[0, p, head] for p in range(2))
        torch.testing.assert_close(actual[0, y, x, head], expected)


@pytest.mark.parametrize("shape", SHAPES)
def test_views_equal_the_reference_forward_and_backward(shape):
    given = inputs(*shape)
    expected = aggregated_attention(*given, backend="reference")
    actual = aggregated_attention(*given)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(actual, given, grad), torch.autograd.grad(expected, given, grad), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradients_are_those_of_finite_differences(backend):
    assert torch.autograd.gradcheck(lambda *t: aggregated_attention(*t, backend=backend), inputs(1, 2, 3, 2, 2, 2))


def test_half_precision_sums_in_float32():
    given = [t.detach().bfloat16() for t in inputs(1, 6, 6, 2, 8, 4)]
    expected = aggregated_attention(*[t.double() for t in given], backend="reference")
    actual = aggregated_attention(*given)
    assert actual.dtype == torch.bfloat16
    torch.testing.assert_close(actual.double(), expected, rtol=1e-2, atol=1e-2)  # of bfloat16, which rounds to 4e-3


def test_compiles_as_one_graph():
    given = [t.detach() for t in inputs(2, 5, 7, 2, 4, 6)]
    compiled = torch.compile(aggregated_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*given), aggregated_attention(*given))


def test_edges_and_corners_see_fewer_neighbors():
    assert seen_neighbors(3, 4, torch.device("cpu")).tolist() == [[4, 6, 6, 4], [6, 9, 9, 6], [4, 6, 6, 4]]
    assert seen_neighbors(1, 1, torch.device("cpu")).tolist() == [[1]]


def test_what_does_not_fit_is_refused():
    given = inputs(1, 2, 3, 2, 2, 2)
    with pytest.raises(ValueError, match=r"pooled_bias must have shape \(2, 6, 2\), got \(2, 5, 2\)"):
        aggregated_attention(*given[:6], given[6][:, :5], given[7])
    with pytest.raises(BackendError, match="it has no kernels"):
        aggregated_attention(*given, backend="triton")
