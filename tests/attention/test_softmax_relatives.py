"""Softmax, selective and softplus attention against loops over pairs, written from their definitions."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F

from visionattn.attention import (
    FlowAttention,
    HedgehogAttention,
    LinearAttention,
    SelectiveAttention,
    SoftmaxAttention,
    SoftplusAttention,
)

LAYERS = [SoftmaxAttention, SelectiveAttention, SoftplusAttention]


def brute_force(layer, x, row):
    """Output of a layer when ``row(i, logits)`` gives the weights of a query and ``v`` is scaled as the layer says."""
    tokens = x.flatten(1, -2)
    h, D = layer.num_heads, x.shape[-1] // layer.num_heads
    q, k, v = F.linear(tokens, layer.qkv.weight, layer.qkv.bias).unflatten(-1, (3, h, D)).unbind(2)
    if isinstance(layer, SelectiveAttention):
        v = v * layer.value_temperature(tokens)[..., None]
    out = torch.empty_like(q)
    for b in range(q.shape[0]):
        for head in range(h):
            for i in range(q.shape[1]):
                logits = torch.stack([q[b, i, head] @ k[b, j, head] / math.sqrt(D) for j in range(q.shape[1])])
                out[b, i, head] = row(b, i, logits) @ v[b, :, head]
    return F.linear(out.flatten(2), layer.proj.weight, layer.proj.bias).reshape(x.shape)


def sharp(cls, **kwargs):
    layer = cls(8, 2, **kwargs, dtype=torch.float64)
    torch.nn.init.normal_(layer.qkv.weight)
    return layer


X = torch.randn(2, 2, 3, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_softmax_attention():
    layer = sharp(SoftmaxAttention)
    torch.testing.assert_close(layer(X), brute_force(layer, X, lambda b, i, s: s.softmax(0)))


def test_selective_attention():
    layer = sharp(SelectiveAttention)
    temperature = layer.query_temperature(X.flatten(1, 2))
    assert temperature.min() != temperature.max() and (temperature > 0).all() and (temperature < 2).all()
    expected = brute_force(layer, X, lambda b, i, s: (temperature[b, i, 0] * s).softmax(0))
    torch.testing.assert_close(layer(X), expected)


@pytest.mark.parametrize("length_scale", [True, False])
def test_softplus_attention(length_scale):
    layer = sharp(SoftplusAttention, length_scale=length_scale)
    factor = math.log(6) if length_scale else 1

    def row(b, i, logits):
        weights = torch.log1p((factor * logits).exp())
        return weights / weights.sum()

    torch.testing.assert_close(layer(X), brute_force(layer, X, row))


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("factor", [0.0, 1e3, 1e6])
def test_flat_and_huge_logits_stay_finite(cls, factor):
    layer = cls(8, 2)
    x = (factor * torch.randn(1, 9, 8)).requires_grad_()
    y = layer(x)
    y.sum().backward()
    assert y.isfinite().all() and x.grad.isfinite().all()


def test_softplus_weights_that_all_vanish_give_zeros():
    layer = SoftplusAttention(4, 1)
    q = torch.full((1, 3, 1, 4), 100.0)
    assert not layer.attend(q, -q, torch.ones_like(q), q[:, :, 0]).any()


VARIANTS = [(cls, {}) for cls in (*LAYERS, FlowAttention, HedgehogAttention)] + [
    (FlowAttention, dict(causal=True, qkv_bias=False)),
    (HedgehogAttention, dict(causal=True, qkv_bias=False)),
    (HedgehogAttention, dict(causal=True, window=5)),
]


@pytest.mark.parametrize(("cls", "kwargs"), VARIANTS, ids=str)
def test_layers_script_and_take_maps_and_sequences(cls, kwargs):
    layer = cls(8, 2, **kwargs).eval()
    x = torch.randn(2, 3, 4, 8)
    y = layer(x)
    torch.testing.assert_close(layer(x.flatten(1, 2)), y.flatten(1, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(torch.jit.script(layer)(x), y)
    assert (layer.qkv.bias is None) != kwargs.get("qkv_bias", True)


@pytest.mark.parametrize("cls", LAYERS)
def test_heads_must_divide_channels(cls):
    with pytest.raises(ValueError, match="num_heads must divide dim = 10, got 3"):
        cls(10, 3)


@pytest.mark.parametrize("name", ["relu2", "elu+1", "softmax"])
def test_feature_maps_of_linear_attention(name):
    layer = LinearAttention(8, 2, name, rotary=False, lepe_kernel=0, gate=False, dtype=torch.float64)
    torch.nn.init.normal_(layer.qkv.weight)
    phi = {"relu2": lambda x: F.relu(x) ** 2, "elu+1": lambda x: F.elu(x) + 1, "softmax": lambda x: x.softmax(-1)}[name]
    q, k, v = layer.qkv(X.flatten(1, 2)).unflatten(-1, (3, 2, 4)).transpose(1, 3).unbind(2)  # B h N D
    weights = phi(q) @ phi(k).transpose(2, 3)
    weights = weights / (weights.sum(-1, keepdim=True) + 1e-6)
    expected = layer.proj((weights @ v).transpose(1, 2).reshape(X.shape))
    torch.testing.assert_close(layer(X), expected)
