"""Files of strangers: what they say about their model never runs anything, through no door."""

import importlib
import json
import sys
import textwrap

import pytest
import timm
import torch
from safetensors.torch import save_file

import visionattn
from visionattn.attention.mixer import find_mixer
from visionattn.errors import UserError
from visionattn.train.cli import run
from visionattn.weights.card import CARD
from visionattn.weights.commands.publish import push
from visionattn.weights.limits import limited
from visionattn.weights.locate import added_file

PREPROCESS = dict(input_size=[3, 32, 32], interpolation="bicubic", mean=[0.5] * 3, std=[0.5] * 3, crop_pct=1.0)
SMALL = dict(embed_dim=8, depth=1, num_heads=1, img_size=32)
HOSTS = dict(anyvit_tiny_patch16=SMALL, agent_swin_t=dict(depths=[1] * 4, embed_dim=8, num_heads=[1] * 4, img_size=32))


@pytest.fixture
def canary(tmp_path, monkeypatch):
    """A module that leaves a mark when it is imported, when its function is called and when its class is built."""
    folder, mark = tmp_path / "modules", tmp_path / "mark"
    folder.mkdir()
    code = f"""
        import pathlib, torch
        def fire(*args, **kwargs):
            pathlib.Path({str(mark)!r}).write_text("ran")
            return torch.nn.Identity()
        class Layer(torch.nn.Identity):
            def __init__(self, *args, **kwargs):
                super().__init__()
                fire()
        fire()
    """
    (folder / "canary.py").write_text(textwrap.dedent(code))
    (folder / "hubconf.py").write_text("from canary import fire")
    monkeypatch.syspath_prepend(folder)
    yield mark
    sys.modules.pop("canary", None)


def card(name, model_args, **more):
    base = dict(name=name, model_args=model_args, num_classes=3, class_names=["a", "b", "c"], preprocess=PREPROCESS)
    return base | more


def as_folder(said, tmp_path):
    """The folder form that timm opens, of a card."""
    folder = tmp_path / "repository"
    folder.mkdir()
    config = dict(
        architecture=said["name"],
        num_classes=said["num_classes"],
        model_args=said["model_args"],
        pretrained_cfg=PREPROCESS,
    )
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.zeros(1)}, folder / "model.safetensors")
    return f"local-dir:{folder}"


