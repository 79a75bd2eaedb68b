"""Bi-level routing attention as a layer: the authors' outputs, brute force, routing, sizes, bad arguments."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import gradcheck

from tests.parity import fixture_image, fixture_weights, load_fixture, relative_error
from visionattn.attention import BiLevelRoutingAttention, LePEAttention
from visionattn.backbones.biformer import checkpoint_filter_fn

ROUTED = {
    "op_bra": {},
    "op_bra_autopad": {},
    "op_bra_avgpool": {},
    "op_bra_soft_param_routing": {},
    "op_bra_nchw": dict(generation="nchw"),
    "op_bra_nchw_pad": dict(generation="nchw"),
}


def load(name, cls, **kwargs):
    """A layer with the weights of an operator's fixture, through the names of a whole checkpoint."""
    fixture = load_fixture(f"biformer/{name}")
    layer = cls(**fixture["model_kwargs"], **kwargs)
    prefix = "stages.0.0.attn."
    state = checkpoint_filter_fn({prefix + n: w for n, w in fixture_weights(fixture).items()}, layer)
    layer.load_state_dict({n.removeprefix("stages.0.blocks.0.attn."): w for n, w in state.items()})
    return fixture, layer.eval(), fixture_image(fixture).permute(0, 2, 3, 1)


def sampled(fixture, label):
    found = next(f for f in fixture["features"] if f["label"].startswith(label))
    return found["shape"], torch.tensor(found["index"]), torch.tensor(found["value"])


@pytest.mark.parametrize("exportable", [False, True])
@pytest.mark.parametrize("name", ROUTED)
def test_routed_attention_equals_the_authors(name, exportable):
    fixture, layer, x = load(name, BiLevelRoutingAttention, **ROUTED[name])
    layer.exportable = exportable
    with torch.no_grad():
        y = layer(x).permute(0, 3, 1, 2)
    assert relative_error(y, torch.tensor(fixture["output"]["values"])) < 1e-6  # rounding alone gives 2e-7


@pytest.mark.parametrize("name", [n for n in ROUTED if "nchw" not in n])
def test_regions_are_routed_as_by_the_authors(name):
    fixture, layer, x = load(name, BiLevelRoutingAttention)
    shape, index, values = sampled(fixture, "routing_index")
    grid = down, rows, across, columns = layer._grid(*x.shape[1:3])
    x = F.pad(x, (0, 0, 0, across * columns - x.shape[2], 0, down * rows - x.shape[1]))
    q, k, _ = layer.qkv(x).chunk(3, -1)
    routes, _ = layer._route(q, k, list(grid))
    assert list(routes.shape) == shape
    assert torch.equal(routes.flatten()[index], values.long())


@pytest.mark.parametrize(("name", "lepe"), [("op_attention_lepe", "input"), ("op_attention_lepe_nchw", "value")])
def test_full_attention_equals_the_authors(name, lepe):
    fixture, layer, x = load(name, LePEAttention, lepe=lepe)
    with torch.no_grad():
        y = layer(x).permute(0, 3, 1, 2)
    assert relative_error(y, torch.tensor(fixture["output"]["values"])) < 1e-6


