"""Stopping a run from outside: a signal ends it at the next place from which it can go on exactly."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Checkpoint

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Interrupted(BaseException):
    """A signal ended the command; no ``Exception``, so that nothing takes it for a failure of its own.

    Attributes:
        signum: The signal.
        kept: What was saved and how to go on, in a sentence; empty outside training.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum, self.kept = signum, ""

    @property
    def status(self) -> int:
        """The exit status that shells give: 130 after Ctrl-C, 143 after SIGTERM."""
        return 128 + self.signum

    def __str__(self) -> str:
        words = f"interrupted by {signal.Signals(self.signum).name}"
        return f"{words}. {self.kept}" if self.kept else words


class Stopper:
    """Takes the signals of this process. While ``waits``, the first one is only noted; a second ends at once."""

    def __init__(self) -> None:
        self.taken, self.waits, self.noted = False, False, 0

    def __call__(self, signum: int, frame: FrameType | None) -> None:
        if self.waits and not self.noted:
            self.noted = signum
        else:
            raise Interrupted(signum)

    def stop(self, signum: int) -> NoReturn:
        """End the run; a second signal of the same kill must not take the checkpoint that is written now."""
        self.noted = 0
        raise Interrupted(signum)

    def install(self) -> None:
        """Take the signals over, also from Lightning, which ends a run that SIGTERM stopped with status 0."""
        for signum in SIGNALS:
            signal.signal(signum, self)


stopper = Stopper()
"""Signals belong to the process, and so does this."""


@contextmanager
def signals_taken() -> Iterator[None]:
    """Turn SIGTERM and Ctrl-C into ``Interrupted`` while the block runs; in threads signals cannot be taken."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in SIGNALS}
    stopper.taken, stopper.waits, stopper.noted = True, False, 0
    stopper.install()
    try:
        yield
    finally:
        stopper.taken = stopper.waits = False
        for signum, handler in before.items():
            signal.signal(signum, handler)


class StopOnSignal(Checkpoint):
    """Ends training with ``Interrupted`` between two steps, where a checkpoint continues it exactly.

    Lightning calls checkpoints last, and this one is to come after all others, when they are done with the step.

    All processes of a run stop at the same step, whichever of them got the signal. Validation stops after the batch
    at hand, unless several processes share it: they may have different numbers of batches, so it is finished.
    """

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if stopper.taken:
            stopper.install()
            stopper.waits = True

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if not between_steps(trainer):
            return
        if signum := largest(trainer, stopper.noted):
            stopper.stop(signum)

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any, **__: Any) -> None:
        if stopper.noted and trainer.world_size == 1:
            stopper.stop(stopper.noted)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        stopper.waits = False  # nothing is left to go on with


def between_steps(trainer: pl.Trainer) -> bool:
    """Whether the batch that has just ended also ended a step of the optimizer."""
    return not trainer.fit_loop.epoch_loop._should_accumulate()


def largest(trainer: pl.Trainer, number: int) -> int:
    """The largest of the processes' numbers, in each of them."""
    if trainer.world_size == 1:
        return number
    return int(trainer.strategy.reduce(torch.tensor(number, device=trainer.strategy.root_device), reduce_op="max"))
