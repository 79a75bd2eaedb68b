"""What parity cannot see of NAT, DiNAT and DiNAT_s: sizes, dilations, initialisation, eps, names of checkpoints."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import visionattn  # noqa: F401
from visionattn.attention import NeighborhoodAttention
from visionattn.backbones.dinat import DiNAT, DiNATs
from visionattn.backbones.nat import NAT, Block, checkpoint_filter_fn

PARAMETERS = {
    "nat_mini": 19_984_174,
    "nat_tiny": 27_901_582,
    "nat_small": 50_743_297,
    "nat_base": 89_769_652,
    "dinat_mini": 19_984_174,
    "dinat_tiny": 27_901_582,
    "dinat_small": 50_719_681,
    "dinat_base": 89_769_652,
    "dinat_large": 200_943_514,
    "dinat_large_384": 200_943_514,
    "dinat_large_384_11x11": 201_144_250,
    "dinat_s_tiny": 28_288_354,
    "dinat_s_small": 49_606_258,
    "dinat_s_base": 87_768_224,
    "dinat_s_large": 196_532_476,
    "dinat_s_large_384": 196_532_476,
}
TINY = dict(embed_dim=8, depths=(2, 2, 3, 1), num_heads=(1, 2, 2, 2), kernel_size=3, num_classes=5)
DILATED = dict(TINY, dilations=((1, 4), (1, 2), (1, 2), (1,)), layer_scale=1e-5)
each_layout = pytest.mark.parametrize("cls", [DiNAT, DiNATs])


def attention(model):
    return [m for m in model.modules() if isinstance(m, NeighborhoodAttention)]


def dilations(model):
    return [[block.attn.dilation[0] for block in stage.blocks] for stage in model.stages]


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    assert {m.head_dim for m in attention(model)} == {32}
    assert {m.kernel_size[0] for m in attention(model)} == {11 if name.endswith("11x11") else 7}


@pytest.mark.parametrize("name", PARAMETERS)
def test_layer_scale_of_the_published_models(name):
    model = timm.create_model(name, device="meta")
    scaled = [n for n, _ in model.named_parameters() if n.endswith("gamma")]
    assert bool(scaled) == (name in ("nat_small", "nat_base", "dinat_base"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nat_mini", [[1] * 3, [1] * 4, [1] * 6, [1] * 5]),
        ("dinat_mini", [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 3, [1] * 5]),
        ("dinat_large", [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5]),
        ("dinat_large_384", [[1, 13, 1], [1, 6, 1, 6], [1, 3] * 9, [1] * 5]),
        ("dinat_large_384_11x11", [[1, 8, 1], [1, 4, 1, 4], [1, 2] * 9, [1] * 5]),
        ("dinat_s_tiny", [[1, 8], [1, 4], [1, 2] * 3, [1, 1]]),
        ("dinat_s_large_384", [[1, 13], [1, 6], [1, 3] * 9, [1, 1]]),
    ],
)
def test_dilations_of_the_published_models(name, expected):
    assert dilations(timm.create_model(name, device="meta")) == expected


def test_dilations_of_other_tasks():
    coco = [[1, 28, 1], [1, 7, 1, 14], [1, 3, 1, 5, 1, 7], [1, 3, 1, 3, 1]]
    model = timm.create_model("dinat_tiny", device="meta", dilations=coco)
    assert dilations(model) == [*coco[:2], coco[2] * 3, coco[3]]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(dilations=((1, 2, 1), (1,), (1,), (1,))), r"dilations\[0\] must have 1 to 2 values, got \(1, 2, 1\)"),
        (dict(dilations=((1,), (1,), (), (1,))), r"dilations\[2\] must have 1 to 3 values"),
        (dict(dilations=((1,), (1,))), "one entry a stage, got depths 4, num_heads 4, dilations 2"),
        (dict(position="sine"), "position must be one of"),
    ],
)
def test_wrong_arguments_raise(kwargs, message):
    with pytest.raises(ValueError, match=message):
        NAT(**{**TINY, **kwargs})


@pytest.mark.parametrize("cls", [NAT, DiNATs])
def test_norm_eps_and_initialisation_follow_the_authors(cls):
    torch.manual_seed(0)
    model = cls(**dict(TINY, embed_dim=32, layer_scale=1e-5))
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-5}
    assert {m.act.approximate for m in model.modules() if hasattr(m, "act")} == {"none"}
    assert all(torch.all(p == 1e-5) for n, p in model.named_parameters() if n.endswith("gamma"))
    for layer in (m for m in model.modules() if isinstance(m, nn.Linear) and m.weight.numel() > 1000):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.15)
        assert layer.bias is None or not layer.bias.any()
    assert attention(model)[0].rpb.std().item() == pytest.approx(0.02, rel=0.4)
    stem = model.stem.proj if cls is DiNATs else model.stem.proj[0]
    bound = stem.weight[0].numel() ** -0.5  # PyTorch's own initialisation of convolutions
    assert 0.9 * bound < stem.weight.abs().max() <= bound and stem.bias.any()


def test_convolutions_have_the_authors_biases():
    model = NAT(**TINY)
    assert all(conv.bias is not None for conv in model.stem.proj)
    assert all(stage.downsample.reduction.bias is None for stage in model.stages[1:])
    assert all(stage.downsample.reduction.bias is None for stage in DiNATs(**TINY).stages[1:])


def test_drop_path_rises_linearly_over_all_blocks():
    model = NAT(drop_path_rate=0.7, **TINY)
    rates = [m.residual2.drop_prob for m in model.modules() if isinstance(m, Block)]
    assert rates == pytest.approx([0.1 * i for i in range(8)])


@pytest.mark.parametrize(("name", "crop"), [("nat_mini", 0.875), ("dinat_s_tiny", 0.875), ("dinat_large_384", 1.0)])
def test_published_preprocessing(name, crop):
    cfg = timm.create_model(name, device="meta").pretrained_cfg
    assert cfg["mean"] == (0.485, 0.456, 0.406) and cfg["std"] == (0.229, 0.224, 0.225)
    assert cfg["crop_pct"] == crop and cfg["interpolation"] == "bicubic"


def test_pretraining_checkpoints_have_the_classes_of_imagenet_22k():
    names = visionattn.list_models("dinat*", pretrained=True)
    assert {n for n in names if n.endswith(".in22k")} == {
        "dinat_large.in22k",
        "dinat_large_384_11x11.in22k",
        "dinat_s_large.in22k",
    }
    assert timm.get_pretrained_cfg("dinat_large.in22k").num_classes == 21841
    assert timm.create_model("dinat_large", device="meta").pretrained_cfg["tag"] == "in22k_ft_in1k"


def test_patch_merging_has_swin_s_order_and_normalises_the_padding():
    merge = DiNATs.downsampler(2, dtype=torch.float64)
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64)
    padded = F.pad(x, (0, 0, 0, 1))
    phases = [padded[:, :, row::2, column::2] for column in (0, 1) for row in (0, 1)]
    expected = merge.reduction(merge.norm(torch.cat(phases, 1).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)
    torch.testing.assert_close(merge(x), expected)


@pytest.mark.parametrize("size", [(7, 9), (8, 9), (7, 10), (8, 12)])
def test_exported_patches_and_merging_are_those_of_eager_code(size, monkeypatch):
    for module, channels in ((DiNATs.downsampler(4), 4), (DiNATs.tokenizer(3, 8), 3)):
        x = torch.randn(2, channels, *size)
        expected = module(x)
        with monkeypatch.context() as patch:
            patch.setattr("visionattn.hosts.swin.is_exporting", lambda: True)
            patch.setattr("visionattn.hosts.parts.is_exporting", lambda: True)
            torch.testing.assert_close(module(x), expected)


def authors_names(state_dict, levels):
    """Our state dict under the authors' names: the inverse of the conversion, written independently of it."""
    renamed = {}
    for name, value in state_dict.items():
        parts = name.split(".")
        if parts[0] == "stem":
            parts[0] = "patch_embed"
        elif parts[0] == "head":
            parts = ["head", *parts[2:]]
        elif parts[0] == "stages":
            number = int(parts[1]) - (parts[2] == "downsample")
            parts = [levels, str(number), *parts[2:]]
        if parts[-1] == "gamma":
            parts = [*parts[:-2], "gamma" + parts[-2][-1]]
        renamed[".".join(parts)] = value
    return renamed


