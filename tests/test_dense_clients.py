"""The detection and segmentation code of others on our backbones, as docs/dense.md shows it."""

import pytest
import timm
import torch

from visionattn.features import FeatureBackbone, FPNBackbone

TINY = dict(embed_dims=(8, 16, 16, 24), depths=(1, 1, 1, 1), mlp_ratios=(2, 2, 2, 2))


def test_torchvision_detectors_train_on_our_pyramid():
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.anchor_utils import AnchorGenerator
    from torchvision.ops import MultiScaleRoIAlign

    backbone = FPNBackbone(FeatureBackbone("van_b0", **TINY), 16)
    anchors = AnchorGenerator(tuple((size,) for size in (16, 32, 64, 128, 256)), ((0.5, 1.0, 2.0),) * 5)
    pool = MultiScaleRoIAlign(backbone.levels, 7, 2)
    net = FasterRCNN(backbone, 3, rpn_anchor_generator=anchors, box_roi_pool=pool, min_size=64, max_size=64).train()
    target = {"boxes": torch.tensor([[4.0, 6.0, 30.0, 40.0]]), "labels": torch.tensor([1])}
    loss = sum(net([torch.rand(3, 50, 60)], [target]).values())
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in backbone.parameters())


@pytest.mark.parametrize("head", ["UPerNet", "Unet"])
def test_segmentation_models_take_our_backbones_as_encoders(head):
    smp = pytest.importorskip("segmentation_models_pytorch")
    arguments = {key: value for key, value in TINY.items()}
    net = getattr(smp, head)("tu-van_b0", encoder_weights=None, classes=4, **arguments).eval()
    assert net(torch.randn(1, 3, 64, 96)).shape == (1, 4, 64, 96)


def test_transformers_take_our_backbones():
    transformers = pytest.importorskip("transformers")
    config = transformers.TimmBackboneConfig(
        backbone="van_b0", use_pretrained_backbone=False, features_only=True, out_indices=[1, 2, 3]
    )
    backbone = transformers.TimmBackbone(config).eval()
    maps = backbone(torch.randn(1, 3, 64, 96)).feature_maps
    expected = timm.create_model("van_b0", features_only=True, out_indices=(1, 2, 3)).feature_info.channels()
    assert [m.shape[1] for m in maps] == expected == list(backbone.channels)


def test_a_detr_of_transformers_runs_on_our_backbone():
    transformers = pytest.importorskip("transformers")
    config = transformers.DetrConfig(
        backbone_config=transformers.TimmBackboneConfig(
            backbone="van_b0", use_pretrained_backbone=False, features_only=True, out_indices=[3]
        ),
        use_timm_backbone=False,
        backbone=None,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        num_queries=5,
    )
    net = transformers.DetrForObjectDetection(config).eval()
    out = net(torch.randn(1, 3, 64, 96))
    assert out.pred_boxes.shape == (1, 5, 4)
