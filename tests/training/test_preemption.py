"""A run that is told to end does so at one step on all ranks, with a checkpoint and a word for the job script."""

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

from tests.training.toy import Toy, loader, trainer
from unclip_pl import signals
from unclip_pl.signals import Asked, notes
from unclip_pl.training.checkpoint import NewestCheckpoint, newest_checkpoint, read_checkpoint
from unclip_pl.training.preemption import Preemption

ROOT = Path(__file__).resolve().parent.parent.parent
SLOW = json.dumps({"class_path": "tests.training.toy.Slow", "init_args": {"seconds": 0.1}})


class Signal(Callback):
    """Sends this process signals at the start of a step."""

    def __init__(self, step, *signums):
        self.step, self.signums = step, signums

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.step:
            for signum in self.signums:
                signal.raise_signal(signum)


@pytest.fixture(autouse=True)
def _no_notes(monkeypatch, tmp_path):
    monkeypatch.setenv("UNCLIP_ENDED", str(tmp_path / "ended"))
    notes.asked = notes.agreed = Asked.NOTHING
    yield
    notes.asked = notes.agreed = Asked.NOTHING


@pytest.mark.parametrize(
    ("sent", "agreed", "word", "code"),
    [
        ([signal.SIGINT], Asked.INTERRUPT, None, 0), ([signal.SIGUSR1], Asked.REQUEUE, "requeue", 75), ([signal.SIGTERM], Asked.STOP, "stop", 143),
        ([signal.SIGTERM, signal.SIGUSR1], Asked.STOP, "stop", 143),  # a cancelled job stays cancelled
    ],
)  # fmt: skip
def test_a_signal_ends_training_after_the_step_with_a_checkpoint(tmp_path, sent, agreed, word, code):
    before = [signal.getsignal(signum) for signum in signals.MEANING]

    class NeverValidated(Toy):
        def validation_step(self, *_):
            raise AssertionError("there may be no time for it")

    run = trainer(tmp_path, Preemption(), NewestCheckpoint(50), Signal(2, *sent), val_check_interval=5, check_val_every_n_epoch=None)
    run.fit(NeverValidated(), loader(), loader())
    assert newest_checkpoint(tmp_path).name == "newest-step=3.ckpt"
    assert notes.agreed == agreed and signals.EXIT_CODES[notes.agreed] == code
    assert (tmp_path / "ended").read_text().strip() == word if word else not (tmp_path / "ended").exists()
    assert [signal.getsignal(signum) for signum in signals.MEANING] == before and notes.asked == Asked.NOTHING


def test_a_signal_at_the_last_step_asks_for_nothing_more(tmp_path):
    trainer(tmp_path, Preemption(), NewestCheckpoint(50), Signal(7, signal.SIGUSR1), steps=8).fit(Toy(), loader())
    assert newest_checkpoint(tmp_path).name == "newest-step=8.ckpt" and notes.agreed == Asked.NOTHING and not (tmp_path / "ended").exists()


def test_a_second_ctrl_c_ends_at_once(tmp_path):
    with pytest.raises(SystemExit, match="1"):  # Lightning turns the KeyboardInterrupt into it
        trainer(tmp_path, Preemption(), NewestCheckpoint(50), Signal(2, signal.SIGINT, signal.SIGINT)).fit(Toy(), loader())
    assert newest_checkpoint(tmp_path) is None


def test_a_run_stopped_and_resumed_equals_one_that_was_not(tmp_path):
    callbacks = Preemption(), NewestCheckpoint(50)
    trainer(tmp_path / "straight", *callbacks, steps=12).fit(Toy(), loader(size=64))
    trainer(tmp_path / "cut", *callbacks, Signal(6, signal.SIGUSR1), steps=12).fit(Toy(), loader(size=64))
    path = newest_checkpoint(tmp_path / "cut")
    assert read_checkpoint(path)["loops"]["fit_loop"]["epoch_progress"]["current"]["completed"] == 0  # as saved in mid-epoch, not after its end
    trainer(tmp_path / "cut", *callbacks, steps=12).fit(Toy(), loader(size=64), ckpt_path=path)
    ours, theirs = (read_checkpoint(newest_checkpoint(tmp_path / name)) for name in ("cut", "straight"))
    assert ours["global_step"] == theirs["global_step"] == 12 and ours["state_dict"].keys() == theirs["state_dict"].keys()


