"""The bundled weights: ``pretrained=True`` from the installed package to correct answers, without a network."""

import pytest
import timm
import torch

import visionattn  # noqa: F401
from visionattn.weights import checkpoints
from visionattn.weights.download import sha256_of
from visionattn.weights.locate import weights_file
from visionattn.weights.options import settings

BUNDLED = {name: row for name, row in checkpoints().items() if "file" in row}
every_demo = pytest.mark.parametrize("name", BUNDLED)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr(settings, "offline", True)


def digits():
    pytest.importorskip("sklearn")
    pytest.importorskip("lightning")
    from visionattn.train.data import Digits

    dataset, _ = Digits().dataset("val")
    return dataset.images, torch.tensor([int(target) for target in dataset.targets])


def accuracy(net):
    images, targets = digits()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
    with torch.inference_mode():
        answers = net.eval()(torch.stack([transform(image) for image in images])).argmax(1)
    return 100 * (answers == targets).double().mean().item()


@every_demo
def test_the_file_is_the_one_of_the_manifest_and_small(name):
    path = weights_file(name)
    assert sha256_of(path) == BUNDLED[name]["sha256"]
    assert path.stat().st_size == BUNDLED[name]["size"] <= 1_000_000


@every_demo
def test_accuracy_is_the_stated_one(name):
    for source in (name, name.partition(".")[0]):  # the first tag is the model's default
        net = timm.create_model(source, pretrained=True)
        assert accuracy(net) == pytest.approx(BUNDLED[name]["top1"], abs=0.3)  # one image is 0.28 per cent


@every_demo
def test_trunk_serves_other_classes_channels_and_feature_maps(name):
    net = timm.create_model(name, pretrained=True)
    other = timm.create_model(name, pretrained=True, num_classes=3, in_chans=1)
    state = other.state_dict()
    adapted = ("head.fc.", net.pretrained_cfg["first_conv"])
    for key, value in net.state_dict().items():
        assert key.startswith(adapted) or torch.equal(state[key], value)
    maps = timm.create_model(name, pretrained=True, features_only=True)(torch.zeros(1, 3, 64, 64))
    assert [y.shape[-1] for y in maps] == [16, 8, 4, 2]


@every_demo
@pytest.mark.slow
def test_the_command_of_the_manifest_trains_them_again(name, tmp_path):
    run = pytest.importorskip("visionattn.train.cli").run
    command = BUNDLED[name]["description"].partition("train.py ")[2].split()
    run([*command, "--out", str(tmp_path)])
    arch = name.partition(".")[0]
    file = str(tmp_path / "checkpoints" / "model.safetensors")
    net = timm.create_model(arch, pretrained=True, pretrained_cfg_overlay=dict(file=file))
    assert accuracy(net) == pytest.approx(BUNDLED[name]["top1"], abs=1.0)
