import argparse
import enum
import io
import os
import pathlib
import pickle
import struct
import subprocess
import sys
import types
import warnings
import zipfile

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from visionattn.weights import WeightsError
from visionattn.weights.numbers import numpy_globals
from visionattn.weights.read import read_bare_weights, read_checkpoint, read_weights

WEIGHTS = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.ones(2)}


class Node(dict):
    """As yacs has it: a dictionary with attributes."""

    def __init__(self, **items):
        super().__init__(items)
        self.__dict__["_immutable"] = True


class Kind(enum.Enum):
    LINEAR = 1


class Meter:
    """An object that pickles a tuple as its state."""

    def __init__(self):
        self.values = np.arange(4.0)

    def __getstate__(self):
        return (1, self.values, {"x": 2})

    def __setstate__(self, state):
        raise AssertionError("ran")


class Harmful:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def settings():
    return {
        "args": argparse.Namespace(lr=0.1, nested=argparse.Namespace(x=[1, 2]), out=pathlib.PurePosixPath("a/b")),
        "config": Node(MODEL=Node(NAME="x", DEPTHS=[1, 2]), LR=0.1),
        "best": np.float64(82.5),
        "epoch": np.int64(3),
        "curve": np.arange(5.0),
        "names": np.array(["a", "b"]),
    }


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("extra", [{}, settings(), {"meter": Meter()}], ids=["plain", "settings", "meter"])
def test_weights_come_out_of_checkpoints_with_settings(tmp_path, extra, legacy):
    torch.save({"model": WEIGHTS, **extra}, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    state = read_weights(tmp_path / "w.pth")
    assert state.keys() == WEIGHTS.keys()
    assert all(torch.equal(state[key], value) for key, value in WEIGHTS.items())


def test_settings_are_dictionaries_and_numbers(tmp_path):
    torch.save({"model": WEIGHTS, **settings()}, tmp_path / "w.pth")
    content = read_checkpoint(tmp_path / "w.pth")
    assert content["best"] == 82.5 and content["epoch"] == 3 and content["curve"].tolist() == [0, 1, 2, 3, 4]
    assert type(content["config"]).__mro__[1] is dict and content["config"]["MODEL"]["DEPTHS"] == [1, 2]
    assert vars(content["args"])["lr"] == 0.1


def test_classes_that_are_not_installed_do_not_matter(tmp_path):
    module = types.ModuleType("yacs_of_the_authors")
    exec("class CfgNode(dict): pass", module.__dict__)
    sys.modules[module.__name__] = module
    try:
        torch.save({"model": WEIGHTS, "config": module.CfgNode(x=1)}, tmp_path / "w.pth")
    finally:
        del sys.modules[module.__name__]
    assert read_weights(tmp_path / "w.pth").keys() == WEIGHTS.keys()


@pytest.mark.parametrize("name", ["state_dict", "model", "state_dict_ema", "model_ema", None])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.module."])
def test_nests_and_prefixes_are_removed(tmp_path, name, prefix):
    state = {prefix + key: value for key, value in WEIGHTS.items()}
    torch.save({name: state, "epoch": 1} if name else state, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth").keys() == WEIGHTS.keys()


def test_averaged_weights_go_before_the_raw_ones(tmp_path):
    torch.save({"model": {"a": torch.zeros(1)}, "model_ema": {"a": torch.ones(1)}}, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth")["a"] == 1


def test_safetensors(tmp_path):
    save_file(WEIGHTS, tmp_path / "w.pth")  # by its content, not by its name
    assert torch.equal(read_weights(tmp_path / "w.pth")["a.weight"], WEIGHTS["a.weight"])


@pytest.mark.parametrize("prefix", ["", "net.", "net._orig_mod."])
def test_bare_weights_are_those_of_the_network_in_a_run(tmp_path, prefix):
    state = {prefix + key: value for key, value in WEIGHTS.items()}
    rest = {"metrics.acc1.total": torch.zeros(1)} if prefix else {}
    torch.save({"state_dict": state | rest}, tmp_path / "w.ckpt")
    assert read_bare_weights(str(tmp_path / "w.ckpt")).keys() == WEIGHTS.keys()


# --- files made to do harm -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "call",
    [
        (os.system, "touch {mark}"),
        (subprocess.getoutput, "touch {mark}"),
        (eval, "open('{mark}', 'w')"),
        (exec, "open('{mark}', 'w')"),
        (open, "{mark}", "w"),
        (pickle.loads, b"cos\nsystem\n(S'touch mark'\ntR."),
    ],
    ids=lambda call: call[0].__name__,
)
def test_harmful_calls_are_refused_and_not_made(tmp_path, call, legacy):
    mark = tmp_path / "mark"
    args = [a.replace("{mark}", str(mark)) if isinstance(a, str) else a for a in call[1:]]
    content = {"model": WEIGHTS, "args": Harmful(call[0], *args)}
    torch.save(content, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(WeightsError, match=rf"it would call \w+.{call[0].__name__}\): do not use it"):
        read_checkpoint(tmp_path / "w.pth")
    assert not mark.exists()


def test_unknown_functions_are_not_called(tmp_path, capsys):
    torch.save({"model": WEIGHTS, "args": Harmful(print, "ran"), "more": Kind.LINEAR}, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth").keys() == WEIGHTS.keys()
    assert capsys.readouterr().out == ""


def test_weights_that_a_function_would_make_are_not_made(tmp_path, capsys):
    torch.save({"state_dict": Harmful(print, "ran")}, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="holds no weights"):
        read_weights(tmp_path / "w.pth")
    assert capsys.readouterr().out == ""


def test_object_arrays_of_numpy_are_not_read(tmp_path):
    torch.save({"model": WEIGHTS, "x": np.array([Harmful(print, "ran")], dtype=object)}, tmp_path / "w.pth")
    try:
        content = read_checkpoint(tmp_path / "w.pth")
    except WeightsError:
        return
    assert not isinstance(content["x"], np.ndarray)


def test_a_whole_pickled_network_is_refused(tmp_path):
    torch.save(torch.nn.Linear(2, 2), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"save (its state_dict|plain tensors)|it must be a state_dict\(\)"):
        read_weights(tmp_path / "w.pth")


def test_a_program_is_refused(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(tmp_path / "w.pth"))
    with pytest.raises(WeightsError, match="TorchScript program, which is code"):
        read_checkpoint(tmp_path / "w.pth")


def bomb(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q\x00.")
        archive.writestr("archive/data/0", bytes(50_000_000))


def overlapping(path):
    """Two directory entries for the same stored bytes, as bombs without compression have."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", bytes(4000))
        archive.filelist += [archive.filelist[0]] * 20


def big_header(path):
    path.write_bytes(struct.pack("<Q", 2**62) + b'{"a":')


def lying_header(path):
    save_file(WEIGHTS, path)
    path.write_bytes(path.read_bytes().replace(b"[8,32]", b"[8,99]"))


@pytest.mark.parametrize(
    "make, reason",
    [
        (bomb, "claims 50.0 MB inside"),
        (overlapping, r"claims 8\d.0 kB inside"),
        (big_header, "header claims 46116860"),
        (lying_header, "not a safetensors file"),
    ],
)
def test_files_that_claim_more_than_they_hold_are_refused(tmp_path, make, reason):
    make(tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=reason):
        read_checkpoint(tmp_path / "w.pth")


def gigantic(path):
    """A checkpoint from before 1.6 whose storage claims 2^60 numbers."""
    stream = io.BytesIO()
    torch.save({"a": torch.zeros(3)}, stream, _use_new_zipfile_serialization=False)
    content = stream.getvalue()
    path.write_bytes(content.replace(b"K\x03Ntq", b"\x8a\x08" + struct.pack("<q", 2**60) + b"Ntq", 1))


def test_storages_that_cannot_be_there_are_refused(tmp_path):
    gigantic(tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="loads safely"):
        read_checkpoint(tmp_path / "w.pth")


# --- files that are something else -----------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [save_file, torch.save], ids=["safetensors", "zip"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.9, 0.999])
def test_truncated_files_are_refused(tmp_path, save, share):
    save({"a": torch.zeros(5000)}, tmp_path / "whole")
    content = (tmp_path / "whole").read_bytes()
    (tmp_path / "w.pth").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(WeightsError, match="truncated"):
        read_checkpoint(tmp_path / "w.pth")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99])
def test_truncated_files_of_old_torch_are_refused(tmp_path, share):
    torch.save({"a": torch.zeros(5000)}, tmp_path / "whole", _use_new_zipfile_serialization=False)
    content = (tmp_path / "whole").read_bytes()
    (tmp_path / "w.pth").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(WeightsError, match="loads safely"):
        read_checkpoint(tmp_path / "w.pth")


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "it is empty"),
        (b"  <!DOCTYPE html><html>Sign in</html>", "a web page saved under this name: open the link in a browser"),
        (b"\xef\xbb\xbf<HTML lang=zh>", "a web page"),
        (b'{"error": "itemNotFound"}', "JSON text, which is how servers report errors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
        (b"\x1f\x8b\x08\x00rest", "a gzip archive: unpack it first"),
        (b"\x89HDF\r\n\x1a\nrest", "an HDF5 file"),
        (b"hello there, this is no checkpoint", "neither safetensors nor written by torch.save"),
        (b"\x80\x04\x95\x00", "a bare pickle"),
        (b"x" * 257 + b"ustar" + b"x" * 300, "a tar archive"),
    ],
)
def test_other_files_are_refused_by_what_they_are(tmp_path, content, reason):
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(WeightsError, match=reason):
        read_checkpoint(tmp_path / "w.pth")


def test_archives_of_something_else_are_refused(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.zeros(3))
    with pytest.raises(WeightsError, match="a NumPy archive"):
        read_checkpoint(tmp_path / "w.npz")
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        archive.writestr("weights/model.pth", b"x")
    with pytest.raises(WeightsError, match="it holds weights/model.pth"):
        read_checkpoint(tmp_path / "w.zip")


def test_a_missing_file_and_a_lone_tensor_are_refused(tmp_path):
    with pytest.raises(WeightsError, match="there is no file"):
        read_checkpoint(tmp_path / "w.pth")
    torch.save(torch.zeros(3), tmp_path / "w.pth")
    with pytest.raises(WeightsError, match="holds a Tensor, not a checkpoint"):
        read_checkpoint(tmp_path / "w.pth")


# --- numbers of numpy ------------------------------------------------------------------------------------------------


def test_numpy_s_own_state_setters_are_not_among_what_may_be_called():
    for substitute, name in numpy_globals():
        assert substitute.__module__ == "visionattn.weights.numbers", name


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "value",
    [np.float64(1.5), np.float32(1.5), np.int64(-3), np.bool_(True), np.str_("text"), np.complex64(1 + 2j)]
    + [np.arange(6).reshape(2, 3), np.asfortranarray(np.arange(6.0).reshape(2, 3)), np.array(["a", "bc"])]
    + [np.arange(3, dtype=">i4"), np.zeros((0, 2)), np.array(2.0)],
    ids=repr,
)
def test_numbers_and_arrays_of_numpy_are_those_of_python(tmp_path, value, legacy):
    torch.save({"model": WEIGHTS, "x": value}, tmp_path / "w.pth", _use_new_zipfile_serialization=not legacy)
    found = read_checkpoint(tmp_path / "w.pth")["x"]
    expected = value.tolist()
    assert found == (expected if value.shape or not isinstance(value, np.ndarray) else [expected])
    assert not type(found).__module__.startswith("numpy")


class Typed:
    """A dtype with a state of its own choice."""

    def __init__(self, code, state):
        self.call = np.dtype, (code, False, True), state

    def __reduce__(self):
        return self.call


class Scalar:
    def __init__(self, dtype, content):
        self.call = np._core.multiarray.scalar, (dtype, content)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("content", [b"", b"x" * 8, b"x" * 4096])
@pytest.mark.parametrize("code", ["f8", "i1", "O", "V8", "U3", "S9999999", "f16", "M8[ns]"])
@pytest.mark.parametrize("flags", [0, 1, 63, 255])
@pytest.mark.parametrize("size", [-1, 0, 1, 2**30])
def test_a_dtype_that_lies_about_its_size_or_its_objects_is_not_believed(tmp_path, code, size, flags, content):
    names, fields = (("a",), {"a": (np.dtype("f8"), 0)}) if flags == 1 else (None, None)
    value = Scalar(Typed(code, (3, "<", None, names, fields, size, 1, flags)), content)
    torch.save({"model": WEIGHTS, "x": value, "y": [value] * 50}, tmp_path / "w.pth")
    try:
        found = read_checkpoint(tmp_path / "w.pth")["x"]
    except WeightsError as error:
        assert "\n" not in str(error)
    else:
        assert isinstance(found, bool | int | float | str | bytes)
