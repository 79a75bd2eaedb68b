"""From a file of the authors to a safetensors file with our names, completely or not at all."""

import math
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import timm
from timm.data import resolve_data_config
from timm.models import get_pretrained_cfg, split_model_name_tag
from torch import Tensor, nn

import visionattn
from visionattn.errors import some
from visionattn.weights import checkpoints
from visionattn.weights.download import sha256_of
from visionattn.weights.errors import WeightsError
from visionattn.weights.export import write_weights
from visionattn.weights.families import release_filter
from visionattn.weights.load import classifiers, unusable
from visionattn.weights.locate import added_file, cache_name, first_url
from visionattn.weights.read import fitting_weights

__all__ = ["Translation", "add", "detect", "shadow", "translate", "translated"]


@dataclass
class Translation:
    """A file under our names, and what became of its tensors.

    Args:
        name: Registered model, with the tag if one was given.
        state: Parameters by our names.
        num_classes: Classes of the classifier in the file; 0 if there is none.
        missing: Parameters of the model that the file does not give, apart from a classifier that it does not have.
        unexpected: Parameters that the model does not have.
        reshaped: Parameters whose shape is none of the file's, such as interpolated tables.
        left_out: Tensors of the file that are not in ``state`` as they were: dropped, or rewritten.
        stripped: Nests and prefixes of the file that other trainings leave.
    """

    name: str
    state: dict[str, Tensor]
    num_classes: int
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reshaped: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    stripped: str = ""

    @property
    def fits(self) -> bool:
        """Whether the model is complete with it."""
        return not self.missing and not self.unexpected

    def lines(self) -> list[str]:
        """A report, one line a fact."""
        classes = f"a classifier of {self.num_classes} classes" if self.num_classes else "no classifier"
        lines = [f"{self.name}: {len(self.state)} tensors, {classes}"]
        lines += [f"stripped: {self.stripped}"] if self.stripped else []
        for label in ("missing", "unexpected", "reshaped", "left_out"):
            if names := getattr(self, label):
                lines.append(f"{label.replace('_', ' ')}: {len(names)} ({some(names)})")
        return lines


@cache
def shadow(name: str) -> nn.Module:
    """A registered model without storage."""
    return timm.create_model(name, device="meta")


def translated(name: str, state: dict[str, Tensor]) -> Translation:
    """``state`` as the registered model ``name`` takes it.

    Args:
        name: Registered model, without a tag.
        state: Tensors under the authors' names or ours.
    """
    model = shadow(name)
    result = release_filter(name)(dict(state), model)
    own = model.state_dict()
    heads = tuple(f"{head}." for head in classifiers(model.pretrained_cfg))
    weights = [result[f"{head}weight"] for head in heads if f"{head}weight" in result]
    shapes = Counter(tuple(value.shape) for value in state.values())
    reshaped = [key for key, value in result.items() if not shapes[tuple(value.shape)]]
    # Of a classifier, any number of classes will do.
    start = {key: 1 if heads and key.startswith(heads) else 0 for key in own}
    wrong = {k for k in own.keys() & result.keys() if own[k].shape[start[k] :] != result[k].shape[start[k] :]}
    kept = {id(value) for value in result.values()}
    counted = [key for key in own if not key.endswith("num_batches_tracked")]
    optional = () if weights or not heads else heads
    return Translation(
        name=name,
        state=result,
        num_classes=len(weights[0]) if weights else 0,
        missing=[k for k in counted if k in wrong or (k not in result and not (optional and k.startswith(optional)))],
        unexpected=[key for key in result if key not in own],
        reshaped=reshaped,
        left_out=[key for key, value in state.items() if id(value) not in kept],
    )


