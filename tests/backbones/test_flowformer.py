"""What parity cannot see of Flowformer: eps of single flows, initialisation, sizes, names of checkpoints."""

import re

import pytest
import timm
import torch
from torch import nn

import visionattn  # noqa: F401
from visionattn.attention import FlowAttention
from visionattn.backbones.flowformer import Flowformer, checkpoint_filter_fn

TINY = dict(img_size=64, embed_dims=(8, 12, 16, 20), depths=(1, 1, 2, 1), num_heads=4, num_classes=5)


def test_every_eps_follows_the_authors():
    model = Flowformer(**TINY)
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    flows = [m for m in model.modules() if isinstance(m, FlowAttention)]
    assert len(flows) == 5 and {(m.eps, m.flow_eps, m.num_heads, m.causal) for m in flows} == {(1e-6, 1e-6, 4, False)}


def test_only_mlp_branches_are_scaled_at_first_by_a_hundred_thousandth():
    model = Flowformer(**TINY)
    for block in (b for stage in model.stages for b in stage.blocks):
        assert block.residual1.gamma is None and torch.all(block.residual2.gamma == 1e-5)


def test_initialisation_follows_the_authors():
    model = Flowformer(img_size=64)
    fc = model.stages[2].blocks[0].mlp.fc1
    for weight in (fc.weight, model.stem.pos_embed):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not fc.bias.any()
    assert model.stem.proj.weight.abs().max() <= 48**-0.5  # PyTorch's own: uniform up to fan-in ** -0.5


def test_drop_path_rises_linearly_over_all_blocks():
    model = Flowformer(**TINY, drop_path_rate=0.2)
    rates = [block.residual1.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.05, 0.1, 0.15, 0.2])


def authors_names(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict under the authors' names: the inverse of the conversion, written independently of it."""
    renamed = {}
    for name, value in state_dict.items():
        if name.startswith("stem.proj"):
            name = name.replace("stem", "patch_embed.0")
        elif name == "stem.pos_embed":
            name = "pos_embed"
        elif "downsample" in name:
            name = re.sub(r"stages.(\d).downsample", r"patch_embed.\1", name)
        elif name.startswith("stages"):
            _, stage, _, block, rest = name.split(".", 4)
            name = f"blocks.{stage}.{block}.{rest.replace('residual2.', '')}"
        elif name.startswith("head"):
            name = name.replace("head.fc", "head")
        renamed[name] = value
    return renamed


@pytest.mark.parametrize("nesting", ["model", "state_dict", None])
@pytest.mark.parametrize("prefix", ["", "module."])
def test_authors_checkpoints_load_whole_without_what_the_profiler_left(nesting, prefix):
    model = Flowformer(**TINY)
    theirs = authors_names(model.state_dict())
    theirs |= {"total_ops": torch.zeros(1), "blocks.0.0.attn.qkv.total_params": torch.zeros(1)}
    theirs = {prefix + name: value for name, value in theirs.items()}
    converted = checkpoint_filter_fn({nesting: theirs, "epoch": 3} if nesting else theirs, model)
    assert converted.keys() == model.state_dict().keys()


def test_native_state_dict_passes_the_conversion_unchanged_even_without_head_or_stem():
    model = Flowformer(**TINY)
    for part in ("", "head.", "stem."):
        native = {name: value for name, value in model.state_dict().items() if not part or not name.startswith(part)}
        assert checkpoint_filter_fn(native, model) is native


def test_checkpoint_of_another_image_size_fits():
    small, large = Flowformer(**TINY).eval(), Flowformer(**{**TINY, "img_size": 96}).eval()
    large.load_state_dict(checkpoint_filter_fn(authors_names(small.state_dict()), large))
    x = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(large(x), small(x))
    small.set_input_size(96)
    torch.testing.assert_close(large(x), small(x))


@pytest.mark.parametrize(("size", "sides"), [(288, [72, 36, 18, 9]), (250, [62, 31, 15, 7]), (3, [1, 1, 1, 1])])
def test_sides_of_stages_are_those_of_unpadded_convolutions(size, sides):
    maps = Flowformer(**TINY).eval().forward_intermediates(torch.randn(1, 3, size, size), intermediates_only=True)
    assert [y.shape[2] for y in maps] == sides


def test_heads_must_divide_channels():
    with pytest.raises(ValueError, match="num_heads must divide dim = 64, got 12"):
        timm.create_model("flowformer", embed_dims=(64, 128, 256, 512))
