"""Operators to measure. A new one is a decorated function that makes inputs and names the functions to compare.

A candidate is written ``function[+channels_last][+compile]``: a name from ``OpCase.functions``, run on inputs converted
to channels_last, through ``torch.compile``. Any such combination can be asked for on the command line.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from visionattn.benchmark import neighborhood
from visionattn.benchmark.plain import linear as plain_linear
from visionattn.benchmark.plain import ravlt as plain_ravlt
from visionattn.benchmark.plain.flowformer import plain_flow_attention
from visionattn.benchmark.runner import Candidate, Case, Workload
from visionattn.kernels import (
    bilevel_routing_attention,
    depthwise_conv2d,
    flow_attention,
    gated_pointwise,
    linear_attention,
    neighborhood_attention,
    rotary_tables,
)

__all__ = ["OPS", "SIZE_SETS", "OpBenchmark", "OpCase", "Size", "op_benchmark", "op_case", "parse_candidate"]

MODIFIERS = ("channels_last", "compile")


@dataclass(frozen=True)
class Size:
    """A feature map: height, width, channels. Token counts and heads follow from it."""

    height: int
    width: int
    channels: int

    def __str__(self) -> str:
        return f"{self.height}x{self.width}x{self.channels}"

    @classmethod
    def parse(cls, text: str) -> "Size":
        """Read ``HxWxC``, such as ``56x56x64``."""
        parts = text.lower().split("x")
        if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
            raise ValueError(f"size {text!r} is not of the form HEIGHTxWIDTHxCHANNELS, such as 56x56x64")
        return cls(*map(int, parts))


def _sizes(text: str) -> tuple[Size, ...]:
    return tuple(Size.parse(part) for part in text.split())


SIZE_SETS = {
    "van_b0": _sizes("56x56x32 28x28x64 14x14x160 7x7x256"),
    "van_b2": _sizes("56x56x64 28x28x128 14x14x320 7x7x512"),
    "nat_tiny": _sizes("56x56x64 28x28x128 14x14x256 7x7x512"),
    "ravlt_t": _sizes("56x56x64 28x28x128"),
    "flowformer": _sizes("56x56x96 28x28x192 14x14x384 7x7x768"),
    "swin_t": _sizes("56x56x96 28x28x192 14x14x384 7x7x768"),
    "biformer_tiny": _sizes("56x56x64 28x28x128 14x14x256"),
    "biformer_tiny_1024": _sizes("256x256x64 128x128x128 64x64x256"),
    "nat_512": _sizes("128x128x64 64x64x128 32x32x256 16x16x512"),
    "nat_1024": _sizes("256x256x64 128x128x128 64x64x256 32x32x512"),
    "large": _sizes("112x112x64"),
}


@dataclass(frozen=True)
class OpCase:
    """An operator's inputs at one size, and the functions of them to compare.

    Attributes:
        inputs: Positional arguments of every function; floating-point ones get gradients in training mode.
        functions: By name; the first is the baseline unless the user names another.
        others: Names of functions that compute something else and are measured beside the rest.
    """

    inputs: tuple[Tensor, ...]
    functions: dict[str, Callable[..., Tensor]]
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class OpBenchmark:
    """A registered operator: how to make its case, and what is measured when nothing else is asked for."""

    name: str
    summary: str
    build: Callable[[int, Size, Callable[..., Tensor]], OpCase]
    size_set: str
    candidates: tuple[str, ...]

    def functions(self) -> list[str]:
        """Names of the functions it compares."""
        size = SIZE_SETS[self.size_set][0]
        return list(self.build(1, size, lambda *shape, scale=1.0: torch.empty(shape, device="meta")).functions)


OPS: dict[str, OpBenchmark] = {}
DEFAULT_CANDIDATES = (
    "reference",
    "reference+channels_last",
    "torch+channels_last",
    "triton+channels_last",
    "reference+compile",
    "reference+channels_last+compile",
)


def op_benchmark(name: str, size_set: str = "van_b2", candidates: Sequence[str] = DEFAULT_CANDIDATES):
    """Register ``build(batch, size, rand) -> OpCase`` under a name; the first line of its docstring describes it.

    Args:
        name: What the user types.
        size_set: Key of ``SIZE_SETS`` with the sizes measured by default.
        candidates: Measured by default.
    """

    def register(build: Callable[[int, Size, Callable[..., Tensor]], OpCase]):
        summary = (build.__doc__ or "").strip().splitlines()[0]
        OPS[name] = OpBenchmark(name, summary, build, size_set, tuple(candidates))
        return build

    return register


def parse_candidate(text: str) -> tuple[str, bool, bool]:
    """Split ``name+channels_last+compile`` into the name and the two switches."""
    name, *modifiers = text.split("+")
    for modifier in modifiers:
        if modifier not in MODIFIERS:
            raise ValueError(f"candidate {text!r}: unknown modifier {modifier!r}; allowed are {', '.join(MODIFIERS)}")
    return name, "channels_last" in modifiers, "compile" in modifiers


def _workload(
    op: OpBenchmark, size: Size, batch: int, device: torch.device, dtype: torch.dtype, candidate: str, mode: str
) -> Workload:
    generator = torch.Generator(device).manual_seed(0)  # the same inputs for all candidates

    def rand(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)

    case = op.build(batch, size, rand)
    name, channels_last, compiled = parse_candidate(candidate)
    if name not in case.functions:
        raise ValueError(f"{op.name} has no candidate {name!r}; it has {', '.join(case.functions)}")
    if channels_last and not any(t.dim() == 4 for t in case.inputs):
        raise ValueError("channels_last needs an input [B, C, H, W]")
    function = case.functions[name]
    inputs = []
    for tensor in case.inputs:
        if channels_last and tensor.dim() == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        inputs.append(tensor.requires_grad_(mode == "train" and tensor.is_floating_point()))
    leaves = tuple(t for t in inputs if t.requires_grad)
    return Workload(
        run=torch.compile(function, dynamic=False) if compiled else function,
        inputs=tuple(inputs),
        leaves=leaves,
        gradients=lambda: [leaf.grad for leaf in leaves],
        eager=function,
        comparable=name not in case.others,
    )


def op_case(
    op: OpBenchmark,
    size: Size,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    candidates: Sequence[str] | None = None,
) -> Case:
    """The case of an operator at one size."""
    return Case(
        name=op.name,
        shape=f"{batch}x{size}",
        candidates=[
            Candidate(name, partial(_workload, op, size, batch, device, dtype, name))
            for name in candidates or op.candidates
        ],
    )


def _by_backend(function: Callable[..., Tensor]) -> dict[str, Callable[..., Tensor]]:
    """The three backends of a function that takes ``backend=``."""
    return {name: partial(function, backend=name) for name in ("reference", "torch", "triton")}


def _depthwise(batch: int, size: Size, rand: Callable[..., Tensor], kernel: int, dilation: int) -> OpCase:
    channels = size.channels
    return OpCase(
        inputs=(
            rand(batch, channels, size.height, size.width),
            rand(channels, 1, kernel, kernel, scale=1 / kernel),
            rand(channels),
        ),
        functions=_by_backend(partial(depthwise_conv2d, dilation=dilation)),
    )


@op_benchmark("depthwise5")
def depthwise5(batch: int, size: Size, rand: Callable[..., Tensor]) -> OpCase:
    """Depthwise 5x5 with bias, LKA's first."""
    return _depthwise(batch, size, rand, kernel=5, dilation=1)


