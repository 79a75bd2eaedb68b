"""``visionattn weights list|show|download|verify|translate|add|push|count|table``, and ``visionattn tune``.

What needs PyTorch is imported by the command that does: the list is there in a moment.
"""

import inspect
import sys
from pathlib import Path
from typing import Literal

from visionattn.errors import amount, one_line
from visionattn.tune import TuneError, tune
from visionattn.weights import checkpoints, link
from visionattn.weights.commands.table import COLUMNS, cells, find, markdown
from visionattn.weights.errors import WeightsError
from visionattn.weights.options import settings
from visionattn.weights.places import added_file

Task = Literal["classify", "detect", "segment", "restore"]
Kind = Literal["direct", "hub", "browser", "bundled", "none"]


def show_list(
    pattern: str = "*",
    family: str | None = None,
    license: str | None = None,
    task: Task | None = None,
    min_params: float | None = None,
    max_params: float | None = None,
    link: Kind | None = None,
    here: bool = False,
    added: bool = True,
) -> None:
    """List checkpoints.

    Args:
        pattern: Only names like this one, with * and ?.
        family: Only this family.
        license: Only weights with this licence, such as mit.
        task: Only checkpoints for this task.
        min_params: Leave out models of fewer million parameters.
        max_params: Leave out models of more million parameters.
        link: Only files that are had in this way.
        here: Only files that are on this machine.
        added: Also list the tags that were added by hand.
    """
    rows = find(pattern, family, license, task, min_params, max_params, link)
    if here:
        from visionattn.weights.locate import weights_file

        rows = {name: row for name, row in rows.items() if weights_file(name, download=False)}
    lines = [cells(name, row) for name, row in rows.items()]
    if added and not any((family, license, task, min_params, max_params, link)):
        new = sorted(path.stem for path in added_file("x.y").parent.glob("*.safetensors"))
        lines += [[n, "–", "–", "–", "–", "added", "–"] for n in new if n not in rows and Path(n).match(pattern)]
    print_table(COLUMNS, lines)
    print(f"{len(lines)} checkpoints")


def show(name: str) -> None:
    """Show everything that is known about one checkpoint.

    Args:
        name: As the list has it, such as van_b0.in1k.
    """
    from visionattn.weights.locate import weights_file

    if name not in checkpoints():
        raise WeightsError(f"no checkpoint is called {name}: visionattn weights list shows all names")
    row = checkpoints()[name]
    file = weights_file(name, download=False)
    facts = {**{k: v for k, v in row.items() if v is not None and k != "model"}, "link": link(row)}
    facts["verified"] = row.get("verified", "not verified here")
    facts["on this machine"] = f"{file} ({amount(file.stat().st_size)})" if file else "no"
    width = max(map(len, facts))
    for key, value in facts.items():
        print(f"{key:<{width}}  {', '.join(map(str, value)) if isinstance(value, list) else value}")


def download(names: list[str], mirror: str | None = None) -> None:
    """Download checkpoints into the cache.

    Args:
        names: As the list has them; * and ? stand for anything.
        mirror: Folder or URL to try first.
    """
    from visionattn.weights.locate import weights_file

    if mirror is not None:
        settings.mirror = mirror
    for pattern in names:
        matching = list(find(pattern, published=True)) if any(c in pattern for c in "*?") else [pattern]
        if not matching:
            raise WeightsError(f"no checkpoint is like {pattern}: visionattn weights list shows all names")
        for name in matching:
            print(f"{name}  {weights_file(name)}")


def verify(names: list[str], forward: bool = True) -> None:
    """Hash files again and run their models once; ends with status 1 if one fails.

    Args:
        names: As the list has them; * and ? stand for anything, of which those on this machine are verified.
        forward: Also load the weights and run one image.
    """
    from visionattn.weights.commands.verify import verify as verify_file
    from visionattn.weights.locate import weights_file

    failed = False
    for pattern in names:
        wild = any(c in pattern for c in "*?")
        matching = [n for n in find(pattern, published=True) if weights_file(n, download=False)] if wild else [pattern]
        for name in matching:
            result = verify_file(name, forward)
            failed |= "hash" not in result or any("DIFFERS" in v or "FAILED" in v for v in result.values())
            print("\n  ".join([name, *(f"{key}: {value}" for key, value in result.items())]))
        if not matching:
            raise WeightsError(
                f"nothing to verify: no file on this machine is like {pattern}; visionattn weights list --here"
            )
    if failed:
        sys.exit(1)


def translate(source: str, target: str, model: str | None = None) -> None:
    """Write a checkpoint of the authors as safetensors under our names.

    Args:
        source: The authors' file.
        target: File to write, *.safetensors.
        model: Which model it is of, if its tensors do not tell.
    """
    from visionattn.weights.commands.translate import translate as translate_file

    print("\n".join(translate_file(source, target, model).lines()))
    print(f"wrote {target}")


