"""Feature maps for dense tasks, and the detection and segmentation code of others on top of them."""

import pytest
import timm
import torch
from torch import nn

import visionattn  # noqa: F401  (registers our models)
from tests.parity import fixture_image, fixture_weights, load_fixture, relative_error
from visionattn.features import FeatureBackbone, FPNBackbone, prefixed
from visionattn.weights.families import release_filter

TINY = {
    "van_b0": dict(embed_dims=(8, 16, 16, 24), depths=(1, 1, 1, 1), mlp_ratios=(2, 2, 2, 2)),
    "nat_mini": dict(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8), kernel_size=3),
}


def backbone(name="van_b0", **arguments):
    return FeatureBackbone(name, **(TINY.get(name, {}) | arguments))


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("size", [(64, 64), (75, 50)])
def test_maps_are_those_of_features_only_at_any_size(name, size):
    ours = backbone(name).eval()
    theirs = timm.create_model(name, features_only=True, feature_cls="getter", **TINY[name]).eval()
    theirs.model.load_state_dict(ours.model.state_dict())
    x = torch.randn(1, 3, *size)
    for a, b in zip(ours(x), theirs(x), strict=True):
        torch.testing.assert_close(a, b)
    assert [m.shape[1] for m in ours(x)] == ours.channels and ours.strides == [4, 8, 16, 32]


def test_outputs_can_be_chosen():
    assert backbone(out_indices=(1, 3)).strides == [8, 32]
    assert backbone(out_indices=3).strides == [8, 16, 32]
    with pytest.raises(ValueError, match=r"van_b0 has no feature maps at out_indices \(1, 7\)"):
        backbone(out_indices=(1, 7))


def test_output_norms_touch_the_outputs_only():
    bare, normed = backbone().eval(), backbone(output_norm=(1, 3), output_norm_eps=1e-6).eval()
    normed.model.load_state_dict(bare.model.state_dict())
    x = torch.randn(1, 3, 64, 64)
    for i, (a, b) in enumerate(zip(bare(x), normed(x), strict=True)):
        if i in (1, 3):
            a = nn.functional.layer_norm(a.permute(0, 2, 3, 1), a.shape[1:2], eps=1e-6).permute(0, 3, 1, 2)
        torch.testing.assert_close(a, b)
    with pytest.raises(ValueError, match=r"output_norm names stages \[0\]"):
        backbone(out_indices=(1, 2), output_norm=(0,))


