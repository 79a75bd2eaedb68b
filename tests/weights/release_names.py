"""The authors' parameter names and shapes of every published model, written from their code and not from our rules.

What the authors' code computes is recorded for few sizes (``tests/fixtures``); the others differ in depth and width. A
network is a function here, a size is a line of ``RELEASES`` with the number of parameters that was measured on the
authors' code. ``test_releases.py`` compares these lists with the recorded ones, and their sums with those numbers.
"""

import math

__all__ = ["RELEASES", "STATISTICS", "Names"]

STATISTICS = (
    *("running_mean", "running_var", "num_batches_tracked", "warm", "iter", "total_step"),
    *("relative_position_index", "attn_mask", "angle"),
)
"""What buffers, which are no parameters, are called."""


class Names(dict):
    """Shapes by name, in which a network is written down."""

    def layer(self, name: str, *shape: int, bias: bool = True) -> None:
        self[f"{name}.weight"] = shape
        if bias:
            self[f"{name}.bias"] = shape[:1]

    def norm(self, name: str, dim: int, kind: str = "ln") -> None:
        """A layer norm, a batch norm, or one of SLAB's two."""
        if kind == "ln":
            return self.layer(name, dim)
        if kind == "bn":
            self.layer(name, dim)
            self[f"{name}.running_mean"] = self[f"{name}.running_var"] = (dim,)
            self[f"{name}.num_batches_tracked"] = ()
        elif kind == "repbn":
            self[f"{name}.alpha"] = (1,)
            self.norm(f"{name}.bn", dim, "bn")
        else:
            self.layer(f"{name}.norm1", dim)
            self.norm(f"{name}.norm2", dim, "repbn")
            self.update({f"{name}.{counter}": () for counter in ("warm", "iter", "total_step")})

    def mlp(self, name: str, dim: int, hidden: int) -> None:
        self.layer(f"{name}.fc1", hidden, dim)
        self.layer(f"{name}.fc2", dim, hidden)

    @property
    def parameters(self) -> int:
        """How many numbers are learned."""
        return sum(math.prod(shape) for name, shape in self.items() if not name.endswith(STATISTICS))


# --- mixers in hosts --------------------------------------------------------------------------------------------------


def tables(n, name, mixer, dim, heads, side, agents=0, token=False, lepe=False):
    """What a mixer has beside its projections, on a map of ``side`` x ``side``; CSwin's have a convolution already."""
    d = dim // heads
    if mixer == "agent":
        n |= {f"{name}.{key}_bias": (heads, agents, 7, 7) for key in ("an", "na")}
        n[f"{name}.ah_bias"], n[f"{name}.aw_bias"] = (1, heads, agents, side, 1), (1, heads, agents, 1, side)
        n[f"{name}.ha_bias"], n[f"{name}.wa_bias"] = (1, heads, side, 1, agents), (1, heads, 1, side, agents)
        if token:
            n[f"{name}.ac_bias"], n[f"{name}.ca_bias"] = (1, heads, agents, 1), (1, heads, 1, agents)
        if not lepe:
            n.layer(f"{name}.dwc", dim, 1, 3, 3)
    elif mixer in ("flatten", "pola", "slab"):
        n[f"{name}.positional_encoding"] = (1, side * side, dim)
        n.layer(f"{name}.dwc", d, 1, 5, 5)
        if mixer == "pola":
            n[f"{name}.power"] = (1, heads, 1, d)
        if mixer in ("flatten", "pola") or lepe:  # SLAB's in CSwin is stored and not used
            n[f"{name}.scale"] = (1, 1, dim)
    elif mixer == "inline":
        n.layer(f"{name}.residual.0", dim, d, 1)
        n.layer(f"{name}.residual.2", 9 * dim, d, 1)


def deit(mixer, dim, heads, side=14, agents=49, mixed=12, norm="ln"):
    n, token = Names(), mixer != "slab"
    n["cls_token"], n["pos_embed"] = (1, 1, dim), (1, side * side + token, dim)
    n.layer("patch_embed.proj", dim, 3, 16, 16)
    for j in range(12):
        at = f"blocks.{j}"
        n.norm(f"{at}.norm1", dim, norm)
        n.norm(f"{at}.norm2", dim, norm)
        n.layer(f"{at}.attn.qkv", 3 * dim, dim)
        n.layer(f"{at}.attn.proj", dim, dim)
        tables(n, f"{at}.attn", mixer if j < mixed else None, dim, heads, side, agents, token)
        n.mlp(f"{at}.mlp", dim, 4 * dim)
    n.norm("norm", dim, norm)
    n.layer("head", 1000, dim)
    return n


