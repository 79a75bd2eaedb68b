"""The hosts and the mixers inside them: what parity and the contract cannot see."""

import warnings

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import visionattn
from tests.parity import relative_error
from visionattn.attention import (
    AgentAttention,
    CrossShapedAttention,
    FocusedLinearAttention,
    InLineAttention,
    Mixer,
    PolarityAwareAttention,
    SimplifiedLinearAttention,
    SoftmaxMixer,
    SpatialReductionAttention,
    WindowAttention,
)
from visionattn.hosts import PVT, ClassTokenPVT, CSwin, DeiT, DeiTGrid, PVTv2, Swin
from visionattn.hosts.release import checkpoint_filter_fn, fit_table
from visionattn.kernels import agent
from visionattn.layers.norms import PRepBN

# Exact, as counted on the authors' code.
PARAMETERS = {
    "agent_deit_t": 6_015_640,
    "agent_deit_s": 22_647_112,
    "agent_deit_s_448": 23_070_472,
    "agent_deit_b": 87_204_904,
    "agent_pvt_t": 11_570_352,
    "agent_pvt_s": 20_635_066,
    "agent_pvt_m": 35_921_746,
    "agent_pvt_m_256": 36_083_682,
    "agent_pvt_l": 48_738_180,
    "agent_swin_t": 28_902_964,
    "agent_swin_s": 49_666_684,
    "agent_swin_s_288": 49_707_964,
    "agent_swin_b": 88_095_096,
    "agent_swin_b_384": 88_305_016,
    "agent_cswin_t": 20_458_672,
    "agent_cswin_s": 32_814_100,
    "agent_cswin_b": 73_249_696,
    "agent_cswin_b_384": 73_328_416,
    "inline_deit_t": 6_477_736,
    "inline_deit_s": 16_734_760,
    "inline_deit_b": 23_797_096,
    "inline_pvt_t": 12_032_232,
    "inline_pvt_s": 21_556_136,
    "inline_pvt_m": 37_618_856,
    "inline_pvt_l": 51_154_280,
    "inline_swin_t": 29_223_544,
    "inline_swin_s": 49_793_296,
    "inline_swin_b": 88_350_120,
    "inline_swin_b_384": 88_465_320,
    "inline_cswin_t": 20_604_520,
    "inline_cswin_s": 33_032_872,
    "inline_cswin_b": 73_413_640,
    "inline_cswin_b_384": 73_413_640,
    "flatten_pvt_t": 12_150_504,
    "flatten_pvt_s": 21_670_248,
    "flatten_pvt_m": 37_242_216,
    "flatten_pvt_l": 50_649_192,
    "flatten_pvt_v2_b0": 3_594_824,
    "flatten_pvt_v2_b1": 12_931_240,
    "flatten_pvt_v2_b2": 22_548_264,
    "flatten_pvt_v2_b3": 38_273_832,
    "flatten_pvt_v2_b4": 51_836_968,
    "flatten_swin_t": 29_192_384,
    "flatten_swin_s": 50_510_288,
    "flatten_swin_b": 88_972_488,
    "flatten_swin_b_384": 91_433_928,
    "flatten_cswin_t": 21_201_768,
    "flatten_cswin_s": 35_451_752,
    "flatten_cswin_b": 74_867_032,
    "flatten_cswin_b_384": 78_369_112,
    "pola_pvt_t": 12_924_648,
    "pola_pvt_s": 23_157_224,
    "pola_pvt_m": 39_965_672,
    "pola_pvt_l": 54_366_568,
    "pola_swin_t": 29_285_696,
    "pola_swin_s": 50_603_600,
    "pola_swin_b": 89_137_864,
    "slab_deit_t": 6_198_401,
    "slab_deit_s": 22_992_641,
    "slab_pvt_t": 12_157_692,
    "slab_pvt_s": 21_683_788,
    "slab_pvt_m": 37_267_300,
    "slab_swin_t": 29_216_605,
    "slab_swin_s": 50_552_965,
    "slab_swin_b": 89_029_373,
    "slab_cswin_t": 21_227_807,
    "slab_cswin_s": 35_494_205,
    "prepbn_deit_t": 5_717_441,
    "prepbn_deit_s": 22_069_889,
    "prepbn_pvt_t": 13_239_554,
    "prepbn_pvt_s": 24_507_801,
    "prepbn_pvt_m": 44_253_117,
    "prepbn_swin_t": 28_288_383,
}
PYRAMID = dict(num_heads=(2, 2, 2, 2), depths=(1, 1, 1, 1), num_classes=5, img_size=64)
HOSTS = {
    Swin: dict(PYRAMID, embed_dim=8, window_size=3),
    CSwin: dict(PYRAMID, embed_dim=8),
    PVT: dict(PYRAMID, embed_dims=(8, 8, 8, 8)),
    PVTv2: dict(PYRAMID, embed_dims=(8, 8, 8, 8)),
    DeiT: dict(embed_dim=8, depth=2, num_heads=2, num_classes=5, img_size=64),
    DeiTGrid: dict(embed_dim=8, depth=2, num_heads=2, num_classes=5, img_size=64),
}
# Every exported mixer, but for the base class and those that hosts have of their own.
OWN = {Mixer, SoftmaxMixer, WindowAttention, CrossShapedAttention}
LAYERS = [getattr(visionattn.attention, name) for name in visionattn.attention.__all__]
MIXERS = [cls for cls in LAYERS if isinstance(cls, type) and issubclass(cls, Mixer) and cls not in OWN]


