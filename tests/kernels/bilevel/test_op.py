"""Bi-level routing attention: reference against loops, the PyTorch path against the reference."""

import itertools
import re

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from visionattn.benchmark.measure import peak_memory
from visionattn.kernels import bilevel_routing_attention
from visionattn.kernels.bilevel import chunks
from visionattn.kernels.bilevel.regions import cut, from_regions, region_means, route_regions, to_regions

BACKENDS = ("torch", "reference")


def loops(q, k, v, region, topk, scale):
    """Token by token: every region's slice of the zero-padded map, its mean over the tokens that exist."""
    B, H, W, h, _ = q.shape
    down, rows, across, columns = cut(H, W, *region)
    places = list(itertools.product(range(down), range(across)))
    tokens = [
        [(j * rows + y, i * columns + x) for y in range(rows) for x in range(columns)] for j, i in places
    ]  # fmt: skip
    exist = [[t for t in some if t[0] < H and t[1] < W] for some in tokens]
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    for b in range(B):
        means = [
            torch.stack([torch.stack([x[(b, *t)] for t in some]).mean(0).flatten() for some in exist]) for x in (q, k)
        ]
        for r, some in enumerate(exist):
            best = [n for _, n in sorted(((means[0][r] @ means[1][n]).item(), n) for n in range(len(places)))][-topk:]
            keys = [t for n in best for t in tokens[n]]
            for token, head in itertools.product(some, range(h)):
                inside = [t[0] < H and t[1] < W for t in keys]
                logits = [
                    scale * q[(b, *token, head)] @ k[(b, *t, head)] if i else torch.zeros(()).to(q)
                    for t, i in zip(keys, inside, strict=True)
                ]
                weights = torch.stack(logits).softmax(0)
                out[(b, *token, head)] = sum(
                    w * v[(b, *t, head)] for w, t, i in zip(weights, keys, inside, strict=True) if i
                )
    return out


@pytest.mark.parametrize(
    "case", [((6, 4), (3, 2), 2), ((5, 7), (2, 3), 3), ((3, 3), (1, 1), 4), ((4, 5), (4, 5), 1)], ids=str
)
def test_reference_equals_loops(case):
    size, region, topk = case
    q, k, v = torch.randn(3, 2, *size, 2, 3, dtype=torch.float64)
    out = bilevel_routing_attention(q, k, v[..., :2], region, topk, scale=0.7, backend="reference")
    torch.testing.assert_close(out, loops(q, k, v[..., :2], region, topk, 0.7))


# B, size, h, D, E, region, topk: divisible or not, masked, dense, several chunks, head dims that differ, single tokens
SHAPES = [
    (2, (28, 28), 2, 8, 8, (4, 4), 4),
    (1, (17, 23), 3, 5, 5, (4, 3), 7),
    (2, (14, 14), 2, 8, 8, (2, 2), 16),
    (1, (9, 11), 1, 4, 4, (3, 3), 3),
    (2, (13, 10), 2, 8, 4, (3, 2), 5),
    (1, (20, 15), 2, 8, 4, (3, 2), 5),
    (2, (16, 12), 2, 8, 8, (4, 4), 12),
    (1, (7, 10), 2, 4, 4, (3, 4), 9),
    (1, (3, 50), 1, 4, 4, (1, 1), 20),
    (1, (40, 33), 2, 16, 16, (40, 33), 1),
    (0, (20, 20), 2, 4, 4, (5, 5), 3),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_torch_equals_reference_forward_and_gradients(shape, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2**14)
    B, size, h, D, E, region, topk = shape
    inputs = [torch.randn(B, *size, h, n, requires_grad=True) for n in (D, D, E)]
    results = []
    for backend in BACKENDS:
        out = bilevel_routing_attention(*inputs, region, topk, backend=backend)
        assert out.shape == (B, *size, h, E)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
        with torch.no_grad():  # another path through the code than with gradients
            torch.testing.assert_close(
                bilevel_routing_attention(*inputs, region, topk, backend=backend), out, rtol=1e-4, atol=1e-5
            )
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)  # the same sums in another order


