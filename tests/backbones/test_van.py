"""What parity cannot see of VAN: sizes, initialisation, eps, preprocessing, names of checkpoints."""

import pytest
import timm
import torch
from torch import nn

import visionattn  # noqa: F401
from visionattn.backbones.van import VAN, Block, checkpoint_filter_fn

PARAMETERS = {
    "van_b0": 4_105_800,
    "van_b1": 13_861_800,
    "van_b2": 26_578_472,
    "van_b3": 44_765_608,
    "van_b4": 60_283_176,
    "van_b5": 89_967_688,
    "van_b6": 199_829_416,
}
TINY = dict(embed_dims=(8, 12, 16, 20), depths=(1, 1, 2, 1), mlp_ratios=(2, 2, 2, 2))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


def test_norm_eps_and_initialisation_follow_the_authors():
    model = VAN(**TINY)
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-5}
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    block = next(m for m in model.modules() if isinstance(m, Block))
    assert torch.all(block.residual1.gamma == 1e-2) and torch.all(block.residual2.gamma == 1e-2)
    assert all(torch.all(m.bias == 0) for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear)))
    stem = model.stem.proj.weight
    assert stem.std().item() == pytest.approx((2 / (49 * 8)) ** 0.5, rel=0.1)


def test_drop_path_rises_linearly_over_all_blocks():
    model = VAN(drop_path_rate=0.1, **TINY)
    rates = [m.residual1.drop_prob for m in model.modules() if isinstance(m, Block)]
    assert rates == pytest.approx([0.0, 0.025, 0.05, 0.075, 0.1])


def test_a_pyramid_of_three_stages_is_refused():
    with pytest.raises(ValueError, match=r"one width for each of the strides \(4, 8, 16, 32\), got \(8, 12, 16\)"):
        VAN(embed_dims=(8, 12, 16), depths=(1, 1, 1), mlp_ratios=(2, 2, 2))


def test_published_preprocessing():
    cfg = timm.create_model("van_b0", device="meta").pretrained_cfg
    assert cfg["mean"] == cfg["std"] == (0.5, 0.5, 0.5)
    assert cfg["crop_pct"] == 0.9 and cfg["interpolation"] == "bicubic"
    data = timm.data.resolve_model_data_config(timm.create_model("van_b0", device="meta"))
    assert data["mean"] == (0.5, 0.5, 0.5) and data["crop_pct"] == 0.9


def authors_names(state_dict):
    """Our state dict under the authors' names: the inverse of the conversion, written independently of it."""
    renamed = {}
    for name, value in state_dict.items():
        parts = name.split(".")
        if parts[0] == "stem":
            parts[0] = "patch_embed1"
        elif parts[0] == "head":
            parts = ["head", *parts[2:]]
        elif parts[0] == "stages":
            number = int(parts[1]) + 1
            parts = [
                {"downsample": "patch_embed", "blocks": "block", "norm": "norm"}[parts[2]] + str(number),
                *parts[3:],
            ]
        if parts[-1] == "gamma":
            parts = [*parts[:-2], "layer_scale_" + parts[-2][-1]]
        if "dwconv" in parts:
            at = parts.index("dwconv")
            parts.insert(at, "dwconv")
        renamed[".".join(parts)] = value
    return renamed


@pytest.mark.parametrize("nesting", ["state_dict", "model", None])
@pytest.mark.parametrize("prefix", ["", "module.", "backbone."])
def test_authors_checkpoints_load_whole(nesting, prefix):
    model = VAN(num_classes=5, **TINY)
    theirs = {prefix + name: value for name, value in authors_names(model.state_dict()).items()}
    theirs = {nesting: theirs, "epoch": 3} if nesting else theirs
    converted = checkpoint_filter_fn(theirs, model)
    assert converted.keys() == model.state_dict().keys()


def test_native_state_dict_passes_the_conversion_unchanged_even_without_head_or_stem():
    model = VAN(num_classes=5, **TINY)
    for part in ("", "head.", "stem."):
        native = {name: value for name, value in model.state_dict().items() if not part or not name.startswith(part)}
        assert checkpoint_filter_fn(native, model) is native


@pytest.mark.parametrize("size", [(250, 230), (33, 65), (32, 32), (1, 1)])
def test_any_image_size(size):
    model = VAN(num_classes=5, **TINY).eval()
    assert model(torch.randn(1, 3, *size)).shape == (1, 5)


def test_maps_stay_channels_last_through_the_network():
    model = VAN(num_classes=5, **TINY).eval()
    maps = model.forward_intermediates(torch.randn(2, 3, 64, 64), intermediates_only=True)
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in maps)
