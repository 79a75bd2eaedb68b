"""What parity cannot see of RAVLT and MAViT: sizes, initialisation, eps, preprocessing, names of checkpoints."""

import argparse

import pytest
import timm
import torch
from torch import nn

import visionattn  # noqa: F401
from visionattn.attention import MagnitudeAwareAttention, RankAugmentedAttention, RotaryAttention
from visionattn.backbones.ravlt import RAVLT, Block, checkpoint_filter_fn

PARAMETERS = {
    "ravlt_t": 14_897_768,
    "ravlt_s": 25_591_208,
    "ravlt_b": 48_241_288,
    "ravlt_l": 95_242_440,
    "mavit_t": 16_449_128,
    "mavit_s": 27_142_568,
    "mavit_b": 49_792_648,
    "mavit_l": 97_766_088,
}
TINY = dict(embed_dims=(8, 8, 16, 16), depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 2), mlp_ratio=2, head_width=24)


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("name", PARAMETERS)
def test_stages_have_the_operators_head_widths_and_layer_scales_of_the_paper(name):
    model = timm.create_model(name, device="meta")
    linear = RankAugmentedAttention if name.startswith("ravlt") else MagnitudeAwareAttention
    for stage, kind in zip(model.stages, (linear, linear, RotaryAttention, RotaryAttention), strict=True):
        assert {type(block.attn) for block in stage.blocks} == {kind}
    wide = 96 if name[-1] in "bl" else 64
    assert [stage.blocks[0].attn.head_dim for stage in model.stages] == [wide, wide, 64, 64]
    scales = {"b": [1, 1, 1e-6, 1e-6], "l": [1e-6] * 4}.get(name[-1], [1] * 4)
    assert [stage.blocks[0].residual1.init_value for stage in model.stages] == scales
    assert model.head_hidden_size == {"ravlt": 1024, "mavit": 2560 if name == "mavit_l" else 2048}[name[:5]]


def test_norm_eps_and_initialisation_follow_the_authors():
    model = RAVLT(**{**TINY, "layer_scales": (1, 1, 1e-6, 1e-6)})
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-5}
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert torch.all(model.stages[1].blocks[0].residual1.gamma == 1)
    assert torch.all(model.stages[3].blocks[0].residual2.gamma == 1e-6)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    assert all(torch.all(m.bias == 0) for m in layers)
    assert torch.cat([m.weight.flatten() for m in layers]).std().item() == pytest.approx(0.02, rel=0.05)


def test_drop_path_rises_linearly_over_all_blocks():
    model = RAVLT(drop_path_rate=0.1, **TINY)
    rates = [m.residual1.drop_prob for m in model.modules() if isinstance(m, Block)]
    assert rates == pytest.approx([0.0, 0.025, 0.05, 0.075, 0.1])


def test_published_preprocessing():
    for name in ("ravlt_s", "mavit_s"):
        data = timm.data.resolve_model_data_config(timm.create_model(name, device="meta"))
        assert data["mean"] == (0.485, 0.456, 0.406) and data["crop_pct"] == 0.875
        assert data["interpolation"] == "bicubic" and data["input_size"] == (3, 224, 224)


