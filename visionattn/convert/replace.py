"""Swap the attention of timm's models for mixers of this library, all or nothing."""

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from timm.layers import Attention, PatchDropout
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer import WindowAttention as TimmWindowAttention
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn

from visionattn.attention import Mixer, SoftmaxAttention, SoftmaxMixer, WindowAttention
from visionattn.attention.mixer import MixerLike
from visionattn.attention.softmax import SelfAttention
from visionattn.convert.blocks import GridBlock, MapBlock, MapSize, TokenBlock, WindowBlock, window_arguments
from visionattn.convert.report import Replacement
from visionattn.hosts.parts import MixerArgs, mixers
from visionattn.layers.blocks import Linear
from visionattn.layers.intact import hooked
from visionattn.layers.tracing import mark_opaque

__all__ = ["replace_attention"]

SUPPORTED = (
    "timm's VisionTransformer (ViT, DeiT and others with blocks of class Block) and SwinTransformer; the models of "
    "visionattn.hosts take mixer= when they are built"
)
PARTS = ("qkv", "proj", "proj_drop", "attn_drop", "softmax")  # of attention that can be replaced
TABLE = "relative_position_bias_table"
DECIDED = {"dim", "num_heads", "device", "dtype", "proj_drop", "stream"}  # by the model, beside what a mixer is told


