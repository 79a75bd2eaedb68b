"""What whole-model parity cannot see of LITv2: sizes, alphas, windows, initialisation, names of checkpoints."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import visionattn
from tests.parity import fixture_image, fixture_weights, load_fixture, relative_error
from visionattn.attention import HiLoAttention
from visionattn.backbones.litv2 import Block, DepthwiseMlp, LITv2, checkpoint_filter_fn
from visionattn.benchmark.models import randomize_
from visionattn.benchmark.plain.litv2 import PlainLITv2
from visionattn.layers.token_merging import DeformableTokenMerging

PARAMETERS = {
    "litv2_small": 27_844_000,
    "litv2_medium": 48_830_368,
    "litv2_base": 86_520_704,
    "litv2_small_alpha00": 28_089_760,
    "litv2_small_alpha02": 27_844_000,
    "litv2_small_alpha04": 27_696_544,
    "litv2_small_alpha05": 27_647_392,
    "litv2_small_alpha07": 27_696_544,
    "litv2_small_alpha10": 28_089_760,
}
TINY = dict(embed_dim=8, depths=(1, 1, 3, 1), num_heads=(1, 2, 4, 4), num_classes=5)


def attention(model):
    return [m for m in model.modules() if isinstance(m, HiLoAttention)]


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert {m.head_dim for m in attention(model)} == {32}


def test_attention_of_the_published_models():
    def windows_and_heads(name, **kwargs):
        model = timm.create_model(name, device="meta", **kwargs)
        stages = [{(m.window_size, m.high_heads, m.low_heads) for m in attention(stage)} for stage in model.stages]
        return stages[0] | stages[1], stages[2], stages[3]

    assert windows_and_heads("litv2_small") == (set(), {(2, 2, 10)}, {(1, 0, 24)})
    assert windows_and_heads("litv2_base") == (set(), {(2, 2, 14)}, {(1, 0, 32)})
    assert windows_and_heads("litv2_small_alpha07") == (set(), {(2, 4, 8)}, {(1, 0, 24)})
    assert windows_and_heads("litv2_small", alpha=0.5, window_size=4) == (set(), {(4, 6, 6)}, {(1, 0, 24)})
    assert windows_and_heads("litv2_small_alpha00", window_size=(0, 4, 4, 2))[0] == {(4, 6, 0)}


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(alpha=1.5), "alpha must be a number from 0 to 1, got 1.5"),
        (dict(alpha=-0.1, window_size=0), "alpha must be a number from 0 to 1, got -0.1"),
        (dict(window_size=(0, 0, 2)), "one entry a stage, got 4, 4 and 3"),
        (dict(depths=(1, 1, 1)), "one entry a stage, got depths 3"),
        (dict(window_size=(0, 0, -2, 1)), "window_size must be a positive integer, got -2"),
        (dict(num_heads=(1, 2, 5, 4)), "num_heads must divide dim = 32, got 5"),
    ],
)
def test_wrong_arguments_raise(kwargs, message):
    with pytest.raises(ValueError, match=message):
        LITv2(**{**TINY, **kwargs})


def test_norm_eps_and_initialisation_follow_the_authors():
    model = LITv2(**dict(TINY, embed_dim=32))
    assert {m.eps for m in model.modules() if isinstance(m, (nn.LayerNorm, nn.BatchNorm2d))} == {1e-5}
    assert {m.act.approximate for m in model.modules() if hasattr(m, "act")} == {"none"}
    for block in (m for m in model.modules() if isinstance(m, Block)):
        linear = [m for m in block.modules() if isinstance(m, nn.Linear)]
        assert not any(m.bias.any() for m in [*linear, block.mlp.dwconv])
        for layer in (m for m in linear if m.weight.numel() > 1000):
            assert layer.weight.std().item() == pytest.approx(0.02, rel=0.15)
        assert block.mlp.dwconv.weight.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.1)
    bound = model.stem.proj.weight[0].numel() ** -0.5  # PyTorch's own initialisation of convolutions
    assert 0.9 * bound < model.stem.proj.weight.abs().max() <= bound and model.stem.proj.bias.any()
    for merging in (m for m in model.modules() if isinstance(m, DeformableTokenMerging)):
        bound = merging.proj.in_features**-0.5
        assert 0.9 * bound < merging.proj.weight.abs().max() <= bound and merging.proj.bias.any()
        assert not any(p.any() for p in merging.conv_offset.parameters())


def test_drop_path_rises_linearly_over_all_blocks():
    model = LITv2(drop_path_rate=0.5, **TINY)
    blocks = [m for m in model.modules() if isinstance(m, Block)]
    assert [b.residual2.drop_prob for b in blocks] == pytest.approx([0.1 * i for i in range(6)])
    assert [b.residual1.drop_prob for b in blocks[2:]] == pytest.approx([0.1 * i for i in range(2, 6)])


def test_dropout_sits_inside_the_mlps():
    model = LITv2(proj_drop_rate=0.3, drop_rate=0.2, **TINY)
    assert {m.drop.p for m in model.modules() if isinstance(m, DepthwiseMlp)} == {0.3}
    assert model.head.drop.p == 0.2


def test_published_preprocessing():
    cfg = timm.get_pretrained_cfg("litv2_small.in1k")
    assert cfg.mean == (0.485, 0.456, 0.406) and cfg.std == (0.229, 0.224, 0.225)
    assert cfg.crop_pct == 0.875 and cfg.interpolation == "bicubic"
    cfg = timm.get_pretrained_cfg("litv2_base.in1k_384")
    assert cfg.input_size == (3, 384, 384) and cfg.crop_pct == 1.0 and cfg.crop_mode == "squash"


def test_every_published_classifier_has_its_url():
    urls = [timm.get_pretrained_cfg(name).url for name in visionattn.list_models("litv2*", pretrained=True)]
    files = {url.removeprefix("https://github.com/ziplab/LITv2/releases/download/") for url in urls}
    assert files == {f"v1.0/litv2_{size}.pth" for size in ("s", "m", "b", "b_384")} | {
        f"v1.1/alpha_{alpha}.pth" for alpha in ("0", "0.2", "0.4", "0.5", "0.7", "0.9", "1")
    }


def pair(**kwargs):
    """The authors' composition and ours with its weights."""
    args = {"alpha": 0.9, "window_size": (0, 0, 2, 1), **{k: v for k, v in TINY.items()}, **kwargs}
    plain = randomize_(PlainLITv2(**args))
    for layer in plain.layers[:-1]:  # sampling places all over the map and beyond
        nn.init.normal_(layer.downsample.dconv.conv_offset.weight, std=0.5)
    ours = LITv2(**args)
    ours.load_state_dict(checkpoint_filter_fn(plain.state_dict(), ours))
    return plain, ours


