import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from visionattn.weights.commands import cli
from visionattn.weights.options import settings

pytest.importorskip("jsonargparse")
ROOT = Path(__file__).resolve().parents[2]


def run(*arguments):
    cli.main(["weights", *arguments])


def fails(capsys, *arguments):
    """The one line that the command ends with."""
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert capsys.readouterr().out.count("\n") <= 1 and "\n" not in str(caught.value.code)
    return str(caught.value.code)


def test_list_shows_a_table(capsys):
    run("list", "van_*")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == "checkpoint params (M) GMAC top-1 licence file verified here".split()
    row = next(line for line in lines if line.startswith("van_b0.in1k"))
    assert row.split()[1:] == ["4.1", "0.9", "75.4", "apache-2.0", "hub", "no"]
    assert lines[-1] == f"{len(lines) - 2} checkpoints"


@pytest.mark.parametrize(
    "arguments, there, not_there",
    [
        (["--family", "nat"], "nat_base.in1k", "van_b0.in1k"),
        (["--license", "MIT"], "nat_base.in1k", "van_b0.in1k"),
        (["--max_params", "21", "--min_params", "5"], "nat_mini.in1k", "van_b0.in1k"),
        (["--task", "segment"], "tap_fan_base_cityscapes", "van_b0.in1k"),
        (["--link", "bundled"], "van_nano.digits", "van_b0.in1k"),
        (["--here", "true"], "van_nano.digits", "van_b0.in1k"),
    ],
)
def test_list_filters(capsys, arguments, there, not_there):
    run("list", *arguments)
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert there in names and not_there not in names


def test_list_uses_rich_on_a_terminal(capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    run("list", "van_nano*")
    assert "┃" in capsys.readouterr().out


def test_show_tells_everything(capsys):
    run("show", "van_nano.digits")
    text = capsys.readouterr().out
    assert "nano_digits.yaml --model.name van_nano" in text and "CC BY 4.0" in text
    assert "on this machine  /" in text.replace("\\", "/")
    run("show", "van_b0.in1k")
    assert "not verified here" in capsys.readouterr().out


def test_download_and_verify(capsys, tmp_path, cache):
    (tmp_path / "van_tiny_754.pth.tar").write_bytes(b"weights")
    try:
        run("download", "van_b0.in1k", "--mirror", str(tmp_path))
    finally:
        settings.mirror = None
    assert (cache / "van_tiny_754.pth.tar").read_bytes() == b"weights"
    assert str(cache) in capsys.readouterr().out
    run("verify", "van_nano.*")
    assert "hash: matches" in capsys.readouterr().out
    with pytest.raises(SystemExit) as caught:
        run("verify", "van_b0.in1k")
    assert caught.value.code == 1 and "forward: FAILED" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["translate", "convert"])
def test_translate_also_by_its_old_name_and_add(capsys, tmp_path, command):
    torch.save(timm.create_model("van_nano").state_dict(), tmp_path / "w.pth")
    run(command, str(tmp_path / "w.pth"), str(tmp_path / "w.safetensors"))
    assert "van_nano: " in (text := capsys.readouterr().out) and "wrote" in text
    run("add", "van_nano.mine", str(tmp_path / "w.safetensors"))
    assert 'timm.create_model("van_nano.mine", pretrained=True)' in capsys.readouterr().out
    run("list", "van_nano*")
    assert "van_nano.mine" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["show", "nothing"], "error: no checkpoint is called nothing: visionattn weights list"),
        (["list", "--family", "nothing"], "error: there is no family 'nothing': choose from"),
        (["list", "--link", "nothing"], "nothing"),
        (["list", "--licence", "mit"], "error: unrecognized arguments: --licence"),
        (["download", "nothing*"], "error: no checkpoint is like nothing"),
        (["download", "van_b4.untrained"], "error: no weights of van_b4.untrained are published"),
        (["translate", "nowhere.pth", "w.safetensors"], "error: there is no file nowhere.pth"),
        (["download"], "required"),
        (["dance"], "dance"),
    ],
)
def test_mistakes_end_with_one_line(capsys, arguments, message):
    assert message in fails(capsys, *arguments)


def test_module_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "visionattn", "weights", "show", "van_nano.digits"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "van_nano" in done.stdout


HEAVY = {"torch", "timm", "torchvision", "numpy", "huggingface_hub", "lightning", "triton", "safetensors"}
AS_SCRIPT = """
import sys
from pathlib import Path
sys.argv = ["/usr/bin/visionattn", "weights", "{command}"]
from visionattn.weights.commands.cli import main
main(sys.argv[1:])
print(*sorted({{name.partition(".")[0] for name in sys.modules}}), file=sys.stderr)
if "{more}":
    import timm, visionattn
    assert len(visionattn.list_models()) > 100 and visionattn.backbones and timm.is_model("van_b0")
"""


def child(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, check=True)


@pytest.mark.parametrize("command", ["list", "table"])
def test_the_manifest_is_shown_without_importing_what_computes(command):
    result = child("-c", AS_SCRIPT.format(command=command, more=""))
    assert "van_b0.in1k" in result.stdout and not HEAVY & set(result.stderr.split())
    imported = child("-X", "importtime", "-m", "visionattn", "weights", command).stderr
    names = {line.rpartition("|")[2].strip().partition(".")[0] for line in imported.splitlines()}
    assert "tomllib" in names and not HEAVY & names


def test_models_are_there_for_whoever_asks_after_the_list():
    assert "torch" not in child("-c", AS_SCRIPT.format(command="list", more="yes")).stderr.split()


def test_every_other_command_has_the_models():
    assert "4.1" in child("-m", "visionattn", "weights", "show", "van_b0.in1k").stdout


@pytest.mark.parametrize("home", [{}, {"TORCH_HOME": "~/t"}, {"XDG_CACHE_HOME": "/x"}, {"TORCH_HOME": "/t"}])
def test_the_folder_of_downloads_is_that_of_pytorch_also_without_it(home, monkeypatch):
    for name in ("TORCH_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in home.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(settings, "cache_dir", None)
    expected = Path(torch.hub.get_dir(), "checkpoints")
    assert settings.folder() == expected
    monkeypatch.delitem(sys.modules, "torch")
    assert settings.folder() == expected