def test_a_classification_model_loads_and_its_classifier_is_left_out():
    whole = timm.create_model("nat_mini", num_classes=7, **TINY["nat_mini"]).eval()
    features = backbone("nat_mini").eval()
    features.load(whole.state_dict())
    x = torch.randn(1, 3, 64, 64)
    for a, b in zip(whole.forward_intermediates(x, intermediates_only=True), features(x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("naming", ["norm{}.", "extra_norms.{}."])
@pytest.mark.parametrize("nested", [True, False])
def test_a_dense_checkpoint_brings_the_norms_of_its_outputs(naming, nested):
    source, target = (backbone("nat_mini", output_norm=True) for _ in range(2))
    for norm in source.norms.values():
        nn.init.normal_(norm.weight)
    state = {key: value for key, value in source.model.state_dict().items()}
    for i, norm in source.norms.items():
        state |= {naming.format(i) + key: value for key, value in norm.state_dict().items()}
    target.load({"state_dict": state} if nested else state)
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in target.state_dict().items())


def test_weights_that_do_not_fit_are_refused_whole():
    features = backbone()
    state = {f"{key}": value for key, value in backbone().model.state_dict().items()}
    before = {key: value.clone() for key, value in features.state_dict().items()}
    with pytest.raises(ValueError, match=r"do not fit van_b0: .*stem.proj.weight is missing"):
        features.load({key: value for key, value in state.items() if key != "stem.proj.weight"})
    with pytest.raises(ValueError, match=r"stem.proj.bias is \[3\], here \[8\]"):
        features.load(state | {"stem.proj.bias": torch.zeros(3)})
    with pytest.raises(ValueError, match=r"model.neck.weight is unexpected"):
        features.load(state | {"neck.weight": torch.zeros(3)})
    assert all(torch.equal(before[key], value) for key, value in features.state_dict().items())


def test_frozen_stages_neither_learn_nor_change_their_statistics():
    features = backbone(frozen_stages=2).train()
    assert not features.model.stem.training and features.model.stages[2].training
    before = {key: value.clone() for key, value in features.state_dict().items()}
    sum(y.square().mean() for y in features(torch.randn(2, 3, 64, 64))).backward()
    frozen = ("model.stem.", "model.stages.0.", "model.stages.1.")
    for name, p in features.named_parameters():
        assert (p.grad is None) == name.startswith(frozen)
    for key, value in features.state_dict().items():
        if "running_mean" in key:
            assert torch.equal(value, before[key]) == key.startswith(frozen)
    with pytest.raises(ValueError, match="frozen_stages is 5; allowed are 0 to 4"):
        backbone(frozen_stages=5)


def test_norm_eval_keeps_all_statistics():
    features = backbone(norm_eval=True).train()
    before = {key: value.clone() for key, value in features.state_dict().items()}
    features(torch.randn(2, 3, 64, 64))
    assert all(torch.equal(value, before[key]) for key, value in features.state_dict().items())


@pytest.mark.parametrize("name", TINY)
def test_gradient_checkpointing_changes_no_gradient(name):
    one, other = backbone(name, norm_eval=True).train(), backbone(name, norm_eval=True, grad_checkpointing=True).train()
    other.load_state_dict(one.state_dict())
    x = torch.randn(1, 3, 40, 52)
    for features in (one, other):
        sum(y.square().mean() for y in features(x)).backward()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_layer_groups_survive_being_a_submodule():
    net = nn.Module()
    net.backbone = backbone(output_norm=True)
    matcher = prefixed(net.backbone.group_matcher(), "backbone")
    groups = timm.models.group_parameters(net, matcher, reverse=True)
    assert groups["backbone.model.stem.proj.weight"] == 0
    assert groups["backbone.norms.0.weight"] > groups["backbone.model.stages.2.blocks.0.mlp.fc1.weight"]
    resnet = prefixed(timm.create_model("test_resnet").group_matcher(), "model")
    assert resnet["stem"].startswith(r"^model\.(?:") and "^" not in resnet["stem"][1:]


@pytest.mark.parametrize("extra, levels", [("pool", 5), ("p6p7", 6)])
def test_the_pyramid_has_what_torchvision_s_detectors_read(extra, levels):
    pyramid = FPNBackbone(backbone(), 16, extra)
    maps = pyramid(torch.randn(1, 3, 70, 90))
    assert pyramid.out_channels == 16 and len(maps) == levels and pyramid.levels == ["0", "1", "2", "3"]
    assert all(y.shape[1] == 16 for y in maps.values())


def test_a_detector_on_a_shared_backbone_loads_with_its_norms():
    """The family is that of the registered name, not of the class, which several families share."""
    arguments = dict(embed_dim=32, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 4), output_norm=True)
    source, target = (FeatureBackbone("agent_swin_t", **arguments) for _ in range(2))
    fixture = load_fixture("agent/agent_swin_t")
    assert release_filter("agent_swin_t", source.model)(fixture_weights(fixture), source.model).keys() > {
        "stem.proj.weight"
    }
    state = source.model.state_dict() | {
        f"norm{i}.{key}": torch.rand_like(value)
        for i, norm in source.norms.items()
        for key, value in norm.state_dict().items()
    }
    target.load(state)
    assert torch.equal(target.norms["2"].weight, state["norm2.weight"])


def test_a_published_dense_backbone_computes_what_its_authors_compute():
    """LITv2's segmentation backbone on an oblong image, with the norms of its four outputs."""
    fixture = load_fixture("litv2/litv2_small_dense_256x192")
    features = FeatureBackbone("litv2_small", output_norm=True).eval()
    features.load({f"backbone.{key}": value for key, value in fixture_weights(fixture).items()})
    with torch.no_grad():
        maps = features(fixture_image(fixture))
    expected = torch.tensor(fixture["output"]["values"])
    assert relative_error(maps[3].flatten(1)[:, :1024], expected) < 5e-6  # float32 rounding; a wrong eps is at 1e-5
    for y, stage in zip(maps, fixture["features"], strict=False):
        assert list(y.shape[1:]) == stage["shape"][-3:]
        assert y.mean().item() == pytest.approx(stage["mean"], abs=1e-5)
        assert y.std().item() == pytest.approx(stage["std"], rel=1e-4)
    with pytest.raises(ValueError, match=r"norms at the outputs of stages \[0, 1, 2, 3\]: ask for them"):
        FeatureBackbone("litv2_small").load(fixture_weights(fixture))
