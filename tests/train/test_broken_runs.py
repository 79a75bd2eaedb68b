"""Runs that break: what is said in one line, what is saved, and that the saved goes on as if nothing had happened."""

import errno
import os
import re
import signal
import subprocess
import sys
import threading
import time
import types
from multiprocessing import connection
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException
from torch.utils.data import DataLoader, TensorDataset

from visionattn.errors import UserError
from visionattn.train import saving
from visionattn.train.classify import Classification
from visionattn.train.cli import main, run
from visionattn.train.failures import LostProcess, explained
from visionattn.train.processes import Voice
from visionattn.train.saving import SafeIO
from visionattn.train.stopping import Interrupted

ROOT = Path(__file__).resolve().parents[2]


def last(folder):
    return folder / "checkpoints" / "last.ckpt"


def assert_same(a, b):
    one, other = (torch.load(last(path), weights_only=True) for path in (a, b))
    assert one["global_step"] == other["global_step"]
    for part in ("state_dict", "current_model_state"):
        assert one[part] and all(torch.equal(one[part][key], other[part][key]) for key in one[part])


def at_call(monkeypatch, step, number, action):
    """Let the ``number``-th call of a step of the task do ``action`` first."""
    calls, original = [], getattr(Classification, step)

    def counted(self, *arguments):
        calls.append(None)
        if len(calls) == number:
            action()
        return original(self, *arguments)

    monkeypatch.setattr(Classification, step, counted)


# Numbers


def test_a_loss_that_is_no_number_ends_training_with_step_and_batch(fit, tmp_path, monkeypatch):
    def spoil(self, images):
        logits = forward(self, images)
        return logits * torch.nan if self.training and self.global_step == 8 else logits

    forward = Classification.forward
    monkeypatch.setattr(Classification, "forward", spoil)
    with pytest.raises(
        UserError, match=r"is nan in batch 3 of epoch 2, at step 8, on digit \d+, .* and 16 more\. .* Saved step 6: go"
    ):
        fit(tmp_path, "--trainer.max_epochs=4")
    assert torch.load(last(tmp_path), weights_only=True)["epoch"] == 0
    assert not (tmp_path / "checkpoints" / "model.safetensors").exists()


def test_weights_that_are_no_numbers_are_never_saved(fit, tmp_path, monkeypatch):
    """A step may spoil the weights with a loss that still was a number, the last one of the run included."""
    step = torch.optim.AdamW.step

    def spoil(self, closure=None):
        result = step(self, closure)
        self.param_groups[0]["params"][0].data.fill_(torch.nan)
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(UserError, match=r"weights are no numbers any more .* Nothing new was saved"):
        fit(tmp_path, "--trainer.limit_train_batches=1", "--trainer.max_epochs=1", ema=False)
    assert not list((tmp_path / "checkpoints").glob("*"))


@pytest.mark.parametrize(
    "flag, allowed",
    [
        ("model.weight_decay=-0.1", "at least 0"),
        ("model.warmup_epochs=-1", "at least 0"),
        ("model.mixup=-1", "at least 0"),
        ("model.mixup_prob=7", "between 0 and 1"),
        ("model.layer_decay=-0.5", "between 0 and 1"),
        ("model.label_smoothing=2", "between 0 and 1"),
        ("model.min_lr=-1", "at least 0"),
        ("model.lr_batch=-8", "at least 1"),
        ("trainer.gradient_clip_val=-1", "at least 0"),
        ("trainer.max_epochs=-5", "at least -1"),
    ],
)
def test_settings_out_of_range_are_refused(flag, allowed, fit, tmp_path):
    name, value = flag.split("=")
    with pytest.raises(UserError, match=rf"{name} is {value}(.0)?: it must be {allowed}"):
        fit(tmp_path, f"--{flag}", ema=False)


# Signals