def randomize_(module: nn.Module) -> nn.Module:
    """Tables and biases off their neutral initial values."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module.eval()


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count(name):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("mixer", MIXERS)
def test_every_host_takes_every_mixer_at_every_size(host, mixer):
    model = host(mixer=f"visionattn.attention.{mixer.__name__}", **HOSTS[host]).eval()
    assert any(isinstance(module, mixer) for module in model.modules())
    for size in ((70, 50), (20, 100)):
        assert model(torch.randn(1, 3, *size)).shape == (1, 5)


@pytest.mark.slow
@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("mixer", [None, *MIXERS])
@pytest.mark.parametrize("norm", ["layernorm", "prepbn"])
def test_every_combination_scripts_compiles_and_exports(host, mixer, norm):
    x = torch.randn(2, 3, 64, 64)
    with timm.layers.set_scriptable(True):
        scriptable = host(mixer=mixer, norm_layer=norm, **HOSTS[host]).eval()
    model = host(mixer=mixer, norm_layer=norm, **HOSTS[host]).eval()
    model.load_state_dict(scriptable.state_dict())
    expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated, timm's clients still use it
        torch.testing.assert_close(torch.jit.script(scriptable)(x), expected)
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
    torch.compiler.reset()  # or the code shared by all cases reaches the limit of recompilations
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected, rtol=1e-4, atol=1e-5)


class Roll(Mixer):
    """A mixer of one line, as a user would write it."""

    def attend(self, q, k, v, H, W, context):
        return v.roll(1, 1)


@pytest.mark.parametrize("host", HOSTS)
def test_a_mixer_of_one_s_own_works_in_every_host(host):
    model = host(mixer=Roll, **HOSTS[host])
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad) or host is DeiT


def test_mixers_take_the_first_blocks_of_a_stage():
    model = Swin(mixer=Roll, mixer_depths=(None, 0, 2, 1), **dict(HOSTS[Swin], depths=(2, 2, 3, 1)))
    kinds = [[type(block.attn) is Roll for block in stage.blocks] for stage in model.stages]
    assert kinds == [[True, True], [False, False], [True, True, False], [True]]


@pytest.mark.parametrize(
    ("host", "mixer", "lacks"), [(Swin, "hedgehog", "input_size"), (CSwin, "window", "lepe, stream")]
)
def test_a_mixer_that_does_not_fit_a_host_is_refused(host, mixer, lacks):
    with pytest.raises(ValueError, match=f"mixer '{mixer}' does not fit this host.* it has no {lacks}"):
        host(mixer=mixer)


def test_unsuitable_arguments_raise():
    with pytest.raises(ValueError, match="nowhere"):
        Swin(mixer="nowhere.Attention", **HOSTS[Swin])
    with pytest.raises(ValueError, match="'visionattn.attention.agent' is a module, no layer of ours"):
        Swin(mixer="visionattn.attention.agent", **HOSTS[Swin])
    with pytest.raises(ValueError, match="mixer_depths.*0 to 1.*2"):
        Swin(mixer=Roll, mixer_depths=(2, 1, 1, 1), **HOSTS[Swin])
    with pytest.raises(ValueError, match="one entry a stage, 4"):
        Swin(mixer=Roll, mixer_depths=(1, 1), **HOSTS[Swin])
    with pytest.raises(ValueError, match="norm_layer.*batchnorm"):
        Swin(norm_layer="batchnorm", **HOSTS[Swin])
    with pytest.raises(ValueError, match="num_heads.*8.*3"):
        Roll(8, 3)
    with pytest.raises(ValueError, match="num_agents.*square.*8"):
        AgentAttention(8, 2, num_agents=8)
    with pytest.raises(ValueError, match="agent_shape.*0"):
        AgentAttention(8, 2, agent_shape=0)
    with pytest.raises(ValueError, match="window_size.*0"):
        WindowAttention(8, 2, window_size=0)
    with pytest.raises(ValueError, match="split_size.*0"):
        CrossShapedAttention(8, 2, split_size=0)
    with pytest.raises(ValueError, match="num_heads.*even.*1"):
        CrossShapedAttention(8, 1, split_size=2)
    with pytest.raises(ValueError, match="sr_ratio.*0"):
        SpatialReductionAttention(8, 2, sr_ratio=0)


@pytest.mark.parametrize("host", HOSTS)
def test_norm_eps_follows_the_authors(host):
    eps = {m.eps for m in host(**HOSTS[host]).modules() if isinstance(m, nn.LayerNorm)}
    assert eps == {Swin: {1e-5}, CSwin: {1e-5}, PVT: {1e-5, 1e-6}, PVTv2: {1e-5, 1e-6}}.get(host, {1e-6})


def test_prepbn_schedules_follow_the_authors():
    steps = {}
    for name in ("slab_deit_t", "slab_swin_t", "slab_cswin_t", "slab_pvt_t", "prepbn_deit_s", "prepbn_pvt_s"):
        model = timm.create_model(name, device="meta")
        steps[name] = {m.steps for m in model.modules() if isinstance(m, PRepBN)}
    assert list(steps.values()) == [{60_000}, {60_000}, {120_000}, {300_000}, {300_000}, {300_000}]
    for name in ("prepbn_deit_t", "prepbn_swin_t"):
        assert not any(isinstance(m, PRepBN) for m in timm.create_model(name, device="meta").modules())


# --- mixers against the formulas -------------------------------------------------------------------------------------


def heads(x, h):
    return x.unflatten(-1, (h, -1)).transpose(1, 2)


@pytest.mark.parametrize("prefix", [0, 1])
@pytest.mark.parametrize("size", [(6, 6), (5, 8), (3, 2)])
def test_agent_attention_is_its_formula_on_maps_of_any_size(prefix, size):
    H, W = size
    mixer = AgentAttention(8, 2, 4, agent_shape=(3, 2), input_size=(6, 6), num_prefix_tokens=prefix).double()
    randomize_(mixer)
    x = torch.randn(2, prefix + H * W, 8, dtype=torch.float64)
    q, k, v = mixer.qkv(x).chunk(3, -1)
    agents = F.adaptive_avg_pool2d(q[:, prefix:].transpose(1, 2).unflatten(2, size), (3, 2)).flatten(2).transpose(1, 2)

    def bias(coarse, rows, columns):  # tables [h, M, 7, 7] and [h, M, 6, 6] to [h, 6 agents, N]
        both = (F.interpolate(t, size, mode="bilinear") for t in (coarse, rows + columns))
        table = sum(both).flatten(2).transpose(1, 2).unflatten(2, (2, 2))
        return F.interpolate(table, (3, 2), mode="bilinear").flatten(2).transpose(1, 2)

    to_agents = bias(mixer.an_bias, mixer.ah_bias[0], mixer.aw_bias[0])
    sides = (t[0].permute(0, 3, 1, 2) for t in (mixer.ha_bias, mixer.wa_bias))
    to_tokens = bias(mixer.na_bias, *sides).transpose(1, 2)
    if prefix:
        ac = F.interpolate(mixer.ac_bias[0].transpose(1, 2).unflatten(2, (2, 2)), (3, 2), mode="bilinear")
        ca = F.interpolate(mixer.ca_bias[0].unflatten(2, (2, 2)), (3, 2), mode="bilinear")
        to_agents = torch.cat([ac.flatten(2).transpose(1, 2), to_agents], 2)
        to_tokens = torch.cat([ca.flatten(2), to_tokens], 1)
    q, k, values, agents = (heads(t, 2) for t in (q, k, v, agents))
    pooled = (agents @ k.mT / 2 + to_agents).softmax(-1) @ values
    y = ((q @ agents.mT / 2 + to_tokens).softmax(-1) @ pooled).transpose(1, 2).flatten(2)
    local = v[:, prefix:].transpose(1, 2).unflatten(2, size)
    local = F.conv2d(local, mixer.dwc.weight, mixer.dwc.bias, padding=1, groups=8).flatten(2).transpose(1, 2)
    y = y + F.pad(local, (0, 0, prefix, 0))
    torch.testing.assert_close(mixer(x, size), mixer.proj(y))
    if not prefix:
        torch.testing.assert_close(mixer(x.unflatten(1, size)), mixer.proj(y).unflatten(1, size))


@pytest.mark.parametrize("prefix", [0, 1])
def test_agent_attention_with_many_tokens_an_agent_is_the_same(monkeypatch, prefix):
    layer = randomize_(AgentAttention(12, 3, 1, input_size=(9, 8), num_prefix_tokens=prefix)).double()
    x = torch.randn(2, prefix + 72, 12, dtype=torch.float64, requires_grad=True)
    outputs, gradients = [], []
    for many in (64, 10**6):
        monkeypatch.setattr(agent, "MANY_TOKENS", many)
        y = layer(x, (9, 8))
        with torch.no_grad():
            torch.testing.assert_close(layer(x, (9, 8)), y)
        outputs.append(y)
        gradients.append(torch.autograd.grad(y.square().sum(), [x, *layer.parameters()]))
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("prefix", [0, 1])
def test_inline_attention_is_its_formula(prefix):
    mixer = randomize_(InLineAttention(8, 2, num_prefix_tokens=prefix).double())
    x = torch.randn(2, prefix + 12, 8, dtype=torch.float64)
    q, k, v = mixer.qkv(x).chunk(3, -1)
    N = x.shape[1]
    qh, kh, vh = (heads(t, 2) for t in (q, k, v))
    a = qh @ kh.mT / 2 / N
    weights = a - a.mean(-1, keepdim=True) + 1 / N
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, N, dtype=torch.float64))
    y = (weights @ vh).transpose(1, 2).flatten(2)
    filters = mixer.residual(x.mean(1)[..., None]).view(2, 8, 1, 3, 3)
    maps = v[:, prefix:].transpose(1, 2).unflatten(2, (3, 4))
    local = torch.cat([F.conv2d(m[None], f, padding=1, groups=8) for m, f in zip(maps, filters, strict=True)])
    y = y + F.pad(local.flatten(2).transpose(1, 2), (0, 0, prefix, 0))
    torch.testing.assert_close(mixer(x, (3, 4)), mixer.proj(y))


@pytest.mark.parametrize("cls", [FocusedLinearAttention, SimplifiedLinearAttention])
@pytest.mark.parametrize("lepe", [False, True])
def test_positioned_linear_attention_is_its_formula(cls, lepe):
    mixer = randomize_(cls(8, 2, input_size=(3, 4), lepe=lepe).double())
    x = torch.randn(2, 3, 4, 8, dtype=torch.float64)
    q, k, v = mixer.qkv(x.flatten(1, 2)).chunk(3, -1)
    k = k + mixer.positional_encoding.flatten(1, 2)
    if cls is FocusedLinearAttention:
        q, k = ((t.relu() + 1e-6) / F.softplus(mixer.temperature) for t in (q, k))
        q, k = (t**3 / (t**3).norm(dim=-1, keepdim=True) * t.norm(dim=-1, keepdim=True) for t in (q, k))
    similarity = heads(q.relu(), 2) @ heads(k.relu(), 2).mT
    count = 12 if cls is FocusedLinearAttention else 1  # where eps counts: the mean, the sum
    weights = similarity / (similarity.sum(-1, keepdim=True) + 1e-6 * count)
    y = (weights @ heads(v, 2)).transpose(1, 2).flatten(2)
    by_head = v.view(2, 12, 2, 4).permute(0, 2, 3, 1).reshape(4, 4, 3, 4)
    local = F.conv2d(by_head, mixer.dwc.weight, mixer.dwc.bias, padding=2, groups=4).reshape(2, 8, 12).transpose(1, 2)
    y = y + local
    if lepe:
        y = y + mixer.get_v(v.unflatten(1, (3, 4))).flatten(1, 2)
    torch.testing.assert_close(mixer(x), mixer.proj(y).view(2, 3, 4, 8))


@pytest.mark.parametrize("prefix", [0, 2])
def test_polarity_aware_attention_is_its_formula(prefix):
    mixer = randomize_(PolarityAwareAttention(8, 2, input_size=(3, 4), num_prefix_tokens=prefix).double())
    x = torch.randn(2, prefix + 12, 8, dtype=torch.float64)
    q, k, v = mixer.qkv(x).chunk(3, -1)
    k = k + mixer.positions(3, 4)
    q, k, v = (heads(t, 2) for t in (q / F.softplus(mixer.temperature), k / F.softplus(mixer.temperature), v))
    power = 1 + 4 * torch.sigmoid(mixer.power)
    (q1, q2), (k1, k2) = ((t.relu() ** power, (-t).relu() ** power) for t in (q, k))
    same, opposite = q1 @ k1.mT + q2 @ k2.mT, q2 @ k1.mT + q1 @ k2.mT
    halves = zip((same, opposite), v.chunk(2, -1), strict=True)
    y = (
        torch.cat([s / (s.sum(-1, keepdim=True) + 1e-6 * s.shape[-1]) @ half for s, half in halves], -1)
        .transpose(1, 2)
        .flatten(2)
    )
    y = y + F.pad(mixer.local(v.transpose(1, 2).flatten(2), 3, 4).flatten(1, 2), (0, 0, prefix, 0))
    torch.testing.assert_close(mixer(x, (3, 4)), mixer.proj(y * mixer.gate(x)))


def test_polarity_aware_attention_computes_the_same_by_one_product_and_by_the_operator():
    mixer = randomize_(PolarityAwareAttention(16, 2, input_size=(3, 4)).double())
    q, k, v = torch.randn(3, 2, 12, 16, dtype=torch.float64)
    torch.testing.assert_close(mixer._by_operator(q, k, v), mixer._polarized(q, k, v))


def test_the_learned_power_has_a_gradient_where_features_are_zero():
    mixer = PolarityAwareAttention(8, 2, input_size=(3, 4))
    nn.init.zeros_(mixer.qkv.weight[:16].detach())
    nn.init.zeros_(mixer.qkv.bias)
    mixer(torch.randn(2, 3, 4, 8)).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


def test_an_all_negative_query_is_no_division_by_zero():
    mixer = SimplifiedLinearAttention(8, 2, input_size=(2, 2))
    with torch.no_grad():
        mixer.qkv.weight.zero_()
        mixer.qkv.bias.fill_(-1)
    assert mixer(torch.randn(1, 2, 2, 8)).isfinite().all()


@pytest.mark.parametrize("cls", MIXERS)
def test_gradients_of_mixers(cls):
    mixer = randomize_(cls(4, 2, input_size=(2, 3)).double())
    x = torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mixer, (x,), fast_mode=True)


@pytest.mark.parametrize("cls", MIXERS)
@pytest.mark.parametrize("how", ["bfloat16", "autocast"])
def test_low_precision_sums_many_tokens_in_float32(cls, how):
    mixer = cls(16, 2, input_size=(48, 48)).eval()
    nn.init.constant_(mixer.qkv.bias, 1.0)  # sums of one sign, which a short mantissa soon stops adding to
    x = torch.randn(1, 48, 48, 16)
    expected = mixer(x).detach()
    if how == "autocast":
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            actual = mixer(x)
    else:
        with torch.no_grad():
            actual = mixer.bfloat16()(x.bfloat16())
    assert relative_error(actual, expected) < 2e-2  # a few roundings of 2 ** -8


def test_an_empty_batch():
    for cls in (*MIXERS, WindowAttention, CrossShapedAttention):
        assert cls(8, 2)(torch.randn(0, 9, 11, 8)).shape == (0, 9, 11, 8)


# --- the hosts' own attention ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(6, 6), (7, 8), (3, 3), (2, 5)])
@pytest.mark.parametrize("shift", [False, True])
def test_window_attention_is_attention_under_a_mask(size, shift):
    H, W = size
    w, s = 3, int(shift)
    mixer = randomize_(WindowAttention(4, 2, w, shift, input_size=(99, 99)).double())
    x = torch.randn(1, H, W, 4, dtype=torch.float64)
    rows, columns = H + -H % w, W + -W % w
    padded = F.pad(x, (0, 0, 0, columns - W, 0, rows - H)).view(1, -1, 4)
    y, z = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    y, z = ((t.flatten() - s) % n for t, n in ((y, rows), (z, columns)))  # places after the shift
    dy, dz = (t[:, None] - t for t in (y, z))
    same_window = (y[:, None] // w == y // w) & (z[:, None] // w == z // w)
    side = [(t >= n - s).long() if s else torch.zeros_like(t) for t, n in ((y, rows), (z, columns))]
    wrapped = (side[0][:, None] != side[0]) | (side[1][:, None] != side[1])
    index = (dy + w - 1) * (2 * w - 1) + dz + w - 1
    table = mixer.relative_position_bias_table
    bias = table[index.clamp(0, len(table) - 1)].permute(2, 0, 1) - 100.0 * wrapped
    q, k, v = (heads(t, 2) for t in mixer.qkv(padded).chunk(3, -1))
    logits = (q @ k.mT * 2**-0.5 + bias).masked_fill(~same_window, -torch.inf)
    expected = mixer.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2)).view(1, rows, columns, 4)[:, :H, :W]
    torch.testing.assert_close(mixer(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), expected)  # the path without gradients is another one


def test_a_map_not_larger_than_a_window_is_shifted_only_where_the_authors_shift_it():
    x = torch.randn(1, 6, 6, 8)
    mixers = {(small, size): randomize_(WindowAttention(8, 2, 7, True, small, (size, size)))
              for small in (None, True, False) for size in (14, 7)}  # fmt: skip
    state = mixers[None, 14].state_dict()
    results = {}
    for key, mixer in mixers.items():
        mixer.load_state_dict(state)
        results[key] = mixer(x)
        still = WindowAttention(8, 2, 7, False, input_size=(14, 14)).eval()
        still.load_state_dict(state)
        shifted = key[0] is not False
        assert torch.allclose(results[key], still(x), atol=1e-6) != shifted
    at_home = WindowAttention(8, 2, 7, True, None, (7, 7)).eval()
    unshifted = WindowAttention(8, 2, 7, False, None, (7, 7)).eval()
    unshifted.load_state_dict(at_home.state_dict())
    x = torch.randn(1, 7, 7, 8)
    torch.testing.assert_close(at_home(x), unshifted(x))


@pytest.mark.parametrize("size", [(6, 8), (7, 5), (1, 9)])
def test_stripes_are_attention_under_a_mask_and_narrower_at_the_border(size):
    H, W = size
    mixer = randomize_(CrossShapedAttention(8, 2, 3).double())
    x = torch.randn(1, H, W, 8, dtype=torch.float64)
    q, k, v = mixer.qkv(x.flatten(1, 2)).chunk(3, -1)
    places = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    outputs = []
    for i, place in enumerate((places[1], places[0])):  # columns first
        place = place.flatten() // 3
        same = place[:, None] == place
        qi, ki, vi = (t[..., 4 * i : 4 * i + 4] for t in (q, k, v))
        y = (qi @ ki.mT / 2).masked_fill(~same, -torch.inf).softmax(-1) @ vi
        axis = 2 - i
        for j, part in enumerate(vi.unflatten(1, size).split(3, axis)):
            y.unflatten(1, size).narrow(axis, 3 * j, part.shape[axis]).add_(mixer.branches[i].get_v(part))
        outputs.append(y)
    expected = mixer.proj(torch.cat(outputs, -1)).view(1, H, W, 8)
    torch.testing.assert_close(mixer(x), expected)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def authors_names(model: nn.Module) -> dict:
    """Our Swin's state dict under the authors' names, written independently of the conversion."""
    renamed = {}
    for name, value in model.state_dict().items():
        parts = name.split(".")
        if parts[0] == "stem":
            parts[0] = "patch_embed"
        elif parts[0] == "head":
            parts = ["head", parts[2]]
        elif parts[0] == "stages":
            number = int(parts[1])
            parts = ["layers", str(number - (parts[2] == "downsample")), *parts[2:]]
        if parts[-1] == "temperature":
            parts[-1] = "scale"
        if parts[-1] == "positional_encoding":
            value = value.flatten(1, 2)
        renamed[".".join(parts)] = value
    renamed["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(9, 9)
    renamed["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 9, 9)
    return renamed


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("nest", [None, "model", "state_dict_ema"])
def test_authors_checkpoints_load_whole(mixer, nest):
    model = Swin(mixer=mixer, mixer_depths=(None, None, 0, 0), norm_layer="prepbn", **HOSTS[Swin])
    randomize_(model)
    theirs = authors_names(model)
    counters = [name for name in theirs if name.endswith((".warm", ".iter", ".total_step", "num_batches_tracked"))]
    for name in counters:
        del theirs[name]
    theirs = {nest: theirs, "model": {}, "epoch": 3} if nest == "state_dict_ema" else theirs
    converted = checkpoint_filter_fn({nest: theirs, "epoch": 3} if nest == "model" else theirs, model)
    state = model.state_dict()
    assert converted.keys() == state.keys()
    for name, value in converted.items():
        if name.endswith((".warm", ".iter")):
            assert value == 0, name  # a trained norm is at the end of its schedule
        elif "num_batches" not in name:
            torch.testing.assert_close(value, state[name])


def test_native_state_dict_passes_unchanged_even_without_head():
    for host, kwargs in HOSTS.items():
        model = host(**kwargs)
        for part in ("", "head."):
            native = {n: v for n, v in model.state_dict().items() if not part or not n.startswith(part)}
            assert checkpoint_filter_fn(native, model) is native


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("mixer", [None, *MIXERS])
def test_checkpoint_of_another_image_size_loads(host, mixer):
    small = host(mixer=mixer, **HOSTS[host])
    large = host(mixer=mixer, **dict(HOSTS[host], img_size=(128, 96)))
    large.load_state_dict(checkpoint_filter_fn(small.state_dict(), large))
    assert large(torch.randn(1, 3, 128, 96)).shape == (1, 5)


def test_tables_of_another_image_size_are_interpolated_as_the_authors_do():
    old, new = (AgentAttention(4, 2, 4, input_size=(n, n)) for n in (4, 6))
    rows = fit_table("x.ah_bias", old.ah_bias.detach(), new.ah_bias)
    expected = F.interpolate(old.ah_bias.detach().view(1, 8, 4), size=6, mode="linear").view(1, 2, 4, 6, 1)
    torch.testing.assert_close(rows, expected)
    tokens = fit_table("x.wa_bias", old.wa_bias.detach(), new.wa_bias)
    torch.testing.assert_close(
        tokens, F.interpolate(old.wa_bias.detach()[0, :, 0].mT, size=6, mode="linear").mT[None, :, None]
    )


def test_dense_size_equals_the_classifier_at_its_own():
    model = timm.create_model("agent_swin_t", **dict(HOSTS[Swin], img_size=96, depths=(1, 1, 1, 2))).eval()
    dense = timm.create_model(
        "agent_swin_t", shift_small_maps=True, **dict(HOSTS[Swin], img_size=96, depths=(1, 1, 1, 2))
    )
    dense.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        ours, theirs = (m.eval().forward_intermediates(x, intermediates_only=True) for m in (model, dense))
    for a, b in zip(ours[:3], theirs[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert not torch.allclose(ours[3], theirs[3], atol=1e-4)


def test_agents_of_another_number_serve_dense_tasks():
    small = dict(HOSTS[Swin], img_size=96, depths=(1, 1, 1, 1))
    model = timm.create_model("agent_swin_t", **small).eval()
    same = timm.create_model("agent_swin_t", agent_shapes=(3, 4, 7, 7), **small).eval()
    dense = timm.create_model("agent_swin_t", features_only=True, agent_shapes=(9, (12, 8), 14, 7), **small).eval()
    same.load_state_dict(model.state_dict())
    assert [m.agent_shape for m in dense.modules() if isinstance(m, AgentAttention)] == [(9, 9), (12, 8), (14, 14)]
    x = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(same(x), model(x), rtol=0, atol=0)
    assert [m.shape[2:] for m in dense(torch.randn(1, 3, 160, 128))] == [(40, 32), (20, 16), (10, 8), (5, 4)]
    with pytest.raises(ValueError, match="agent_shapes must have one entry a stage, 4, got"):
        timm.create_model("agent_swin_t", agent_shapes=(9, 12), **small)
    assert timm.create_model("agent_deit_t", agent_shapes=[14]).stages[0].attn.agent_shape == (14, 14)


@pytest.mark.parametrize("given", [dict(sr_ratios=(8, 4, 2, 2)), dict(unused_norm=True)])
def test_a_class_token_needs_a_last_stage_of_whole_maps(given):
    with pytest.raises(ValueError, match="class token needs .* sr_ratios that end in 1 and unused_norm=False, got"):
        ClassTokenPVT(device="meta", **given)


def test_norms_of_pvt_have_the_authors_eps():
    model = ClassTokenPVT(device="meta")
    eps = {name: module.eps for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    outer = {name for name, value in eps.items() if value == 1e-5}
    assert eps["norm"] == 1e-6 and set(eps.values()) == {1e-5, 1e-6}
    assert outer == {name for name in eps if name == "stem.norm" or name.endswith(("downsample.norm", "attn.norm"))}


def test_a_class_token_goes_with_any_mixer_that_takes_prefix_tokens():
    small = dict(img_size=64, embed_dims=(8, 8, 8, 8), num_heads=(1, 2, 2, 2), depths=(1, 1, 1, 1), num_classes=3)
    model = ClassTokenPVT(mixer="visionattn.attention.AgentAttention", mixer_args=dict(num_agents=4), **small).eval()
    x = torch.randn(2, 3, 96, 64)
    assert model(x).shape == (2, 3) and model.forward_features(x).shape == (2, 1 + 3 * 2, 8)
    before = model.forward_intermediates(x, intermediates_only=True)
    nn.init.normal_(model.stages[3].downsample.cls_embed)
    after = model.forward_intermediates(x, intermediates_only=True)
    torch.testing.assert_close(before[2], after[2], rtol=0, atol=0)
    assert not torch.allclose(before[3], after[3])  # the patches attend to the token
