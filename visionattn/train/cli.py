"""The command line of ``train.py``: Lightning's, with one-line errors and no silent choices."""

import importlib.resources
import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from jsonargparse import Namespace
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, ThroughputMonitor, WeightAveraging
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException

import visionattn  # noqa: F401  (registers our models)
import visionattn.train.data  # noqa: F401  (the short names of its classes work on the command line)
from visionattn.errors import UserError, one_line, some
from visionattn.train.callbacks import EpochLines, ExportWeights, Pictures, best_checkpoint, check_disk
from visionattn.train.classify import Classification
from visionattn.train.data.base import Data
from visionattn.train.dense.detect import Detection
from visionattn.train.dense.segment import Segmentation
from visionattn.train.predict import add_arguments, predict
from visionattn.train.task import Task
from visionattn.weights.card import CARD, ELSEWHERE, checked, run_settings
from visionattn.weights.read import local_file, read_checkpoint

DEFAULTS = importlib.resources.files("visionattn.configs") / "trainer" / "default.yaml"
"""What every run starts from; ``-c`` files and flags override it."""

# What only training needs: Lightning would warn that their state is not restored, or they write into the run's folder.
FIT_ONLY = (ModelCheckpoint, WeightAveraging, ThroughputMonitor, ExportWeights, LearningRateMonitor, Pictures)
# Settings that a checkpoint leaves open: they change how a run computes, not what.
FREE_ON_RESUME = {"pretrained", "weights", "reset_head", "compile", "channels_last"}
# What the weights were made for.
ARCHITECTURE = {"name", "model_args", "backbone_args", "head", "head_args", "detector", "detector_args"}
# By what a checkpoint says about itself.
TASKS = {None: Classification, "segment": Segmentation, "detect": Detection}


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
        self.checkpoint = read_checkpoint(local_file(path))
        if self.checkpoint.get(CARD) is not None:
            self.checkpoint[CARD] = checked(self.checkpoint[CARD], path)
        trained = run_settings(self.checkpoint, path)
        trained.pop("num_classes", None)  # follows from the data
        place = self.arguments.index(subcommand) + 1
        task = class_path(TASKS[(self.checkpoint.get(CARD) or {}).get("task")])
        arguments = [*self.arguments[:place], f"--model={task}", *self.arguments[place:]]  # it is required
        asked = self.parser.parse_args(arguments, defaults=False)[subcommand]
        if asked.model.class_path != task:
            raise UserError(f"{path} is of {task}: leave --model out, or name this one")
        config["model"]["class_path"] = task
        asked, asked_data = (dict(asked.get(f"{part}.init_args") or {}) for part in ("model", "data"))
        if str(trained.get("name", "")).startswith(ELSEWHERE) and asked.get("name") != trained["name"]:
            raise UserError(
                f"{path} looks for its model at {trained['name']}, which only you may: if you trust that place, add "
                f"--model.name {trained['name']}"
            )
        binding = trained.keys() - FREE_ON_RESUME if subcommand == "fit" else ARCHITECTURE
        differ = [k for k in asked if k in binding and k in trained and asked[k] != trained[k]]
        if differ:
            differences = some((f"model.{key} is {asked[key]!r}, was {trained[key]!r}" for key in differ), 5)
            raise UserError(
                f"{path} was trained with other settings: {differences}. Leave them out to go on with that model, or "
                f"start a new run from its weights: --model.weights {path} instead of --ckpt_path"
            )
        fresh = {"weights": None, "pretrained": False, "reset_head": False}  # the checkpoint has the weights
        config["model"]["init_args"] = Namespace(**(trained | asked | fresh))
        if (data := config.get("data.init_args")) and (card := self.checkpoint.get(CARD)):
            known = card["preprocess"] | {"model": card["name"], "img_size": card["preprocess"]["input_size"][-1]}
            data.update(Namespace(**{k: v for k, v in known.items() if k in data and k not in asked_data}))

    # Objects

    checkpoint: dict[str, Any] | None = None

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
        self.out = config["out"] or free_folder(self.model.hparams.name)
        automatic = config["trainer"].get("logger") in (None, True)
        callbacks = list(config["trainer"].get("callbacks") or [])
        if self.subcommand == "fit" and not config["trainer"].get("fast_dev_run"):
            kwargs["default_root_dir"] = config["trainer"].get("default_root_dir") or self.out
            if automatic:
                keep_old_metrics(Path(self.out))
                kwargs["logger"] = [logger(self.out, name="", version="") for logger in (CSVLogger, TensorBoardLogger)]
        else:
            kwargs["logger"] = config["trainer"].get("logger") if not automatic else False
            kwargs["enable_checkpointing"] = False
            callbacks = [callback for callback in callbacks if not isinstance(callback, FIT_ONLY)]
        if not sys.stderr.isatty():
            kwargs["enable_progress_bar"] = False
            callbacks.append(EpochLines())
        kwargs["callbacks"] = callbacks
        try:
            return super().instantiate_trainer(**kwargs)
        except ValueError as error:
            raise UserError(one_line(error)) from error

    # Runs

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand == "predict":
            names = self._subcommand_method_arguments[subcommand]
            predict(**{name: self.config[subcommand][name] for name in names})
        else:
            super()._run_subcommand(subcommand)

    def before_fit(self) -> None:
        self._check(["train", "val"])
        check_disk(self.trainer, self.model, self.out)
        averaged = "current_model_state" in (self.checkpoint or {})
        if averaged and not any(isinstance(callback, WeightAveraging) for callback in self.trainer.callbacks):
            raise UserError(
                f"{self.config['fit']['ckpt_path']} holds averaged weights: continue with the EMA callback on, or "
                "start from the average with --model.weights"
            )

    def before_validate(self) -> None:
        self._check(["val"])

    def before_test(self) -> None:
        self._check(["test"])

    def after_fit(self) -> None:
        if self.trainer.is_global_zero and (best := best_checkpoint(self.trainer)):
            print(f"best checkpoint: {best}\nnext: {python()} train.py predict --ckpt {best} IMAGE_OR_FOLDER")

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
    try:
        return CLI(args)
    except (MisconfigurationException, torch.cuda.OutOfMemoryError) as error:
        raise UserError(one_line(error)) from error
    except UserError as error:
        if "Original Traceback" in str(error):  # from a process that loads data
            raise UserError(str(error).strip().splitlines()[-1].split("UserError: ", 1)[-1]) from None
        raise
    except ValueError as error:  # the parser's, around one of ours from a constructor
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise


def main(args: list[str] | None = None) -> None:
    """Run one command and end with a one-line error if the user can fix it."""
    try:
        run(args)
    except UserError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")
