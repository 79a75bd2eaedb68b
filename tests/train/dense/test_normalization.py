"""Segmenters and detectors normalise images as the weights that they start from were trained."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file

from visionattn.errors import UserError
from visionattn.train.dense.detect import Detection
from visionattn.train.dense.detector import Detector
from visionattn.train.dense.segment import Segmentation
from visionattn.train.dense.segmenter import Segmenter
from visionattn.weights.card import settled

MEAN, STD = [0.1, 0.2, 0.3], [0.4, 0.5, 0.6]
TASKS = {
    "segment": (Segmentation, Segmenter, dict(head="mlp")),
    "detect": (Detection, Detector, dict(detector="fcos", fpn_channels=64)),
}


@pytest.fixture
def folder(tmp_path):
    cfg = dict(input_size=[3, 32, 32], mean=MEAN, std=STD, interpolation="bicubic", crop_pct=1.0)
    config = dict(architecture="van_nano", num_classes=10, pretrained_cfg=cfg)
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = timm.create_model("van_nano", num_classes=10)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, tmp_path / "model.safetensors")
    return f"local-dir:{tmp_path}"


def used(net):
    if isinstance(net, Segmenter):
        return net.mean.flatten().tolist(), net.std.flatten().tolist()
    return list(net.model.transform.image_mean), list(net.model.transform.image_std)


@pytest.mark.parametrize("pretrained", [True, False])
@pytest.mark.parametrize("kind", TASKS)
def test_a_folder_s_own_mean_and_deviation_are_used_and_kept(kind, pretrained, folder):
    task, net, options = TASKS[kind]
    made = task(name=folder, num_classes=2, pretrained=pretrained, **options)
    assert used(made.net) == tuple(
        torch.tensor(values).tolist() if kind == "segment" else values for values in (MEAN, STD)
    )
    card = settled(made.card)
    assert card["name"] == "van_nano" and (card["mean"], card["std"]) == (MEAN, STD)
    again = net.from_card(card)  # what a prediction builds, from the registered model
    assert used(again) == used(made.net)


@pytest.mark.parametrize("kind", TASKS)
def test_a_registered_model_s_are_those_of_its_cfg_also_from_a_card_of_before(kind):
    task, net, options = TASKS[kind]
    made = task(name="van_nano", num_classes=2, **options)
    assert used(made.net) == ([0.5] * 3, [0.5] * 3)
    old = {key: value for key, value in made.card.items() if key not in ("mean", "std")}
    assert used(net.from_card(old)) == used(made.net)


@pytest.mark.parametrize("mean", [[0.5, 0.5], ["x"] * 3, [], [None] * 3])
def test_a_card_with_something_else_is_refused(mean):
    with pytest.raises(UserError, match="one number a channel is needed"):
        Segmenter("van_nano", 2, "mlp", mean=mean)