@pytest.mark.parametrize(
    "step, number, saved", [("training_step", 9, 9), ("training_step", 12, 12), ("validation_step", 7, 12)]
)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_loses_nothing(run_dir, fit, tmp_path, monkeypatch, step, number, saved, signum):
    """Within an epoch, in its last step, and in the midst of a validation."""
    with monkeypatch.context() as patched:
        at_call(patched, step, number, lambda: os.kill(os.getpid(), signum))
        with pytest.raises(
            Interrupted, match=rf"by {signum.name}. Saved step {saved}: go on with .* --ckpt_path"
        ) as stop:
            fit(tmp_path, "--trainer.max_epochs=4", "--data.eval_batch_size=60")
    assert stop.value.status == 128 + signum
    fit(tmp_path, "--trainer.max_epochs=4", "--data.eval_batch_size=60", f"--ckpt_path={last(tmp_path)}")
    assert_same(run_dir, tmp_path)


def test_a_validation_that_a_signal_broke_off_is_done_anew(fit, tmp_path, monkeypatch):
    flags = ["--trainer.max_epochs=1", "--data.eval_batch_size=60"]
    whole = fit(tmp_path / "whole", *flags).trainer.callback_metrics["val/acc1"]
    with monkeypatch.context() as patched:
        at_call(patched, "validation_step", 4, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted):
            fit(tmp_path / "broken", *flags)
    again = fit(tmp_path / "broken", *flags, f"--ckpt_path={last(tmp_path / 'broken')}").trainer.callback_metrics
    assert again["val/acc1"] == whole


def test_a_second_signal_ends_at_once(fit, tmp_path, monkeypatch):
    twice = lambda: [os.kill(os.getpid(), signal.SIGINT) for _ in range(2)]  # noqa: E731
    at_call(monkeypatch, "training_step", 9, twice)
    with pytest.raises(Interrupted, match="Saved step 6"):
        fit(tmp_path, "--trainer.max_epochs=4")


def test_a_signal_in_a_real_process_has_the_usual_status_and_one_line(tmp_path, tiny):
    flags = ["--data=Digits", *tiny, "--trainer.max_epochs=500", f"--out={tmp_path}"]
    process = subprocess.Popen(
        [sys.executable, "train.py", "fit", *flags], cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    while not last(tmp_path).exists():
        assert process.poll() is None
        time.sleep(0.1)
    process.terminate()
    said = process.communicate(timeout=60)[1].decode().strip().splitlines()
    assert process.returncode == 143 and said[-1].startswith("interrupted by SIGTERM. Saved step ")
    assert not any("Traceback" in line for line in said)


# Ends


def test_a_run_without_validation_keeps_its_last_step(fit, tmp_path, capsys):
    cli = fit(tmp_path, "--trainer.max_steps=9", "--trainer.val_check_interval=500", *ITERATIONS)
    assert torch.load(last(tmp_path), weights_only=True)["global_step"] == 9 == cli.trainer.global_step
    shown = capsys.readouterr().out
    assert f"last checkpoint, as no validation took place: {last(tmp_path)}" in shown
    assert (tmp_path / "checkpoints" / "model.safetensors").exists()


ITERATIONS = ["--trainer.check_val_every_n_epoch=null", "--trainer.max_epochs=-1"]


@pytest.mark.parametrize("validate_every", [500, 8])
def test_a_run_by_steps_goes_on_exactly(fit, tmp_path, monkeypatch, validate_every):
    flags = ["--trainer.max_steps=20", f"--trainer.val_check_interval={validate_every}", *ITERATIONS]
    fit(tmp_path / "whole", *flags)
    with monkeypatch.context() as patched:
        at_call(patched, "training_step", 10, lambda: os.kill(os.getpid(), signal.SIGTERM))
        with pytest.raises(Interrupted, match="Saved step 10"):
            fit(tmp_path / "broken", *flags)
    fit(tmp_path / "broken", *flags, f"--ckpt_path={last(tmp_path / 'broken')}")
    assert_same(tmp_path / "whole", tmp_path / "broken")


def test_the_last_checkpoint_is_written_by_time_too(fit, tmp_path, monkeypatch):
    steps = []
    monkeypatch.setattr(saving.time, "monotonic", lambda: 1000.0 * len(steps))

    class Watch(Callback):
        def on_train_batch_start(self, *_):
            if last(tmp_path).exists():
                steps.append(torch.load(last(tmp_path), weights_only=True)["global_step"])
            else:
                steps.append(0)

    monkeypatch.setattr(Classification, "configure_callbacks", lambda self: [Watch()])
    fit(tmp_path, "--trainer.max_epochs=1")
    assert steps == [0, 1, 2, 3, 4, 5]


# Disks


def test_a_checkpoint_is_written_beside_its_place_and_never_half(tmp_path, monkeypatch):
    path = tmp_path / "last.ckpt"
    left = tmp_path / ".old.ckpt.part"
    left.write_bytes(b"half")
    SafeIO().save_checkpoint({"step": 1}, path)
    assert not left.exists() and torch.load(path)["step"] == 1

    def full(number):
        assert path.exists() and (tmp_path / ".last.ckpt.part").exists()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(saving.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        SafeIO().save_checkpoint({"step": 2}, path)
    assert torch.load(path)["step"] == 1 and [p.name for p in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES])
def test_a_disk_that_fails_in_mid_run_ends_in_one_line(fit, tmp_path, monkeypatch, number):
    save, count = SafeIO.save_checkpoint, []

    def failing(self, checkpoint, path, storage_options=None):
        count.append(path)
        if len(count) > 2:  # the best and the last of the first epoch
            raise OSError(number, os.strerror(number), str(path))
        save(self, checkpoint, path, storage_options)

    monkeypatch.setattr(SafeIO, "save_checkpoint", failing)
    with pytest.raises(UserError, match=rf"cannot write .*: {os.strerror(number)}. .* Saved step 6: go on"):
        fit(tmp_path, "--trainer.max_epochs=4")


@pytest.mark.parametrize("out, message", [("file", "is a file"), ("file/below", "is a file")])
def test_a_folder_that_cannot_be_one_is_refused_before_training(fit, tmp_path, out, message):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=f"--out .*{out}: .*file {message}. Choose another folder"):
        fit(tmp_path / out)


