"""The command line of ``train.py``: Lightning's, with one-line errors and no silent choices."""

import importlib.resources
import itertools
import logging
import math
import os
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
import yaml
from jsonargparse import Namespace
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.strategies.launchers.subprocess_script import _ChildProcessObserver
from lightning.pytorch.callbacks import (
    LearningRateMonitor,
    ModelCheckpoint,
    ProgressBar,
    ThroughputMonitor,
    WeightAveraging,
)
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

import visionattn  # noqa: F401  (registers our models)
import visionattn.train.data  # noqa: F401  (the short names of its classes work on the command line)
from visionattn.errors import UserError, one_line, some
from visionattn.train.callbacks import ExportWeights, Pictures, best_checkpoint, check_disk
from visionattn.train.classify import Classification
from visionattn.train.data.base import Data
from visionattn.train.dense.detect import Detection
from visionattn.train.dense.segment import Segmentation
from visionattn.train.failures import LostProcess, explained
from visionattn.train.predict import add_arguments, predict
from visionattn.train.processes import Voice, is_child
from visionattn.train.progress import EpochLines, RunBar
from visionattn.train.saving import SafeIO, newest, readable
from visionattn.train.stopping import Interrupted, StopOnSignal, signals_taken, stopper
from visionattn.train.summary import Summary
from visionattn.train.task import Task
from visionattn.weights.card import CARD, ELSEWHERE, checked, run_settings
from visionattn.weights.read import local_file, read_checkpoint

DEFAULTS = importlib.resources.files("visionattn.configs") / "trainer" / "default.yaml"
"""What every run starts from; ``-c`` files and flags override it."""

# What only training needs: Lightning would warn that their state is not restored, or they write into the run's folder.
FIT_ONLY = (ModelCheckpoint, WeightAveraging, ThroughputMonitor, ExportWeights, LearningRateMonitor, Pictures, Summary)
# Settings that a checkpoint leaves open: they change how a run computes, not what.
FREE_ON_RESUME = {"pretrained", "weights", "reset_head", "compile", "channels_last"}
# What the weights were made for.
ARCHITECTURE = {"name", "model_args", "backbone_args", "head", "head_args", "detector", "detector_args"}
# By what a checkpoint says about itself.
TASKS = {None: Classification, "segment": Segmentation, "detect": Detection}

# Of the trainer's settings that Lightning takes as they are.
LEAST = {
    "gradient_clip_val": 0,
    "max_epochs": -1,
    "max_steps": -1,
    "check_val_every_n_epoch": 1,
    "accumulate_grad_batches": 1,
}

_terminate_all = _ChildProcessObserver._terminate_all


