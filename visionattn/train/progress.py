"""What a run says while it goes: a line for each epoch and, on a screen that can show it, a bar for the whole run."""

import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm


class EpochLines(Callback):
    """One printed line per epoch: its loss, and the metrics of a validation if it had one."""

    start, validated = 0.0, False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start = time.perf_counter()  # an epoch that a resumed run is within of does not start again

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.start, self.validated = time.perf_counter(), False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.validated = not trainer.sanity_checking

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.is_global_zero:
            self.show(self.line(trainer, pl_module))

    def line(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> str:
        """The finished epoch in a line; Lightning keeps the metrics of earlier validations, which are left out."""
        shown = {"train/loss_epoch": "loss {:.4f}", **(pl_module.summary if self.validated else {})}
        metrics = trainer.callback_metrics
        parts = [text.format(metrics[name]) for name, text in shown.items() if name in metrics]
        step = "" if trainer.max_epochs != -1 else f", step {trainer.global_step}"
        seconds = f"{time.perf_counter() - self.start:.1f} s"
        return ", ".join([f"epoch {epoch(trainer)}{step}", *parts, seconds])

    def show(self, line: str) -> None:
        """Print a line."""
        print(line, flush=True)


class RunBar(EpochLines, TQDMProgressBar):
    """A bar over all batches of the run, with the time that is left of it, below the lines of finished epochs."""

    def init_train_tqdm(self) -> Tqdm:
        trainer = self.trainer
        loop = trainer.fit_loop.epoch_loop
        total = run_batches(trainer)
        done = loop.batch_progress.total.ready
        layout = "{desc} {percentage:3.0f}%|{bar}| {elapsed}, {remaining} left{postfix}"
        return Tqdm(
            desc="training",
            total=total,
            initial=done,
            disable=self.is_disabled,
            leave=False,
            dynamic_ncols=True,
            file=sys.stdout,
            smoothing=0,  # the mean of the run so far, validations included
            bar_format=layout if total else None,
        )

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        EpochLines.on_train_start(self, trainer, pl_module)
        TQDMProgressBar.on_train_start(self, trainer, pl_module)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        EpochLines.on_train_epoch_start(self, trainer, pl_module)
        self.train_progress_bar.set_description_str(f"epoch {epoch(trainer)}", refresh=False)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
        bar, done = self.train_progress_bar, trainer.fit_loop.epoch_loop.batch_progress.total.ready
        loss = trainer.callback_metrics.get("train/loss")
        if loss is not None and done % 10 == 0:  # reading it waits for the GPU
            bar.set_postfix_str(f"loss {float(loss):.3f}", refresh=False)
        bar.update(done - bar.n)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        EpochLines.on_validation_end(self, trainer, pl_module)
        self.val_progress_bar.close()
        self.reset_dataloader_idx_tracker()

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        EpochLines.on_train_epoch_end(self, trainer, pl_module)

    def on_exception(self, *_: Any) -> None:
        for bar in (self._val_progress_bar, self._train_progress_bar):
            if bar is not None:
                bar.close()  # so that what is said next has a line of its own

    def show(self, line: str) -> None:
        self.train_progress_bar.write(line, file=sys.stdout)


def epoch(trainer: pl.Trainer) -> str:
    """The epoch at hand, counted from 1, of how many."""
    return f"{trainer.current_epoch + 1}" + (f"/{trainer.max_epochs}" if trainer.max_epochs != -1 else "")


def run_batches(trainer: pl.Trainer) -> int | None:
    """Batches of the whole run in one process; None if there is no end to it."""
    batches = [trainer.max_steps * trainer.accumulate_grad_batches] if trainer.max_steps != -1 else []
    if trainer.max_epochs not in (-1, None) and trainer.num_training_batches != float("inf"):
        batches.append(trainer.max_epochs * int(trainer.num_training_batches))
    return min(batches, default=None)
