"""Files of every form that say of themselves what is not true: a line or what they really hold, and never more."""

import collections
import io
import json
import pickle
import struct
import tarfile
import zipfile
from functools import cache

import pytest
import timm
import torch
from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

from visionattn.errors import some
from visionattn.weights import WeightsError
from visionattn.weights.card import read_metadata
from visionattn.weights.commands.translate import translate
from visionattn.weights.files import LARGEST_HEADER, kind_of, refuse_answer
from visionattn.weights.load import load_weights
from visionattn.weights.read import read_checkpoint

BIG = 2**62


@cache
def model():
    return timm.create_model("test_vit")


# --- safetensors ------------------------------------------------------------------------------------------------------


def entry(shape, offsets=(0, 64), dtype="F32"):
    return dict(dtype=dtype, shape=shape, data_offsets=list(offsets))


def safetensors(header, body=bytes(64), length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


WHOLE = '"a":{"dtype":"F32","shape":[16],"data_offsets":[0,64]}'
LESS = WHOLE.replace("16", "8").replace("64", "32")
HEADERS = {
    "overlapping": dict(a=entry([16]), b=entry([16])),
    "nested": dict(a=entry([16]), b=entry([4], (16, 32))),
    "with a hole": dict(a=entry([4], (0, 16)), b=entry([4], (48, 64))),
    "beyond the end": dict(a=entry([32], (0, 128))),
    "reversed": dict(a=entry([16], (64, 0))),
    "negative": dict(a=entry([16], (-64, 0))),
    "of fractions": dict(a=entry([16], (0.0, 64.0))),
    "at the end of numbers": dict(a=entry([16], (2**64 - 65, 2**64 - 1))),
    "beyond numbers": dict(a=entry([16], (2**64, 2**64 + 64))),
    "of three": dict(a=entry([16], (0, 32, 64))),
    "of text": dict(a=entry([16], "06")),
    "a product beyond numbers": dict(a=entry([2**32, 2**32])),
    "a product that is zero in the end": dict(a=entry([2**32, 2**32, 0], (0, 0)), b=entry([16])),
    "nothing, very wide": dict(a=entry([0, BIG], (0, 0)), b=entry([16])),
    "a negative side": dict(a=entry([-16])),
    "two negative sides": dict(a=entry([-4, -4])),
    "a huge side": dict(a=entry([BIG])),
    "a side of 16.0": dict(a=entry([16.0])),
    "another shape": dict(a=entry([8])),
    "countless sides": dict(a=entry([1] * 70_000 + [16])),
    "twenty sides": dict(a=entry([1] * 20 + [16])),
    "numbers of no kind": dict(a=entry([16], dtype="F128")),
    "numbers in small letters": dict(a=entry([16], dtype="f32")),
    "numbers of four bits": dict(a=entry([128], dtype="F4")),
    "powers": dict(a=entry([64], dtype="F8_E8M0")),
    "a name twice": f"{{{WHOLE},{LESS}}}".encode(),
    "metadata twice": f'{{"__metadata__":{{"a":"b"}},"__metadata__":{{"c":"d"}},{WHOLE}}}'.encode(),
    "metadata of numbers": {"__metadata__": {"a": 1}, "a": entry([16])},
    "metadata of no number": f'{{"__metadata__":{{"a":NaN}},{WHOLE}}}'.encode(),
    "metadata as a list": {"__metadata__": ["a"], "a": entry([16])},
    "metadata within": {"__metadata__": {"a": {"b": "c"}}, "a": entry([16])},
    "a list": b"[]",
    "two": b"{}{}",
    "a mark": b"\xef\xbb\xbf{}",
    "deep": b'{"a":' * 100_000,
    "deep lists": b'{"a":' + b"[" * 100_000,
    "a zero byte": b'{"a\x00":1}',
    "no text": b'{"\xff":1}',
    "half": b'{"a":{"dty',
    "digits": f"{{{WHOLE}}}".replace("16", "1" * 5000).encode(),
    "a comment": b"{/**/}",
}
LENGTHS = [
    0,
    1,
    2,
    7,
    9,
    10**6,
    LARGEST_HEADER,
    LARGEST_HEADER + 1,
    2**31,
    2**32,
    2**63 - 1,
    2**63,
    2**64 - 8,
    2**64 - 1,
]


def held(path):
    """Bytes of the tensors in a file that is read, None if it ends in a line."""
    try:
        content = read_checkpoint(path)
    except WeightsError as error:
        assert "\n" not in str(error) and len(str(error)) < 900 and str(error).isprintable()
        return None
    return sum(value.numel() * value.element_size() for value in content.values() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("kind", HEADERS)
def test_a_header_of_safetensors_that_lies_ends_in_a_line(kind, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors(HEADERS[kind]))
    if kind == "nothing, very wide":
        assert held(path) == 64
    else:
        assert held(path) is None
    for door in (
        lambda: load_weights(model(), str(path)),
        lambda: translate(path, model="van_b0"),
    ):
        with pytest.raises(WeightsError) as caught:
            door()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("length", LENGTHS)
def test_the_length_of_a_header_is_not_believed(length, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors(dict(a=entry([16])), length=length))
    assert held(path) is None


SAYS = {
    "no number": '{"name": NaN}',
    "infinity": '{"name": "van_nano", "model_args": {"mlp_ratios": [Infinity]}, "num_classes": 3}',
    "more classes than none": '{"name": "van_nano", "model_args": {}, "num_classes": -Infinity}',
    "a list": "[1]",
    "text": '"van_nano"',
    "nothing": "",
    "depth": "[" * 100_000,
    "digits": "1" * 100_000,
    "width": '{"name": "%s"}' % ("x" * 2_000_000),
    "a half letter": '{"name": "\\ud800"}',
}


@pytest.mark.parametrize("kind", SAYS)
def test_what_the_metadata_say_is_not_believed(kind, tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors({"__metadata__": {"visionattn": SAYS[kind]}, "a": entry([16])}))
    with pytest.raises(WeightsError) as caught:
        read_metadata(path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 900


@pytest.mark.parametrize("length", [0x5B20, 0x7B20, 0x7B, 0x5B20 + 0x10000, 0x4B50, 0x4225])
def test_a_header_s_length_may_look_like_letters(length, tmp_path):
    text = json.dumps(dict(a=entry([16]))).encode()
    (tmp_path / "w").write_bytes(safetensors(text + b" " * (length - len(text))))
    assert kind_of(tmp_path / "w") == "safetensors"
    refuse_answer(tmp_path / "w", "a server")
    assert held(tmp_path / "w") == 64


@pytest.mark.parametrize("text", [b'{"err": {"code": 404}}', b'{ "a": [{"b": 1}]}', b"  [{}, {}, {}, {}]"])
def test_json_that_looks_like_a_header_is_json(text, tmp_path):
    (tmp_path / "w").write_bytes(text)
    with pytest.raises(WeightsError, match="JSON"):
        refuse_answer(tmp_path / "w", "a server")


def test_names_do_not_speak_to_the_terminal(tmp_path):
    path = tmp_path / "w.safetensors"
    path.write_bytes(safetensors({"\x1b[2J\x07\n\u202egnp": entry([16])}))
    with pytest.raises(WeightsError) as caught:
        load_weights(model(), str(path))
    assert str(caught.value).isprintable() and "\\x1b[2J" in str(caught.value)
    assert len(some(["x" * 10**6] * 9)) < 1000


# --- files of torch before 1.6 ----------------------------------------------------------------------------------------


class Wanted:
    """A tensor in a storage of some size."""

    def __init__(self, key, count, kind="FloatStorage", offset=0, shape=(1,), stride=(1,)):
        self.storage = ("storage", getattr(torch, kind), key, "cpu", count, None)
        self.rest = (offset, shape, stride, False, collections.OrderedDict())

    def __reduce__(self):
        return torch._utils._rebuild_tensor_v2, (Reference(self.storage), *self.rest)


class Reference:
    """What is written as a reference to something outside of the pickle."""

    def __init__(self, to):
        self.to = to


class Pickler(pickle.Pickler):
    def persistent_id(self, value):
        return value.to if isinstance(value, Reference) else None


def legacy(content, keys=("0",), body=b"\x01\0\0\0\0\0\0\0\0\0\x40\x40"):
    stream = io.BytesIO()
    system = dict(protocol_version=PROTOCOL_VERSION, little_endian=True, type_sizes=dict(short=2, int=4, long=4))
    for value in (MAGIC_NUMBER, PROTOCOL_VERSION, system):
        pickle.dump(value, stream, protocol=2)
    Pickler(stream, 2).dump(content)
    pickle.dump(list(keys), stream, protocol=2)
    return stream.getvalue() + body


KINDS = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool", "ComplexDouble")
CLAIMS = {
    **{
        f"{count} of {kind}": dict(a=Wanted("0", count, f"{kind}Storage")) for kind in KINDS for count in (10**4, 2**40)
    },
    "a gigabyte": dict(a=Wanted("0", 2**28)),
    "many small ones": {str(key): Wanted(str(key), 10**4) for key in range(1000)},
    "one key, two sizes": dict(a=Wanted("0", 1), b=Wanted("0", 2**33)),
    "less than nothing": dict(a=Wanted("0", -1)),
    "beyond numbers": dict(a=Wanted("0", 2**80)),
    "a fraction": dict(a=Wanted("0", 1e9)),
    "true": dict(a=Wanted("0", True)),
    "beyond its storage": dict(a=Wanted("0", 1, shape=(2**40,), stride=(0,))),
    "behind its storage": dict(a=Wanted("0", 1, offset=2**40)),
    "before its storage": dict(a=Wanted("0", 1, offset=-5)),
    "another module": dict(a=Reference(("module", dict, "x.py", "print(1)"))),
    "a reference to nothing": dict(a=Reference(("storage",))),
    "a reference of text": dict(a=Reference("storage")),
    "a number as the type": dict(a=Reference(("storage", 4, "0", "cpu", 1, None))),
    "a view beyond": dict(a=Reference(("storage", torch.FloatStorage, "0", "cpu", 1, ("v", 2**40, 2**40)))),
}


def room(monkeypatch, most):
    """Storages of more bytes than these fail the test."""
    made = torch.UntypedStorage.__new__

    def counted(cls, *args, **kwargs):
        assert not args or not isinstance(args[0], int) or 0 <= args[0] <= most, args
        return made(cls, *args, **kwargs)

    monkeypatch.setattr(torch.UntypedStorage, "__new__", counted)


@pytest.mark.parametrize("kind", CLAIMS)
def test_old_files_do_not_claim_more_than_they_hold(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w.pth").write_bytes(content := legacy(CLAIMS[kind]))
    room(monkeypatch, len(content))
    assert not held(tmp_path / "w.pth")
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]


def test_old_files_that_hold_what_they_claim_are_read(tmp_path, monkeypatch):
    (tmp_path / "w.pth").write_bytes(content := legacy(dict(a=Wanted("0", 1), b=Wanted("0", 1), c={"d": [1, (2,)]})))
    room(monkeypatch, len(content))
    assert read_checkpoint(tmp_path / "w.pth")["a"].tolist() == [3.0]
    with pytest.raises(AssertionError):  # the control: what makes room is seen
        torch.UntypedStorage(10**6)


@pytest.mark.parametrize("operations", [b"r\xff\xff\xff\x7f", b"p2147483646\n", b"(" * 50_000, b"K\x01\x85" * 10**4])
def test_old_files_with_pickles_that_want_room_end_in_a_line(operations, tmp_path):
    whole = legacy({})
    (tmp_path / "w.pth").write_bytes(whole[: whole.index(b"}q\x00.")] + b"}" + operations + b".")
    held(tmp_path / "w.pth")


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, None])
def test_files_that_are_tars_as_well_are_refused(form, tmp_path):
    start = legacy({})[:15].decode("latin1")  # as the first member's name
    info = tarfile.TarInfo("x")
    header = bytearray(info.tobuf(form or tarfile.USTAR_FORMAT))
    header[:15] = start.encode("latin1")
    if form is None:  # of before ustar
        header[257:265] = bytes(8)
    header[148:156] = b"%06o\0 " % (sum(header[:148]) + 256 + sum(header[156:512]))
    (tmp_path / "w.pth").write_bytes(bytes(header) + bytes(10_240))
    with pytest.raises(WeightsError, match="a tar archive"):
        read_checkpoint(tmp_path / "w.pth")


# --- archives ---------------------------------------------------------------------------------------------------------


def saved():
    stream = io.BytesIO()
    torch.save({"a": torch.zeros(16)}, stream)
    return stream.getvalue()


def packed(members, **options):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", **options) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return stream.getvalue()


def link(name="archive/data.pkl", to=b"/etc/passwd"):
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return packed([(info, to), ("archive/version", b"3\n")])


def patched(signature, at, form, value):
    """A checkpoint with a number of its list of contents exchanged."""
    content = bytearray(saved())
    place = content.rindex(signature) + at
    content[place : place + struct.calcsize(form)] = struct.pack(form, value)
    return bytes(content)


EMPTY = b"\x80\x02}q\x00."
ARCHIVES = {
    "in an archive": packed([("archive/data.pkl", saved()), ("archive/version", b"3\n")]),
    "another checkpoint inside": packed([("w.pth", saved())]),
    "compressed": packed(
        [("archive/data.pkl", EMPTY), ("archive/data/0", bytes(64))], compression=zipfile.ZIP_DEFLATED
    ),
    "a link": link(),
    "a link as a tensor": link("archive/data/0"),
    "a name above": packed([("../../data.pkl", EMPTY)]),
    "a name at the root": packed([("/etc/data.pkl", EMPTY), ("/etc/version", b"3\n")]),
    "names that differ in case": packed([("a/data.pkl", EMPTY), ("A/DATA.PKL", EMPTY), ("a/version", b"3\n")]),
    "two roots": packed([("a/data.pkl", EMPTY), ("b/data/0", bytes(64)), ("a/version", b"3\n")]),
    "no version": packed([("a/data.pkl", EMPTY)]),
    "a version to come": packed([("a/data.pkl", EMPTY), ("a/version", b"999999\n")]),
    "another byte order": packed([("a/data.pkl", EMPTY), ("a/version", b"3\n"), ("a/byteorder", b"middle")]),
    "a program": packed([("a/data.pkl", EMPTY), ("a/constants.pkl", EMPTY), ("a/version", b"3\n")]),
    "arrays": packed([("a.npy", b"\x93NUMPY")]),
    "a file cut off": saved()[:-30],
    "a file with something before": b"PK" + saved(),
    "more entries than there are": patched(b"PK\x05\x06", 10, "<H", 60_000),
    "a list elsewhere": patched(b"PK\x05\x06", 16, "<L", 2**31),
    "a list of another length": patched(b"PK\x05\x06", 12, "<L", 2**31),
    "a wide list": patched(b"PK\x06\x06", 40, "<Q", BIG),
    "a wide list elsewhere": patched(b"PK\x06\x06", 48, "<Q", BIG),
    "wide entries": patched(b"PK\x06\x06", 32, "<Q", BIG),
    "a member of another size": patched(b"PK\x01\x02", 24, "<L", 2**31),
    "a member elsewhere": patched(b"PK\x01\x02", 42, "<L", 2**31),
    "a locked member": patched(b"PK\x01\x02", 8, "<H", 1),
    "a member of another method": patched(b"PK\x01\x02", 10, "<H", 14),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_archives_that_lie_end_in_a_line(kind, tmp_path):
    (tmp_path / "w.pth").write_bytes(content := ARCHIVES[kind])
    size = held(tmp_path / "w.pth")
    assert size is None or size <= len(content)
    assert [path.name for path in tmp_path.iterdir()] == ["w.pth"]


# --- the control ------------------------------------------------------------------------------------------------------


class Canary:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('fired').touch()",)


@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_the_canary_fires_in_a_reader_that_believes_and_not_in_ours(form, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": Canary()}, "w.pth", _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(WeightsError, match="it would call builtins.exec"):
        read_checkpoint("w.pth")
    assert not (tmp_path / "fired").exists()
    torch.load("w.pth", weights_only=False)
    assert (tmp_path / "fired").exists()