def as_tensors(said, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors", metadata={CARD: json.dumps(said)})
    return str(tmp_path / "w.safetensors")


def as_checkpoint(said, tmp_path):
    settings = dict(name=said["name"], model_args=said["model_args"], num_classes=3, **said.get("settings", {}))
    content = {"state_dict": {"net.a": torch.zeros(1)}, CARD: said, "hyper_parameters": settings, "epoch": 0}
    run = {"pytorch-lightning_version": "2.6.0", "global_step": 0, "loops": {}, "optimizer_states": []}
    torch.save(content | run, tmp_path / "w.ckpt")
    return str(tmp_path / "w.ckpt")


def without_card(said, tmp_path):
    path = as_checkpoint(said, tmp_path)
    content = torch.load(path)
    del content[CARD]
    torch.save(content, path)
    return path


def open_hub(said, tmp_path, pretrained=False):
    with pytest.MonkeyPatch.context() as patch:
        source = as_folder(said, tmp_path).removeprefix("local-dir:")
        patch.setattr("timm.models._hub.hf_hub_download", lambda repo_id, filename, **_: f"{source}/{filename}")
        patch.setattr("timm.models._hub.has_hf_hub", lambda *_: True)
        timm.create_model("hf-hub:somebody/something", pretrained=pretrained)


def added(said, tmp_path):
    file = added_file(f"{said['name']}.mine")
    file.parent.mkdir(parents=True)
    as_tensors(said, tmp_path)
    (tmp_path / "w.safetensors").rename(file)
    timm.create_model(f"{said['name']}.mine", pretrained=True)


def image(tmp_path):
    from PIL import Image

    Image.new("RGB", (32, 32)).save(tmp_path / "x.png")
    return str(tmp_path / "x.png")


def predict(path, tmp_path):
    run(["predict", "--ckpt", path, "--output", str(tmp_path / "p.json"), image(tmp_path)])


def resume(command, path):
    run([command, "--data", "Digits", "--ckpt_path", path, "--out", path + ".run", "--trainer.fast_dev_run", "1"])


DOORS = {
    "local-dir": lambda said, path: timm.create_model(as_folder(said, path)),
    "local-dir, weights": lambda said, path: timm.create_model(as_folder(said, path), pretrained=True),
    "hf-hub": open_hub,
    "hf-hub, weights": lambda said, path: open_hub(said, path, pretrained=True),
    "predict safetensors": lambda said, path: predict(as_tensors(said, path), path),
    "predict checkpoint": lambda said, path: predict(as_checkpoint(said, path), path),
    "fit": lambda said, path: resume("fit", as_checkpoint(said, path)),
    "validate": lambda said, path: resume("validate", as_checkpoint(said, path)),
    "validate without card": lambda said, path: resume("validate", without_card(said, path)),
    "push": lambda said, path: push(as_checkpoint(said, path), str(path / "pushed")),
}
HUB = dict(repo_or_dir="{modules}", model="fire", source="local")


def spec(path):
    return {"class_path": path, "init_args": {}}


SAID = {
    "hub": lambda name, args: card(name, args | dict(mixer="torch.hub.load", mixer_args=HUB)),
    "function": lambda name, args: card(name, args | dict(mixer="canary.fire")),
    "layer": lambda name, args: card(name, args | dict(mixer="canary.Layer")),
    "system": lambda name, args: card(name, args | dict(mixer="os.system", mixer_args={})),
    "through ours": lambda name, args: card(name, args | dict(mixer="visionattn.attention.mixer.import_module")),
    "torch through ours": lambda name, args: card(name, args | dict(mixer="visionattn.attention.mixer.torch.hub.load")),
    "torch's layer": lambda name, args: card(name, args | dict(mixer="torch.nn.Identity")),
    "a program of ours": lambda name, args: card(name, args | dict(mixer="visionattn.__main__.main")),
    "activation": lambda name, args: card(name, args | dict(act_layer="canary.fire", norm_layer="canary.fire")),
    "class path": lambda name, args: card(name, args | dict(mixer_args=dict(x=spec("canary.Layer")))),
    "class path as text": lambda name, args: card(name, args | dict(x=json.dumps(spec("canary.Layer")))),
    "weights": lambda name, args: card(name, args | dict(checkpoint_path="{modules}/w.pth")),
    "overlay": lambda name, args: card(name, args | dict(pretrained_cfg_overlay=dict(file="{modules}/w.pth"))),
}


def filled(said, place):
    return json.loads(json.dumps(said).replace("{modules}", str(place)))


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("kind", SAID)
def test_no_file_names_code_to_run(kind, name, door, canary, tmp_path):
    said = filled(SAID[kind](name, HOSTS[name]), tmp_path / "modules")
    with pytest.raises((UserError, ValueError, TypeError, RuntimeError)) as caught:
        DOORS[door](said, tmp_path)
    assert not canary.exists() and "canary" not in sys.modules
    if isinstance(caught.value, UserError):
        assert "\n" not in str(caught.value)


def test_the_canary_fires_where_the_user_says_so(canary, tmp_path, monkeypatch):
    monkeypatch.setenv("VISIONATTN_MIXERS", "canary.Layer, mine.Other")
    timm.create_model(as_folder(card("anyvit_tiny_patch16", SMALL | dict(mixer="canary.Layer")), tmp_path))
    assert canary.exists()


def test_a_mixer_of_the_user_s_own_is_an_object(canary):
    layer = importlib.import_module("canary").Layer
    model = timm.create_model("anyvit_tiny_patch16", mixer=layer, **SMALL)
    assert any(type(module) is layer for module in model.modules())


@pytest.mark.parametrize("name", ["torch.nn.Linear", "visionattn.hosts.Swin", "visionattn.attention.hilo_attention"])
def test_names_of_other_things_than_layers_of_ours_are_refused_with_what_is_allowed(name):
    with pytest.raises(ValueError, match=f"mixer '{name}' is .*no .*short names are .*visionattn.attention.Soft"):
        find_mixer(name)


@pytest.mark.parametrize("name", visionattn.attention.__all__)
def test_every_layer_of_ours_has_a_name(name):
    layer = getattr(visionattn.attention, name)
    if isinstance(layer, type):
        assert find_mixer(f"visionattn.attention.{name}") is layer


@pytest.mark.parametrize("source", ["hf-hub:evil/model", "hf_hub:evil/model", "local-dir:evil", "evil/model", 7, ["x"]])
@pytest.mark.parametrize("door", ["predict safetensors", "predict checkpoint", "validate", "push"])
def test_no_file_says_where_to_look_for_its_model(source, door, tmp_path, monkeypatch):
    (tmp_path / "evil").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="which only you may|describes|unknown model"):
        DOORS[door](card(source, {}), tmp_path)


