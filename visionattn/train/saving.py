"""Checkpoints that a kill, a full disk or an early end cannot take away."""

import io
import os
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.fabric.utilities.cloud_io import _is_local_file_protocol
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from visionattn.errors import UserError
from visionattn.train.stopping import Interrupted, between_steps, largest
from visionattn.weights.errors import WeightsError
from visionattn.weights.read import local_file, read_checkpoint


class SafeIO(TorchCheckpointIO):
    """Writes a checkpoint beside its place and then renames it, so that a half one never has the name.

    Lightning writes to ``TMPDIR`` instead, and where that is another disk it copies over the old checkpoint.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cleared: set[Path] = set()

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if not _is_local_file_protocol(str(path)):
            return super().save_checkpoint(checkpoint, path, storage_options)
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        self._clear(target.parent)
        buffer = io.BytesIO()  # PyTorch's writer ends the process if a file that it writes to fails
        torch.save(checkpoint, buffer)
        part = target.with_name(f".{target.name}.part")
        try:
            with open(part, "wb") as file:
                file.write(buffer.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _clear(self, folder: Path) -> None:
        """Remove what earlier runs that were killed left half-written."""
        if folder not in self.cleared:
            self.cleared.add(folder)
            for part in folder.glob(".*.ckpt.part"):
                part.unlink(missing_ok=True)


class LastCheckpoint(ModelCheckpoint):
    """Keeps ``last.ckpt``: of every epoch, every few minutes within one, and of the step at which a run ended.

    It needs no validation; ``save_last`` of a monitored checkpoint leaves out the epochs that were not successful.

    Args:
        minutes: Longest time of training that a kill can cost.
    """

    def __init__(self, minutes: float = 15.0) -> None:
        super().__init__(filename="last", enable_version_counter=False)
        if minutes <= 0:
            raise UserError(f"minutes of LastCheckpoint is {minutes}: it must be greater than 0")
        self.minutes, self.saved_at, self.whole = minutes, 0.0, False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.saved_at = time.monotonic()

    def on_train_batch_start(self, *_: Any) -> None:
        self.whole = False

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        # From here until the next step the state is one from which the run goes on exactly.
        self.whole = between_steps(trainer)
        if not self.whole or trainer.fast_dev_run:
            return
        late = trainer.is_global_zero and time.monotonic() - self.saved_at > 60 * self.minutes
        ends = trainer.should_stop and trainer.fit_loop._can_stop_early or trainer.global_step == trainer.max_steps
        if largest(trainer, int(late)) or ends:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
            self._last_global_step_saved = 0  # what an epoch's end adds to this step is to be saved too

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.whole = False
        progress = trainer.fit_loop.epoch_loop.batch_progress
        if not progress.is_last_batch and trainer.num_training_batches != progress.current.ready:
            return  # ended within an epoch: the checkpoint of its last step is the one to go on from
        super().on_train_epoch_end(trainer, pl_module)
        ends = trainer.max_epochs == trainer.fit_loop.epoch_progress.current.processed
        if ends and not self._should_skip_saving_checkpoint(trainer):
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Save the step before, unless the exception came out of a step, which may have changed half of the state."""
        together = isinstance(exception, Interrupted)
        alone = isinstance(trainer.strategy, DDPStrategy | SingleDeviceStrategy)  # others gather from all processes
        if not self.whole or trainer.fast_dev_run or not (together or alone):
            return
        self.whole = False
        try:
            path = self.format_checkpoint_name(self._monitor_candidates(trainer))
            self.best_model_path = path
            checkpoint = trainer._checkpoint_connector.dump_checkpoint(False)
            if trainer.validating:
                before_validation(checkpoint)
            trainer.strategy.save_checkpoint(checkpoint, path)
            if together:
                trainer.strategy.barrier("the last checkpoint")
        except (OSError, RuntimeError, UserError):
            pass  # the exception at hand is the one to tell about, and an older checkpoint is still there

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        self.saved_at = time.monotonic()


def before_validation(checkpoint: dict[str, Any]) -> None:
    """Change the state of Lightning's loops from within a validation to before it, so that it is done anew."""
    loops = checkpoint["loops"]["fit_loop"]
    for counts in (loops["epoch_loop.batch_progress"][part] for part in ("total", "current")):
        counts["completed"] = counts["processed"]
    # What Lightning goes back to is a validation that has begun; this one has done nothing yet.
    begun = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    validation = loops["epoch_loop.val_loop.batch_progress"]
    validation |= {"total": dict(begun), "current": dict(begun), "is_last_batch": False}


def newest(trainer: pl.Trainer, since: float) -> Path | None:
    """The newest checkpoint that the run's callbacks wrote after the time ``since`` and that is there.

    Of those written together it is the last one, from which a run goes on.
    """
    savers = [callback for callback in trainer.callbacks if isinstance(callback, ModelCheckpoint)]
    names = {p for saver in savers for p in (*saver.best_k_models, saver.last_model_path, saver.best_model_path)}
    known = [Path(name) for name in names if name]
    # A process that had others train for it, as of the strategy ddp_spawn, was not told what they saved.
    known = known or list(Path(trainer.default_root_dir, "checkpoints").glob("*.ckpt"))
    files = [path for path in known if path.is_file() and path.stat().st_mtime >= since]
    last = [path for path in files if path.name == "last.ckpt"]
    return max(last or files, key=lambda path: path.stat().st_mtime, default=None)


def readable(path: Path) -> tuple[Path, dict[str, Any]]:
    """A checkpoint to go on from: ``path``, or the newest readable one beside it if it is lost or damaged.

    Raises:
        WeightsError: If none can be read.
    """
    try:
        return path, read_checkpoint(local_file(str(path)))
    except WeightsError as error:
        if path.suffix != ".ckpt" or not (path.exists() or path.name == "last.ckpt"):
            raise  # no checkpoint of a run, or a name that was mistyped
        others = [other for other in path.parent.glob("*.ckpt") if other != path]
        for other in sorted(others, key=lambda file: file.stat().st_mtime, reverse=True):
            try:
                content = read_checkpoint(other)
            except WeightsError:
                continue
            if "loops" in content:
                why = "is damaged" if path.exists() else "is lost"
                step = content["global_step"]
                print(f"warning: {path} {why}; going on from {other} (step {step}), the newest that can be read")
                return other, content
        raise error
