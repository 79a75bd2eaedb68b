"""Weights that are no numbers: whatever reads them to run or to train names the first one."""

import json

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from visionattn.errors import UserError
from visionattn.features import FeatureBackbone
from visionattn.train.classify import Classification
from visionattn.train.cli import run
from visionattn.weights import WeightsError
from visionattn.weights.card import CARD
from visionattn.weights.commands.publish import push
from visionattn.weights.commands.translate import translate
from visionattn.weights.commands.verify import verify
from visionattn.weights.load import unusable
from visionattn.weights.locate import added_file

PREPROCESS = dict(input_size=[3, 32, 32], mean=[0.5] * 3, std=[0.5] * 3, interpolation="bicubic", crop_pct=1.0)
SAID = dict(
    name="van_nano", model_args={}, num_classes=10, class_names=[str(i) for i in range(10)], preprocess=PREPROCESS
)
DAMAGES = {"nan": float("nan"), "inf": float("inf"), "minus inf": float("-inf")}


def state(value):
    torch.manual_seed(0)
    weights = {k: v.contiguous() for k, v in timm.create_model("van_nano", num_classes=10).state_dict().items()}
    key = next(key for key in weights if key.startswith("stages.1.blocks.0") and weights[key].dim() > 1)
    weights[key].view(-1)[1] = value
    return weights


def tensors(tmp_path, value):
    save_file(state(value), tmp_path / "w.safetensors", metadata={CARD: json.dumps(SAID)})
    return str(tmp_path / "w.safetensors")


def old(tmp_path, value):
    torch.save(state(value), tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    return str(tmp_path / "w.pth")


def checkpoint(tmp_path, value):
    parts = dict(epoch=0, global_step=0, loops={}, optimizer_states=[], lr_schedulers=[])
    settings = dict(Classification(name="van_nano", num_classes=10).hparams)
    parts |= {"pytorch-lightning_version": "2.6.0", CARD: SAID, "hyper_parameters": settings}
    parts["state_dict"] = {f"net.{key}": tensor for key, tensor in state(value).items()}
    torch.save(parts, tmp_path / "last.ckpt")
    return str(tmp_path / "last.ckpt")


def folder(tmp_path, value):
    config = dict(architecture="van_nano", num_classes=10, pretrained_cfg=PREPROCESS)
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(state(value), tmp_path / "model.safetensors")
    return f"local-dir:{tmp_path}"


def opened(file):
    overlay = dict(file=file, num_classes=10, hf_hub_id=None)
    return timm.create_model("van_nano", True, pretrained_cfg_overlay=overlay, num_classes=10)


def train(command, tmp_path, *options):
    run([command, "--data", "Digits", "--out", str(tmp_path / "run"), "--trainer.fast_dev_run", "1", *options])


def predict(tmp_path, value):
    Image.new("RGB", (32, 32)).save(tmp_path / "x.png")
    run(["predict", "--ckpt", tensors(tmp_path, value), "--output", f"{tmp_path}/p.json", f"{tmp_path}/x.png"])


def added(tmp_path, value):
    file = added_file("van_nano.mine")
    file.parent.mkdir(parents=True)
    save_file(state(value), file, metadata={CARD: json.dumps(SAID)})
    if "FAILED" in (result := verify("van_nano.mine"))["forward"]:
        raise WeightsError(result["forward"])


DOORS = {
    "overlay": lambda path, value: opened(tensors(path, value)),
    "overlay of old": lambda path, value: opened(old(path, value)),
    "local-dir": lambda path, value: timm.create_model(folder(path, value), pretrained=True),
    "features": lambda path, value: FeatureBackbone("van_nano").load(state(value)),
    "weights": lambda path, value: train(
        "fit", path, "--model.name", "van_nano", "--model.weights", tensors(path, value)
    ),
    "fit": lambda path, value: train("fit", path, "--ckpt_path", checkpoint(path, value)),
    "validate": lambda path, value: train("validate", path, "--ckpt_path", checkpoint(path, value)),
    "predict": predict,
    "push": lambda path, value: push(checkpoint(path, value), str(path / "pushed")),
    "translate": lambda path, value: translate(old(path, value), model="van_nano"),
    "verify": added,
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("damage", ["nan", "inf"])
def test_a_weight_that_is_no_number_is_named(door, damage, tmp_path):
    with pytest.raises(
        (UserError, ValueError), match=r"stages\.1\.blocks\.0\S+ has values that are NaN or inf"
    ) as caught:
        DOORS[door](tmp_path, DAMAGES[damage])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("door", ["overlay", "overlay of old", "local-dir", "features", "predict", "push", "verify"])
def test_the_same_files_with_numbers_are_taken(door, tmp_path):
    DOORS[door](tmp_path, 0.5)


def test_infinities_that_a_model_has_itself_are_no_damage():
    mask, one = torch.full((3,), float("-inf")), torch.ones(3)
    assert unusable({"mask": mask}, {"mask": mask}) == [] == unusable({"other": mask}, {"mask": one})
    assert unusable({"mask": mask * float("nan")}, {"mask": mask}) and unusable({"mask": mask}, {"mask": one})
    assert unusable({"mask": one.to(torch.int8)}, {"mask": one}) == ["mask has numbers of type int8"]
