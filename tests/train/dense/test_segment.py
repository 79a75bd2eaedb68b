"""Segmentation: networks, inference, scores, and whole runs on generated scenes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.train.dense_data import folders
from visionattn.errors import UserError
from visionattn.train.cli import run
from visionattn.train.data.joint import IGNORE
from visionattn.train.dense.segment import segmentation_scores
from visionattn.train.dense.segmenter import Segmenter, multi_scale, sliding, whole
from visionattn.train.overlays import overlay_classes

pytest.importorskip("segmentation_models_pytorch")
ROOT = Path(__file__).resolve().parents[3]
VAN = dict(embed_dims=[8, 16, 16, 24], depths=[1, 1, 1, 1], mlp_ratios=[2, 2, 2, 2])
SMALL = ["--model.head=mlp", "--model.head_args={width: 16}", "--model.lr=0.01"]


def segmenter(head="mlp", **arguments):
    return Segmenter("van_b0", 5, head, {"width": 16}, model_args=VAN, **arguments)


def fit(out, tiny, *arguments, data="SceneMasks"):
    scenes = ["--data.img_size=64", "--data.train_scenes=12", "--data.val_scenes=5", "--data.batch_size=4"]
    flags = [f"--data={data}", *(scenes if data == "SceneMasks" else []), *tiny, *SMALL, f"--out={out}", *arguments]
    return run(["fit", "--model=Segmentation", *flags])


@pytest.mark.parametrize("head", ["upernet", "fpn", "mlp"])
@pytest.mark.parametrize("size", [(64, 64), (50, 75)])
def test_every_head_takes_every_size_and_every_parameter_learns(head, size):
    net = segmenter(head, aux=True).train()
    logits, aux = net(torch.rand(2, 3, *size), with_aux=True)
    assert logits.shape[:2] == (2, 5) and abs(logits.shape[2] - size[0] / 4) < 1 and aux.shape[2] < logits.shape[2]
    (logits.square().sum() + aux.square().sum()).backward()
    unused = [name for name, p in net.named_parameters() if p.grad is None]
    # The final layer norm of smp's maps is used; nothing in the backbone lies behind the last map.
    assert not unused


def test_images_are_normalised_inside_as_the_backbone_was_trained():
    net = segmenter().eval()
    assert net.mean.flatten().tolist() == pytest.approx([0.5] * 3) and "mean" not in net.state_dict()


def test_output_norms_of_the_backbone_replace_those_of_upernet():
    bare, normed = segmenter("upernet"), segmenter("upernet", backbone_args={"output_norm": True})
    assert any("feature_norms" in key for key in bare.state_dict())
    assert not any("feature_norms" in key for key in normed.state_dict())
    assert any("backbone.norms" in key for key in normed.state_dict())


def test_layer_decay_reaches_from_the_stem_to_the_head(tiny):
    from visionattn.train.optim import create_optimizer

    net = segmenter()
    optimizer = create_optimizer(net, "adamw", 1.0, 0.05, 0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    parameters = dict(net.named_parameters())
    assert rates[id(parameters["head.classify.1.weight"])] == 1.0
    assert rates[id(parameters["backbone.model.stem.proj.weight"])] == 0.5**5


class Pointwise(nn.Module):
    """Each pixel by itself: any way of cutting an image gives the same."""

    def forward(self, x):
        return torch.cat([x, 1 - x], 1)


@pytest.mark.parametrize(
    "size, window, stride", [((40, 60), 16, 11), ((40, 60), 64, 40), ((16, 50), 16, 16), ((7, 9), 4, 3)]
)
def test_sliding_windows_cover_every_pixel(size, window, stride):
    x = torch.rand(2, 3, *size)
    torch.testing.assert_close(sliding(Pointwise(), x, size, window, stride, batch=3), whole(Pointwise(), x, size))


def test_windows_that_overlap_are_averaged():
    class Mean(nn.Module):
        def forward(self, x):
            return x.mean((2, 3), keepdim=True).expand(-1, -1, *x.shape[2:])

    x = torch.arange(6.0).view(1, 1, 1, 6)
    out = sliding(Mean(), x, (1, 6), window=4, stride=2)
    assert out.flatten().tolist() == [1.5, 1.5, 2.5, 2.5, 3.5, 3.5]


def test_mirror_images_and_scales_are_averaged():
    x, run_ = torch.rand(1, 3, 32, 32), lambda images, size: whole(Pointwise(), images, size)
    once = multi_scale(run_, x, (32, 32), [1.0], False)
    torch.testing.assert_close(multi_scale(run_, x, (32, 32), [1.0, 1.0], True), once)
    torch.testing.assert_close(once.sum(1), torch.ones(1, 32, 32))
    assert multi_scale(run_, x, (20, 24), [0.5, 1.0, 1.5], True).shape == (1, 6, 20, 24)


def test_scores_are_those_of_the_whole_set():
    confusion = torch.tensor([[6, 2, 0], [1, 3, 0], [0, 0, 0]])  # the third class never occurs
    scores = segmentation_scores(confusion)
    assert scores["mIoU"].item() == pytest.approx(100 * (6 / 9 + 3 / 6) / 2)
    assert scores["aAcc"].item() == pytest.approx(75) and scores["mAcc"].item() == pytest.approx(100 * 0.75)


def test_scores_of_a_run_equal_a_count_by_hand(tmp_path, tiny):
    """Over images of different sizes, with pixels that do not count, in batches that do not divide the set."""
    root = folders(tmp_path / "data", train=4, val=5)
    mask = root / "masks" / "val" / "0.png"
    values = np.array(Image.open(mask))
    values[:20] = 255
    Image.fromarray(values).save(mask)
    for folder in ("images", "masks"):  # and one that is smaller
        (file,) = (root / folder / "val").glob("1.*")
        image = Image.open(file)
        image.crop((0, 0, 50, 40)).save(file)
    flags = [f"--data.root={root}", "--data.img_size=32", "--data.num_workers=0", "--data.eval_batch_size=2"]
    cli = fit(tmp_path / "run", tiny, *flags, "--trainer.max_epochs=1", data="Masks")
    net, data = cli.model.net.eval(), cli.datamodule
    right = total = 0
    confusion = torch.zeros(11, 11)
    for image, classes in (data.dataset("val")[0][i] for i in range(5)):
        with torch.no_grad():
            found = whole(net, image[None] / 255, classes.shape)[0].argmax(0)
        counted = classes != IGNORE
        right, total = right + (found == classes)[counted].sum(), total + counted.sum()
        for true, predicted in zip(classes[counted].tolist(), found[counted].tolist(), strict=True):
            confusion[true, predicted] += 1
    metrics = cli.trainer.callback_metrics
    assert float(metrics["val/aAcc"]) == pytest.approx(100 * float(right) / float(total), abs=1e-3)
    assert float(metrics["val/mIoU"]) == pytest.approx(float(segmentation_scores(confusion)["mIoU"]), abs=1e-3)


@pytest.mark.slow
def test_eight_scenes_are_learned_by_heart(tmp_path, tiny):
    flags = ["--data.img_size=96", "--data.fresh=false", "--data.train_scenes=8", "--data.batch_size=8"]
    flags += ["--data.objects=[1,2]", "--data.sides=[0.4,0.6]", "--data.val_scenes=8"]
    flags += ["--model.head=fpn", "--model.head_args={width: 32, pyramid: 32, dropout: 0}", "--model.schedule=cosine"]
    flags += ["--model.model_args={embed_dims: [32,48,64,96], depths: [1,1,1,1], mlp_ratios: [4,4,4,4]}"]
    flags += ["--trainer.max_epochs=300", "--trainer.check_val_every_n_epoch=300", "--trainer.gradient_clip_val=1.0"]
    cli = fit(tmp_path, tiny, *flags)
    net, (scenes, _) = cli.model.net.eval(), cli.datamodule.dataset("train")
    images, classes = (torch.stack(part) for part in zip(*(scenes[i] for i in range(8)), strict=True))
    with torch.no_grad():
        found = whole(net, images / 255, (96, 96)).argmax(1)
    confusion = torch.bincount((classes.long() * 11 + found).flatten(), minlength=121).view(11, 11)
    assert segmentation_scores(confusion)["mIoU"] > 92


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny):
    """A run of two epochs with its pictures and checkpoints."""
    out = tmp_path_factory.mktemp("segment")
    torch.set_num_threads(1)
    every = ["--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint", f"--trainer.callbacks.dirpath={out}"]
    every += ["--trainer.callbacks.filename={epoch}", "--trainer.callbacks.save_top_k=-1"]
    fit(out, tiny, "--trainer.max_epochs=2", "--model.aux_weight=0.4", *every)
    return out


def test_a_run_leaves_checkpoints_weights_and_pictures(finished):
    names = {path.name for path in (finished / "checkpoints").iterdir()}
    assert {"last.ckpt", "model.safetensors"} < names and any("mIoU" in name for name in names)
    assert Image.open(finished / "pictures" / "epoch001.png").size[0] == 3 * 256 + 2 * 4


def test_a_resumed_run_is_bit_identical(finished, tmp_path, tiny):
    fit(tmp_path, tiny, "--trainer.max_epochs=2", "--model.aux_weight=0.4", f"--ckpt_path={finished / 'epoch=0.ckpt'}")
    a, b = (torch.load(p / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for p in (finished, tmp_path))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_the_checkpoint_alone_says_what_to_test(finished, capsys):
    flags = ["--data=SceneMasks", "--data.img_size=64", "--data.val_scenes=3"]
    flags += ["--model.test_scales=[0.5,1.0]", "--model.test_flip=true", "--model.window=32"]
    cli = run(["test", "--model=Segmentation", *flags, f"--ckpt_path={finished / 'checkpoints' / 'last.ckpt'}"])
    assert cli.model.card["head_args"] == {"width": 16} and "test/mIoU" in cli.trainer.callback_metrics
    assert "photograph" in capsys.readouterr().out
    cli = run(["validate", "--data=SceneMasks", f"--ckpt_path={finished / 'checkpoints' / 'last.ckpt'}"])
    assert type(cli.model).__name__ == "Segmentation" and cli.datamodule.settings["size"] == 64


@pytest.mark.parametrize("name", ["last.ckpt", "model.safetensors"])
def test_predictions_are_overlays_and_indexed_pictures(finished, tmp_path, name, capsys):
    folders(tmp_path / "data", train=1, val=2)
    images = tmp_path / "data" / "images"
    Image.open(images / "val" / "0.jpg").crop((0, 0, 51, 40)).save(images / "val" / "0.jpg")
    (images / "broken.jpg").write_bytes(b"no image")
    out = tmp_path / "out"
    run(["predict", "--ckpt", str(finished / "checkpoints" / name), str(images), "--output", str(out)])
    indexed = Image.open(out / "val" / "0_classes.png")
    assert indexed.mode == "P" and indexed.size == (51, 40) == Image.open(out / "val" / "0_overlay.png").size
    results = json.loads((out / "predictions.json").read_text())
    assert len(results) == 3 and (out / "train" / "0_overlay.png").is_file()
    counts = np.bincount(np.array(indexed).flatten(), minlength=11) / (51 * 40)
    (result,) = (r for r in results if r["file"].endswith("val/0.jpg"))
    assert result["classes"] == pytest.approx(
        {n: c for n, c in zip(["photograph", *"0123456789"], counts, strict=True) if c}, abs=1e-4
    )
    assert "skipped 1 unreadable images" in capsys.readouterr().err


def test_overlays_leave_what_is_black_or_no_class_as_it_is():
    image = torch.full((3, 2, 2), 100, dtype=torch.uint8)
    classes = torch.tensor([[0, 1], [IGNORE, 1]], dtype=torch.uint8)
    drawn = overlay_classes(image, classes, [(0, 0, 0), (200, 0, 0)], strength=0.5)
    assert drawn[0].tolist() == [[100, 150], [100, 150]] and drawn[1].tolist() == [[100, 50], [100, 50]]


def test_a_folder_is_needed_for_the_results(finished):
    with pytest.raises(UserError, match="--output x.json: .* give a folder"):
        run(["predict", "--ckpt", str(finished / "checkpoints" / "last.ckpt"), str(ROOT / "docs"), "--output=x.json"])


def test_a_run_starts_from_weights_of_a_segmenter_or_of_a_classifier(finished, run_dir, tmp_path, tiny):
    for source in (finished, run_dir):
        weights = source / "checkpoints" / "last.ckpt"
        flags = [f"--model.weights={weights}", "--trainer.max_epochs=1", "--model.lr=1e-9", "--model.warmup_lr=0"]
        cli = fit(tmp_path / source.name, tiny, *flags, *(["--model.aux_weight=0.4"] if source == finished else []))
        old = torch.load(weights, weights_only=True)["state_dict"]
        new = cli.model.state_dict()
        name = "stem.proj.weight"
        old_name = f"net.backbone.model.{name}" if source == finished else f"net.{name}"
        torch.testing.assert_close(new[f"net.backbone.model.{name}"], old[old_name], atol=1e-6, rtol=0)


def test_a_loss_that_is_no_number_names_the_image(tmp_path, tiny, monkeypatch):
    from visionattn.train.data.segmentation import SceneMaps

    getitem = SceneMaps.__getitem__
    monkeypatch.setattr(Segmenter, "forward", _poisoned(Segmenter.forward))
    monkeypatch.setattr(SceneMaps, "__getitem__", lambda self, i: _marked(*getitem(self, i), i == 7))
    with pytest.raises(UserError, match=r"the loss is nan \(loss nan\) in batch 2 .* at step \d, on scene 7\. Look"):
        fit(tmp_path, tiny, "--trainer.max_epochs=1")


def _marked(image, classes, mark):
    return (torch.full_like(image, 255) if mark else image), classes


def _poisoned(forward):
    def poisoned(self, images, with_aux=False):
        out = forward(self, images, with_aux)
        return torch.where((images == 1).flatten(1).all(1)[:, None, None, None], torch.nan, out)

    return poisoned


def test_a_batch_without_a_pixel_that_counts_has_loss_zero(finished, tmp_path, tiny):
    cli = fit(tmp_path, tiny, "--trainer.max_epochs=1", "--trainer.limit_train_batches=1")
    loss = cli.model._loss(torch.randn(1, 11, 8, 8), torch.full((1, 8, 8), IGNORE))
    assert loss == 0


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model.head=upernet", "--data.batch_size=1"], "data.batch_size is 1: batch norm in UPerNet"),
        (["--model.window=8", "--model.window_stride=9"], "1 <= stride <= window"),
        (["--model.test_scales=[0]"], "test_scales"),
        (["--model.head_args={depth: 3}"], "does not take model.head_args"),
        (["--model.backbone_args={frozen_stages: 9}"], "frozen_stages is 9; allowed are 0 to 4"),
        (["--model.schedule=step"], "needs --model.milestones"),
        (["--data=SceneObjects"], "SceneObjects has no class maps"),
        (["--data=Digits"], "Digits has no data for Segmentation"),
    ],
)
def test_mistakes_are_named(tmp_path, tiny, flags, message):
    data = [] if any(flag.startswith("--data=") for flag in flags) else ["--data=SceneMasks"]
    with pytest.raises(UserError, match=message):
        run(["fit", "--model=Segmentation", *data, *tiny, *SMALL, *flags, f"--out={tmp_path}"])


def test_two_processes_report_the_scores_of_one(tmp_path, tiny):
    """Seven scenes in batches of two: what only fills the last batch up must not count."""
    scenes = ["--data=SceneMasks", "--data.img_size=64", "--data.val_scenes=7", "--data.eval_batch_size=2"]
    flags = [*scenes, "--data.train_scenes=16", "--data.batch_size=4", *tiny, *SMALL, "--trainer.max_epochs=1"]
    flags += ["--trainer.devices=2", "--trainer.accelerator=cpu", "--trainer.strategy=ddp", f"--out={tmp_path}"]
    command = [sys.executable, str(ROOT / "train.py"), "fit", "--model=Segmentation", *flags]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr
    import csv

    with open(tmp_path / "metrics.csv") as file:
        (reported,) = [row for row in csv.DictReader(file) if row["val/mIoU"]]
    cli = run(["validate", *scenes, f"--ckpt_path={tmp_path / 'checkpoints' / 'last.ckpt'}"])
    for name in ("mIoU", "aAcc", "mAcc", "loss"):
        value = float(cli.trainer.callback_metrics[f"val/{name}"])
        assert value == pytest.approx(float(reported[f"val/{name}"]), rel=1e-4), name
