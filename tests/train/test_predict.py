import csv
import json
import os
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

from visionattn.errors import UserError
from visionattn.train.cli import run
from visionattn.train.data import Digits
from visionattn.train.dense.predict import predict_dense
from visionattn.train.predict import predict


@pytest.fixture
def pictures(tmp_path):
    """Four validation digits as image files, one in a folder below."""
    digits, _ = Digits().dataset("val")
    (tmp_path / "in" / "below").mkdir(parents=True)
    for n, name in enumerate(("a.png", "b.png", "c.jpg", "below/d.png")):
        digits.images[n].save(tmp_path / "in" / name)
    return tmp_path / "in"


@pytest.mark.parametrize("name", ["last.ckpt", "model.safetensors"])
def test_a_checkpoint_is_enough_to_predict(run_dir, pictures, tmp_path, capsys, name):
    output = tmp_path / "out" / "p.json"
    run(["predict", "--ckpt", str(run_dir / "checkpoints" / name), str(pictures), "--output", str(output)])
    results = json.loads(output.read_text())
    assert [result["file"].rsplit("/", 1)[1] for result in results] == ["a.png", "b.png", "d.png", "c.jpg"]
    for result in results:
        shares = [c["probability"] for c in result["classes"]]
        assert len(shares) == 5 and shares == sorted(shares, reverse=True) and sum(shares) <= 1.0001
        assert all(c["label"] in "0123456789" for c in result["classes"])
    assert "a.png" in capsys.readouterr().out


def test_predictions_equal_those_of_validation(run_dir, pictures, tmp_path):
    checkpoint = str(run_dir / "checkpoints" / "last.ckpt")
    (result,) = predict([str(pictures / "a.png")], checkpoint, output=str(tmp_path / "p.json"), topk=10)
    data = Digits()
    cli = run(["validate", "--data=Digits", f"--ckpt_path={checkpoint}"])
    with torch.inference_mode():
        scores = cli.model.eval()(data.dataset("val")[0][0][0][None]).softmax(-1)[0]
    assert {c["label"]: c["probability"] for c in result["classes"]} == pytest.approx(
        {str(n): p for n, p in enumerate(scores.tolist())}, abs=1e-4
    )


def test_tables_can_be_written(run_dir, pictures, tmp_path):
    predict([str(pictures)], str(run_dir / "checkpoints" / "last.ckpt"), output=str(tmp_path / "p.csv"), topk=2)
    with open(tmp_path / "p.csv") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 4 and list(table[0]) == ["file", "label1", "probability1", "label2", "probability2"]


def test_unreadable_images_are_named_and_skipped(run_dir, pictures, tmp_path, capsys):
    (pictures / "b.png").write_bytes(b"no image")
    results = predict([str(pictures)], str(run_dir / "checkpoints" / "last.ckpt"), output=str(tmp_path / "p.json"))
    assert len(results) == 3 and "skipped 1 unreadable images" in (err := capsys.readouterr().err) and "b.png" in err


def test_a_folder_gives_every_kind_of_image_and_names_the_rest(run_dir, pictures, tmp_path, capsys):
    for name in ("a.png", "b.png"):
        Image.open(pictures / name).save((pictures / name).with_suffix(".webp" if name == "a.png" else ".tif"))
        (pictures / name).unlink()
    (pictures / ".ipynb_checkpoints").mkdir()
    (pictures / "notes.txt").write_text("")
    os.mkfifo(pictures / "pipe.png")
    results = predict([str(pictures)], str(run_dir / "checkpoints" / "last.ckpt"), output=str(tmp_path / "p.json"))
    assert [Path(result["file"]).name for result in results] == ["a.webp", "b.tif", "d.png", "c.jpg"]
    err = capsys.readouterr().err
    assert "pipe.png (a named pipe, not a regular file)" in err
    assert "1 hidden (.ipynb_checkpoints), 1 without the ending of an image (notes.txt)" in err


def test_pictures_are_turned_upright_before_they_are_classified(run_dir, pictures, tmp_path):
    exif, picture = Image.Exif(), Image.open(pictures / "a.png")
    exif[0x0112] = 6
    picture.rotate(90).save(pictures / "turned.png", exif=exif)
    files = [str(pictures / name) for name in ("a.png", "turned.png")]
    first, second = predict(files, str(run_dir / "checkpoints" / "last.ckpt"), output=str(tmp_path / "p.json"))
    assert first["classes"] == second["classes"]