@pytest.mark.parametrize(
    ("size", "window", "alpha"),
    [((64, 96), 2, 0.3), ((97, 131), 2, 0.9), ((115, 63), 4, 0.0), ((130, 70), 3, 1.0), ((64, 64), 1, 0.5)],
)
def test_any_image_size_alpha_and_window_equals_the_authors_composition(size, window, alpha):
    plain, ours = pair(alpha=alpha, window_size=(0, 0, window, 1))
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        assert relative_error(ours.eval()(x), plain.eval()(x)) < 1e-5  # float32, three samplings deep


@pytest.mark.parametrize("training", [False, True])
def test_gradients_equal_the_authors_composition(training):
    plain, ours = (model.double().train(training) for model in pair())
    x = torch.randn(2, 3, 70, 64, dtype=torch.float64)
    for model in (plain, ours):
        model(x).square().sum().backward()
    grads = checkpoint_filter_fn({name: p.grad for name, p in plain.named_parameters()}, ours)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, grads[name], msg=name)


@pytest.mark.parametrize("size", [(1, 1), (20, 5), (31, 64)])
def test_images_smaller_than_the_last_stride(size):
    model = LITv2(**TINY).eval()
    assert model(torch.randn(1, 3, *size)).isfinite().all()


def test_feature_maps_equal_the_authors_dense_backbone():
    fixture = load_fixture("litv2/litv2_small_dense_256x192")
    weights = fixture_weights(fixture)
    model = timm.create_model("litv2_small", num_classes=0).eval()
    missing, unexpected = model.load_state_dict(checkpoint_filter_fn({"state_dict": weights}, model), strict=False)
    assert not unexpected and set(missing) == {"norm.weight", "norm.bias"} | {
        name for name in missing if name.endswith("num_batches_tracked")
    }
    with torch.inference_mode():
        maps = model.forward_intermediates(fixture_image(fixture), intermediates_only=True)
    for i, (y, recorded) in enumerate(zip(maps, fixture["features"], strict=True)):
        y = F.layer_norm(y.permute(0, 2, 3, 1), y.shape[1:2], weights[f"norm{i}.weight"], weights[f"norm{i}.bias"])
        y = y.permute(0, 3, 1, 2)
        assert list(y.shape) == recorded["shape"]
        sample = y.reshape(-1)[torch.tensor(recorded["index"])]
        assert relative_error(sample, torch.tensor(recorded["value"])) < 1e-5
    expected = torch.tensor(fixture["output"]["values"])
    assert relative_error(y.flatten(1)[:, : expected.shape[1]], expected) < 5e-6


def authors_state(**kwargs):
    plain, ours = pair(**kwargs)
    return plain.state_dict(), ours


@pytest.mark.parametrize("nesting", ["state_dict", "model", None])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("alpha", [0.0, 0.9, 1.0])
def test_authors_classifiers_load_whole(nesting, prefix, alpha):
    theirs, model = authors_state(alpha=alpha)
    theirs = {prefix + name: value for name, value in theirs.items()}
    converted = checkpoint_filter_fn({nesting: theirs, "epoch": 3} if nesting else theirs, model)
    assert converted.keys() == model.state_dict().keys()


@pytest.mark.parametrize("norms", [(0, 1, 2, 3), (1, 2, 3)], ids=["segmenter", "detector"])
def test_backbones_of_segmenters_and_detectors_load_whole(norms):
    theirs, model = authors_state()
    theirs = {f"backbone.{name}": value for name, value in theirs.items() if not name.startswith(("norm.", "head."))}
    theirs |= {f"backbone.norm{i}.weight": torch.ones(8 * 2**i) for i in norms}
    theirs["decode_head.conv_seg.weight"] = torch.ones(1)
    model.reset_classifier(0)
    model.norm = nn.Identity()
    model.load_state_dict(checkpoint_filter_fn({"state_dict": theirs}, model))


def test_native_state_dict_passes_the_conversion_unchanged_even_without_head_or_stem():
    model = LITv2(**TINY)
    for part in ("", "head.", "stem."):
        native = {name: value for name, value in model.state_dict().items() if not part or not name.startswith(part)}
        assert checkpoint_filter_fn(native, model) is native


def test_maps_stay_channels_last_through_the_network():
    model = LITv2(**TINY).eval()
    maps = model.forward_intermediates(torch.randn(2, 3, 64, 64), intermediates_only=True)
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in maps)
