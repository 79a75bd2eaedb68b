"""Layers of flow attention against what the authors' layers computed."""

import pytest
import torch
import torch.nn.functional as F

from tests.parity import fixture_image, fixture_weights, load_fixture, relative_error
from visionattn.attention import CrossFlowAttention, FlowAttention


@pytest.mark.parametrize("name", ["op_flow_attention", "op_flow_attention_cross", "op_flow_attention_causal"])
def test_equals_the_authors(name):
    fixture = load_fixture(f"flowformer/{name}")
    config = fixture["config"]
    layer = CrossFlowAttention(
        config["d_model"], config["n_heads"], config["d_input"], config["d_output"], causal="causal" in name
    ).eval()
    layer.load_state_dict({key.removeprefix("attn."): w for key, w in fixture_weights(fixture).items()})
    image = fixture_image(fixture)
    x = image.flatten(2).transpose(1, 2)
    source = F.avg_pool2d(image, 2).flatten(2).transpose(1, 2) if config["cross"] else None
    # 5e-7 tells every eps but that of single flows from rounding (1e-7).
    assert relative_error(layer(x, source), torch.tensor(fixture["output"]["values"])) < 5e-7


@pytest.mark.parametrize("causal", [False, True])
def test_fused_projection_equals_separate_ones(causal):
    fused, apart = FlowAttention(12, 3, causal=causal), CrossFlowAttention(12, 3, causal=causal)
    names = ("query", "key", "value")
    state = {f"{n}_projection.{p}": t for p in ("weight", "bias")
             for n, t in zip(names, getattr(fused.qkv, p).chunk(3), strict=True)}  # fmt: skip
    state |= {f"out_projection.{p}": t for p, t in fused.proj.state_dict().items()}
    apart.load_state_dict(state)
    x = torch.randn(2, 4, 5, 12)
    torch.testing.assert_close(fused(x).flatten(1, 2), apart(x.flatten(1, 2)))


def test_slices_of_a_batch_are_the_batch(monkeypatch):
    layer = FlowAttention(24, 3).eval()
    x = torch.randn(4, 6, 5, 24)
    expected = layer(x)
    monkeypatch.setattr("visionattn.layers.blocks.SLICE_BYTES", 1)
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("layer", [FlowAttention, CrossFlowAttention])
def test_heads_must_divide_channels(layer):
    with pytest.raises(ValueError, match="num_heads must divide dim = 10, got 3"):
        layer(10, 3)
