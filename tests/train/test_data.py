import os
import shutil
import sys
import tarfile

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data.auto_augment import NAME_TO_OP

from visionattn.errors import UserError
from visionattn.train.cli import run
from visionattn.train.data import Digits, Images
from visionattn.train.data.images import from_stream
from visionattn.train.data.transforms import train_transform


def images(folder, **arguments):
    return Images(root=str(folder), **({"img_size": 32, "batch_size": 4, "num_workers": 0} | arguments))


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def test_digits_have_a_fixed_split_without_overlap():
    data = Digits()
    (train, _), (val, _) = data.dataset("train"), data.dataset("val")
    assert (len(train), len(val)) == (1437, 360)
    again, _ = Digits().dataset("val")
    assert [i.tobytes() for i in val.images] == [i.tobytes() for i in again.images]
    assert not {i.tobytes() for i in train.images} & {i.tobytes() for i in val.images}


def test_digits_come_in_the_requested_size():
    image, _ = Digits(img_size=64).dataset("train")[0][0]
    assert image.shape == (3, 64, 64)


def test_preprocessing_follows_the_model(folder):
    van = images(folder, model="van_b0", img_size=None).preprocess
    assert (van["mean"], van["crop_pct"], van["input_size"]) == ([0.5, 0.5, 0.5], 0.9, [3, 224, 224])
    resnet = images(folder, model="resnet18").preprocess
    assert resnet["mean"] == [0.485, 0.456, 0.406]
    assert images(folder, model="van_b0", mean=[0.1, 0.2, 0.3]).preprocess["mean"] == [0.1, 0.2, 0.3]


def test_classes_keep_their_index_when_validation_lacks_one(folder):
    shutil.rmtree(folder / "val" / "cat")
    data = images(folder)
    val, name = data.dataset("val")
    assert data.class_names == ["cat", "dog", "owl"]
    assert {(name(i).split("/")[-2], int(val[i][1])) for i in range(len(val))} == {("dog", 1), ("owl", 2)}


def test_batches_hold_images_targets_and_unreadable_counts(folder):
    pixels, targets, _, unreadable = next(iter(images(folder).val_dataloader()))
    assert pixels.shape == (4, 3, 32, 32) and targets.tolist() == [0, 0, 0, 1] and unreadable.sum() == 0


def make_empty(folder):
    for file in (folder / "train" / "dog").iterdir():
        file.unlink()


def make_nested(folder):
    (folder / "train" / "dog" / "more").mkdir()


def make_extra(folder):
    shutil.copytree(folder / "val" / "dog", folder / "val" / "wolf")


def make_flat(folder):
    shutil.rmtree(folder / "train")
    shutil.rmtree(folder / "val")


def break_one(folder):
    truncate(folder / "train" / "owl" / "3.png")


@pytest.mark.parametrize(
    "damage, message",
    [
        (make_empty, r"no images in class folder .*dog: fill or remove it"),
        (make_nested, r"class folder .*dog has folders inside"),
        (make_extra, r"classes that training does not know: wolf"),
        (make_flat, r"no 'val' folder in .*expected"),
        (break_one, r"1 unreadable images in train: .*owl/3.png. Remove them, or skip"),
        (shutil.rmtree, r"no such data folder"),
    ],
)
def test_damaged_folders_are_refused_before_work_starts(folder, damage, message):
    damage(folder)
    with pytest.raises(UserError, match=message):
        images(folder).check(["train", "val"])


def test_unreadable_images_can_be_skipped(folder, capsys):
    break_one(folder)
    data = images(folder, bad_images="skip", batch_size=24)
    data.check(["train", "val"])
    assert "1 unreadable images" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["batch_size", "eval_batch_size", "img_size"])
def test_sizes_below_one_are_refused(folder, name):
    with pytest.raises(UserError, match=f"data.{name} is 0: it must be at least 1"):
        images(folder, **{name: 0})


def test_another_number_of_classes_than_asked_for_is_refused(folder):
    with pytest.raises(UserError, match="data.num_classes is 5, but .* has 3 classes"):
        images(folder, num_classes=5)


def test_missing_reader_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "webdataset", None)
    monkeypatch.delitem(sys.modules, "timm.data.readers.reader_wds", raising=False)
    with pytest.raises(UserError, match="wds/x.*webdataset"):
        Images(dataset="wds/x", num_classes=2, root="/").dataset("train")


def every_kind(folder):
    """Each image in another format, with something hidden and something else beside them."""
    for split, name in ((split, name) for split in ("train", "val") for name in ("cat", "dog", "owl")):
        files = sorted((folder / split / name).iterdir())
        for file, ending in zip(files, ("webp", "tif", "gif", "avif", "ppm", "jfif", "bmp", "jp2"), strict=False):
            Image.open(file).save(file.with_suffix(f".{ending}"))
            file.unlink()
    for place in (folder / "train", folder / "train" / "cat"):
        (place / ".ipynb_checkpoints").mkdir()
        shutil.copy(folder / "val" / "dog" / "0.webp", place / ".ipynb_checkpoints" / "x.png")
    (folder / "train" / "cat" / "._1.tif").write_bytes(b"of another system")
    (folder / "train" / "dog" / "phone.heic").write_bytes(b"")
    (folder / "train" / "loose.png").write_bytes(b"")
    return folder


