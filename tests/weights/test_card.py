import pytest
import timm
import torch
from safetensors.torch import save_file

import visionattn  # noqa: F401  (registers our models)
from visionattn.weights import WeightsError
from visionattn.weights.card import CARD, build, check_model_name, read_card, read_metadata

MODEL = dict(name="van_nano", model_args={}, num_classes=3)


def test_a_card_lies_in_a_checkpoint_or_in_the_metadata_of_a_safetensors_file(tmp_path):
    torch.save({"state_dict": {}, CARD: MODEL}, tmp_path / "w.ckpt")
    assert read_card(str(tmp_path / "w.ckpt")) == MODEL
    save_file({"a": torch.zeros(1)}, tmp_path / "w.safetensors", metadata={CARD: '{"name": "van_nano"}'})
    assert read_card(str(tmp_path / "w.safetensors")) == {"name": "van_nano"}
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    assert read_metadata(tmp_path / "other.safetensors") is None


def test_a_file_without_card_is_refused(tmp_path):
    torch.save(timm.create_model("van_nano").state_dict(), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="does not say which model it holds"):
        read_card(str(tmp_path / "w.pth"))
    with pytest.raises(WeightsError, match="no such checkpoint"):
        read_card(str(tmp_path / "nowhere.safetensors"))
    (tmp_path / "text.safetensors").write_text("hello there, this is no checkpoint")
    with pytest.raises(WeightsError, match="is not a safetensors file"):
        read_card(str(tmp_path / "text.safetensors"))


def test_a_card_is_enough_to_build_the_model():
    assert build(MODEL).num_classes == 3
    with pytest.raises(WeightsError, match="van_nano does not take model.model_args {'wings': 2}"):
        build(MODEL | dict(model_args=dict(wings=2)))
    with pytest.raises(WeightsError, match="unknown model 'van_nono': did you mean van_nano"):
        build(MODEL | dict(name="van_nono"))


def test_names_of_timm_tags_and_sources_pass():
    for name in ("resnet18", "van_b0.in1k", "hf-hub:somebody/something", "local-dir:folder"):
        check_model_name(name)
