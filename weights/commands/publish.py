"""A trained checkpoint as a folder or a repository that ``timm.create_model`` opens."""

import csv
import json
import tempfile
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.models import save_for_hf

import visionattn
from visionattn.errors import one_line, some
from visionattn.weights.card import build, complete, read_card, run_settings
from visionattn.weights.errors import WeightsError
from visionattn.weights.export import share
from visionattn.weights.load import refuse_unusable
from visionattn.weights.read import PREFIX, bare, read_checkpoint

__all__ = ["push"]


def push(
    checkpoint: str,
    out: str,
    repo: str | None = None,
    weights: Literal["ema", "raw"] = "ema",
    license: str = "apache-2.0",
    private: bool = False,
) -> Path:
    """Write a run's checkpoint as a folder that timm opens, and upload it if a repository is named.

    Args:
        checkpoint: A ``.ckpt`` of ``train.py``.
        out: Folder to write: ``config.json``, ``model.safetensors`` and ``README.md``.
        repo: Repository on the Hugging Face hub, ``USER/NAME``, created if need be.
        weights: ``ema`` for what was validated (the average, where the run kept one), ``raw`` for the last step's.
        license: Of the weights.
        private: Make a new repository private.

    Returns:
        The folder. ``timm.create_model("local-dir:FOLDER", pretrained=True)`` opens it.

    Raises:
        WeightsError: If the checkpoint is not one of a run, or has no such weights.
    """
    content = read_checkpoint(checkpoint)
    card = read_card(checkpoint)
    state = chosen(content, weights, checkpoint)
    complete(card, "class_names", "preprocess")
    if card.get("task"):
        raise WeightsError(f"{checkpoint} is of the task {card['task']}, and timm opens classifiers: export it instead")
    net = build(card)
    own = net.state_dict()
    if wrong := [key for key in own.keys() | state.keys() if key not in own or key not in state]:
        raise WeightsError(f"{checkpoint} does not hold the {card['name']} that it describes: {some(sorted(wrong))}")
    if wrong := [key for key in own if own[key].shape != state[key].shape]:
        raise WeightsError(f"{checkpoint} does not hold the {card['name']} that it describes: {some(wrong)}")
    refuse_unusable(checkpoint, state, own)
    net.load_state_dict(state)
    preprocess, names = dict(card["preprocess"]), [str(name) for name in card["class_names"]]
    measured = metrics(content, Path(checkpoint))
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise WeightsError(f"cannot write {out}: it is a file; choose a folder")
    net.pretrained_cfg |= dict(license=license, tag=None) | {
        key: tuple(value) if isinstance(value, list) else value for key, value in preprocess.items()
    }
    for key in ("description", "notes"):  # of other weights
        net.pretrained_cfg.pop(key, None)
    config = dict(label_names=names, num_classes=card["num_classes"])
    title = folder.name if repo is None else repo.split("/")[-1]
    settings = training_settings(content, Path(checkpoint))
    text = readme(title, card, measured, settings, license, weights, repo)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as made:
            save_for_hf(
                net, made, config, model_args=card["model_args"], safe_serialization=True, data_config=preprocess
            )
            Path(made, "README.md").write_text(text, encoding="utf-8")
            folder.mkdir(exist_ok=True)
            for file in Path(made).iterdir():
                share(file)
                file.replace(folder / file.name)
    except OSError as error:
        raise WeightsError(f"cannot write {out} ({one_line(error)}): free some space, or choose another") from error
    if repo is not None:
        upload(folder, repo, private)
    return folder


def chosen(content: dict[str, Any], weights: str, checkpoint: str) -> dict[str, torch.Tensor]:
    """The averaged or the raw weights of a Lightning checkpoint, by the bare model's names."""
    averaged = "current_model_state" in content
    state = content.get("current_model_state" if averaged and weights == "raw" else "state_dict")
    if not isinstance(state, dict) or not any(key.startswith(PREFIX) for key in state):
        raise WeightsError(f"{checkpoint} is no checkpoint of a run of train.py: it holds {some(content)}")
    return bare(state)


def metrics(content: dict[str, Any], checkpoint: Path) -> dict[str, float]:
    """Validation metrics of the epoch that the checkpoint is of, from the log beside it."""
    log = checkpoint.parent.parent / "metrics.csv"
    found: dict[str, float] = {}
    if log.is_file():
        with open(log, newline="", encoding="utf-8") as file:
            # Lightning counts the epochs that are done after the last step, and the present one before.
            rows = [row for row in csv.DictReader(file) if row.get("epoch") == str(content.get("epoch"))]
        for row in rows:
            found |= {key: float(value) for key, value in row.items() if value and key.startswith(("val/", "test/"))}
    return found


def training_settings(content: dict[str, Any], checkpoint: Path) -> str:
    """The run's configuration: the file beside the checkpoint, or what the checkpoint itself says."""
    config = checkpoint.parent.parent / "config.yaml"
    if config.is_file():
        return config.read_text(encoding="utf-8").strip()
    return json.dumps(run_settings(content, str(checkpoint)), indent=2)


def readme(
    title: str,
    card: dict[str, Any],
    measured: dict[str, float],
    settings: str,
    license: str,
    weights: str,
    repo: str | None,
) -> str:
    """The model card."""
    source = f"hf-hub:{repo}" if repo else "local-dir:FOLDER"
    preprocess = "\n".join(f"- {key}: {value}" for key, value in card["preprocess"].items())
    table = "\n".join(f"| {key} | {value:.4g} |" for key, value in measured.items())
    table = f"| metric | value |\n|---|---|\n{table}" if measured else "No metrics were found beside the checkpoint."
    which = "averaged over the last steps where the run kept an average" if weights == "ema" else "of the last step"
    return f"""---
license: {license}
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- timm
- visionattn
---
# {title}

`{card["name"]}` with {card["num_classes"]} classes ({some(card["class_names"], 10)}), trained with visionattn
{visionattn.__version__}, PyTorch {torch.__version__} and timm {timm.__version__}. The weights are those {which}.

## Use

```python
import timm, visionattn

model = timm.create_model("{source}", pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
```

## Metrics

{table}

## Images

{preprocess}

## Training

```yaml
{settings}
```
"""


def upload(folder: Path, repo: str, private: bool) -> None:
    """Bring the folder to the hub, with the token that huggingface_hub finds."""
    from huggingface_hub import HfApi

    api = HfApi(library_name="visionattn", library_version=visionattn.__version__)
    try:
        name = api.create_repo(repo, private=private, exist_ok=True).repo_id
        api.upload_folder(repo_id=name, folder_path=str(folder), commit_message="Add model")
    except Exception as error:  # of the network, the token or the name
        raise WeightsError(f"{folder} is written, but cannot be uploaded to {repo}: {error}") from error
