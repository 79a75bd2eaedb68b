"""HiLo attention against loops over windows and positions, and against what the authors' module computed."""

import pytest
import torch
import torch.nn.functional as F
from timm.layers import set_fused_attn

from tests.parity import fixture_image, fixture_weights, load_fixture, relative_error
from visionattn.attention import HiLoAttention, hilo_attention


def attend(q, k, v, scale):
    """One head: [n, D], [m, D], [m, D] -> [n, D]"""
    return (q @ k.T * scale).softmax(-1) @ v


def by_loops(high, low_q, low_kv, s, scale):
    """The definition, one head, window and sample at a time."""
    B, H, W = (low_q if high is None else high).shape[:3]
    samples = []
    for b in range(B):
        heads = []
        for n in range(0 if high is None else high.shape[4]):
            y = torch.empty(H, W, high.shape[5], dtype=high.dtype)
            for i in range(0, H, s):
                for j in range(0, W, s):
                    q, k, v = high[b, i : i + s, j : j + s, :, n].flatten(0, 1).unbind(1)
                    y[i : i + s, j : j + s] = attend(q, k, v, scale).view(s, s, -1)
            heads.append(y)
        for n in range(0 if low_q is None else low_q.shape[3]):
            k, v = low_kv[b, :, :, n].unbind(1)
            heads.append(attend(low_q[b, :, :, n].flatten(0, 1), k, v, scale).view(H, W, -1))
        samples.append(torch.stack(heads, 2))
    return torch.stack(samples)


def operands(B, H, W, s, h, low, D=4, dtype=torch.float64):
    high = torch.randn(B, H, W, 3, h, D, dtype=dtype) if h else None
    q = torch.randn(B, H, W, low, D, dtype=dtype) if low else None
    kv = torch.randn(B, H // s * (W // s), 2, low, D, dtype=dtype) if low else None
    return high, q, kv


@pytest.mark.parametrize(("size", "s"), [((4, 6), 2), ((3, 9), 3), ((8, 4), 4), ((2, 3), 1)])
@pytest.mark.parametrize("heads", [(1, 2), (2, 1), (3, 0), (0, 3)])
def test_equals_loops(size, s, heads):
    x = operands(2, *size, s, *heads)
    expected = by_loops(*x, s, 0.7)
    torch.testing.assert_close(hilo_attention(*x, s, 0.7), expected)
    torch.testing.assert_close(hilo_attention(*x, s), by_loops(*x, s, 0.5))  # D ** -0.5


def test_gradients():
    x = [t.requires_grad_() for t in operands(1, 4, 2, 2, 1, 1, D=2)]
    assert torch.autograd.gradcheck(lambda *x: hilo_attention(*x, 2), x, fast_mode=True)
    layer = HiLoAttention(4, 2, 2, 0.5, dtype=torch.float64)
    x = torch.randn(1, 3, 5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x, fast_mode=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(high=None, low_q=None, low_kv=None), "high or low_q must be given"),
        (dict(low_kv=None), "low_q and low_kv belong together"),
        (
            dict(high=torch.zeros(1, 4, 4, 2, 1, 4)),
            r"high must be \[B, H, W, 3, h, D\], got shape \(1, 4, 4, 2, 1, 4\)",
        ),
        (dict(window_size=3), r"window_size must .* divide H and W of high, 4 and 4, got 3"),
        (dict(window_size=0), "window_size must be at least 1 .* got 0"),
        (dict(low_q=torch.zeros(1, 16, 1, 4)), "low_q must be"),
        (dict(low_kv=torch.zeros(1, 4, 3, 1, 4)), "low_kv must be .* to go with low_q"),
        (dict(low_kv=torch.zeros(1, 4, 2, 2, 4)), "low_kv must be .* to go with low_q"),
        (dict(high=torch.zeros(1, 2, 4, 3, 1, 4)), "low_q must have B, H, W and D of high"),
    ],
)
def test_wrong_operands_raise(change, message):
    high, q, kv = operands(1, 4, 4, 2, 1, 1)
    with pytest.raises(ValueError, match=message):
        hilo_attention(**{**dict(high=high, low_q=q, low_kv=kv, window_size=2), **change})


# The layer


