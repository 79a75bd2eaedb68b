"""Segmentation data sets in files: their layouts, their joint transforms, and what is wrong with them."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors

from tests.train.dense_data import MASKS, folders, save
from visionattn.errors import UserError
from visionattn.train.cli import run
from visionattn.train.data import Masks
from visionattn.train.data.joint import IGNORE, RandomScaleCrop, eval_image, eval_size
from visionattn.train.data.layouts import voc_palette


def masks(root, **arguments):
    return Masks(root=str(root), **({"img_size": 32, "batch_size": 2, "num_workers": 0} | arguments))


@pytest.mark.parametrize("layout, classes", [("folders", 11), ("ade20k", 150), ("cityscapes", 19), ("voc", 21)])
def test_every_layout_is_read(tmp_path, layout, classes):
    data = masks(MASKS[layout](tmp_path), layout=layout)
    data.check(["train", "val"])
    assert data.num_classes == len(data.class_names) == len(data.palette) == classes
    batch = next(iter(data.train_dataloader()))
    assert batch.images.shape == (2, 3, 32, 32) and batch.targets.shape == (2, 32, 32)
    image, target = data.dataset("val")[0][0]
    assert image.shape == (3, 32, 32) and target.shape == (64, 64)  # class maps keep their size
    values = set(target.unique().tolist())
    assert values <= {*range(classes), IGNORE} and len(values) > 1
    assert data.image_names(batch.indices, True)[0].startswith(str(tmp_path))


def test_values_become_the_classes_of_the_layout(tmp_path):
    ade = masks(MASKS["ade20k"](tmp_path / "a"), layout="ade20k").dataset("val")[0]
    values = np.array(Image.open(ade.pairs[0][1]))
    target = ade[0][1].numpy()
    assert (target[values == 0] == IGNORE).all() and (target[values == 13] == 12).all()
    city = masks(MASKS["cityscapes"](tmp_path / "c"), layout="cityscapes").dataset("val")[0]
    values, target = np.array(Image.open(city.pairs[0][1])), city[0][1].numpy()
    assert (target[values == 1] == IGNORE).all()
    assert all((target[values == i] == n).all() for n, i in enumerate((7, 8, 11, 12, 13, 17)))


def test_class_names_come_with_ade20k(tmp_path):
    root = MASKS["ade20k"](tmp_path)
    rows = ["Idx\tRatio\tTrain\tVal\tStuff\tName"] + [f"{n}\t0.1\t1\t1\t0\tthing{n}, other" for n in range(1, 151)]
    (root / "objectInfo150.txt").write_text("\n".join(rows))
    assert masks(root, layout="ade20k").class_names[:2] == ["thing1", "thing2"]


def test_colours_are_those_of_voc():
    assert voc_palette(4) == [(0, 0, 0), (128, 0, 0), (0, 128, 0), (128, 128, 0)]
    assert len(set(voc_palette(150))) == 150


def crop(image, classes, **arguments):
    settings = dict(size=32, short_side=64, scale=(0.5, 2.0), most=1.0) | arguments
    return RandomScaleCrop(**settings)(tv_tensors.Image(image), tv_tensors.Mask(classes))


@pytest.mark.parametrize("size", [(64, 64), (50, 90), (200, 40), (9, 300)])
@pytest.mark.parametrize("seed", range(4))
def test_image_and_class_map_are_cropped_together(size, seed):
    torch.manual_seed(seed)
    classes = (torch.arange(size[0])[:, None] // 16 + torch.arange(size[1]) // 16) % 2
    image = (classes * 200).expand(3, -1, -1)
    image, classes = crop(image.to(torch.uint8), classes.to(torch.uint8))
    assert image.shape == (3, 32, 32) and classes.shape == (32, 32)
    inside = classes != IGNORE
    agree = ((image[0] > 100) == (classes == 1))[inside].float().mean()
    assert agree > 0.8  # but for the smoothing at borders
    assert (image[:, ~inside] == 124).all()


def test_a_crop_at_scale_one_is_a_part_of_the_image():
    image = torch.randint(0, 255, (3, 64, 80), dtype=torch.uint8)
    part, _ = crop(image, image[0] % 3, scale=(1.0, 1.0))
    windows = image.unfold(1, 32, 1).unfold(2, 32, 1)
    assert ((windows - part[:, None, None]).flatten(3).abs().sum((0, 3)) == 0).any()


def test_crops_of_one_class_are_drawn_again():
    classes = torch.zeros(256, 256, dtype=torch.uint8)
    classes[:, 200:] = 1
    image = torch.zeros(3, 256, 256, dtype=torch.uint8)
    counts = {}
    for most in (0.75, 1.0):
        torch.manual_seed(0)
        counts[most] = sum(
            len(crop(image, classes, short_side=256, scale=(1.0, 1.0), size=64, most=most)[1].unique()) > 1
            for _ in range(40)
        )
    assert counts[0.75] > counts[1.0] + 5


def test_images_are_evaluated_at_their_short_side_within_limits():
    assert eval_size(100, 200, 50, 1000) == [50, 100]
    assert eval_size(100, 400, 50, 100) == [25, 100]
    assert eval_image(torch.zeros(3, 60, 90, dtype=torch.uint8), 40, 999).shape == (3, 40, 60)


def wrong_value(root):
    save(root / "masks" / "train" / "1.png", np.full((64, 64), 77, np.uint8))


def wrong_size(root):
    save(root / "masks" / "val" / "0.png", np.zeros((64, 60), np.uint8))


def colours(root):
    save(root / "masks" / "val" / "0.png", np.zeros((64, 64, 3), np.uint8))


def missing_mask(root):
    (root / "masks" / "train" / "2.png").unlink()


def no_masks(root):
    shutil.rmtree(root / "masks" / "val")


def no_images(root):
    shutil.rmtree(root / "images" / "train")
    (root / "images" / "train").mkdir()


@pytest.mark.parametrize(
    "damage, message",
    [
        (wrong_value, r"train/1.png has values that are no class: 77. The classes are 0-10, 255"),
        (wrong_size, r"val/0.jpg is 64 x 64, its class map .*val/0.png 60 x 64 pixels"),
        (colours, r"val/0.png is RGB, not a class map"),
        (missing_mask, r"1 of 4 images have no class map: .*train/2.png"),
        (no_masks, r"no folder .*masks/val"),
        (no_images, r"no images in .*images/train"),
        (lambda root: (root / "classes.txt").unlink(), r"the classes have no names: give --data.classes"),
        (shutil.rmtree, r"no such data folder"),
    ],
)
def test_damaged_data_is_refused_before_work_starts(tmp_path, damage, message):
    root = folders(tmp_path / "data")
    damage(root)
    with pytest.raises(UserError, match=message):
        masks(root).check(["train", "val"])


def test_further_values_can_be_ignored(tmp_path):
    root = folders(tmp_path)
    wrong_value(root)
    data = masks(root, ignored=[255, 77])
    data.check(["train"])
    assert (data.dataset("train")[0].read(1)[1] == IGNORE).all()


def test_unreadable_images_are_replaced_in_training_and_left_out_in_validation(tmp_path, capfd):
    root = folders(tmp_path)
    for split in ("train", "val"):
        (root / "images" / split / "1.jpg").write_bytes(b"no image")
    data = masks(root, batch_size=4, eval_batch_size=2)
    data.check(["train", "val"])
    assert "1 unreadable images or class maps are skipped" in capfd.readouterr().out
    batch = next(iter(data.train_dataloader()))
    assert batch.unreadable.sum() == 1 and (batch.indices >= 0).all()
    batch = next(iter(data.val_dataloader()))
    assert batch.indices.tolist() == [0, -1] and (batch.targets[1] == IGNORE).all()
    assert "1.jpg" in capfd.readouterr().err


def as_format(file, ending, **options):
    Image.open(file).save(file.with_suffix(f".{ending}"), **options)
    file.unlink()


def test_images_and_class_maps_of_every_format_count(tmp_path, capsys):
    root = folders(tmp_path)
    before = masks(root).dataset("train")[0].read(1)[1]
    for n, ending in enumerate(("webp", "tif", "avif")):
        as_format(root / "images" / "train" / f"{n}.jpg", ending)
    as_format(root / "masks" / "train" / "1.png", "bmp")
    (root / "images" / "train" / ".ipynb_checkpoints").mkdir()
    (root / "images" / "train" / "raw.cr2").write_bytes(b"")
    data = masks(root)
    data.check(["train"])
    train, name = data.dataset("train")
    assert [name(i).rsplit("/")[-1] for i in range(4)] == ["0.webp", "1.tif", "2.avif", "3.jpg"]
    assert torch.equal(train.read(1)[1], before)
    line = capsys.readouterr().out
    assert "(images/train/raw.cr2)" in line and "1 hidden (images/train/.ipynb_checkpoints)" in line


def test_lists_without_endings_find_images_of_every_format(tmp_path):
    root = MASKS["voc"](tmp_path)
    as_format(root / "JPEGImages" / "2007_train1.jpg", "webp")
    assert masks(root, layout="voc").dataset("train")[1](1).endswith("2007_train1.webp")


def turned(file, orientation=6):
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.open(file).convert("RGB").rotate(90, expand=True).save(file, exif=exif, quality=95)


def test_images_are_turned_upright_onto_their_class_maps(tmp_path):
    root = folders(tmp_path)
    plain = masks(root).dataset("val")[0].read(0)[0]
    turned(root / "images" / "val" / "0.jpg")
    upright = masks(root).dataset("val")[0].read(0)[0]
    assert (plain.float() - upright.float()).abs().mean() < 8  # but for the second compression
    save(root / "masks" / "val" / "0.png", np.zeros((64, 40), np.uint8))
    save(root / "images" / "val" / "0.jpg", np.zeros((64, 40, 3), np.uint8))
    turned(root / "images" / "val" / "0.jpg")
    masks(root).check(["val"])
    save(root / "masks" / "val" / "0.png", np.zeros((40, 64), np.uint8))
    message = (
        r"0.jpg is 40 x 64, .* 64 x 40 pixels: .* stored as 64 x 40 and turned upright by its EXIF .*upright picture"
    )
    with pytest.raises(UserError, match=message):
        masks(root).check(["val"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(img_size=0), "data.img_size is 0"),
        (dict(scale=(2.0, 0.5)), "data.scale is"),
        (dict(classes=["one"]), "data.classes has 1 classes"),
        (dict(layout="voc", classes=["a", "b"]), "no folder .*JPEGImages"),
    ],
)
def test_impossible_settings_are_refused(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        masks(folders(tmp_path), **arguments).check(["train"])


def test_a_mistake_found_while_loading_in_another_process_is_one_line(tmp_path, tiny):
    root = folders(tmp_path / "data")
    wrong_size(root)
    flags = [f"--data.root={root}", "--data.num_workers=1", "--data.check_images=0", "--data.img_size=32"]
    head = ["--model=Segmentation", "--model.head=mlp", "--model.head_args={width: 16}", f"--out={tmp_path / 'run'}"]
    with pytest.raises(UserError, match=r"^\S*val/0.jpg is 64 x 64, .* pixels: they must be the same\. Saved"):
        run(["fit", "--data=Masks", *flags, *tiny, *head, "--trainer.max_epochs=1"])


def test_a_test_folder_is_tested_on_and_named(tmp_path):
    root = folders(tmp_path)
    assert masks(root).origin("test") == str(root / "images" / "val")  # where there is no other
    for kind in ("images", "masks"):
        shutil.copytree(root / kind / "train", root / kind / "test")
    for arguments in ({}, {"val_split": "train"}):
        data = masks(root, **arguments)
        assert data.origin("test") == str(root / "images" / "test") and len(data.dataset("test")[0]) == 4
    assert masks(root, test_split="val").origin("test") == str(root / "images" / "val")


@pytest.mark.parametrize("layout", ["ade20k", "cityscapes", "voc"])
def test_layouts_without_public_test_maps_are_tested_on_validation(tmp_path, layout):
    data = masks(MASKS[layout](tmp_path), layout=layout)
    assert data.origin("test") == data.origin("val") and len(data.dataset("test")[0]) == 2


def rewrite(root, change, split="train"):
    for file in sorted((root / "masks" / split).iterdir()):
        save(file, change(np.array(Image.open(file))))


def test_foreground_of_the_value_that_is_ignored_is_refused_with_the_remedy(tmp_path, capsys):
    root = folders(tmp_path, train=6)
    (root / "classes.txt").write_text("background\nthing")
    for split in ("train", "val"):
        rewrite(root, lambda values: np.where(values, 255, 0).astype(np.uint8), split)
    data = masks(root, check_images=2)
    message = "images/train: the class maps have only the class 'background' and what is ignored .the values 255."
    with pytest.raises(UserError, match=message):
        data.check(["train"])
    data.check(["val"])
    assert "warning" in (line := capsys.readouterr().out) and "--data.values [0,255]" in line
    data = masks(root, values=[0, 255])
    data.check(["train", "val"])
    assert set(data.dataset("train")[0].classes(0).unique().tolist()) == {0, 1} and not capsys.readouterr().out


def test_a_rare_class_is_found_before_maps_of_one_class_are_refused(tmp_path):
    root = folders(tmp_path, train=6)
    maps = iter([0, 0, 0, 0, 0, 1])
    rewrite(root, lambda values: np.full_like(values, next(maps)))
    masks(root, check_images=2).check(["train"])
    rewrite(root, np.zeros_like)
    with pytest.raises(UserError, match="only the class 'photograph': there is nothing to tell apart"):
        masks(root).check(["train"])
    rewrite(root, lambda values: np.full_like(values, 255))
    with pytest.raises(UserError, match="the class maps have no class and what is ignored"):
        masks(root).check(["train"])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (dict(values=[0, 255]), "data.classes has 11 names, but values are given for 2 classes"),
        (dict(classes=["a", "b"], values=[1, 1]), r"data.values is \[1, 1\].*no two classes the same"),
        (dict(classes=["a", "b"], values=[0, 256]), r"data.values is \[0, 256\].*from 0 to 255"),
        (dict(ignored=[-1]), r"data.ignored \[-1\]: from 0 to 255"),
        (dict(classes=["a", "b", "a"]), "data.classes names classes twice: a"),
    ],
)
def test_values_and_names_are_checked(tmp_path, arguments, message):
    with pytest.raises(UserError, match=message):
        masks(folders(tmp_path), **arguments)


def test_class_names_are_utf_8_without_a_byte_order_mark(tmp_path):
    file = folders(tmp_path) / "classes.txt"
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert masks(tmp_path).class_names[0] == "photograph"
    file.write_bytes("Häuser\nStraße".encode("latin-1"))
    with pytest.raises(UserError, match="classes.txt is not UTF-8 text: save it as such"):
        masks(tmp_path)