def by_hand(layer, x):
    """The legacy form by loops over images, regions and heads, straight from its definition."""
    B, H, W, C = x.shape
    p, h, d = layer.windows, layer.num_heads, layer.qk_dim
    rows, columns = -(-H // p[0]), -(-W // p[1])
    x = F.pad(x, (0, 0, 0, p[1] * columns - W, 0, p[0] * rows - H))
    q, k, v = layer.qkv(x).split([d, d, C], -1)
    out = torch.zeros_like(v)
    places = [
        (slice(j * rows, (j + 1) * rows), slice(i * columns, (i + 1) * columns))
        for j in range(p[0])
        for i in range(p[1])
    ]
    for b in range(B):
        q_mean, k_mean = (torch.stack([t[(b, *s)].mean((0, 1)) for s in places]) for t in (q, k))
        if layer.param_routing:
            q_mean, k_mean = layer.router(q_mean), layer.router(k_mean)
        scores = (q_mean * layer.scale) @ k_mean.T
        for r, place in enumerate(places):
            best = scores[r].argsort(descending=True)[: layer.topk]
            factor = (
                (scores if layer.diff_routing else scores.detach())[r, best].softmax(0)
                if layer.soft_routing
                else torch.ones(layer.topk)
            )
            keys, values = [], []
            for j, f in zip(best.tolist(), factor, strict=True):
                for t, into in ((k, keys), (v, values)):
                    region = t[(b, *places[j])].permute(2, 0, 1)[None]
                    mode, n, m = layer.kv_downsample_mode, layer.kv_downsample_ratio, layer.kv_per_win
                    if mode != "identity":
                        pool = {"avgpool": F.avg_pool2d, "maxpool": F.max_pool2d}.get(mode)
                        adaptive = {"ada_avgpool": F.adaptive_avg_pool2d, "ada_maxpool": F.adaptive_max_pool2d}.get(
                            mode
                        )
                        region = pool(region, n) if pool else adaptive(region, m)
                    into.append(region[0].flatten(1).T * f)
            keys, values = torch.cat(keys), torch.cat(values)
            tokens = q[(b, *place)].flatten(0, 1)
            result = []
            for head in range(h):
                part, part_v = slice(head * d // h, (head + 1) * d // h), slice(head * C // h, (head + 1) * C // h)
                result.append((tokens[:, part] * layer.scale @ keys[:, part].T).softmax(-1) @ values[:, part_v])
            out[(b, *place)] = torch.cat(result, -1).view(rows, columns, C)
    if layer.has_lepe:
        side = layer.lepe.weight.shape[-1]
        conv = F.conv2d(v.permute(0, 3, 1, 2), layer.lepe.weight, layer.lepe.bias, padding=side // 2, groups=C)
        out = out + conv.permute(0, 2, 3, 1)
    return layer.wo(out)[:, :H, :W]


OPTIONS = [
    dict(),
    dict(topk=9),
    dict(qk_dim=4, num_heads=2),
    dict(qk_dim=16, qk_scale=0.3),
    dict(side_dwconv=0, param_attention="qkv"),
    dict(kv_downsample_mode="maxpool", kv_downsample_ratio=2),
    dict(kv_downsample_mode="avgpool", kv_downsample_ratio=3),
    dict(kv_downsample_mode="ada_avgpool", kv_per_win=2),
    dict(kv_downsample_mode="ada_maxpool", kv_per_win=3, soft_routing=True),
    dict(soft_routing=True),
    dict(soft_routing=True, diff_routing=True, topk=9),
    dict(soft_routing=True, diff_routing=True, param_routing=True, side_dwconv=3),
]


@pytest.mark.parametrize("size", [(12, 15), (22, 17)], ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_equals_loops(options, size):
    layer = BiLevelRoutingAttention(**{"dim": 8, "num_heads": 4, "n_win": 3, "topk": 2, "auto_pad": True} | options)
    layer = layer.double().eval()
    x = torch.randn(2, *size, 8, dtype=torch.float64, requires_grad=True)
    parameters = [x, *layer.parameters()]
    results = []
    for exportable in (False, True, None):
        layer.exportable = bool(exportable)
        y = by_hand(layer, x) if exportable is None else layer(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), parameters)])
    torch.testing.assert_close(results[0], results[2])
    torch.testing.assert_close(results[1], results[2])


def test_second_generation_cuts_more_regions_and_pads_after_the_projection():
    layer = BiLevelRoutingAttention(8, 2, n_win=4, topk=3, generation="nchw").double()
    x = torch.randn(1, 13, 10, 8, dtype=torch.float64)
    seven = BiLevelRoutingAttention(8, 2, generation="nchw")
    assert seven._grid(64, 48) == [8, 9, 8, 6] and seven._grid(16, 12) == [8, 2, 12, 1]
    assert layer._grid(13, 10) == [5, 3, 5, 2]
    q, k, v = (F.pad(t, (0, 0, 0, 0, 0, 2)) for t in layer.qkv(x).chunk(3, -1))  # 5 x 5 regions
    places = [(slice(j * 3, j * 3 + 3), slice(i * 2, i * 2 + 2)) for j in range(5) for i in range(5)]
    means = []
    for t in (q, k):
        counts = [(min(s[0].stop, 13) - s[0].start) * 2 for s in places]
        means.append(torch.stack([t[(0, *s)].sum((0, 1)) / n for s, n in zip(places, counts, strict=True)]))
    out = torch.zeros_like(v)
    for r, place in enumerate(places):
        best = (means[0][r] @ means[1].T).topk(3).indices.tolist()
        keys, values = (torch.cat([t[(0, *places[j])].flatten(0, 1) for j in best]) for t in (k, v))
        for part in (slice(0, 4), slice(4, 8)):
            weights = (q[(0, *place)][..., part] @ keys[:, part].T * 8**-0.5).softmax(-1)
            out[(0, *place)][..., part] = weights @ values[:, part]
    expected = layer.wo(out[:, :13] + layer.lepe(layer.qkv(x)[..., 16:]))
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (3, 3), (6, 13)], ids=str)
def test_second_generation_attends_everywhere_on_maps_smaller_than_its_windows(size):
    layer = BiLevelRoutingAttention(8, 2, n_win=7, topk=16, generation="nchw").double()
    x = torch.randn(1, *size, 8, dtype=torch.float64)
    y = layer(x)
    if size[0] * size[1] <= 16:
        q, k, v = (t.flatten(1, 2).unflatten(-1, (2, 4)).transpose(1, 2) for t in layer.qkv(x).chunk(3, -1))
        full = F.scaled_dot_product_attention(q, k, v, scale=8**-0.5).transpose(1, 2).reshape(x.shape)
        torch.testing.assert_close(y, layer.wo(full + layer.lepe(layer.qkv(x)[..., 16:])))
    assert y.shape == x.shape


