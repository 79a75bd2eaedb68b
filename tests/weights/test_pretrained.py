import argparse
import json
import logging

import pytest
import timm
import torch
from safetensors.torch import save_file

import visionattn  # noqa: F401
from tests.parity import fixture_weights, load_fixture
from visionattn.weights import WeightsError, checkpoints
from visionattn.weights.card import CARD
from visionattn.weights.locate import added_file, cache_name
from visionattn.weights.options import settings

SMALL = dict(embed_dims=(8, 8, 16, 16), depths=(1, 1, 1, 1), mlp_ratios=(1, 1, 1, 1))
NAME = "van_tiny_754.pth.tar"  # as the manifest has it for van_b0.in1k


def van(**arguments):
    return timm.create_model("van_b0", **(SMALL | arguments))


@pytest.fixture
def release(tmp_path):
    """A folder with the file that van_b0's URL ends in, as the authors would have saved the small network."""
    torch.manual_seed(1)
    (tmp_path / "mirror").mkdir()
    model = van()
    content = {"state_dict_ema": model.state_dict(), "args": argparse.Namespace(lr=1)}
    torch.save(content, tmp_path / "mirror" / NAME)
    return tmp_path / "mirror", model.state_dict()


def equal(model, state, leave_out=()):
    own = model.state_dict()
    return all(torch.equal(own[key], value) for key, value in state.items() if not key.startswith(leave_out))


def test_pretrained_downloads_from_a_mirror_and_loads(release, site, cache, monkeypatch):
    folder, state = release
    site.files[f"/zoo/{NAME}"] = (folder / NAME).read_bytes()
    site.tricks[f"/zoo/{NAME}"] = [("drop", 3000)]
    monkeypatch.setenv("VISIONATTN_WEIGHTS_MIRROR", f"{site.url}/zoo/")
    for name in ("van_b0", "van_b0.in1k"):
        model = timm.create_model(name, pretrained=True, **SMALL)
        assert equal(model, state)
    assert len(site.requests) == 2 and (cache / NAME).is_file()
    assert model.pretrained_cfg["url"].endswith(NAME) and "state_dict" not in model.pretrained_cfg
    assert model.default_cfg is model.pretrained_cfg


@pytest.mark.parametrize("form", ["{folder}", "file://{folder}", "file://{folder}/{{name}}", "/nowhere,{folder}"])
def test_a_folder_is_a_mirror_even_offline(release, monkeypatch, form):
    monkeypatch.setattr(settings, "offline", True)
    monkeypatch.setattr(settings, "mirror", form.format(folder=release[0]))
    assert equal(van(pretrained=True), release[1])


def test_a_mirror_may_keep_the_paths_of_the_original(release, site, monkeypatch):
    path = "/hf/Visual-Attention-Network/VAN-Tiny-original/resolve/main/" + NAME
    site.files[path] = (release[0] / NAME).read_bytes()
    monkeypatch.setattr(settings, "mirror", site.url + "/hf/{path}")
    assert equal(van(pretrained=True), release[1])


def test_what_a_mirror_lacks_comes_from_the_original(release, site, monkeypatch):
    monkeypatch.setattr(settings, "mirror", "/nowhere")
    path = "/Visual-Attention-Network/VAN-Tiny-original/resolve/main/" + NAME
    site.files[path] = (release[0] / NAME).read_bytes()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", site.url)
    assert equal(van(pretrained=True), release[1])


def test_the_cache_of_huggingface_hub_is_used(release, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "offline", True)
    found = tmp_path / "blob"
    found.write_bytes((release[0] / NAME).read_bytes())
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda *args, **kwargs: asked.append((args, kwargs)) or str(found)
    )
    assert equal(van(pretrained=True), release[1])
    assert asked == [(("Visual-Attention-Network/VAN-Tiny-original", NAME), {"revision": "main"})]


