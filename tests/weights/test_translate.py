import hashlib
import re

import pytest
import timm
import torch
from safetensors.torch import load_file

import visionattn  # noqa: F401
from tests.parity import fixture_weights, load_fixture
from visionattn.weights import WeightsError, checkpoints
from visionattn.weights.card import read_metadata
from visionattn.weights.commands.translate import add, detect, translate
from visionattn.weights.commands.verify import verify
from visionattn.weights.locate import added_file


@pytest.fixture(scope="module")
def van():
    return fixture_weights(load_fixture("van/van_b0"))


@pytest.fixture
def release(van, tmp_path):
    path = tmp_path / "checkpoint.pth.tar"
    torch.save({"state_dict": van, "epoch": 1}, path)
    return path


def nano(**arguments):
    torch.manual_seed(3)
    return timm.create_model("van_nano", **arguments)


def test_the_family_is_found_and_the_file_opens_with_timm(release, tmp_path, van):
    result = translate(release, tmp_path / "out" / "van.safetensors")
    assert result.name == "van_b0" and result.num_classes == 1000 and result.fits
    assert not result.reshaped and not result.left_out
    assert result.lines()[0] == f"van_b0: {len(van)} tensors, a classifier of 1000 classes"
    card = read_metadata(tmp_path / "out" / "van.safetensors")
    assert card["name"] == "van_b0" and card["preprocess"]["mean"] == [0.5, 0.5, 0.5]
    model = timm.create_model("van_b0", checkpoint_path=str(tmp_path / "out" / "van.safetensors"))
    assert torch.equal(model.stem.proj.weight, van["patch_embed1.proj.weight"])


def test_our_own_names_and_runs_are_found_too(tmp_path):
    state = nano(num_classes=3).state_dict()
    torch.save({"state_dict": {f"net.{key}": value for key, value in state.items()}}, tmp_path / "last.ckpt")
    result = translate(tmp_path / "last.ckpt", tmp_path / "w.safetensors")
    assert result.name == "van_nano" and result.num_classes == 3
    assert load_file(tmp_path / "w.safetensors").keys() == state.keys()


@pytest.mark.parametrize("file", ["nat_mini.pth", "dinat_mini_in1k_224.pth"])
def test_models_with_the_same_tensors_are_told_apart_by_the_file_name(file):
    fixture = load_fixture("nat/nat_mini")
    names = {name: torch.empty(shape, device="meta") for name, shape in fixture["params"]}
    assert detect(names, file) == file.removesuffix(".pth").removesuffix("_in1k_224")
    with pytest.raises(WeightsError, match="fit dinat_mini, nat_mini alike: say which they are with --model"):
        detect(names, "checkpoint.pth")


def test_a_file_without_classifier_is_reported_as_such(tmp_path):
    state = {key: value for key, value in nano().state_dict().items() if not key.startswith("head.")}
    torch.save(state, tmp_path / "w.pth")
    result = translate(tmp_path / "w.pth", model="van_nano")
    assert result.num_classes == 0 and "no classifier" in result.lines()[0]


def test_half_a_checkpoint_is_refused_and_nothing_is_written(van, tmp_path):
    half = {key: value for key, value in van.items() if not key.startswith("block3")}
    torch.save({**half, "surplus.weight": torch.zeros(1)}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"does not fit van_b0 completely: .*missing: \d+ \(stages.2.blocks.*; "
                                           r"unexpected: 1 \(surplus.weight\).*Nothing was written"):  # fmt: skip
        translate(tmp_path / "w.pth", tmp_path / "out.safetensors", model="van_b0")
    assert not (tmp_path / "out.safetensors").exists()


def test_tensors_of_no_model_name_the_nearest(van, tmp_path):
    with pytest.raises(WeightsError, match="no model of ours has these .* tensors: the nearest is van_b0.*surplus"):
        detect({**van, "surplus.weight": torch.zeros(1)})
    with pytest.raises(WeightsError, match="no model of ours has these 1 tensors"):
        detect({"weight": torch.zeros(3)})


def test_interpolated_tables_and_dropped_tensors_are_reported(tmp_path):
    torch.manual_seed(0)
    state = timm.create_model("nat_nano", kernel_size=5).state_dict()
    authors = {}
    for key, value in state.items():  # the inverse of the renaming
        key = re.sub(r"^stages\.(\d)\.downsample", lambda m: f"levels.{int(m[1]) - 1}.downsample", key)
        key = re.sub(r"^stages", "levels", key).replace("stem.", "patch_embed.").replace("head.fc.", "head.")
        authors[key] = value
    torch.save({**authors, "norm3.weight": torch.zeros(2)}, tmp_path / "w.pth")
    result = translate(tmp_path / "w.pth", model="nat_nano")
    assert len(result.reshaped) == 4 and all(key.endswith("rpb") for key in result.reshaped)
    assert "norm3.weight" in result.left_out
    assert "reshaped: 4" in "\n".join(result.lines())


@pytest.mark.parametrize(
    "target, model, message",
    [("w.pth", None, "ends in .safetensors"), ("w.safetensors", "resnet18", "resnet18 is no model of ours")],
)
def test_wrong_targets_and_models_are_refused(release, tmp_path, target, model, message):
    with pytest.raises(WeightsError, match=message):
        translate(release, tmp_path / target, model)


def test_added_files_are_what_pretrained_loads(release, van):
    add("van_b0.in1k", release)
    model = timm.create_model("van_b0", pretrained=True)
    assert torch.equal(model.stem.proj.weight, van["patch_embed1.proj.weight"])
    assert verify("van_b0.in1k", forward=False)["hash"] == "no published hash"


def test_new_tags_keep_their_classes(tmp_path):
    torch.save(nano(num_classes=3).state_dict(), tmp_path / "w.pth")
    add("van_nano.mine", tmp_path / "w.pth")
    assert timm.create_model("van_nano.mine", pretrained=True).num_classes == 3
    result = verify("van_nano.mine")
    assert result["hash"] == "no published hash" and result["forward"].startswith("[1, 3]")


def test_another_file_than_the_published_one_needs_another_tag(tmp_path):
    torch.save(nano().state_dict(), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="the published van_nano.digits has .*: use another tag"):
        add("van_nano.digits", tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="van_nano has no tag: call it van_nano.TAG"):
        add("van_nano", tmp_path / "w.pth")
    assert not added_file("van_nano.digits").exists()


def test_verify_says_what_it_found(cache, release, monkeypatch):
    good = verify("van_nano.digits")
    assert good["hash"] == "matches" and good["forward"].startswith("[1, 10], standard deviation")
    assert verify("van_b1.in1k") == {"file": "not on this machine"}
    cache.mkdir()
    (cache / "van_tiny_754.pth.tar").write_bytes(b"x")
    bad = verify("van_b0.in1k")
    assert bad["hash"] == "no published hash" and bad["sha256"] == hashlib.sha256(b"x").hexdigest()
    assert bad["forward"].startswith("FAILED: ") and "neither safetensors nor" in bad["forward"]
    monkeypatch.setitem(checkpoints()["van_b0.in1k"], "sha256", "0" * 64)
    assert verify("van_b0.in1k", forward=False)["hash"] == "DIFFERS"
    with pytest.raises(WeightsError, match="no checkpoint is called van_b0.nothing"):
        verify("van_b0.nothing")