def test_generations_agree_where_the_windows_divide_the_map():
    legacy = BiLevelRoutingAttention(8, 2, n_win=4, topk=3)
    other = BiLevelRoutingAttention(8, 2, n_win=4, topk=3, generation="nchw")
    other.load_state_dict(legacy.state_dict())
    x = torch.randn(2, 16, 20, 8)
    torch.testing.assert_close(other(x), legacy(x), rtol=1e-5, atol=1e-6)


def test_padding_changes_nothing_where_the_windows_divide_the_map():
    layer = BiLevelRoutingAttention(8, 2, n_win=4, topk=3)
    x = torch.randn(2, 16, 20, 8)
    expected = layer(x)
    layer.auto_pad = True
    assert torch.equal(layer(x), expected)


def test_no_gradient_flows_through_routing_unless_asked():
    x = torch.randn(1, 12, 12, 8)
    for diff in (False, True):
        layer = BiLevelRoutingAttention(8, 2, n_win=3, topk=3, soft_routing=True, diff_routing=diff)
        q, k, _ = layer.qkv(x).split(8, -1)
        assert layer._route(q, k, layer._grid(*q.shape[1:3]))[1].requires_grad == diff


def test_number_of_windows_can_be_changed_at_any_time():
    layer = BiLevelRoutingAttention(8, 2, n_win=7, topk=4).eval()
    x = torch.randn(1, 16, 32, 8)
    with pytest.raises(ValueError, match=re.escape("n_win = [7, 7] must divide the map of 16 x 32")):
        layer(x)
    layer.n_win = (4, 8)
    fresh = BiLevelRoutingAttention(8, 2, n_win=(4, 8), topk=4)
    fresh.load_state_dict(layer.state_dict())
    torch.testing.assert_close(layer(x), fresh(x))
    sized = BiLevelRoutingAttention(8, 2, region_size=4, topk=4)
    sized.load_state_dict(layer.state_dict())
    torch.testing.assert_close(sized(x), layer(x))
    assert layer.n_win == [4, 8] and "n_win=[4, 8]" in repr(layer) and "region_size=[4, 4]" in repr(sized)
    with pytest.raises(ValueError, match="at least topk = 4 regions, got 1"):
        layer.n_win = 1