def detect(state: dict[str, Tensor], file_name: str = "") -> str:
    """The registered model that ``state`` completes.

    Args:
        state: Tensors under the authors' names or ours.
        file_name: Decides between models whose parameters do not tell them apart.

    Raises:
        WeightsError: If none fits, naming the nearest, or if several do.
    """
    shadow = {key: value.to("meta") for key, value in state.items()}
    count = sum(value.numel() for value in state.values())
    rows = {name.partition(".")[0]: row for name, row in checkpoints().items()}
    fitting, nearest, gap = [], None, math.inf
    for name in visionattn.list_models():
        published = rows.get(name, {}).get("params_m")
        if published and not 0.5 < published * 1e6 / max(count, 1) < 2.0:
            continue
        try:
            result = translated(name, shadow)
        except Exception:  # the rules of another family may not survive these names and shapes
            continue
        if result.fits:
            fitting.append((len(result.reshaped), name))
        elif len(result.missing) + len(result.unexpected) < gap:
            nearest, gap = result, len(result.missing) + len(result.unexpected)
    if not fitting:
        detail = f": the nearest is {'; '.join(nearest.lines())}" if nearest and gap < len(state) else ""
        raise WeightsError(f"no model of ours has these {len(state)} tensors{detail}")
    names = [name for reshaped, name in fitting if reshaped == min(fitting)[0]]
    if len(names) > 1:
        links = {name: first_url(row) for name, row in checkpoints().items()}
        known = {name.partition(".")[0] for name, url in links.items() if url and cache_name(url, name) == file_name}
        hinted = [name for name in names if name in known] or [name for name in names if name in file_name]
        names = sorted(hinted, key=len)[-1:] or names
    if len(names) > 1:
        raise WeightsError(f"these weights fit {', '.join(names)} alike: say which they are with --model")
    return names[0]


def translate(source: str | Path, target: str | Path | None = None, model: str | None = None) -> Translation:
    """Read a checkpoint, rename its tensors, and write them as safetensors.

    Args:
        source: A checkpoint of the authors or of a run of ours.
        target: File to write, ``*.safetensors``; None to look only.
        model: Registered model, with or without a tag; found from the tensors if not given.

    Returns:
        The report.

    Raises:
        WeightsError: If the file is not read, fits no model, or fits ``model`` in part only; nothing is written then.
    """
    if target is not None and Path(target).suffix != ".safetensors":
        raise WeightsError(f"cannot write {target}: choose a name that ends in .safetensors")
    arch = None if model is None else split_model_name_tag(model)[0]
    if arch is not None and arch not in visionattn.list_models():
        raise WeightsError(f"{arch} is no model of ours: visionattn.list_models() names them")
    known, refused = {}, []

    def fits(state: dict[str, Tensor]) -> bool:
        try:
            known[id(state)] = arch or detect(state, Path(source).name)
            return arch is None or translated(arch, state).fits
        except Exception as error:  # rules meet the names and shapes of another model
            refused.append(error)
            return False

    state, stripped = fitting_weights(source, fits)
    if arch is None and id(state) not in known:
        raise refused[0]
    model = known[id(state)] if model is None else model
    arch, _ = split_model_name_tag(model)
    result = translated(arch, state)
    result.name, result.stripped = model, stripped
    if not result.fits:
        raise WeightsError(f"{source} does not fit {arch} completely: {'; '.join(result.lines())}. Nothing was written")
    if broken := unusable(result.state, shadow(arch).state_dict()):
        raise WeightsError(f"{source} is damaged, or no weights: {some(broken)}. Nothing was written")
    if target is not None:
        known = get_pretrained_cfg(arch if model not in checkpoints() else model)
        preprocess = resolve_data_config(pretrained_cfg=known.to_dict())
        card = dict(name=arch, model_args={}, num_classes=result.num_classes, class_names=[], preprocess=preprocess)
        write_weights(result.state, target, card | {"source_sha256": sha256_of(source)})
    return result


def add(name: str, file: str | Path) -> Translation:
    """Make a local file the weights of ``name``, so that ``timm.create_model(name, pretrained=True)`` loads them.

    Args:
        name: ``arch.tag``; a tag of the manifest, or a new one.
        file: A checkpoint; it is translated and kept beside the downloads.

    Raises:
        WeightsError: If the name has no tag, the file is not the published one, or it does not fit.
    """
    arch, tag = split_model_name_tag(name)
    if not tag:
        raise WeightsError(f"{name} has no tag: call it {arch}.TAG, with a tag of the manifest or a new one")
    expected = checkpoints().get(name, {}).get("sha256")
    if expected and Path(file).is_file() and (digest := sha256_of(file)) != expected:
        raise WeightsError(f"{file} has SHA-256 {digest}, the published {name} has {expected}: use another tag")
    return translate(file, added_file(name), name)
