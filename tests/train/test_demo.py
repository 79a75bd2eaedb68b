import time

import pytest
from PIL import Image

from visionattn.train.demo import demo

PICTURES = ("curves.png", "confusion.png", "predictions.png", "digit.png")


def test_demo_draws_and_says_what_to_do_next(tmp_path, capsys):
    accuracy = demo(str(tmp_path), max_epochs=1)
    assert accuracy > 50
    assert all(Image.open(tmp_path / name).size[0] >= 32 for name in PICTURES)
    shown = capsys.readouterr().out
    assert f"python train.py predict --ckpt {tmp_path}" in shown and "--data.root FOLDER" in shown
    assert all(str(tmp_path / name) in shown for name in ("metrics.csv", *PICTURES))


@pytest.mark.slow
def test_demo_is_accurate_and_quick(tmp_path):
    start = time.perf_counter()
    assert demo(str(tmp_path)) >= 98
    assert time.perf_counter() - start < 240
