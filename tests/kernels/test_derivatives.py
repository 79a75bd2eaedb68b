"""Derivatives of every operator: of second order, by transforms, in forward mode."""

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad, gradcheck, gradgradcheck

from visionattn.kernels import (
    BackendError,
    agent_attention,
    attend,
    bilevel_routing_attention,
    depthwise_conv2d,
    flow_attention,
    focused,
    gated_pointwise,
    linear,
    linear_attention,
    neighborhood_attention,
    rotary_tables,
    weighted_rows,
    weighted_rows_reference,
    window_attention,
)

ROUTES = torch.tensor([[2, 2], [0, 3], [1, 4], [5, 0], [3, 3], [0, 1], [7, 2], [8, 5], [6, 4]])[None]
HALF = torch.tensor([[True, False, False], [True, True, False], [True, True, True]])
CHOSEN = torch.tensor([[0, 4], [1, 1], [4, 2], [3, 3]])
TABLES = rotary_tables(2, 3, 4)


def _linear_case(**options):
    shapes = [(1, 6, 2, 4)] * 5
    return shapes, lambda q, k, v, r, g, **kw: linear_attention(q, k, v, residual=r, gate=g, **options, **kw)


def _agents(N, M):
    zeros = torch.zeros(1, 1, M, N, dtype=torch.float64)
    shapes = [(1, N, 1, 3)] * 3 + [(1, M, 1, 3)]
    return shapes, lambda *t, backend=None: agent_attention(*t, zeros, zeros.transpose(2, 3), 0.5)


# Shapes of the tensors, and the operator as a function of them.
CASES = {
    "depthwise": ([(1, 2, 5, 4), (2, 1, 3, 3), (2,)], lambda *t, **kw: depthwise_conv2d(*t, 2, **kw)),
    "depthwise on a large map": ([(1, 16, 32, 32), (16, 1, 5, 5)], depthwise_conv2d),
    "gated": ([(1, 3, 2, 3), (2, 3, 1, 1), (2,), (1, 2, 2, 3)], gated_pointwise),
    "neighborhood": ([(1, 6, 5, 2, 3)] * 3, lambda q, k, v, **kw: neighborhood_attention(q, k, v, 3, **kw)),
    "neighborhood, dilated": ([(1, 13, 1, 3)] * 3, lambda q, k, v, **kw: neighborhood_attention(q, k, v, 3, 3, **kw)),
    "neighborhood, biased": (
        [(1, 6, 4, 2, 3)] * 3 + [(2, 5, 5)],
        lambda q, k, v, b, **kw: neighborhood_attention(q, k, v, 3, 1, b, (True, False), **kw),
    ),
    "window": ([(2, 4, 6, 3, 2, 3)], lambda qkv, **kw: window_attention(qkv, 2, **kw)),
    "window, shifted": ([(2, 4, 6, 3, 2, 3)], lambda qkv, **kw: window_attention(qkv, (2, 3), 1, **kw)),
    "window, biased and padded": (
        [(2, 5, 4, 3, 2, 3), (25, 2), (3, 2, 3)],
        lambda qkv, b, p, **kw: window_attention(qkv, 3, 1, b, p, **kw),
    ),
    "window, biased": ([(1, 3, 3, 3, 2, 3), (25, 2)], lambda qkv, b, **kw: window_attention(qkv, 3, 0, b, **kw)),
    "bilevel": ([(1, 6, 5, 1, 3)] * 3, lambda *t, **kw: bilevel_routing_attention(*t, 2, 3, **kw)),
    "bilevel, everywhere": ([(1, 4, 4, 1, 3)] * 3, lambda *t, **kw: bilevel_routing_attention(*t, 2, 4, **kw)),
    "bilevel, routed": (
        [(1, 6, 5, 1, 3)] * 2 + [(1, 6, 5, 1, 2)],
        lambda *t, **kw: bilevel_routing_attention(*t, 2, routes=ROUTES, **kw),
    ),
    "bilevel, weighted": (
        [(1, 6, 5, 1, 3)] * 3 + [(1, 9, 2)],
        lambda *t, **kw: bilevel_routing_attention(*t[:3], 2, routes=ROUTES, weights=t[3], **kw),
    ),
    "linear": _linear_case(feature_map="elu+1"),
    "linear, rotary": _linear_case(feature_map="elu+1", rotary=TABLES),
    "linear, focused": _linear_case(feature_map="focused", normalizer="mean"),
    "linear, inline": _linear_case(feature_map="exp", normalizer="inline"),
    "linear, magnitude": _linear_case(feature_map="softmax", normalizer="magnitude"),
    "linear, rank-augmented": _linear_case(feature_map="elu+1", rank_augmented=True),
    "linear, causal": _linear_case(feature_map="relu2", causal=True),
    "focused": ([(1, 4, 2, 3), (2, 3)], lambda x, s, **kw: focused(x, 3.0, s, **kw)),
    "flow": ([(1, 5, 2, 3)] * 3, flow_attention),
    "flow, causal": ([(1, 5, 2, 3)] * 3, lambda *t, **kw: flow_attention(*t, causal=True, **kw)),
    "dense": ([(2, 5, 4), (3, 4), (3,)], lambda *t, backend=None: linear(*t)),
    "agent": _agents(8, 3),
    "softmax": ([(1, 2, 4, 3)] * 3, lambda *t, backend=None: attend(*t)),
    "softmax, masked": ([(1, 2, 3, 3)] * 3, lambda *t, backend=None: attend(*t, HALF, 0.5)),
    "rows": ([(5, 3), (4, 2)], lambda rows, weight, backend=None: weighted_rows(rows, CHOSEN, weight)),
    "agent, few": _agents(64, 1),
}
every_case = pytest.mark.parametrize("case", CASES)
every_backend = pytest.mark.parametrize("backend", ["torch", "reference"])


