import timm
import torch

from visionattn.weights.card import build, read_card
from visionattn.weights.export import export_weights


def test_the_weights_of_a_run_open_with_timm(run_dir, tmp_path):
    checkpoint = str(run_dir / "checkpoints" / "last.ckpt")
    exported = str(tmp_path / "model.safetensors")
    export_weights(checkpoint, exported)
    card = read_card(exported)
    assert card == read_card(checkpoint) and card["class_names"] == list("0123456789")
    net = timm.create_model(card["name"], num_classes=10, checkpoint_path=exported, **card["model_args"])
    averaged = torch.load(checkpoint, weights_only=True)["state_dict"]
    assert all(torch.equal(value, averaged[f"net.{key}"]) for key, value in net.state_dict().items())
    assert build(card).num_classes == 10