def test_a_lost_or_damaged_checkpoint_gives_way_to_the_newest_readable_one(run_dir, fit, tmp_path, capsys):
    fit(tmp_path, "--trainer.max_epochs=2")
    path = last(tmp_path)
    best = next(path.parent.glob("epoch001*.ckpt"))
    for damage in (lambda: path.write_bytes(path.read_bytes()[:5000]), path.unlink):
        damage()
        cli = fit(tmp_path / "on", "--trainer.max_epochs=4", f"--ckpt_path={path}")
        assert cli.trainer.global_step == 24
        assert f"going on from {best} (step 12), the newest that can be read" in capsys.readouterr().out


def test_bare_weights_are_no_run_to_go_on_with(run_dir, fit, tmp_path):
    weights = run_dir / "checkpoints" / "model.safetensors"
    for command in ("fit", "validate"):
        flags = ["--data=Digits", f"--ckpt_path={weights}", *([f"--out={tmp_path}"] if command == "fit" else [])]
        with pytest.raises(UserError, match="holds weights without the state of a run.* --model.weights"):
            run([command, *flags])


# Processes


def lost(tmp_path, tiny, chosen, *flags):
    """Kill one of a run's two processes; gives the exit status of the survivor's side and what was said."""
    arguments = ["--data=Digits", *tiny, "--trainer.max_epochs=500", "--trainer.limit_train_batches=6", *flags]
    arguments += ["--trainer.accelerator=cpu", "--trainer.devices=2", f"--out={tmp_path}"]
    with open(tmp_path / "said", "w") as said:
        process = subprocess.Popen([sys.executable, "train.py", "fit", *arguments], cwd=ROOT, stderr=said, stdout=said)
        while not last(tmp_path).exists():
            assert process.poll() is None
            time.sleep(0.1)
        others = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
        os.kill(process.pid if chosen == 0 else int(others[-1]), signal.SIGKILL)
        status = process.wait(timeout=60)
    end = time.monotonic() + 30
    while chosen == 0 and Path("/proc", others[-1]).exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not Path("/proc", others[-1]).exists()
    return status, [line for line in (tmp_path / "said").read_text().splitlines() if line.startswith("error: ")]