AGENTS = (9, 16, 49, 49)


def pvt(mixer, depths, heads=(1, 2, 5, 8), side=56, norm="ln"):
    n, before = Names(), 3
    for i, (dim, ratio) in enumerate(zip((64, 128, 320, 512), (8, 8, 4, 4), strict=True)):
        stage, grid = i + 1, side >> i
        token = mixer is None and norm == "ln" and i == 3  # PVT itself
        n[f"pos_embed{stage}"] = (1, grid * grid + token, dim)
        patch = 4 if i == 0 else 2
        n.layer(f"patch_embed{stage}.proj", dim, before, patch, patch)
        n.norm(f"patch_embed{stage}.norm", dim, norm)
        for j in range(depths[i]):
            at = f"block{stage}.{j}"
            pvt_block(n, at, mixer, dim, heads[i], grid, AGENTS[i], (8, 4, 2, 1)[i], norm)
            n.mlp(f"{at}.mlp", dim, ratio * dim)
        before = dim
    if token:
        n["cls_token"] = (1, 1, before)
    if mixer in ("flatten", "pola") or token:  # theirs, but for the token's, is never used
        n.norm("norm", before)
    n.layer("head", 1000, before)
    return n


def pvt_block(n, at, mixer, dim, heads, grid, agents, reduction, norm):
    n.norm(f"{at}.norm1", dim, norm)
    n.norm(f"{at}.norm2", dim, norm)
    if mixer == "pola":
        n.layer(f"{at}.attn.qg", 2 * dim, dim)
    else:
        n.layer(f"{at}.attn.q", dim, dim)
    n.layer(f"{at}.attn.kv", 2 * dim, dim)
    n.layer(f"{at}.attn.proj", dim, dim)
    tables(n, f"{at}.attn", mixer, dim, heads, grid, agents)
    if mixer is None and reduction > 1:
        n.layer(f"{at}.attn.sr", dim, dim, reduction, reduction)
        n.norm(f"{at}.attn.norm", dim, norm)


def pvt_v2(mixer, depths, dims=(64, 128, 320, 512)):
    n, before = Names(), 3
    for i, (dim, ratio) in enumerate(zip(dims, (8, 8, 4, 4), strict=True)):
        stage, side = i + 1, 7 if i == 0 else 3
        n.layer(f"patch_embed{stage}.proj", dim, before, side, side)
        n.norm(f"patch_embed{stage}.norm", dim)
        for j in range(depths[i]):
            at = f"block{stage}.{j}"
            pvt_block(n, at, mixer, dim, (1, 2, 5, 8)[i], 56 >> i, 0, 1, "ln")
            n.mlp(f"{at}.mlp", dim, ratio * dim)
            n.layer(f"{at}.mlp.dwconv.dwconv", ratio * dim, 1, 3, 3)
        n.norm(f"norm{stage}", dim)
        before = dim
    n.layer("head", 1000, before)
    return n