class Parser(LightningArgumentParser):
    """Ends with the one line that says what is wrong, instead of the usage text before it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, allow_abbrev=False, **kwargs)  # a misspelt flag is an error, not another flag

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        sys.stderr.write(f"error: {shortened(message)}\n")
        self.exit(2)


class CLI(LightningCLI):
    """``fit``, ``validate``, ``test`` on a configured task and data set, and ``predict`` from a checkpoint alone."""

    def __init__(self, args: list[str] | None = None) -> None:
        self.arguments = sys.argv[1:] if args is None else args
        super().__init__(
            model_class=Task,
            datamodule_class=Data,
            subclass_mode_model=True,
            subclass_mode_data=True,
            parser_class=Parser,
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_kwargs={"overwrite": True},
            parser_kwargs={name: {"default_config_files": [str(DEFAULTS)]} for name in ("fit", "validate", "test")},
            args=args,
        )

    # Arguments

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument(
            "--out", type=str | None, default=None, help="Folder of the run; runs/MODEL-1, -2, ... if not given."
        )
        parser.set_defaults({"model": {"class_path": class_path(Classification)}})
        parser.link_arguments("model.init_args.name", "data.init_args.model")
        parser.link_arguments("data.num_classes", "model.init_args.num_classes", apply_on="instantiate")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        if subcommand != "predict":
            return super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser = self.init_parser(
            description="Predict on image files with a trained model, or classify with a published one."
        )
        self._subcommand_method_arguments[subcommand] = add_arguments(parser)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        check_files(self.arguments)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "LightningCLI's args parameter")
            super().parse_arguments(parser, args)

    def _parse_ckpt_path(self) -> None:
        """Fill in from the checkpoint what was not asked for, and refuse to contradict it."""
        subcommand = self.config["subcommand"]
        config = self.config[subcommand]
        path = config.get("ckpt_path")
        if not path:
            return
        self.checkpoint = self._read(path, subcommand)
        path = config["ckpt_path"]
        if self.checkpoint.get(CARD) is not None:
            self.checkpoint[CARD] = checked(self.checkpoint[CARD], path)
        trained = run_settings(self.checkpoint, path)
        trained.pop("num_classes", None)  # follows from the data
        task = class_path(TASKS[(self.checkpoint.get(CARD) or {}).get("task")])
        typed = self.parser.parse_args(self._typed(subcommand, config, task), defaults=False)[subcommand]
        if typed.model.class_path != task:
            raise UserError(f"{path} is of {task}: leave --model out, or name this one")
        place = self.arguments.index(subcommand) + 1
        given = [*self.arguments[:place], f"--model={task}", *self.arguments[place:]]
        given = self.parser.parse_args(given, defaults=False)[subcommand].model
        given = dict(given.get("init_args") or {}) if given.class_path == task else {}
        config["model"]["class_path"] = task
        asked, asked_data = (dict(typed.get(f"{part}.init_args") or {}) for part in ("model", "data"))
        if str(trained.get("name", "")).startswith(ELSEWHERE) and asked.get("name") != trained["name"]:
            raise UserError(
                f"{path} looks for its model at {trained['name']}, which only you may: if you trust that place, add "
                f"--model.name {trained['name']}"
            )
        binding = trained.keys() - FREE_ON_RESUME if subcommand == "fit" else ARCHITECTURE & trained.keys()
        differ = [k for k in asked if k in binding and asked[k] != trained[k]]
        if differ:
            differences = some((f"model.{key} is {asked[key]!r}, was {trained[key]!r}" for key in differ), 5)
            raise UserError(
                f"{path} was trained with other settings: {differences}. Leave them out to go on with that model, or "
                f"start a new run from its weights: --model.weights {path} instead of --ckpt_path"
            )
        # A configuration under the checkpoint is that of the training, on which flags may have been put.
        if other := [
            f"model.{k} {given[k]!r}" for k in given if k in binding - asked.keys() and given[k] != trained[k]
        ]:
            rank_zero_only(print)(f"{path} has the last word; the files say otherwise: {some(other, 5)}")
        free = {k: v for k, v in given.items() if k in FREE_ON_RESUME}
        fresh = {"weights": None, "pretrained": False, "reset_head": False}  # the checkpoint has the weights
        config["model"]["init_args"] = Namespace(**(trained | free | asked | fresh))
        if (data := config.get("data.init_args")) and (card := self.checkpoint.get(CARD)):
            known = card["preprocess"] | {"model": card["name"], "img_size": card["preprocess"]["input_size"][-1]}
            data.update(Namespace(**{k: v for k, v in known.items() if k in data and k not in asked_data}))

    def _read(self, path: str, subcommand: str) -> dict[str, Any]:
        """The checkpoint to go on from; a run whose own is lost or damaged goes on from the newest that is not."""
        if subcommand == "fit":
            found, content = readable(Path(path))
            self.config[subcommand]["ckpt_path"] = path = str(found)
        else:
            content = read_checkpoint(local_file(path))
        needed = {"state_dict", "loops", "optimizer_states"} if subcommand == "fit" else {"state_dict"}
        if needed - content.keys():
            do = "start a new run from them" if subcommand == "fit" else "measure them"
            raise UserError(
                f"{path} holds weights without the state of a run, to which --ckpt_path goes back: give last.ckpt, or "
                f"{do} with --model.weights {path}"
            )
        return content

    def _typed(self, subcommand: str, config: Namespace, task: str) -> list[str]:
        """The command line without its configuration files."""
        place = self.arguments.index(subcommand) + 1
        rest, typed = iter(self.arguments[place:]), []
        for argument in rest:
            name, equals, value = argument.partition("=")
            if name in ("-c", "--config", "--data", "--model", "--trainer"):
                value = value if equals else next(rest, "")
                if name in ("-c", "--config") or Path(value).is_file():
                    continue
                argument = f"{name}={value}"
            typed.append(argument)
        known = [f"--model={task}", f"--data={config['data']['class_path']}"]  # both are required
        return [subcommand, *known, *typed]

    # Objects

    checkpoint: dict[str, Any] | None = None
    trainer: pl.Trainer | None = None
    voice: Voice | None = None  # of a run of several processes
    started, ended = 0.0, False

    def before_instantiate_classes(self) -> None:
        if self.subcommand != "fit":
            self.save_config_callback = None

    def _set_seed(self) -> None:
        if self.config["subcommand"] != "predict":
            super()._set_seed()

    def instantiate_classes(self) -> None:
        if self.subcommand != "predict":
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> pl.Trainer:
        config = self.config_init[self.subcommand]
        self.out = config["out"] or config["trainer"].get("default_root_dir") or free_folder(self.model.hparams.name)
        automatic = config["trainer"].get("logger") in (None, True)
        callbacks = list(config["trainer"].get("callbacks") or [])
        if self.subcommand == "fit" and not config["trainer"].get("fast_dev_run"):
            kwargs["default_root_dir"] = config["trainer"].get("default_root_dir") or self.out
            callbacks.append(StopOnSignal())
            if automatic:
                keep_old_metrics(Path(self.out))
                kwargs["logger"] = [logger(self.out, name="", version="") for logger in (CSVLogger, TensorBoardLogger)]
        else:
            kwargs["logger"] = config["trainer"].get("logger") if not automatic else False
            kwargs["enable_checkpointing"] = False
            callbacks = [callback for callback in callbacks if not isinstance(callback, FIT_ONLY)]
        wanted = config["trainer"].get("enable_progress_bar") is not False and sys.stdout.isatty()
        if not any(isinstance(callback, ProgressBar) for callback in callbacks):
            kwargs["enable_progress_bar"] = wanted
            callbacks.append(RunBar() if wanted else EpochLines())
        kwargs["callbacks"] = callbacks
        for name, least in LEAST.items():
            value = config["trainer"].get(name)
            if value is not None and not least <= value < math.inf:
                raise UserError(f"trainer.{name} is {value}: it must be at least {least}")
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except ValueError as error:
            raise UserError(one_line(error)) from error
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = SafeIO()
        return trainer

    # Runs

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand == "predict":
            names = self._subcommand_method_arguments[subcommand]
            predict(**{name: self.config[subcommand][name] for name in names})
            return
        if environment := getattr(self.trainer.strategy, "cluster_environment", None):
            self.voice = Voice(environment)
            self.voice.watch(self._end_orphan)
        try:
            super()._run_subcommand(subcommand)
        except Interrupted as stop:
            self.ended = True
            stop.kept = self._kept()
            raise
        except Exception as error:
            self.ended = True
            failure = explained(error)
            lost = isinstance(failure, LostProcess)
            if failure is None or not (self.started or lost):
                raise
            failure = type(failure)(f"{failure}. {self._kept()}".replace("..", ".").strip())
            if lost:
                failure.told = self.voice is not None and not self.voice.claim()
            raise failure from error
        finally:
            self._end_children()
            if self.voice is not None:
                self.voice.close()
        if stopper.noted:  # after the last step, where the rest is soon done
            raise Interrupted(stopper.noted)

    def _kept(self) -> str:
        """What a run that broke off has left, and how to go on with it."""
        if not self.started:
            return ""
        file = newest(self.trainer, self.started)
        if file is None:
            before = self.config["fit"].get("ckpt_path")
            return f"Nothing new was saved: run the same command {'again' if before else 'from the start'}"
        step = torch.load(file, weights_only=True, mmap=True, map_location="cpu")["global_step"]
        place = os.path.relpath(file) if file.is_relative_to(Path.cwd()) else file
        return f"Saved step {step}: go on with the same command and --ckpt_path {place}"

    def _watch_children(self) -> None:
        """Say it when Lightning ends the run because a process of it has ended; it kills all without a word."""

        def terminate_all(watch: _ChildProcessObserver) -> None:
            if not self.ended and self.voice.claim():
                codes = [f"process {n} with status {c.returncode}" for n, c in enumerate(children(self.trainer), 1)]
                ended = some(code for code in codes if not code.endswith("None"))
                print(f"error: the run lost {ended}, so all were ended. {self._kept()}", file=sys.stderr, flush=True)
            _terminate_all(watch)

        _ChildProcessObserver._terminate_all = terminate_all

    def _end_orphan(self) -> None:
        """End this process, which waits for ever for the one that started it, and say so if no other one does."""
        if self.voice.claim():
            text = f"error: the first process of this run ended, so all were ended. {self._kept()}"
            print(text, file=sys.stderr, flush=True)
        os._exit(1)

    def _end_children(self) -> None:
        """Leave no process of the run behind: those that wait for one that ended would wait for ever."""
        for child in children(self.trainer):
            try:
                child.wait(timeout=2)
            except subprocess.TimeoutExpired:
                child.kill()

    def before_fit(self) -> None:
        self._check(["train", "val"])
        check_disk(self.trainer, self.model, self.out)
        averaged = "current_model_state" in (self.checkpoint or {})
        if averaged and not any(isinstance(callback, WeightAveraging) for callback in self.trainer.callbacks):
            raise UserError(
                f"{self.config['fit']['ckpt_path']} holds averaged weights: continue with the EMA callback on, or "
                "start from the average with --model.weights"
            )

        self.started = time.time()
        self._watch_children()

    def before_validate(self) -> None:
        self._require_weights()
        self._check(["val"])

    def before_test(self) -> None:
        self._require_weights()
        self._check(["test"])

    def after_fit(self) -> None:
        if self.trainer.is_global_zero and (best := best_checkpoint(self.trainer)):
            kind = (
                "last checkpoint, as no validation took place" if Path(best).name == "last.ckpt" else "best checkpoint"
            )
            print(f"{kind}: {best}\nnext: {python()} train.py predict --ckpt {best} IMAGE_OR_FOLDER")

    def _require_weights(self) -> None:
        p = self.model.hparams
        if self.checkpoint is None and not p.weights and not p.pretrained:
            raise UserError(
                f"{self.subcommand} would measure random weights: give a checkpoint with --ckpt_path, other weights "
                "with --model.weights, or --model.pretrained true"
            )

    def _check(self, splits: list[str]) -> None:
        self.model.check(self.datamodule, splits)
        card = (self.checkpoint or {}).get(CARD)
        if card and card["class_names"] != list(self.datamodule.class_names):
            raise UserError(
                f"the checkpoint knows {len(card['class_names'])} classes ({some(card['class_names'])}), the data has "
                f"{self.datamodule.num_classes} ({some(self.datamodule.class_names)}): give the data it was trained on"
            )
        if rank_zero_only.rank == 0:
            self.datamodule.check(splits)


def check_files(arguments: list[str]) -> None:
    """Refuse files that hold no settings, where the parser names neither the file nor the reason."""
    for argument, following in itertools.zip_longest(arguments, arguments[1:], fillvalue=""):
        name, equals, value = argument.partition("=")
        path = Path(value if equals else following)
        if name == "--data" and path.exists() and path.suffix.lower() not in (".yaml", ".yml", ".json"):
            raise UserError(f"--data {path}: that is a kind of data, such as Images; give yours by --data.root {path}")
        if name not in ("-c", "--config") or not path.is_file():
            continue
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is not YAML: {one_line(error)}") from error
        if not isinstance(content, dict):
            kind = "empty" if content is None else f"a {type(content).__name__}"
            raise UserError(f"{path} is {kind}, not settings such as `trainer: {{max_epochs: 10}}`")


def class_path(task: type) -> str:
    """The import path of a task, as configurations write it."""
    return f"{task.__module__}.{task.__qualname__}"


def python() -> str:
    """The running interpreter as the user would type it here, such as ``.venv/bin/python``."""
    path = Path(sys.executable)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else "python"


def shortened(message: str) -> str:
    """The part of a parser's message that tells the user what to change."""
    text = re.sub(r" Given value( type)?: .*| Does not validate against .*? Errors:", " ", one_line(message))
    text = re.sub(r"Expected a dot import path string: (\S+)", r"there is no class \1", text)
    text = re.sub(r"required: predict.images", "required: IMAGE_OR_FOLDER", text)
    text = re.sub(r"required: \w+\.", "required: --", text)
    # For optional values the parser also lists why they are not None, and for objects why they are not files.
    reasons = [part for part in text.split(" - ") if "NoneType" not in part and "Expected a path but" not in part]
    keys = re.findall(r'Parser key "([\w.]+)"', text)
    reason = re.sub(r"""Problem with given class_path '[^']+': *|Parser key "[^"]+": *""", "", reasons[-1]).strip(" .")
    where = ".".join(keys) + ": " if keys else ""
    return f"{where}{reason}. The option --help lists what is accepted"