@pytest.mark.slow
@pytest.mark.parametrize("strategy, chosen", [("ddp", 0), ("ddp", 1), ("ddp_spawn", 1)])
def test_a_process_of_a_run_that_is_killed_leaves_one_line_and_no_process(tmp_path, tiny, strategy, chosen):
    status, lines = lost(tmp_path, tiny, chosen, f"--trainer.strategy={strategy}")
    assert status not in (0, None) and len(lines) == 1
    assert re.search(r"process of this run ended.*Saved step \d+: go on with .* --ckpt_path .*last.ckpt", lines[0])


class Place:
    """What Lightning says of a process of a run."""

    def __init__(self, rank):
        self.rank, self.main_port = rank, os.getpid() if rank == 0 else os.getppid()

    def local_rank(self):
        return self.rank


@pytest.mark.parametrize("killed", [True, False])
def test_of_those_that_lost_the_first_process_one_speaks(monkeypatch, killed):
    """Three processes, of which the first starts the others, as Lightning does; as long as it lives they are silent."""
    monkeypatch.setenv("VISIONATTN_FIRST_PROCESS", "")
    answers, answer = os.pipe()
    if (first := os.fork()) == 0:
        voice = Voice(Place(0))
        for rank in (1, 2):
            if os.fork() == 0:
                mine = Voice(Place(rank))
                os.write(answer, b"%d" % mine.claim(patience=0.3 if not killed else 10))
                os._exit(0)
        if killed:
            os.kill(os.getpid(), signal.SIGKILL)
        for _ in range(2):
            os.wait()
        os.write(answer, b"%d" % voice.claim())
        os._exit(0)
    os.close(answer)
    os.waitpid(first, 0)
    with open(answers, "rb") as said:
        assert sorted(said.read()) == sorted(b"01" if killed else b"001")


def test_who_waits_for_an_ended_first_process_is_ended(monkeypatch):
    monkeypatch.setenv("VISIONATTN_FIRST_PROCESS", str(os.getppid()))
    voice, ended = Voice(Place(1)), threading.Event()
    voice.watch(ended.set, grace=0.0)
    assert not ended.wait(0.7)
    voice.parent = "0"  # no longer that of this process
    assert ended.wait(5)


def test_what_a_spawned_process_says_is_the_line():
    said = "\n\n-- Process 1 terminated with the following error:\nTraceback\nvisionattn.errors.UserError: mend it"
    assert str(explained(ProcessRaisedException(said, 1, 2))) == "mend it"
    assert isinstance(explained(ProcessExitedException("", 0, 1, -9)), LostProcess)


# Other failures


@pytest.mark.parametrize("command", ["validate", "test"])
def test_random_weights_are_not_measured(command, tiny):
    with pytest.raises(UserError, match=f"{command} would measure random weights: give a checkpoint with --ckpt_path"):
        run([command, "--data=Digits", *tiny])


def test_a_killed_worker_ends_in_one_line_and_its_step_is_kept(fit, tmp_path, monkeypatch):
    def kill():
        worker = next(p for p in __import__("multiprocessing").active_children())
        os.kill(worker.pid, signal.SIGKILL)

    at_call(monkeypatch, "training_step", 8, kill)
    with pytest.raises(
        UserError, match=r"process that loads images (was killed|ended).*--data.num_workers.* Saved step \d+"
    ):
        fit(tmp_path, "--trainer.max_epochs=400", "--data.num_workers=1")


@pytest.mark.parametrize("error", [ConnectionResetError, ConnectionRefusedError, EOFError, FileNotFoundError])
def test_a_worker_killed_after_it_sent_word_of_a_batch_ends_in_the_same_line(error, monkeypatch):
    """A batch's memory is fetched from the worker over a connection of its own, which a dead one no longer answers."""

    def gone(*arguments, **options):
        raise error("gone")

    # Where multiprocessing opens that connection; its own code has to be the innermost.
    own = types.FunctionType(gone.__code__, vars(connection), closure=gone.__closure__)
    monkeypatch.setattr(connection, "SocketClient", own)
    loader = DataLoader(TensorDataset(torch.ones(4, 2)), num_workers=1)
    with pytest.raises(error) as caught:
        list(loader)
    assert re.match("a process that loads images ended.*--data.num_workers", str(explained(caught.value)))
    assert explained(EOFError("elsewhere")) is None


