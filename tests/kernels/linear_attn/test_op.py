"""Linear attention against definitions written out here, its fast path against the reference, and bad input."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from visionattn.kernels import focused, linear_attention, rotary_tables
from visionattn.kernels.linear_attn import FEATURE_MAPS, NORMALIZERS, rotate_pairs
from visionattn.kernels.linear_attn.forms import features


def make(N=13, M=None, h=2, D=8, V=None, B=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    return rand(B, N, h, D), rand(B, M or N, h, D), rand(B, M or N, h, V or D)


def rotated(x, height, width):
    """Complex multiplication by the angles of the published description, one position at a time."""
    D = x.shape[-1]
    n = D // 4
    speeds = [10000 ** (-i / (n - 1)) for i in range(n)]
    pairs = torch.view_as_complex(x.unflatten(-1, (D // 2, 2)).contiguous())
    out = torch.empty_like(pairs)
    for position in range(height * width):
        y, c = divmod(position, width)
        angle = torch.tensor([y * s for s in speeds] + [c * s for s in speeds], dtype=torch.float64)
        out[:, position] = pairs[:, position] * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(out).flatten(-2)


def rala(q, k, v, height, width):
    """One output at a time, from the paper's own steps with every factor of N."""
    B, N, h, D = q.shape
    fq, fk = F.elu(q) + 1, F.elu(k) + 1
    out = torch.empty_like(v)
    for b, head in itertools.product(range(B), range(h)):
        alpha = torch.softmax(torch.stack([D**-0.5 * fq[b, :, head].mean(0) @ fk[b, j, head] for j in range(N)]), 0)
        weighted = fk.clone()
        weighted[b, :, head] *= alpha[:, None] * N
        rq, rk = rotated(fq, height, width), rotated(weighted, height, width)
        for i in range(N):
            z = 1 / (fq[b, i, head] @ weighted[b, :, head].mean(0) + 1e-6)
            out[b, i, head] = z / N * sum((rq[b, i, head] @ rk[b, j, head]) * v[b, j, head] for j in range(N))
    return out


def mala(q, k, v, height, width):
    B, N, h, D = q.shape
    s = D**-0.5
    fq, fk = F.elu(q) + 1, F.elu(k) + 1
    rq, rk = rotated(fq, height, width), rotated(fk, height, width)
    out = torch.empty_like(v)
    for b, head, i in itertools.product(range(B), range(h), range(N)):
        z = s * fq[b, i, head] @ fk[b, :, head].mean(0)
        u = sum((s * rq[b, i, head] @ rk[b, j, head] / N) * v[b, j, head] for j in range(N))
        out[b, i, head] = u * (1 + 1 / (z + 1e-6)) - z * v[b, :, head].mean(0)
    return out


backends = pytest.mark.parametrize("backend", ["reference", "torch"])


@backends
def test_rank_augmented_form_is_that_of_the_paper(backend):
    q, k, v = make(N=15)
    # The factor N cancels, all but its effect on the 1e-6 of the divisor.
    options = dict(feature_map="elu+1", rotary=tables(3, 5, 8), rank_augmented=True, backend=backend)
    torch.testing.assert_close(linear_attention(q, k, v, **options), rala(q, k, v, 3, 5), rtol=1e-6, atol=1e-7)


@backends
def test_magnitude_aware_form_is_that_of_the_paper(backend):
    q, k, v = make(N=15)
    options = dict(feature_map="elu+1", normalizer="magnitude", rotary=tables(3, 5, 8), backend=backend)
    torch.testing.assert_close(linear_attention(q, k, v, **options), mala(q, k, v, 3, 5))