def test_images_of_every_format_count_and_the_rest_is_named(folder, capsys):
    data = images(every_kind(folder))
    data.check(["train", "val"])
    assert [len(data.dataset(split)[0]) for split in ("train", "val")] == [24, 9]
    assert data.class_names == ["cat", "dog", "owl"]
    assert sum(len(batch[0]) for batch in images(folder, num_workers=1).val_dataloader()) == 9
    (line,) = capsys.readouterr().out.splitlines()
    assert "1 outside of the class folders (loose.png)" in line
    assert "3 hidden (.ipynb_checkpoints, cat/._1.tif, cat/.ipynb_checkpoints)" in line
    assert "1 without the ending of an image (dog/phone.heic)" in line


def test_only_the_endings_asked_for_count(folder):
    shutil.copy(folder / "val" / "cat" / "0.png", folder / "val" / "cat" / "1.jpg")
    assert len(images(folder, dataset_args={"input_key": ".png"}).dataset("val")[0]) == 9
    with pytest.raises(UserError, match="data.dataset_args has colour: an image folder takes input_key and"):
        images(folder, dataset_args={"colour": 1}).check(["train"])


@pytest.mark.parametrize("top", ["", "./"])
def test_tars_hold_images_of_every_format_and_nothing_hidden(folder, tmp_path, top):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        tar.add(every_kind(folder) / "train", top or "train")
    data = images(tmp_path / "x.tar", bad_images="skip")
    data.check(["train"])
    train, name = data.dataset("train")
    wanted = ["cat", "dog", "owl"]
    assert [name for name in data.class_names if name in wanted] == wanted
    assert ".ipynb_checkpoints" not in data.class_names
    assert sum(data.class_names[train.read(i)[1]] in wanted for i in range(len(train)) if "loose" not in name(i)) == 24


def test_torchvision_folders_hold_images_of_every_format(folder):
    shutil.rmtree(every_kind(folder) / "train" / ".ipynb_checkpoints")
    train = images(folder, dataset="torch/image_folder").dataset("train")[0]
    assert len(train) == 24 and train[3][0].shape == (3, 32, 32)


def turn(folder, split="val"):
    """A picture whose upright form is high and narrow, red on top, stored lying down."""
    exif, pixels = Image.Exif(), np.zeros((60, 40, 3), np.uint8)
    exif[0x0112], pixels[:30, :, 0] = 6, 255
    for name in ("cat", "dog", "owl"):
        shutil.rmtree(folder / split / name)
        (folder / split / name).mkdir()
        Image.fromarray(np.rot90(pixels).copy()).save(folder / split / name / "0.png", exif=exif)


def test_a_tar_of_all_splits_is_refused_and_a_tar_of_each_is_read(folder, tmp_path):
    for split in ("train", "val"):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as tar:
            tar.add(folder / split, split)
    with pytest.raises(UserError, match="train.tar is one file, so that validation .* train.tar and val.tar"):
        images(tmp_path / "train.tar").check(["train", "val"])
    images(tmp_path / "val.tar").check(["val"])  # a score of one split is no mistake
    data = images(tmp_path)
    data.check(["train", "val", "test"])
    assert [len(data.dataset(split)[0]) for split in ("train", "val", "test")] == [24, 9, 9]
    assert data.origin("test") == str(tmp_path / "val.tar")
    (tmp_path / "val.tar").unlink()
    with pytest.raises(UserError, match="no val.tar in .*, where the other splits are tars: add it"):
        images(tmp_path).check(["train", "val"])


@pytest.mark.parametrize("dataset", ["", "torch/image_folder", "tar"])
def test_every_reader_turns_images_upright(folder, tmp_path, dataset):
    turn(folder)
    if dataset == "tar":
        with tarfile.open(tmp_path / "x.tar", "w") as tar:
            tar.add(folder / "val", "val")
    root = tmp_path / "x.tar" if dataset == "tar" else folder
    data = images(root, dataset=dataset.replace("tar", ""), mean=[0, 0, 0], std=[1, 1, 1], crop_pct=1.0)
    pixels = data.dataset("val")[0][0][0]
    assert pixels[0, :14].mean() > 0.9 and pixels[0, 18:].mean() < 0.1