@pytest.mark.parametrize("key", ["url", "hf_hub_id", "custom_load", "state_dict", "root", "auto_augment"])
@pytest.mark.parametrize("door", ["predict safetensors", "predict checkpoint", "validate", "push", "added"])
def test_a_card_says_about_images_only_what_belongs_there(key, door, tmp_path):
    said = card("van_nano", {}, preprocess=PREPROCESS | {key: "x"})
    with pytest.raises(UserError, match=f"says {key} about images"):
        (DOORS | {"added": added})[door](said, tmp_path)


# --- bounded work ----------------------------------------------------------------------------------------------------


def laughs(levels=40):
    """A list that holds 2^levels others."""
    value = ["ha"]
    for _ in range(levels):
        value = [value, value]
    return value


def deep(levels=50_000):
    value = []
    for _ in range(levels):
        value = [value]
    return value


# Made by the test: pytest would try to print them.
TALES = {
    "thousands": (lambda: ["x"] * 30_000, "more than it may"),
    "a billion-fold": (lambda: laughs(60), "more than it may"),
    "deep": (deep, "more than it may"),
    "long": (lambda: ["x" * 2_000_000], "more than it may"),
    "a key": (lambda: {1: 2}, "key of type int"),
    "a number": (lambda: 10**10_000, "a number of"),
    "a tensor": (lambda: torch.zeros(1), "has Tensor"),
    "a class": (lambda: {"class_path": "os.system"}, "names a class"),
    "an object": (object, "has object"),
}


@pytest.mark.parametrize("kind", TALES)
def test_what_a_file_says_is_looked_at_up_to_a_limit(kind):
    make, reason = TALES[kind]
    with pytest.raises(UserError, match=reason):
        limited(make(), "w.ckpt")


GREEDY = {
    "depth": dict(depth=4 * 10**7),
    "depths": dict(depths=[2, 2, 10**8, 2]),
    "width": dict(embed_dim=2**40),
    "width and depth": dict(embed_dim=60_000, depth=100, num_heads=1),
    "image": dict(img_size=10**9),
    "mlp": dict(mlp_ratio=1e12),
    "infinite": dict(mlp_ratio=float("inf")),
}


@pytest.mark.parametrize("door", [door for door in DOORS if "weights" not in door])
@pytest.mark.parametrize("kind", GREEDY)
def test_no_file_makes_a_model_enormous(kind, door, tmp_path):
    with pytest.raises((UserError, TypeError), match="asks for|room|does not take|unexpected|of its"):
        DOORS[door](card("anyvit_tiny_patch16", GREEDY[kind]), tmp_path)


@pytest.mark.parametrize("door", ["local-dir", "hf-hub", "predict safetensors", "predict checkpoint", "push"])
def test_no_file_asks_for_countless_classes(door, tmp_path):
    with pytest.raises(UserError, match="num_classes = 1000000000: files may ask for"):
        DOORS[door](card("van_nano", {}, num_classes=10**9), tmp_path)
