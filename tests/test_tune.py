"""The command ``visionattn tune``."""

import pytest
import torch

from visionattn.kernels.common import remembered
from visionattn.weights.commands.cli import main


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VISIONATTN_TUNE_DIR", str(tmp_path))
    monkeypatch.setattr(remembered, "_known", None)
    monkeypatch.setattr(remembered, "_new", {})


def test_a_model_is_timed_and_what_was_chosen_is_shown_and_kept(capsys, monkeypatch, tmp_path):
    before = torch.get_num_threads()
    words = "tune anyvit_tiny_patch16 --batch_sizes [1] --img_size 224 --threads [1] --training false"
    main(words.split())
    shown = capsys.readouterr().out
    assert "anyvit_tiny_patch16, 1 threads" in shown and "dense product  threads 1" in shown and "mkl" in shown
    assert torch.get_num_threads() == before
    remembered.write()
    monkeypatch.setattr(remembered, "_known", None)
    main(["tune"])  # as another process would
    assert "dense product  threads 1" in capsys.readouterr().out and list(tmp_path.glob("*.json"))


def test_without_anything_timed_it_says_so(capsys):
    main(["tune"])
    assert "nothing has been timed yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        ("tune nat_tinny", "timm knows no model nat_tinny"),
        ("tune nat_tiny --threads [0]", "threads must be positive, got 0"),
        ("tune nat_tiny --img_size 0", "img_size must be positive, got 0"),
    ],
)
def test_what_cannot_be_timed_is_one_line(words, message):
    with pytest.raises(SystemExit, match=f"error: {message}"):
        main(words.split())
