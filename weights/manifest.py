"""The checkpoint manifest: which weights exist, where they lie and how their images are prepared."""

import tomllib
import urllib.parse
from functools import cache
from importlib import resources

__all__ = ["FACTS", "checkpoints", "link", "manifest", "models_of", "pretrained_cfgs"]

FACTS = {
    "params_m": "parameters in millions, as published or counted here",
    "gmacs": "multiply-accumulates in 10^9 at input_size, as published or counted here",
    "counted": "which of params_m and gmacs were counted here, by `visionattn weights count NAME`",
    "top1": "published accuracy in per cent, on ImageNet-1k unless `eval` names another set",
    "eval": "what top1 was measured on, if not on ImageNet-1k",
    "miou": "published mean IoU in per cent",
    "ap_box": "published box AP",
    "ap_mask": "published mask AP",
    "task": "classify (if not given), detect, segment or restore",
    "data": "what the weights were trained on, where the tag does not say it",
    "sha256": "hash of the file, published or once seen",
    "size": "bytes of the file, published or once seen",
    "link": "direct, hub, browser or bundled, where the URL does not tell",
    "by_hand": "page from which a person gets the file, where no program can",
    "timm": "model of timm that has these weights",
    "verified": "what was run on the file itself; without it nobody has, here",
}
"""Facts of a row that timm's cfg has no field for; they stay in the manifest."""

# Clouds whose links give programs a page, a question or a captcha more often than the file.
BROWSER_HOSTS = ("onedrive", "1drv", "sharepoint", "cloud.tsinghua.edu.cn", "drive.google.com", "pan.baidu.com")
TRAINED_ON = {"in22k_ft_in1k": "ImageNet-22k, then 1k", "in22k": "ImageNet-22k", "in1k": "ImageNet-1k"}


@cache
def _tables() -> dict[str, dict]:
    return tomllib.loads(resources.files(__package__).joinpath("manifest.toml").read_text(encoding="utf-8"))


@cache
def manifest() -> dict[str, dict[str, dict]]:
    """``{family: {"arch.tag": row}}``, each row completed by the family's ``defaults``."""
    return {
        family: {name: {**table.get("defaults", {}), **row} for name, row in table["models"].items()}
        for family, table in _tables().items()
        if "models" in table
    }


def models_of(family: str) -> dict[str, dict]:
    """The rows of a family's models.

    Raises:
        ValueError: If the manifest has none.
    """
    if family not in manifest():
        raise ValueError(f'weights/manifest.toml has no row [{family}.models."ARCH.TAG"]; a family needs one a model')
    return manifest()[family]


@cache
def checkpoints() -> dict[str, dict]:
    """Every row by name, with its ``family``: models by ``arch.tag``, and the ``files`` that are no model of ours."""
    rows = {}
    for family, table in _tables().items():
        for name, row in {**table.get("models", {}), **table.get("files", {})}.items():
            rows[name] = {
                "family": family,
                **table.get("defaults", {}),
                **row,
                "model": name in table.get("models", {}),
            }
            if "file" in row:
                rows[name]["file"] = _bundled(row["file"])
            if "data" not in rows[name]:
                tag = name.partition(".")[2]
                rows[name]["data"] = next((data for key, data in TRAINED_ON.items() if key in tag), None)
    return rows


def link(row: dict) -> str:
    """How a row's file is had: ``bundled``, ``direct``, ``hub`` or ``browser``; ``none`` if it is not published."""
    if "link" in row:
        return row["link"]
    if "file" in row:
        return "bundled"
    url = row.get("url", "")
    host = urllib.parse.urlsplit(url if isinstance(url, str) else url[0]).hostname or ""
    if row.get("hf_hub_id") or host == "huggingface.co":
        return "hub"
    if any(name in host for name in BROWSER_HOSTS) or (not url and row.get("by_hand")):
        return "browser"
    return "direct" if url else "none"


def _bundled(name: str) -> str:
    """The path of a file that is installed with this package."""
    return str(resources.files(__package__).joinpath(name))


def pretrained_cfgs(family: str, **common) -> dict[str, dict]:
    """A family's rows in the form of timm's ``generate_default_cfgs``.

    Args:
        family: Table of the manifest.
        common: Fields of every cfg that belong to the code, such as ``first_conv`` and ``classifier``.
    """
    cfgs = {}
    for name, row in models_of(family).items():
        fields = {key: tuple(v) if isinstance(v, list) else v for key, v in row.items() if key not in FACTS}
        if "file" in fields:
            fields["file"] = _bundled(fields["file"])
        cfgs[name] = fields | common
    return cfgs