@pytest.mark.parametrize("logger, package", [("WandbLogger", "wandb"), ("MLFlowLogger", "mlflow")])
def test_a_logger_without_its_package_names_it(fit, tmp_path, logger, package):
    pytest.importorskip("lightning")
    if __import__("importlib").util.find_spec(package):
        pytest.skip("it is installed")
    with pytest.raises(UserError, match=f"pip install {package}: "):
        fit(tmp_path, f"--trainer.logger={logger}")


def test_failures_of_the_machine_are_told_from_mistakes_of_the_program():
    for text in (
        "DataLoader worker (pid 3) is killed by signal: Killed. ",
        "unable to write to file </torch_1>: /dev/shm",
    ):
        assert isinstance(explained(RuntimeError(text)), UserError)
    assert "TMPDIR" in str(explained(FileNotFoundError(errno.ENOENT, "No usable temporary directory found in [...]")))
    for error in (RuntimeError("shapes do not match"), KeyError("x"), FileNotFoundError(errno.ENOENT, "no", "x")):
        assert explained(error) is None


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--data=FOLDER"], "--data .*: that is a kind of data, such as Images; give yours by --data.root"),
        (["--data=Images", "--data.root=FILE"], "is no folder of images and no tar"),
        (["--data=Images", "--data.mean=[1,2]"], "data.mean is .*: give a number for each of the 3 channels"),
        (["--data=Images", "--data.std=[1,0,1]"], "data.std is .*, greater than 0"),
        (["--data=Images", "--data.interpolation=x"], "data.interpolation is 'x': it must be one of nearest"),
        (["--data=Images", "--data.train_interpolation=x"], "data.train_interpolation is 'x'.*, random"),
        (["--data=Images", "--data.scale=[2,3]"], r"data.scale is \[2.*\]: give two shares"),
        (["--data=Images", "--data.crop_pct=0"], "data.crop_pct is 0.*: it must be greater than 0"),
        (["--data=SceneMasks"], "SceneMasks has no class of each image: choose another --data"),
        (["--data=Digits", "--model.optimizer_args={x: 1}"], "adamw does not take model.optimizer_args .*'x'"),
        (["--data=Digits", "--trainer.accumulate_grad_batches=0"], "accumulate_grad_batches is 0: .* at least 1"),
        (["--data=Digits", "--trainer.check_val_every_n_epoch=0"], "check_val_every_n_epoch is 0: .* at least 1"),
        (
            ["--data=Digits", "--model.name=vit_tiny_patch16_224", "--model.model_args={depth: 1}"],
            "match model .*Change --data.img_size",
        ),
    ],
)
def test_mistakes_of_a_first_run_end_in_one_sentence(tiny, folder, tmp_path, flags, said):
    (tmp_path / "x.csv").touch()
    flags = [flag.replace("FOLDER", str(folder)).replace("FILE", str(tmp_path / "x.csv")) for flag in flags]
    if "--data=Images" in flags and not any("--data.root" in flag for flag in flags):
        flags.append(f"--data.root={folder}")
    with pytest.raises(SystemExit, match=f"^error: [^\n]*{said}[^\n]*$"):
        main(["fit", *tiny, "--trainer.accelerator=cpu", f"--out={tmp_path / 'run'}", *flags])


@pytest.mark.parametrize("content", ["- a\n- b\n", "", "3\n", "a: [b\n"])
def test_a_file_that_is_no_configuration_is_named(content, tmp_path):
    path = tmp_path / "x.yaml"
    path.write_text(content)
    with pytest.raises(SystemExit, match=rf"^error: {path} is [^\n]+$"):
        main(["fit", "-c", str(path), "--data=Digits", "--model.name=van_b0"])
