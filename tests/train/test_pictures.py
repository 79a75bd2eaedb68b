"""The door through which images come, and which files of a folder are images."""

import os
import pickle
import socket
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from visionattn.errors import UserError
from visionattn.train.data import finder
from visionattn.train.data.finder import endings, find_images
from visionattn.train.data.pictures import UnreadableImage, open_classes, open_image

UPRIGHT = np.zeros((60, 40, 3), np.uint8)
UPRIGHT[:30, :, 0] = UPRIGHT[30:, :20, 2] = 255
STORED = {  # by EXIF's orientation
    1: UPRIGHT,
    2: UPRIGHT[:, ::-1],
    3: UPRIGHT[::-1, ::-1],
    4: UPRIGHT[::-1],
    5: UPRIGHT.transpose(1, 0, 2),
    6: np.rot90(UPRIGHT),
    7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),
    8: np.rot90(UPRIGHT, -1),
}


def noise(height=24, width=32):
    return np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)


def save_turned(file, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = dict(quality=95) if file.suffix == ".jpg" else dict(lossless=True) if file.suffix == ".webp" else {}
    Image.fromarray(np.ascontiguousarray(STORED[orientation])).save(file, exif=exif, **options)


@pytest.mark.parametrize(
    "ending, mode", [*(("png", mode) for mode in ("RGB", "L", "P", "RGBA", "1")), ("jpg", "RGB"), ("jpg", "CMYK")]
)
def test_ordinary_images_are_read_as_pillow_converts_them(tmp_path, ending, mode):
    file = tmp_path / f"x.{ending}"
    Image.fromarray(noise()).convert(mode).save(file)
    with Image.open(file) as image:
        assert open_image(file).tobytes() == image.convert("RGB").tobytes()
    with open(file, "rb") as opened:
        assert open_image(opened).mode == "RGB" and opened.closed


@pytest.mark.parametrize("ending", "png jpg jfif jpeg webp bmp tif gif avif ppm jp2 tga qoi ico".split())
def test_everything_that_pillow_opens_is_an_image(tmp_path, ending):
    Image.fromarray(noise()).save(tmp_path / f"x.{ending.upper()}")
    (file,) = find_images(tmp_path).images
    image = open_image(file)
    assert image.mode == "RGB" and image.size[1] >= 24 - 8 * (ending == "ico")


def test_what_pillow_cannot_open_or_hands_to_other_programs_is_no_image(tmp_path):
    assert not endings() & {".pdf", ".eps", ".ps", ".mpg", ".h5", ".wmf", ".txt", ".npy"}
    Image.fromarray(noise()).save(tmp_path / "x.eps")
    os.rename(tmp_path / "x.eps", tmp_path / "x.png")
    with pytest.raises(UnreadableImage, match="x.png .no image that Pillow reads"):
        open_image(tmp_path / "x.png")


@pytest.mark.parametrize("ending", ["gif", "png", "webp", "tif"])
def test_the_first_of_several_frames_is_read(tmp_path, ending):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    options = dict(lossless=True) if ending == "webp" else {}
    frames[0].save(tmp_path / f"x.{ending}", save_all=True, append_images=frames[1:], **options)
    assert open_image(tmp_path / f"x.{ending}").getpixel((4, 4)) == (255, 0, 0)


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("ending", ["jpg", "png", "webp", "tif"])
def test_images_come_upright(tmp_path, ending, orientation):
    file = tmp_path / f"x.{ending}"
    save_turned(file, orientation)
    tolerance = 60 if ending == "jpg" else 0  # of the edges in a compressed picture
    pixels = np.asarray(open_image(file), np.int16)
    assert pixels.shape == UPRIGHT.shape and np.abs(pixels - UPRIGHT).max(-1).mean() <= tolerance / 10
    with open(file, "rb") as opened:
        assert np.array_equal(np.asarray(open_image(opened)), pixels)


def test_damaged_exif_does_not_cost_the_image(tmp_path):
    Image.fromarray(noise()).save(tmp_path / "x.png")
    content = (tmp_path / "x.png").read_bytes()
    chunk = b"eXIfMM\0*\0\0\0\x08\xff\xff\x01\x12"
    chunk = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    (tmp_path / "x.png").write_bytes(content[:33] + chunk + content[33:])
    assert np.array_equal(np.asarray(open_image(tmp_path / "x.png")), noise())


RAMP = np.linspace(0, 1, 256)[None].repeat(4, 0)


@pytest.mark.parametrize(
    "name, pixels",
    [
        ("x.png", (RAMP * 65535).astype(np.uint16)),
        ("x.tif", (RAMP * 65535).astype(np.uint16)),
        ("x.jp2", (RAMP * 65535).astype(np.uint16)),
        ("x.tif", RAMP.astype(np.float32)),
        ("y.tif", (RAMP * 255).astype(np.float32)),
        ("x.pfm", RAMP.astype(np.float32)),
        ("y.tif", (RAMP * 255).astype(np.int32)),
    ],
)
def test_deep_pixels_are_scaled_by_their_range(tmp_path, name, pixels):
    Image.fromarray(pixels).save(tmp_path / name)
    grey = np.asarray(open_image(tmp_path / name), np.float64)
    assert np.abs(grey - 255 * RAMP[..., None]).max() <= 1
    assert np.array_equal(np.asarray(open_image(tmp_path / name, "L")), grey[..., 0])


@pytest.mark.parametrize("white", [1023, 65535])
def test_the_white_of_a_deep_pgm_is_what_it_says(tmp_path, white):
    values = (RAMP * white).round().astype(">u2")
    (tmp_path / "x.pgm").write_bytes(b"P5 256 4 %d\n" % white + values.tobytes())
    assert np.abs(np.asarray(open_image(tmp_path / "x.pgm"), np.float64) - 255 * RAMP[..., None]).max() <= 1


@pytest.mark.parametrize(
    "pixels, message",
    [
        (RAMP.astype(np.float32) * 900, "which of its floats from 0 to 900 is white: save it with 8 or 16 bits"),
        (RAMP.astype(np.float32) - 0.5, "floats from -0.5 to 0.5"),
        (np.full((4, 4), np.nan, np.float32), "floats from nan to nan"),
        ((RAMP * 70000).astype(np.int32), "integers from 0 to 70000"),
        ((RAMP * 255).astype(np.uint16), "its 16-bit pixels reach 255 of 65535 only: save bytes with 8 bits"),
    ],
)
def test_pixels_without_a_known_white_are_refused(tmp_path, pixels, message):
    Image.fromarray(pixels).save(tmp_path / "x.tif")
    with pytest.raises(UnreadableImage, match=rf"x.tif .*{message}"):
        open_image(tmp_path / "x.tif")


def make_pipe(file):
    os.mkfifo(file)


def make_socket(file):
    here = os.getcwd()
    os.chdir(file.parent)  # the names of sockets are short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(file.name)
    os.chdir(here)


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "make, message",
    [
        (make_pipe, "a named pipe, not a regular file"),
        (make_socket, "a socket, not a regular file"),
        (lambda file: file.mkdir(), "a folder, not a regular file"),
        (lambda file: file.symlink_to("/dev/null"), "a device, not a regular file"),
        (lambda file: file.symlink_to(file), "Too many levels of symbolic links"),
        (lambda file: file.symlink_to("nowhere"), "No such file"),
        (lambda file: file.write_bytes(b""), "no image that Pillow reads"),
        (lambda file: file.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50)), ""),
    ],
)
@pytest.mark.parametrize("read", [open_image, open_classes])
def test_what_is_no_image_is_refused_by_name_without_waiting(tmp_path, make, message, read):
    make(tmp_path / "x.png")
    with pytest.raises(UnreadableImage, match=rf"x.png .*{message}") as caught:
        read(tmp_path / "x.png")
    assert "\n" not in str(caught.value) and str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_class_maps_stored_with_losses_are_refused(tmp_path):
    Image.fromarray(noise()).convert("L").save(tmp_path / "x.jpg")
    with pytest.raises(UserError, match="x.jpg is JPEG, which changes the values of a class map"):
        open_classes(tmp_path / "x.jpg")


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise()).save(folder / name, format="PNG")


