"""A run that is asked to stop does so at one step on all ranks, with a checkpoint.

The job script learns from a file how the run ended.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from tests.cluster.forks import Ranks
from tests.training.toy import Toy, loader, trainer
from unclip_pl.cluster.checkpoint_io import newest_checkpoint, read_checkpoint
from unclip_pl.cluster.preemption import Preemption
from unclip_pl.training.checkpoints import NewestCheckpoint
from unclip_pl.utils import signals
from unclip_pl.utils.signals import StopRequest, stop_state

ROOT = Path(__file__).resolve().parents[2]


class Signal(Callback):
    """Sends this process signals at the start of a step."""

    def __init__(self, step, *signums):
        self.step, self.signums = step, signums

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            for signum in self.signums:
                signal.raise_signal(signum)


def handlers():
    """The current handlers of the signals that stop a run."""
    return [signal.getsignal(signum) for signum in signals.REQUEST_OF_SIGNAL]


@pytest.fixture(autouse=True)
def _no_stop_request(monkeypatch, tmp_path):
    monkeypatch.setenv("UNCLIP_ENDED", str(tmp_path / "ended"))
    stop_state.requested = stop_state.agreed = StopRequest.NOTHING
    yield
    stop_state.requested = stop_state.agreed = StopRequest.NOTHING


@pytest.mark.parametrize(
    ("sent", "agreed", "reason", "code"),
    [
        ([signal.SIGINT], StopRequest.INTERRUPT, None, 0),
        ([signal.SIGUSR1], StopRequest.REQUEUE, "requeue", 75),
        ([signal.SIGTERM], StopRequest.STOP, "stop", 143),
        # A cancelled job stays cancelled.
        ([signal.SIGTERM, signal.SIGUSR1], StopRequest.STOP, "stop", 143),
    ],
)
def test_a_signal_ends_training_after_the_step_with_a_checkpoint(
    tmp_path, sent, agreed, reason, code
):
    before = handlers()

    class NeverValidated(Toy):
        def validation_step(self, *_):
            raise AssertionError("there may be no time for it")

    run = trainer(
        tmp_path,
        Preemption(),
        NewestCheckpoint(50),
        Signal(2, *sent),
        val_check_interval=5,
        check_val_every_n_epoch=None,
    )
    run.fit(NeverValidated(), loader(), loader())
    assert newest_checkpoint(tmp_path).name == "newest-step=3.ckpt"
    assert stop_state.agreed == agreed and signals.EXIT_CODES[stop_state.agreed] == code
    ended = tmp_path / "ended"
    assert (ended.read_text().strip() if ended.exists() else None) == reason
    assert handlers() == before and stop_state.requested == StopRequest.NOTHING


def test_a_signal_at_the_last_step_asks_for_nothing_more(tmp_path):
    callbacks = Preemption(), NewestCheckpoint(50), Signal(7, signal.SIGUSR1)
    trainer(tmp_path, *callbacks, steps=8).fit(Toy(), loader())
    assert newest_checkpoint(tmp_path).name == "newest-step=8.ckpt"
    assert stop_state.agreed == StopRequest.NOTHING and not (tmp_path / "ended").exists()


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    before = handlers()
    run = trainer(
        tmp_path, Preemption(), NewestCheckpoint(50), Signal(2, signal.SIGINT, signal.SIGINT)
    )
    with pytest.raises(SystemExit, match="1"):  # Lightning turns the KeyboardInterrupt into it
        run.fit(Toy(), loader())
    assert newest_checkpoint(tmp_path) is None and handlers() == before


def test_a_job_that_only_validates_ends_at_once(tmp_path):
    seen = []

    class Look(Callback):
        def on_validation_batch_end(self, *_):
            seen.append(signal.getsignal(signal.SIGTERM))

    trainer(tmp_path, Preemption(), Look()).validate(Toy(), loader(size=4))
    assert seen == [signal.SIG_DFL]  # and not Lightning's, which waits for the other ranks


def test_a_run_stopped_and_resumed_equals_one_that_was_not(tmp_path):
    callbacks = Preemption(), NewestCheckpoint(50)
    trainer(tmp_path / "straight", *callbacks, steps=12).fit(Toy(), loader(size=64))
    stopped = trainer(tmp_path / "cut", *callbacks, Signal(6, signal.SIGUSR1), steps=12)
    stopped.fit(Toy(), loader(size=64))
    path = newest_checkpoint(tmp_path / "cut")
    progress = read_checkpoint(path)["loops"]["fit_loop"]["epoch_progress"]
    assert progress["current"]["completed"] == 0  # saved within the epoch, not after its end
    trainer(tmp_path / "cut", *callbacks, steps=12).fit(Toy(), loader(size=64), ckpt_path=path)
    cut, straight = (
        read_checkpoint(newest_checkpoint(tmp_path / name)) for name in ("cut", "straight")
    )
    assert cut["global_step"] == straight["global_step"] == 12
    assert cut["state_dict"].keys() == straight["state_dict"].keys()


class Rank:
    """A trainer of one rank of two, which runs after the other one.

    Args:
        polls: what the ranks sent at each step; shared by both.
        pace: seconds per step.
        clock: a list with the time, which `run` advances.
    """

    world_size, is_global_zero, max_steps, device = 2, False, 10_000, "cpu"

    def __init__(self, polls, pace, clock):
        self.polls, self.pace, self.clock = polls, pace, clock
        self.global_step, self.should_stop = 0, False
        self.strategy = self
        self.preemption = Preemption(ask_every=2.0)

    def reduce(self, mine, reduce_op):
        assert reduce_op == "max"
        self.polls.setdefault(self.global_step, []).append(mine)
        return torch.stack(self.polls[self.global_step]).amax(0)

    def run(self, until, interrupted_at=None):
        stop_state.requested = StopRequest.NOTHING
        self.preemption.setup(self, self, "fit")
        self.preemption.on_train_start(self, self)
        try:
            while not self.should_stop and self.global_step < until:
                self.global_step += 1
                self.clock[0] += self.pace
                if self.global_step == interrupted_at:
                    signal.raise_signal(signal.SIGUSR1)
                self.preemption.on_train_batch_end(self, self)
        finally:
            self.preemption.teardown(self, self, "fit")
        return self.global_step


@pytest.mark.parametrize(("pace", "every"), [(1 / 8, 16), (1 / 512, 1000), (4.0, 1)])
def test_ranks_ask_each_other_every_two_seconds_and_stop_together(monkeypatch, pace, every):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    polls = {}
    first = Rank(polls, pace, clock).run(4 * every, interrupted_at=every + 1)
    assert first - (every + 1) <= every and sorted(polls) == list(range(1, first + 1, every))
    other = Rank(polls, pace, clock)
    assert other.run(4 * every) == first and other.should_stop  # nobody signalled this one


def arguments(folder, *flags):
    """The command line of a toy run that keeps a diary."""
    callbacks = {
        "tests.training.diary.Diary": {"path": str(folder / "diary.jsonl")},
        "tests.training.toy.Slow": {"seconds": 0.05},
    }
    options = {
        "model": "tests.training.toy.Toy",
        "data": "tests.training.toy.ToyRows",
        "trainer.default_root_dir": str(folder),
        "trainer.max_steps": "60",
        "trainer.accelerator": "cpu",
        "trainer.logger": "false",
        "trainer.enable_progress_bar": "false",
    }
    words = ["fit"]
    for name, value in options.items():
        words += [f"--{name}", value]
    for name, init_args in callbacks.items():
        callback = json.dumps({"class_path": name, "init_args": init_args})
        words += ["--trainer.callbacks+", callback]
    return [*words, *flags]


def lines(folder):
    path = folder / "diary.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


SIGNALLED = """
import runpy, signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            sys.meta_path.remove(self)
            signal.raise_signal(signal.SIGUSR1)  # kills a process without a handler

