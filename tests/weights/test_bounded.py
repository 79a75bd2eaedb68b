"""Files that ask for more than they hold, or are damaged: refused with a line, in little time, and nothing is left."""

import os
import random
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from visionattn.train.data.pictures import UnreadableImage, open_image
from visionattn.weights import WeightsError
from visionattn.weights.card import CARD
from visionattn.weights.commands.cli import main
from visionattn.weights.commands.publish import push
from visionattn.weights.commands.translate import add
from visionattn.weights.download import fetch
from visionattn.weights.export import write_weights
from visionattn.weights.locate import added_file
from visionattn.weights.read import read_checkpoint
from visionattn.weights.seen import check_seen, note_seen

SAID = dict(name="van_nano", model_args={}, num_classes=10, class_names=["a"], preprocess=dict(input_size=[3, 32, 32]))


def entries(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
        archive.filelist += archive.filelist * 300_000


def tensors(path):
    torch.save({f"a{number}": value for number, value in enumerate(torch.zeros(200_000).split(1))}, path)


def header(path):
    text = b'{"' + b"x" * 20_000_000 + b'": 1}'
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def expanded(path):
    torch.save({"a": torch.zeros(1).expand(2**40)}, path)


def sparse(path):
    torch.save({"a": torch.zeros(3, 3).to_sparse()}, path)


def nested(path):
    torch.save({"a": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)])}, path)


def twice(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}q\x00.")
        archive.writestr("b/data.pkl", b"\x80\x02}q\x00.")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", [entries, tensors, header, expanded, sparse, nested, twice], ids=lambda f: f.__name__)
def test_what_claims_more_than_it_holds_is_refused_soon(make, tmp_path):
    make(tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="claims|without the bytes|special kind|same name"):
        read_checkpoint(tmp_path / "w.pth")


def test_small_tensors_may_repeat_what_is_in_the_file(tmp_path):
    torch.save({"a": torch.arange(3).expand(4, 3)}, tmp_path / "w.pth")
    assert read_checkpoint(tmp_path / "w.pth")["a"].shape == (4, 3)


@pytest.mark.timeout(30)
def test_pipes_are_refused_before_they_are_opened(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    os.mkfifo(tmp_path / "w.ckpt")
    with pytest.raises(WeightsError, match="there is no file"):
        read_checkpoint(tmp_path / "w.ckpt")
    with pytest.raises(UnreadableImage, match="regular file"):
        open_image(tmp_path / "x.png")


# --- damage ----------------------------------------------------------------------------------------------------------


def checkpoint(path, **change):
    state = timm.create_model("van_nano", num_classes=10).state_dict()
    state = {f"net.{key}": value for key, value in (state | change).items()}
    torch.save({"state_dict": state, CARD: SAID, "hyper_parameters": dict(name="van_nano")}, path)
    return path


@pytest.mark.parametrize("bits", [1, 64])
@pytest.mark.parametrize("seed", range(5))
def test_flipped_bits_in_a_checkpoint_are_noticed(tmp_path, bits, seed):
    content, chance = bytearray(checkpoint(tmp_path / "w.ckpt").read_bytes()), random.Random(seed)
    for _ in range(bits):  # the weights lie in the middle
        content[chance.randrange(len(content) // 4, 3 * len(content) // 4)] ^= 1 << chance.randrange(8)
    (tmp_path / "w.ckpt").write_bytes(content)
    with pytest.raises(WeightsError, match="has not the checksum|damaged"):
        read_checkpoint(tmp_path / "w.ckpt")


def test_files_that_were_written_without_checksums_are_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        checkpoint(tmp_path / "w.ckpt")
    finally:
        torch.serialization.set_crc32_options(True)
    assert read_checkpoint(tmp_path / "w.ckpt")[CARD] == SAID


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: w.fill_(float("nan")), r"head.fc.weight has values that are NaN or infinite"),
        (lambda w: w.double().index_fill(0, torch.tensor([1]), float("inf")), "NaN or infinite"),
        (lambda w: w.to(torch.int8), "head.fc.weight has numbers of type int8"),
    ],
    ids=["nan", "inf", "integers"],
)
def test_weights_that_cannot_be_computed_with_are_named(tmp_path, change, reason):
    state = timm.create_model("van_nano", num_classes=10).state_dict()
    save_file(state | {"head.fc.weight": change(state["head.fc.weight"].clone())}, tmp_path / "w.safetensors")
    with pytest.raises(WeightsError, match=reason + ".*Nothing was written"):
        add("van_nano.mine", tmp_path / "w.safetensors")
    assert not added_file("van_nano.mine").parent.exists()


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_written_weights_have_the_rights_that_the_umask_leaves(tmp_path, umask):
    old = os.umask(umask)
    try:
        write_weights({"a": torch.zeros(1)}, tmp_path / "w.safetensors", SAID)
        folder = push(str(checkpoint(tmp_path / "w.ckpt")), str(tmp_path / "pushed"))
    finally:
        os.umask(old)
    for file in (tmp_path / "w.safetensors", *folder.iterdir()):
        assert stat.S_IMODE(file.stat().st_mode) == 0o666 & ~umask, file.name


