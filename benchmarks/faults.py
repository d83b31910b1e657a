"""What each fault costs a run on a real Slurm of two nodes.

Measured are steps done twice, samples lost and the time to resume. The output is a Markdown table,
then whether all runs ended alike. From the checkout's root:

    PYTHONPATH=. python benchmarks/faults.py --local-slurm PATH/local-slurm --out faults

One run of a small decoder, 2 nodes x `--ranks`, each with a loader's worker, goes through all
faults one after the other; another run has none. `local-slurm` runs two nodes on one machine and
can crash one. Slurm lets a requeued job wait two minutes; that wait is cut short and not counted.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _common import results_option

import torch
from _results import save_rows

from tests.slurmkit import Job, Slurm, shell
from unclip_pl.cluster.checkpoint_io import newest_checkpoint, read_checkpoint

NET = {
    "width": 32, "mults": [1, 2], "depth": 1, "patch_size": 8, "attention": [4], "head_width": 16,
}  # fmt: skip
EVERY = 10  # steps between two checkpoints
START = "0: Resuming from"
COLUMNS = (
    "fault", "at step", "reached", "went on from", "steps done twice", "seconds to a new step",
    "queued (not counted)",
)  # fmt: skip


class Run:
    """A job whose steps are watched; `faults` are rows of the table."""

    def __init__(self, slurm: Slurm, again: Callable[[], Job]) -> None:
        self.slurm, self.again, self.rows = slurm, again, []
        self.job = again()

    def fault(
        self, name: str, after: int, strike: Callable[[], object], queued: bool = True
    ) -> None:
        """Cause a fault and wait until the job has made a new step.

        Args:
            name: of the fault.
            after: the step after which it happens.
            strike: causes it.
            queued: whether the job goes back to the queue.
        """
        job = self.job
        job.until(lambda: job.step() >= after, 900)
        starts, at, waited = job.output().count(START), job.step(), 0.0
        struck = time.monotonic()
        strike()
        if queued:
            job.until(lambda: job.state() in ("PENDING", "", "CANCELLED"), 300)
            pending = time.monotonic()
            if "crash" in name:
                self.slurm("boot", "n2")
                job.until(lambda: shell("sinfo -h -n n2 -p test -o %T").strip() == "idle", 200)
                time.sleep(10)  # late kills of the old run can hit the new one
            if "scancel" in name:
                self.job = job = self.again()
            job.until(lambda: self.slurm("hurry") == "" and job.state() == "RUNNING", 300)
            waited = time.monotonic() - pending
        job.until(lambda: job.output().count(START) > starts, 900)
        reached, count = job.step(), len(job.lines())
        job.until(lambda: len(job.lines()) > count, 900)
        again = job.lines()[count]["step"]
        steps = at, reached, again - 1, reached - again + 1
        self.rows.append((name, *steps, time.monotonic() - struck - waited, waited))
        print(*self.rows[-1], flush=True)


def outcome(run: Job, straight: Job) -> dict[str, Any]:
    """Whether the run with all faults ended like the one without."""
    lines, whole = run.lines(), straight.lines()
    place = {(line["step"], line["rank"]): (line["keys"], line["loss"]) for line in whole}
    same = all(place[line["step"], line["rank"]] == (line["keys"], line["loss"]) for line in lines)
    last = {(line["step"], line["rank"]): line["keys"] for line in lines}
    seen = Counter(key for keys in last.values() for key in keys)
    wanted = Counter(key for line in whole for key in line["keys"])
    ours, theirs = (read_checkpoint(newest_checkpoint(job.folder)) for job in (run, straight))
    equal = all(
        torch.equal(value, theirs[part][name])
        for part in ("state_dict", "current_model_state")
        for name, value in ours[part].items()
    )
    return {
        "same samples and losses": same,
        "samples lost": sum((wanted - seen).values()),
        "weights equal bit for bit": equal,
        "steps": ours["global_step"],
    }


def main() -> None:
    """Run one job through all faults and one without, and print the table and the verdict."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--local-slurm", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--ranks", type=int, default=1, help="per node")
    parser.add_argument("--steps", type=int, default=105)
    results_option(parser)
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True)
    options = [
        "--ranks", str(arguments.ranks), "--trainer.max_steps", str(arguments.steps),
        "--newest.every_n_train_steps", str(EVERY), "--model.net", json.dumps(NET),
        "--data.loader.batch_size", "4", "--data.loader.num_workers", "1", "--data.val", "null",
        "--preemption.ask_every", "1", "--warn", "45",
    ]  # fmt: skip
    with Slurm(arguments.local_slurm, str(out / "slurm"), 26900) as slurm:
        part = arguments.steps // 7
        killed = {"kill_once": 2 * part + 5}

        def start() -> Job:
            stage = "stages/decoder.yaml"
            return Job(out / "faults", *options, stage=stage, slow=0.3, diary=killed)

        run = Run(slurm, start)

        def urgent() -> None:
            how = "--partition=urgent --nodes=2 --exclusive --output=/dev/null --wrap=true"
            shell(f"sbatch {how}")

        def limit() -> None:
            minutes = int(shell(f"squeue -h -j {run.job.id} -o %M").strip().split(":")[0]) + 2
            shell(f"scontrol update JobId={run.job.id} TimeLimit={minutes}")
            run.job.until(lambda: run.job.state() == "PENDING", 300)
            shell(f"scontrol update JobId={run.job.id} TimeLimit=60")

        run.fault("preempted by `urgent`", part, urgent)
        # here the rank kills itself
        run.fault("kill -9 of a rank", killed["kill_once"], lambda: None, queued=False)
        run.fault("crash of a node", 3 * part + 5, lambda: slurm("crash", "n2"))
        run.fault("time limit", 4 * part + 5, limit)
        cancel = lambda: shell(f"scancel {run.job.id}")  # noqa: E731
        run.fault("scancel, submitted again", 5 * part + 5, cancel)
        straight = Job(out / "straight", *options, stage="stages/decoder.yaml")
        for one in (run.job, straight):
            if one.ended() != "COMPLETED":
                raise SystemExit(one.output()[-3000:])

    print(f"\n| {' | '.join(COLUMNS)} |\n|" + "---|" * len(COLUMNS))
    for name, *numbers, seconds, waited in run.rows:
        print(f"| {name} | {' | '.join(map(str, numbers))} | {seconds:.0f} | {waited:.0f} |")
    ended = outcome(run.job, straight)
    print(json.dumps(ended))
    rows = [dict(zip(COLUMNS, row)) for row in run.rows]
    save_rows("faults", arguments.results, {"faults": rows, "outcome": ended})


if __name__ == "__main__":
    main()