def test_a_file_that_timm_has_in_its_cache_is_used(release, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "cache_dir", None)
    monkeypatch.setattr(settings, "offline", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    (tmp_path / "torch" / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "torch" / "hub" / "checkpoints" / NAME).write_bytes((release[0] / NAME).read_bytes())
    assert equal(van(pretrained=True), release[1])


def test_cache_dir_of_create_model_is_used(release, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "mirror", str(release[0]))
    assert equal(van(pretrained=True, cache_dir=tmp_path / "mine"), release[1])
    assert (tmp_path / "mine" / NAME).is_file()


def test_offline_without_a_file_says_so(monkeypatch):
    monkeypatch.setenv("VISIONATTN_OFFLINE", "1")
    with pytest.raises(WeightsError, match="van_tiny_754.pth.tar is not in the cache, and offline mode"):
        timm.create_model("van_b0", pretrained=True)


def test_a_cached_file_of_another_length_is_refused(release, cache, monkeypatch):
    cache.mkdir()
    (cache / NAME).write_bytes(b"x")
    monkeypatch.setitem(checkpoints()["van_b0.in1k"], "size", 1000)
    with pytest.raises(WeightsError, match="has 1 B instead of 1.0 kB: remove it"):
        van(pretrained=True)


def test_a_dead_link_says_how_to_install_a_file_by_hand(site, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", site.url)
    with pytest.raises(
        WeightsError,
        match=r"answers 404.*To get it by hand, open https://huggingface.co/Visual.*, "
        r"save the file, then run: visionattn weights add van_b0.in1k FILE",
    ):
        van(pretrained=True)


def test_weights_without_a_link_name_the_page(monkeypatch):
    monkeypatch.setitem(checkpoints()["van_b4.untrained"], "by_hand", "https://cloud.example/van_b4")
    with pytest.raises(
        WeightsError,
        match=r"cannot be downloaded by a program: open https://cloud.example/van_b4 in a "
        r"browser, save the file, then run: visionattn weights add van_b4",
    ):
        timm.create_model("van_b4", pretrained=True, **SMALL)


def test_weights_that_are_not_published_are_not_promised():
    with pytest.raises(WeightsError, match="no weights of van_b5.untrained are published"):
        timm.create_model("van_b5", pretrained=True, **SMALL)


# --- timm's semantics ------------------------------------------------------------------------------------------------


def test_overlays_of_file_and_state_dict_are_read_as_timm_does(release, tmp_path):
    overlay = dict(file=str(release[0] / NAME))
    model = van(pretrained=True, pretrained_cfg_overlay=overlay)
    assert equal(model, release[1]) and model.pretrained_cfg["file"] == overlay["file"]
    assert equal(van(pretrained=True, pretrained_cfg_overlay=dict(state_dict=release[1])), release[1])
    with pytest.raises(WeightsError, match="there is no file /nowhere.pth for van_b0.in1k"):
        van(pretrained=True, pretrained_cfg_overlay=dict(file="/nowhere.pth"))


def test_a_url_of_the_user_is_fetched(release, site, cache):
    site.files["/mine.pth"] = (release[0] / NAME).read_bytes()
    overlay = dict(url=(f"{site.url}/mine.pth", "renamed.pth"))
    assert equal(van(pretrained=True, pretrained_cfg_overlay=overlay), release[1])
    assert (cache / "renamed.pth").is_file()


def test_other_classes_and_channels_are_adapted_and_logged(release, monkeypatch, caplog):
    monkeypatch.setattr(settings, "mirror", str(release[0]))
    caplog.set_level(logging.INFO)
    model = van(pretrained=True, num_classes=7, in_chans=1)
    assert equal(model, release[1], leave_out=("head.", "stem.proj.weight"))
    torch.testing.assert_close(model.stem.proj.weight, release[1]["stem.proj.weight"].sum(1, keepdim=True))
    assert "classifier head.fc of 1000 classes starts anew with 7" in caplog.text
    assert "Converted input conv stem.proj pretrained weights from 3 to 1" in caplog.text
    four = van(pretrained=True, in_chans=4).stem.proj.weight
    torch.testing.assert_close(four[:, 3], release[1]["stem.proj.weight"][:, 0] * 3 / 4)
    caplog.clear()
    assert van(pretrained=True, num_classes=0).num_classes == 0
    assert "classifier head.fc of 1000 classes is left out" in caplog.text


def test_features_only_loads_the_trunk(release, monkeypatch):
    monkeypatch.setattr(settings, "mirror", str(release[0]))
    net = van(pretrained=True, features_only=True)
    assert torch.equal(net.stem.proj.weight, release[1]["stem.proj.weight"])
    assert "state_dict" not in net.pretrained_cfg
    getter = van(pretrained=True, features_only=True, feature_cls="getter")
    assert "state_dict" not in getter.model.pretrained_cfg


def test_half_a_network_is_refused_whatever_the_classes(release, tmp_path):
    state = {key: value for key, value in release[1].items() if not key.startswith("stages.3.blocks")}
    torch.save(state, tmp_path / "half.pth")
    for classes in (1000, 7, 0):
        with pytest.raises(WeightsError, match=r"does not fit van_b0.in1k. Missing key\(s\): stages.3.blocks"):
            van(pretrained=True, num_classes=classes, pretrained_cfg_overlay=dict(file=str(tmp_path / "half.pth")))


def test_tensors_that_a_rule_gave_a_wrong_name_are_named(release, tmp_path):
    torch.save({key.replace("norm1", "norm_1"): value for key, value in release[1].items()}, tmp_path / "renamed.pth")
    with pytest.raises(WeightsError, match=r"of which the model has no stages.0.blocks.0.norm_1.weight"):
        van(pretrained=True, num_classes=7, pretrained_cfg_overlay=dict(file=str(tmp_path / "renamed.pth")))


def test_the_authors_names_are_renamed(tmp_path):
    fixture = load_fixture("van/van_b0")
    torch.save({"state_dict": fixture_weights(fixture)}, tmp_path / NAME)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "mirror", str(tmp_path))
        model = timm.create_model("van_b0", pretrained=True)
    assert torch.equal(model.stem.proj.weight, fixture_weights(fixture)["patch_embed1.proj.weight"])


def test_windows_of_another_size_are_resized_and_logged(tmp_path, caplog):
    small = dict(embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 2))
    source = timm.create_model("nat_mini", kernel_size=3, **small)
    with torch.no_grad():
        for stage in source.stages:
            stage.blocks[0].attn.rpb.copy_(torch.arange(25.0).reshape(5, 5))
    torch.save(source.state_dict(), tmp_path / "w.pth")
    caplog.set_level(logging.INFO)
    overlay = dict(file=str(tmp_path / "w.pth"))
    target = timm.create_model("nat_mini", pretrained=True, pretrained_cfg_overlay=overlay, kernel_size=5, **small)
    table = target.stages[1].blocks[0].attn.rpb
    expected = torch.nn.functional.interpolate(torch.arange(25.0).reshape(1, 1, 5, 5), (9, 9), mode="bicubic")
    torch.testing.assert_close(table, expected[0].expand_as(table))
    assert "stages.1.blocks.0.attn.rpb resized from 5x5 to 9x9 (bicubic)" in caplog.text


