import os

import pytest
import torch

# Small shapes gain nothing from many threads, and a fixed number keeps sums in one order.
torch.set_num_threads(min(2, os.cpu_count() or 1))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
