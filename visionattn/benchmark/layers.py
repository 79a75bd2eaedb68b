"""Layers to measure, weights included: ours, the authors' composition of it, and what it is an alternative to.

All candidates work on one map [B, H, W, C]. ``plain`` and ``ours`` share their weights and are compared; the others
compute something else and are measured beside them. A candidate is written ``layer[+compile]``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from timm.layers import Attention
from timm.models.pvt_v2 import Attention as SpatialReductionAttention
from torch import Tensor, nn

from visionattn.attention import (
    FlowAttention,
    HedgehogAttention,
    HiLoAttention,
    LinearAttention,
    MagnitudeAwareAttention,
    RankAugmentedAttention,
    SoftmaxAttention,
    WindowAttention,
)
from visionattn.backbones.litv2 import checkpoint_filter_fn
from visionattn.benchmark.host_mixers import HOST_MIXERS, host_mixer_weights
from visionattn.benchmark.models import randomize_
from visionattn.benchmark.ops import SIZE_SETS, Size, parse_candidate
from visionattn.benchmark.plain.litv2 import PlainHiLo, PlainMerging
from visionattn.benchmark.runner import Candidate, Case, Workload
from visionattn.benchmark.window import WINDOW, TimmWindows
from visionattn.layers.token_merging import DeformableTokenMerging

__all__ = ["LAYERS", "LayerBenchmark", "layer_case"]

STAGES = (Size(56, 56, 96), Size(28, 28, 192), Size(14, 14, 384))  # of Swin-Tiny


class _OnMap(nn.Module):
    """``call(layer, x)`` on a map, for layers that want it in another form."""

    def __init__(self, layer: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.layer, x)


def _tokens(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.flatten(1, 2)).unflatten(1, x.shape[1:3])


def _sized_tokens(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.flatten(1, 2), x.shape[1:3]).unflatten(1, x.shape[1:3])


def _merged_tokens(layer: nn.Module, x: Tensor) -> Tensor:
    y, size = layer(x.flatten(1, 2), x.shape[1:3])
    return y.unflatten(1, size)


def _channels_first(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def _hilo(size: Size) -> dict[str, Callable[[], nn.Module]]:
    dim, heads = size.channels, max(size.channels // 32, 1)
    reduction = partial(SpatialReductionAttention, dim, heads, sr_ratio=2, linear_attn=False, qkv_bias=True)
    return {
        "plain": lambda: _OnMap(PlainHiLo(dim, heads, 2, 0.9), _sized_tokens),
        "ours": lambda: _OnMap(HiLoAttention(dim, heads, 2, 0.9), lambda layer, x: layer(x)),
        "full": lambda: _OnMap(Attention(dim, heads, qkv_bias=True), _tokens),
        "spatial_reduction": lambda: _OnMap(reduction(), _sized_tokens),
        "window7": lambda: TimmWindows(dim, heads, False, (size.height, size.width)),
    }


def _window(size: Size, shift: bool) -> dict[str, Callable[[], nn.Module]]:
    dim, heads, sides = size.channels, max(size.channels // 32, 1), (size.height, size.width)
    ours = partial(WindowAttention, dim, heads, WINDOW, shift, input_size=sides)
    return {
        "plain": lambda: TimmWindows(dim, heads, shift, sides),
        "ours": lambda: _OnMap(ours(), lambda layer, x: layer(x)),
    }


def _mixers(size: Size) -> dict[str, Callable[[], nn.Module]]:
    bare = dict(rotary=False, lepe_kernel=0, gate=False)
    mixers = {
        "softmax": SoftmaxAttention,
        "elu+1": partial(LinearAttention, feature_map="elu+1", **bare),
        "flow": FlowAttention,
        "hedgehog": HedgehogAttention,
        "rala": RankAugmentedAttention,
        "mala": MagnitudeAwareAttention,
    }
    dim, heads = size.channels, max(size.channels // 64, 1)
    return {name.replace("+", ""): partial(mixer, dim, heads) for name, mixer in mixers.items()}


def _host_mixer(name: str, size: Size) -> dict[str, Callable[[], nn.Module]]:
    if size.height != size.width:
        raise ValueError(f"layer {name!r} is measured on square maps, got {size}")
    pair = HOST_MIXERS[name][1](size.channels, max(size.channels // 32, 1), size.height)
    return {
        "plain": lambda: _OnMap(pair.plain(), _sized_tokens if pair.sized else _tokens),
        "ours": lambda: _OnMap(pair.ours(), lambda layer, x: layer(x)),
    }


def _token_merging(size: Size) -> dict[str, Callable[[], nn.Module]]:
    dim = size.channels

    def plain() -> nn.Module:
        layer = PlainMerging(dim)
        nn.init.normal_(layer.dconv.conv_offset.weight, std=dim**-0.5)  # trained ones leave the grid
        return _OnMap(layer, _merged_tokens)

    return {"plain": plain, "ours": lambda: _OnMap(DeformableTokenMerging(dim, 2 * dim), _channels_first)}


def _merging_weights(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renamed = checkpoint_filter_fn({f"layers.0.downsample.{name}": value for name, value in state.items()}, None)
    return {name.removeprefix("stages.1.downsample."): value for name, value in renamed.items()}


@dataclass(frozen=True)
class LayerBenchmark:
    """A layer, ways to compute it or something in its place, and the maps measured when nothing else is asked for."""

    summary: str
    build: Callable[[Size], dict[str, Callable[[], nn.Module]]]
    weights: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    sizes: tuple[Size, ...]

    def candidates(self) -> list[str]:
        """Names of its candidates."""
        return list(self.build(self.sizes[0]))


LAYERS = {
    "hilo": LayerBenchmark(
        "HiLo attention, windows of 2x2 and alpha 0.9, beside full, spatial-reduction (2) and window (7x7) attention",
        _hilo,
        dict,
        tuple(Size(side, side, 384) for side in (14, 28, 56)),
    ),
    "mixers": LayerBenchmark(
        "linear attention of several kinds beside softmax, with projections",
        _mixers,
        dict,
        tuple(Size(side, side, 192) for side in (14, 28, 56, 112)),
    ),
    "window": LayerBenchmark(
        "window attention 7x7 with relative position bias, beside timm's",
        partial(_window, shift=False),
        dict,
        SIZE_SETS["swin_t"],
    ),
    "shifted_window": LayerBenchmark(
        "window attention 7x7, shifted by 3, beside timm's",
        partial(_window, shift=True),
        dict,
        SIZE_SETS["swin_t"][:3],
    ),
    "token_merging": LayerBenchmark(
        "deformable token merging",
        _token_merging,
        _merging_weights,
        STAGES,
    ),
}
LAYERS |= {
    name: LayerBenchmark(f"{summary}, with projections", partial(_host_mixer, name), host_mixer_weights, STAGES)
    for name, (summary, _) in HOST_MIXERS.items()
}


def _workload(
    layer: LayerBenchmark, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype, candidate: str, mode: str
) -> Workload:
    who, _, compiled = parse_candidate(candidate)
    makers = layer.build(Size(*shape[1:]))
    torch.manual_seed(0)
    module = randomize_(makers["plain" if who == "ours" else who]())
    if who == "ours":
        weights = layer.weights(module.layer.state_dict())
        module = makers["ours"]()
        module.layer.load_state_dict(weights)
    module = module.to(device, dtype).train(mode == "train")
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype).requires_grad_(mode == "train")
    return Workload(
        run=torch.compile(module, dynamic=False) if compiled else module,
        inputs=(x,),
        leaves=(x, *module.parameters()),
        gradients=lambda: [x.grad],
        eager=lambda x: module(x.detach()),  # torch's FLOP counter cannot follow views of a leaf
        comparable=who in ("plain", "ours"),
    )


def layer_case(
    name: str, size: Size, batch: int, device: torch.device, dtype: torch.dtype, candidates: Sequence[str] | None = None
) -> Case:
    """The case of a layer at one size."""
    layer = LAYERS[name]
    shape = (batch, size.height, size.width, size.channels)
    return Case(
        name=name,
        shape=f"{batch}x{size}",
        candidates=[
            Candidate(c, partial(_workload, layer, shape, device, dtype, c)) for c in candidates or layer.candidates()
        ],
    )