sys.meta_path.insert(0, Finder())
runpy.run_module("unclip_pl", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_a_signal_during_the_import_of_torch_is_kept_until_the_first_step(tmp_path):
    command = [sys.executable, "-c", SIGNALLED, *arguments(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 75, done.stderr[-3000:]
    assert newest_checkpoint(tmp_path).name == "newest-step=1.ckpt"
    assert (tmp_path / "ended").read_text() == "requeue\n"


@pytest.mark.slow
def test_two_ranks_of_which_one_is_signalled_stop_together_and_go_on_exactly(tmp_path):
    run = Ranks(tmp_path, arguments(tmp_path), 2)
    run.until(lambda: len(lines(tmp_path)) > 5)
    os.kill(run.pids[1], signal.SIGUSR1)
    assert run.wait() == [75, 75], run.output()[-3000:]
    step = int(newest_checkpoint(tmp_path).stem.partition("=")[2])
    assert 3 <= step < 60 and (tmp_path / "ended").read_text() == "requeue\n"
    (tmp_path / "ended").unlink()
    resumed = Ranks(tmp_path, arguments(tmp_path, "--resume", "auto"), 2)
    assert resumed.wait() == [0, 0], run.output()[-3000:]
    diary = lines(tmp_path)
    every_step_once = [(step, rank) for step in range(1, 61) for rank in range(2)]
    assert sorted((line["step"], line["rank"]) for line in diary) == every_step_once
    for epoch in range(2):  # of 25 steps
        steps = range(25 * epoch + 1, 25 * epoch + 26)
        keys = [key for line in diary if line["step"] in steps for key in line["keys"]]
        assert len(keys) == len(set(keys)) == 200
    assert not (tmp_path / "ended").exists()


def test_a_rank_that_is_terminated_ends_all_with_a_checkpoint_and_no_requeue(tmp_path):
    run = Ranks(tmp_path, arguments(tmp_path), 2)
    run.until(lambda: len(lines(tmp_path)) > 5)
    os.kill(run.pids[0], signal.SIGTERM)
    assert run.wait() == [143, 143], run.output()[-3000:]
    assert newest_checkpoint(tmp_path) is not None
    assert (tmp_path / "ended").read_text() == "stop\n"
