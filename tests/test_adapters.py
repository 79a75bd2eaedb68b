"""Adapters from other packages: every layer that they adapt learns, and computes what it did until then."""

import copy
import importlib.util

import pytest
import timm
import torch
from torch import nn

import visionattn  # noqa: F401  (registers the models)

SMALL = {
    "van_b0": (dict(embed_dims=(8, 16, 16, 24), depths=(1, 1, 1, 1)), 32),
    "nat_tiny": (dict(depths=(1, 1, 1, 1)), 32),
    "agent_swin_t": (dict(img_size=64, depths=(1, 1, 1, 1)), 64),
    "biformer_tiny": (dict(depths=(1, 1, 1, 1)), 32),
    "flatten_pvt_t": (dict(img_size=64, depths=(1, 1, 1, 1)), 64),
}


class Lora(nn.Module):
    """What LoRA does to a convolution or a linear layer: ``base(x) + B(A(x))``, of layers of the base's class."""

    def __init__(self, base, rank):
        super().__init__()
        self.base, kind = base, type(base)
        if isinstance(base, nn.Conv2d):
            self.a = kind(base.in_channels, rank, base.kernel_size, base.stride, base.padding, bias=False)
            self.b = kind(rank, base.out_channels, (1, 1), (1, 1), groups=base.groups, bias=False)
        else:
            self.a = nn.Linear(base.in_features, rank, bias=False)
            self.b = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.b.weight)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


def model_of(name):
    arguments, size = SMALL[name]
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **arguments).eval(), torch.randn(2, 3, size, size)


def targets(model):
    """What LoRA can adapt; it passes a dilation on to no layer of its own."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and "head" not in name and getattr(layer, "dilation", (1,))[0] == 1:
            yield name, layer


@pytest.mark.parametrize("name", SMALL)
def test_every_adapted_layer_learns_and_starts_from_what_it_was(name):
    model, x = model_of(name)
    with torch.no_grad():
        before = model(x)
    adapted = []
    for path, layer in list(targets(model)):
        adapted.append(Lora(layer, max(4, getattr(layer, "groups", 1))))
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, adapted[-1])
    with torch.no_grad():
        torch.testing.assert_close(model(x), before, rtol=1e-5, atol=1e-6)
    for layer in adapted:
        nn.init.normal_(layer.b.weight, std=0.05)
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for layer in adapted for p in (layer.a.weight, layer.b.weight))


@pytest.mark.parametrize("name", SMALL)
def test_merged_adapters_of_peft_compute_what_they_did(name):
    if importlib.util.find_spec("peft") is None:
        pytest.skip("peft is not installed")
    from peft import LoraConfig, get_peft_model

    model, x = model_of(name)
    named = dict(targets(model))
    # peft merges no grouped convolutions.
    for mergeable in (True, False):
        chosen = [path for path, layer in named.items() if getattr(layer, "groups", 1) == 1 or not mergeable]
        ranks = {path: groups for path in chosen if (groups := getattr(named[path], "groups", 1)) > 1}
        config = LoraConfig(r=4, target_modules=chosen, rank_pattern=ranks, init_lora_weights=True)
        adapted = get_peft_model(copy.deepcopy(model), config).eval()
        learned = {path: p for path, p in adapted.named_parameters() if "lora_" in path}
        for path, p in learned.items():
            if "lora_B" in path:
                nn.init.normal_(p, std=0.05)
        y = adapted(x)
        y.square().sum().backward()
        assert len(learned) == 2 * len(chosen) and all(p.grad.any() for p in learned.values())
        if mergeable:
            torch.testing.assert_close(adapted.merge_and_unload().eval()(x), y, rtol=1e-4, atol=1e-5)