def swin(mixer, width, depths, replaced=(), side=56, window=7, norm="ln"):
    """``replaced``: how many blocks of each stage have the mixer, all if None."""
    n, heads = Names(), width // 32
    n.layer("patch_embed.proj", width, 3, 4, 4)
    n.norm("patch_embed.norm", width, norm)
    for i, depth in enumerate(depths):
        dim, grid, count = width << i, side >> i, (*replaced, 0, 0, 0, 0)[i]
        for j in range(depth):
            at = f"layers.{i}.blocks.{j}"
            n.norm(f"{at}.norm1", dim, norm)
            n.norm(f"{at}.norm2", dim, norm)
            mixed = count is None or j < count
            gated = mixed and mixer == "pola"
            n.layer(f"{at}.attn.{'qkvg' if gated else 'qkv'}", (4 if gated else 3) * dim, dim)
            n.layer(f"{at}.attn.proj", dim, dim)
            if mixed:
                tables(n, f"{at}.attn", mixer, dim, heads << i, grid, AGENTS[i])
            else:
                n[f"{at}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads << i)
                n[f"{at}.attn.relative_position_index"] = (window**2, window**2)
                if j % 2 and grid > window:
                    n[f"{at}.attn_mask"] = ((grid // window) ** 2, window**2, window**2)
            n.mlp(f"{at}.mlp", dim, 4 * dim)
        if i < 3:
            n.norm(f"layers.{i}.downsample.norm", 4 * dim, norm)
            n.layer(f"layers.{i}.downsample.reduction", 2 * dim, 4 * dim, bias=False)
    n.norm("norm", width * 8, norm)
    n.layer("head", 1000, width * 8)
    return n


def cswin(mixer, width, depths, side=56, norm="ln"):
    """The mixer in the first two stages."""
    n, heads = Names(), 2 if width == 64 else 4
    n.layer("stage1_conv_embed.0", width, 3, 7, 7)
    n.norm("stage1_conv_embed.2", width, norm)
    for i, depth in enumerate(depths):
        dim = width << i
        for j in range(depth):
            at = f"stage{i + 1}.{j}"
            n.norm(f"{at}.norm1", dim, norm)
            n.norm(f"{at}.norm2", dim, norm)
            n.layer(f"{at}.qkv", 3 * dim, dim)
            n.layer(f"{at}.proj", dim, dim)
            branches = 2 if i == 2 or (mixer is None and i < 2) else 1
            for b in range(branches):
                n.layer(f"{at}.attns.{b}.get_v", dim // branches, 1, 3, 3)
            if i < 2:
                tables(n, f"{at}.attns.0", mixer, dim, heads << i, side >> i, AGENTS[i], lepe=True)
            n.mlp(f"{at}.mlp", dim, 4 * dim)
        if i < 3:
            n.layer(f"merge{i + 1}.conv", 2 * dim, dim, 3, 3)
            n.norm(f"merge{i + 1}.norm", 2 * dim, norm)
    n.norm("norm", width * 8, norm)
    n.layer("head", 1000, width * 8)
    return n


# --- networks of their own --------------------------------------------------------------------------------------------


def nat(width, depths, ratio, scaled=False, window=7, classes=1000):
    """NAT and DiNAT."""
    n = Names()
    n.layer("patch_embed.proj.0", width // 2, 3, 3, 3)
    n.layer("patch_embed.proj.1", width, width // 2, 3, 3)
    n.norm("patch_embed.norm", width)
    for i, depth in enumerate(depths):
        dim = width << i
        for j in range(depth):
            at = f"levels.{i}.blocks.{j}"
            nat_block(n, at, dim, ratio, window)
            if scaled:
                n[f"{at}.gamma1"] = n[f"{at}.gamma2"] = (dim,)
        if i < 3:
            n.layer(f"levels.{i}.downsample.reduction", 2 * dim, dim, 3, 3, bias=False)
            n.norm(f"levels.{i}.downsample.norm", 2 * dim)
    n.norm("norm", width * 8)
    n.layer("head", classes, width * 8)
    return n


def nat_block(n, at, dim, ratio, window):
    n.norm(f"{at}.norm1", dim)
    n.norm(f"{at}.norm2", dim)
    n.layer(f"{at}.attn.qkv", 3 * dim, dim)
    n.layer(f"{at}.attn.proj", dim, dim)
    n[f"{at}.attn.rpb"] = (dim // 32, 2 * window - 1, 2 * window - 1)
    n.mlp(f"{at}.mlp", dim, ratio * dim)


def dinat_s(width, depths, classes=1000):
    n = Names()
    n.layer("patch_embed.proj", width, 3, 4, 4)
    n.norm("patch_embed.norm", width)
    for i, depth in enumerate(depths):
        dim = width << i
        for j in range(depth):
            nat_block(n, f"layers.{i}.blocks.{j}", dim, 4, 7)
        if i < 3:
            n.layer(f"layers.{i}.downsample.reduction", 2 * dim, 4 * dim, bias=False)
            n.norm(f"layers.{i}.downsample.norm", 4 * dim)
    n.norm("norm", width * 8)
    n.layer("head", classes, width * 8)
    return n


def van(dims, depths):
    n, before = Names(), 3
    for i, (dim, depth, ratio) in enumerate(zip(dims, depths, (8, 8, 4, 4), strict=True)):
        stage, side = i + 1, 7 if i == 0 else 3
        n.layer(f"patch_embed{stage}.proj", dim, before, side, side)
        n.norm(f"patch_embed{stage}.norm", dim, "bn")
        for j in range(depth):
            at = f"block{stage}.{j}"
            n[f"{at}.layer_scale_1"] = n[f"{at}.layer_scale_2"] = (dim,)
            n.norm(f"{at}.norm1", dim, "bn")
            n.norm(f"{at}.norm2", dim, "bn")
            n.layer(f"{at}.attn.proj_1", dim, dim, 1, 1)
            n.layer(f"{at}.attn.proj_2", dim, dim, 1, 1)
            gate = f"{at}.attn.spatial_gating_unit"
            n.layer(f"{gate}.conv0", dim, 1, 5, 5)
            n.layer(f"{gate}.conv_spatial", dim, 1, 7, 7)
            n.layer(f"{gate}.conv1", dim, dim, 1, 1)
            n.layer(f"{at}.mlp.fc1", ratio * dim, dim, 1, 1)
            n.layer(f"{at}.mlp.dwconv.dwconv", ratio * dim, 1, 3, 3)
            n.layer(f"{at}.mlp.fc2", dim, ratio * dim, 1, 1)
        n.norm(f"norm{stage}", dim)
        before = dim
    n.layer("head", 1000, before)
    return n


def ravlt(dims, depths, heads, head=1024):
    """RAVLT and MAViT, whose names are the same."""
    n, first = Names(), dims[0]
    for at, out, into in (
        (0, first // 2, 3),
        (3, first // 2, first // 2),
        (6, first // 2, first // 2),
        (9, first, first // 2),
    ):
        n.layer(f"patch_embed.proj.{at}", out, into, 3, 3)
        n.norm(f"patch_embed.proj.{at + 1}", out, "bn")
    for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
        hidden = dim * 7 // 2
        n[f"layers.{i}.RoPE.angle"] = (dim // heads[i] // 2,)
        for j in range(depth):
            at = f"layers.{i}.blocks.{j}"
            n[f"{at}.gamma_1"] = n[f"{at}.gamma_2"] = (1, dim, 1, 1)
            n.norm(f"{at}.norm1.norm", dim)
            n.norm(f"{at}.norm2.norm", dim)
            n.layer(f"{at}.attn.qkvo", 4 * dim, dim, 1, 1)
            n.layer(f"{at}.attn.lepe", dim, 1, 5, 5)
            n.layer(f"{at}.attn.proj", dim, dim, 1, 1)
            n.layer(f"{at}.ffn.fc1", hidden, dim, 1, 1)
            n.layer(f"{at}.ffn.dwconv", hidden, 1, 3, 3)
            n.layer(f"{at}.ffn.fc2", dim, hidden, 1, 1)
            n.layer(f"{at}.pos", dim, 1, 3, 3)
        if i < 3:
            n.layer(f"layers.{i}.downsample.reduction", dims[i + 1], dim, 3, 3)
            n.norm(f"layers.{i}.downsample.norm", dims[i + 1], "bn")
    n.layer("proj", head, dims[-1], 1, 1)
    n.norm("norm", head, "bn")
    n.layer("head", 1000, head, 1, 1)
    return n


def biformer(width, depths):
    n = Names()
    n.layer("downsample_layers.0.0", width // 2, 3, 3, 3)
    n.norm("downsample_layers.0.1", width // 2, "bn")
    n.layer("downsample_layers.0.3", width, width // 2, 3, 3)
    n.norm("downsample_layers.0.4", width, "bn")
    for i, depth in enumerate(depths):
        dim = width << i
        if i > 0:
            n.layer(f"downsample_layers.{i}.0", dim, dim // 2, 3, 3)
            n.norm(f"downsample_layers.{i}.1", dim, "bn")
        for j in range(depth):
            at = f"stages.{i}.{j}"
            n.layer(f"{at}.pos_embed", dim, 1, 3, 3)
            biformer_block(n, at, dim, i == 3, 3, second=3)
    n.norm("norm", width * 8, "bn")
    n.layer("head", 1000, width * 8)
    return n


def biformer_stl(nchw=False):
    n = Names()
    n.layer("downsample_layers.0.0", 96, 3, 4, 4)
    n.norm("downsample_layers.0.1", 96, "bn")
    for i, depth in enumerate((2, 2, 6, 2)):
        dim = 96 << i
        if i > 0:
            n.norm(f"downsample_layers.{i}.0", dim // 2, "bn")
            n.layer(f"downsample_layers.{i}.1", dim, dim // 2, 2, 2)
        for j in range(depth):
            biformer_block(n, f"stages.{i}.blocks.{j}", dim, i == 3, 4, second=2, side=(1, 1) if nchw else ())
    n.norm("norm", 768, "bn")
    n.layer("head", 1000, 768)
    return n


def biformer_block(n, at, dim, whole, ratio, second, side=()):
    n.norm(f"{at}.norm1", dim)
    n.norm(f"{at}.norm2", dim)
    n.layer(f"{at}.attn.lepe", dim, 1, 5, 5)
    if whole:
        n.layer(f"{at}.attn.qkv", 3 * dim, dim, *side, bias=False)
        n.layer(f"{at}.attn.proj", dim, dim, *side)
    else:
        n.layer(f"{at}.attn.qkv_linear" if side else f"{at}.attn.qkv.qkv", 3 * dim, dim, *side)
        n.layer(f"{at}.attn.output_linear" if side else f"{at}.attn.wo", dim, dim, *side)
    n.layer(f"{at}.mlp.0", ratio * dim, dim, *side)
    n.layer(f"{at}.mlp.{second}", dim, ratio * dim, *side)


def litv2(width, depths, tenths=9):
    """``tenths`` of the heads of the third stage are for low frequencies."""
    n = Names()
    n.layer("patch_embed.proj", width, 3, 4, 4)
    n.norm("patch_embed.norm", width)
    for i, depth in enumerate(depths):
        dim = width << i
        heads = dim // 32
        low = 32 * (heads * tenths // 10) if i == 2 else dim
        for j in range(depth):
            at = f"layers.{i}.blocks.{j}"
            n.norm(f"{at}.norm2", dim)
            n.mlp(f"{at}.mlp", dim, 4 * dim)
            n.layer(f"{at}.mlp.dwconv.dwconv", 4 * dim, 1, 3, 3)
            if i < 2:  # no attention
                continue
            n.norm(f"{at}.norm1", dim)
            if low:
                n.layer(f"{at}.attn.l_q", low, dim)
                n.layer(f"{at}.attn.l_kv", 2 * low, dim)
                n.layer(f"{at}.attn.l_proj", low, low)
            if dim > low:
                n.layer(f"{at}.attn.h_qkv", 3 * (dim - low), dim)
                n.layer(f"{at}.attn.h_proj", dim - low, dim - low)
        if i < 3:
            at = f"layers.{i}.downsample"
            n.layer(f"{at}.dconv", 2 * dim, dim, 2, 2)
            n.layer(f"{at}.dconv.conv_offset", 8, dim, 2, 2)
            n.norm(f"{at}.norm_layer", 2 * dim, "bn")
    n.norm("norm", width * 8)
    n.layer("head", 1000, width * 8)
    return n


def flowformer():
    n = Names(pos_embed=(1, 3136, 96))
    for i, depth in enumerate((3, 3, 10, 3)):
        dim, patch = 96 << i, 4 if i == 0 else 2
        n.layer(f"patch_embed.{i}.proj", dim, dim // 2 if i else 3, patch, patch)
        for j in range(depth):
            at = f"blocks.{i}.{j}"
            n[f"{at}.gamma"] = (dim,)
            n.norm(f"{at}.norm1", dim)
            n.norm(f"{at}.norm2", dim)
            n.layer(f"{at}.attn.qkv", 3 * dim, dim)
            n.layer(f"{at}.attn.proj", dim, dim)
            n.mlp(f"{at}.mlp", dim, 4 * dim)
    n.norm("norm", 768)
    n.layer("head", 1000, 768)
    return n


def transnext(dims, depths, aaaa=False):
    n, before = Names(), 3
    for i, (dim, depth, ratio) in enumerate(zip(dims, depths, (8, 8, 4, 4), strict=True)):
        stage, side, heads, hidden = i + 1, 3 if i else 7, dim // 24, int(2 * int(dim * ratio) / 3)
        n.layer(f"patch_embed{stage}.proj", dim, before, side, side)
        n.norm(f"patch_embed{stage}.norm", dim)
        for j in range(depth):
            at = f"block{stage}.{j}"
            n.norm(f"{at}.norm1", dim)
            n.norm(f"{at}.norm2", dim)
            n[f"{at}.attn.temperature"], n[f"{at}.attn.query_embedding"] = (heads, 1, 1), (heads, 1, 24)
            if i == 3 and not aaaa:
                n.layer(f"{at}.attn.qkv", 3 * dim, dim)
            else:
                n.layer(f"{at}.attn.q", dim, dim)
                n.layer(f"{at}.attn.kv", 2 * dim, dim)
                n.layer(f"{at}.attn.sr", dim, dim, 1, 1)
                n.norm(f"{at}.attn.norm", dim)
                n[f"{at}.attn.relative_pos_bias_local"] = (heads, 9)
                n[f"{at}.attn.learnable_tokens"], n[f"{at}.attn.learnable_bias"] = (heads, 24, 9), (heads, 1, 9)
            n.layer(f"{at}.attn.proj", dim, dim)
            n.layer(f"{at}.attn.cpb_fc1", 512, 2)
            n.layer(f"{at}.attn.cpb_fc2", heads, 512)
            n.layer(f"{at}.mlp.fc1", 2 * hidden, dim)
            n.layer(f"{at}.mlp.dwconv.dwconv", hidden, 1, 3, 3)
            n.layer(f"{at}.mlp.fc2", dim, hidden)
        n.norm(f"norm{stage}", dim)
        before = dim
    n.layer("head", 1000, before)
    return n


# --- sizes ------------------------------------------------------------------------------------------------------------

T, S, M, L = (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 18, 3), (3, 8, 27, 3)  # of PVT
SWIN_T, SWIN_S = (2, 2, 6, 2), (2, 2, 18, 2)
CSWIN_T, CSWIN_S, SHORT = (2, 4, 18, 1), (3, 6, 29, 2), (2, 4, 32, 2)
NAT_M, NAT_T = (3, 4, 6, 5), (3, 4, 18, 5)
TWO, THREE, INTO_THIRD = (None, None), (None, None, None), (None, None, 2)
WIDE = (2, 4, 10, 16)  # InLine's heads in PVT
RAVLT = {
    "t": ((64, 128, 256, 512), (2, 2, 6, 2), (1, 2, 4, 8)),
    "s": ((64, 128, 320, 512), (3, 5, 9, 3), (1, 2, 5, 8)),
    "b": ((96, 192, 384, 512), (4, 6, 12, 6), (1, 2, 6, 8)),
    "l": ((96, 192, 448, 640), (4, 7, 19, 8), (1, 2, 7, 10)),
}
NEXT_MICRO, NEXT_SMALL, NEXT_BASE = (48, 96, 192, 384), (72, 144, 288, 576), (96, 192, 384, 768)
VAN = (64, 128, 320, 512)

# Function, arguments, and the parameters that were measured on the authors' code.
RELEASES = {
    "agent_deit_t": (deit, ("agent", 192, 3), {}, 6_015_640),
    "agent_deit_s": (deit, ("agent", 384, 6), {}, 22_647_112),
    "agent_deit_s_448": (deit, ("agent", 384, 6, 28), {}, 23_070_472),
    "agent_deit_b": (deit, ("agent", 768, 12, 14, 81, 4), {}, 87_204_904),
    "agent_pvt_t": (pvt, ("agent", T), {}, 11_570_352),
    "agent_pvt_s": (pvt, ("agent", S), {}, 20_635_066),
    "agent_pvt_m": (pvt, ("agent", M), {}, 35_921_746),
    "agent_pvt_m_256": (pvt, ("agent", M), dict(side=64), 36_083_682),
    "agent_pvt_l": (pvt, ("agent", L), {}, 48_738_180),
    "agent_swin_t": (swin, ("agent", 96, SWIN_T, THREE), {}, 28_902_964),
    "agent_swin_s": (swin, ("agent", 96, SWIN_S, TWO), {}, 49_666_684),
    "agent_swin_s_288": (swin, ("agent", 96, SWIN_S, TWO, 72, 9), {}, 49_707_964),
    "agent_swin_b": (swin, ("agent", 128, SWIN_S, INTO_THIRD), {}, 88_095_096),
    "agent_swin_b_384": (swin, ("agent", 128, SWIN_S, INTO_THIRD, 96, 12), {}, 88_305_016),
    "agent_cswin_t": (cswin, ("agent", 64, CSWIN_T), {}, 20_458_672),
    "agent_cswin_s": (cswin, ("agent", 64, CSWIN_S), {}, 32_814_100),
    "agent_cswin_b": (cswin, ("agent", 96, CSWIN_S), {}, 73_249_696),
    "agent_cswin_b_384": (cswin, ("agent", 96, CSWIN_S, 96), {}, 73_328_416),
    "flatten_pvt_t": (pvt, ("flatten", T), {}, 12_150_504),
    "flatten_pvt_v2_b0": (pvt_v2, ("flatten", T, (32, 64, 160, 256)), {}, 3_594_824),
    "flatten_swin_t": (swin, ("flatten", 96, SWIN_T, TWO), {}, 29_192_384),
    "flatten_swin_s": (swin, ("flatten", 96, SWIN_S, TWO), {}, 50_510_288),
    "flatten_swin_b": (swin, ("flatten", 128, SWIN_S, TWO), {}, 88_972_488),
    "flatten_swin_b_384": (swin, ("flatten", 128, SWIN_S, TWO, 96, 12), {}, 91_433_928),
    "flatten_cswin_t": (cswin, ("flatten", 64, CSWIN_T), {}, 21_201_768),
    "pola_pvt_t": (pvt, ("pola", T), {}, 12_924_648),
    "pola_pvt_s": (pvt, ("pola", S), {}, 23_157_224),
    "pola_swin_t": (swin, ("pola", 96, SWIN_T, TWO), {}, 29_285_696),
    "pola_swin_s": (swin, ("pola", 96, SWIN_S, TWO), {}, 50_603_600),
    "pola_swin_b": (swin, ("pola", 128, SWIN_S, TWO), {}, 89_137_864),
    "inline_deit_t": (deit, ("inline", 192, 6), {}, 6_477_736),
    "inline_deit_s": (deit, ("inline", 320, 10, 18), {}, 16_734_760),
    "inline_deit_b": (deit, ("inline", 384, 12, 28), {}, 23_797_096),
    "inline_pvt_t": (pvt, ("inline", T, WIDE), {}, 12_032_232),
    "inline_pvt_s": (pvt, ("inline", S, WIDE), {}, 21_556_136),
    "inline_pvt_m": (pvt, ("inline", M, WIDE), {}, 37_618_856),
    "inline_pvt_l": (pvt, ("inline", L, WIDE), {}, 51_154_280),
    "inline_swin_t": (swin, ("inline", 96, SWIN_T, THREE), {}, 29_223_544),
    "inline_swin_s": (swin, ("inline", 96, SWIN_S, TWO), {}, 49_793_296),
    "inline_swin_b": (swin, ("inline", 128, SWIN_S, INTO_THIRD), {}, 88_350_120),
    "inline_cswin_t": (cswin, ("inline", 64, CSWIN_T), {}, 20_604_520),
    "inline_cswin_s": (cswin, ("inline", 64, CSWIN_S), {}, 33_032_872),
    "inline_cswin_b": (cswin, ("inline", 96, CSWIN_S), {}, 73_413_640),
    "slab_deit_t": (deit, ("slab", 192, 3), dict(norm="prepbn"), 6_198_401),
    "slab_deit_s": (deit, ("slab", 384, 6), dict(norm="prepbn"), 22_992_641),
    "slab_pvt_t": (pvt, ("slab", T), dict(norm="prepbn"), 12_157_692),
    "slab_swin_t": (swin, ("slab", 96, SWIN_T, TWO), dict(norm="prepbn"), 29_216_605),
    "slab_swin_s": (swin, ("slab", 96, SWIN_S, TWO), dict(norm="prepbn"), 50_552_965),
    "slab_cswin_t": (cswin, ("slab", 64, CSWIN_T), dict(norm="prepbn"), 21_227_807),
    "slab_cswin_s": (cswin, ("slab", 64, SHORT), dict(norm="prepbn"), 35_494_205),
    "prepbn_deit_t": (deit, (None, 192, 3), dict(norm="repbn"), 5_717_441),
    "prepbn_deit_s": (deit, (None, 384, 6), dict(norm="prepbn"), 22_069_889),
    "prepbn_pvt_t": (pvt, (None, T), dict(norm="prepbn"), 13_239_554),
    "prepbn_pvt_s": (pvt, (None, S), dict(norm="prepbn"), 24_507_801),
    "prepbn_pvt_m": (pvt, (None, M), dict(norm="prepbn"), 44_253_117),
    "prepbn_swin_t": (swin, (None, 96, SWIN_T), dict(norm="repbn"), 28_288_383),
    "nat_mini": (nat, (64, NAT_M, 3), {}, 19_984_174),
    "nat_tiny": (nat, (64, NAT_T, 3), {}, 27_901_582),
    "nat_small": (nat, (96, NAT_T, 2, True), {}, 50_743_297),
    "nat_base": (nat, (128, NAT_T, 2, True), {}, 89_769_652),
    "dinat_mini": (nat, (64, NAT_M, 3), {}, 19_984_174),
    "dinat_tiny": (nat, (64, NAT_T, 3), {}, 27_901_582),
    "dinat_small": (nat, (96, NAT_T, 2), {}, 50_719_681),
    "dinat_base": (nat, (128, NAT_T, 2, True), {}, 89_769_652),
    "dinat_large": (nat, (192, NAT_T, 2), {}, 200_943_514),
    "dinat_large_384": (nat, (192, NAT_T, 2), {}, 200_943_514),
    "dinat_large_384_11x11": (nat, (192, NAT_T, 2), dict(window=11), 201_144_250),
    "dinat_s_tiny": (dinat_s, (96, SWIN_T), {}, 28_288_354),
    "dinat_s_small": (dinat_s, (96, SWIN_S), {}, 49_606_258),
    "dinat_s_base": (dinat_s, (128, SWIN_S), {}, 87_768_224),
    "dinat_s_large": (dinat_s, (192, SWIN_S), {}, 196_532_476),
    "dinat_s_large_384": (dinat_s, (192, SWIN_S), {}, 196_532_476),
    "van_b0": (van, ((32, 64, 160, 256), (3, 3, 5, 2)), {}, 4_105_800),
    "van_b1": (van, (VAN, (2, 2, 4, 2)), {}, 13_861_800),
    "van_b2": (van, (VAN, (3, 3, 12, 3)), {}, 26_578_472),
    "van_b3": (van, (VAN, (3, 5, 27, 3)), {}, 44_765_608),
    "ravlt_t": (ravlt, RAVLT["t"], {}, 14_897_768),
    "ravlt_s": (ravlt, RAVLT["s"], {}, 25_591_208),
    "ravlt_b": (ravlt, RAVLT["b"], {}, 48_241_288),
    "ravlt_l": (ravlt, RAVLT["l"], {}, 95_242_440),
    "mavit_t": (ravlt, RAVLT["t"], dict(head=2048), 16_449_128),
    "mavit_s": (ravlt, RAVLT["s"], dict(head=2048), 27_142_568),
    "mavit_b": (ravlt, RAVLT["b"], dict(head=2048), 49_792_648),
    "mavit_l": (ravlt, RAVLT["l"], dict(head=2560), 97_766_088),
    "biformer_tiny": (biformer, (64, (2, 2, 8, 2)), {}, 13_142_760),
    "biformer_small": (biformer, (64, (4, 4, 18, 4)), {}, 25_536_232),
    "biformer_base": (biformer, (96, (4, 4, 18, 4)), {}, 56_804_968),
    "biformer_stl": (biformer_stl, (), {}, 28_372_552),
    "biformer_stl_nchw": (biformer_stl, (True,), {}, 28_372_552),
    "litv2_small": (litv2, (96, SWIN_T), {}, 27_844_000),
    "litv2_medium": (litv2, (96, SWIN_S), {}, 48_830_368),
    "litv2_base": (litv2, (128, SWIN_S), {}, 86_520_704),
    "litv2_small_alpha00": (litv2, (96, SWIN_T, 0), {}, 28_089_760),
    "litv2_small_alpha02": (litv2, (96, SWIN_T, 2), {}, 27_844_000),
    "litv2_small_alpha04": (litv2, (96, SWIN_T, 4), {}, 27_696_544),
    "litv2_small_alpha05": (litv2, (96, SWIN_T, 5), {}, 27_647_392),
    "litv2_small_alpha07": (litv2, (96, SWIN_T, 7), {}, 27_696_544),
    "litv2_small_alpha10": (litv2, (96, SWIN_T, 10), {}, 28_089_760),
    "cswin_tiny_224": (cswin, (None, 64, (1, 2, 21, 1)), {}, 22_320_552),
    "cswin_small_224": (cswin, (None, 64, SHORT), {}, 34_643_304),
    "cswin_base_224": (cswin, (None, 96, SHORT), {}, 77_382_184),
    "cswin_base_384": (cswin, (None, 96, SHORT), {}, 77_382_184),
    "cswin_large_224": (cswin, (None, 144, SHORT), {}, 173_262_664),
    "cswin_large_384": (cswin, (None, 144, SHORT), {}, 173_262_664),
    "pvt_tiny": (pvt, (None, T), {}, 13_229_288),
    "pvt_small": (pvt, (None, S), {}, 24_485_864),
    "pvt_medium": (pvt, (None, M), {}, 44_208_104),
    "pvt_large": (pvt, (None, L), {}, 61_369_320),
    "transnext_micro": (transnext, (NEXT_MICRO, (2, 2, 15, 2)), {}, 12_809_304),
    "transnext_tiny": (transnext, (NEXT_SMALL, (2, 2, 15, 2)), {}, 28_258_960),
    "transnext_small": (transnext, (NEXT_SMALL, (5, 5, 22, 5)), {}, 49_741_564),
    "transnext_base": (transnext, (NEXT_BASE, (5, 5, 23, 5)), {}, 89_721_496),
    "transnext_small_384": (transnext, (NEXT_SMALL, (5, 5, 22, 5)), {}, 49_741_564),
    "transnext_base_384": (transnext, (NEXT_BASE, (5, 5, 23, 5)), {}, 89_721_496),
    "transnext_micro_aaaa_256": (transnext, (NEXT_MICRO, (2, 2, 15, 2), True), {}, 13_114_008),
    "flowformer": (flowformer, (), {}, 43_311_304),
}
