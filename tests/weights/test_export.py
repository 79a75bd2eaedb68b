import timm
import torch
from safetensors.torch import load_file

import visionattn  # noqa: F401  (registers our models)
from visionattn.weights.card import CARD, build, read_card
from visionattn.weights.export import export_weights, write_weights
from visionattn.weights.load import load_weights

MODEL = dict(name="van_nano", model_args={}, num_classes=3)


def test_an_exported_checkpoint_is_the_bare_weights_with_the_card(tmp_path):
    model = timm.create_model("van_nano", num_classes=3)
    state = {f"net._orig_mod.{key}": value for key, value in model.state_dict().items()}
    torch.save({"state_dict": state | {"metric": torch.zeros(1)}, CARD: MODEL}, tmp_path / "last.ckpt")
    exported = str(tmp_path / "out" / "model.safetensors")
    export_weights(str(tmp_path / "last.ckpt"), exported)
    assert read_card(exported) == MODEL
    net = build(read_card(exported))
    load_weights(net, exported)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in model.state_dict().items())


def test_what_is_not_contiguous_or_shared_is_written_as_it_is(tmp_path):
    value = torch.arange(6.0).reshape(2, 3)
    write_weights({"a": value.T, "b": value, "c": value}, tmp_path / "w.safetensors", MODEL)
    assert torch.equal(load_file(tmp_path / "w.safetensors")["a"], value.T)
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]
