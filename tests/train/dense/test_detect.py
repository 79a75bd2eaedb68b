"""Detection and instance segmentation: torchvision's detectors, annotation files, scores, and whole runs."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.train.dense_data import CATEGORY_IDS, coco, save, scenes, voc_boxes
from visionattn.errors import UserError
from visionattn.train.cli import run
from visionattn.train.data import Objects
from visionattn.train.dense.detect import MeanAP
from visionattn.train.dense.detector import DETECTORS, Detector

pytest.importorskip("faster_coco_eval")
ROOT = Path(__file__).resolve().parents[3]
VAN = dict(embed_dims=[8, 16, 16, 24], depths=[1, 1, 1, 1], mlp_ratios=[2, 2, 2, 2])
SCENES = ["--data=SceneObjects", "--data.img_size=64"]
SMALL = ["--model.detector=fcos", "--model.min_size=[64]", "--model.max_size=64", "--model.fpn_channels=64"]
EVERYTHING = ["--model.detector_args={score_thresh: 0.0}"]


def detector(kind, **arguments):
    settings = dict(min_size=(64,), max_size=96, fpn_channels=64, model_args=VAN) | arguments
    return Detector("van_b0", 3, kind, **settings)


def objects(root, **arguments):
    return Objects(root=str(root), **({"batch_size": 2, "num_workers": 0, "masks": True} | arguments))


def fit(out, tiny, *arguments):
    counts = ["--data.train_scenes=8", "--data.val_scenes=5", "--data.batch_size=4", "--model.lr=0.002"]
    return run(["fit", "--model=Detection", *SCENES, *counts, *tiny, *SMALL, f"--out={out}", *arguments])


def target(count, masks=True):
    boxes = torch.tensor([[4.0, 6.0, 30.0, 40.0]]).expand(count, 4)
    return {
        "boxes": boxes,
        "labels": torch.full((count,), 2),
        "iscrowd": torch.zeros(count, dtype=torch.int64),
        "masks": torch.ones(count, 48, 60, dtype=torch.uint8),
    }


@pytest.mark.parametrize("kind", DETECTORS)
def test_every_detector_learns_from_images_with_and_without_objects(kind):
    net = detector(kind).train()
    loss = sum(net.losses([torch.rand(3, 48, 60), torch.rand(3, 70, 50)], [target(1), target(0)]).values())
    loss.backward()
    unused = [name for name, p in net.named_parameters() if p.grad is None]
    assert loss.isfinite() and not unused
    with torch.no_grad():
        found = net.eval()([torch.rand(3, 48, 60)])[0]
    assert set(found) == {"boxes", "labels", "scores"} | ({"masks"} if kind == "mask_rcnn" else set())
    assert all(label in (0, 1, 2) for label in found["labels"].tolist())


def test_resnets_work_too_and_the_optimizer_sees_their_groups():
    net = Detector("test_resnet", 2, "fcos", min_size=(64,), max_size=64, fpn_channels=64)
    assert net.group_matcher()["stem"].startswith(r"^model\.backbone\.features\.(?:model\.(?:")


@pytest.mark.parametrize("layout, make, ids", [("coco", coco, CATEGORY_IDS), ("voc", voc_boxes, list(range(1, 21)))])
def test_every_layout_is_read(tmp_path, layout, make, ids):
    data = objects(make(tmp_path), layout=layout, masks=layout == "coco")
    data.check(["train", "val"])
    assert data.category_ids == ids and data.num_classes == len(ids) == len(data.palette)
    batch = next(iter(data.train_dataloader()))
    for image, entry in zip(batch.images, batch.targets, strict=True):
        assert image.shape == (3, 64, 64) and len(entry["boxes"]) == len(entry["labels"]) > 0


def test_labels_boxes_and_masks_are_those_of_the_scene(tmp_path):
    data, (scene, *_) = objects(coco(tmp_path), hflip=0.0), scenes(4)
    _, entry = data.dataset("train")[0][0]
    assert np.array_equal(entry["masks"].numpy().astype(bool), scene.masks)
    assert np.allclose(entry["boxes"].numpy(), scene.boxes) and np.array_equal(entry["labels"].numpy(), scene.labels)


def test_mirror_images_keep_boxes_on_their_objects(tmp_path):
    data = objects(coco(tmp_path), hflip=1.0)
    _, entry = data.dataset("train")[0][0]
    for box, mask in zip(entry["boxes"].round().int().tolist(), entry["masks"], strict=True):
        assert mask[box[1] : box[3], box[0] : box[2]].sum() == mask.sum() > 0


def test_images_without_objects_count_in_validation_and_train_if_asked_for(tmp_path):
    root = coco(tmp_path)
    lengths = [len(objects(root, **kind).dataset("train")[0]) for kind in ({}, {"empty_images": "train"})]
    assert lengths == [4, 5] and len(objects(root).dataset("val")[0]) == 3


def test_difficult_objects_are_not_learned(tmp_path):
    data = objects(voc_boxes(tmp_path), layout="voc", masks=False, hflip=0.0)
    image = next(i for i, entry in enumerate(data.annotations("train").images) if len(entry.labels) > 1)
    everything = len(data.annotations("train").images[image].labels)
    assert len(data.dataset("train")[0][image][1]["labels"]) == everything - 1


def change(root, function):
    file = root / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    function(content)
    file.write_text(json.dumps(content))


def test_boxes_outside_are_cut_and_empty_ones_left_out_with_a_warning(tmp_path, capsys):
    root = coco(tmp_path)

    def damage(content):
        content["annotations"][0]["bbox"] = [-5, 10, 20, 500]
        content["annotations"][1]["bbox"] = [10, 10, 0, 20]

    change(root, damage)
    data = objects(root)
    data.check(["train"])
    first = data.annotations("train").images[0]
    assert first.boxes[0] == [0, 10, 15, 64]
    assert "1 objects have no box inside their image and are left out: annotation 2 of" in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage, message",
    [
        (
            lambda c: c["annotations"][0].update(category_id=4),
            r"annotation 1 is of category 4, which is not in the file",
        ),
        (lambda c: c["annotations"][0].update(image_id=77), r"annotation 1 is of image 77, which is not in the file"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2]), r"annotation 1 of 1.jpg: the box \[1, 2\] is not four"),
        (lambda c: c["annotations"][0].update(bbox=[1, 2, float("nan"), 3]), r"is not four numbers"),
        (lambda c: c["annotations"][0].update(segmentation=[]), r"annotation 1 of 1.jpg: it has no outline"),
        (lambda c: c["annotations"][0].update(bbox=[None, 1, 2, 3]), r"is not four numbers: expected left, top, width"),
        (lambda c: c["annotations"][0].update(bbox=["1", "1", "2", "3"]), r"is not four numbers"),
        (lambda c: c["annotations"][0].update(bbox=4), r"the box 4 is not four numbers"),
        (lambda c: c["annotations"][0].update(image_id="10"), r"1 has the image_id '10', a str, but .* id 10, a int"),
        (lambda c: c["annotations"][0].update(category_id="8"), r"1 has the category_id '8', a str"),
        (lambda c: c["annotations"][0].update(image_id=[10]), r"annotation 1 has the image_id|of image \[10\]"),
        (lambda c: [i.update(id=str(i["id"])) for i in c["images"]], r"but the image has the id '10', a str"),
        (lambda c: c["annotations"].insert(0, [1]), r"annotation at place 0 is a list: expected an object"),
        (
            lambda c: c["categories"][3].update(name="digit 1"),
            r"category 2 and category 5 have the same name",
        ),
        (lambda c: c["categories"][3].update(name=None), r"category 5 has the name None: expected a text"),
        (lambda c: c["categories"][3].update(id=2), r"category 2 is there twice"),
        (lambda c: c["categories"][3].update(id="5"), r"category '5' has an id that is a str: expected an integer"),
        (lambda c: c["images"][1].update(id=10), r"image 10 is there twice"),
        (lambda c: c["images"][1].update(file_name="1.jpg"), r"image 10 and image 20 have the same file_name"),
        (
            lambda c: c["categories"][0].update(name="other"),
            r"not know: 1 is 'digit 0' here and 'other' in training",
        ),
        (lambda c: c["images"][0].update(file_name="none.jpg"), r"1 annotated images are not there: .*none.jpg"),
        (lambda c: c.pop("categories"), r"is not a COCO annotation file: KeyError 'categories'"),
        (lambda c: c.update(images=[], annotations=[]), r"has 0 images"),
        (lambda c: c.update(annotations=[]), r"no image of the training split in .* has an object"),
        (lambda c: c["categories"].pop(), r"category 90|categories that training does not know"),
    ],
)
def test_damaged_annotations_are_named(tmp_path, damage, message):
    change(coco(tmp_path, train=6), damage)
    with pytest.raises(UserError, match=message):
        objects(tmp_path).check(["train", "val"])


FLAT = [5, 5, 25, 5, 25, 25]


@pytest.mark.parametrize(
    "outline, message",
    [
        ([[5, 5, 15, 15]], "polygon 1 has 2 corners: expected 3 or more"),
        ([FLAT, [*FLAT, 5]], "polygon 2 has 7 coordinates: expected an even number"),
        ([[]], "polygon 1 has 0 corners"),
        (FLAT, "is a list of numbers: expected a list of polygons"),
        ([[*FLAT, None, 3]], "polygon 1 is not a list of numbers"),
        ([[*FLAT, float("nan"), 3]], "polygon 1 is not a list of numbers"),
        ([[[5, 5], [25, 5], [25, 25]]], "polygon 1 is not a list of numbers"),
        (["a"], "polygon 1 is not a list of numbers"),
        ("a", "its outline is a str"),
        (None, "it has no outline"),
        ({"counts": "a"}, "its run lengths are incomplete: expected size, and counts"),
        ({"size": [32, 64], "counts": [2048]}, r"of height and width \[32, 64\]: expected \[64, 64\]"),
        ({"size": [64, 64], "counts": [0, 4000]}, "add up to 4000 pixels: expected 4096"),
        ({"size": [64, 64], "counts": [0, 4097, -1]}, "are not all numbers of pixels"),
        ({"size": [64, 64], "counts": "016"}, "its run lengths are damaged"),
    ],
)
def test_outlines_that_would_become_other_shapes_are_refused(tmp_path, outline, message):
    root = coco(tmp_path)
    change(root, lambda content: content["annotations"][0].update(segmentation=outline))
    with pytest.raises(UserError, match=rf"instances_train2017.json: annotation 1.*: .*{message}") as caught:
        objects(root).check(["train"])
    assert "\n" not in str(caught.value)
    objects(root, masks=False).check(["train"])  # where nobody asks for it


def test_run_lengths_of_a_high_image_are_not_those_of_a_wide_one(tmp_path):
    root = coco(tmp_path)
    save(root / "train2017" / "1.jpg", np.zeros((64, 40, 3), np.uint8))
    runs = {"size": [40, 64], "counts": [0, 40 * 64]}

    def swap(content):
        content["images"][0].update(width=40)
        content["annotations"] = [content["annotations"][0] | {"bbox": [0, 0, 9, 9], "segmentation": runs}]

    change(root, swap)
    with pytest.raises(UserError, match=r"of height and width \[40, 64\]: expected \[64, 40\], those of the image"):
        objects(root)


def test_ids_of_images_may_be_texts(tmp_path):
    root = coco(tmp_path)
    change(root, lambda content: [entry.update(id=f"i{entry['id']}") for entry in content["images"]])
    change(root, lambda content: [entry.update(image_id=f"i{entry['image_id']}") for entry in content["annotations"]])
    objects(root).check(["train"])


def test_a_byte_order_mark_does_not_matter(tmp_path):
    root = coco(tmp_path)
    file = root / "annotations" / "instances_train2017.json"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    objects(root).check(["train"])


@pytest.mark.parametrize("kind", ["coco", "voc"])
def test_images_of_every_format_are_detected_in_upright(tmp_path, kind):
    root = {"coco": coco, "voc": voc_boxes}[kind](tmp_path)
    folder, stem = {"coco": (root / "train2017", "1"), "voc": (root / "JPEGImages", "trainval0")}[kind]
    settings = dict(layout=kind, masks=False, hflip=0.0)
    plain = objects(root, **settings).dataset("train")[0][0][0]
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(folder / f"{stem}.jpg").rotate(90).save(folder / f"{stem}.webp", exif=exif, lossless=True)
    (folder / f"{stem}.jpg").unlink()
    if kind == "coco":
        change(root, lambda content: content["images"][0].update(file_name="1.webp"))
    assert torch.equal(objects(root, **settings).dataset("train")[0][0][0], plain)


def test_annotations_of_a_picture_lying_down_are_refused_in_these_words(tmp_path):
    root = coco(tmp_path)
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.new("RGB", (64, 40)).save(root / "train2017" / "1.jpg", exif=exif)
    change(root, lambda content: content["images"][0].update(width=64, height=40))
    message = "1.jpg is 40 x 64 pixels, its annotations say 64 x 40.* stored as 64 x 40 and turned upright by its EXIF"
    with pytest.raises(UserError, match=message):
        objects(root, masks=False).check(["train"])


def test_a_test_split_is_tested_on_and_named(tmp_path):
    root = coco(tmp_path / "coco")
    assert objects(root).origin("test") == objects(root).origin("val")  # where there is no other
    shutil.copytree(root / "train2017", root / "test2017")
    shutil.copy(root / "annotations" / "instances_train2017.json", root / "annotations" / "instances_test2017.json")
    data = objects(root)
    assert len(data.dataset("test")[0]) == 5 and len(data.dataset("val")[0]) == 3
    assert "test2017, annotated in" in data.origin("test") and data.origin("test").endswith("instances_test2017.json")
    given = dict(test_annotations="annotations/instances_val2017.json", test_images="val2017")
    assert objects(root, **given).origin("test") == objects(root).origin("val")
    with pytest.raises(UserError, match="give their file too, with --data.test_annotations"):
        objects(root, test_images="test2017")
    root = voc_boxes(tmp_path / "voc")
    settings = dict(layout="voc", masks=False)
    assert objects(root, val_split="trainval", **settings).origin("test").endswith("Main/test.txt")
    assert objects(root, test_split="trainval", **settings).origin("test").endswith("Main/trainval.txt")


def test_images_of_another_size_than_annotated_are_named(tmp_path):
    root = coco(tmp_path)
    change(root, lambda content: content["images"][0].update(height=50))
    with pytest.raises(UserError, match="1.jpg is 64 x 64 pixels, its annotations say 64 x 50: they must be the same$"):
        objects(root, masks=False).check(["train"])


def test_missing_files_are_named(tmp_path):
    root = coco(tmp_path)
    with pytest.raises(UserError, match=r"no annotation file .*other.json: give it with --data.train_annotations"):
        objects(root, train_annotations="other.json").check(["train"])
    (root / "annotations" / "instances_train2017.json").write_text("{")
    with pytest.raises(UserError, match="is not a COCO annotation file"):
        objects(root)
    voc_boxes(tmp_path / "voc")
    (tmp_path / "voc" / "Annotations" / "test1.xml").unlink()
    with pytest.raises(UserError, match=r"names test1, but there is no annotation file"):
        objects(tmp_path / "voc", layout="voc", masks=False).check(["val"])
    with pytest.raises(UserError, match=r"class '\w+', which is not in data.classes"):
        objects(tmp_path / "voc", layout="voc", masks=False, classes=["dog"])


def found_of(scene, shift=0.0, scores=None):
    boxes, labels = torch.from_numpy(scene.boxes), torch.from_numpy(scene.labels)
    scores = torch.linspace(0.9, 0.5, len(labels)) if scores is None else scores
    return {"boxes": boxes + shift, "labels": labels, "scores": scores, "masks": torch.from_numpy(scene.masks)}


def target_of(scene):
    return {key: value for key, value in found_of(scene).items() if key != "scores"} | {
        "iscrowd": torch.zeros(len(scene.labels), dtype=torch.int64)
    }


def test_scores_are_exact_and_do_not_depend_on_order_or_padding():
    made = scenes(4)
    metric = MeanAP(masks=True)
    metric.update([found_of(s) for s in made], [target_of(s) for s in made], [0, 1, 2, -1])
    scores = metric.compute()
    assert scores["AP"] == pytest.approx(100) and scores["mask_AP50"] == pytest.approx(100)
    values = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        for i in order:
            metric.update([found_of(made[i], shift=2.0 * i)], [target_of(made[i])], [i])
        values.append(metric.compute())
    assert values[0] == values[1] and 0 < values[0]["AP"] < 100


def test_scores_of_several_processes_are_those_of_one(monkeypatch):
    made, ranks = scenes(5), [[3, 0], [4, 2, 1]]  # of different lengths, in any order
    metrics = [MeanAP(masks=True) for _ in ranks]
    for metric, indices in zip(metrics, ranks, strict=True):
        for i in indices:
            metric.update([found_of(made[i], shift=2.0 * i)], [target_of(made[i])], [i])
    alone = MeanAP(masks=True)
    alone.update([found_of(s, 2.0 * i) for i, s in enumerate(made)], [target_of(s) for s in made], list(range(5)))
    sent = [(metric.indices, {k: v for k, v in metric.metric.metric_state.items() if v}) for metric in metrics]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(
        torch.distributed, "all_gather_object", lambda parts, mine: parts.__setitem__(slice(None), sent)
    )
    scores = [metric.compute() for metric in metrics]
    monkeypatch.undo()
    assert scores[0] == scores[1] == alone.compute() and 0 < scores[0]["AP"] < 100


@pytest.mark.parametrize("masks", [False, True])
def test_scores_of_images_without_objects_are_defined(masks):
    empty = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    empty |= {"masks": torch.zeros(0, 64, 64, dtype=torch.uint8)}
    metric = MeanAP(masks)
    metric.update([empty | {"scores": torch.zeros(0)}], [empty | {"iscrowd": empty["labels"]}], [0])
    assert metric.compute()["AP"] == 0


@pytest.mark.slow
def test_eight_scenes_are_learned_by_heart(tmp_path, tiny):
    flags = ["--data.img_size=96", "--data.fresh=false", "--data.train_scenes=8", "--data.batch_size=8"]
    flags += ["--data.objects=[1,2]", "--data.sides=[0.4,0.6]", "--model.min_size=[96]", "--model.max_size=96"]
    flags += ["--model.model_args={embed_dims: [32,48,64,96], depths: [1,1,1,1], mlp_ratios: [4,4,4,4]}"]
    flags += ["--model.schedule=cosine", "--trainer.gradient_clip_val=5.0"]
    cli = fit(tmp_path, tiny, *flags, "--trainer.max_epochs=300", "--trainer.check_val_every_n_epoch=300")
    net, (scenes, _), metric = cli.model.net.eval(), cli.datamodule.dataset("train"), MeanAP(masks=False)
    with torch.no_grad():
        for i in range(8):
            image, target = scenes[i]
            metric.update(net([image / 255]), [target], [i])
    scores = metric.compute()
    assert scores["AP50"] > 95 and scores["AP"] > 75


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny):
    """A run of two epochs of FCOS."""
    out = tmp_path_factory.mktemp("detect")
    torch.set_num_threads(1)
    every = ["--trainer.callbacks+=lightning.pytorch.callbacks.ModelCheckpoint", f"--trainer.callbacks.dirpath={out}"]
    every += ["--trainer.callbacks.filename={epoch}", "--trainer.callbacks.save_top_k=-1"]
    fit(out, tiny, "--trainer.max_epochs=2", *every, *EVERYTHING)
    return out


def test_a_run_leaves_checkpoints_weights_and_pictures(finished):
    names = {path.name for path in (finished / "checkpoints").iterdir()}
    assert {"last.ckpt", "model.safetensors"} < names and any("-AP" in name for name in names)
    assert Image.open(finished / "pictures" / "epoch001.png").size[0] == 2 * 256 + 4


def test_a_resumed_run_is_bit_identical(finished, tmp_path, tiny):
    fit(tmp_path, tiny, "--trainer.max_epochs=2", f"--ckpt_path={finished / 'epoch=0.ckpt'}", *EVERYTHING)
    a, b = (torch.load(p / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for p in (finished, tmp_path))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_predictions_are_overlays_and_a_coco_file(finished, tmp_path):
    for n, scene in enumerate(scenes(2)):
        save(tmp_path / "in" / f"{n}.png", scene.image)
    out, weights = tmp_path / "out", finished / "checkpoints" / "model.safetensors"
    run(["predict", "--ckpt", str(weights), str(tmp_path / "in"), "--output", str(out), "--threshold=0.001"])
    content = json.loads((out / "predictions.json").read_text())
    assert len(content["images"]) == 2 and len(content["categories"]) == 10 and content["annotations"]
    for entry in content["annotations"]:
        assert entry["score"] >= 0.001 and entry["category_id"] in range(10) and len(entry["bbox"]) == 4
    assert Image.open(out / "0_overlay.png").size == (64, 64)
    (tmp_path / "back" / "images").mkdir(parents=True)
    (tmp_path / "back" / "found.json").write_text(json.dumps(content))
    for image in content["images"]:
        assert Path(image["file_name"]).is_file()


def test_masks_are_written_as_run_lengths(tmp_path):
    from visionattn.train.dense.predict import coco as as_coco

    (scene,) = scenes(1)
    content = as_coco(
        [("a.png", (64, 64), found_of(scene))], {"category_ids": CATEGORY_IDS, "class_names": list("0123456789")}
    )
    save(tmp_path / "images" / "a.png", scene.image)
    (tmp_path / "found.json").write_text(json.dumps(content | {"images": content["images"]}))
    data = objects(tmp_path, train_annotations="found.json", train_images="images", hflip=0.0)
    _, entry = data.dataset("train")[0][0]
    assert np.array_equal(entry["masks"].numpy().astype(bool), scene.masks)
    assert [a["category_id"] for a in content["annotations"]] == [CATEGORY_IDS[n] for n in scene.labels]


def test_a_loss_that_is_no_number_names_the_images(tmp_path, tiny, monkeypatch):
    losses = Detector.losses
    monkeypatch.setattr(Detector, "losses", lambda *a: {k: v * torch.nan for k, v in losses(*a).items()})
    with pytest.raises(UserError, match=r"the loss is nan \(classification nan.*at step 0, on scene \d, scene \d"):
        fit(tmp_path, tiny, "--trainer.max_epochs=1")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--model.min_size=[]"], "model.min_size is"),
        (["--model.min_size=[64,128]", "--model.max_size=100"], "model.min_size is"),
        (["--model.fpn_channels=96", "--model.fpn_channels=40"], "FCOS needs a multiple of 32"),
        (["--model.detector_args={colour: 3}"], "fcos does not take model.detector_args"),
        (["--data=SceneMasks"], "SceneMasks has no boxes"),
    ],
)
def test_mistakes_are_named(tmp_path, tiny, flags, message):
    with pytest.raises(UserError, match=message):
        run(["fit", "--model=Detection", *SCENES[:1], *tiny, *SMALL, *flags, f"--out={tmp_path}"])


@pytest.mark.slow
def test_two_processes_report_the_scores_of_one(tmp_path, tiny):
    """Seven scenes in batches of two: what only fills the last batch up must not count."""
    flags = [*SCENES, "--data.val_scenes=7", "--data.eval_batch_size=2", "--data.train_scenes=8", "--data.batch_size=2"]
    flags += [*tiny, *SMALL, "--model.lr=0.002", *EVERYTHING]
    flags += ["--trainer.max_epochs=1", "--trainer.devices=2", "--trainer.accelerator=cpu", "--trainer.strategy=ddp"]
    command = [sys.executable, str(ROOT / "train.py"), "fit", "--model=Detection", *flags, f"--out={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / "metrics.csv") as file:
        (reported,) = [row for row in csv.DictReader(file) if row["val/AP"]]
    scenes_ = [*SCENES, "--data.val_scenes=7", "--data.eval_batch_size=2"]
    cli = run(["validate", *scenes_, f"--ckpt_path={tmp_path / 'checkpoints' / 'last.ckpt'}"])
    for name in ("AP", "AP50", "APm"):
        assert float(cli.trainer.callback_metrics[f"val/{name}"]) == pytest.approx(
            float(reported[f"val/{name}"]), abs=1e-4
        )