@each_layout
@pytest.mark.parametrize("nesting", ["state_dict", "model", None])
def test_authors_checkpoints_load_whole(cls, nesting):
    model = cls(**DILATED)
    theirs = authors_names(model.state_dict(), "layers" if cls is DiNATs else "levels")
    converted = checkpoint_filter_fn({nesting: theirs, "epoch": 3} if nesting else theirs, model)
    assert converted.keys() == model.state_dict().keys()


@pytest.mark.parametrize("kwargs", [dict(features_only=True), dict(num_classes=0)], ids=str)
def test_backbones_of_detectors_load_without_their_heads(kwargs, tmp_path, caplog):
    arguments = {k: v for k, v in DILATED.items() if k != "num_classes"}
    source = timm.create_model("dinat_mini", **arguments)
    theirs = {f"backbone.{n}": v for n, v in authors_names(source.state_dict(), "levels").items()}
    theirs = {n: v for n, v in theirs.items() if not n.startswith(("backbone.norm.", "backbone.head."))}
    theirs |= {f"backbone.norm{i}.weight": torch.ones(8 * 2**i) for i in range(4)}
    theirs |= {"neck.lateral_convs.0.conv.weight": torch.zeros(1), "rpn_head.rpn_conv.bias": torch.zeros(1)}
    torch.save({"state_dict": theirs, "meta": {}}, tmp_path / "detector.pth")
    overlay = dict(file=str(tmp_path / "detector.pth"))
    model = timm.create_model("dinat_mini", pretrained=True, pretrained_cfg_overlay=overlay, **arguments, **kwargs)
    assert "Unexpected" not in caplog.text
    x = torch.randn(1, 3, 64, 64)
    maps = model(x) if "features_only" in kwargs else model.forward_intermediates(x, intermediates_only=True)
    expected = source.eval().forward_intermediates(x, intermediates_only=True)
    for actual, reference in zip(maps, expected, strict=True):
        torch.testing.assert_close(actual, reference)
    with pytest.raises(RuntimeError, match="norm.weight"):  # a classifier is not in there
        timm.create_model("dinat_mini", pretrained=True, pretrained_cfg_overlay=overlay, **arguments)