def test_a_push_that_fails_leaves_nothing(tmp_path, monkeypatch):
    path = checkpoint(tmp_path / "w.ckpt")

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("visionattn.weights.commands.publish.save_for_hf", full)
        with pytest.raises(WeightsError, match="cannot write .*No space left"):
            push(str(path), str(tmp_path / "pushed"))
    other = timm.create_model("van_nano", num_classes=10).state_dict() | {"head.fc.weight": torch.zeros(9, 9)}
    for change in (dict(extra=torch.zeros(1)), {"head.fc.weight": other["head.fc.weight"]}):
        with pytest.raises(WeightsError, match="does not hold the van_nano that it describes"):
            push(str(checkpoint(path, **change)), str(tmp_path / "pushed"))
    assert [file.name for file in tmp_path.iterdir()] == ["w.ckpt"]


def test_an_export_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("visionattn.weights.export.save_file", full)
    with pytest.raises(WeightsError, match="cannot write .*No space left"):
        write_weights({"a": torch.zeros(1)}, tmp_path / "w.safetensors", SAID)
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    """With a limit on the size of files, which the system itself enforces."""
    code = """
import pathlib, resource, signal, sys, torch
from visionattn.weights.download import fetch
from visionattn.weights.export import write_weights
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_weights({"a": torch.zeros(10_000)}, pathlib.Path(sys.argv[1]) / "w.safetensors", {})
except Exception as error:
    print(type(error).__name__, error)
"""
    result = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True)
    assert result.stdout.startswith("WeightsError cannot write ") and result.stdout.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_what_a_killed_writer_left_is_removed_when_it_is_old(tmp_path):
    old, new, other = (tmp_path / f".{name}.part" for name in ("w.safetensors.1", "w.safetensors.2", "x.safetensors.1"))
    for part in (old, new, other):
        part.write_bytes(b"half")
    for part in (old, other):
        os.utime(part, (0, 0))
    write_weights({"a": torch.zeros(1)}, tmp_path / "w.safetensors", SAID)
    assert sorted(tmp_path.iterdir()) == sorted([new, other, tmp_path / "w.safetensors"])


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(WeightsError, match="cannot write .*choose another"):
        write_weights({"a": torch.zeros(1)}, tmp_path / "file" / "w.safetensors", SAID)
    with pytest.raises(SystemExit, match="error: cannot write .*choose another"):
        main(["weights", "table", "--out", str(tmp_path / "file" / "x.md")])


def test_half_a_note_of_a_download_is_not_kept(tmp_path, monkeypatch):
    def full(path, text, **kwargs):
        path.write_bytes(text[:5].encode())
        raise OSError(28, "No space left on device")

    (tmp_path / "w.pth").write_bytes(b"x")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_text", full)
        note_seen(tmp_path / "w.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]
    note_seen(tmp_path / "w.pth")
    (tmp_path / "w.pth").write_bytes(b"yy")
    with pytest.raises(WeightsError, match="instead of the 1 B it had"):
        check_seen(tmp_path / "w.pth")


def test_a_download_of_no_version_that_fills_the_disk_leaves_nothing(site, cache, monkeypatch):
    site.files["/w.pth"], site.etag = bytes(10_000), None
    monkeypatch.setattr("visionattn.weights.download.CHUNK", 1000)
    done = []

    def full(*args):
        done.append(args)
        if len(done) > 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("visionattn.weights.download.tqdm.update", full)
    with pytest.raises(WeightsError, match="free some space and repeat"):
        fetch(f"{site.url}/w.pth", cache / "w.pth")
    assert [path.name for path in cache.iterdir() if not path.name.endswith(".lock")] == []


def test_verifying_nothing_is_an_error():
    with pytest.raises(SystemExit, match="error: nothing to verify: no file on this machine is like van_b"):
        main(["weights", "verify", "van_b*"])
