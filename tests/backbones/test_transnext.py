"""TransNeXt: what parity cannot see."""

import timm
from torch import nn

import visionattn  # noqa: F401


def test_norms_have_the_authors_eps():
    model = timm.create_model("transnext_micro", device="meta")
    eps = {name: module.eps for name, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    outer = {name for name in eps if name == "stem.norm" or name.endswith(("downsample.norm", "attn.norm"))}
    assert {name: 1e-5 if name in outer else 1e-6 for name in eps} == eps
    assert all(f"stages.{i}.norm" in eps for i in range(4))


def test_every_stage_of_aaaa_is_aggregated():
    model = timm.create_model("transnext_micro_aaaa_256", device="meta")
    assert sum(p.numel() for p in model.parameters()) == 13_114_008
    assert all(hasattr(stage.blocks[-1].attn, "learnable_tokens") for stage in model.stages)