def free_folder(name: str) -> str:
    """The first of runs/NAME-1, runs/NAME-2, ... that does not exist yet."""
    stem = re.sub(r"[^\w.-]+", "-", name)
    return str(next(path for n in range(1, sys.maxsize) if not (path := Path("runs", f"{stem}-{n}")).exists()))


def keep_old_metrics(folder: Path) -> None:
    """Lightning's CSV logger deletes the log it finds; a resumed run keeps the earlier part under another name."""
    log = folder / "metrics.csv"
    if log.exists() and rank_zero_only.rank == 0:
        number = next(n for n in range(1, sys.maxsize) if not (folder / f"metrics.{n}.csv").exists())
        log.rename(folder / f"metrics.{number}.csv")


def run(args: list[str] | None = None) -> CLI:
    """Run one command, such as ``run(["fit", "-c", "configs/classify/van_digits.yaml"])``.

    Args:
        args: The command line, without the program; ``sys.argv`` if not given.

    Raises:
        UserError: For anything the user can fix.
    """
    for chatter in (
        ".*does not have many workers",
        ".*number of training batches .* is smaller than the logging interval",
        ".*Grad strides do not match bucket view strides",  # of 1x1 convolutions in channels-last
        ".*your dataloader is not resumable",  # ours is, see Data.state_dict
        ".*callbacks used to create the checkpoint need to be provided",
        r".*isinstance\(treespec, LeafSpec\)",
    ):
        warnings.filterwarnings("ignore", chatter)
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    with signals_taken():
        try:
            return CLI(args)
        except Exception as error:
            failure = explained(error)
            if failure is None:
                raise
            raise failure from error


def children(trainer: pl.Trainer) -> list[subprocess.Popen]:
    """The processes that this one started to train together with it; PyTorch ends those of a spawned run itself."""
    started = getattr(trainer.strategy.launcher, "procs", [])
    return [process for process in started if isinstance(process, subprocess.Popen)]


def main(args: list[str] | None = None) -> None:
    """Run one command and end with a one-line error if the user can fix it."""
    try:
        run(args)
    except LostProcess as error:
        sys.exit(1 if error.told else f"error: {error}")
    except UserError as error:
        sys.exit(f"error: {error}")
    except Interrupted as stop:
        if not is_child():
            print(stop, file=sys.stderr)
        sys.exit(stop.status if not is_child() else 0)  # any other status of a child has Lightning kill them all
