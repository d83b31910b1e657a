"""Faults in jobs on a real Slurm of two nodes, submitted with `unclip submit`, lose nothing.

Skipped if `local-slurm` is not next to this checkout or does not start. `benchmarks/faults.py`
tests more faults, with a real stage.
"""

import json
import os
import tempfile

import pytest
import torch

from tests.conftest import ROOT, SHARED
from tests.slurmkit import QUIET, Job, Slurm, shell
from unclip_pl.cli.lightning_cli import build_cli
from unclip_pl.cluster.checkpoint_io import newest_checkpoint, read_checkpoint

LOCAL = SHARED / "slurm" / "local-slurm"
TOY = ["--model", "tests.training.toy.Toy", "--data", "tests.training.toy.ToyRows", *QUIET]
# A busy machine needs long to import torch.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def slurm():
    """Two running nodes."""
    if not LOCAL.is_file():
        pytest.skip("local-slurm is not next to this checkout")
    folder = os.environ.get("LOCAL_SLURM_DIR") or tempfile.mkdtemp(prefix="slurm-") + "/s"
    port = int(os.environ.get("LOCAL_SLURM_PORT") or 25000 + os.getpid() % 1500)
    nodes = Slurm(LOCAL, folder, port)
    try:
        nodes.__enter__()
    except RuntimeError as error:
        pytest.skip(f"it does not start here: {error}")
    yield nodes
    nodes.__exit__()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where each job makes its folder."""
    return tmp_path_factory.mktemp("jobs")


def mean_losses(lines: list[dict]) -> dict[int, float]:
    """The mean over ranks of the loss of each step."""
    steps: dict[int, list[float]] = {}
    for line in lines:
        steps.setdefault(line["step"], []).append(float.fromhex(line["loss"]))
    return {step: sum(losses) / len(losses) for step, losses in sorted(steps.items())}


@pytest.fixture
def _in_the_checkout(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.usefixtures("_in_the_checkout")
def test_two_nodes_with_two_ranks_each_have_the_losses_of_one_process(slurm, folder):
    job = Job(folder / "four", "--ranks", "2", "--model.noise", "0", "--trainer.max_steps", "20")
    diary = folder / "single.jsonl"
    config = {"class_path": "tests.training.diary.Diary", "init_args": {"path": str(diary)}}
    run = ["--trainer.accelerator", "cpu", "--trainer.max_steps", "20"]
    run += ["--trainer.default_root_dir", str(folder / "single"), "--model.noise", "0"]
    run += ["--data.batch_size", "16", "--trainer.callbacks+", json.dumps(config)]
    build_cli(["fit", *TOY, *run])
    assert job.ended() == "COMPLETED", job.output()[-3000:]
    four = mean_losses(job.lines())
    one = mean_losses([json.loads(line) for line in diary.read_text().splitlines()])
    assert len(job.lines()) == 80 and list(four) == list(one) == list(range(1, 21))
    assert max(abs(four[step] - one[step]) for step in one) < 1e-5 and one[1] > 10 * one[20]


@pytest.mark.usefixtures("_in_the_checkout")
def test_a_job_preempted_and_then_killed_ends_like_one_that_was_not(slurm, folder):
    flags = ["--trainer.max_steps", "60", "--newest.every_n_train_steps", "10"]
    flags += ["--preemption.ask_every", "0"]
    job = Job(folder / "cut", *flags, slow=0.1, diary={"kill_once": 44})
    job.until(lambda: job.step() >= 12)
    shell("sbatch --partition=urgent --nodes=2 --exclusive --output=/dev/null --wrap=true")
    job.until(lambda: "requeueing" in job.output())
    stopped = int(newest_checkpoint(job.folder).stem.partition("=")[2])
    job.until(lambda: job.state() == "PENDING")
    job.until(lambda: slurm("hurry") == "" and job.step() > stopped)
    straight = Job(folder / "straight", *flags)
    for each in (job, straight):
        assert each.ended() == "COMPLETED", each.output()[-3000:]
    lines, expected = job.lines(), straight.lines()
    by_place = {(line["step"], line["rank"]): line for line in expected}
    # The same samples and losses, to the last bit.
    assert len(expected) == 120
    assert all(by_place[line["step"], line["rank"]] == line for line in lines)
    # The preemption repeats no step, the kill only those since the last checkpoint.
    steps = [line["step"] for line in lines if line["rank"] == 0]
    assert steps[:stopped] == list(range(1, stopped + 1))
    assert sorted(set(steps)) == list(range(1, 61)) and len(lines) <= 120 + 2 * 5
    assert "restart 1 of 3" in job.output()
    assert (folder / "cut" / f"{job.id}.failures").read_text() == "1\n"
    cut, whole = (read_checkpoint(newest_checkpoint(each.folder)) for each in (job, straight))
    assert cut["global_step"] == whole["global_step"] == 60
    for part in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, whole[part][name]) for name, value in cut[part].items())


@pytest.mark.usefixtures("_in_the_checkout")
def test_a_cancelled_job_saves_and_stays_cancelled(slurm, folder):
    job = Job(folder / "cancelled", "--trainer.max_steps", "10000", slow=0.1)
    job.until(lambda: job.step() >= 5)
    shell(f"scancel {job.id}")
    assert job.ended() == "CANCELLED"
    job.until(lambda: newest_checkpoint(job.folder) is not None, 30)
    saved = int(newest_checkpoint(job.folder).stem.partition("=")[2])
    assert saved >= 5 and job.step() == saved
    assert "requeueing" not in job.output() and "restart" not in job.output()