def make(case, dtype=torch.float64):
    shapes, function = CASES[case]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes], function


def hessian_product(function, tensors):
    """By plain autograd, of a function whose second derivatives are not zero."""
    grads = torch.autograd.grad(function(*tensors).sin().sum(), tensors, create_graph=True)
    return torch.autograd.grad(sum((g * torch.cos(g.detach())).sum() for g in grads), tensors)


@every_backend
@every_case
def test_derivatives_of_first_and_second_order(case, backend):
    tensors, function = make(case)
    run = lambda *t: function(*t, backend=backend)  # noqa: E731
    assert gradcheck(run, tensors, fast_mode=True)
    assert gradgradcheck(run, tensors, fast_mode=True)


@every_case
def test_second_derivatives_of_what_is_trained_alone(case):
    tensors, function = make(case)
    for trained in range(len(tensors)):
        for i, t in enumerate(tensors):
            t.requires_grad_(i == trained)
        assert gradgradcheck(lambda *t: function(*t, backend="torch"), tensors, fast_mode=True)


@every_case
def test_a_gradient_that_is_differentiated_is_the_one_that_is_not(case):
    tensors, function = make(case)
    plain, again = (torch.autograd.grad(function(*tensors).sin().sum(), tensors, create_graph=c) for c in (False, True))
    torch.testing.assert_close(plain, tuple(g.detach() for g in again))


@pytest.mark.parametrize("same", ["neighborhood", "bilevel", "bilevel, routed", "linear", "flow"])
def test_one_tensor_for_several_arguments(same):
    (x, *_), function = make(same)
    rest = make("linear")[0][3:] if same == "linear" else ()
    assert gradgradcheck(lambda x: function(x, x, x, *rest, backend="torch"), x, fast_mode=True)


@pytest.mark.parametrize("case", ["neighborhood", "window, biased and padded", "bilevel, weighted", "focused"])
def test_third_derivatives(case):
    tensors, function = make(case)

    def gradient(*t):
        return torch.autograd.grad(function(*t, backend="torch").sin().sum(), t, create_graph=True)

    assert gradgradcheck(gradient, tensors, fast_mode=True)


@pytest.mark.parametrize("case", ["neighborhood", "neighborhood, biased", "linear, rotary", "window", "dense"])
def test_compiled_second_derivatives_are_right_or_refused(case):
    dtype = torch.float32 if case == "dense" else torch.float64  # for which there is an operator of its own
    tensors, function = make(case, dtype)
    expected = hessian_product(function, tensors)
    for backend in ("eager", "aot_eager"):
        torch.compiler.reset()
        try:
            found = hessian_product(torch.compile(function, backend=backend), tensors)
        except RuntimeError as error:
            assert "double backward" in str(error) or "derivative for" in str(error)
        else:
            assert backend == "eager"
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@every_backend
@every_case
def test_forward_mode_agrees_with_the_backward_pass(case, backend):
    tensors, function = make(case)
    tangents = tuple(torch.randn_like(t) for t in tensors)
    plain = tuple(t.detach() for t in tensors)
    run = lambda *t: function(*t, backend=backend)  # noqa: E731
    out, moved = torch.func.jvp(run, plain, tangents)
    weight = torch.randn_like(out)
    grads = torch.autograd.grad(run(*tensors), tensors, weight)
    expected = sum((g * t).sum() for g, t in zip(grads, tangents, strict=True))
    torch.testing.assert_close((moved * weight).sum(), expected)
    torch.testing.assert_close(out, run(*plain))
    for inputs in (plain, tensors):
        with forward_ad.dual_level():
            dual = run(*(forward_ad.make_dual(t, tangent) for t, tangent in zip(inputs, tangents, strict=True)))
            torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, moved)


@every_case
def test_transforms_have_second_derivatives(case):
    tensors, function = make(case)
    plain = tuple(t.detach() for t in tensors)
    numbers = tuple(range(len(plain)))

    def gradient(*t):
        return torch.func.grad(lambda *t: function(*t).sin().sum(), numbers)(*t)

    tangents = tuple(torch.cos(g) for g in gradient(*plain))
    _, forward = torch.func.jvp(gradient, plain, tangents)
    _, pull = torch.func.vjp(gradient, *plain)
    expected = hessian_product(function, tensors)
    torch.testing.assert_close(forward, expected)
    torch.testing.assert_close(pull(tangents), expected)