def add(name: str, file: str) -> None:
    """Make a local file the weights of a model, for timm.create_model(NAME, pretrained=True).

    Args:
        name: Model and tag, such as van_b0.in1k or van_b0.mine.
        file: A checkpoint, such as one saved from a browser.
    """
    from visionattn.weights.commands.translate import add as add_file

    print("\n".join(add_file(name, file).lines()))
    print(f'next: timm.create_model("{name}", pretrained=True)')


def push(
    checkpoint: str,
    out: str,
    repo: str | None = None,
    weights: Literal["ema", "raw"] = "ema",
    license: str = "apache-2.0",
    private: bool = False,
) -> None:
    """Write a run's checkpoint as a folder that timm opens, and upload it if a repository is named.

    Args:
        checkpoint: A .ckpt of train.py.
        out: Folder to write.
        repo: Repository on the Hugging Face hub, USER/NAME.
        weights: The averaged weights, which were validated, or the raw ones.
        license: Of the weights.
        private: Make a new repository private.
    """
    from visionattn.weights.commands.publish import push as push_checkpoint

    folder = push_checkpoint(checkpoint, out, repo, weights, license, private)
    source = f"hf-hub:{repo}" if repo else f"local-dir:{folder}"
    print(f'wrote {folder}\nnext: timm.create_model("{source}", pretrained=True)')


def count(names: list[str]) -> None:
    """Count parameters and multiply-accumulates of models.

    Args:
        names: As the list has them; * and ? stand for anything.
    """
    from visionattn.weights.commands.count import count as count_model

    for pattern in names:
        matching = list(find(pattern)) if any(c in pattern for c in "*?") else [pattern]
        for name in matching:
            print(name, *(f"{key} = {value:g}" for key, value in count_model(name).items()), sep="  ")


def table(out: str | None = None) -> None:
    """Print the manifest as Markdown.

    Args:
        out: File to write instead.
    """
    if out is None:
        print(markdown(), end="")
    else:
        try:
            Path(out).write_text(markdown(), encoding="utf-8")
        except OSError as error:
            raise WeightsError(f"cannot write {out} ({one_line(error)}): choose another file") from error
        print(f"wrote {out}")


COMMANDS = {"list": show_list, **{f.__name__: f for f in (show, download, verify, translate, add, push, count, table)}}
OLD_NAMES = {"convert": "translate"}  # scripts may have them; convert means surgery on a model elsewhere
# Positional arguments that are not one required value each.
POSITIONAL = {
    "names": dict(nargs="+", type=str, help="Checkpoints, as the list has them; * and ? for anything."),
    "pattern": dict(nargs="?", type=str, default="*", help="Checkpoints, as the list has them; * and ? for anything."),
    "models": dict(nargs="*", type=str, default=[], help="Names that timm knows; none: show what is known."),
}


def make_parser():
    """The command line, from the signatures and docstrings of the functions above."""
    from jsonargparse import ArgumentParser

    class Parser(ArgumentParser):
        def error(self, message, ex=None):
            sys.exit(f"error: {one_line(message)}. The option --help lists what is accepted")

    def add(commands, name, function):
        summary = function.__doc__.split("\n")[0]
        parser = Parser(description=summary)
        own = [key for key in POSITIONAL if key in inspect.signature(function).parameters]
        for key in own:
            parser.add_argument(key, **POSITIONAL[key])
        parser.add_function_arguments(function, as_group=False, as_positional=True, skip=set(own))
        aliases = [old for old, new in OLD_NAMES.items() if new == name]
        commands.add_subcommand(name, parser, help=summary, aliases=aliases)

    top = Parser(prog="visionattn", description="Efficient-attention vision backbones.")
    weights = Parser(description="Find, download, verify, translate and publish weights.")
    groups = top.add_subcommands()
    groups.add_subcommand("weights", weights, help="Find, download, verify, translate, publish weights.")
    commands = weights.add_subcommands()
    for name, function in COMMANDS.items():
        add(commands, name, function)
    add(groups, "tune", tune)
    return top


def print_table(header: tuple[str, ...], lines: list[list[str]]) -> None:
    """With rich where it is installed and the screen shows it, in plain columns otherwise."""
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        Console = None
    if Console is not None and sys.stdout.isatty():
        view = Table(*header)
        for line in lines:
            view.add_row(*line)
        return Console().print(view)
    widths = [max(len(line[i]) for line in [list(header), *lines]) for i in range(len(header))]
    for line in [list(header), *lines]:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def main(args: list[str] | None = None) -> None:
    """Run one command and end with a one-line error if the user can fix it."""
    try:
        parser = make_parser()
    except ImportError:
        sys.exit("error: the command line needs jsonargparse: pip install 'visionattn[cli]'")
    config = parser.parse_args(args)
    group = config["subcommand"]
    command = config[group].get("subcommand")
    try:
        if group == "tune":
            tune(**config[group].as_dict())
        else:
            COMMANDS[OLD_NAMES.get(command, command)](**config[group][command].as_dict())
    except (WeightsError, TuneError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
