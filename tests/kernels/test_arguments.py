"""What no operator can make sense of is named in a sentence, whichever operator it is given to."""

import re

import numpy as np
import pytest
import torch

from visionattn.kernels import (
    bilevel_routing_attention,
    depthwise_conv2d,
    flow_attention,
    focused,
    gated_pointwise,
    linear,
    linear_attention,
    neighborhood_attention,
    rotary_tables,
    window_attention,
)

NAN, INF = float("nan"), float("inf")
MAP = torch.zeros(1, 7, 7, 2, 4)
SEQUENCE = torch.zeros(1, 6, 2, 4)
TABLES = torch.ones(6, 2), torch.ones(6, 2)

# Each operator with arguments that are right.
CALLS = {
    "bilevel": (bilevel_routing_attention, dict(q=MAP, k=MAP, v=MAP, region=4, topk=2)),
    "routed": (
        bilevel_routing_attention,
        dict(q=MAP, k=MAP, v=MAP, region=4, routes=torch.zeros(1, 4, 2, dtype=torch.long), weights=torch.ones(1, 4, 2)),
    ),
    "depthwise": (
        depthwise_conv2d,
        dict(x=torch.zeros(1, 2, 7, 7), weight=torch.ones(2, 1, 3, 3), bias=torch.ones(2), dilation=3),
    ),
    "flow": (flow_attention, dict(q=SEQUENCE, k=SEQUENCE, v=SEQUENCE)),
    "focused": (focused, dict(x=SEQUENCE, power=3.0, scale=torch.ones(1, 1, 8))),
    "gated": (
        gated_pointwise,
        dict(x=torch.zeros(1, 2, 3, 3), weight=torch.ones(4, 2, 1, 1), bias=torch.ones(4), gate=torch.ones(1, 4, 3, 3)),
    ),
    "dense": (linear, dict(x=torch.zeros(2, 5, 4), weight=torch.ones(3, 4), bias=torch.ones(3))),
    "linear": (
        linear_attention,
        dict(
            q=SEQUENCE, k=SEQUENCE, v=SEQUENCE, rotary=TABLES, key_weights=torch.ones(1, 6, 2), residual=SEQUENCE,
            gate=SEQUENCE,
        ),
    ),
    "neighborhood": (
        neighborhood_attention,
        dict(q=MAP, k=MAP, v=MAP, kernel_size=3, bias=torch.zeros(2, 5, 5), scale=0.5),
    ),
    "tables": (rotary_tables, dict(height=2, width=3, dim=4)),
    "window": (
        window_attention,
        dict(
            qkv=torch.zeros(1, 7, 7, 3, 2, 4), window_size=7, shift=3, bias=torch.zeros(169, 2),
            padding=torch.zeros(3, 2, 4),
        ),
    ),
}  # fmt: skip
OPTIONAL = {"bias", "padding", "scale", "routes", "weights", "key_weights", "residual", "gate"}


def given(kind):
    """Names of arguments of a kind, with the operator's."""
    return [
        (name, key) for name, (_, right) in CALLS.items() for key, value in right.items() if isinstance(value, kind)
    ]