def authors_names(model):
    """Our state dict as the authors name and shape it, with their angle buffers; written without the conversion."""
    theirs = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "stem":
            parts[0] = "patch_embed"
        elif parts[0] == "head":
            parts = ["head" if parts[1] == "fc" else parts[1], *parts[2:]]
        elif parts[2] == "downsample":
            parts = ["layers", str(int(parts[1]) - 1), *parts[2:]]
        else:
            parts[0] = "layers"
            if parts[4] in ("norm1", "norm2"):
                parts.insert(5, "norm")
            if parts[4].startswith("residual"):
                parts[4:] = [f"gamma_{parts[4][-1]}"]
                value = value[None, :, None, None]
            parts = ["ffn" if p == "mlp" else "qkvo" if p == "qkv" else p for p in parts]
        if parts[-1] == "weight" and value.ndim == 2:
            value = value[:, :, None, None]
        theirs[".".join(parts)] = value
    for i, stage in enumerate(model.stages):
        theirs[f"layers.{i}.RoPE.angle"] = torch.zeros(stage.blocks[0].attn.head_dim // 2)
    return theirs


@pytest.mark.parametrize("nesting", ["model", "model_ema", None])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_authors_checkpoints_load_whole(nesting, prefix):
    model = RAVLT(num_classes=5, **TINY)
    theirs = {prefix + name: value for name, value in authors_names(model).items()}
    theirs = {nesting: theirs, "args": argparse.Namespace(lr=1), "epoch": 3} if nesting else theirs
    converted = checkpoint_filter_fn(theirs, model)
    assert converted.keys() == model.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(converted[name], value), name


def test_backbone_of_a_detector_loads_into_feature_extractors():
    model = RAVLT(num_classes=5, **TINY)
    theirs = {f"backbone.{n}": v for n, v in authors_names(model).items() if n.startswith(("patch_embed", "layers"))}
    for i, width in enumerate(TINY["embed_dims"]):
        theirs |= {f"backbone.extra_norms.{i}.weight": torch.ones(width), f"neck.{i}.weight": torch.ones(3)}
    converted = checkpoint_filter_fn({"state_dict": theirs}, model)
    bare = RAVLT(num_classes=0, global_pool="", **TINY)
    bare.load_state_dict(converted)
    x = torch.randn(1, 3, 40, 64)
    expected = model.eval().forward_features(x)
    torch.testing.assert_close(bare.eval()(x), expected)


def test_native_state_dict_passes_the_conversion_unchanged():
    model = RAVLT(num_classes=5, **TINY)
    state = model.state_dict()
    assert checkpoint_filter_fn(state, model) is state


def test_release_loads_from_a_file_that_torch_opens_safely(tmp_path):
    model = timm.create_model("ravlt_t", num_classes=5, **TINY)
    torch.save({"model": authors_names(model), "epoch": 1}, tmp_path / "RAVLT_T.pth")
    overlay = dict(file=str(tmp_path / "RAVLT_T.pth"), num_classes=5)
    again = timm.create_model("ravlt_t", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, **TINY)
    x = torch.randn(1, 3, 33, 50)
    torch.testing.assert_close(again.eval()(x), model.eval()(x), rtol=0, atol=0)


@pytest.mark.parametrize("size", [(250, 230), (33, 65), (32, 32), (1, 1)])
@pytest.mark.parametrize("mixer", ["rala", "mala"])
def test_any_image_size(size, mixer):
    model = RAVLT(num_classes=5, mixers=(mixer, mixer, "softmax", "softmax"), **TINY).eval()
    maps = model.forward_intermediates(torch.randn(1, 3, *size), intermediates_only=True)
    for i, y in enumerate(maps):
        assert y.shape[2:] == tuple(-(-side // 2 ** (i + 2)) for side in size)
    assert model(torch.randn(1, 3, *size)).shape == (1, 5)


def test_maps_stay_channels_last_through_the_network():
    model = RAVLT(num_classes=5, **TINY).eval()
    maps = model.forward_intermediates(torch.randn(2, 3, 64, 64), intermediates_only=True)
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in maps)


def test_head_comes_back_after_it_was_taken_away():
    model = RAVLT(num_classes=5, **TINY).eval()
    model.reset_classifier(0, "")
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 16, 2, 2)
    model.reset_classifier(3, "avg")
    assert model.head_hidden_size == 24 and model(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    assert not any(m.training for m in model.modules())
    model.prune_intermediate_layers([1])
    model.reset_classifier(2, "avg")
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 2)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(depths=(1, 1, 1)), "one entry a stage, got embed_dims 4, depths 3"),
        (dict(mixers=("rala", "rala", "rela", "softmax")), "normed_softmax, got 'rela'"),
        (dict(num_heads=(1, 2, 2, 3)), "num_heads must divide dim = 16, got 3"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        RAVLT(**{**TINY, **change})
