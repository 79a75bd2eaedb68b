"""Circular windows against a dense mask, blocked ones against loops over positions and timm's layer."""

import itertools

import pytest
import torch
from timm.layers.halo_attn import HaloAttn

from visionattn.attention.local import CircularWindowAttention, HaloAttention, circular_attention


def softmax_over(q, k, v, keys, more=()):
    """Attention of one query to a list of keys. q: [h, D]"""
    k = torch.stack([*(k[j] for j in keys), *(m[0] for m in more)])  # S h D
    v = torch.stack([*(v[j] for j in keys), *(m[1] for m in more)])
    weights = (torch.einsum("hd,shd->hs", q, k) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("hs,shd->hd", weights, v)


def circle(at, spatial, radius):
    return [
        (y, x)
        for y, x in itertools.product(*map(range, spatial))
        if (y - at[0]) ** 2 + (x - at[1]) ** 2 < radius * radius
    ]


def by_distance(q, k, v, radius, more_k=None, more_v=None):
    """Attention of all positions to all, masked by the distance between them."""
    B, H, W, h, D = q.shape
    rows, columns = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    points = torch.stack([rows.flatten(), columns.flatten()], 1)
    seen = (points[:, None] - points).square().sum(-1) < radius**2
    k, v = k.flatten(1, 2), v.flatten(1, 2)
    if more_k is not None:
        k, v = torch.cat([k, more_k], 1), torch.cat([v, more_v], 1)
        seen = torch.cat([seen, torch.ones(H * W, more_k.shape[1], dtype=torch.bool)], 1)
    logits = torch.einsum("bihd,bjhd->bhij", q.flatten(1, 2), k) * D**-0.5
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("bhij,bjhd->bihd", weights, v).view(q.shape)


def test_number_of_keys_in_a_circle():
    for radius, keys in ((1, 1), (2, 9), (3, 25), (4, 45), (8, 193)):
        assert len(circle((20, 20), (41, 41), radius)) == keys
        v = torch.zeros(1, 41, 41, 1, 1)
        v[0, 20, 20] = 1
        reached = circular_attention(torch.zeros_like(v), torch.zeros_like(v), v, radius) > 0
        assert reached.sum() == keys


@pytest.mark.parametrize("more", [0, 1, 3])
@pytest.mark.parametrize(
    ("spatial", "radius"), [((9, 13), 3), ((17, 26), 4), ((5, 4), 12), ((8, 8), 1), ((1, 19), 2)], ids=str
)
def test_circular_attention_equals_a_mask_of_distances_with_gradients(spatial, radius, more):
    inputs = [torch.randn(2, *spatial, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    if more:
        inputs += [torch.randn(2, more, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    results = []
    for function in (circular_attention, by_distance):
        out = function(*inputs[:3], radius, *inputs[3:])
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["k", "v"])
def test_nan_stays_in_the_circles_that_see_it(name):
    inputs = {n: torch.randn(1, 20, 21, 2, 4) for n in "qkv"}
    clean = circular_attention(*inputs.values(), 4)
    inputs[name][0, 9, 10, 0] = torch.nan
    out = circular_attention(*inputs.values(), 4)
    touched = torch.zeros(20, 21, dtype=torch.bool)
    for at in circle((9, 10), (20, 21), 4):
        touched[at] = True
    assert torch.equal(out[0, ..., 0, 0].isnan(), touched)
    torch.testing.assert_close(out[0, ~touched], clean[0, ~touched])
    torch.testing.assert_close(out[..., 1, :], clean[..., 1, :])


@pytest.mark.parametrize("prefix_tokens", [0, 2])
@pytest.mark.parametrize("down_factor", [None, 2])
def test_circular_layer_equals_a_mask_of_distances(prefix_tokens, down_factor):
    layer = CircularWindowAttention(8, 2, radius=3, down_factor=down_factor).double()
    x, prefix = torch.randn(2, 6, 10, 8).double(), torch.randn(2, prefix_tokens, 8).double()
    q, k, v = layer.qkv(x).unflatten(-1, (3, 2, 4)).unbind(-3)
    pq, pk, pv = layer.qkv(prefix).unflatten(-1, (3, 2, 4)).unbind(-3)
    more_k, more_v = [pk], [pv]
    if down_factor:
        with torch.no_grad():
            layer.spatial_weight.copy_(torch.randn(2, 2))
        for t, more in ((k, more_k), (v, more_v)):
            cells = [
                sum(t[:, 2 * i + f, 2 * j + g] * layer.spatial_weight[f, g] for f in (0, 1) for g in (0, 1))
                for i in range(3)
                for j in range(5)
            ]
            more.append(torch.stack(cells, 1))
    expected = by_distance(q, k, v, 3, torch.cat(more_k, 1), torch.cat(more_v, 1))
    expected = layer.proj(expected.flatten(-2))
    if not prefix_tokens:
        torch.testing.assert_close(layer(x), expected)
        return
    out, tokens = layer(x, prefix)
    torch.testing.assert_close(out, expected)
    every_k, every_v = torch.cat([pk, k.flatten(1, 2)], 1), torch.cat([pv, v.flatten(1, 2)], 1)
    for b, i in itertools.product(range(2), range(prefix_tokens)):
        mixed = softmax_over(pq[b, i], every_k[b], every_v[b], range(every_k.shape[1]))
        torch.testing.assert_close(tokens[b, i], layer.proj(mixed.flatten()))


@pytest.mark.parametrize(("spatial", "block", "halo"), [((8, 12), 4, 1), ((6, 6), 6, 2), ((4, 8), 2, 3)], ids=str)
def test_halo_attention_equals_timm_s(spatial, block, halo):
    layer = HaloAttention(16, 2, block, halo)
    theirs = HaloAttn(16, num_heads=2, block_size=block, halo_size=halo)
    with torch.no_grad():
        theirs.q.weight.copy_(layer.q.weight[:, :, None, None])
        # timm keeps the key and the value of a head side by side.
        weight = layer.kv.weight.unflatten(0, (2, 2, 8)).transpose(0, 1).flatten(0, 2)
        theirs.kv.weight.copy_(weight[:, :, None, None])
        theirs.pos_embed.height_rel.copy_(layer.height_rel)
        theirs.pos_embed.width_rel.copy_(layer.width_rel)
    x = torch.randn(2, *spatial, 16, requires_grad=True)
    results = []
    for out in (layer(x), theirs(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)):
        results.append((out, *torch.autograd.grad(out.square().sum(), x)))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attend_padding", [True, False])
@pytest.mark.parametrize(("spatial", "b", "e"), [((6, 9), 3, 1), ((4, 6), 2, 3)], ids=str)
def test_halo_attention_equals_loops(spatial, b, e, attend_padding):
    layer = HaloAttention(8, 2, b, e, attend_padding).double()
    x = torch.randn(1, *spatial, 8).double()
    q = layer.q(x).unflatten(-1, (2, 4))
    k, v = layer.kv(x).unflatten(-1, (2, 2, 4)).unbind(-3)
    S = b + 2 * e
    expected = torch.empty_like(q)
    for i in itertools.product(*map(range, spatial)):
        first = [p // b * b - e for p in i]
        logits, values = [], []
        for slot in itertools.product(range(S), range(S)):
            at = [f + s for f, s in zip(first, slot, strict=True)]
            inside = all(0 <= p < L for p, L in zip(at, spatial, strict=True))
            if not inside and not attend_padding:
                continue
            index = [s - p % b + S - 1 for s, p in zip(slot, i, strict=True)]
            query = q[(0, *i)]
            key, value = (t[(0, *at)] if inside else torch.zeros_like(query) for t in (k, v))
            relative = query @ layer.height_rel[index[0]] + query @ layer.width_rel[index[1]]
            logits.append((query * key).sum(-1) * 4**-0.5 + relative)
            values.append(value)
        weights = torch.stack(logits).softmax(0)
        expected[(0, *i)] = (weights[..., None] * torch.stack(values)).sum(0)
    torch.testing.assert_close(layer(x), expected.flatten(-2))


def test_compiled_like_eager():
    x = torch.randn(1, 8, 12, 8)
    for layer in (CircularWindowAttention(8, 2, 3, 2), HaloAttention(8, 2, 4, 1)):
        compiled = torch.compile(layer, backend="aot_eager")
        torch.testing.assert_close(compiled(x), layer(x), rtol=1e-4, atol=1e-5)
    qkv = torch.randn(3, 1, 17, 9, 2, 4)
    compiled = torch.compile(circular_attention, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*qkv, 3), circular_attention(*qkv, 3), rtol=1e-4, atol=1e-5)


def test_what_does_not_fit_is_refused():
    x = torch.randn(1, 8, 12, 8)
    with pytest.raises(ValueError, match="block_size = 4 must divide the sides of the map.*8, 11"):
        HaloAttention(8, 2, 4, 1)(x[:, :, :11])
    with pytest.raises(ValueError, match="down_factor = 2 must divide the sides of the map.*7, 12"):
        CircularWindowAttention(8, 2, 3, 2)(x[:, :7])
    with pytest.raises(ValueError, match="radius must be at least 1, got 0"):
        circular_attention(*(torch.ones(1, 3, 3, 1, 2),) * 3, 0)
    with pytest.raises(ValueError, match="num_heads must divide dim = 8, got 3"):
        HaloAttention(8, 3)
