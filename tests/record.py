"""Records what the authors' code computes with synthetic parameters, as a fixture for ``tests.parity``.

It needs PyTorch and NumPy alone, and so runs in the environment that the authors' code asks for.
"""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from tests.parity import FIXTURES, fixture_image, fixture_weights, scaled_names

STATISTICS = ("running_mean", "running_var")  # buffers that a checkpoint brings; others are the constructor's
SAMPLES = 256  # of a map
WHOLE = 20_000  # elements of an output that is stored whole; of a larger one a sample is


def record(name: str, module: nn.Module, *, folder: Path = FIXTURES, **options) -> dict:
    """Store :func:`make_fixture` of ``module`` as ``folder/FAMILY/MODEL.json.gz``, print what it holds, return it.

    Equal fixtures make equal files; a file appears when it is complete.

    Args:
        name: ``"FAMILY/MODEL"``.
        options: What :func:`make_fixture` takes.
    """
    fixture = make_fixture(name.rpartition("/")[2], module, **options)
    path = folder / f"{name}.json.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    try:
        with open(unfinished, "wb") as file, gzip.GzipFile("", "wb", fileobj=file, mtime=0) as packed:
            packed.write(json.dumps(fixture, separators=(",", ":"), allow_nan=False).encode())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
    print(f"{path}: {fixture['n_params']:,} parameters, output {fixture['output']['shape']}")
    for feature in fixture["features"]:
        print("  {label}: {shape}, mean {mean:.3g}, std {std:.3g}".format(**feature))
    return fixture


def make_fixture(
    model: str,
    module: nn.Module,
    *,
    source: str,
    commit: str,
    license: str,
    paper: dict | None = None,
    input_shape: Sequence[int] = (2, 3, 224, 224),
    input_seed: int = 0,
    param_scale: Sequence[tuple[str, float]] = (),
    maps: dict[str, str] | None = None,
    run: Callable[[nn.Module, Tensor], Tensor] = lambda module, images: module(images),
    **facts,
) -> dict:
    """What ``module``, any module, computes in evaluation mode and float32 with the parameters of ``tests.parity``.

    The module is changed: its parameters and the statistics of its batch norms are overwritten.

    Args:
        model: What the fixture says that it is of.
        source: Where the code is, such as ``"USER/REPOSITORY"``, with ``commit`` and ``license``.
        paper: What the paper says of the model: top1, params_m, gflops, resolution.
        input_shape: Of the images, [B, C, H, W].
        input_seed: Another seed, other images.
        param_scale: Pairs of a parameter's name, or an ending of many names, and the factor of the values: for a
            module that explodes with the plain ones, or in which one part outweighs all others.
        maps: Label and path of the submodules whose outputs are sampled. Of several tensors the first is, of several
            calls the last.
        run: From the images to the output, for a module that takes or returns anything but one tensor.
        facts: Other JSON values to store, such as ``notes`` or ``model_kwargs``.

    Raises:
        ValueError: The output or a map is not finite, and where that began; ``run`` returns no tensor, a map has none;
            ``param_scale`` names nothing.
        AttributeError: ``maps`` names what is no submodule.
    """
    maps = maps or {}
    tensors = _checkpoint(module.cpu().float().eval())
    for key, _ in param_scale:
        if not scaled_names(key, tensors):
            raise ValueError(f"param_scale: {key!r} is neither a parameter of the module nor an ending of one's name")
    fixture = {
        "model": model,
        "source": source,
        "commit": commit,
        "license": license,
        "paper": paper or {},
        "input_shape": list(input_shape),
        "input_seed": input_seed,
        "n_params": sum(parameter.numel() for parameter in module.parameters()),
        **({"param_scale": [list(pair) for pair in param_scale]} if param_scale else {}),
        "params": [[name, list(tensor.shape)] for name, tensor in tensors.items()],
    }
    weights = fixture_weights(fixture)
    with torch.no_grad():
        for name, tensor in tensors.items():
            tensor.copy_(weights[name])
        with _Watch(module, maps) as watch:
            output = run(module, fixture_image(fixture))
    if not isinstance(output, Tensor):
        raise ValueError(f"the output must be one tensor, not {type(output).__name__}; choose it in `run`")
    for label, path in maps.items():
        if label not in watch.outputs:
            raise ValueError(f"map {label!r}: {path!r} was not called, or returned no tensor")
    for label, tensor in {"the output": output, **watch.outputs}.items():
        if not _finite(tensor):
            raise ValueError(
                f"{label} is not finite, which began {watch.began or 'outside the module'}: "
                "make parameters smaller by param_scale=[(NAME OR ENDING, FACTOR), ...]"
            )
    return {
        **fixture,
        "output": _output(output),
        "features": [{"label": label, **_sample(watch.outputs[label])} for label in maps],
        **facts,
    }


def _checkpoint(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and norm statistics as a checkpoint names them; one name for a parameter that modules share."""
    parameters = dict(module.named_parameters())
    return {
        name: tensor
        for name, tensor in module.state_dict(keep_vars=True).items()
        if name in parameters or name.endswith(STATISTICS)
    }


class _Watch:
    """While it is entered, notes what the submodules of ``maps`` return and where values first stop being finite."""

    def __init__(self, module: nn.Module, maps: dict[str, str]) -> None:
        self.outputs: dict[str, Tensor] = {}
        self.began: str | None = None
        self._module, self._maps = module, maps

    def __enter__(self) -> _Watch:
        self._hooks = []
        for name, part in self._module.named_modules():
            place = f"{name or 'the module'} ({type(part).__name__})"
            before, within = (partial(self._look, f"{where} {place}") for where in ("before", "in"))
            self._hooks += [part.register_forward_pre_hook(before), part.register_forward_hook(within)]
        for label, path in self._maps.items():
            self._hooks.append(self._module.get_submodule(path).register_forward_hook(partial(self._keep, label)))
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _look(self, place: str, _module: nn.Module, *values: object) -> None:
        """A hook before (of the inputs) or after (of inputs and output)."""
        if self.began is None and not all(map(_finite, _tensors(values))):
            self.began = place

    def _keep(self, label: str, _module: nn.Module, _inputs: object, output: object) -> None:
        for tensor in _tensors(output):
            self.outputs[label] = tensor.clone()  # before a later module writes into it
            break


def _tensors(values: object) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dictionaries, in order."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (tuple, list, dict)):
        for value in values.values() if isinstance(values, dict) else values:
            yield from _tensors(value)


def _finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())


def _sample(tensor: Tensor) -> dict:
    """Shape, statistics and evenly spaced values of the flattened tensor."""
    flat = tensor.detach().double().flatten().numpy()
    index = np.linspace(0, flat.size - 1, min(flat.size, SAMPLES)).astype(int)
    return {
        "shape": list(tensor.shape),
        "mean": float(flat.mean()),
        "std": float(flat.std()),
        "index": index.tolist(),
        "value": flat[index].tolist(),
    }


def _output(tensor: Tensor) -> dict:
    """All values with the seven digits of float32, or a sample of very many."""
    if tensor.numel() > WHOLE:
        return {"shape": list(tensor.shape), "values": None, "sample": _sample(tensor)}
    digits = np.array([float(f"{value:.7g}") for value in tensor.flatten().tolist()])
    return {"shape": list(tensor.shape), "values": digits.reshape(tensor.shape).tolist()}
