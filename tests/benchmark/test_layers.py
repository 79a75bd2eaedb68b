"""Layers measured beside their alternatives, and the picture of it."""

import pytest
import torch
from torch.utils.flop_counter import flop_registry

from visionattn.benchmark import cli, layers
from visionattn.benchmark.figures import draw_growth
from visionattn.benchmark.host_mixers import HOST_MIXERS
from visionattn.benchmark.ops import Size
from visionattn.benchmark.report import Report
from visionattn.benchmark.runner import Row


def run(capsys, arguments):
    try:
        status = cli.main(arguments.split())
    except SystemExit as exit:
        status = exit.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_ours_equals_plain_and_the_others_are_only_timed(capsys, tmp_path):
    target = tmp_path / "hilo.json"
    status, out, _ = run(capsys, f"layers hilo --sizes 14x7x64 --batch 1 --repeats 1 --check --json {target}")
    assert status == 0 and "n/a" not in out
    rows = Report.from_json(target.read_text()).rows
    assert [row.candidate for row in rows] == 2 * ["plain", "ours", "full", "spatial_reduction", "window7"]
    assert all((row.error is not None) == (row.candidate == "ours") for row in rows)
    assert all(row.median_ms > 0 and row.peak_mb > 0 and row.gmac > 0 for row in rows)


def test_token_merging_equals_plain(capsys):
    status, out, _ = run(capsys, "layers token_merging --sizes 6x5x32 --batch 2 --repeats 1 --check")
    assert status == 0 and "n/a" not in out


def test_mixers_are_measured_beside_softmax(capsys):
    status, out, _ = run(capsys, "layers mixers --sizes 4x5x64 --batch 1 --repeats 1 --mode infer")
    assert status == 0
    names = {line.split()[0] for line in out.splitlines() if line.strip()}
    assert {"softmax", "elu1", "flow", "hedgehog", "rala", "mala"} <= names


def test_hilo_costs_less_than_its_alternatives():
    device = torch.device("cpu")
    case = layers.layer_case("hilo", Size(14, 14, 384), 1, device, torch.float32)
    macs = {candidate.name: candidate.build("infer").flops() // 2 for candidate in case.candidates}
    N, C, heads = 196, 384, {"high": 2, "low": 10}
    high, low = 32 * heads["high"], 32 * heads["low"]
    projections = N * C * (3 * high + low) + N // 4 * C * 2 * low + N * (high**2 + low**2)
    assert macs["plain"] == projections + 2 * N * (4 * high + N // 4 * low)
    if torch.ops.aten._scaled_dot_product_flash_attention_for_cpu in flop_registry:  # not in every version of PyTorch
        assert macs["ours"] == macs["plain"]
    assert macs["plain"] < min(macs["full"], macs["spatial_reduction"], macs["window7"])


def test_picture_is_drawn_from_the_rows(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "growth.png"
    arguments = f"layers token_merging --sizes 4x4x8,8x8x8 --batch 1 --repeats 1 --plot {picture}"
    assert run(capsys, arguments)[0] == 0
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_nothing_measured_is_no_picture(tmp_path):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="nothing was measured"):
        draw_growth([Row("hilo", "1x4x4x8", "infer", "ours", reason="n/a")], tmp_path / "growth.png", "")


@pytest.mark.parametrize("name", HOST_MIXERS)
def test_mixers_of_the_hosts_equal_the_authors_composition(capsys, name):
    status, out, err = run(capsys, f"layers {name} --sizes 7x7x64 --batch 2 --repeats 1 --check")
    assert status == 0 and "n/a" not in out, err
    assert "measured on square maps, got 7x8x64" in run(capsys, f"layers {name} --sizes 7x8x64 --repeats 1")[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("layers hilow", "unknown layer 'hilow'; allowed are hilo, mixers, window, shifted_window, token_merging"),
        ("layers hilo --candidates ors", "unknown candidate 'ors'; allowed are plain, ours, full"),
        ("layers --plot a.png", "not hilo, mixers, window, shifted_window, token_merging, softmax"),
        ("layers hilo --plot no/such/folder/a.png", "does not exist"),
        ("layers hilo --sizes 7x7", "HEIGHTxWIDTHxCHANNELS"),
    ],
)
def test_bad_arguments_end_in_one_line_with_what_is_allowed(capsys, arguments, words):
    status, out, err = run(capsys, arguments)
    assert status == 2 and not out
    assert err.startswith("error: ") and err.count("\n") == 1 and words in err