# --- weights added by hand -------------------------------------------------------------------------------------------


def add(name, state, **card):
    file = added_file(name)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(state, file, metadata={CARD: json.dumps(card)})


def test_added_weights_go_before_the_link(release):
    add("van_b0.in1k", release[1])
    assert equal(van(pretrained=True), release[1])


def test_added_tags_are_models(release):
    preprocess = dict(input_size=[3, 96, 96], mean=[0.1, 0.2, 0.3], std=[1, 1, 1], crop_pct=1.0)
    add("van_b0.mine", release[1], num_classes=1000, preprocess=preprocess)
    model = timm.create_model("van_b0.mine", pretrained=True, **SMALL)
    assert equal(model, release[1]) and model.pretrained_cfg["tag"] == "mine"
    assert timm.data.resolve_model_data_config(model)["mean"] == (0.1, 0.2, 0.3)
    assert timm.data.resolve_model_data_config(model)["input_size"] == (3, 96, 96)
    assert timm.create_model("van_b0.mine", **SMALL).num_classes == 1000


def test_unknown_tags_are_refused_as_ever():
    with pytest.raises(RuntimeError, match="Invalid pretrained tag"):
        timm.create_model("van_b0.nowhere", pretrained=True, **SMALL)


# --- names in the cache ----------------------------------------------------------------------------------------------


def test_files_of_the_cache_have_names_of_their_own():
    assert cache_name("https://x.org/a/b.pth?download=1", "m.t") == "b.pth"
    assert cache_name("https://cloud.tsinghua.edu.cn/f/57e0/?dl=1", "m.t") == "m.t.pth"
    assert cache_name("https://api.onedrive.com/v1.0/shares/s!x/root/content", "m.t") == "m.t.pth"


def test_two_urls_with_one_file_name_do_not_share_a_file(monkeypatch):
    monkeypatch.setitem(checkpoints(), "other.tag", {"url": "https://x.org/nat_tiny.pth"})
    url = checkpoints()["nat_tiny.in1k"]["url"]
    assert cache_name(url, "nat_tiny.in1k") == "nat_tiny.in1k.pth"
