"""Thousands of damaged checkpoints, read in child processes: an error or the content, and never a dead process."""

import argparse
import json
import os
import random
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[2]
MEMORY = 6 << 30  # address space of a child
CHILD = """
import faulthandler, resource, sys
from pathlib import Path
faulthandler.enable()
from tests.weights.test_fuzz import MEMORY, mutants
from visionattn.weights.card import read_card
from visionattn.weights.errors import WeightsError
from visionattn.weights.read import read_bare_weights
resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
folder, seed, count = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
told = read = 0
for number, (name, content) in enumerate(mutants(folder, seed, count)):
    path = folder / f"mutant{seed}{Path(name).suffix}"
    path.write_bytes(content)
    print(number, name, end=" ", flush=True)
    try:
        for value in read_bare_weights(str(path)).values():
            value.sum() if value.numel() and not value.is_complex() else None
        read_card(str(path))
        read += 1
    except WeightsError as error:
        told += 1
        assert "\\n" not in str(error)
    path.unlink()
print(f"\\n{told} {read}")
"""


def seeds(folder: Path) -> dict[str, bytes]:
    """Real checkpoints of every form."""
    weights = {"net.a.weight": torch.arange(60.0).reshape(6, 10), "net.a.bias": torch.ones(6)}
    settings = argparse.Namespace(lr=np.float64(0.1), curve=np.arange(5.0), names=np.array(["a", "b"]))
    card = dict(name="van_nano", model_args={}, num_classes=3, class_names=["a"], preprocess={})
    content = {"state_dict": weights, "visionattn": card, "epoch": np.int64(3)}
    torch.save(content, folder / "plain.ckpt")
    torch.save(content | {"args": settings}, folder / "settings.ckpt")
    torch.save(content | {"args": settings}, folder / "old.ckpt", _use_new_zipfile_serialization=False)
    save_file(weights, folder / "tensors.safetensors", metadata={"visionattn": json.dumps(card)})
    return {name: (folder / name).read_bytes() for name in ("plain.ckpt", "settings.ckpt", "old.ckpt") + LAST}


LAST = ("tensors.safetensors",)


def mutants(folder: Path, seed: int, count: int):
    """``count`` damaged files by name; every third is an archive whose pickle alone is damaged, its checksum right."""
    chance, whole = random.Random(seed), {f.name: f.read_bytes() for f in sorted(folder.glob("[a-z]*.[cs]*"))}
    whole = {name: content for name, content in whole.items() if not name.startswith("mutant")}
    for number in range(count):
        name = chance.choice(list(whole))
        if number % 3 == 0 and name in ("plain.ckpt", "settings.ckpt"):
            yield name, repacked(folder / name, chance)
        else:
            yield name, damaged(whole[name], chance)


def damaged(content: bytes, chance: random.Random) -> bytes:
    content = bytearray(content)
    for _ in range(chance.choice((1, 1, 2, 8, 64))):
        if not content:
            break
        place = chance.randrange(len(content))
        kind = chance.randrange(6)
        if kind == 0:
            content[place] ^= 1 << chance.randrange(8)
        elif kind == 1:
            content[place] = chance.choice((0, 1, 127, 128, 255, *b"}]()tRbcq.K\x8a"))
        elif kind == 2:
            del content[place : place + chance.randrange(1, 9)]
        elif kind == 3:
            content[place:place] = content[place : place + chance.randrange(1, 40)]
        elif kind == 4:
            content[place : place + 4] = chance.randbytes(4)
        elif chance.random() < 0.1:
            del content[place:]
    return bytes(content)


def repacked(path: Path, chance: random.Random) -> bytes:
    target = path.with_name(f"repacked{os.getpid()}")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w") as archive:
        for entry in source.infolist():
            content = source.read(entry)
            archive.writestr(entry.filename, damaged(content, chance) if entry.filename.endswith(".pkl") else content)
    content = target.read_bytes()
    target.unlink()
    return content


def fuzz(folder: Path, seed: int, count: int) -> tuple[int, int]:
    seeds(folder)
    command = [sys.executable, "-c", CHILD, str(folder), str(seed), str(count)]
    child = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True)
    assert child.returncode == 0, (child.stdout[-200:], child.stderr[-2000:].decode())
    told, read = child.stdout.splitlines()[-1].split()
    return int(told), int(read)


def test_damaged_checkpoints_end_in_one_line(tmp_path):
    told, read = fuzz(tmp_path, 0, 300)
    assert told + read == 300 and told > 150 and read > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 21))
def test_thousands_of_damaged_checkpoints_end_in_one_line(tmp_path, seed):
    assert sum(fuzz(tmp_path, seed, 600)) == 600


def test_the_fuzz_changes_bytes(tmp_path):
    whole = seeds(tmp_path)
    assert all(zlib.crc32(damaged(content, random.Random(3))) != zlib.crc32(content) for content in whole.values())
