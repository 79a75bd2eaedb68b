"""Hedgehog's feature maps, attention and losses against what the authors' code computed, and their options."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F

import visionattn  # noqa: F401
from tests.parity import fixture_image, fixture_weights, load_fixture, relative_error
from visionattn.attention.hedgehog import (
    HedgehogAttention,
    HedgehogFeatures,
    attention_transfer_loss,
    attention_weight_loss,
    transfer,
    window_attention,
)

FIXTURES = ["hedgehog_exp_dim", "hedgehog_softmax_dim", "hedgehog_softmax_dim_causal", "hedgehog_window_causal"]
# Rounding is 2e-7; a wrong eps of the clamp or the divisor is below it and read off the code, anything else far above.
TOLERANCE = 1e-6


@pytest.fixture(params=FIXTURES)
def recorded(request):
    """A fixture, the layer with its maps, and its queries, keys and values. [B, N, h, D]"""
    fixture = load_fixture(f"hedgehog/{request.param}")
    config = fixture["config"]
    h, d = config["h"], config["d"]
    layer = HedgehogAttention(
        h * d, h, config["f"], config["act"], config["full"], causal="causal" in request.param,
        window=config.get("window", 0),
    )  # fmt: skip
    missing, unexpected = layer.load_state_dict(fixture_weights(fixture), strict=False)
    assert not unexpected and {name.split(".")[0] for name in missing} == {"qkv", "proj"}
    q, k, v = fixture_image(fixture).flatten(2).transpose(1, 2).unflatten(-1, (3, h, d)).unbind(2)
    return fixture, layer, q, k, v


def test_equals_the_authors(recorded):
    fixture, layer, q, k, v = recorded
    expected = torch.tensor(fixture["output"]["values"])
    for y in (layer._student(q, k, v, False), layer._student(q, k, v, True)):
        assert relative_error(y.flatten(2), expected) < TOLERANCE
    by_weights = layer.weights(q, k) @ v.transpose(1, 2)
    assert relative_error(by_weights.transpose(1, 2).flatten(2), expected) < TOLERANCE


def test_feature_maps_weights_teacher_and_losses_equal_the_authors(recorded):
    fixture, layer, q, k, v = recorded
    student, teacher = layer.weights(q, k), layer.teacher(q, k)
    output = teacher @ v.transpose(1, 2)
    y = layer._student(q, k, v, False).transpose(1, 2)
    losses = torch.stack([attention_weight_loss(student, teacher), attention_transfer_loss(y, output)])
    actual = [layer.feature_map_q(q).transpose(1, 2), layer.feature_map_k(k).transpose(1, 2), student, teacher, output]
    for ours, theirs in zip([*actual, losses], fixture["features"], strict=True):
        assert list(ours.shape) == theirs["shape"], theirs["label"]
        sample = ours.reshape(-1)[torch.tensor(theirs["index"])]
        assert relative_error(sample, torch.tensor(theirs["value"])) < TOLERANCE, theirs["label"]


@pytest.mark.parametrize("full", [True, False])
@pytest.mark.parametrize("activation", ["softmax_dim", "exp_dim", "pos_elu", "relu"])
@pytest.mark.parametrize(
    "options", [dict(), dict(features=3, bias=True), dict(skip=True), dict(zero_init=True)], ids=str
)
def test_feature_map_equals_its_definition(activation, full, options):
    phi = HedgehogFeatures(2, 4, activation=activation, full=full, **options)
    if phi.mlp.bias is not None:
        torch.nn.init.normal_(phi.mlp.bias)
    x = torch.randn(2, 5, 2, 4)
    for h in range(2):
        z = x[:, :, h] @ phi.mlp.layer[h] + (0 if phi.mlp.bias is None else phi.mlp.bias[0, h, 0, 0])
        z = z + x[:, :, h] if options.get("skip") else z
        y = {
            "softmax_dim": lambda z: z.softmax(-1),
            "exp_dim": lambda z: (z - z.max(-1, keepdim=True)[0]).exp(),
            "pos_elu": lambda z: 1 + F.elu(z),
            "relu": F.relu,
        }[activation]
        doubled = full and activation in ("softmax_dim", "exp_dim")
        expected = (torch.cat([y(z), y(-z)], -1) if doubled else y(z)).clamp(min=1e-12)
        torch.testing.assert_close(phi(x)[:, :, h], expected)


@pytest.mark.parametrize("options", [dict(), dict(skip=True), dict(features=3), dict(features=6)], ids=str)
def test_zero_initialisation_is_the_identity(options):
    phi = HedgehogFeatures(2, 4, activation="pos_elu", zero_init=True, **options)
    x = torch.randn(2, 5, 2, 4)
    kept = min(4, options.get("features", 4))
    torch.testing.assert_close(phi(x)[..., :kept], (1 + F.elu(x))[..., :kept])


@pytest.mark.parametrize("N", [1, 4, 7, 8, 30])
def test_window_in_chunks_equals_every_pair(N):
    layer = HedgehogAttention(8, 2, causal=True, window=4, dtype=torch.float64)
    q, k, v = torch.randn(3, 2, N, 2, 4, dtype=torch.float64)
    expected = (layer.weights(q, k) @ v.transpose(1, 2)).transpose(1, 2)
    query, key = layer.feature_map_q(q), layer.feature_map_k(k)
    torch.testing.assert_close(window_attention(q, k, v, query, key, layer.window_factors, 4), expected)
    assert (layer.weights(q, k).sum(-1) - 1).abs().max() < 1e-12


def test_maps_can_be_tied():
    layer = HedgehogAttention(8, 2, tied=True)
    assert layer.feature_map_q is layer.feature_map_k
    assert len(HedgehogAttention(8, 2).state_dict()) == len(set(map(id, layer.parameters()))) + 1


def linearized():
    """A softmax network and the same with Hedgehog's attention."""
    tiny = dict(img_size=32, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3)
    teacher = timm.create_model("anyvit_tiny_patch16", **tiny).eval()
    for block in teacher.stages:
        torch.nn.init.normal_(block.attn.qkv.weight, std=0.5)  # sharp enough to have something to imitate
    student = timm.create_model("anyvit_tiny_patch16", mixer="visionattn.attention.HedgehogAttention", **tiny).eval()
    missing, unexpected = student.load_state_dict(teacher.state_dict(), strict=False)
    assert not unexpected and all(".feature_map_" in name for name in missing)
    return teacher, student