def test_streams_turn_images_upright_and_scale_deep_ones(monkeypatch):
    made = {}

    class Stream(torch.utils.data.IterableDataset):
        transform = None

        def __iter__(self):
            deep = Image.fromarray(np.full((40, 40), 32768, np.uint16))
            exif = deep.getexif()
            exif[0x0112] = 6
            return iter([(self.transform(deep), 0)])

        def set_epoch(self, epoch):
            pass

    monkeypatch.setattr("visionattn.train.data.images.create_dataset", lambda *_, **k: made.update(k) or Stream())
    data = Images(dataset="wds/x", num_classes=2, img_size=32, batch_size=4, num_workers=0, mean=[0] * 3, std=[1] * 3)
    pixels, _ = next(iter(data.dataset("val")[0]))
    assert made["input_img_mode"] == "" and pixels.shape == (3, 32, 32) and abs(pixels.mean() - 0.5) < 0.01
    with pytest.raises(UserError, match="an image in the stream cannot be used: .* integers from 70000 to 70000"):
        from_stream(Image.new("I", (4, 4), 70000))


@pytest.mark.timeout(60)
def test_a_pipe_among_the_images_is_refused_and_not_waited_for(folder):
    os.mkfifo(folder / "train" / "owl" / "pipe.png")
    with pytest.raises(UserError, match="unreadable images in train: .*owl/pipe.png. Remove.* a named pipe"):
        images(folder).check(["train"])


def test_a_class_folder_that_leads_to_itself_is_one_line(folder):
    (folder / "train" / "wolf").symlink_to("wolf")
    with pytest.raises(UserError, match="cannot follow .*wolf: Too many levels of symbolic links. Mend or remove it"):
        images(folder)


def test_torchvision_data_sets_are_read(folder):
    data = images(folder, dataset="torch/image_folder")
    assert data.class_names == ["cat", "dog", "owl"]
    assert next(iter(data.val_dataloader()))[0].shape == (4, 3, 32, 32)


def test_streams_are_read_and_told_the_epoch(monkeypatch):
    class Stream(torch.utils.data.IterableDataset):
        transform = epoch = None

        def __iter__(self):
            return ((self.transform(Image.new("RGB", (40, 40))), n % 2) for n in range(6))

        def __len__(self):
            return 6

        def set_epoch(self, epoch):
            self.epoch = epoch

    monkeypatch.setattr("visionattn.train.data.images.create_dataset", lambda *_, **__: Stream())
    loader = Images(dataset="wds/x", num_classes=2, img_size=32, batch_size=4, num_workers=0).val_dataloader()
    assert [batch[1].tolist() for batch in loader] == [[0, 1, 0, 1], [0, 1]]
    loader.dataset.set_epoch(3)
    assert loader.dataset.dataset.epoch == 3


def test_increasing_policies_work_with_every_pillow():
    before = dict(NAME_TO_OP)
    # Magnitude 10 asks for 0 bits, which Pillow 13 refuses.
    transform = train_transform(input_size=32, auto_augment="rand-m10-n8-inc1", interpolation="bicubic")
    assert dict(NAME_TO_OP) == before
    for seed in range(30):
        torch.manual_seed(seed)
        assert transform(Image.new("RGB", (40, 40), "red")).shape == (3, 32, 32)


def test_a_test_folder_is_tested_on_and_named(folder):
    data = images(folder)
    assert data.origin("test") == data.origin("val") == str(folder / "val")  # where there is no other
    shutil.copytree(folder / "train", folder / "test")
    data = images(folder)
    test, name = data.dataset("test")
    assert len(test) == 24 and name(0).startswith(str(folder / "test")) and data.origin("test") == str(folder / "test")
    assert len(data.dataset("val")[0]) == 9
    assert images(folder, test_split="val").origin("test") == str(folder / "val")
    data = images(folder, dataset="torch/image_folder")
    assert len(data.dataset("test")[0]) == 24 and data.origin("test") == "torch/image_folder, test"


def test_a_test_folder_without_classes_is_refused_with_the_way_out(folder):
    (folder / "test").mkdir()
    shutil.copy(folder / "val" / "cat" / "0.png", folder / "test")
    with pytest.raises(UserError, match="no class folders in .*test: .*--data.test_split name other folders"):
        images(folder).check(["test"])


@pytest.mark.parametrize("command, split", [("test", "test"), ("validate", "val")])
def test_scores_say_which_images_they_are_of(folder, tmp_path, capsys, command, split):
    shutil.copytree(folder / "train", folder / "test")
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), weights := tmp_path / "weights.pth")
    model = ["--model.name=test_resnet", f"--data.root={folder}", "--data.img_size=32", "--data.num_workers=0"]
    run([command, "--data=Images", *model, f"--model.weights={weights}", f"--out={tmp_path / 'out'}"])
    assert f"{split} scores are of {folder / split}\n" in capsys.readouterr().out


def test_generated_images_say_that_they_are_those_of_validation():
    assert Digits().origin("test") == "the validation images of Digits"


def test_a_single_class_is_refused(folder):
    for split in ("train", "val"):
        for name in ("dog", "owl"):
            shutil.rmtree(folder / split / name)
    with pytest.raises(UserError, match=r"has one class \(cat\): there is nothing to tell apart"):
        images(folder)