class Rank:
    """A trainer of one rank of two: what each rank said last is shared when both have come to the same step. A step lasts `pace` seconds."""

    world_size, is_global_zero, max_steps, device = 2, False, 10_000, "cpu"

    def __init__(self, said, pace, clock):
        self.global_step, self.should_stop, self.strategy, self.said, self.pace, self.clock = 0, False, self, said, pace, clock
        self.preemption = Preemption(ask_every=2.0)

    def reduce(self, mine, reduce_op):
        assert reduce_op == "max"
        self.said.setdefault(self.global_step, []).append(mine)
        return torch.stack(self.said[self.global_step]).amax(0)

    def run(self, until, interrupted_at=None):
        notes.asked = Asked.NOTHING
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
    said = {}
    first = Rank(said, pace, clock).run(4 * every, interrupted_at=every + 1)
    assert first - (every + 1) <= every and sorted(said) == list(range(1, first + 1, every))
    other = Rank(said, pace, clock)
    assert other.run(4 * every) == first and other.should_stop  # nobody signalled this one


def fit(folder, *flags, ranks=1):
    """A running `lightning fit` of the toy, its output in `folder`/said.txt."""
    command = [sys.executable] + (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else [])
    command += [
        "-m", "unclip_pl", "fit", "--model", "tests.training.toy.Toy", "--data", "tests.training.toy.ToyRows", "--trainer.default_root_dir", str(folder),
        "--trainer.max_steps", "400", "--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false",
        "--trainer.callbacks+", json.dumps({"class_path": "tests.training.diary.Diary", "init_args": {"path": str(folder / "diary.jsonl")}}),
        "--trainer.callbacks+", SLOW, *(["--trainer.devices", str(ranks), "--trainer.strategy", "ddp"] if ranks > 1 else []), *flags,
    ]  # fmt: skip
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "UNCLIP_ENDED": str(folder / "ended")}
    with (folder / "said.txt").open("a") as said:
        return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=said, stderr=said)


def wait_for(condition, process, folder, seconds=200):
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None and time.monotonic() < end, (folder / "said.txt").read_text()[-3000:]
        time.sleep(0.1)


def lines(folder):
    path = folder / "diary.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def test_a_signal_during_the_import_of_torch_is_kept_until_the_first_step(tmp_path):
    process = fit(tmp_path)
    caught = f"/proc/{process.pid}/status"
    bit = 1 << (signal.SIGUSR1 - 1)
    wait_for(lambda: int(next(line for line in Path(caught).read_text().splitlines() if line.startswith("SigCgt")).split()[1], 16) & bit, process, tmp_path)
    assert b"libtorch_cpu" not in Path(f"/proc/{process.pid}/maps").read_bytes()  # it listens before torch is there
    process.send_signal(signal.SIGUSR1)
    assert process.wait(200) == 75, (tmp_path / "said.txt").read_text()[-3000:]
    assert newest_checkpoint(tmp_path).name == "newest-step=1.ckpt" and (tmp_path / "ended").read_text() == "requeue\n"


def test_two_ranks_of_which_one_is_signalled_stop_together_and_go_on_exactly(tmp_path):
    process = fit(tmp_path, "--trainer.max_steps", "60", ranks=2)
    wait_for(lambda: len(lines(tmp_path)) > 5, process, tmp_path)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGUSR1)
    process.wait(200)  # torchrun's own code says only that a rank did not end with 0
    stopped = newest_checkpoint(tmp_path)
    step = int(stopped.stem.partition("=")[2])
    assert 5 < step < 60 and (tmp_path / "ended").read_text() == "requeue\n", (tmp_path / "said.txt").read_text()[-3000:]
    (tmp_path / "ended").unlink()
    assert fit(tmp_path, "--trainer.max_steps", "60", "--resume", "auto", ranks=2).wait(200) == 0, (tmp_path / "said.txt").read_text()[-3000:]
    given = [json.loads(line) for line in lines(tmp_path)]
    seen = [(line["step"], key) for line in given for key in line["keys"]]
    assert sorted({step for step, _ in seen}) == list(range(1, 61)) and len(given) == 120  # each step once on each rank
    assert all(len({key for at, key in seen if 25 * n < at <= 25 * n + 25}) == 200 for n in range(2))  # two whole epochs of 200 samples
    assert not (tmp_path / "ended").exists()
