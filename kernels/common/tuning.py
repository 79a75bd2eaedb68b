"""Which of several equal forms of a computation runs on this processor: timed there once, and remembered.

A :class:`Choice` names forms that agree but for rounding. The first time that a shape of a kind comes by, its forms
are timed on made data, in a thread of their own, so that no mode of the caller (autograd, autocast, hooks, random
numbers) is seen or disturbed; from then on a choice costs one look into a dictionary.

``VISIONATTN_TUNE`` says how much time that may take:

    lazy    the default: some 20 ms a choice and 2 s a process; what is left open runs in the form that was the best for
            what has been timed of its kind, until a later process times it, too
    full    some 0.3 s a choice, and no limit of the whole
    off     nothing is timed nor read from the disk: the expected form, the same on all processors of one capability
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from visionattn.kernels.common import remembered
from visionattn.kernels.common.machine import machine

__all__ = ["CHOICES", "Choice", "Decision", "get_tuning", "set_tuning", "tuned", "use_tuning"]

ENVIRONMENT_VARIABLE = "VISIONATTN_TUNE"
MODES = ("off", "lazy", "full")
SECONDS = {"lazy": 0.02, "full": 0.3}  # a choice, beyond the first call of each form and two rounds
TOTAL = 2.0  # seconds a process, of lazy
ROUNDS = {"lazy": 12, "full": 50}
# What is expected has to be beaten by so much: within the noise nothing is gained by a change.
MARGIN = 0.97

CHOICES: dict[str, Choice] = {}

Key = tuple[int | str, ...]

_setting: str | None = None
_spent = 0.0
_measuring = threading.Lock()


@dataclass(frozen=True)
class Decision:
    """Which form runs for one kind of shape, and why.

    Attributes:
        form: Name of the form.
        reason: ``"timed"`` (in this process), ``"remembered"`` (from the disk), ``"similar"`` (the best for what was
            timed of the same use) or ``"expected"`` (of the processor's instructions).
        ms: Milliseconds of each form, if it was timed.
    """

    form: str
    reason: str
    ms: dict[str, float]


def get_tuning() -> str:
    """``"off"``, ``"lazy"`` or ``"full"``: set by :func:`set_tuning`, else by ``VISIONATTN_TUNE``, else lazy.

    Raises:
        ValueError: If the environment variable has another value.
    """
    return _setting or _checked(os.environ.get(ENVIRONMENT_VARIABLE) or "lazy", ENVIRONMENT_VARIABLE)


def set_tuning(mode: str | None) -> None:
    """Set for the process how much is timed, and forget what was decided in it; ``None`` returns to the environment.

    Args:
        mode: ``"off"``, ``"lazy"``, ``"full"`` or ``None``.

    Raises:
        ValueError: If ``mode`` is none of them.
    """
    global _setting, _spent
    _setting = None if mode is None else _checked(mode, "mode")
    _spent = 0.0
    for choice in CHOICES.values():
        choice.forget()


@contextmanager
def use_tuning(mode: str | None, anew: bool = False) -> Iterator[None]:
    """Set how much is timed within a ``with`` block (process-wide, not per thread).

    Args:
        mode: As in :func:`set_tuning`.
        anew: Also time what was found before, which the new times then replace.
    """
    before = _setting
    set_tuning(mode)
    if anew:
        remembered.forget()
    try:
        yield
    finally:
        set_tuning(before)


def _checked(mode: str, source: str) -> str:
    if mode not in MODES:
        raise ValueError(f"{source} must be one of {', '.join(MODES)}, got {mode!r}")
    return mode


class Choice:
    """A choice between forms of one computation, made for every kind of shape and number of threads.

    Args:
        name: What is chosen, for the report and the disk.
        forms: Names of the forms.
        fields: Names of what a key consists of, for the report; the last one tells different uses apart.
        expected: From the number of threads and the key, the form that runs where nothing was timed.
        trial: From the key, a call for each form that can run it, on data made for it; few MB and some ms each.
    """

    def __init__(
        self,
        name: str,
        forms: Sequence[str],
        fields: Sequence[str],
        expected: Callable[..., str],
        trial: Callable[..., dict[str, Callable[[], object]]],
    ) -> None:
        self.name, self.forms, self.fields = name, tuple(forms), tuple(fields)
        self.expected, self.trial = expected, trial
        self.decisions: dict[Key, Decision] = {}
        self._found: dict[Key, str] = {}
        CHOICES[name] = self

    def pick(self, *key: int | str) -> str:
        """The form to run.

        Args:
            key: What tells kinds of shapes apart; few kinds on purpose, as each is timed anew.
        """
        key = (torch.get_num_threads(), *key)
        form = self._found.get(key)
        return self._decide(key) if form is None else form

    def forget(self) -> None:
        """Decide everything anew."""
        self._found.clear()
        self.decisions.clear()

    def _decide(self, key: Key) -> str:
        mode = get_tuning()
        decision = Decision(self.expected(*key), "expected", {})
        if mode != "off":
            known = remembered.recall(self.name, key)
            # What was found among other forms, by another state of this library, says nothing of those of today.
            if known is not None and known[0] in self.forms and set(known[1]) == set(self.forms):
                decision = Decision(known[0], "remembered", known[1])
            elif mode == "full" or _spent < TOTAL:
                if not _measuring.acquire(blocking=False):
                    return decision.form  # somebody else is timing: whatever came out now would be of both
                try:
                    decision = _timed(self, key, decision, mode)
                finally:
                    _measuring.release()
            else:
                decision = self._similar(key) or decision
        self.decisions[key] = decision
        self._found[key] = decision.form
        return decision.form

    def _similar(self, key: Key) -> Decision | None:
        """The form that has the least time, relative to the best, over all that was timed of a use."""
        lost: dict[str, list[float]] = {}
        for other, decision in self.decisions.items():
            if (other[0], other[-1]) == (key[0], key[-1]):
                for form, ms in decision.ms.items():
                    lost.setdefault(form, []).append(ms / min(decision.ms.values()))
        if not lost:
            return None
        return Decision(min(lost, key=lambda form: sum(lost[form]) / len(lost[form])), "similar", {})


def tuned() -> tuple[dict[str, str], list[tuple[str, int, str, str, dict[str, float]]]]:
    """What has been timed on this machine, now or earlier.

    Returns:
        The machine (processor, capability, versions), and for each kind of shape the choice, the number of threads,
        what tells the kind apart, the form that runs, and the milliseconds of all forms.
    """
    rows = []
    for name, decisions in sorted(remembered.everything().items()):
        for key, (form, ms) in decisions.items():
            threads, *values = key.split(" ")
            fields = CHOICES[name].fields if name in CHOICES else ()
            named = zip(fields, values, strict=True) if len(fields) == len(values) else enumerate(values)
            rows.append((name, int(threads), ", ".join(f"{field} {value}" for field, value in named), form, ms))
    return machine(), rows


def _timed(choice: Choice, key: Key, expected: Decision, mode: str) -> Decision:
    """What the clock says; what was expected if it cannot be asked."""
    global _spent
    begin = time.perf_counter()
    rounds: dict[str, list[float]] = {}

    def measure() -> None:
        if torch.get_num_threads() == key[0]:
            rounds.update(_race(choice.trial(*key[1:]), SECONDS[mode], ROUNDS[mode]))

    try:
        thread = threading.Thread(target=measure, name=f"visionattn tunes {choice.name}", daemon=True)
        thread.start()
        thread.join()
    except RuntimeError:  # the interpreter is about to end, or there are no more threads to be had
        return expected
    finally:
        _spent += time.perf_counter() - begin
    if len(rounds) < 2:
        return expected
    best = {name: min(seconds) for name, seconds in rounds.items()}
    form = min(best, key=best.__getitem__)
    if expected.form in best and not _beats(rounds[form], rounds[expected.form]):
        form = expected.form
    ms = {name: round(1e3 * seconds, 4) for name, seconds in best.items()}
    remembered.remember(choice.name, key, form, ms)
    return Decision(form, "timed", ms)


def _beats(challenger: Sequence[float], expected: Sequence[float]) -> bool:
    """Whether one form is faster at its best and, in most rounds, beside the other: one of the two may be disturbed."""
    won = sum(mine < other for mine, other in zip(challenger, expected, strict=True))
    return min(challenger) <= MARGIN * min(expected) and 2 * won > len(challenger)


def _race(calls: dict[str, Callable[[], object]], seconds: float, rounds: int) -> dict[str, list[float]]:
    """The times of each call, in turn until the time is over; none for a call that fails."""
    end = time.perf_counter() + seconds
    for name, call in list(calls.items()):
        try:
            call()  # the first call of a shape generates code
        except Exception:  # whatever it is, this form does not run here
            del calls[name]
    clock = _clock()
    times: dict[str, list[float]] = {name: [] for name in calls}
    for done in range(rounds):
        if done >= 2 and time.perf_counter() > end:
            break
        for name, call in calls.items():
            start = clock()
            call()
            times[name].append(clock() - start)
    return times


def _clock() -> Callable[[], float]:
    """Processor time of this thread if it does all the work, whatever else the machine does; else the wall clock."""
    fine = time.get_clock_info("thread_time").resolution <= 1e-6
    return time.thread_time if fine and torch.get_num_threads() == 1 else time.perf_counter
