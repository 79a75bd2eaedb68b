"""The ViT around any mixer: how mixers are named, and that each of the library's learns handwritten digits."""

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import visionattn.attention
from visionattn.attention import LargeKernelAttention, SoftmaxAttention

TINY = dict(img_size=8, patch_size=2, embed_dim=32, depth=2, num_heads=2, mlp_ratio=2, num_classes=10, in_chans=1)
BARE = dict(rotary=False, lepe_kernel=0, gate=False)


class LargeKernelMixer(LargeKernelAttention):
    """Large kernel attention as a mixer: on grids, and without heads."""

    def __init__(self, dim: int, num_heads: int, device=None, dtype=None) -> None:
        super().__init__(dim, device=device, dtype=dtype)

    def forward(self, x):
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


# Mixer (in visionattn.attention, or a class), its arguments, and the share of unseen digits it must get right after 250
# steps: six to eleven per cent below what it got when the floor was set.
MIXERS = {
    "softmax": ("SoftmaxAttention", {}, 0.75),
    "ssa": ("SelectiveAttention", {}, 0.75),
    "softplus": ("SoftplusAttention", {}, 0.8),
    "flow": ("FlowAttention", {}, 0.8),
    "hedgehog": ("HedgehogAttention", {}, 0.65),
    "hedgehog_window": ("HedgehogAttention", dict(causal=True, window=4), 0.75),
    "elu+1": ("LinearAttention", dict(feature_map="elu+1", **BARE), 0.75),
    "relu2": ("LinearAttention", dict(feature_map="relu2", **BARE), 0.8),
    "softmax_features": ("LinearAttention", dict(feature_map="softmax", **BARE), 0.75),
    "focused": ("LinearAttention", dict(feature_map="focused", normalizer="mean", **BARE), 0.75),
    "inline": ("LinearAttention", dict(feature_map="identity", normalizer="inline", **BARE), 0.8),
    "rala": ("RankAugmentedAttention", {}, 0.9),
    "nala": ("NormAwareAttention", {}, 0.85),
    "mala": ("MagnitudeAwareAttention", {}, 0.9),
    "rotary": ("RotaryAttention", {}, 0.9),
    "lepe": ("LePEAttention", {}, 0.9),
    "bilevel": ("BiLevelRoutingAttention", dict(n_win=2, topk=2), 0.85),
    "neighborhood": ("NeighborhoodAttention", dict(kernel_size=3), 0.75),
    "halo": ("HaloAttention", dict(block_size=2, halo_size=1), 0.85),
    "circular": ("CircularWindowAttention", dict(radius=2), 0.75),
    "hilo": ("HiLoAttention", dict(window_size=2), 0.8),
    "large_kernel": (LargeKernelMixer, {}, 0.9),
    "agent": ("AgentAttention", dict(num_agents=4, input_size=(4, 4)), 0.88),
    "window": ("WindowAttention", dict(window_size=2, input_size=(4, 4)), 0.8),
    "shifted_window": ("WindowAttention", dict(window_size=2, shift=True, input_size=(4, 4)), 0.7),
    "cross_shaped": ("CrossShapedAttention", dict(split_size=2, input_size=(4, 4)), 0.85),
    "spatial_reduction": ("SpatialReductionAttention", dict(sr_ratio=2), 0.8),
    "focused_positions": ("FocusedLinearAttention", dict(input_size=(4, 4)), 0.85),
    "aggregated": ("AggregatedAttention", dict(sr_ratio=2, trained_size=4), 0.85),
    "length-scaled": ("LengthScaledAttention", dict(trained_size=4), 0.8),
    "polarities": ("PolarityAwareAttention", dict(input_size=(4, 4)), 0.85),
    "simplified": ("SimplifiedLinearAttention", dict(input_size=(4, 4)), 0.88),
    "inline_local": ("InLineAttention", dict(input_size=(4, 4)), 0.88),
}
# No mixers of a grid, or one of those above as a host calls it.
COVERED_OTHERWISE = {"LargeKernelAttention", "CrossFlowAttention", "HedgehogFeatures", "Mixer", "SoftmaxMixer"}


def build(name: str, **kwargs) -> nn.Module:
    mixer, arguments, _ = MIXERS[name]
    mixer = f"visionattn.attention.{mixer}" if isinstance(mixer, str) else mixer
    return timm.create_model("anyvit_tiny_patch16", mixer=mixer, mixer_args=arguments, **{**TINY, **kwargs})


def test_every_mixer_of_the_library_is_compared():
    compared = {mixer for mixer, _, _ in MIXERS.values() if isinstance(mixer, str)}
    names = visionattn.attention.__all__
    layers = {name for name in names if isinstance(getattr(visionattn.attention, name), type)}
    missing = layers - compared - COVERED_OTHERWISE
    assert not missing, f"add rows to MIXERS for {sorted(missing)}, or what is no mixer of a grid to COVERED_OTHERWISE"
    assert compared | COVERED_OTHERWISE == layers


@pytest.fixture(scope="module")
def digits():
    """1,437 images to learn from and 360 to be judged by, [N, 1, 8, 8] between -1 and 1, with their labels."""
    datasets = pytest.importorskip("sklearn.datasets")
    found = datasets.load_digits()
    order = torch.randperm(len(found.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(found.images, dtype=torch.float32)[order, None] / 8 - 1
    labels = torch.tensor(found.target)[order]
    return images[:1437], labels[:1437], images[1437:], labels[1437:]


@pytest.fixture
def one_thread():
    """Networks this small only wait when their work is divided, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def train(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, steps: int = 250) -> list[float]:
    """Losses of a short training."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps, pct_start=0.1)
    losses = []
    for _ in range(steps):
        batch = torch.randint(len(images), (64,))
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return losses


BY_DEFAULT = ("flow",)


@pytest.mark.parametrize("name", [n if n in BY_DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in MIXERS])
def test_every_mixer_learns_digits(name, digits, one_thread):
    images, labels, unseen, answers = digits
    model = build(name)
    losses = train(model, images, labels)
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])
    with torch.inference_mode():
        accuracy = (model.eval()(unseen).argmax(1) == answers).float().mean().item()
    print(f"{name}: loss {sum(losses[-20:]) / 20:.3f}, accuracy {accuracy:.3f}")
    assert accuracy > MIXERS[name][2]


@pytest.mark.parametrize("name", MIXERS)
def test_every_mixer_runs_forward_and_backward(name, one_thread):
    model = build(name, depth=1, embed_dim=16)
    model(torch.randn(2, 1, 8, 8)).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_mixer_by_path_class_and_function_are_the_same():
    def function(dim, num_heads, **kwargs):
        return SoftmaxAttention(dim, num_heads, **kwargs)

    for mixer in ("visionattn.attention.SoftmaxAttention", SoftmaxAttention, function):
        model = timm.create_model("anyvit_tiny_patch16", mixer=mixer, mixer_args=dict(qkv_bias=False), **TINY)
        assert all(type(block.attn) is SoftmaxAttention and block.attn.qkv.bias is None for block in model.stages)


@pytest.mark.parametrize("mixer", ["SoftmaxAttention", "visionattn.attention.Nothing", "no.such.module.Class", "", 3])
def test_mixer_that_is_none_is_refused(mixer):
    with pytest.raises(ValueError, match="mixer"):
        timm.create_model("anyvit_tiny_patch16", mixer=mixer, **TINY)


@pytest.mark.parametrize(("name", "millions"), [("anyvit_tiny_patch16", 5.7), ("anyvit_small_patch16", 22.0)])
def test_sizes_are_those_of_deit(name, millions):
    model = timm.create_model(name, device="meta")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.06)
