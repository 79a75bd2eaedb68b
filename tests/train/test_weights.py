import pytest
import timm
import torch
from safetensors.torch import save_file

from visionattn.train.errors import UserError
from visionattn.train.weights import build, export_weights, load_weights, read_card, read_weights

SMALL = dict(embed_dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), mlp_ratios=(1, 1, 1, 1), num_classes=4)


def van(**arguments):
    return timm.create_model("van_b0", **(SMALL | arguments))


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
    ids=["state_dict", "nested", "averaged", "ddp", "lightning", "compiled"],
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
        UserError, match=r"1 missing \(stages.3.blocks.0.mlp.fc1.weight\); 1 unexpected \(surplus.weight\)"
    ):
        load_weights(net, str(tmp_path / "w.pth"))
    assert torch.equal(net.stem.proj.weight, before)


def test_a_checkpoint_of_another_width_is_refused_with_the_shapes(tmp_path):
    torch.save(van(embed_dims=(16, 8, 8, 8)).state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"of another shape \(stem.proj.weight: \[16, 3, 7, 7\], here \[8, 3, 7, 7\]"):
        load_weights(van(), str(tmp_path / "w.pth"))


def test_other_classes_need_permission(tmp_path, capsys):
    source, target = van(num_classes=7), van()
    path = str(tmp_path / "w.pth")
    torch.save(source.state_dict(), path)
    with pytest.raises(UserError, match="trained on other classes; add --model.reset_head true"):
        load_weights(target, path)
    load_weights(target, path, reset_head=True)
    assert torch.equal(source.stem.proj.weight, target.stem.proj.weight)
    assert "head.fc.weight, head.fc.bias start anew" in capsys.readouterr().out


class Harmful:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_code_in_a_checkpoint_does_not_run(tmp_path, capsys):
    torch.save({"state_dict": Harmful()}, tmp_path / "w.pth")
    with pytest.raises(UserError, match="holds no weights"):
        read_weights(str(tmp_path / "w.pth"))
    assert "must not run" not in capsys.readouterr().out


@pytest.mark.parametrize("name", ["text.ckpt", "text.safetensors"])
def test_files_that_are_no_checkpoints_are_refused(tmp_path, name):
    (tmp_path / name).write_text("hello there, this is no checkpoint")
    with pytest.raises(UserError, match="is not a"):
        read_weights(str(tmp_path / name))


@pytest.mark.parametrize(
    "path, message", [("nowhere.ckpt", "no such checkpoint"), ("https://x.org/a.ckpt", "is a URL: download it first")]
)
def test_missing_and_remote_checkpoints_are_refused(path, message):
    with pytest.raises(UserError, match=message):
        read_weights(path)


def test_a_file_without_description_cannot_predict(tmp_path):
    torch.save(van().state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="does not say which model it holds"):
        read_card(str(tmp_path / "w.pth"))


def test_exported_weights_open_with_timm(run_dir, tmp_path):
    checkpoint = str(run_dir / "checkpoints" / "last.ckpt")
    exported = str(tmp_path / "model.safetensors")
    export_weights(checkpoint, exported)
    card = read_card(exported)
    assert card == read_card(checkpoint) and card["class_names"] == list("0123456789")
    net = timm.create_model(card["name"], num_classes=10, checkpoint_path=exported, **card["model_args"])
    averaged = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(value, averaged[f"net.{key}"]) for key, value in net.state_dict().items())
    assert build(card).num_classes == 10