def tables(height, width, dim):
    """In float64, which the operator's own tables are not."""
    n = dim // 4
    speed = 10000.0 ** -torch.linspace(0, 1, n, dtype=torch.float64)
    y, x = (t.flatten() for t in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    angle = torch.cat([y[:, None] * speed, x[:, None] * speed], 1)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("height, width, dim", [(3, 5, 64), (5, 3, 96), (1, 1, 4), (7, 2, 8)])
def test_rotary_tables_hold_rows_then_columns(height, width, dim):
    cos, sin = rotary_tables(height, width, dim)
    n = dim // 4
    assert cos.shape == sin.shape == (height * width, dim // 2) and cos.dtype == torch.float32
    for position, i in itertools.product(range(height * width), range(n)):
        y, x = divmod(position, width)
        speed = 10000 ** (-i / max(n - 1, 1))
        assert cos[position, i].item() == pytest.approx(torch.tensor(y * speed).cos().item(), abs=1e-6)
        assert sin[position, i].item() == pytest.approx(torch.tensor(y * speed).sin().item(), abs=1e-6)
        assert cos[position, n + i].item() == pytest.approx(torch.tensor(x * speed).cos().item(), abs=1e-6)
        assert sin[position, n + i].item() == pytest.approx(torch.tensor(x * speed).sin().item(), abs=1e-6)


def test_rotation_multiplies_adjacent_pairs_as_complex_numbers():
    x = make(N=15)[0]
    torch.testing.assert_close(rotate_pairs(x, *tables(3, 5, 8)), rotated(x, 3, 5))


def test_focused_map_keeps_the_norm_of_a_token_and_the_order_of_its_channels():
    x, scale = torch.randn(2, 5, 3, 4), torch.randn(1, 1, 12)
    raised = (x.relu().flatten(2) + 1e-6) / F.softplus(scale)
    sharp = raised**3 / (raised**3).norm(dim=-1, keepdim=True) * raised.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(focused(x, scale=scale).flatten(2), sharp)
    assert focused(torch.full((1, 1, 1, 8), 6e4, dtype=torch.float16)).isfinite().all()


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_fast_path_equals_reference(feature_map, normalizer):
    q, k, v = make(N=11, M=7, D=6, V=5, h=3)
    options = dict(feature_map=feature_map, normalizer=normalizer, scale=0.3)
    expected = linear_attention(q, k, v, **options, backend="reference")
    torch.testing.assert_close(linear_attention(q, k, v, **options, backend="torch"), expected)


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("extra", ["rotary", "key_weights", "rank_augmented", "residual", "gate", "grid", "all"])
def test_fast_path_equals_reference_with_every_option(extra, normalizer):
    q, k, v = make(N=12, h=2, D=8)
    everything = dict(
        rotary=tables(3, 4, 8),
        key_weights=torch.rand(2, 12, 2, dtype=torch.float64),
        rank_augmented=True,
        residual=torch.randn_like(v),
        gate=torch.randn_like(v),
    )
    options = {name: value for name, value in everything.items() if extra in (name, "all")}
    if extra == "all":
        del options["key_weights"]
    if extra == "grid":
        q, k, v = (t.unflatten(1, (3, 4)) for t in (q, k, v))
        options = dict(key_weights=everything["key_weights"].unflatten(1, (3, 4)), gate=torch.randn_like(v))
    options |= dict(feature_map="elu+1", normalizer=normalizer)
    expected = linear_attention(q, k, v, **options, backend="reference")
    torch.testing.assert_close(linear_attention(q, k, v, **options, backend="torch"), expected)


@pytest.mark.parametrize("shape", [(1, 1, 1, 4), (0, 5, 2, 4), (3, 0, 2, 4), (1, 300, 3, 12), (2, 64, 1, 64)])
def test_fast_path_equals_reference_over_shapes(shape):
    B, N, h, D = shape
    qkv = torch.randn(B, N, 3, h, D, dtype=torch.float64)  # divisors of signed features may be small
    for options in (dict(), dict(feature_map="relu"), dict(feature_map="exp", normalizer="none")):
        expected = linear_attention(*qkv.unbind(2), **options, backend="reference")
        torch.testing.assert_close(linear_attention(*qkv.unbind(2), **options), expected)


def test_strides_do_not_matter():
    q, k, v = make(N=9, dtype=torch.float32)
    views = [t.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0) for t in (q, k, v)]
    torch.testing.assert_close(linear_attention(*views, "relu"), linear_attention(q, k, v, "relu"))


@pytest.mark.parametrize("N", [1, 63, 64, 65, 130])
@pytest.mark.parametrize("normalizer", ["sum", "none"])
def test_causal_form_equals_reference(N, normalizer):
    q, k, v = make(N=N, V=5)
    options = dict(feature_map="elu+1", normalizer=normalizer, causal=True, key_weights=torch.rand(2, N, 2).double())
    expected = linear_attention(q, k, v, **options, backend="reference")
    torch.testing.assert_close(linear_attention(q, k, v, **options), expected)


def test_causal_form_does_not_see_the_future():
    q, k, v = make(N=100)
    options = dict(feature_map="relu2", causal=True, rotary=tables(10, 10, 8))
    before = linear_attention(q, k, v, **options)
    k[:, 70:], v[:, 70:] = 3.0, -2.0
    torch.testing.assert_close(linear_attention(q, k, v, **options)[:, :70], before[:, :70], rtol=0, atol=0)


def test_a_pair_of_functions_maps_queries_and_keys_and_may_widen_them():
    q, k, v = make()
    maps = (lambda x: torch.cat([x.relu(), (-x).relu()], -1), lambda x: torch.cat([x.exp(), (-x).exp()], -1))
    out = linear_attention(q, k, v, maps)
    torch.testing.assert_close(out, linear_attention(maps[0](q), maps[1](k), v, "identity"))
    torch.testing.assert_close(out, linear_attention(q, k, v, maps, backend="reference"))


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("rank_augmented", [False, True])
def test_gradients(normalizer, rank_augmented):
    q, k, v = (t.requires_grad_() for t in make(N=6, h=1, D=4, B=1))
    residual, gate = torch.randn_like(v).requires_grad_(), torch.randn_like(v).requires_grad_()

    def attend(q, k, v, residual, gate):
        options = dict(rotary=tables(2, 3, 4), rank_augmented=rank_augmented, residual=residual, gate=gate)
        return linear_attention(q, k, v, "elu+1", normalizer, **options, backend="torch")

    assert torch.autograd.gradcheck(attend, (q, k, v, residual, gate))


@pytest.mark.parametrize("causal", [False, True])
def test_gradients_of_key_weights(causal):
    q, k, v = make(N=5, h=1, D=4, B=1)
    weights = torch.rand(1, 5, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: linear_attention(q, k, v, "relu", key_weights=w, causal=causal), weights)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype):
    q, k, v = make(N=50, D=16, dtype=dtype)
    options = dict(feature_map="elu+1", normalizer="magnitude", rotary=rotary_tables(5, 10, 16))
    out = linear_attention(q, k, v, **options)
    exact = linear_attention(q.double(), k.double(), v.double(), **options, backend="reference")
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_autocast_returns_its_dtype():
    q, k, v = make(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear_attention(q, k, v, "relu")
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), linear_attention(q, k, v, "relu"), rtol=0.05, atol=0.05)


