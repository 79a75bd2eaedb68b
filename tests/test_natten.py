"""The drop-in for natten: its signatures, its semantics, and its own results where it is installed."""

import inspect
from functools import partial

import pytest
import torch

from visionattn import natten as ours
from visionattn.kernels import BackendError, neighborhood_attention

SHAPES = {1: (13,), 2: (7, 9), 3: (4, 5, 6)}
FUNCTIONS = {1: ours.na1d, 2: ours.na2d, 3: ours.na3d}
MODULES = {1: ours.NeighborhoodAttention1D, 2: ours.NeighborhoodAttention2D, 3: ours.NeighborhoodAttention3D}
every_rank = pytest.mark.parametrize("axes", [1, 2, 3])


def qkv(axes, heads=2, dim=8, **kwargs):
    return [torch.randn(2, *SHAPES[axes], heads, dim, **kwargs) for _ in range(3)]


@every_rank
def test_functions_take_natten_s_arguments(axes):
    q, k, v = qkv(axes)
    expected = neighborhood_attention(q, k, v, 3, is_causal=True, scale=0.5)
    actual = FUNCTIONS[axes](query=q, key=k, value=v, kernel_size=3, stride=1, dilation=1, is_causal=True, scale=0.5)
    torch.testing.assert_close(actual, expected)
    per_axis = FUNCTIONS[axes](q, k, v, (3,) * axes, (1,) * axes, (1,) * axes, (True,) * axes, 0.5)
    torch.testing.assert_close(per_axis, expected)
    names = ["query", "key", "value", "kernel_size", "stride", "dilation", "is_causal", "scale"]
    assert list(inspect.signature(FUNCTIONS[axes]).parameters)[:8] == names


@every_rank
def test_modules_take_natten_s_arguments_and_state_dict(axes):
    module = MODULES[axes](16, 2, 3, 1, 1, False, True, None, 0.0)
    assert list(module.state_dict()) == ["qkv.weight", "qkv.bias", "proj.weight", "proj.bias"]
    x = torch.randn(2, *SHAPES[axes], 16)
    q, k, v = module.qkv(x).unflatten(-1, (3, 2, 8)).unbind(-3)
    torch.testing.assert_close(module(x), module.proj(FUNCTIONS[axes](q, k, v, 3).flatten(-2)))
    names = ["embed_dim", "num_heads", "kernel_size", "stride", "dilation", "is_causal", "qkv_bias", "qk_scale"]
    assert list(inspect.signature(MODULES[axes]).parameters)[:9] == [*names, "proj_drop"]


def test_relative_position_bias_of_older_releases():
    module = ours.NeighborhoodAttention2D(dilation=2, embed_dim=16, num_heads=2, kernel_size=3, rel_pos_bias=True)
    assert module.rpb.shape == (2, 5, 5)
    x = torch.randn(1, 7, 9, 16)
    q, k, v = module.qkv(x).unflatten(-1, (3, 2, 8)).unbind(-3)
    expected = module.proj(ours.na2d(q, k, v, 3, dilation=2, rpb=module.rpb).flatten(-2))
    torch.testing.assert_close(module(x), expected)


@every_rank
def test_a_short_axis_is_refused_or_padded_on_request(axes):
    x = torch.randn(1, *[5] * axes, 8)
    with pytest.raises(ValueError, match="less than kernel_size"):
        MODULES[axes](8, 2, 7)(x)
    q = torch.randn(1, *[5] * axes, 2, 4)
    with pytest.raises(ValueError, match="kernel_size"):
        FUNCTIONS[axes](q, q, q, 7)
    assert MODULES[axes](8, 2, 7, small_maps="pad")(x).shape == x.shape


@every_rank
@pytest.mark.parametrize("stride", [2, (1, 2), [2]])
def test_strides_are_refused(axes, stride):
    with pytest.raises(ValueError, match="stride must be 1"):
        FUNCTIONS[axes](*qkv(axes), 3, stride)
    with pytest.raises(ValueError, match="stride must be 1"):
        MODULES[axes](8, 2, 3, stride)


def test_a_map_of_another_rank_is_refused():
    with pytest.raises(ValueError, match="query must be .* 1 spatial axes"):
        ours.na1d(*qkv(2), 3)


def test_backend_natten_says_what_it_lacks(monkeypatch):
    q, k, v = qkv(2)
    with pytest.raises(BackendError, match="no relative position bias"):
        ours.na2d(q, k, v, 3, rpb=torch.zeros(2, 5, 5), backend="natten")
    monkeypatch.setitem(__import__("sys").modules, "natten", None)
    for function in (ours.na2d, neighborhood_attention):
        with pytest.raises(BackendError, match="'natten' cannot run this call: import of natten halted"):
            function(q, k, v, 3, backend="natten")
    with pytest.raises(ValueError, match="must not exceed the map"):
        neighborhood_attention(q, k, v, 9, backend="natten")


@every_rank
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("is_causal", [False, True])
def test_equals_natten_where_it_is_installed(axes, dilation, is_causal):
    pytest.importorskip("natten", reason="the optional package natten is not installed")
    # Forward only: natten's one backend on a CPU has no backward there.
    kernel_size = 2 if axes == 3 else 3
    call = partial(FUNCTIONS[axes], *qkv(axes, dim=32), kernel_size, dilation=dilation, is_causal=is_causal)
    torch.testing.assert_close(call(), call(backend="natten"))
    torch.testing.assert_close(call(scale=0.3), call(scale=0.3, backend="natten"))


def test_what_natten_refuses_names_its_reason():
    pytest.importorskip("natten", reason="the optional package natten is not installed")
    q = torch.randn(1, 9, 9, 2, 24)
    with pytest.raises(BackendError, match="backend 'natten' cannot run this call: .*"):
        neighborhood_attention(q, q, q, 3, backend="natten")  # its one backend on a CPU needs powers of two
