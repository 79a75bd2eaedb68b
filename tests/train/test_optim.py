import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import nn

from visionattn.layers.token_merging import DeformableTokenMerging
from visionattn.train.optim import create_optimizer, param_groups, warmup_cosine


def small_van():
    return timm.create_model("van_b0", embed_dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), mlp_ratios=(1, 1, 1, 1))


@pytest.mark.parametrize("name", ["adamw", "lamb", "lion"])
def test_layer_decay_makes_early_layers_move_less(name):
    model = small_van()
    before = {key: value.clone() for key, value in model.named_parameters()}
    optimizer = create_optimizer(model, name, lr=1e-3, weight_decay=0.0, layer_decay=0.5)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    optimizer.step()
    moved = {key: (value - before[key]).abs().max().item() for key, value in model.named_parameters()}
    first = next(key for key in moved if key.startswith("stem"))
    last = next(key for key in moved if "head" in key and key.endswith("weight"))
    assert moved[first] < 0.2 * moved[last]


def test_layer_decay_survives_the_schedule():
    optimizer = create_optimizer(small_van(), "adamw", lr=1.0, weight_decay=0.05, layer_decay=0.5)
    peaks = [group["lr"] for group in optimizer.param_groups]
    schedule = warmup_cosine(optimizer, warmup_steps=4, total_steps=20, start=0.1, end=0.01)
    assert len(set(peaks)) > 3
    for _ in range(20):
        ratios = [group["lr"] / peak for group, peak in zip(optimizer.param_groups, peaks, strict=True)]
        assert max(ratios) - min(ratios) < 1e-12
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] / peaks[0] == pytest.approx(0.01)


def test_schedule_warms_up_linearly_then_falls_to_the_end_and_stays():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = warmup_cosine(optimizer, warmup_steps=4, total_steps=12, start=0.1, end=0.05)
    rates = []
    for _ in range(16):
        rates.append(schedule.get_last_lr()[0] / 2)
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0.1, 0.325, 0.55, 0.775, 1.0])
    assert rates[8] == pytest.approx(0.525)
    assert rates[12:] == pytest.approx([0.05] * 4)


def test_vectors_have_no_weight_decay():
    model = small_van()
    optimizer = create_optimizer(model, "adamw", lr=1e-3, weight_decay=0.05)
    for group in optimizer.param_groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))


def small_litv2(**kwargs):
    return timm.create_model("litv2_small", embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2), **kwargs)


def rates(optimizer):
    return {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}


@pytest.mark.parametrize("layer_decay", [None, 0.5])
@pytest.mark.parametrize("features_only", [False, True])
def test_parameters_with_a_rate_of_their_own_keep_their_share_of_it(layer_decay, features_only, monkeypatch):
    model = small_litv2(features_only=features_only)
    model = nn.ModuleDict({"backbone": model, "decoder": nn.Linear(2, 2)}) if features_only else model
    scaled = rates(create_optimizer(model, "adamw", 1.0, 0.05, layer_decay))
    monkeypatch.delattr(DeformableTokenMerging, "lr_scales")
    common = rates(create_optimizer(model, "adamw", 1.0, 0.05, layer_decay))
    assert scaled.keys() == common.keys() == set(model.parameters())
    for name, parameter in model.named_parameters():
        assert scaled[parameter] / common[parameter] == pytest.approx(0.01 if "conv_offset" in name else 1)


def test_rates_of_their_own_leave_weight_decay_as_it_is():
    optimizer = create_optimizer(small_litv2(), "adamw", lr=1e-3, weight_decay=0.05)
    for group in optimizer.param_groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])


def test_timm_s_own_schedulers_honour_the_parameter_groups():
    model = small_litv2()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=1.0, param_group_fn=param_groups)
    scheduler, _ = create_scheduler_v2(optimizer, sched="cosine", num_epochs=10, warmup_epochs=2, warmup_lr=0.1)
    for epoch in (0, 1, 5):
        scheduler.step(epoch)
        by_name = {name: rates(optimizer)[parameter] for name, parameter in model.named_parameters()}
        (slow,) = {rate for name, rate in by_name.items() if "conv_offset" in name}
        (common,) = {rate for name, rate in by_name.items() if "conv_offset" not in name}
        assert slow == pytest.approx(0.01 * common)


def test_parameter_groups_need_nothing_of_the_model():
    model = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    groups = param_groups(model, weight_decay=0.1)
    assert [(len(g["params"]), g["weight_decay"], g["lr_scale"]) for g in groups] == [(3, 0.0, 1.0), (1, 0.1, 1.0)]
