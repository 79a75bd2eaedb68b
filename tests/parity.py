"""What the authors' code computes, recorded as data, and the weights and images to compute it again.

A fixture lists the original parameter names and shapes, the output, and samples of intermediate maps. Every weight and
pixel is a function of its name, shape and seed (a counter-based integer hash), so nothing has to be downloaded and the
values are the same on every platform.
"""

import gzip
import json
import zlib
from collections.abc import Collection
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FIXTURES = Path(__file__).parent / "fixtures"


def load_fixture(name: str, folder: Path = FIXTURES) -> dict:
    """The fixture ``"family/name"``."""
    with gzip.open(folder / f"{name}.json.gz", "rt", encoding="utf-8") as file:
        return json.load(file)


def _uniform(seed: int, count: int) -> np.ndarray:
    """``count`` float64 values in [0, 1) from the splitmix64 hash of their index."""
    mix = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
    with np.errstate(over="ignore"):
        z = np.arange(1, count + 1, dtype=np.uint64) + np.uint64(seed) * np.uint64(1_000_003)
        z *= np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in mix:
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        z ^= z >> np.uint64(31)
    return (z >> np.uint64(11)).astype(np.float64) / 2**53


def synth_parameter(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 value that the parameter or statistic ``name`` of ``shape`` holds in every fixture."""
    u = _uniform(zlib.crc32(name.encode()), int(np.prod(shape)))
    leaf = name.rpartition(".")[2]
    matrix = len(shape) >= 2
    if leaf == "running_mean":
        u = 0.2 * (u - 0.5)
    elif leaf == "running_var":
        u = 0.8 + 0.4 * u
    elif matrix and shape[0] == 1:
        u = u - 0.5
    elif matrix:
        u = (2 * u - 1) * np.sqrt(3.0 / np.prod(shape[1:]))
    elif leaf.endswith("bias"):
        u = 0.2 * (2 * u - 1)
    elif leaf == "weight":
        u = 0.75 + 0.5 * u
    else:
        u = 0.25 + 0.5 * u
    return u.astype(np.float32).reshape(shape)


def scaled_names(key: str, names: Collection[str]) -> list[str]:
    """The parameters that an entry of ``param_scale`` scales: the one of that name, or all whose names end so."""
    return [key] if key in names else [name for name in names if name.endswith(key)]


def fixture_weights(fixture: dict) -> dict[str, Tensor]:
    """Every parameter under the authors' name, with the fixture's ``param_scale`` applied."""
    weights = {name: synth_parameter(name, tuple(shape)) for name, shape in fixture["params"]}
    for key, factor in fixture.get("param_scale", []):
        for name in scaled_names(key, weights):
            weights[name] = weights[name] * np.float32(factor)
    return {name: torch.from_numpy(np.asarray(value)) for name, value in weights.items()}


def fixture_image(fixture: dict) -> Tensor:
    """The images the output was computed from: unit noise on a smooth ramp. [B, C, H, W]"""
    b, c, h, w = fixture["input_shape"]
    noise = (_uniform(0x5EED + fixture["input_seed"], b * c * h * w).reshape(b, c, h, w) - 0.5) * np.sqrt(12.0)
    y = np.linspace(-1, 1, h)[:, None]
    x = np.linspace(-1, 1, w)[None, :]
    phase = np.arange(1, b * c + 1).reshape(b, c, 1, 1)
    ramp = np.sin(phase * y * 1.7 + 0.3) + np.cos(phase * x * 1.1 - 0.2)
    return torch.from_numpy((0.7 * noise + 0.7 * ramp).astype(np.float32))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``||actual - expected|| / ||expected||`` over all elements, in float64."""
    actual, expected = actual.detach().double().flatten(), expected.double().flatten()
    return (torch.linalg.vector_norm(actual - expected) / torch.linalg.vector_norm(expected)).item()


def output_error(fixture: dict, output: Tensor) -> float:
    """Relative error of an output of the recorded shape."""
    recorded = fixture["output"]
    if recorded["values"] is None:
        return map_error(recorded["sample"], output)
    assert list(output.shape) == recorded["shape"], (output.shape, recorded["shape"])
    return relative_error(output, torch.tensor(recorded["values"]))


def map_error(recorded: dict, actual: Tensor) -> float:
    """Relative error of a map of the recorded shape, over the recorded samples."""
    assert list(actual.shape) == recorded["shape"], (recorded.get("label"), actual.shape, recorded["shape"])
    return relative_error(actual.reshape(-1)[torch.tensor(recorded["index"])], torch.tensor(recorded["value"]))