@every_case
def test_vmap_equals_a_loop(case):
    tensors, function = make(case)
    several = [torch.stack([t.detach(), t.detach().flip(0).sin()]) for t in tensors]
    loop = torch.stack([function(*(t[i] for t in several)) for i in range(2)])
    torch.testing.assert_close(torch.func.vmap(function)(*several), loop)


@every_case
def test_a_recorded_pass_maps_several_gradients(case):
    """By ``is_grads_batched``, as in ``torch.autograd.functional.jacobian(vectorize=True)``."""
    tensors, function = make(case)
    out = function(*tensors)
    several = torch.randn(2, *out.shape, dtype=out.dtype)
    mapped = torch.autograd.grad(out, tensors, several, is_grads_batched=True, retain_graph=True)
    single = torch.autograd.grad(out, tensors, several[1])
    torch.testing.assert_close(tuple(g[1] for g in mapped), single)


@every_case
def test_a_recorded_pass_carries_tangents_or_says_that_it_cannot(case):
    tensors, function = make(case)
    out = function(*tensors)
    check_tangents_of_the_backward_pass(out, tensors, may_refuse=True)


def check_tangents_of_the_backward_pass(out, tensors, may_refuse=False):
    grad, tangent = torch.randn(2, *out.shape, dtype=out.dtype, device=out.device)
    expected = torch.autograd.grad(out, tensors, tangent, retain_graph=True)  # it is linear

    def dual(grad, tangent):
        with forward_ad.dual_level():
            grads = torch.autograd.grad(out, tensors, forward_ad.make_dual(grad, tangent), retain_graph=True)
            return [forward_ad.unpack_dual(g).tangent for g in grads]

    def jvp(grad, tangent):
        return torch.func.jvp(lambda g: torch.autograd.grad(out, tensors, g, retain_graph=True), (grad,), (tangent,))[1]

    for moved in (dual, jvp):
        try:
            found = moved(grad, tangent)
        except NotImplementedError as error:  # of one of PyTorch's own operators
            assert may_refuse and "forward AD with aten::" in str(error)
        else:
            torch.testing.assert_close(tuple(found), expected)


def test_kernels_that_are_asked_for_refuse_transforms(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # as if they could run here
    x = torch.randn(1, 16, 1, 4)
    run = lambda x: linear_attention(x, x, x, backend="triton")  # noqa: E731
    for transform in (lambda: torch.func.jvp(run, (x,), (x,)), lambda: torch.func.vmap(run)(x[None])):
        with pytest.raises(BackendError, match="triton.*torch.func"):
            transform()
    with forward_ad.dual_level(), pytest.raises(BackendError, match="forward-mode"):
        run(forward_ad.make_dual(x, x))


@pytest.mark.parametrize("transform", [False, True])
def test_a_query_that_sees_no_key_gets_zeros_and_finite_gradients(transform):
    q, k, v = (torch.randn(1, 1, 2, 3, dtype=torch.float64) for _ in range(3))
    mask = torch.tensor([[True, True], [False, False]])
    out, pull = torch.func.vjp(lambda *t: attend(*t, mask), q, k, v) if transform else (attend(q, k, v, mask), None)
    assert not out[:, :, 1].any() and out[:, :, 0].all()
    assert pull is None or all(g.isfinite().all() for g in pull(torch.ones_like(out)))


def test_attention_by_one_door_is_that_of_pytorch_bit_by_bit_and_by_the_same_kernel():
    q, k, v = (torch.randn(2, 4, 16, 8).requires_grad_() for _ in range(3))
    found, expected = attend(q, k, v), F.scaled_dot_product_attention(q, k, v)
    assert found.equal(expected) and found.grad_fn.name() == expected.grad_fn.name() != "CloneBackward0"
    for mine, theirs in zip(*(torch.autograd.grad(y.sum(), (q, k, v)) for y in (found, expected)), strict=True):
        assert mine.equal(theirs)


def test_attention_is_one_call_of_a_traced_graph():
    graph = torch.fx.symbolic_trace(lambda x: attend(x, x, x, scale=0.5) + 1)
    x = torch.randn(1, 1, 4, 3)
    torch.testing.assert_close(graph(x), attend(x, x, x, scale=0.5) + 1)
    assert [node.op for node in graph.graph.nodes].count("call_function") == 2


def test_sums_of_rows_equal_their_reference():
    rows, weight = torch.randn(7, 5, dtype=torch.float64), torch.rand(3, 4, dtype=torch.float64)
    index = torch.randint(7, (3, 4))
    torch.testing.assert_close(weighted_rows(rows, index, weight), weighted_rows_reference(rows, index, weight))
    assert weighted_rows(rows.half(), index, weight).dtype == torch.float16
    script = torch.jit.script(weighted_rows_reference)
    torch.testing.assert_close(script(rows, index, weight), weighted_rows(rows, index, weight))