def test_transfer_teaches_the_maps_alone_to_imitate_softmax():
    teacher, student = linearized()
    x = torch.randn(8, 3, 32, 32)
    before = (student(x) - teacher(x)).norm().item()
    maps = [p for name, p in student.named_parameters() if ".feature_map_" in name]
    optimizer = torch.optim.AdamW(maps, lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = transfer(student, x, weight_factor=1.0)
        loss.backward()
        assert all(p.grad is None for name, p in student.named_parameters() if ".feature_map_" not in name)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]
    assert (student(x) - teacher(x)).norm().item() < 0.7 * before


def test_transfer_runs_every_layer_on_the_teacher_s_input_and_leaves_no_trace():
    teacher, student = linearized()
    x = torch.randn(2, 3, 32, 32)
    expected = student(x)
    seen = []
    hooks = [b.attn.register_forward_hook(lambda _m, args, _y: seen.append(args[0])) for b in student.stages]
    transfer(student, x)
    torch.testing.assert_close(seen[1], teacher.stages[1].norm1(teacher.stages[0](teacher.stem(x))))
    [hook.remove() for hook in hooks]
    torch.testing.assert_close(student(x), expected, rtol=0, atol=0)
    copy.deepcopy(student)
    with pytest.raises(ValueError, match="HedgehogAttention"):
        transfer(teacher, x)


@pytest.mark.parametrize("window", [0, 4])
@pytest.mark.parametrize("activation", ["softmax_dim", "exp_dim", "pos_elu", "relu"])
def test_vanishing_and_huge_features_stay_finite(activation, window):
    layer = HedgehogAttention(8, 2, activation=activation, causal=window > 0, window=window)
    for factor in (0.0, 1e4, -1e4):
        x = (factor * torch.randn(1, 20, 8)).requires_grad_()
        y = layer(x)
        y.sum().backward()
        assert y.isfinite().all() and x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(activation="gelu"), "activation.*softmax_dim.*gelu"),
        (dict(skip=True, features=3), "features.*skip.*4.*3"),
        (dict(window=3), "window.*causal.*3"),
        (dict(window=-1, causal=True), "window.*-1"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        HedgehogAttention(8, 2, **arguments)
