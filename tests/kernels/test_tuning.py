"""Choices between equal forms: timed on this machine, remembered, and switched off where they should be."""

import json
import stat
import threading
import time as real_time

import pytest
import torch

from visionattn.kernels import get_tuning, linear, set_tuning, tuned, use_tuning
from visionattn.kernels.common import remembered, tuning
from visionattn.kernels.common.tuning import CHOICES, Choice


class Clock:
    """Stands still but for what forms say that they take."""

    now = 0.0

    def perf_counter(self):
        return self.now

    thread_time = perf_counter

    def get_clock_info(self, name):
        return real_time.get_clock_info(name)

    def form(self, seconds):
        def run():
            self.now += seconds

        return run


clock = Clock()


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """A cache of the test's own, a clock that the load of the machine leaves alone, no decision before or after it."""
    monkeypatch.setattr(tuning, "time", clock)
    monkeypatch.setenv("VISIONATTN_TUNE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("VISIONATTN_TUNE", raising=False)
    before = dict(CHOICES)
    fresh()
    yield tmp_path / "cache"
    fresh()
    CHOICES.clear()
    CHOICES.update(before)


def fresh():
    """Forget as a new process does."""
    set_tuning(None)
    remembered._known, remembered._written = None, 0.0
    remembered._new.clear()


def slow_and_quick(seen=None):
    """A choice whose expected form takes twice as long as the other."""

    def trial(*key):
        if seen is not None:
            seen.append(key)
        return {"slow": clock.form(0.002), "quick": clock.form(0.001)}

    return Choice("test", ("slow", "quick"), ("size", "use"), lambda threads, *key: "slow", trial)


def test_the_faster_form_is_chosen_once_and_then_looked_up():
    seen = []
    choice = slow_and_quick(seen)
    assert [choice.pick(1, "a") for _ in range(3)] == ["quick"] * 3
    assert choice.pick(2, "a") == "quick" and seen == [(1, "a"), (2, "a")]
    decision = choice.decisions[torch.get_num_threads(), 1, "a"]
    assert decision.reason == "timed" and decision.ms["quick"] < decision.ms["slow"]


def test_within_the_noise_the_expected_form_stays():
    calls = {"one": clock.form(0.001), "other": clock.form(0.00098)}
    assert Choice("test", ("one", "other"), (), lambda *key: "one", lambda *key: dict(calls)).pick(1) == "one"


def test_one_lucky_round_is_no_victory():
    lucky = iter([0.002] * 2 + [0.0005] + [0.002] * 100)  # after the first call, the second round alone is quick

    def sometimes():
        clock.now += next(lucky)

    calls = {"one": clock.form(0.001), "other": sometimes}
    assert Choice("test", ("one", "other"), (), lambda *key: "one", lambda *key: dict(calls)).pick(1) == "one"


def test_what_other_threads_do_is_not_counted_on_one_thread(monkeypatch):
    """The wall clock jumps while one form runs, as on a busy machine; the thread's own does not."""
    own = type("Own", (Clock,), {"thread_time": lambda self: self.mine, "mine": 0.0})()
    monkeypatch.setattr(tuning, "time", own)

    def form(wall, thread):
        def run():
            own.now, own.mine = own.now + wall, own.mine + thread

        return run

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        calls = {"one": form(0.001, 0.001), "other": form(0.009, 0.0005)}
        choice = Choice("test", ("one", "other"), (), lambda *key: "one", lambda *key: dict(calls))
        assert choice.pick(1) == "other"
    finally:
        torch.set_num_threads(before)


def test_what_was_found_among_other_forms_is_timed_anew():
    slow_and_quick().pick(1, "a")
    remembered.write()
    fresh()
    seen = []

    def trial(*key):
        seen.append(key)
        return {"slow": clock.form(0.002), "quick": clock.form(0.001), "new": clock.form(0.0005)}

    choice = Choice("test", ("slow", "quick", "new"), ("size", "use"), lambda threads, *key: "slow", trial)
    assert choice.pick(1, "a") == "new" and len(seen) == 1


def test_another_number_of_threads_is_another_kind():
    seen = []
    choice = slow_and_quick(seen)
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            choice.pick(0)
    finally:
        torch.set_num_threads(before)
    assert len(seen) == 2


def test_off_times_nothing_and_reads_nothing(monkeypatch):
    slow_and_quick().pick(1)
    fresh()
    monkeypatch.setenv("VISIONATTN_TUNE", "off")
    seen = []
    choice = slow_and_quick(seen)
    assert choice.pick(1) == "slow" and not seen
    assert choice.decisions[torch.get_num_threads(), 1].reason == "expected"


def test_later_processes_remember(own_cache):
    assert slow_and_quick().pick(1, "a") == "quick"
    remembered.write()
    fresh()
    seen = []
    choice = slow_and_quick(seen)
    assert choice.pick(1, "a") == "quick" and not seen
    assert choice.decisions[torch.get_num_threads(), 1, "a"].reason == "remembered"
    (file,) = own_cache.iterdir()
    assert json.loads(file.read_text())["machine"]["torch"] == torch.__version__


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"machine": 1, "choices": 2}',
        '{"machine": MACHINE, "choices": []}',
        '{"machine": MACHINE, "choices": {"test": {"KEY": {"form": "other", "ms": {}}}}}',
        '{"machine": MACHINE, "choices": {"test": {"KEY": {"form": ["quick"], "ms": {}}}}}',
        '{"machine": MACHINE, "choices": {"test": {"KEY": {"form": "slow", "ms": 3}}}}',
        '{"machine": MACHINE, "choices": {"test": {"KEY": 3}}}',
        '{"machine": {}, "choices": {"test": {"KEY": {"form": "slow", "ms": {}}}}}',
        "[" * 100_000,
    ],
)
def test_a_damaged_file_is_passed_by(text, own_cache):
    own_cache.mkdir()
    key = f"{torch.get_num_threads()} 1"
    text = text.replace("MACHINE", json.dumps(remembered.machine())).replace("KEY", key)
    remembered.file().write_text(text)
    assert slow_and_quick().pick(1) == "quick"