def test_regions_of_a_fixed_size_follow_the_map():
    layer = BiLevelRoutingAttention(8, 2, region_size=(4, 2), topk=6, auto_pad=True).eval()
    for size in ((16, 8), (5, 3), (30, 41)):
        assert layer(torch.randn(1, *size, 8)).shape == (1, *size, 8)


def test_routing_is_made_in_full_precision_under_autocast():
    layer = BiLevelRoutingAttention(16, 2, n_win=7, topk=4)
    q, k = torch.randn(2, 2, 28, 28, 16)
    expected = layer._route(q, k, layer._grid(*q.shape[1:3]))[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer._route(q, k, layer._grid(*q.shape[1:3]))[0], expected)


@pytest.mark.parametrize("options", [dict(), dict(soft_routing=True, diff_routing=True, param_routing=True)], ids=str)
def test_derivatives_in_float64(options):
    layer = BiLevelRoutingAttention(4, 2, n_win=4, topk=2, auto_pad=True, **options).double()
    x = torch.randn(1, 15, 18, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(layer, x, fast_mode=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(num_heads=3), "num_heads must divide dim = 8 and qk_dim = 8, got 3"),
        (dict(qk_dim=6, num_heads=4), "num_heads must divide dim = 8 and qk_dim = 6, got 4"),
        (dict(topk=50), "topk must be from 1 to the number of regions, 49, got 50"),
        (dict(topk=0), "topk must be from 1 to the number of regions, 49, got 0"),
        (dict(n_win=0), "n_win must be a positive integer or two, rows and columns, got 0"),
        (dict(n_win=(7, 7, 7)), "n_win must be a positive integer or two"),
        (dict(region_size=2.5), "region_size must be an integer or a list, got 2.5"),
        (dict(kv_downsample_mode="fracpool"), "kv_downsample_mode must be one of identity, avgpool"),
        (
            dict(kv_downsample_mode="avgpool", kv_downsample_ratio=0),
            "kv_downsample_ratio must be a positive",
        ),
        (dict(side_dwconv=4), "side_dwconv must be odd, or 0 for no convolution, got 4"),
        (dict(param_routing=True), "param_routing=True needs diff_routing=True"),
        (dict(diff_routing=True), "diff_routing=True needs soft_routing=True"),
        (dict(param_attention="kv"), "param_attention must be one of qkvo, qkv, got 'kv'"),
        (dict(generation="first"), "generation must be one of legacy, nchw, got 'first'"),
        (dict(generation="nchw", soft_routing=True), "generation='nchw' has no"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        BiLevelRoutingAttention(**{"dim": 8, "num_heads": 2} | arguments)


def test_bad_inputs_are_named():
    layer = BiLevelRoutingAttention(8, 2, kv_downsample_mode="maxpool", kv_downsample_ratio=3)
    with pytest.raises(ValueError, match=re.escape("x must be a map [B, H, W, C], got shape")):
        layer(torch.randn(2, 49, 8))
    with pytest.raises(ValueError, match=re.escape("n_win = [7, 7] must divide the map of 15 x 14 positions")):
        layer(torch.randn(2, 15, 14, 8))
    with pytest.raises(ValueError, match="kv_downsample_ratio must not exceed the region, 2 x 2, got 3"):
        layer(torch.randn(2, 14, 14, 8))
    for arguments in (dict(lepe="query"), dict(side_dwconv=2), dict(num_heads=3)):
        with pytest.raises(ValueError, match=next(iter(arguments))):
            LePEAttention(8, **arguments)
