import pytest
import torch
from torch import nn

from visionattn.train.callbacks import Throughput
from visionattn.train.flops import peak_flops, training_flops


def test_depthwise_convolutions_are_not_counted_as_dense_ones():
    net = nn.Conv2d(64, 64, 3, padding=1, groups=64, bias=False).train()
    flops = training_flops(net, torch.zeros(1, 64, 8, 8))
    assert flops == 3 * 2 * 64 * 8 * 8 * 9 and net.training


@pytest.mark.parametrize("name", ["NVIDIA H200", "NVIDIA B200", "NVIDIA GeForce RTX 5090"])
def test_new_gpus_have_a_peak(name, monkeypatch):
    assert peak_flops(name, torch.bfloat16) > 1e14
    assert peak_flops("some other GPU", torch.bfloat16) is None

    class Trainer:
        class strategy:
            root_device = torch.device("cuda")

        precision_plugin = None
        enable_validation = False
        world_size = 1

        class state:
            stage = "train"

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: name)
    for module in ("lightning.pytorch.callbacks.throughput_monitor", "visionattn.train.callbacks"):
        monkeypatch.setattr(f"{module}._plugin_to_compute_dtype", lambda _: torch.bfloat16)
    monitor = Throughput()
    monitor.setup(Trainer, None, "fit")
    assert monitor.available_flops == monitor._throughputs["train"].available_flops > 1e14