def test_where_nothing_can_be_written_each_process_decides(own_cache):
    own_cache.write_text("a file where the folder should be")
    assert slow_and_quick().pick(1) == "quick"
    remembered.write()


def test_no_half_written_file_is_left(own_cache, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(remembered.json, "dump", full)
    assert slow_and_quick().pick(1) == "quick"
    assert list(own_cache.iterdir()) == []


def test_two_processes_keep_what_the_other_wrote(own_cache):
    slow_and_quick().pick(1)
    remembered.write()
    known = remembered.file().read_text()
    fresh()
    choice = slow_and_quick()
    remembered.recall("test", ())  # this process has read the file; then another one adds to it
    other = json.loads(known)
    other["choices"]["test"]["9 9"] = {"form": "quick", "ms": {}}
    remembered.file().write_text(json.dumps(other))
    choice.pick(2)
    remembered.write()
    assert len(json.loads(remembered.file().read_text())["choices"]["test"]) == 3
    assert stat.S_ISREG(remembered.file().stat().st_mode)


def test_no_more_time_is_taken_than_was_granted():
    """What is left open then runs as what was timed of its use does."""
    seen = []
    calls = {"slow": clock.form(0.2), "quick": clock.form(0.1)}
    choice = Choice("test", tuple(calls), (), lambda *key: "slow", lambda *key: seen.append(key) or dict(calls))
    picked = [choice.pick(kind, "use") for kind in range(10)]  # three times each: to warm up, then by the clock
    assert picked == ["quick"] * 10 and len(seen) == 3
    assert choice.decisions[torch.get_num_threads(), 9, "use"].reason == "similar"
    assert choice.pick(10, "another use") == "slow"


def test_when_the_time_of_a_process_is_over_the_expected_form_runs(monkeypatch):
    monkeypatch.setattr(tuning, "_spent", tuning.TOTAL)
    seen = []
    assert slow_and_quick(seen).pick(1) == "slow" and not seen
    set_tuning("full")
    assert slow_and_quick(seen).pick(1) == "quick" and seen


def test_a_form_that_fails_is_out_of_the_race():
    def broken():
        raise RuntimeError("no such kernel on this processor")

    calls = {"slow": clock.form(0.002), "quick": clock.form(0.001), "broken": broken}
    choice = Choice("test", tuple(calls), (), lambda *key: "broken", lambda *key: dict(calls))
    assert choice.pick(1) == "quick"
    nothing = Choice("nothing", ("broken",), (), lambda *key: "broken", lambda *key: {"broken": broken})
    assert nothing.pick(1) == "broken"


def test_while_another_thread_is_timing_the_expected_form_runs_and_nothing_is_kept():
    choice = slow_and_quick()
    with tuning._measuring:
        assert choice.pick(1) == "slow" and not choice.decisions
    assert choice.pick(1) == "quick"


def test_the_caller_sees_nothing_of_it():
    """Neither its random numbers, nor its hooks on saved tensors, nor modes it runs under."""
    set_tuning("full")
    x, weight = torch.randn(2, 64, 32, requires_grad=True), torch.randn(16, 32, requires_grad=True)
    state, packed = torch.get_rng_state(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t.shape) or t, lambda t: t):
        out = linear(x, weight)
    assert torch.equal(torch.get_rng_state(), state)
    assert len(packed) <= 3  # what one product keeps
    assert CHOICES["dense product"].decisions and out.requires_grad
    names = {thread.name for thread in threading.enumerate()}
    assert not any(name.startswith("visionattn tunes") for name in names)