def refused(name, message, **changes):
    function, right = CALLS[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        function(**right | changes)


@pytest.mark.parametrize("name", CALLS)
def test_what_is_right_passes(name):
    function, right = CALLS[name]
    function(**right)


@pytest.mark.parametrize(("name", "key"), given(torch.Tensor))
def test_arguments_that_are_no_tensors(name, key):
    refused(name, f"{key} must be a tensor", **{key: np.zeros((1, 7, 7, 2, 4), np.float32)})
    refused(name, f"{key} must be a tensor", **{key: [[1.0]]})
    if key not in OPTIONAL or (name, key) == ("gated", "gate"):
        refused(name, f"{key} must be a tensor, got None", **{key: None})


@pytest.mark.parametrize("key", ["q", "k", "v"])
@pytest.mark.parametrize("name", [name for name, (_, right) in CALLS.items() if "q" in right])
def test_other_ranks(name, key):
    refused(name, f"{key} must ", **{key: CALLS[name][1][key][0, 0, 0]})


@pytest.mark.parametrize("name", ["bilevel", "flow", "linear", "neighborhood", "window", "focused"])
@pytest.mark.parametrize(("axis", "what"), [(-2, "head"), (-1, "channel")])
def test_no_heads_or_channels(name, axis, what):
    tensors = {k: t.narrow(axis, 0, 0) for k, t in CALLS[name][1].items() if k in ("q", "k", "v", "qkv", "x")}
    refused(name, what, **tensors, **dict.fromkeys(OPTIONAL & CALLS[name][1].keys()))


@pytest.mark.parametrize("scale", [NAN, INF, -1.0, 0, "1", True], ids=repr)
@pytest.mark.parametrize("name", ["bilevel", "linear", "neighborhood", "window"])
def test_scales_that_are_no_positive_numbers(name, scale):
    refused(name, f"scale must be positive, got {scale!r}", scale=scale)


@pytest.mark.parametrize("eps", [NAN, INF, -1e-6, 0.0, None, "1"], ids=repr)
@pytest.mark.parametrize("name", ["linear", "flow"])
def test_eps_that_is_no_positive_number(name, eps):
    refused(name, f"eps must be positive, got {eps!r}", eps=eps)


@pytest.mark.parametrize("size", [10**9, 2**40])
@pytest.mark.parametrize(
    ("name", "key"), [("bilevel", "region"), ("depthwise", "dilation"), ("neighborhood", "kernel_size"),
                      ("neighborhood", "dilation"), ("window", "window_size")]
)  # fmt: skip
def test_windows_that_would_fill_the_memory(name, key, size):
    refused(name, key, **{key: size}, **dict.fromkeys({"bias"} & CALLS[name][1].keys()))


def test_windows_may_be_larger_than_a_map():
    assert window_attention(torch.randn(1, 1, 2, 3, 1, 4), 12).shape == (1, 1, 2, 1, 4)
    assert depthwise_conv2d(torch.randn(1, 2, 1, 1), torch.ones(2, 1, 3, 3), dilation=3).shape == (1, 2, 1, 1)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("bilevel", dict(topk=1.5), "topk must be an int, got 1.5"),
        ("bilevel", dict(topk=True), "topk must be an int, got True"),
        ("depthwise", dict(dilation=1.0), "dilation must be an int, got 1.0"),
        ("depthwise", dict(dilation=None), "dilation must be an int, got None"),
        ("depthwise", dict(x=torch.zeros(1, 2, 7, 7, dtype=torch.int)), "x must be floating point, got torch.int32"),
        ("depthwise", dict(x=torch.zeros(1, 0, 7, 7), weight=torch.ones(0, 1, 3, 3), bias=None), "one channel"),
        ("flow", dict(causal="no"), "causal must be True or False, got 'no'"),
        ("flow", dict(flow_eps=None), "flow_eps must be 0 or positive, got None"),
        ("focused", dict(x=SEQUENCE[0]), "x must be [B, N, heads, D], got shape (6, 2, 4)"),
        ("focused", dict(power=NAN), "power must be positive, got nan"),
        ("focused", dict(power=None), "power must be positive, got None"),
        ("focused", dict(scale=torch.ones(4)), "scale must have an element for each of 8 channels, got shape (4,)"),
        ("gated", dict(x=torch.zeros(1, 2, 3, 3, dtype=torch.int)), "x must be floating point"),
        ("dense", dict(weight=torch.ones(4)), "weight must be [D, C], got shape (4,)"),
        ("dense", dict(x=torch.zeros(2, 5, 3)), "x must be [..., C] with C = 4 as in weight, got shape (2, 5, 3)"),
        ("dense", dict(bias=torch.ones(4)), "bias must be [D] with D = 3 as in weight, got shape (4,)"),
        ("dense", dict(weight=torch.ones(3, 4).double()), "weight must be torch.float32 as x is, got torch.float64"),
        ("linear", dict(feature_map=("relu",) * 3), "feature_map must be one or a pair"),
        ("linear", dict(feature_map=["relu"]), "feature_map must be a function or one of"),
        ("linear", dict(normalizer=["sum"]), "normalizer must be one of"),
        ("linear", dict(causal=1), "causal must be True or False, got 1"),
        ("linear", dict(rank_augmented=None), "rank_augmented must be True or False, got None"),
        ("linear", dict(rotary=TABLES[0]), "rotary must be two tensors"),
        ("linear", dict(rotary=TABLES[:1]), "rotary must be two tensors"),
        ("linear", dict(rotary=(TABLES[0], None)), "rotary's sines must be a tensor, got None"),
        ("linear", dict(rotary=(torch.ones(6, 3),) * 2), "with 4 features, got cosines of shape (6, 3)"),
        ("linear", dict(feature_map=lambda x: x[..., :3]), "with 3 features, got cosines of shape (6, 2)"),
        ("tables", dict(dim=6), "dim must be a multiple of 4, got 6"),
        ("tables", dict(dim=0), "dim must be at least 1, got 0"),
        ("tables", dict(dim=4.0), "dim must be an int, got 4.0"),
        ("tables", dict(height=0), "height must be at least 1, got 0"),
        ("tables", dict(base=0.0), "base must be positive, got 0.0"),
        ("window", dict(masked=NAN), "masked must be a number or -inf, got nan"),
        ("neighborhood", dict(scale=10**400), "scale must be positive, got 1000"),
        ("window", dict(masked=None), "masked must be a number or -inf, got None"),
    ],
)  # fmt: skip
def test_what_makes_no_sense(name, change, message):
    refused(name, message, **change)


SELECTED = {
    "bilevel": lambda x: bilevel_routing_attention(x, x, x, region=4, topk=2),
    "depthwise": lambda x: depthwise_conv2d(x.flatten(3), torch.ones(7, 1, 3, 3)),
    "flow": lambda x: flow_attention(x, x, x),
    "focused": lambda x: focused(x.flatten(1, 2)),
    "linear": lambda x: linear_attention(x, x, x),
    "neighborhood": lambda x: neighborhood_attention(x, x, x, 3),
    "window": lambda x: window_attention(x[:, :, :, None].expand(-1, -1, -1, 3, -1, -1), 7),
}


@pytest.mark.parametrize("run", SELECTED.values(), ids=SELECTED)
def test_compiled_checks_ask_nothing_of_a_number_of_samples_that_data_decide(run):
    torch._dynamo.reset()
    x, kept = torch.randn(3, 7, 7, 2, 4), torch.tensor([True, False, True])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        found = torch.compile(lambda x: run(x[kept]), backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(found, run(x[kept]))