@op_benchmark("depthwise7d3")
def depthwise7d3(batch: int, size: Size, rand: Callable[..., Tensor]) -> OpCase:
    """Depthwise 7x7 with dilation 3 and bias, LKA's second."""
    return _depthwise(batch, size, rand, kernel=7, dilation=3)


@op_benchmark("gated_pointwise")
def gated(batch: int, size: Size, rand: Callable[..., Tensor]) -> OpCase:
    """1x1 convolution with bias, times a gate."""
    channels = size.channels
    shape = (batch, channels, size.height, size.width)
    return OpCase(
        inputs=(rand(*shape), rand(channels, channels, 1, 1, scale=channels**-0.5), rand(channels), rand(*shape)),
        functions=_by_backend(gated_pointwise),
    )


def _lka(u: Tensor, w0: Tensor, b0: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, backend: str) -> Tensor:
    a = depthwise_conv2d(u, w0, b0, backend=backend)
    a = depthwise_conv2d(a, w1, b1, dilation=3, backend=backend)
    return gated_pointwise(a, w2, b2, u, backend=backend)


@op_benchmark("lka")
def lka(batch: int, size: Size, rand: Callable[..., Tensor]) -> OpCase:
    """Large kernel attention, the three above in a row: u * PW(DW7d3(DW5(u)))."""
    channels = size.channels
    return OpCase(
        inputs=(
            rand(batch, channels, size.height, size.width),
            *(rand(channels, 1, 5, 5, scale=1 / 5), rand(channels)),
            *(rand(channels, 1, 7, 7, scale=1 / 7), rand(channels)),
            *(rand(channels, channels, 1, 1, scale=channels**-0.5), rand(channels)),
        ),
        functions=_by_backend(_lka),
    )


