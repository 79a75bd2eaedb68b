"""What every token mixer of the hosts is: one calling convention, one place for projections and folding.

Letters: B batch, H rows, W columns, P prefix tokens, N = P + H * W tokens, C channels, h heads, D head dim.
"""

import os
from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.kernels import eager, exporting, focused, linear_attention, precise
from visionattn.kernels.linear_attn import features, mix
from visionattn.layers.blocks import Linear
from visionattn.layers.checks import check_heads, check_map, check_side, check_tensor, declared
from visionattn.layers.norms import fold_before
from visionattn.layers.switches import built_for_export

__all__ = ["LinearMixer", "Mixer", "MixerLike", "find_mixer", "short_names", "unknown_size"]

EPS = 1e-6  # of the divisors of linear attention
MixerLike = str | Callable[..., nn.Module]
TRUSTED = "VISIONATTN_MIXERS"
"""Environment variable: class paths of the user's own mixers that names may lead to."""
HOMES = ("visionattn.attention.", "visionattn.layers.", "visionattn.backbones.", "visionattn.natten.")


def unknown_size() -> bool:
    """Whether a graph is being recorded for maps of any size, in which nothing may depend on a comparison of sizes."""
    if torch.jit.is_scripting():
        return False
    else:
        return exporting()


@declared
class Mixer(nn.Module):
    """Base of the token mixers that a host can put into its blocks: ``proj(attend(qkv(x)))``.

    A mixer sees the whole map, or the prefix tokens and the map as one sequence. A subclass writes ``attend``; every
    host takes it as ``mixer=`` and tells it the arguments below. ``short_name`` is what it is called there instead of
    its class path; ``uses_map`` tells whether it matters to it how many rows and columns a sequence has.

    Args:
        dim: Channels.
        num_heads: Attention heads; they divide ``dim``.
        input_size: Rows and columns of the map that tables of positions are made for; other maps are allowed.
        num_prefix_tokens: Tokens before the map, such as a class token.
        lepe: The host adds a depthwise 3x3 convolution of the values (CSwin); mixers that have one already use it as
            theirs.
        stream: The host hands over its map before the norm, too (CSwin); see ``forward``.
        qkv_bias: Whether the projection to queries, keys and values has a bias.
        proj_drop: Dropout of the output.

    Raises:
        ValueError: If ``num_heads`` does not divide ``dim``.
    """

    short_name = ""
    uses_map = True

    def __init__(
        self,
        dim: int,
        num_heads: int,
        input_size: tuple[int, int] = (14, 14),
        num_prefix_tokens: int = 0,
        lepe: bool = False,
        stream: bool = False,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        dd = {"device": device, "dtype": dtype}
        super().__init__()
        check_heads(dim, num_heads)
        check_side("input_size", input_size, pair=True)
        self.num_heads = num_heads
        self.head_dim = dim // num_heads
        self.scale = self.head_dim**-0.5
        self.num_prefix_tokens = num_prefix_tokens
        self.stream = stream
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias, **dd)
        self.proj = Linear(dim, dim, **dd)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, size: tuple[int, int] | None = None, stream: Tensor | None = None) -> Tensor:
        """Mix a map or a sequence.

        Args:
            x: Map [B, H, W, C], or with ``size`` the prefix tokens and the map as a sequence [B, P + H * W, C].
            size: Rows and columns of the map in a sequence.
            stream: The residual stream that ``x`` is the norm of, shaped as ``x``; for mixers built with ``stream``.

        Returns:
            The mixed tokens, shaped as ``x``.

        Raises:
            ValueError: If ``x`` is no map and ``size`` is not given, or no sequence of that size and it is.
        """
        tokens = x
        if size is None:
            check_map(x)
            if self.num_prefix_tokens > 0:
                raise ValueError("size must be given to a mixer with prefix tokens, which takes a sequence, got a map")
            H, W = x.shape[1], x.shape[2]
            tokens = x.reshape(x.shape[0], H * W, x.shape[3])
        else:
            H, W = size
            if not torch.jit.is_scripting():
                self._check_length(x, H, W)
        context = tokens if stream is None else stream.reshape(tokens.shape)
        return self.proj_drop(self.proj(self.mixed(tokens, H, W, context))).reshape(x.shape)

    def mixed(self, tokens: Tensor, H: int, W: int, context: Tensor) -> Tensor:
        """What is between the input and the output projection. Arguments as of ``attend``. [B, N, C] in and out"""
        q, k, v = self.qkv(tokens).chunk(3, -1)
        return self.attend(q, k, v, H, W, context)

    def _check_length(self, x: Tensor, H: int, W: int) -> None:
        check_tensor(x, "a sequence [B, N, C]")
        if eager(x) and (x.dim() != 3 or x.shape[1] != self.num_prefix_tokens + H * W):
            expected = f"[B, {self.num_prefix_tokens} + {H} * {W}, C]"
            raise ValueError(f"x must be a sequence {expected} for size {(H, W)}, got shape {tuple(x.shape)}")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, H: int, W: int, context: Tensor) -> Tensor:
        """Mix the values; heads are consecutive runs of D channels.

        Args:
            q: Queries, not scaled. [B, N, C]
            k: Keys. [B, N, C]
            v: Values. [B, N, C]
            H: Rows of the map.
            W: Columns of the map.
            context: The mixer's input, or the residual stream where the host hands that over. [B, N, C]

        Returns:
            The mixed values. [B, N, C]
        """
        raise NotImplementedError

    def heads(self, x: Tensor) -> Tensor:
        """Channels to heads, [B, N, C] -> [B, h, N, D]; a view."""
        return x.unflatten(-1, [self.num_heads, self.head_dim]).transpose(1, 2)

    def map(self, x: Tensor, H: int, W: int) -> Tensor:
        """The map of a sequence, [B, N, C] -> [B, H, W, C]; a view."""
        return x[:, self.num_prefix_tokens :].unflatten(1, [H, W])

    @torch.no_grad()
    def fold_input(self, scale: Tensor, shift: Tensor) -> None:
        """Take over an affine map of the input, ``x * scale + shift`` per channel, into the first layer."""
        fold_before(self.qkv, scale, shift)