# --- what goes wrong in long, empty and signed sums ------------------------------------------------------------------


@pytest.mark.parametrize("normalizer", NORMALIZERS)
@pytest.mark.parametrize("feature_map", FEATURE_MAPS)
def test_half_precision_sums_over_many_keys_do_not_overflow(feature_map, normalizer):
    generator = torch.Generator().manual_seed(0)
    q, k, v = ((torch.rand(1, 65_536, 1, 8, generator=generator) * 8).half() for _ in range(3))
    scale = 1e-9 if feature_map == "exp" else 1e-6  # so that the result itself is within half precision
    out = linear_attention(q, k, v, feature_map, normalizer, scale=scale)  # k'v reaches 2e6, squared 1e7
    exact = linear_attention(*(t.double() for t in (q, k, v)), feature_map, normalizer, scale=scale)
    assert out.isfinite().all()
    torch.testing.assert_close(out.double(), exact, rtol=2e-3, atol=1e-4)


@backends
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("normalizer", NORMALIZERS)
def test_no_keys_left_gives_finite_values_and_gradients(normalizer, causal, backend):
    q, k, v = (t.requires_grad_() for t in make(N=5))
    weights = torch.zeros(2, 5, 2, dtype=torch.float64, requires_grad=True)
    if causal and normalizer not in ("sum", "none"):
        return
    out = linear_attention(q, k, v, "relu", normalizer, key_weights=weights, causal=causal, backend=backend)
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.square().sum(), (q, k, v, weights)))
    if normalizer in ("sum", "mean", "none"):
        assert not out.any()