def test_native_state_dict_passes_the_conversion_unchanged_even_without_head():
    model = NAT(**TINY)
    native = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    assert checkpoint_filter_fn(native, model) is native


@pytest.mark.parametrize("cls", [NAT, DiNATs])
@pytest.mark.parametrize("size", [(250, 230), (33, 65), (32, 32), (1, 1)])
def test_any_image_size(cls, size):
    model = cls(**DILATED).eval()
    assert model(torch.randn(1, 3, *size)).shape == (1, 5)


def test_small_maps_follow_the_argument():
    model = NAT(**dict(TINY, kernel_size=7), small_maps="pad").eval()
    x = torch.randn(1, 3, 96, 64)
    padded = model(x)
    for layer in attention(model):
        layer.small_maps = "shrink"
    assert not torch.allclose(model(x), padded, rtol=1e-3)
    with pytest.raises(ValueError, match="less than kernel_size"):
        NAT(**dict(TINY, kernel_size=7), small_maps="error")(x)


def test_rope_replaces_the_bias():
    model = NAT(**dict(TINY, num_heads=(1, 1, 2, 2)), position="rope").eval()
    assert not any(name.endswith("rpb") for name, _ in model.named_parameters())
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 5)


@pytest.mark.parametrize("cls", [NAT, DiNATs])
def test_maps_stay_channels_last_through_the_network(cls):
    model = cls(**TINY).eval()
    maps = model.forward_intermediates(torch.randn(2, 3, 64, 64), intermediates_only=True)
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in maps)
