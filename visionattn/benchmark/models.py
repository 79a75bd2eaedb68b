"""Whole models to measure: the library's against a plain composition of the same modules, and timm's beside them.

A candidate is written ``network[+channels_last][+compile]``, where the network is ``plain``, ``ours`` or the name of
any timm model, which is then measured on the same images but not compared. Of a ViT or Swin of timm there are ``timm``,
``converted`` with the library's attention in it, and ``converted_linear`` with the library's linear layers as well.
``bfloat16`` and ``int8`` are ours in fewer bits, in inference on a CPU.
"""

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pkgutil import iter_modules

import timm
import torch
from timm.models import get_pretrained_cfg, model_entrypoint
from torch import Tensor, nn

from visionattn.benchmark import plain as plain_networks
from visionattn.benchmark.converted import CONVERTED, convert
from visionattn.benchmark.ops import parse_candidate
from visionattn.benchmark.plain import nat, ravlt, swin
from visionattn.benchmark.reduced import REDUCED, reduce
from visionattn.benchmark.runner import Candidate, Case, Workload
from visionattn.weights.families import release_filter

__all__ = ["PLAIN", "DEFAULT_CANDIDATES", "model_case", "plain_and_ours"]

DEFAULT_CANDIDATES = ("plain", "ours", "ours+compile")

# Family (the module in visionattn.backbones) or name of a model -> network in the authors' manner, by model name: the
# function ``build`` of the family's file in ``plain/``, or that of a file which families share. Its state dict has the
# authors' names, so the family's checkpoint_filter_fn carries the weights over to ours.
_FILES = {
    found.name: import_module(f"{plain_networks.__name__}.{found.name}")
    for found in iter_modules(plain_networks.__path__)
}
PLAIN: dict[str, Callable[[str], nn.Module]] = {
    family: file.build for family, file in _FILES.items() if hasattr(file, "build") and file is not swin
}
PLAIN |= (
    {"dinat": nat.build}
    | dict.fromkeys(("mavit", "nalaformer"), ravlt.build)
    | dict.fromkeys(swin.VARIANTS, swin.build)
)


def randomize_(model: nn.Module) -> nn.Module:
    """Move norms, biases, layer scales and running statistics off their neutral initial values, so that every one of
    them shows in the output. Fixed seed; changes the model in place and returns it."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [p for p in model.parameters() if p.dim() == 1]:
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.05)
        for name, tensor in model.named_buffers():
            if name.endswith("running_mean"):
                tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.05)
            elif name.endswith("running_var"):
                tensor.mul_(torch.rand(tensor.shape, generator=generator) * 0.5 + 0.75)
    return model


def _names_of_ours(name: str, grads: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.device("meta"):
        ours = timm.create_model(name)
    named = release_filter(name)(grads, ours)
    return {key: grad for key, grad in named.items() if not grad.is_meta}  # as are counters that it adds


def _create(name: str, img_size: int, **arguments) -> nn.Module:
    """A timm model for the image size; models that take any size have no ``img_size`` argument."""
    cfg = get_pretrained_cfg(name)
    if cfg is None or cfg.input_size[-1] == img_size:
        return timm.create_model(name, **arguments)
    try:
        return timm.create_model(name, img_size=img_size, **arguments)
    except TypeError:
        return timm.create_model(name, **arguments)


class _Maps(nn.Module):
    """A model that gives its feature maps; the coarsest stands for all of them in what is measured."""

    def __init__(self, name: str, img_size: int) -> None:
        super().__init__()
        self.net = _create(name, img_size, features_only=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)[-1]


def _family(name: str) -> str:
    return model_entrypoint(name).__module__.rpartition(".")[2]


def _plain(name: str) -> Callable[[str], nn.Module] | None:
    return PLAIN.get(name.split(".")[0], PLAIN.get(_family(name)))


def plain_and_ours(name: str, img_size: int = 224) -> tuple[nn.Module, nn.Module]:
    """The plain network of a model and the library's own with the same random weights."""
    build = _plain(name)
    if build is None:
        raise ValueError(f"no plain network is registered for {name!r}; there are some for {', '.join(PLAIN)}")
    torch.manual_seed(0)
    plain = randomize_(build(name.split(".")[0]))
    ours = _create(name, img_size)
    ours.load_state_dict(release_filter(name)(plain.state_dict(), ours))
    return plain, ours


def _network(name: str, who: str, img_size: int, features: bool) -> nn.Module:
    if features:
        torch.manual_seed(0)
        return _Maps(name if who == "ours" else who, img_size)
    if who == "plain" or (who == "ours" and _plain(name) is not None):
        plain, ours = plain_and_ours(name, img_size)
        return plain if who == "plain" else ours
    torch.manual_seed(0)
    if who in CONVERTED:
        return convert(randomize_(_create(name, img_size, drop_path_rate=0.0)), who)  # nothing random
    return _create(name if who == "ours" else who, img_size)


def _gradients(model: nn.Module, rename: Callable[[dict], dict]) -> list[Tensor]:
    """All weight gradients as one vector. Single ones may be zero but for rounding (a bias before a norm)."""
    grads = {key: p.grad.detach() for key, p in model.named_parameters()}
    return [torch.cat([g.flatten() for _, g in sorted(rename(grads).items())])]


def _workload(
    name: str,
    candidate: str,
    shape: tuple[int, int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    amp: bool,
    features: bool,
    mode: str,
) -> Workload:
    who, channels_last, compiled = parse_candidate(candidate)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = _network(name, "ours" if who in REDUCED else who, shape[-1], features).train(mode == "train")
    model = model.to(device=device, dtype=torch.float32 if amp else dtype)
    if who in REDUCED:
        model = reduce(model, who, mode)
    if channels_last:
        model = model.to(memory_format=layout)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    images = images.to(device=device, dtype=torch.float32 if amp else dtype).contiguous(memory_format=layout)
    network = torch.compile(model, dynamic=False) if compiled else model

    def under_amp(function: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(device.type, dtype=dtype):
            return function(x)

    rename = partial(_names_of_ours, name) if who == "plain" else dict
    return Workload(
        run=partial(under_amp, network) if amp else network,
        inputs=(images,),
        leaves=tuple(model.parameters()),
        gradients=lambda: _gradients(model, rename),
        eager=partial(under_amp, model) if amp else model,
        items=shape[0],
        comparable=who in ("plain", "ours", *CONVERTED),
    )


def model_case(
    name: str,
    img_size: int,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    candidates: Sequence[str] = DEFAULT_CANDIDATES,
    amp: bool = False,
    features: bool = False,
) -> Case:
    """The case of a model at one image size; ``features`` measures its feature maps instead of its logits.

    Raises:
        ValueError: If ``features`` is asked of a plain composition, which has logits only.
    """
    if features and (plain := [c for c in candidates if parse_candidate(c)[0] == "plain"]):
        raise ValueError(f"{plain[0]} has no feature maps; choose other candidates with --candidates, such as ours")
    cfg = get_pretrained_cfg(name)
    shape = (batch, cfg.input_size[0] if cfg else 3, img_size, img_size)
    return Case(
        name=name,
        shape="x".join(map(str, shape)),
        candidates=[Candidate(c, partial(_workload, name, c, shape, device, dtype, amp, features)) for c in candidates],
        unit="image",
    )
