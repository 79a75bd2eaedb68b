"""Networks of one resolution: prefix tokens, positions at other sizes, formats of features."""

import copy
import warnings

import pytest
import timm
import torch
from timm.models import group_parameters
from torch import nn

import visionattn  # noqa: F401
from visionattn.frames.isotropic import PrefixIsotropic, TokenHead
from visionattn.layers.patch_embed import PatchEmbed, PrefixPatchEmbed, position_embedding, resize_position_embedding


class Block(nn.Module):
    """Mixes every token with the first, and grid tokens along the rows, so that prefix and size both matter."""

    def __init__(self, dim: int, prefix: int) -> None:
        super().__init__()
        self.fc = nn.Linear(dim, dim)
        self.prefix = prefix

    def forward(self, x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        rows = x[:, self.prefix :].unflatten(1, [size[0], size[1]]).cumsum(2).flatten(1, 2)
        return x + self.fc(torch.cat([x[:, : self.prefix] + rows.mean(1, keepdim=True), rows], 1)) + x[:, :1]


def network(prefix: int = 2, dim: int = 8, depth: int = 3, pool: str = "token", classes: int = 5) -> PrefixIsotropic:
    return PrefixIsotropic(
        PrefixPatchEmbed(3, dim, patch_size=4, img_size=16, num_prefix_tokens=prefix),
        [Block(dim, prefix) for _ in range(depth)],
        TokenHead(dim, classes, pool, prefix),
        norm=nn.LayerNorm(dim),
        num_classes=classes,
    )


@pytest.mark.parametrize("prefix", [1, 2])
@pytest.mark.parametrize("size", [(16, 16), (8, 24), (17, 19), (3, 5)])
def test_prefix_tokens_come_first_and_grids_follow_the_image(prefix, size):
    model = network(prefix).eval()
    x = torch.randn(2, 3, *size)
    grid = [max(1, s // 4) for s in size]
    features = model.forward_features(x)
    assert features.shape == (2, prefix + grid[0] * grid[1], 8)
    final, maps = model.forward_intermediates(x)
    torch.testing.assert_close(final, features)
    assert [list(y.shape) for y in maps] == [[2, 8, *grid]] * 3
    assert model(x).shape == (2, 5)


def test_intermediates_in_every_format_with_and_without_prefix_tokens_and_norm():
    model = network().eval()
    x = torch.randn(2, 3, 16, 20)
    features = model.forward_features(x)
    pairs = model.forward_intermediates(x, return_prefix_tokens=True, norm=True, intermediates_only=True)
    tokens = [torch.cat([prefix, y.flatten(2).transpose(1, 2)], 1) for y, prefix in pairs]
    torch.testing.assert_close(tokens[-1], features)
    raw = model.forward_intermediates(x, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(model.norm(raw[0]), tokens[0][:, 2:])
    nhwc = model.forward_intermediates(x, [0], output_fmt="NHWC", stop_early=True, intermediates_only=True)
    torch.testing.assert_close(nhwc[0].flatten(1, 2), raw[0])


@pytest.mark.parametrize(("pool", "expected"), [("token", 0), ("avg", None), ("max", None), ("avgmax", None)])
def test_pooling_of_prefix_or_of_patches(pool, expected):
    model = network(pool=pool).eval()
    features = model.forward_features(torch.randn(2, 3, 16, 16))
    pooled = model.forward_head(features, pre_logits=True)
    patches = features[:, 2:]
    by_hand = {
        "token": features[:, 0],
        "avg": patches.mean(1),
        "max": patches.amax(1),
        "avgmax": (patches.mean(1) + patches.amax(1)) / 2,
    }
    torch.testing.assert_close(pooled, by_hand[pool])
    torch.testing.assert_close(model.forward_head(features), model.get_classifier()(pooled))


def test_reset_classifier_of_tokens():
    model = network().eval().double()
    model.requires_grad_(False)
    model.reset_classifier(3, "avg")
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    assert model(x).shape == (2, 3) and model.get_classifier().weight.dtype == torch.float64
    assert not any(p.requires_grad for p in model.parameters()) and not any(m.training for m in model.modules())
    model.reset_classifier(0)
    torch.testing.assert_close(model(x), model.forward_features(x)[:, 2:].mean(1))
    model.reset_classifier(0, "")
    torch.testing.assert_close(model(x), model.forward_features(x))
    with pytest.raises(ValueError, match="'mean'.*'token'"):
        model.reset_classifier(4, "mean")


@pytest.mark.parametrize("index", [0, 2])
def test_pruned_network_keeps_its_maps_and_has_nothing_unused(index):
    model = network().eval()
    x = torch.randn(2, 3, 16, 16)
    expected = model.forward_intermediates(x, [index], intermediates_only=True)[0]
    pruned = copy.deepcopy(model)
    assert pruned.prune_intermediate_layers([index]) == [index]
    torch.testing.assert_close(pruned.forward_intermediates(x, [index], intermediates_only=True)[0], expected)
    pruned.train()(x).sum().backward()
    assert all(p.grad is not None for p in pruned.parameters())
    normed = model.forward_intermediates(x, [index], norm=True, intermediates_only=True)[0]
    kept = copy.deepcopy(model)  # as timm's getter does for maps with the norm
    kept.prune_intermediate_layers([index], prune_norm=False)
    torch.testing.assert_close(kept.forward_intermediates(x, [index], norm=True, intermediates_only=True)[0], normed)


def test_gradient_checkpointing_changes_nothing():
    model = network()
    twin = copy.deepcopy(model)
    twin.set_grad_checkpointing()
    x = torch.randn(2, 3, 16, 16)
    for run in (lambda m: m(x), lambda m: m.forward_intermediates(x, intermediates_only=True)[-1]):
        for net in (model, twin):
            net.zero_grad()
            run(net).square().sum().backward()
        for p, q in zip(model.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)


def test_depth_groups_and_decay_exemptions():
    model = network()
    groups = group_parameters(model, model.group_matcher(), reverse=True)
    assert groups["stem.prefix_tokens"] == groups["stem.pos_embed"] == 0
    assert groups["stages.1.fc.weight"] == 2 and groups["norm.weight"] == 3 and groups["head.fc.bias"] == 4
    assert model.no_weight_decay() == {"stem.pos_embed", "stem.prefix_tokens"}


def test_scripts_compiles_and_exports():
    model = network().eval()
    x = torch.randn(2, 3, 16, 24)
    expected = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(torch.jit.script(model)(x), expected)
    # Where other tests have compiled it for other sizes, torch 2.11 would take any size, which it cannot resample for.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(compiled(x), expected)
    sides = {2: torch.export.Dim("height", min=8, max=256), 3: torch.export.Dim("width", min=8, max=256)}
    program = torch.export.export(model, (x,), dynamic_shapes={"x": sides})
    for y in (x, torch.randn(2, 3, 30, 9)):
        torch.testing.assert_close(program.module()(y), model(y), rtol=1e-4, atol=1e-5)


def test_positions_are_stored_for_one_size_and_resampled_for_others():
    stem = PatchEmbed(3, 4, patch_size=4, img_size=(8, 16)).eval()
    x = torch.randn(1, 3, 8, 16)
    torch.testing.assert_close(stem(x) - stem.patches(x), stem.pos_embed.unflatten(1, (2, 4)))
    with torch.no_grad():
        stem.pos_embed.copy_(torch.linspace(0, 1, 4).repeat(2)[None, :, None].expand(1, 8, 4))  # a ramp along the rows
    wide = position_embedding(stem.pos_embed, stem.grid_size, 2, 8, 0).unflatten(1, (2, 8))
    torch.testing.assert_close(wide[:, 0], wide[:, 1])  # rows stay rows: height and width are not mixed up
    assert (wide[0, 0, :, 0].diff() > 0).all()


def test_input_size_is_set_for_good():
    model = network().eval()
    x = torch.randn(1, 3, 24, 8)
    expected = model(x)
    model.set_input_size((24, 8))
    assert model.stem.grid_size == (6, 2) and model.stem.pos_embed.shape == (1, 2 + 12, 8)
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(ValueError, match="img_size.*3"):
        model.set_input_size(3)


def test_checkpoint_of_another_image_size_loads():
    small = timm.create_model("anyvit_tiny_patch16", img_size=64, embed_dim=8, depth=1, num_heads=1)
    large = timm.create_model("anyvit_tiny_patch16", img_size=96, embed_dim=8, depth=1, num_heads=1)
    state = small.state_dict()
    assert resize_position_embedding(state, small.stem) is state
    large.load_state_dict(resize_position_embedding(state, large.stem))
    x = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(large.eval()(x), small.eval()(x))
    with pytest.raises(ValueError, match=r"stem.pos_embed.*square.*\(1, 15, 8\)"):
        resize_position_embedding({"stem.pos_embed": torch.zeros(1, 15, 8)}, large.stem)


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="num_prefix_tokens.*0"):
        PrefixPatchEmbed(3, 8, num_prefix_tokens=0)
    with pytest.raises(ValueError, match="img_size.*16.*8"):
        PatchEmbed(3, 8, patch_size=16, img_size=8)
    with pytest.raises(ValueError, match="global_pool.*'cls'"):
        TokenHead(8, 5, "cls")