@pytest.mark.parametrize("E", [8, 4])
@pytest.mark.parametrize("key_region", [None, (2, 1)])
def test_weighted_routes_and_reduced_keys_equal_the_reference(key_region, E, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2**12)
    routes = torch.randint(20, (2, 20, 3))  # a region may even stand twice in a row
    weights = torch.rand(2, 20, 3, requires_grad=True)
    size = (16, 15) if key_region is None else (8, 5)
    inputs = [torch.randn(2, *s, 2, n, requires_grad=True) for s, n in (((16, 15), 8), (size, 8), (size, E))]
    for given in (weights, None):
        results = []
        for backend in BACKENDS:
            out = bilevel_routing_attention(
                *inputs, (4, 3), routes=routes, weights=given, key_region=key_region, backend=backend
            )
            leaves = inputs if given is None else [*inputs, given]
            results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_views_of_a_projection_of_any_strides():
    wide = torch.randn(2, 24, 22, 3, 4, 16)
    for name, qkv in {
        "projection": wide,
        "every other row and head": wide[:, ::2, :, :, ::2],
        "mirrored axes": wide.transpose(1, 2),
        "expanded": wide[:1].expand(3, -1, -1, -1, -1, -1),
    }.items():
        results = [bilevel_routing_attention(*qkv.unbind(3), (4, 5), 4, backend=b) for b in BACKENDS]
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("case", [((16, 15), (4, 4), 3), ((9, 8), (3, 3), 2), ((6, 6), (3, 3), 4)], ids=str)
def test_derivatives_in_float64(case):
    size, region, topk = case
    qkv = torch.randn(1, *size, 3, 1, 2, dtype=torch.float64, requires_grad=True)
    for backend in BACKENDS:
        run = lambda x, backend=backend: bilevel_routing_attention(*x.unbind(3), region, topk, backend=backend)  # noqa: E731
        assert gradcheck(run, qkv, fast_mode=True)
        assert gradgradcheck(run, qkv, fast_mode=True)


def test_no_gradient_flows_through_the_choice_of_regions():
    q, k, v = (torch.randn(1, 16, 16, 1, 4, requires_grad=True) for _ in range(3))
    routes = route_regions(*(region_means(t.detach().flatten(3), cut(16, 16, 4, 4)) for t in (q, k)), 3)[1]
    for backend in BACKENDS:
        grads = [
            torch.autograd.grad(bilevel_routing_attention(q, k, v, 4, **how, backend=backend).square().sum(), (q, k, v))
            for how in (dict(topk=3), dict(routes=routes))
        ]
        torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("dtype, step", [(torch.bfloat16, 2**-8), (torch.float16, 2**-11)], ids=str)
