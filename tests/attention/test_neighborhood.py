"""The layer against loops over positions, written from the paper's definition, and its options."""

import itertools
import math

import pytest
import timm
import torch
import torch.nn.functional as F

from visionattn.attention import NeighborhoodAttention


def window(position, length, kernel, dilation, causal=False):
    """Key positions that one position of an axis sees, and their distances in steps of the dilation."""
    group = list(range(position % dilation, length, dilation))
    rank = group.index(position)
    first = max(rank - kernel + 1, 0) if causal else min(max(rank - kernel // 2, 0), len(group) - kernel)
    ranks = range(first, rank + 1 if causal else first + kernel)
    return [(group[r], r - rank) for r in ranks]


def brute_force(layer, x, kernel_size, dilation, bias):
    """The layer in evaluation mode on a map no axis of which is short."""
    *spatial, C = x.shape[1:]
    h = layer.num_heads
    q, k, v = F.linear(x, layer.qkv.weight, layer.qkv.bias).unflatten(-1, (3, h, C // h)).unbind(-3)
    out = torch.empty_like(q)
    for at in itertools.product(*map(range, spatial)):
        axes = [window(*args) for args in zip(at, spatial, kernel_size, dilation, layer.is_causal, strict=True)]
        seen = list(itertools.product(*axes))
        keys = [k[(slice(None), *(key for key, _ in slots))] for slots in seen]
        values = [v[(slice(None), *(key for key, _ in slots))] for slots in seen]
        logits = torch.einsum("bhd,sbhd->bhs", q[(slice(None), *at)] * layer.scale, torch.stack(keys))
        if bias is not None:
            index = [tuple(step + K - 1 for (_, step), K in zip(slots, kernel_size, strict=True)) for slots in seen]
            logits = logits + torch.stack([bias[(slice(None), *i)] for i in index], -1)
        out[(slice(None), *at)] = torch.einsum("bhs,sbhd->bhd", logits.softmax(-1), torch.stack(values))
    return F.linear(out.flatten(-2), layer.proj.weight, layer.proj.bias)


def double(*args, **kwargs):
    layer = NeighborhoodAttention(*args, **kwargs, dtype=torch.float64).eval()
    if layer.rpb is not None:
        torch.nn.init.normal_(layer.rpb)
    return layer


def made_for_export(layer):
    layer.exportable = True
    return layer


paths = pytest.mark.parametrize("path", [lambda layer: layer, made_for_export], ids=["fused", "exportable"])


@paths
@pytest.mark.parametrize(
    ("spatial", "kwargs"),
    [
        ((9, 11), dict(kernel_size=3)),
        ((9, 11), dict(kernel_size=3, dilation=2)),  # residue groups of unequal length
        ((7, 16), dict(kernel_size=(3, 7), dilation=(2, 1))),
        ((7, 7), dict(kernel_size=7)),
        ((8, 6), dict(kernel_size=4, position="none")),
        ((8, 7), dict(kernel_size=3, dilation=2, is_causal=(True, False))),
        ((17,), dict(kernel_size=5, dilation=3, axes=1)),
        ((4, 5, 6), dict(kernel_size=3, dilation=(1, 1, 2), axes=3, is_causal=(False, True, False))),
    ],
    ids=str,
)
def test_equals_loops_over_positions(path, spatial, kwargs):
    layer = path(double(12, 2, **kwargs))
    x = torch.randn(2, *spatial, 12, dtype=torch.float64)
    expected = brute_force(layer, x, layer.kernel_size, layer.dilation, layer.rpb)
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize(
    ("length", "kernel", "dilation", "first", "bias_index"),
    [
        (10, 3, 1, [0, 0, 1, 2, 3, 4, 5, 6, 7, 7], [2, 1, 1, 1, 1, 1, 1, 1, 1, 0]),
        (9, 3, 2, [0, 1, 0, 1, 2, 3, 4, 3, 4], [2, 2, 1, 1, 1, 1, 1, 0, 0]),
        (11, 3, 2, [0, 1, 0, 1, 2, 3, 4, 5, 6, 5, 6], [2, 2, 1, 1, 1, 1, 1, 1, 1, 0, 0]),
    ],
)
def test_windows_of_the_authors_operator(length, kernel, dilation, first, bias_index):
    windows = [window(i, length, kernel, dilation) for i in range(length)]
    assert [w[0][0] for w in windows] == first
    assert [w[0][1] + kernel - 1 for w in windows] == bias_index


@paths
def test_small_map_is_padded_with_zeros_that_are_projected_and_seen(path):
    layer = path(double(8, 2, kernel_size=3, dilation=2))
    x = torch.randn(1, 4, 9, 8, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 0, 0, 0, 2))
    expected = brute_force(layer, padded, (3, 3), (2, 2), layer.rpb)[:, :4]
    torch.testing.assert_close(layer(x), expected)
    without = F.pad(layer.qkv(x), (0, 0, 0, 0, 0, 2))  # padding after the projection is another function
    assert not torch.allclose(without, layer.qkv(padded))


@paths
@pytest.mark.parametrize(
    ("spatial", "kernel_size", "dilation"),
    [((9, 20), (7, 7), (1, 2)), ((5, 6), (5, 5), (1, 1)), ((2, 4), (1, 3), (1, 1)), ((21, 3), (7, 3), (3, 1))],
)
def test_small_map_may_shrink_the_window_instead(path, spatial, kernel_size, dilation):
    layer = path(double(8, 2, kernel_size=7, dilation=3, small_maps="shrink"))
    x = torch.randn(1, *spatial, 8, dtype=torch.float64)
    middle = [slice(7 - K, 6 + K) for K in kernel_size]
    expected = brute_force(layer, x, kernel_size, dilation, layer.rpb[:, middle[0], middle[1]])
    torch.testing.assert_close(layer(x), expected)


def test_small_map_may_be_refused():
    layer = NeighborhoodAttention(8, 2, kernel_size=3, dilation=2, small_maps="error")
    with pytest.raises(ValueError, match="axis 1 .* length 5, less than .* 6"):
        layer(torch.randn(1, 6, 5, 8))
    layer(torch.randn(1, 6, 6, 8))


def test_window_over_the_whole_map_is_global_attention():
    layer = double(8, 2, kernel_size=5, position="none")
    x = torch.randn(2, 5, 5, 8, dtype=torch.float64)
    q, k, v = layer.qkv(x).view(2, 25, 3, 2, 4).permute(2, 0, 3, 1, 4)
    expected = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(2, 5, 5, 8)
    torch.testing.assert_close(layer(x), layer.proj(expected))


@paths
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_rotary_embedding_makes_logits_depend_on_distance_alone(path, axes):
    """Away from borders, moving the map moves the output."""
    layer = path(double(24, 2, kernel_size=3, axes=axes, position="rope"))
    assert layer.rpb is None
    x = torch.randn(1, *[6] * axes, 24, dtype=torch.float64)
    moved = F.pad(x, (0, 0, *[5, 0] * axes))
    inner = (slice(None), *[slice(2, 4)] * axes)
    shifted = (slice(None), *[slice(7, 9)] * axes)
    torch.testing.assert_close(layer(moved)[shifted], layer(x)[inner])


def test_rotary_embedding_changes_the_output():
    layer = double(16, 2, kernel_size=3, position="rope")
    x = torch.randn(1, 6, 6, 16, dtype=torch.float64)
    rotated = layer(x)
    layer.position = "none"
    assert not torch.allclose(layer(x), rotated)


def test_layers_made_for_export_give_the_same_gradients():
    layer = double(12, 2, kernel_size=3, dilation=2).train()
    x = torch.randn(2, 7, 8, 12, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    fused = torch.autograd.grad(layer(x).square().sum(), leaves)
    exportable = torch.autograd.grad(made_for_export(layer)(x).square().sum(), leaves)
    for actual, expected in zip(fused, exportable, strict=True):
        torch.testing.assert_close(actual, expected)


def test_attention_dropout_drops_whole_weights_in_training_only():
    layer = double(8, 1, kernel_size=3, attn_drop=0.5, qkv_bias=False)
    x = torch.randn(1, 6, 6, 8, dtype=torch.float64)
    still = layer(x)
    torch.testing.assert_close(layer(x), still)
    layer.train()
    mean = torch.stack([layer(x) for _ in range(200)]).mean(0)
    assert not torch.allclose(layer(x), still)
    assert (mean - still).abs().mean() < 0.2 * still.abs().mean()


@pytest.mark.parametrize(
    "kwargs",
    [dict(), dict(small_maps="shrink"), dict(position="rope"), dict(axes=3, is_causal=True), dict(axes=1)],
    ids=str,
)
def test_scripts(kwargs):
    layer = NeighborhoodAttention(24, 2, **{"kernel_size": 3, "dilation": 2, **kwargs}).eval()
    scripted = torch.jit.script(layer)
    for size in (5, 8):
        x = torch.randn(2, *[size] * len(layer.kernel_size), 24)
        torch.testing.assert_close(scripted(x), layer(x))


def test_switches_of_timm_make_layers_for_export():
    with timm.layers.set_exportable(True):
        assert NeighborhoodAttention(8, 2).exportable
    assert not NeighborhoodAttention(8, 2).exportable


def test_projection_is_read_in_place(monkeypatch):
    """The operator gets views of one tensor [B, H, W, 3, h, D]."""
    import visionattn.attention.neighborhood as module

    seen = {}

    def operator(q, k, v, *_):
        seen.update(q=q, k=k, v=v)
        return q

    monkeypatch.setattr(module, "neighborhood_attention", operator)
    NeighborhoodAttention(8, 2)(torch.randn(1, 7, 9, 8))
    base = seen["q"].untyped_storage().data_ptr()
    assert all(t.untyped_storage().data_ptr() == base for t in seen.values())
    assert all(t.stride() == (7 * 9 * 24, 9 * 24, 24, 4, 1) for t in seen.values())


def test_initialisation_of_the_bias_table():
    layer = NeighborhoodAttention(64, 8, kernel_size=11)
    assert layer.rpb.shape == (8, 21, 21)
    assert layer.rpb.std().item() == pytest.approx(0.02, rel=0.1)
    assert layer.scale == pytest.approx(1 / math.sqrt(8))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(num_heads=3), "num_heads must divide dim = 8, got 3"),
        (dict(axes=4), "axes must be 1, 2 or 3, got 4"),
        (dict(position="learned"), "position must be one of bias, rope, none, got 'learned'"),
        (dict(small_maps="crop"), "small_maps must be one of pad, shrink, error, got 'crop'"),
        (dict(kernel_size=(3, 3, 3)), r"kernel_size must be one value or 2.*\(3, 3, 3\)"),
        (dict(dilation=0), "at least 1"),
        (dict(num_heads=4, position="rope"), "head dim divisible by 4, got 2"),
    ],
)
def test_wrong_arguments_raise(kwargs, message):
    with pytest.raises(ValueError, match=message):
        NeighborhoodAttention(8, **{"num_heads": 2, **kwargs})


def test_wrong_rank_raises():
    with pytest.raises(ValueError, match="2 spatial axes, got 1"):
        NeighborhoodAttention(8, 2)(torch.randn(2, 9, 8))
