"""Faults injected into jobs on a real Slurm of two nodes, submitted with `unclip submit`: nothing that counts is lost.

Skipped where `local-slurm` is not beside this checkout or refuses to start. `benchmarks/faults.py` does more of the same with a real stage.
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
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
]  # a busy machine takes its time to import torch


@pytest.fixture(scope="module")
def slurm():
    """The two nodes are up."""
    if not LOCAL.is_file():
        pytest.skip("local-slurm is not beside this checkout")
    folder = os.environ.get("LOCAL_SLURM_DIR") or tempfile.mkdtemp(prefix="slurm-") + "/s"
    one = Slurm(
        LOCAL, folder, int(os.environ.get("LOCAL_SLURM_PORT") or 25000 + os.getpid() % 1500)
    )
    try:
        one.__enter__()
    except RuntimeError as error:
        pytest.skip(f"it does not start here: {error}")
    yield one
    one.__exit__()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """For the jobs' own folders."""
    return tmp_path_factory.mktemp("jobs")


def mean_losses(lines: list[dict]) -> dict[int, float]:
    """By step, over the ranks."""
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
    alone = folder / "alone"
    diary = json.dumps(
        {
            "class_path": "tests.training.diary.Diary",
            "init_args": {"path": str(folder / "alone.jsonl")},
        }
    )
    build_cli(["fit", *TOY, "--trainer.accelerator", "cpu", "--trainer.max_steps", "20", "--trainer.default_root_dir", str(alone), "--model.noise", "0",
               "--data.batch_size", "16", "--trainer.callbacks+", diary])  # fmt: skip
    assert job.ended() == "COMPLETED", job.output()[-3000:]
    theirs, ours = (
        mean_losses(job.lines()),
        mean_losses(
            [json.loads(line) for line in (folder / "alone.jsonl").read_text().splitlines()]
        ),
    )
    assert len(job.lines()) == 80 and list(theirs) == list(ours) == list(range(1, 21))
    assert max(abs(theirs[step] - ours[step]) for step in ours) < 1e-5 and ours[1] > 10 * ours[20]


@pytest.mark.usefixtures("_in_the_checkout")
def test_a_job_preempted_and_then_killed_ends_like_one_that_was_not(slurm, folder):
    flags = [
        "--trainer.max_steps",
        "60",
        "--newest.every_n_train_steps",
        "10",
        "--preemption.ask_every",
        "0",
    ]
    job = Job(folder / "cut", *flags, slow=0.1, diary={"kill_once": 44})
    job.until(lambda: job.step() >= 12)
    shell("sbatch --partition=urgent --nodes=2 --exclusive --output=/dev/null --wrap=true")
    job.until(lambda: "requeueing" in job.output())
    stopped = int(newest_checkpoint(job.folder).stem.partition("=")[2])
    job.until(lambda: job.state() == "PENDING")
    job.until(lambda: slurm("hurry") == "" and job.step() > stopped)
    straight = Job(folder / "straight", *flags)
    assert (job.ended(), straight.ended()) == ("COMPLETED", "COMPLETED"), (
        job.output()[-3000:] + straight.output()[-3000:]
    )
    lines, whole = job.lines(), straight.lines()
    by_place = {(line["step"], line["rank"]): line for line in whole}
    assert len(whole) == 120 and all(
        by_place[line["step"], line["rank"]] == line for line in lines
    )  # the same samples and losses, to the last bit
    assert [line["step"] for line in lines if line["rank"] == 0][:stopped] == list(
        range(1, stopped + 1)
    )  # none of them done twice by the preemption
    assert (
        sorted({line["step"] for line in lines}) == list(range(1, 61)) and len(lines) <= 120 + 2 * 5
    )  # by the kill those since the last checkpoint
    assert (
        "restart 1 of 3" in job.output()
        and (folder / "cut" / f"{job.id}.failures").read_text() == "1\n"
    )
    ours, theirs = (read_checkpoint(newest_checkpoint(one.folder)) for one in (job, straight))
    assert ours["global_step"] == theirs["global_step"] == 60
    for part in ("state_dict", "current_model_state"):
        assert all(torch.equal(value, theirs[part][name]) for name, value in ours[part].items())


@pytest.mark.usefixtures("_in_the_checkout")
def test_a_cancelled_job_saves_and_stays_cancelled(slurm, folder):
    job = Job(folder / "cancelled", "--trainer.max_steps", "10000", slow=0.1)
    job.until(lambda: job.step() >= 5)
    shell(f"scancel {job.id}")
    assert job.ended() == "CANCELLED"
    job.until(lambda: newest_checkpoint(job.folder) is not None, 30)
    saved = int(newest_checkpoint(job.folder).stem.partition("=")[2])
    assert (
        saved >= 5
        and job.step() == saved
        and "requeueing" not in job.output()
        and "restart" not in job.output()
    )