def test_nothing_readable_is_an_error(run_dir, tmp_path):
    (tmp_path / "b.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="none of the 1 images can be read"):
        predict([str(tmp_path)], str(run_dir / "checkpoints" / "last.ckpt"))


def test_published_models_name_the_classes_of_imagenet(pictures, tmp_path, monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name))  # without the download
    results = predict([str(pictures / "a.png")], model="test_resnet", output=str(tmp_path / "p.json"))
    assert not results[0]["classes"][0]["label"].isdigit()


def test_bundled_weights_answer_without_a_network(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("VISIONATTN_OFFLINE", "1")
    digits, _ = Digits().dataset("val")
    results = predict([str(pictures)], model="van_nano", output=str(tmp_path / "p.json"))
    named = {result["file"].rsplit("/", 1)[1]: result["classes"][0]["label"] for result in results}
    assert named == {name: str(digits.targets[n]) for n, name in enumerate(("a.png", "b.png", "c.jpg", "d.png"))}


@pytest.mark.parametrize("command", ["predict", "fit"])
def test_weights_that_cannot_be_had_end_with_one_line(pictures, tmp_path, monkeypatch, command):
    monkeypatch.setenv("VISIONATTN_OFFLINE", "1")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    arguments = {
        "predict": ["--model", "van_b1", str(pictures)],
        "fit": ["--data=Digits", "--model.name=van_b1", "--model.pretrained=true", f"--out={tmp_path}"],
    }
    with pytest.raises(UserError, match="not in the cache, and offline mode forbids to download it"):
        run([command, *arguments[command]])


def test_an_earlier_result_is_never_overwritten_unasked(run_dir, pictures, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(3):
        predict([str(pictures / "a.png")], str(run_dir / "checkpoints" / "last.ckpt"))
    assert {path.name for path in tmp_path.glob("*.json")} == {f"predictions{n}.json" for n in ("", "-1", "-2")}
    assert capsys.readouterr().out.strip().endswith("wrote predictions-2.json")


def test_a_folder_of_classes_gives_an_accuracy(run_dir, tmp_path, capsys):
    digits, _ = Digits().dataset("val")
    for n in range(60):
        folder = tmp_path / "in" / str(digits.targets[n])
        folder.mkdir(parents=True, exist_ok=True)
        digits.images[n].save(folder / f"{n}.png")
    checkpoint = str(run_dir / "checkpoints" / "last.ckpt")
    results = predict([str(tmp_path / "in")], checkpoint, output=str(tmp_path / "p.json"))
    right = sum(r["file"].split("/")[-2] == r["classes"][0]["label"] for r in results)
    assert f"{right} of 60 are in the folder of their class: {100 * right / 60:.2f} %, " in capsys.readouterr().out


@pytest.mark.parametrize("device", ["cuda", "warp", "cuda:99", "meta:x"])
def test_a_device_that_is_not_there_is_named(run_dir, pictures, tmp_path, device):
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match=f"no device {device} here .*: use --device cpu, or auto"):
        predict([str(pictures)], str(run_dir / "checkpoints" / "last.ckpt"), device=device)


@pytest.mark.parametrize("name", ["p.json", "p.csv"])
def test_a_result_is_overwritten_on_request_only(run_dir, pictures, tmp_path, name):
    output, checkpoint = tmp_path / name, str(run_dir / "checkpoints" / "last.ckpt")
    output.write_text("mine")
    flags = ["predict", "--ckpt", checkpoint, str(pictures / "a.png"), "--output", str(output)]
    with pytest.raises(UserError, match=f"{name} would be lost. Choose another name, or add --overwrite"):
        run(flags)
    assert output.read_text() == "mine"
    run([*flags, "--overwrite"])
    assert "a.png" in output.read_text()


@pytest.mark.parametrize("task, written", [("segment", "in/a_classes.png"), ("detect", "predictions.json")])
def test_no_file_of_an_earlier_result_is_overwritten(tmp_path, task, written):
    """It is said before a network is built."""
    place = tmp_path / "out" / written.replace("in/", "")
    place.parent.mkdir()
    place.touch()
    arguments = (["in/a.png"], ["in"], "x.ckpt", {"task": task}, str(tmp_path / "out"), "cpu", 0.5)
    with pytest.raises(UserError, match=f"{place.name} would be lost. Choose another name, or add --overwrite"):
        predict_dense(*arguments)
    with pytest.raises(KeyError):  # the card of this test has nothing to build
        predict_dense(*arguments, overwrite=True)


def test_what_counts_as_an_image_is_said_from_the_list_of_readers(tmp_path, run_dir):
    (tmp_path / "a.png").write_text("no image")
    with pytest.raises(UserError, match="can be read: .*Give files of a format that Pillow reads: .*JPEG, .*TIFF"):
        predict([str(tmp_path / "a.png")], str(run_dir / "checkpoints" / "last.ckpt"), output=str(tmp_path / "p.json"))
