"""Linear attention layers against their definition written out here, and what they accept."""

import pytest
import timm
import torch
import torch.nn.functional as F

from visionattn.attention import LinearAttention, MagnitudeAwareAttention, RankAugmentedAttention, RotaryAttention
from visionattn.kernels import linear_attention, rotary_tables
from visionattn.kernels.linear_attn import rotate_pairs

LAYERS = {
    "linear": lambda **kw: LinearAttention(16, 2, "relu", "inline", **kw),
    "rala": lambda **kw: RankAugmentedAttention(16, 2, **kw),
    "mala": lambda **kw: MagnitudeAwareAttention(16, 2, **kw),
    "softmax": lambda **kw: RotaryAttention(16, 2, **kw),
}
every_layer = pytest.mark.parametrize("layer", LAYERS)


def split(layer, x):
    """q, k, v and gate as [B, N, h, D], by slices of the projection's rows."""
    weight, bias = layer.qkv.weight, layer.qkv.bias
    rows = F.linear(x.flatten(1, 2), weight, bias)
    return [t.unflatten(-1, (layer.num_heads, -1)) for t in rows.split(layer.dim, -1)]


@pytest.mark.parametrize("layer", ["rala", "mala", "linear"])
@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("lepe_kernel", [5, 0])
def test_linear_layer_is_the_operator_with_local_encoding_and_gate(layer, gate, lepe_kernel):
    module = LAYERS[layer](gate=gate, lepe_kernel=lepe_kernel)
    x = torch.randn(2, 5, 7, 16)
    q, k, v, *o = split(module, x)
    options = dict(feature_map=module.feature_map, normalizer=module.normalizer, rank_augmented=layer == "rala")
    y = linear_attention(q, k, v, rotary=rotary_tables(5, 7, 8), **options, backend="reference").flatten(2)
    if lepe_kernel:
        local = F.conv2d(v.flatten(2).mT.unflatten(2, (5, 7)), module.lepe.weight, module.lepe.bias, 1, 2, 1, 16)
        y = y + local.flatten(2).mT
    y = y * o[0].flatten(2) if gate else y
    expected = F.linear(y, module.proj.weight, module.proj.bias).view_as(x)
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_softmax_layer_rotates_queries_and_keys(fused):
    timm.layers.set_fused_attn(fused)
    try:
        module = RotaryAttention(16, 2)
    finally:
        timm.layers.set_fused_attn(True)
    x = torch.randn(2, 3, 4, 16)
    q, k, v, o = split(module, x)
    tables = rotary_tables(3, 4, 8)
    q, k = rotate_pairs(q, *tables), rotate_pairs(k, *tables)
    weights = torch.einsum("bnhd,bmhd->bhnm", q, k).mul(8**-0.5).softmax(-1)
    local = module.lepe(v.flatten(2).mT.unflatten(2, (3, 4))).flatten(2).mT
    y = (torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2) + local) * o.flatten(2)
    torch.testing.assert_close(module(x), module.proj(y).view_as(x), rtol=1e-4, atol=1e-5)


@every_layer
def test_a_position_s_rotation_depends_on_row_and_column(layer):
    module = LAYERS[layer](lepe_kernel=0)
    x = torch.randn(1, 1, 6, 16)
    row, column = module(x), module(x.transpose(1, 2)).transpose(1, 2)
    assert not torch.allclose(row, column, rtol=1e-3, atol=1e-4)
    unrotated = LAYERS[layer](lepe_kernel=0, rotary=False)
    torch.testing.assert_close(unrotated(x), unrotated(x.transpose(1, 2)).transpose(1, 2))


@every_layer
def test_half_precision_and_layout(layer):
    module = LAYERS[layer]().eval()
    x = torch.randn(2, 6, 5, 16)
    strided = torch.randn(2, 16, 6, 5).permute(0, 2, 3, 1).copy_(x)
    torch.testing.assert_close(module(strided), module(x))
    half = module.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half, module.float()(x).bfloat16(), rtol=0.1, atol=0.05)


@every_layer
def test_gradients_reach_every_parameter(layer):
    module = LAYERS[layer]()
    module(torch.randn(1, 3, 3, 16)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: LinearAttention(16, 3), "num_heads must divide dim = 16, got 3"),
        (lambda: LinearAttention(16, 0), "num_heads must divide dim = 16, got 0"),
        (lambda: RotaryAttention(12, 2), "divisible by 4, got 12 / 2 = 6"),
        (lambda: LinearAttention(16, 2, lepe_kernel=4), "lepe_kernel must be odd, or 0 for none, got 4"),
        (lambda: LinearAttention(16, 2, "gelu"), "feature_map must be one of identity, .*'gelu'"),
        (lambda: LinearAttention(16, 2, normalizer="l2"), "normalizer must be one of sum, .*'l2'"),
        (lambda: LinearAttention(16, 2, eps=0), "eps must be positive, got 0"),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
