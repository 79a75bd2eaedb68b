"""What the kernels of bi-level routing attention must do; ``test_triton.py`` says how this file is run."""

import pytest
import torch
from torch.autograd import gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from tests.kernels.cases import ATTENTION_TOLERANCE, DEVICE, DTYPES
from visionattn.kernels import bilevel_routing_attention
from visionattn.kernels.bilevel.triton import bilevel_attention_triton, invert, unsupported

CASES = {  # size, region, K, B, h, D, E, key_region
    "several blocks of a region": ((9, 16), (9, 8), 1, 1, 1, 16, 16, None),
    "regions of four": ((4, 6), (2, 2), 5, 2, 1, 16, 16, None),
    "regions that the map cuts": ((7, 8), (3, 5), 2, 1, 2, 16, 16, None),
    "odd head dims": ((4, 6), (2, 3), 3, 1, 2, 24, 9, None),
    "single tokens": ((3, 4), (1, 1), 4, 1, 1, 16, 16, None),
    "reduced keys": ((8, 8), (4, 4), 2, 1, 2, 16, 16, (2, 1)),
}

pytestmark = [
    pytest.mark.usefixtures("poisoned_empty"),
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),  # numpy, of tokens that are masked
]


def make(size, region, K, B, h, D, E, key_region, dtype=torch.float32):
    """Views of a projection, or maps of their own for reduced keys, and the arguments after q, k, v."""
    down, across = -(-size[0] // region[0]), -(-size[1] // region[1])
    key_size = size if key_region is None else (down * key_region[0], across * key_region[1])
    routes = torch.rand(B, down * across, down * across, device=DEVICE).topk(K).indices
    if key_region is None and D == E:
        leaves = [torch.randn(B, *size, 3, h, D, dtype=torch.float64).to(DEVICE, dtype).requires_grad_()]
    else:
        shapes = ((size, D), (key_size, D), (key_size, E))
        leaves = [torch.randn(B, *s, h, n, dtype=torch.float64).to(DEVICE, dtype).requires_grad_() for s, n in shapes]
    return leaves, (routes, region, key_region or region, D**-0.5)


def split(leaves):
    return leaves[0].unbind(3) if len(leaves) == 1 else leaves


def reference(qkv, routes, region, key_region, scale):
    return bilevel_routing_attention(
        *qkv, region, routes=routes, key_region=key_region, scale=scale, backend="reference"
    )


def compare(leaves, rest):
    """Output and gradients of the kernels and of the reference in float64, by relative error."""
    dtype = leaves[0].dtype
    exact = [t.detach().double().requires_grad_() for t in leaves]
    out, truth = bilevel_attention_triton(*split(leaves), *rest), reference(split(exact), *rest)
    weight = torch.randn_like(truth).to(dtype)
    grads = torch.autograd.grad(out, leaves, weight)
    true_grads = torch.autograd.grad(truth, exact, weight.double())
    assert out.is_contiguous()
    for result, true in zip((out, *grads), (truth, *true_grads), strict=True):
        assert result.dtype == dtype and result.shape == true.shape
        error = (result.double() - true).norm() / true.norm()
        assert error < ATTENTION_TOLERANCE[dtype], f"relative error {error:.1e}"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_output_and_gradients(case):
    compare(*make(*case))


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_dtypes(dtype):
    compare(*make(*CASES["regions that the map cuts"], dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_larger_maps(dtype):
    for size, region, K in (
        ((56, 56), (8, 8), 4),
        ((56, 56), (8, 8), 16),
        ((61, 47), (9, 7), 5),
        ((14, 14), (2, 2), 16),
    ):
        compare(*make(size, region, K, 3, 3, 32, 32, None, dtype=dtype))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, D", [(torch.bfloat16, D) for D in (16, 24, 64, 80, 128)] + [(torch.float32, 64)])
def test_head_dims(dtype, D):
    compare(*make((30, 28), (5, 7), 6, 2, 2, D, D, None, dtype=dtype))


def test_two_runs_are_bit_identical():
    leaves, rest = make((6, 8), (2, 4), 3, 1, 1, 16, 16, None)
    runs = []
    for _ in range(2):
        out = bilevel_attention_triton(*split(leaves), *rest)
        runs.append((out, *torch.autograd.grad(out.sin().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_inverse_lists_the_regions_routed_to_each():
    routes = torch.tensor([[[2, 0], [2, 1], [0, 2]], [[1, 1], [1, 0], [1, 2]]], device=DEVICE)
    sources, starts = (t.tolist() for t in invert(routes))
    found = [[sorted(s[a:b]) for a, b in zip(t, t[1:], strict=False)] for s, t in zip(sources, starts, strict=True)]
    assert found == [[[0, 2], [1], [0, 1, 2]], [[1], [0, 0, 1, 2], [2]]]


def test_regions_that_nobody_attends_to_get_no_gradient():
    (qkv,), rest = make((4, 4), (2, 2), 1, 1, 1, 16, 16, None)
    out = bilevel_attention_triton(*split([qkv]), torch.zeros_like(rest[0]), *rest[1:])
    grad = torch.autograd.grad(out.sum(), qkv)[0]
    assert not grad[:, 2:, :, 1:].any() and grad[:, :2, :2, 2].all()


def test_any_strides_and_gradients_that_come_expanded():
    leaves, rest = make((4, 6), (2, 3), 2, 2, 2, 16, 9, (2, 3))
    q = leaves[0].detach().permute(0, 3, 1, 2, 4).contiguous().permute(0, 2, 3, 1, 4)
    v = leaves[2].detach().permute(0, 3, 4, 1, 2).contiguous().permute(0, 3, 4, 1, 2)
    qkv = [t.requires_grad_() for t in (q, leaves[1].detach(), v)]
    out, truth = bilevel_attention_triton(*qkv, *rest), reference(qkv, *rest)
    torch.testing.assert_close(out, truth, rtol=1e-5, atol=1e-5)
    weight = torch.ones((), device=DEVICE).expand(out.shape)
    grads = [torch.autograd.grad(o, qkv, weight) for o in (out, truth)]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


def test_public_function_routes_and_reaches_the_kernels():
    q, k, v = torch.randn(3, 2, 7, 9, 2, 16, device=DEVICE)
    for topk in (2, 9):
        results = [bilevel_routing_attention(q, k, v, 3, topk, backend=b) for b in ("triton", "reference")]
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)


def test_logits_beyond_the_range_of_exp():
    (qkv,), rest = make((4, 6), (2, 3), 2, 1, 1, 16, 16, None)
    with torch.no_grad():
        qkv[:, :, :, 0] *= 200
    out, truth = bilevel_attention_triton(*split([qkv]), *rest), reference(split([qkv]), *rest)
    # Logits of some hundred carry the rounding of their size into the exponential.
    torch.testing.assert_close(out, truth, rtol=1e-3, atol=1e-4)


def test_empty_batch():
    (qkv,), rest = make((4, 6), (2, 3), 2, 0, 1, 16, 16, None)
    out = bilevel_attention_triton(*split([qkv]), *rest)
    assert out.shape == (0, 4, 6, 1, 16) and torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape
    for topk in (2, 4):  # all regions of it are PyTorch's attention
        out = bilevel_routing_attention(*split([qkv]), (2, 3), topk, backend="triton")
        assert out.shape == (0, 4, 6, 1, 16) and torch.autograd.grad(out.sum(), qkv)[0].shape == qkv.shape


def test_operators_pass_opcheck():
    ops = torch.ops.visionattn
    (qkv,), (routes, region, key_region, scale) = make((4, 6), (2, 3), 2, 1, 1, 16, 16, None)
    q, k, v = (t.detach().requires_grad_() for t in qkv.unbind(3))
    rest = (list(region), list(key_region), scale)
    torch.library.opcheck(ops.bilevel_attention.default, (q, k, v, routes, *rest))
    out, lse = ops.bilevel_attention(q, k, v, routes, *rest)
    tensors = [t.detach() for t in (torch.randn_like(out), q, k, v, routes, out, lse)]
    torch.library.opcheck(ops.bilevel_attention_backward.default, (*tensors, *rest))


def test_compiles_as_one_graph():
    def layer(qkv, backend="triton"):
        return bilevel_routing_attention(*(qkv * 2).unbind(3), 3, 2, backend=backend).sin()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    qkv = torch.randn(1, 6, 7, 3, 1, 16, device=DEVICE, requires_grad=True)
    out, expected = compiled(qkv), layer(qkv, "reference")
    grads = [torch.autograd.grad(o.sum(), qkv) for o in (out, expected)]
    torch.testing.assert_close((out, *grads[0]), (expected, *grads[1]), rtol=1e-4, atol=1e-5)


def test_autocast():
    (qkv,), rest = make((4, 6), (2, 3), 2, 1, 1, 16, 16, None)
    with torch.autocast(DEVICE, torch.float16):
        out = bilevel_attention_triton(*split([qkv]), *rest)
    assert out.dtype == torch.float16
    assert torch.autograd.grad(out.sum(), qkv)[0].dtype == torch.float32


@pytest.mark.parametrize("key_region", [None, (1, 1)])
def test_second_derivatives(key_region):
    leaves, rest = make((3, 4), (2, 2), 2, 1, 1, 16, 16, key_region, dtype=torch.float64)
    assert gradgradcheck(lambda *t: bilevel_attention_triton(*split(t), *rest), leaves, fast_mode=True)


def test_flops_count_the_routed_keys():
    (qkv,), rest = make((4, 6), (2, 3), 2, 1, 2, 16, 16, None)
    pair = 2 * 4 * 6 * 2 * 16 * 12
    with FlopCounterMode(display=False) as counter:
        out = bilevel_attention_triton(*split([qkv]), *rest)
    assert counter.get_total_flops() == 2 * pair
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(out.sum(), qkv)
    assert counter.get_total_flops() == 5 * pair


def test_what_is_not_covered_is_told():
    q = torch.empty(1, 4, 4, 1, 144, device=DEVICE)
    weights = torch.ones(1, 4, 2, device=DEVICE)
    assert "head dim is 144" in unsupported(q, q, None)
    assert (
        "up to 64" in unsupported(q[..., :80], q[..., :80], None)
        and unsupported(*[q[..., :80].half()] * 2, None) is None
    )
    assert "dtype" in unsupported(q[..., :64].to(torch.int32), q[..., :64], None)
    assert "soft routing" in unsupported(q[..., :64], q[..., :64], weights)
    assert unsupported(q[..., :64], q[..., :64], None) is None


@pytest.mark.parametrize("wrong", [-1, 9, 2**31 - 1, -(2**40)])
def test_routes_to_regions_that_there_are_not_read_nothing(wrong):
    """Nothing before or behind the tensors, which lie in the middle of NaN: the tokens are zeros."""
    B, H, W, h, D = 1, 6, 6, 1, 16
    memory = torch.full((3 * B * H * W * h * D,), torch.nan, device=DEVICE)
    middle = torch.randn(3, B, H, W, h, D, device=DEVICE)
    q, k, v = (memory.clone()[q.numel() :][: q.numel()].view(q.shape).copy_(q).requires_grad_() for q in middle)
    routes = torch.arange(9, device=DEVICE)[None, :, None].repeat(1, 1, 2)
    routes[..., 1] = wrong
    out = bilevel_attention_triton(q, k, v, routes, (2, 2), (2, 2), 0.25)
    padded = [t.detach().clone() for t in (q, k, v)]
    tokens = [t.unflatten(2, (3, 2)).unflatten(1, (3, 2)).transpose(2, 3).flatten(3, 4).flatten(1, 2) for t in padded]
    q_rows, keys, values = (t[:, :, :, 0] for t in tokens)  # B R T D
    keys, values = (torch.cat([t, torch.zeros_like(t)], 2) for t in (keys, values))
    expected = (0.25 * q_rows @ keys.transpose(2, 3)).softmax(-1) @ values
    expected = expected.unflatten(2, (2, 2)).unflatten(1, (3, 3)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    torch.testing.assert_close(out[:, :, :, 0], expected.reshape(B, H, W, D), rtol=1e-5, atol=1e-6)
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))