@backends
@pytest.mark.parametrize("normalizer", ["sum", "mean", "magnitude"])
def test_a_divisor_of_zero_or_just_below_counts_as_eps(normalizer, backend):
    v = torch.randn(1, 2, 1, 4, dtype=torch.float64)
    q = torch.ones(1, 2, 1, 4, dtype=torch.float64, requires_grad=True)
    for total in (0.0, -1e-6, -1e-7, -5.0):  # together with eps = 1e-6: eps, 0, 9e-7, -5
        k = torch.stack([torch.full((4,), 1.0), torch.full((4,), -1.0 + total / 4)]).double()[None, :, None]
        k.requires_grad_()
        out = linear_attention(q, k, v, normalizer=normalizer, scale=1.0, backend=backend)
        assert out.isfinite().all() and out.abs().max() < 1e8
        assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k)))


@backends
def test_queries_and_keys_that_are_all_negative_under_relu(backend):
    q, k, v = make(N=5)
    q, k = -q.abs(), -k.abs()
    assert not linear_attention(q, k, v, "relu", backend=backend).any()
    mean = v.mean(1, keepdim=True).expand_as(v)
    torch.testing.assert_close(linear_attention(q, k, v, "relu", "inline", backend=backend), mean)


def test_no_keys_at_all():
    q, (k, v) = torch.randn(1, 3, 2, 4), torch.randn(2, 1, 0, 2, 4)
    assert not linear_attention(q, k, v, "relu").any()
    with pytest.raises(ValueError, match="mean"):
        linear_attention(q, k, v, "relu", "mean")


def test_large_inputs_of_exp_are_cut():
    q, k, v = (t * 1e4 for t in make(dtype=torch.float32))
    assert linear_attention(q, k, v, "exp").isfinite().all()


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(feature_map="gelu"), "feature_map must be a function or one of identity, relu.*'gelu'"),
        (dict(feature_map=("relu", 3)), "feature_map.*got 3"),
        (dict(normalizer="softmax"), "normalizer must be one of sum, mean.*'softmax'"),
        (dict(eps=0.0), "eps must be positive, got 0.0"),
        (dict(eps=float("nan")), "eps must be positive, got nan"),
        (dict(q=torch.randn(2, 3, 4)), "q must be .*got shape"),
        (dict(q=torch.ones(2, 6, 2, 8, dtype=torch.int64)), "q must be floating point, got torch.int64"),
        (dict(k=torch.randn(2, 6, 1, 8)), "k must have the batch, axes and heads of q"),
        (dict(k=torch.randn(2, 6, 2, 4)), "k must have the head dim of q, 8, got 4"),
        (dict(v=torch.randn(2, 5, 2, 8)), "v must have the positions of k"),
        (dict(v=torch.randn(2, 6, 2, 8).double()), "v must be torch.float32 as x is, got torch.float64"),
        (dict(rotary=(torch.ones(5, 4), torch.ones(5, 4))), "rotary must be .*N = 6"),
        (dict(key_weights=torch.ones(2, 6)), "key_weights must be"),
        (dict(rank_augmented=True, key_weights=torch.ones(2, 6, 2)), "key_weights must be None"),
        (dict(causal=True, normalizer="inline"), "causal=True takes the normalizers sum and none"),
        (dict(causal=True, rank_augmented=True), "causal=True takes"),
        (dict(causal=True, q=torch.randn(2, 4, 2, 8)), "as many keys as queries, got 6 keys and 4"),
        (dict(gate=torch.ones(2, 6, 16)), "gate must be"),
        (dict(residual=torch.ones(2, 6, 2, 4)), "residual must be"),
        (dict(backend="cuda"), "backend must be one of"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = dict(q=torch.randn(2, 6, 2, 8), k=torch.randn(2, 6, 2, 8), v=torch.randn(2, 6, 2, 8))
    with pytest.raises(ValueError, match=message):
        linear_attention(**{**arguments, **change})


def test_the_shifted_elu_is_that_of_pytorch():
    """Its form on a CPU, by exp: values and gradients from the far left over zero to the far right."""
    x = torch.tensor([-1e4, -50.0, -3.0, -1e-8, 0.0, 1e-8, 2.0, 1e4], dtype=torch.float64, requires_grad=True)
    ours, theirs = features(x, "elu+1"), F.elu(x) + 1
    assert_close(ours, theirs)
    first = [torch.autograd.grad(y.sum(), x, create_graph=True)[0] for y in (ours, theirs)]
    assert_close(*first)
    second = [torch.autograd.grad(y.sum(), x)[0][x != 0] for y in first]  # at 0 it jumps
    assert_close(*second)
