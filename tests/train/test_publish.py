import csv
import json
from pathlib import Path

import pytest
import timm
import torch

from visionattn.train.predict import load
from visionattn.weights import WeightsError
from visionattn.weights.commands import publish
from visionattn.weights.commands.publish import push


@pytest.fixture
def checkpoint(run_dir):
    return str(run_dir / "checkpoints" / "last.ckpt")


def test_a_pushed_folder_opens_with_timm_and_gives_the_same_answers(checkpoint, tmp_path):
    folder = push(checkpoint, str(tmp_path / "mine"))
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "README.md"}
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    net, _, names = load(checkpoint, None)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(x), net.eval()(x), rtol=0, atol=0)
    config = json.loads((folder / "config.json").read_text())
    assert config["label_names"] == names and config["num_classes"] == 10
    data = timm.data.resolve_model_data_config(model)
    assert data["input_size"] == (3, 32, 32) and list(data["mean"]) == [0.5] * 3 and data["crop_pct"] == 1.0


def test_raw_weights_differ_from_the_average(checkpoint, tmp_path):
    averaged = push(checkpoint, str(tmp_path / "ema"))
    raw = push(checkpoint, str(tmp_path / "raw"), weights="raw")
    content = torch.load(checkpoint, weights_only=True)
    models = [timm.create_model(f"local-dir:{folder}", pretrained=True) for folder in (averaged, raw)]
    assert not torch.equal(models[0].head.fc.weight, models[1].head.fc.weight)
    assert torch.equal(models[1].head.fc.weight, content["current_model_state"]["net.head.fc.weight"])
    assert "of the last step" in (raw / "README.md").read_text()


def test_the_card_has_metrics_and_settings(checkpoint, tmp_path):
    folder = push(checkpoint, str(tmp_path / "mine"), license="mit")
    text = (folder / "README.md").read_text()
    assert text.startswith("---\nlicense: mit\nlibrary_name: timm\n")
    assert "| val/acc1 | " in text and "drop_path_rate: 0.2" in text and "crop_pct: 1.0" in text
    assert "`van_b0` with 10 classes" in text
    alone = tmp_path / "alone" / "w.ckpt"
    alone.parent.mkdir()
    alone.write_bytes(Path(checkpoint).read_bytes())
    text = (push(str(alone), str(tmp_path / "other")) / "README.md").read_text()
    assert "No metrics were found" in text and '"lr": 0.01' in text


def test_metrics_are_those_of_the_checkpoint_s_epoch(run_dir):
    with open(run_dir / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["val/acc1"]]
    for epoch, row in enumerate(rows):
        checkpoint = run_dir / "every" / f"{epoch}.ckpt"
        content = torch.load(checkpoint, weights_only=True)
        found = publish.metrics(content, run_dir / "checkpoints" / "x.ckpt")
        assert found["val/acc1"] == pytest.approx(float(row["val/acc1"]))


def test_upload_goes_to_the_named_repository(checkpoint, tmp_path, monkeypatch):
    calls = []

    class Api:
        def __init__(self, **kwargs):
            pass

        def create_repo(self, repo, **kwargs):
            calls.append(("create", repo, kwargs))
            return type("Repo", (), {"repo_id": "me/" + repo})

        def upload_folder(self, **kwargs):
            calls.append(("upload", kwargs["repo_id"], sorted(p.name for p in Path(kwargs["folder_path"]).iterdir())))

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    folder = push(checkpoint, str(tmp_path / "mine"), repo="digits", private=True)
    assert calls == [
        ("create", "digits", dict(private=True, exist_ok=True)),
        ("upload", "me/digits", ["README.md", "config.json", "model.safetensors"]),
    ]
    assert "hf-hub:digits" in (folder / "README.md").read_text()
    monkeypatch.setattr(Api, "upload_folder", lambda self, **kwargs: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(WeightsError, match="is written, but cannot be uploaded to digits: no network"):
        push(checkpoint, str(tmp_path / "mine"), repo="digits")


def test_other_files_cannot_be_pushed(tmp_path):
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="does not say which model it holds"):
        push(str(tmp_path / "w.pth"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
