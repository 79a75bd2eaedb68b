import pytest
from PIL import Image

from visionattn.train.demo_dense import demo

pytest.importorskip("segmentation_models_pytorch")
pytest.importorskip("faster_coco_eval")


@pytest.mark.slow
def test_both_tasks_are_learned_and_drawn(tmp_path, capsys):
    scores = demo(str(tmp_path))
    assert scores["mIoU"] >= 80 and scores["AP50"] >= 70
    for task in ("segment", "detect"):
        assert len(list((tmp_path / task / "predictions").glob("*_overlay.png"))) == 6
        assert Image.open(next((tmp_path / task / "pictures").glob("*.png"))).size[0] > 500
    assert "predict --ckpt" in capsys.readouterr().out
