"""What parity cannot see of NaLaFormer: sizes, eps, initialisation, and the operator by itself."""

import pytest
import timm
import torch

from tests.parity import fixture_image, fixture_weights, load_fixture, output_error, relative_error
from visionattn.attention import NormAwareAttention, RotaryAttention
from visionattn.benchmark.models import plain_and_ours
from visionattn.benchmark.plain.ravlt import build

PARAMETERS = {
    "nalaformer_xt": 6_142_248,
    "nalaformer_t": 15_907_752,
    "nalaformer_s": 25_654_184,
    "nalaformer_b": 52_002_952,
    "nalaformer_l": 95_426_760,
}


def rename(weights):
    """The authors' names of one attention layer, as ours."""
    ours = {"qkvg": "qkv", "out_proj": "proj"}
    parts = {name: name.split(".") for name in weights}
    return {f"{ours.get(p[1], p[1])}.{p[2]}": weights[name] for name, p in parts.items()}


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    assert sum(p.numel() for p in timm.create_model(name, device="meta").parameters()) == PARAMETERS[name]
    assert sum(p.numel() for p in build(name).parameters()) == PARAMETERS[name]


def test_layers_eps_and_layer_scales_are_the_authors():
    for name, scales in (("nalaformer_b", (1, 1, 1e-6, 1e-6)), ("nalaformer_l", (1e-6,) * 4)):
        model = timm.create_model(name, depths=(1, 1, 1, 1))
        blocks = [stage.blocks[0] for stage in model.stages]
        assert [type(b.attn) for b in blocks] == [NormAwareAttention] * 2 + [RotaryAttention] * 2
        assert all(b.attn.ln.eps == 1e-5 and b.norm1.eps == b.norm2.eps == 1e-6 for b in blocks)
        assert all(b.attn.eps == 1e-6 and b.attn.norm_eps == 0 for b in blocks[:2])
        assert [b.residual1.gamma[0].item() for b in blocks] == pytest.approx(scales)
        assert blocks[0].attn.qkv.weight.std() > 0.03 and model.head.proj.bias.any()  # PyTorch's own, not 0.02 and 0
        assert blocks[0].pos2.weight.std().item() == pytest.approx(0.02, rel=0.15) and not blocks[0].pos2.bias.any()


def test_the_operator_equals_the_authors():
    fixture = load_fixture("nalaformer/op_nala")
    layer = NormAwareAttention(64, 2)
    layer.load_state_dict(rename(fixture_weights(fixture)))
    with torch.no_grad():
        y = layer(fixture_image(fixture).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert output_error(fixture, y) < 1e-6


def test_a_query_of_zeros_is_no_nan_if_asked_for():
    for norm_eps in (0.0, 1e-6):
        layer = NormAwareAttention(16, 2, norm_eps=norm_eps)
        with torch.no_grad():
            layer.qkv.weight[:16], layer.qkv.bias[:16] = 0, 0
        y = layer(torch.randn(1, 3, 3, 16))
        assert bool(y.isfinite().all()) == (norm_eps > 0)
        y.sum().backward()
        assert norm_eps == 0 or all(p.grad.isfinite().all() for p in layer.parameters())


def test_features_have_the_gradient_of_their_formula():
    layer = NormAwareAttention(16, 2).double()
    x = torch.randn(1, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer.query_features, x)
    assert torch.autograd.gradcheck(layer.key_features, x)


def test_a_feature_of_zero_has_a_gradient():
    q = torch.randn(1, 3, 2, 8)
    q[..., 0] = 0
    q.requires_grad_()
    NormAwareAttention(16, 2).query_features(q).sum().backward()
    assert q.grad.isfinite().all()


@pytest.mark.parametrize("arguments", [dict(norm_eps=-1.0), dict(eps=0.0)])
def test_bad_eps_is_named(arguments):
    with pytest.raises(ValueError, match="eps must be (at least 0|positive)"):
        NormAwareAttention(16, 2, **arguments)


def test_a_norm_before_the_gate_needs_a_gate():
    with pytest.raises(ValueError, match="norm_gate=True needs gate=True"):
        NormAwareAttention(16, 2, gate=False)


def test_plain_nalaformer_equals_ours():
    plain, ours = (net.eval() for net in plain_and_ours("nalaformer_xt"))
    x = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        assert relative_error(ours(x), plain(x)) < 2e-6
