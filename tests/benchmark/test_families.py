"""The table of all families: what is measured, kept and shown."""

import json

import pytest
import timm
import torch

from visionattn.benchmark import families
from visionattn.benchmark.cli import main
from visionattn.benchmark.families import FAMILIES, Grid, run_families
from visionattn.benchmark.models import PLAIN, _plain
from visionattn.benchmark.reduced import reduce

GRID = Grid(models=("van_b0", "nat_mini"), capabilities=("native",), threads=(1,), batches=(1, 8), modes=("infer",))


@pytest.fixture
def measured(monkeypatch):
    """Stands for the processes that measure; the list of what was asked for."""
    asked = []

    def measure(cell, modes, grid):
        asked.append(cell)
        common = {"peak_mb": 1.0, "error": 0.0, "reason": "", "load": 0.1}
        return [
            {"mode": mode, "candidate": who, "median_ms": ms, **common}
            for mode in modes
            for who, ms in (("plain", 3.0), ("ours", 2.0 if cell[3] == "van_b0" else 1.5))
        ], ""

    monkeypatch.setattr(families, "_measure", measure)
    return asked


def test_every_family_that_has_a_plain_composition_is_in_the_table():
    assert {_plain(name) for name in FAMILIES} == set(PLAIN.values())


def test_the_table_has_ratios_and_their_geometric_mean(tmp_path, measured):
    assert run_families(GRID, tmp_path / "table.json", "command") == 0
    text = (tmp_path / "table.md").read_text()
    assert "| `van_b0` | 1.50 | 1.50 |" in text and "| `nat_mini` | 2.00 | 2.00 |" in text
    assert "| geometric mean | 1.73 | 1.73 |" in text and "torch" in text
    assert len(measured) == 4


def test_what_is_measured_is_kept_and_what_failed_is_tried_again(tmp_path, measured, monkeypatch):
    stand_in = families._measure

    def failing(cell, modes, grid):
        return ([], "killed") if cell[3] == "nat_mini" else stand_in(cell, modes, grid)

    monkeypatch.setattr(families, "_measure", failing)
    assert run_families(GRID, tmp_path / "table.json", "command") == 1
    monkeypatch.setattr(families, "_measure", stand_in)
    measured.clear()
    assert run_families(GRID, tmp_path / "table.json", "command") == 0
    assert [cell[3] for cell in measured] == ["nat_mini"] * 2


def test_what_another_version_measured_is_not_kept(tmp_path, measured):
    file = tmp_path / "table.json"
    run_families(GRID, file, "command")
    data = json.loads(file.read_text())
    data["header"]["torch"] = "1.0"
    file.write_text(json.dumps(data))
    measured.clear()
    run_families(GRID, file, "command")
    assert len(measured) == 4


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--device", "cuda"], "in float32 on the CPU"),
        (["--candidates", "ours"], "in float32 on the CPU"),
        (["van_b2"], "unknown model 'van_b2'"),
    ],
)
def test_what_cannot_be_in_the_table_is_refused(arguments, message, tmp_path, capsys):
    assert main(["models", "--all-families", str(tmp_path / "t.json"), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_the_folder_must_be_there(tmp_path, capsys):
    assert main(["models", "--all-families", str(tmp_path / "no" / "t.json")]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.slow
def test_a_cell_is_measured_in_a_process_of_its_own(tmp_path):
    grid = Grid(models=("van_b0",), capabilities=("avx2",), threads=(1,), batches=(1,), modes=("infer",), seconds=0.1)
    assert run_families(grid, tmp_path / "table.json", "command") == 0
    (cell,) = json.loads((tmp_path / "table.json").read_text())["cells"].values()
    assert cell["ratio"] > 0 and cell["error"] < 1e-4


def test_ours_in_fewer_bits_is_beside_the_authors_float32(tmp_path, monkeypatch):
    def measure(cell, modes, grid):
        common = {"mode": "infer", "peak_mb": 1.0, "error": 0.0, "reason": "", "load": 0.1}
        times = {"plain": 3.0, "ours": 2.0, "bfloat16": 1.0, "int8": 1.5}
        return [{"candidate": who, "median_ms": ms, **common} for who, ms in times.items()], ""

    monkeypatch.setattr(families, "_measure", measure)
    grid = Grid(("van_b0",), ("native",), threads=(1,), batches=(1,), modes=("infer",), reduced=("bfloat16", "int8"))
    assert run_families(grid, tmp_path / "table.json", "command") == 0
    assert "| `van_b0` | 1.50 | 3.00 | 2.00 |" in (tmp_path / "table.md").read_text()  # infer, bfloat16, int8


@pytest.mark.parametrize("candidate, bound", [("bfloat16", 0.05), ("int8", 0.5)])
def test_networks_in_fewer_bits_give_about_the_same_logits(candidate, bound):
    torch.manual_seed(0)
    model = timm.create_model("agent_swin_t", img_size=64, num_classes=10).eval()
    reduced = reduce(model, candidate, "infer")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected, got = model(x), reduced(x)
    assert got.dtype == torch.float32 and 0 < (got - expected).norm() < bound * expected.norm()
    with pytest.raises(ValueError, match="for inference, not 'train'"):
        reduce(model, candidate, "train")