@dataclass(frozen=True)
class _Site:
    """A block whose attention can be replaced, and what a mixer there has to be told."""

    name: str
    block: Block | SwinTransformerBlock
    vit: VisionTransformer | None  # that the block belongs to

    @property
    def attn(self) -> nn.Module:
        return self.block.attn

    @property
    def swin(self) -> bool:
        return isinstance(self.block, SwinTransformerBlock)

    @property
    def stage(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def prefix(self) -> int:
        return 0 if self.vit is None else self.vit.num_prefix_tokens

    @property
    def size(self) -> tuple[int, int] | None:
        if self.swin:
            return tuple(self.block.input_resolution)
        return getattr(self.vit.patch_embed, "grid_size", None) if self.vit else None


class _Maker:
    """A mixer and its arguments.

    Args:
        make: ``functools.partial`` of its class or of a function that gives one.
    """

    def __init__(self, make: partial) -> None:
        self.make, self.source = make, make.func
        whole = isinstance(self.source, type)
        self.sequence = whole and issubclass(self.source, SelfAttention)  # of any shape
        self.mixer = not whole or issubclass(self.source, Mixer)
        self.window = whole and issubclass(self.source, WindowAttention)
        self.takes_prefix = self.sequence or (self.mixer and self._takes("num_prefix_tokens"))
        self.needs_size = getattr(self.source, "uses_map", not self.sequence) or not self.takes_prefix

    def _takes(self, name: str) -> bool:
        parameters = inspect.signature(self.source).parameters.values()
        return any(p.name == name or p.kind is p.VAR_KEYWORD for p in parameters)

    def exact(self, site: _Site) -> bool:
        """Whether it computes what the attention there did."""
        return self.source is WindowAttention if site.swin else self.source in (SoftmaxMixer, SoftmaxAttention)

    def told(self, site: _Site) -> dict[str, object]:
        """What the model decides about a mixer."""
        told = dict(qkv_bias=site.attn.qkv.bias is not None)
        if self.mixer:
            told |= dict(num_prefix_tokens=site.prefix) | (dict(input_size=site.size) if site.size else {})
        if site.swin and self.window:
            told |= window_arguments(site.block)
            told["input_size"] = tuple(max(n, told["window_size"]) for n in site.size)
        return {name: value for name, value in told.items() if self._takes(name)}

    def build(self, site: _Site) -> nn.Module:
        """A mixer with the projections, the mode, the device and the dtype of the attention there.

        Raises:
            ValueError: If the mixer cannot take them over.
        """
        attn, told = site.attn, self.told(site)
        if decided := sorted(self.make.keywords.keys() & (told.keys() | DECIDED)):
            raise ValueError(f"mixer_args must leave {', '.join(decided)} to the model, got {self.make.keywords}")
        weight = attn.qkv.weight
        mixer = self.make(weight.shape[1], attn.num_heads, **told, device=weight.device, dtype=weight.dtype)
        for name in ("qkv", "proj"):
            theirs, ours = getattr(attn, name), getattr(mixer, name, None)
            shape = list(theirs.weight.shape)
            if not isinstance(ours, nn.Linear) or list(ours.weight.shape) != shape:
                found = list(ours.weight.shape) if isinstance(ours, nn.Linear) else type(ours).__name__
                raise ValueError(
                    f"{_name(self.source)} cannot keep {site.name}.attn.{name}, a linear map of shape {shape}: its "
                    f"own {name} is {found}"
                )
            ours.weight, ours.bias = theirs.weight, theirs.bias
        if site.swin and getattr(getattr(mixer, TABLE, None), "shape", None) == getattr(attn, TABLE).shape:
            setattr(mixer, TABLE, getattr(attn, TABLE))
        if hasattr(mixer, "proj_drop"):
            mixer.proj_drop = attn.proj_drop
        elif attn.proj_drop.p > 0:
            raise ValueError(f"{_name(self.source)} has no dropout, {site.name}.attn.proj_drop.p is {attn.proj_drop.p}")
        return mixer.train(attn.training)

    def problems(self, site: _Site) -> Iterator[str]:
        """Why it cannot take the place of the attention there."""
        name = _name(self.source)
        if site.swin:
            if self.window:
                try:
                    window_arguments(site.block)
                except ValueError as error:
                    yield str(error)
            return
        if not self.takes_prefix and site.prefix:
            yield f"{name} takes maps only, not the {site.prefix} prefix tokens"
        if not self.needs_size:
            return
        if site.vit is None:
            yield f"{name} needs rows and columns of the map, which are known in a VisionTransformer only"
        elif site.size is None:
            yield f"{name} needs rows and columns of the map, and patch_embed has no grid_size"
        elif isinstance(site.vit.patch_drop, PatchDropout) and site.vit.patch_drop.prob > 0:
            yield f"{name} needs the whole map, of which patch_drop leaves patches out"

    def apply(self, site: _Site, mixer: nn.Module) -> None:
        """Put a mixer into its block."""
        if site.swin:
            (WindowBlock if self.window else MapBlock).become(site.block, mixer)
            return
        sizes = None
        if self.needs_size:
            known = (block.sizes for block in site.vit.blocks if isinstance(block, TokenBlock))
            sizes = next((found for found in known if found is not None), None) or MapSize(site.vit.patch_embed)
        (TokenBlock if self.takes_prefix else GridBlock).become(site.block, mixer, site.prefix, sizes)


def replace_attention(
    model: nn.Module,
    mixer: MixerLike,
    mixer_depths: Sequence[int | None] | None = None,
    mixer_args: MixerArgs | None = None,
    blocks: str | Callable[[str], bool] | None = None,
    linear: bool = False,
) -> Replacement:
    """Swap the attention of a timm ViT, DeiT or Swin for a mixer, in place.

    The projections stay the same parameters under the same names, also in an optimizer made before, and so does Swin's
    table of biases where the mixer has one. ``"softmax"`` in a ViT and ``"window"`` in a Swin compute what the model
    computed; any other mixer is to be trained. To load the result, build the model again, replace its attention and
    load the state dict. If anything cannot be replaced, nothing is.

    A ViT built with ``dynamic_img_size`` notes the size of its map at every call: with a mixer that uses it, the model
    serves one thread at a time and has no TorchScript.

    Args:
        model: A model of timm, or a module around some, such as timm's feature extractors. Blocks that have a mixer
            keep it.
        mixer: Short name (``"softmax"``, ``"window"``, ``"agent"``, ``"inline"``, ``"flatten"``, ``"pola"``,
            ``"slab"``, ``"hedgehog"``, ...), class path, class or function: a ``Mixer``, or a layer of maps
            [B, H, W, C] with a linear map ``qkv`` to queries, keys and values, each the heads in turn, and one
            ``proj`` of the output.
        mixer_depths: How many blocks of each stage get it, from the first; None for all. A ViT is one stage.
        mixer_args: Arguments of the mixer, for all stages or one mapping a stage.
        blocks: A regular expression that is searched in names of blocks, such as ``layers.0.blocks.1``, or a function
            of the name, for those that get it. None: all.
        linear: Run the model's other layers of class ``nn.Linear`` through ``visionattn.layers.blocks.Linear``, too:
            same parameters, same results, faster on a CPU.

    Returns:
        What was replaced and kept, and what is new and untrained.

    Raises:
        ValueError: If there is no such mixer, the model has no attention that can be replaced, no block is chosen, or
            attention or mixer have something that the other cannot take over.
    """
    stages: dict[str, list[_Site]] = {}
    for site in _sites(model):
        stages.setdefault(site.stage, []).append(site)
    if not stages:
        raise ValueError(
            f"model {_name(type(model))} has no attention to replace: {_found(model)}; there is {SUPPORTED}"
        )
    wanted = _predicate(blocks)
    made = mixers(mixer, mixer_depths, mixer_args, [len(sites) for sites in stages.values()])
    pairs = [
        (site, _Maker(make))
        for sites, makes in zip(stages.values(), made, strict=True)
        for site, make in zip(sites, makes, strict=True)
        if make is not None and wanted(site.name) and not isinstance(site.block, (TokenBlock, MapBlock))
    ]
    if not pairs:
        names = ", ".join(site.name for sites in stages.values() for site in sites)
        raise ValueError(
            f"blocks = {blocks!r} and mixer_depths = {mixer_depths!r} choose none of {names} without mixer"
        )
    problems = [f"{s.name}.attn: {text}" for s, maker in pairs for text in [*_problems(s), *maker.problems(s)]]
    if problems:
        more = f"; and {len(problems) - 1} more of such" if len(problems) > 1 else ""
        raise ValueError(f"nothing is replaced, {problems[0]}{more}")
    new_mixers = [maker.build(site) for site, maker in pairs]

    before = {name: p for site, _ in pairs for name, p in _named(site, site.attn)}
    after = {name: p for (site, _), new in zip(pairs, new_mixers, strict=True) for name, p in _named(site, new)}
    exact = all(maker.exact(site) for site, maker in pairs)
    for (site, maker), new in zip(pairs, new_mixers, strict=True):
        maker.apply(site, new)
    if linear:
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = Linear
                mark_opaque(module)
    new = {name: tuple(p.shape) for name, p in after.items() if name not in before}
    dropped = {name: tuple(p.shape) for name, p in before.items() if name not in after}
    return Replacement(
        mixer=_name(pairs[0][1].source),
        replaced=tuple(f"{site.name}.attn" for site, _ in pairs),
        exact=exact,
        kept={name: tuple(p.shape) for name, p in after.items() if name in before},
        new=new,
        dropped=dropped,
        warnings=tuple(_warnings(exact, new, dropped)),
    )


def _sites(model: nn.Module) -> Iterator[_Site]:
    vits = {name: module for name, module in model.named_modules() if isinstance(module, VisionTransformer)}
    for name, module in model.named_modules():
        if type(module) in (Block, SwinTransformerBlock) or isinstance(module, (TokenBlock, MapBlock)):
            owner = name.rpartition(".blocks.")[0] if ".blocks." in name else ""
            inside = name.startswith(f"{owner}.blocks." if owner else "blocks.")
            yield _Site(name, module, vits.get(owner) if inside else None)


def _problems(site: _Site) -> Iterator[str]:
    """Why the attention of a block cannot be replaced."""
    attn = site.attn
    if type(attn) is not (TimmWindowAttention if site.swin else Attention):
        yield f"no mixer takes the place of {_name(type(attn))}"
        return
    for name, part in attn.named_children():
        if name not in PARTS and not isinstance(part, nn.Identity):
            yield f"it has a {name}, and mixers have none"
    if attn.attn_drop.p > 0:
        yield f"attn_drop.p = {attn.attn_drop.p}, and mixers drop no attention weights; set it to 0"
    for name in ("qkv", "proj"):
        if type(getattr(attn, name)) not in (nn.Linear, Linear):
            yield f"{name} is {_name(type(getattr(attn, name)))}, not nn.Linear itself"
            return
    dim, heads = attn.qkv.in_features, attn.num_heads
    if attn.qkv.out_features != 3 * dim or attn.proj.in_features != dim or attn.proj.out_features != dim:
        yield f"its {heads} heads have {attn.qkv.out_features // 3} channels together, not {dim}"
    elif abs(attn.scale * (dim // heads) ** 0.5 - 1) > 1e-6:
        yield f"scale is {attn.scale}, not head dim ** -0.5"
    if any(hooked(part) for part in attn.modules()):
        yield "its hooks would be lost"


def _predicate(blocks: str | Callable[[str], bool] | None) -> Callable[[str], object]:
    if isinstance(blocks, str):
        try:
            return re.compile(blocks).search
        except re.error as error:
            raise ValueError(f"blocks must be a regular expression, got {blocks!r}: {error}") from error
    if blocks is not None and not callable(blocks):
        raise ValueError(f"blocks must be a regular expression or a function of a name, got {blocks!r}")
    return blocks or (lambda name: True)


def _named(site: _Site, attn: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(f"{site.name}.attn.{name}", parameter) for name, parameter in attn.named_parameters()]


def _found(model: nn.Module) -> str:
    pairs = [(child, parent) for parent in model.modules() for child in parent.children()]
    names = {f"{_name(type(c))} in {_name(type(p))}" for c, p in pairs if "attention" in type(c).__name__.lower()}
    return f"it has {', '.join(sorted(names))}" if names else "it has none that is called so"


def _name(source: object) -> str:
    return getattr(source, "__qualname__", type(source).__qualname__)


def _warnings(exact: bool, new: dict, dropped: dict) -> Iterator[str]:
    if not exact:
        yield "the model computes another function until it has been trained with the mixer"
    if new:
        yield "the new parameters are in no optimizer made before"
    if dropped:
        lost = sorted({name.rpartition(".")[2] for name in dropped})
        yield f"what the model had learned in {', '.join(lost)} is lost"