@pytest.mark.parametrize("size", [(28, 28), (14, 14)], ids=str)
def test_low_precision_is_as_close_to_float64_as_the_reference(size, dtype, step):
    q, k, v = torch.randn(3, 2, *size, 2, 16).to(dtype).double()
    truth = bilevel_routing_attention(q, k, v, size[0] // 7, 4, backend="reference")
    errors = []
    for backend in BACKENDS:
        out = bilevel_routing_attention(*(t.to(dtype) for t in (q, k, v)), size[0] // 7, 4, backend=backend)
        errors.append((out.double() - truth).norm() / truth.norm())
    assert errors[0] <= errors[1] + step


@pytest.mark.parametrize("size", [(28, 28), (14, 14)], ids=str)
def test_regions_are_chosen_alike_under_autocast(size):
    qkv = torch.randn(1, *size, 3, 2, 8).bfloat16().float()
    exact = bilevel_routing_attention(*qkv.unbind(3), size[0] // 7, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = bilevel_routing_attention(*qkv.unbind(3), size[0] // 7, 4)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0.05, atol=0.05)  # another region would differ by 1


@pytest.mark.parametrize("size", [(28, 28), (14, 14)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38], ids=str)
def test_bad_values_reach_only_the_regions_that_attend_to_them(size, value):
    q, k, v = torch.randn(3, 1, *size, 1, 8)
    rows = size[0] // 7
    bad = v.clone()
    bad[0, rows, rows] = value  # in region 8
    clean = bilevel_routing_attention(q, k, v, rows, 4, backend="reference")
    routes = route_regions(*(region_means(t.flatten(3), cut(*size, rows, rows)) for t in (q, k)), 4)[1]
    reached = (routes == 8).any(-1)[0].view(7, 7).repeat_interleave(rows, 0).repeat_interleave(rows, 1)
    assert 0 < reached.sum() < reached.numel()
    for backend in BACKENDS:
        out = bilevel_routing_attention(q, k, bad, rows, 4, backend=backend)
        torch.testing.assert_close(out[0][~reached], clean[0][~reached], rtol=1e-4, atol=1e-5)


def test_large_values_stay_finite():
    q, k, v = 1e5 * torch.randn(3, 1, 28, 28, 1, 8)
    results = [bilevel_routing_attention(q, k, v, 4, 4, backend=b) for b in BACKENDS]
    assert results[0].isfinite().all()
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e2)  # of values of 1e5


def test_compiles_as_one_graph_for_any_size():
    def double(qkv):
        return 2 * bilevel_routing_attention(*qkv.unbind(3), 4, 3)

    compiled = torch.compile(double, fullgraph=True, backend="aot_eager")
    for B, H, W in ((2, 16, 16), (1, 9, 13)):
        qkv = torch.randn(B, H, W, 3, 2, 4, requires_grad=True)
        results = []
        for function in (compiled, double):
            out = function(qkv)
            results.append((out, *torch.autograd.grad(out.square().sum(), qkv)))
        torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def test_memory_is_a_fraction_of_the_copies():
    qkv = torch.randn(1, 42, 42, 3, 2, 32, requires_grad=True)

    def step(backend, grad):
        with torch.set_grad_enabled(grad):
            out = bilevel_routing_attention(*qkv.unbind(3), 6, 16, backend=backend)
            if grad:
                torch.autograd.grad(out.sum(), qkv)

    for grad in (False, True):
        peaks = {b: peak_memory(lambda b=b, grad=grad: step(b, grad), torch.device("cpu")) for b in BACKENDS}
        assert peaks["torch"] < peaks["reference"] / 3


def test_regions_come_back_as_the_map():
    x = torch.randn(2, 7, 10, 3)
    regions = to_regions(x, cut(7, 10, 3, 4))
    assert torch.equal(from_regions(regions, cut(7, 10, 3, 4), 7, 10), x)
    assert torch.equal(regions[1, 4].view(3, 4, 3), x[1, 3:6, 4:8])
    means = region_means(x, cut(7, 10, 3, 4))
    torch.testing.assert_close(means[0, 8], x[0, 6:, 8:].mean((0, 1)))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [(4, 6), (16, 15)], ids=str)
def test_empty_batch(size, backend):
    for topk in (1, 4):
        tensors = [torch.randn(0, *size, 2, E, requires_grad=True) for E in (4, 4, 3)]
        out = bilevel_routing_attention(*tensors, (-(-size[0] // 2), -(-size[1] // 2)), topk, backend=backend)
        assert out.shape == (0, *size, 2, 3)
        grads = torch.autograd.grad(out.sum(), tensors)
        assert [g.shape for g in grads] == [t.shape for t in tensors]


x, y = torch.zeros(1, 8, 8, 2, 4), torch.zeros(1, 8, 8, 2, 6)
ROUTES = torch.zeros(1, 4, 2, dtype=torch.long)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((x, x, x, 4, 5), "topk must be from 1 to the number of regions, 2 * 2, got 5"),
        ((x, x, x, 4, 0), "topk must be from 1 to the number of regions, 2 * 2, got 0"),
        ((x, x, x, 4), "give either topk or routes"),
        ((x, x, x, 4, 1, ROUTES), "give either topk or routes"),
        ((x, x, x, 0, 1), "region and key_region must be at least 1, got (0, 0)"),
        ((x, x, x, (4, 4, 4), 1), "region must be an int or 2 of them"),
        ((x[0], x, x, 4, 1), "q must be [B, H, W, heads, head dim], got shape (8, 8, 2, 4)"),
        ((x.int(), x, x, 4, 1), "q must be floating point, got torch.int32"),
        ((x, y, x, 4, 1), "k must be (1, 8, 8, 2, 4)"),
        ((x, x, x[:, 1:], 4, 1), "v must be (1, 8, 8, 2, 'E') on the map of k, got shape (1, 7, 8, 2, 4)"),
        ((x, x, x.double(), 4, 1), "v must be torch.float32 as q is, got torch.float64"),
        ((x, x, x, 4, None, ROUTES.int()), "routes must be int64 [B, R, K] with B = 1 and R = 4, got torch.int32"),
        ((x, x, x, 4, None, ROUTES[:, 1:]), "routes must be int64 [B, R, K] with B = 1 and R = 4"),
        ((x, x, x, 4, None, ROUTES + 4), "routes must be from 0 to 3, got 4 to 4"),
        ((x, x, x, 4, None, ROUTES, torch.ones(1, 4, 3)), "weights must be (1, 4, 2) as routes are"),
        ((x, x, x, 4, 1, None, torch.ones(1, 4, 1)), "weights and key_region need routes, got topk"),
        ((x, x, x, 4, None, ROUTES, None, 2), "k must be (1, 4, 4, 2, 4)"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        bilevel_routing_attention(*arguments)