def test_checkpointed_blocks_may_decide_in_their_first_pass():
    set_tuning("full")
    weight = torch.randn(16, 32, requires_grad=True)
    x = torch.randn(2, 64, 32, requires_grad=True)
    torch.utils.checkpoint.checkpoint(lambda x: linear(x, weight).square(), x, use_reentrant=False).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("use", ["inference", "inference+gelu", "training", "gradients"])
@pytest.mark.parametrize("even", [0, 1])
def test_the_forms_of_the_dense_product_can_be_timed(even, use):
    calls = CHOICES["dense product"].trial(8, even, 24, 40, use)
    assert {"mkl", "convolution"} <= set(calls) <= {"mkl", "convolution", "onednn"}
    for call in calls.values():
        call()


def test_unknown_modes_raise(monkeypatch):
    with pytest.raises(ValueError, match="mode must be one of off, lazy, full, got 'fast'"):
        set_tuning("fast")
    monkeypatch.setenv("VISIONATTN_TUNE", "on")
    with pytest.raises(ValueError, match="VISIONATTN_TUNE must be one of off, lazy, full, got 'on'"):
        get_tuning()


def test_what_was_found_before_is_timed_again_if_asked_for():
    slow_and_quick().pick(1, "a")
    fresh()
    seen = []
    choice = slow_and_quick(seen)
    with use_tuning("full", anew=True):
        assert choice.pick(1, "a") == "quick" and seen == [(1, "a")]
        assert choice.pick(1, "a") == "quick" and len(seen) == 1


def test_the_mode_of_a_block_ends_with_it():
    with use_tuning("off"):
        assert get_tuning() == "off"
    assert get_tuning() == "lazy"


def test_what_was_timed_can_be_told():
    slow_and_quick().pick(7, "a")
    machine, rows = tuned()
    assert machine["torch"] == torch.__version__ and machine["capability"]
    assert rows == [("test", torch.get_num_threads(), "size 7, use a", "quick", {"slow": 2.0, "quick": 1.0})]