def _neighborhood(batch: int, size: Size, rand: Callable[..., Tensor], dilation: int, biased: bool) -> OpCase:
    heads = max(size.channels // 32, 1)
    inputs = [rand(batch, size.height, size.width, 3, heads, size.channels // heads)]
    if biased:
        inputs.append(rand(heads, 13, 13))

    def attend(qkv: Tensor, bias: Tensor | None = None, backend: str | None = None) -> Tensor:
        return neighborhood_attention(*qkv.unbind(3), 7, dilation, bias, backend=backend)

    others = {f.__name__: partial(f, dilation=dilation) for f in (neighborhood.masked_sdpa, neighborhood.flex)}
    return OpCase(inputs=tuple(inputs), functions={**_by_backend(attend), **others})


NEIGHBORHOOD_CANDIDATES = ("reference", "torch", "triton", "torch+compile", "masked_sdpa", "flex")


@op_benchmark("neighborhood7", size_set="nat_tiny", candidates=NEIGHBORHOOD_CANDIDATES)
def neighborhood7(batch: int, size: Size, rand: Callable[..., Tensor]) -> OpCase:
    """Neighborhood attention 7x7 with relative position bias, from a fused projection of heads of 32 channels."""
    return _neighborhood(batch, size, rand, dilation=1, biased=True)


@op_benchmark("neighborhood7_nobias", size_set="nat_tiny", candidates=NEIGHBORHOOD_CANDIDATES)
def neighborhood7_nobias(batch: int, size: Size, rand: Callable[..., Tensor]) -> OpCase:
    """Neighborhood attention 7x7 without bias."""
    return _neighborhood(batch, size, rand, dilation=1, biased=False)


@op_benchmark("neighborhood7_dilated", size_set="nat_tiny", candidates=NEIGHBORHOOD_CANDIDATES)
def neighborhood7_dilated(batch: int, size: Size, rand: Callable[..., Tensor]) -> OpCase:
    """Neighborhood attention 7x7 with bias, dilated until a window spans the map, as in DiNAT."""
    return _neighborhood(batch, size, rand, dilation=max(min(size.height, size.width) // 7, 1), biased=True)


LINEAR_CANDIDATES = ("einsum_bnhd", "einsum_bhnd", "matmul", "torch", "triton", "matmul+compile", "softmax")


@op_benchmark("linear_attention", size_set="ravlt_t", candidates=LINEAR_CANDIDATES)
def linear(batch: int, size: Size, rand: Callable[..., Tensor]) -> OpCase:
    """Linear attention with elu + 1 and a sum as normalizer, from a fused projection of heads of 64 channels."""
    heads = max(size.channels // 64, 1)
    functions = {
        "einsum_bnhd": partial(plain_linear.einsum, layout="bnhd"),
        "einsum_bhnd": partial(plain_linear.einsum, layout="bhnd"),
        "matmul": plain_linear.matmul,
        **_by_backend(partial(linear_attention, feature_map="elu+1")),
        "softmax": plain_linear.softmax,
    }
    return OpCase(
        inputs=(rand(batch, size.height * size.width, 4, heads, size.channels // heads),),
        functions={name: partial(_on_views, f) for name, f in functions.items()},
        others=("softmax",),
    )


def _on_views(function: Callable[..., Tensor], qkvo: Tensor, *tables: Tensor) -> Tensor:
    q, k, v, gate = qkvo.unbind(2)
    return function(q, k, v, *((gate, tables) if tables else ()))


def _rotary_linear(batch: int, size: Size, rand: Callable[..., Tensor], plain: Callable, **options) -> OpCase:
    heads = max(size.channels // 64, 1)
    qkvo = rand(batch, size.height * size.width, 4, heads, size.channels // heads)
    tables = rotary_tables(size.height, size.width, size.channels // heads, device=qkvo.device)

    def ours(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, tables: tuple[Tensor, Tensor], backend: str) -> Tensor:
        options_here = dict(feature_map="elu+1", rotary=tables, residual=v, gate=gate, backend=backend)
        return linear_attention(q, k, v, **options_here, **options)

    functions = {"plain": plain_linear.framed(plain), **_by_backend(ours)}
    return OpCase(inputs=(qkvo,), functions={n: lambda x, f=f: _on_views(f, x, *tables) for n, f in functions.items()})


@op_benchmark("rala", size_set="ravlt_t", candidates=("plain", "torch", "triton", "plain+compile"))
def rala(batch: int, size: Size, rand: Callable[..., Tensor]) -> OpCase:
    """Rank-augmented linear attention with rotary embedding and gate, between the projections."""
    return _rotary_linear(batch, size, rand, plain_ravlt.rank_augmented_attention, rank_augmented=True)


@op_benchmark("mala", size_set="ravlt_t", candidates=("plain", "torch", "triton", "plain+compile"))
def mala(batch: int, size: Size, rand: Callable[..., Tensor]) -> OpCase:
    """Magnitude-aware linear attention with rotary embedding and gate, between the projections."""
    return _rotary_linear(batch, size, rand, plain_ravlt.magnitude_aware_attention, normalizer="magnitude")


@op_benchmark("flow", size_set="flowformer", candidates=("plain", "torch", "plain+compile", "torch+compile"))
def flow(batch: int, size: Size, rand: Callable[..., Tensor]) -> OpCase:
    """Flow attention of up to 12 heads from a fused projection, against the authors' composition."""
    heads = math.gcd(12, size.channels)

    def attend(qkv: Tensor, backend: str) -> Tensor:
        q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(2)
        return flow_attention(q, k, v, flow_eps=1e-6, backend=backend).flatten(2)

    functions = {"plain": partial(plain_flow_attention, num_heads=heads), **_by_backend(attend)}
    del functions["triton"]  # there are no kernels for it
    return OpCase(inputs=(rand(batch, size.height * size.width, 3 * size.channels),), functions=functions)


def _bilevel(batch: int, size: Size, rand: Callable[..., Tensor], topk: int) -> OpCase:
    heads = max(size.channels // 32, 1)
    regions = 7 if size.height % 7 == 0 and size.width % 7 == 0 else 16  # a side; what the authors take at 224 and 1024
    region = (-(-size.height // regions), -(-size.width // regions))

    def attend(qkv: Tensor, backend: str | None = None) -> Tensor:
        scale = size.channels**-0.5
        return bilevel_routing_attention(*qkv.unbind(3), region, topk, scale=scale, backend=backend)

    qkv = rand(batch, size.height, size.width, 3, heads, size.channels // heads)
    return OpCase(inputs=(qkv,), functions=_by_backend(attend))


BILEVEL_CANDIDATES = ("reference", "torch", "triton")


@op_benchmark("bilevel1", size_set="biformer_tiny", candidates=BILEVEL_CANDIDATES)
def bilevel1(batch: int, size: Size, rand: Callable[..., Tensor]) -> OpCase:
    """Bi-level routing attention to 1 region of 7 x 7 (16 x 16 where 7 does not divide the map), routing included."""
    return _bilevel(batch, size, rand, topk=1)


@op_benchmark("bilevel4", size_set="biformer_tiny", candidates=BILEVEL_CANDIDATES)
def bilevel4(batch: int, size: Size, rand: Callable[..., Tensor]) -> OpCase:
    """Bi-level routing attention to 4 regions."""
    return _bilevel(batch, size, rand, topk=4)


@op_benchmark("bilevel16", size_set="biformer_tiny", candidates=BILEVEL_CANDIDATES)
def bilevel16(batch: int, size: Size, rand: Callable[..., Tensor]) -> OpCase:
    """Bi-level routing attention to 16 regions."""
    return _bilevel(batch, size, rand, topk=16)
