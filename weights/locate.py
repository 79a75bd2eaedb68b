"""From a model's name to a file on this machine."""

import urllib.parse
from pathlib import Path
from typing import Any

import huggingface_hub

from visionattn.errors import amount
from visionattn.weights.download import LARGEST, fetch
from visionattn.weights.errors import WeightsError
from visionattn.weights.manifest import checkpoints, link
from visionattn.weights.options import settings
from visionattn.weights.places import added_file, inside
from visionattn.weights.read import read_weights
from visionattn.weights.seen import check_seen

__all__ = ["added_file", "cache_name", "locate", "weights_file"]

SUFFIXES = (".safetensors", ".pth.tar", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".npz")
HUB = "https://huggingface.co/"


def cache_name(url: str, name: str) -> str:
    """The file name of a download: that of the URL, as torch and timm do it, where it tells files apart."""
    last = urllib.parse.unquote(urllib.parse.urlsplit(url).path.rpartition("/")[2])
    suffix = next((suffix for suffix in SUFFIXES if last.endswith(suffix)), "")
    same = {other for row in checkpoints().values() if (other := first_url(row)) and other.endswith("/" + last)}
    return last if suffix and len(same | {url}) == 1 else f"{name}{suffix or '.pth'}"


def first_url(row: dict[str, Any]) -> str | None:
    """The URL of a row or cfg; timm allows a pair of URL and file name there."""
    url = row.get("url")
    return url[0] if isinstance(url, (list, tuple)) else url


def by_hand(name: str, row: dict[str, Any]) -> str:
    """How a person gets weights that no program can."""
    page = row.get("by_hand") or first_url(row)
    return f"open {page} in a browser, save the file, then run: visionattn weights add {name} FILE"


def locate(name: str, row: dict[str, Any], cache_dir: str | Path | None = None, download: bool = True) -> Path | None:
    """The file that a manifest row or a timm cfg points to, downloaded if need be.

    Args:
        name: ``arch.tag``, for the file name and the messages.
        row: Has ``url`` or ``file``; a row of the manifest may add ``sha256``, ``size`` and ``by_hand``.
        cache_dir: Folder of the downloads, if not the one of the settings.
        download: Fetch it; otherwise only look.

    Returns:
        The file, None if ``download`` is false and it is not there.

    Raises:
        WeightsError: If there is no file to be had, with the way to get it by hand where there is one.
    """
    if file := row.get("file"):
        if Path(file).is_file():
            return Path(file)
        raise WeightsError(f"there is no file {file} for {name}")
    url = first_url(row)
    if url is None:
        if not download:
            return None
        if row.get("by_hand"):
            raise WeightsError(f"the weights of {name} cannot be downloaded by a program: {by_hand(name, row)}")
        raise WeightsError(f"no weights of {name} are published: build it with pretrained=False, or train it")
    published = next((r for r in checkpoints().values() if first_url(r) == url), {})
    given = row["url"][1] if isinstance(row["url"], (list, tuple)) else None
    target = inside(Path(cache_dir or settings.folder()), given or cache_name(url, name))
    sha256, size = published.get("sha256") or digits_in(target.name), published.get("size")
    if target.exists():
        if size is not None and target.stat().st_size != size:
            found = amount(target.stat().st_size)
            raise WeightsError(f"{target} has {found} instead of {amount(size)}: remove it to download it again")
        check_seen(target)
        return target
    if cached := in_hub_cache(url):
        return cached
    if not download:
        return None
    places = [mirrored(place, url, target.name) for place in settings.mirrors()]
    endpoint = huggingface_hub.constants.ENDPOINT.rstrip("/") + "/"
    places.append(endpoint + url.removeprefix(HUB) if url.startswith(HUB) else url)
    try:
        readable = read_weights if published.get("model", True) else None
        return fetch(places, target, sha256, size, readable, sane_size(published))
    except WeightsError as error:
        known = {**published, **row}
        if not published or (settings.is_offline() and link(known) != "browser"):
            raise
        raise WeightsError(f"{error}. To get it by hand, {by_hand(name, known)}") from error


def sane_size(row: dict[str, Any]) -> int:
    """Bytes that a checkpoint has at most: four numbers a parameter, with its average and the optimizer's two."""
    return int(row["params_m"] * 1e6 * 16) + (1 << 28) if row.get("model") and "params_m" in row else LARGEST


def weights_file(name: str, download: bool = True) -> Path | None:
    """The file of a checkpoint of the manifest, ``arch.tag``, or one that was added by hand.

    Raises:
        WeightsError: If there is no such checkpoint, or its file cannot be had.
    """
    if added_file(name).is_file():
        return added_file(name)
    if name not in checkpoints():
        raise WeightsError(f"no checkpoint is called {name}: visionattn weights list shows all names")
    return locate(name, checkpoints()[name], download=download)


def mirrored(place: str, url: str, name: str) -> str:
    """Where a mirror has the file of ``url``."""
    if "://" not in place:
        place = Path(place).expanduser().absolute().as_uri().replace("%7B", "{").replace("%7D", "}")
    path = urllib.parse.urlsplit(url).path.lstrip("/")
    if "{" in place:
        return place.replace("{name}", urllib.parse.quote(name)).replace("{path}", path).replace("{url}", url)
    return f"{place.rstrip('/')}/{urllib.parse.quote(name)}"


def in_hub_cache(url: str) -> Path | None:
    """The file of a Hugging Face URL, if huggingface_hub has fetched it before."""
    parts = url.removeprefix(HUB).split("/", 4)
    if not url.startswith(HUB) or len(parts) != 5 or parts[2] != "resolve":
        return None
    found = huggingface_hub.try_to_load_from_cache("/".join(parts[:2]), parts[4], revision=parts[3])
    return Path(found) if isinstance(found, str) else None


def digits_in(name: str) -> str | None:
    """The first digits of the hash that torch's file names carry, as in ``model-cd65a155.pth``."""
    digits = name.split(".")[0].rpartition("-")[2]
    return digits if "-" in name and len(digits) >= 8 and set(digits) <= set("0123456789abcdef") else None