def test_what_is_left_out_is_counted_and_named(tmp_path, capsys):
    fill(tmp_path, "a.png", "b/c.webp", ".d.png", ".cache/e.png", "b/.ipynb_checkpoints/f.png", "__MACOSX/g.png")
    for name in ("h.heic", "notes.txt", ".DS_Store"):
        (tmp_path / name).write_bytes(b"")
    found = find_images(tmp_path)
    assert found.images == [str(tmp_path / "a.png"), str(tmp_path / "b" / "c.webp")]
    found.warn(tmp_path)
    line = capsys.readouterr().out
    assert "4 hidden (.cache, .d.png, __MACOSX and 1 more)" in line
    assert "2 without the ending of an image (h.heic, notes.txt)" in line and "DS_Store" not in line
    find_images(tmp_path / "b" / ".ipynb_checkpoints").warn(tmp_path)  # whose name was given
    assert not capsys.readouterr().out


def test_folders_behind_links_are_looked_into(tmp_path):
    fill(tmp_path, "there/a.png")
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "link").symlink_to(tmp_path / "there")
    assert find_images(tmp_path / "here").images == [str(tmp_path / "here" / "link" / "a.png")]


@pytest.mark.parametrize(
    "target, message",
    [("..", "link is a link back to .*: remove the link"), ("link", "cannot follow .*link: Too many")],
)
def test_links_in_a_circle_are_one_line(tmp_path, target, message):
    fill(tmp_path, "a/b.png")
    (tmp_path / "a" / "link").symlink_to(target)
    with pytest.raises(UserError, match=message):
        find_images(tmp_path)


def test_a_folder_that_cannot_be_listed_is_one_line(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(finder.os, "scandir", refuse)
    with pytest.raises(UserError, match="cannot list the folder .*: Permission denied. Make it readable, or remove it"):
        find_images(tmp_path)
