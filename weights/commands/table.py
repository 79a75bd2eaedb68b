"""The manifest as people read it."""

import fnmatch
from collections.abc import Iterable
from typing import Any

from visionattn.weights.errors import WeightsError
from visionattn.weights.manifest import checkpoints, link, manifest

__all__ = ["COLUMNS", "cells", "find", "markdown"]

COLUMNS = ("checkpoint", "params (M)", "GMAC", "top-1", "licence", "file", "verified here")
LINKS = {"direct": "direct", "hub": "hub", "browser": "by hand", "bundled": "bundled", "none": "none published"}


def find(
    pattern: str = "*",
    family: str | None = None,
    license: str | None = None,
    task: str | None = None,
    min_params: float | None = None,
    max_params: float | None = None,
    link_kind: str | None = None,
    published: bool = False,
) -> dict[str, dict[str, Any]]:
    """Rows of the manifest by name.

    Args:
        pattern: Of the name, with ``*`` and ``?``.
        family: Table of the manifest.
        license: Of the weights.
        task: ``classify``, ``detect``, ``segment`` or ``restore``.
        min_params: Millions of parameters.
        max_params: Millions of parameters; rows of which neither limit can be told are kept.
        link_kind: How the file is had, see ``visionattn.weights.link``.
        published: Leave out models without weights.

    Raises:
        WeightsError: If ``family`` is none.
    """
    rows = checkpoints()
    families = {row["family"] for row in rows.values()}
    if family is not None and family not in families:
        raise WeightsError(f"there is no family {family!r}: choose from {', '.join(sorted(families))}")
    wanted = {}
    for name, row in rows.items():
        size, kind = row.get("params_m"), link(row)
        if (
            fnmatch.fnmatch(name, pattern)
            and family in (None, row["family"])
            and (license is None or row.get("license", "").lower() == license.lower())
            and task in (None, row.get("task", "classify"))
            and (min_params is None or size is None or size >= min_params)
            and (max_params is None or size is None or size <= max_params)
            and link_kind in (None, kind)
            and not (published and kind == "none")
        ):
            wanted[name] = row
    return wanted


def quality(row: dict[str, Any]) -> str:
    """What the authors publish of the quality, in one cell."""
    parts = []
    if "top1" in row:
        parts.append(f"{row['top1']:g}" + (f" ({row['eval']})" if "eval" in row else ""))
    for key, label in (("miou", "mIoU"), ("ap_box", "box AP"), ("ap_mask", "mask AP")):
        if key in row:
            parts.append(f"{label} {row[key]:g}")
    return ", ".join(parts) or "–"


def cells(name: str, row: dict[str, Any]) -> list[str]:
    """One line of a table, by ``COLUMNS``."""
    size, macs = (f"{row[key]:g}" if key in row else "–" for key in ("params_m", "gmacs"))
    checked = "yes" if row.get("verified") else "no" if link(row) != "none" else "–"
    return [name, size, macs, quality(row), row.get("license", "not stated"), LINKS[link(row)], checked]


def marked(name: str, row: dict[str, Any]) -> list[str]:
    """``cells`` in Markdown, with italics for what was counted here."""
    line, counted = cells(f"`{name}`", row), row.get("counted", ())
    for place, key in ((1, "params_m"), (2, "gmacs")):
        line[place] = f"*{line[place]}*" if key in counted else line[place]
    return line


def _lines(header: Iterable[str], body: Iterable[Iterable[str]]) -> list[str]:
    header = list(header)
    rows = [f"| {' | '.join(row)} |" for row in body]
    return [f"| {' | '.join(header)} |", "|" + "---|" * len(header), *rows]


def markdown() -> str:
    """``docs/weights.md``: every checkpoint of the manifest, family by family."""
    rows = checkpoints()
    text = [
        "# Published weights",
        "",
        "Written by `python -m visionattn weights table --out docs/weights.md`; do not edit. Parameters, GMAC (at the",
        "size the weights are evaluated at) and top-1 (ImageNet-1k, per cent) are the authors' numbers; parameters and",
        "GMAC that they do not say, in italics, are counted on the model here. *Verified here* says whether this",
        "project has run the published file itself; whatever says *no* is renamed by rules that are tested on the",
        "authors' parameter names and on outputs of their code, not on the file.",
        "",
        "*direct* and *hub*: `pretrained=True` downloads the file. *by hand*: the link lies behind a page that",
        "programs often cannot pass; the download is tried, and the error names the page and the one command that",
        "installs the file. *bundled*: installed with the package.",
    ]
    for family in dict.fromkeys(row["family"] for row in rows.values()):
        own = {name: row for name, row in rows.items() if row["family"] == family}
        first = next(iter(own.values()))
        source = first.get("origin_url", "")
        text += ["", f"## {family}", "", f"{first.get('paper_name', family)}. Original code: <{source}>.", ""]
        if family in manifest():
            text += _lines(COLUMNS, (marked(name, row) for name, row in own.items() if row["model"]))
        others = {name: row for name, row in own.items() if not row["model"]}
        if others:
            text += ["", "Files that belong to no model here; `visionattn weights download NAME` fetches them.", ""]
            text += _lines(
                ("file", "task", "published", "licence", "where"),
                (
                    [f"`{n}`", r.get("task", "classify"), quality(r), r.get("license", "not stated"), where(r)]
                    for n, r in others.items()
                ),
            )
    return "\n".join(text) + "\n"


def where(row: dict[str, Any]) -> str:
    """The model of timm that has the weights, or how the file is had."""
    return f"timm's `{row['timm']}`" if "timm" in row else LINKS[link(row)]
