"""What parity cannot see of BiFormer: sizes, windows, initialisation, eps, names of checkpoints, the plain network."""

import re

import pytest
import timm
import torch
from torch import nn

import visionattn  # noqa: F401
from tests.parity import fixture_image, fixture_weights, load_fixture, relative_error
from visionattn.attention import BiLevelRoutingAttention, LePEAttention
from visionattn.backbones.biformer import BiFormer, checkpoint_filter_fn
from visionattn.benchmark.models import randomize_
from visionattn.benchmark.plain import biformer as plain_biformer
from visionattn.weights.locate import cache_name

PARAMETERS = {
    "biformer_tiny": 13_142_760,
    "biformer_small": 25_536_232,
    "biformer_base": 56_804_968,
    "biformer_stl": 28_372_552,
    "biformer_stl_nchw": 28_372_552,
}
TINY = dict(embed_dims=(32, 64, 96, 128), depths=(1, 1, 2, 1), num_classes=5)
LAYOUTS = {
    "biformer": dict(TINY),
    "stl": dict(TINY, layout="swin"),
    "stl_nchw": dict(TINY, layout="swin", generation="nchw", topks=(1, 4, 16, -1)),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS)


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_models(name):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
    routed = [m for m in model.modules() if isinstance(m, BiLevelRoutingAttention)]
    assert {(m.dim // m.num_heads, m.n_win) for m in routed} == {(32, 7)}
    assert all(m.scale == m.dim**-0.5 for m in routed)
    nchw = name.endswith("nchw")
    assert {m.generation for m in routed} == {"nchw" if nchw else "legacy"}
    full = [m for m in model.modules() if isinstance(m, LePEAttention)]
    assert {(m.num_heads, m.lepe_of) for m in full} == {(8, "value" if nchw else "input")}
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert {m.eps for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-5}
    assert [stage.blocks[0].attn.topk for stage in model.stages[:3]] == [1, 4, 16]
    cfg = model.pretrained_cfg
    assert cfg["crop_pct"] == 0.875 and cfg["interpolation"] == "bicubic" and cfg["mean"] == (0.485, 0.456, 0.406)


def test_initialisation():
    torch.manual_seed(0)
    legacy, nchw = BiFormer(**LAYOUTS["stl"]), BiFormer(**LAYOUTS["stl_nchw"])
    weights = [
        torch.cat([p.flatten() for n, p in m.named_parameters() if "fc1.weight" in n]).detach() for m in (legacy, nchw)
    ]
    assert weights[0].std() == pytest.approx(0.02, rel=0.03)
    assert weights[1].std() > 0.05  # a 1x1 convolution to the authors: PyTorch's own
    for model in (legacy, nchw):
        assert model.head.fc.weight.detach().std() == pytest.approx(0.02, rel=0.1) and not model.head.fc.bias.any()
    assert not legacy.stages[0].blocks[0].attn.qkv.bias.any() and nchw.stages[0].blocks[0].attn.qkv.bias.any()


def test_stochastic_depth_rises_linearly():
    model = BiFormer(**TINY, drop_path_rate=0.4)
    rates = [block.residual1.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


@each_layout
@pytest.mark.parametrize("size", [(250, 230), (33, 65), (5, 1)], ids=str)
def test_any_image_size(layout, size):
    model = BiFormer(**LAYOUTS[layout]).eval()
    maps = model.forward_intermediates(torch.randn(1, 3, *size), intermediates_only=True)
    assert model(torch.randn(1, 3, *size)).shape == (1, 5)
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in maps)


def test_windows_can_be_set_for_dense_tasks():
    model = BiFormer(**TINY).eval()
    x = torch.randn(1, 3, 128, 256)
    model.set_n_win((4, 8))
    fresh = BiFormer(**TINY, n_win=(4, 8)).eval()
    sized = BiFormer(**TINY, region_sizes=(8, 4, 2, 1)).eval()
    for other in (fresh, sized):
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(other(x), model(x))
    with pytest.raises(ValueError, match="at least topk = 16 regions, got 3"):
        model.set_n_win(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(layout="vit"), "layout must be one of biformer, swin, got 'vit'"),
        (dict(generation="third"), "generation must be one of legacy, nchw, got 'third'"),
        (dict(topks=(1, 4, 16)), "one entry a stage, got embed_dims 4, depths 4, topks 3"),
        (dict(region_sizes=(8, 4)), "region_sizes must have 4 values"),
        (dict(topks=(1, 4, 50, -2)), "topk must be from 1 to the number of regions, 49, got 50"),
        (dict(topks=(1, 4, 16, 0)), "topk must be from 1 to the number of regions, 49, got 0"),
        (dict(generation="nchw"), "topk must be from 1 to the number of regions, 49, got -2"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BiFormer(**dict(TINY, **arguments), device="meta")


def plain(layout):
    swin, nchw = layout != "biformer", layout == "stl_nchw"
    network = plain_biformer.PlainBiFormer(TINY["embed_dims"], TINY["depths"], 3, swin, nchw)
    network.head = nn.Linear(TINY["embed_dims"][-1], 5)
    return randomize_(network)


@each_layout
@pytest.mark.parametrize("nesting", ["model", "state_dict", None])
def test_authors_checkpoints_load_whole(layout, nesting):
    model = BiFormer(**LAYOUTS[layout])
    theirs = plain(layout).state_dict()
    converted = checkpoint_filter_fn({nesting: theirs, "epoch": 3} if nesting else theirs, model)
    model.load_state_dict(converted)
    assert checkpoint_filter_fn(converted, model) is converted
    headless = {n: v for n, v in converted.items() if not n.startswith("head.")}
    assert checkpoint_filter_fn(headless, model) is headless


def test_every_name_of_the_authors_is_converted():
    for name in ("biformer_tiny", "biformer_stl_nchw"):
        fixture = load_fixture(f"biformer/{name}")
        theirs = {n: torch.empty(shape, device="meta") for n, shape in fixture["params"]}
        ours = {n: t for n, t in timm.create_model(name, device="meta").state_dict().items() if "num_batches" not in n}
        converted = checkpoint_filter_fn(theirs, None)
        assert {n: t.shape for n, t in converted.items()} == {n: t.shape for n, t in ours.items()}
    options = {"stages.0.1.attn.router.emb.weight": torch.ones(2, 2), "stages.0.1.gamma1": torch.ones(2)}
    converted = checkpoint_filter_fn(options, None)
    assert set(converted) == {"stages.0.blocks.1.attn.router.weight", "stages.0.blocks.1.residual1.gamma"}


@pytest.mark.parametrize("kwargs", [dict(features_only=True), dict(num_classes=0)], ids=str)
def test_backbones_of_detectors_load_without_their_norms(kwargs, tmp_path, caplog):
    arguments = {k: v for k, v in TINY.items() if k != "num_classes"}
    network = plain("biformer")
    theirs = {f"backbone.{n}": v for n, v in network.state_dict().items() if not n.startswith(("norm.", "head."))}
    theirs |= {f"backbone.extra_norms.{i}.weight": torch.ones(dim) for i, dim in enumerate(TINY["embed_dims"])}
    theirs |= {"neck.lateral_convs.0.conv.weight": torch.zeros(1)}
    torch.save({"state_dict": theirs, "meta": {}}, tmp_path / "detector.pth")
    overlay = dict(file=str(tmp_path / "detector.pth"))
    model = timm.create_model("biformer_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **arguments, **kwargs)
    assert "Unexpected" not in caplog.text
    x = torch.randn(1, 3, 64, 64)
    maps = (
        model.eval()(x) if "features_only" in kwargs else model.eval().forward_intermediates(x, intermediates_only=True)
    )
    whole = BiFormer(**TINY).eval()
    whole.load_state_dict(checkpoint_filter_fn(network.state_dict(), whole))
    for actual, expected in zip(maps, whole.forward_intermediates(x, intermediates_only=True), strict=True):
        torch.testing.assert_close(actual, expected)


def test_downloads_that_share_a_file_name_do_not_share_a_cache_entry():
    urls = {f"{name}.in1k": timm.get_pretrained_cfg(name).url for name in PARAMETERS}
    assert {url.rpartition("/")[2] for url in urls.values()} == {"content"}
    assert len({cache_name(url, name) for name, url in urls.items()}) == len(PARAMETERS)


def test_plain_network_reproduces_the_authors_recorded_output():
    for name in ("biformer_tiny", "biformer_stl_nchw"):
        fixture = load_fixture(f"biformer/{name}")
        network = plain_biformer.build(name).eval()
        network.load_state_dict(fixture_weights(fixture), strict=False)
        names = {n for n in network.state_dict() if not n.endswith("batches_tracked")}
        assert names == {n for n, _ in fixture["params"]}
        with torch.inference_mode():
            output = network(fixture_image(fixture)[:1])
        assert relative_error(output, torch.tensor(fixture["output"]["values"])[:1]) < 1e-6


@each_layout
def test_plain_network_equals_ours_forward_and_gradients(layout):
    theirs, ours = plain(layout).double(), BiFormer(**LAYOUTS[layout]).double()
    ours.load_state_dict(checkpoint_filter_fn(theirs.state_dict(), ours))
    x = torch.randn(1, 3, 112, 112, dtype=torch.float64)
    outputs = [model.eval()(x) for model in (theirs, ours)]
    for out in outputs:
        out.square().sum().backward()
    torch.testing.assert_close(outputs[1], outputs[0])
    grads = checkpoint_filter_fn({name: p.grad for name, p in theirs.named_parameters()}, ours)
    torch.testing.assert_close({n: p.grad for n, p in ours.named_parameters()}, dict(grads))
