import pytest
import timm
import torch
from safetensors.torch import save_file

import visionattn  # noqa: F401  (registers our models)
from visionattn.train.dense.segment import Segmentation
from visionattn.weights import WeightsError
from visionattn.weights.load import load_weights

SMALL = dict(embed_dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), mlp_ratios=(1, 1, 1, 1), num_classes=4)


PYRAMID = {key: value for key, value in SMALL.items() if key != "num_classes"}


def van(**arguments):
    return timm.create_model("van_b0", **(SMALL | arguments))


def opened(file):
    return timm.create_model("van_b0", True, pretrained_cfg_overlay=dict(file=str(file), num_classes=4), **SMALL)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state},
        lambda state: {"state_dict": {k: torch.zeros_like(v) for k, v in state.items()}, "state_dict_ema": state},
        lambda state: {f"module.{k}": v for k, v in state.items()},
        lambda state: {"state_dict": {f"net.{k}": v for k, v in state.items()}},
        lambda state: {"state_dict": {f"net._orig_mod.{k}": v for k, v in state.items()}},
    ],
    ids=["plain", "nested", "averaged", "ddp", "lightning", "compiled"],
)
def test_weights_load_from_every_common_form(tmp_path, wrap):
    source, target = van(), van()
    torch.save(wrap(source.state_dict()), tmp_path / "weights.pth")
    load_weights(target, str(tmp_path / "weights.pth"))
    assert all(
        torch.equal(a, b) for a, b in zip(source.state_dict().values(), target.state_dict().values(), strict=True)
    )


def test_weights_load_from_safetensors(tmp_path):
    source, target = van(), van()
    save_file({k: v.contiguous() for k, v in source.state_dict().items()}, tmp_path / "w.safetensors")
    load_weights(target, str(tmp_path / "w.safetensors"))
    assert torch.equal(source.head.fc.weight, target.head.fc.weight)


def test_a_checkpoint_of_another_model_is_refused_with_the_keys(tmp_path):
    state = van().state_dict()
    state["surplus.weight"] = state.pop("stages.3.blocks.0.mlp.fc1.weight")
    torch.save(state, tmp_path / "w.pth")
    net = van()
    before = net.stem.proj.weight.clone()
    with pytest.raises(
        WeightsError, match=r"1 missing \(stages.3.blocks.0.mlp.fc1.weight\); 1 unexpected \(surplus.weight\)"
    ):
        load_weights(net, str(tmp_path / "w.pth"))
    assert torch.equal(net.stem.proj.weight, before)


def test_a_checkpoint_of_another_width_is_refused_with_the_shapes(tmp_path):
    torch.save(van(embed_dims=(16, 8, 8, 8)).state_dict(), tmp_path / "w.pth")
    with pytest.raises(
        WeightsError, match=r"of another shape \(stem.proj.weight: \[16, 3, 7, 7\], here \[8, 3, 7, 7\]"
    ):
        load_weights(van(), str(tmp_path / "w.pth"))


def test_other_classes_need_permission(tmp_path, capsys):
    source, target = van(num_classes=7), van()
    path = str(tmp_path / "w.pth")
    torch.save(source.state_dict(), path)
    with pytest.raises(WeightsError, match="trained on other classes; add --model.reset_head true"):
        load_weights(target, path)
    load_weights(target, path, reset_head=True)
    assert torch.equal(source.stem.proj.weight, target.stem.proj.weight)
    assert "head.fc.weight, head.fc.bias start anew" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["text.ckpt", "text.safetensors"])
def test_files_that_are_no_checkpoints_are_refused(tmp_path, name):
    (tmp_path / name).write_text("hello there, this is no checkpoint")
    with pytest.raises(WeightsError, match="is not a"):
        load_weights(van(), str(tmp_path / name))


@pytest.mark.parametrize(
    "path, message", [("nowhere.ckpt", "no such checkpoint"), ("https://x.org/a.ckpt", "is a URL: download it first")]
)
def test_missing_and_remote_checkpoints_are_refused(path, message):
    with pytest.raises(WeightsError, match=message):
        load_weights(van(), path)


NESTS = ["ema_model", "params", "params_ema", "student", "teacher"]


@pytest.mark.parametrize("prefix", ["", "model.", "timm_model.", "backbone.", "module.model.", "student.backbone."])
@pytest.mark.parametrize("nest", [None, *NESTS])
def test_the_only_reading_that_fits_is_taken_and_told(tmp_path, nest, prefix, capsys):
    source, target = van(), van()
    state = {prefix + key: value for key, value in source.state_dict().items()}
    state |= {"loss.weight": torch.zeros(3)} if prefix else {}
    torch.save({nest: state, "epoch": 1} if nest else state, tmp_path / "w.pth")
    load_weights(target, str(tmp_path / "w.pth"))
    assert torch.equal(source.head.fc.weight, target.head.fc.weight)
    told = capsys.readouterr().out
    assert torch.equal(source.head.fc.weight, opened(tmp_path / "w.pth").head.fc.weight)
    dense = Segmentation(name="van_b0", num_classes=2, head="mlp", model_args=PYRAMID, weights=str(tmp_path / "w.pth"))
    assert torch.equal(source.stem.proj.weight, dense.net.backbone.model.stem.proj.weight)
    if prefix or nest:
        assert f"took the weights behind {nest + ' > ' if nest else ''}{prefix}" in told or prefix == "backbone."


def test_two_readings_that_fit_are_not_chosen_between(tmp_path):
    net = van()
    before = net.head.fc.weight.clone()
    torch.save({"student": van().state_dict(), "teacher": van().state_dict()}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"several weights that fit \(student > , teacher > \): save the ones"):
        load_weights(net, str(tmp_path / "w.pth"))
    assert torch.equal(before, net.head.fc.weight)
    with pytest.raises(WeightsError, match="several weights that fit"):
        opened(tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="several weights that fit"):
        Segmentation(name="van_b0", num_classes=2, head="mlp", model_args=PYRAMID, weights=str(tmp_path / "w.pth"))


def test_a_reading_that_does_not_fit_is_not_taken(tmp_path):
    torch.save({"student": van().state_dict(), "teacher": van(num_classes=5).state_dict()}, tmp_path / "w.pth")
    load_weights(van(), str(tmp_path / "w.pth"))
    with pytest.raises(WeightsError, match="holds no weights|does not fit"):
        load_weights(van(num_classes=9), str(tmp_path / "w.pth"))