@pytest.mark.parametrize("name", ["op_hilo", "op_hilo_alpha0.9", "op_hilo_pad"])
def test_layer_equals_the_authors(name):
    fixture = load_fixture(f"litv2/{name}")
    layer = HiLoAttention(**fixture["model_kwargs"])
    layer.load_state_dict(fixture_weights(fixture))
    y = layer(fixture_image(fixture).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    expected = torch.tensor(fixture["output"]["values"]).view(fixture["output"]["shape"])
    assert relative_error(y, expected) < 1e-6  # rounding is 3e-7


@pytest.mark.parametrize(("size", "s"), [((5, 7), 2), ((1, 1), 2), ((3, 10), 4), ((2, 9), 5)])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_padding_is_attended_to_and_cut_off(size, s, alpha):
    layer = HiLoAttention(8, 4, s, alpha, dtype=torch.float64)
    x = torch.randn(2, *size, 8, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 0, -size[1] % s, 0, -size[0] % s))
    cells = padded.unflatten(2, (-1, s)).unflatten(1, (-1, s)).mean((2, 4)).flatten(1, 2)
    high = layer.h_qkv(padded).unflatten(-1, (3, -1, 2)) if alpha < 1 else None
    q = layer.l_q(padded).unflatten(-1, (-1, 2)) if alpha > 0 else None
    kv = layer.l_kv(cells).unflatten(-1, (2, -1, 2)) if alpha > 0 else None
    y = by_loops(high, q, kv, s, 2**-0.5).flatten(-2)[:, : size[0], : size[1]]
    h = 2 * layer.high_heads
    parts = [layer.h_proj(y[..., :h])] if h else []
    parts += [layer.l_proj(y[..., h:])] if h < 8 else []
    torch.testing.assert_close(layer(x), torch.cat(parts, -1))


@pytest.mark.parametrize(
    ("heads", "alpha", "window", "expected"),
    [(12, 0.9, 2, (2, 10)), (16, 0.9, 2, (2, 14)), (12, 0.7, 2, (4, 8)), (12, 0.05, 2, (12, 0)), (12, 0.3, 1, (0, 12))],
)
def test_low_frequency_heads_are_rounded_down_and_window_1_has_no_others(heads, alpha, window, expected):
    layer = HiLoAttention(heads, heads, window, alpha, device="meta")
    assert (layer.high_heads, layer.low_heads) == expected
    assert {n.split(".")[0][0] for n, _ in layer.named_parameters()} == {
        k for k, n in zip("hl", expected, strict=True) if n
    }


def test_window_1_is_softmax_attention():
    layer = HiLoAttention(8, 2, 1, dtype=torch.float64)
    softmax = torch.nn.MultiheadAttention(8, 2, batch_first=True, dtype=torch.float64)
    state = layer.state_dict()
    for kind in ("weight", "bias"):
        joined = torch.cat([state[f"l_q.{kind}"], state[f"l_kv.{kind}"]])
        softmax.get_parameter(f"in_proj_{kind}").data = joined
        softmax.get_parameter(f"out_proj.{kind}").data = state[f"l_proj.{kind}"]
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)
    tokens = x.flatten(1, 2)
    torch.testing.assert_close(layer(x).flatten(1, 2), softmax(tokens, tokens, tokens)[0])


def test_fused_attention_can_be_switched_off():
    try:
        set_fused_attn(False)
        explicit = HiLoAttention(8, 4, alpha=0.5)
    finally:
        set_fused_attn(True)
    fused = HiLoAttention(8, 4, alpha=0.5)
    fused.load_state_dict(explicit.state_dict())
    assert fused.fused_attn and not explicit.fused_attn
    x = torch.randn(2, 7, 4, 8)
    torch.testing.assert_close(explicit(x), fused(x))


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch):
    layer = HiLoAttention(8, 4, alpha=0.5)
    assert layer(torch.randn(batch, 5, 6, 8)).shape == (batch, 5, 6, 8)


def test_layout_of_the_map_does_not_matter():
    layer = HiLoAttention(8, 4, alpha=0.5)
    x = torch.randn(2, 8, 6, 4)
    torch.testing.assert_close(layer(x.permute(0, 2, 3, 1)), layer(x.permute(0, 2, 3, 1).contiguous()))


def test_large_logits_stay_finite():
    layer = HiLoAttention(8, 4, alpha=0.5)
    assert layer(1e4 * torch.randn(1, 4, 4, 8)).isfinite().all()


def test_half_precision_stays_near_float32():
    layer = HiLoAttention(32, 4, alpha=0.5)
    x = torch.randn(2, 8, 8, 32)
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(layer(x), expected) < 2e-2  # bfloat16 has 8 bits
    assert relative_error(layer.bfloat16()(x.bfloat16()), expected) < 2e-2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(num_heads=3), "num_heads must divide dim = 8, got 3"),
        (dict(num_heads=0), "num_heads must divide dim = 8, got 0"),
        (dict(window_size=0), "window_size must be a positive integer, got 0"),
        (dict(window_size=2.0), "window_size must be a positive integer, got 2.0"),
        (dict(alpha=1.1), "alpha must be a number from 0 to 1, got 1.1"),
        (dict(alpha=-0.1), "alpha must be a number from 0 to 1, got -0.1"),
        (dict(alpha=float("nan")), "alpha must be a number from 0 to 1, got nan"),
    ],
)
def test_wrong_arguments_raise(change, message):
    with pytest.raises(ValueError, match=message):
        HiLoAttention(**{**dict(dim=8, num_heads=4), **change})


def test_tokens_without_rows_and_columns_raise():
    with pytest.raises(ValueError, match=r"x must be a map \[B, H, W, C\], got shape"):
        HiLoAttention(8, 4)(torch.randn(1, 16, 8))