class LinearMixer(Mixer):
    """Base of mixers by linear attention and a convolution of the values. Arguments of ``Mixer``."""

    def __init__(self, dim: int, num_heads: int, **host) -> None:
        super().__init__(dim, num_heads, **host)
        self.eps = EPS
        self.exportable = built_for_export()

    def mix(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        local: Tensor,
        feature_map: str,
        normalizer: str,
        sharpness: Tensor | None = None,
    ) -> Tensor:
        """Linear attention, whose sums are formed in float32, and the convolved values at the positions of the map.

        Args:
            q: Queries. [B, N, C]
            k: Keys. [B, N, C]
            v: Values. [B, N, C]
            local: Added to the tokens behind the prefix. [B, H, W, C]
            feature_map: As in ``visionattn.kernels.linear_attention``.
            normalizer: As there.
            sharpness: Takes ``visionattn.kernels.focused`` with this scale as feature map.
        """
        shape = [self.num_heads, self.head_dim]
        q, k, values = q.unflatten(-1, shape), k.unflatten(-1, shape), v.unflatten(-1, shape)
        residual = local.flatten(1, 2)
        if self.num_prefix_tokens > 0:
            residual = F.pad(residual, [0, 0, self.num_prefix_tokens, 0])
        residual = residual.unflatten(-1, shape)
        if torch.jit.is_scripting():
            if sharpness is None:
                query, key = features(precise(q), feature_map), features(precise(k), feature_map)
            else:
                query, key = focused(q, 3.0, sharpness), focused(k, 3.0, sharpness)
            y = mix(query, key, precise(values), normalizer, self.scale, self.eps, None, None, False)
            return (y.to(v.dtype) + residual).flatten(2)
        else:
            return self._fused(q, k, values, residual, feature_map, normalizer, sharpness).flatten(2)

    @torch.jit.unused
    def _fused(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        residual: Tensor,
        feature_map: str,
        normalizer: str,
        sharpness: Tensor | None,
    ) -> Tensor:
        backend = "torch" if self.exportable else None
        features_of = feature_map if sharpness is None else partial(focused, scale=sharpness, backend=backend)
        options = dict(residual=residual, backend=backend)
        return linear_attention(q, k, v, features_of, normalizer, self.scale, self.eps, **options)


def find_mixer(mixer: MixerLike) -> Callable[..., nn.Module]:
    """A mixer, or what its ``short_name`` or its class path ``"visionattn.module.Class"`` names.

    A name may have come out of a file that somebody else wrote, so it leads to layers of this package only. Mixers of
    one's own are given as objects, or by class paths that the environment variable ``VISIONATTN_MIXERS`` lists,
    separated by commas.

    Raises:
        ValueError: If the name leads nowhere or elsewhere, or what is given cannot be called.
    """
    found = _named(mixer) if isinstance(mixer, str) else mixer
    if not callable(found):
        raise ValueError(f"mixer must be a class, a function or a class path, got {mixer!r}")
    return found


def _named(name: str) -> type[nn.Module]:
    """The layer that is called ``name``; nothing is imported before it is clear that the name may be followed."""
    names = short_names()
    if name in names:
        return names[name]
    allowed = f"short names are {', '.join(names)}; a class path is 'visionattn.attention.SoftmaxAttention'"
    trusted = name in {path.strip() for path in os.environ.get(TRUSTED, "").split(",")}
    if not trusted and not (name.startswith(HOMES) and all(part.isidentifier() for part in name.split("."))):
        raise ValueError(
            f"mixer {name!r} is no name of ours, and other names are not imported, as they may come out of a file: "
            f"{allowed}. Give a mixer of your own as a class, or set {TRUSTED}={name} in your command"
        )
    module, _, attribute = name.rpartition(".")
    try:
        if not trusted and (hidden := [part for part in name.split(".") if part.startswith("_")]):
            raise ImportError(f"{hidden[0]} is private")
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"mixer {name!r} cannot be imported: {error}; {allowed}") from error
    ours = trusted or str(getattr(found, "__module__", "")).startswith("visionattn.")
    if not (ours and isinstance(found, type) and issubclass(found, nn.Module)) or hasattr(found, "forward_features"):
        kind = f"a {type(found).__name__}, no layer{'' if trusted else ' of ours'}"
        raise ValueError(f"mixer {name!r} is {kind}: {allowed}")
    return found


def short_names() -> dict[str, type[nn.Module]]:
    """The layers that ``visionattn.attention`` exports under a ``short_name`` of their own."""
    classes = vars(import_module("visionattn.attention")).values()
    return {cls.short_name: cls for cls in classes if isinstance(cls, type) and vars(cls).get("short_name")}
