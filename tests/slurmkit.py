"""Jobs on a local Slurm, submitted with `unclip submit` and watched through their files."""

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from unclip_pl.cli.unclip import main

QUIET = ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
TOY_STAGE = """\
model: {class_path: tests.training.toy.Toy}
data: {class_path: tests.training.toy.ToyRows}
"""


class Slurm:
    """The two nodes that the script `local-slurm` runs on this machine, started by `with`.

    Raises:
        RuntimeError: it does not start here.
    """

    def __init__(self, script: Path, folder: str, port: int) -> None:
        self.script = script
        self.environment = {"LOCAL_SLURM_DIR": folder, "LOCAL_SLURM_PORT": str(port)}

    def __call__(self, *command: str) -> str:
        """The output of a command of `local-slurm`."""
        if command == ("hurry",):
            time.sleep(3)  # a node that revoked a job's credential takes none of the same second
        done = subprocess.run(
            ["bash", self.script, *command],
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        # "hurry" fails for a job that starts at this very moment.
        if done.returncode and command != ("hurry",):
            raise RuntimeError(f"local-slurm {' '.join(command)}: {done.stderr.strip()[-300:]}")
        return done.stdout

    def __enter__(self) -> "Slurm":
        self.before = os.environ.get("SLURM_CONF")
        os.environ["SLURM_CONF"] = self("up").strip().partition("=")[2]
        return self

    def __exit__(self, *_: object) -> None:
        self("down")
        if self.before is None:
            os.environ.pop("SLURM_CONF")
        else:
            os.environ["SLURM_CONF"] = self.before


class Job:
    """A job on two nodes without GPUs, in its own folder.

    Args:
        folder: of the run and the logs.
        options: of `lightning` or `unclip submit`.
        stage: the YAML; "": the toy stage.
        diary: arguments of the callback `Diary`, apart from its path.
        slow: seconds that each step takes at least.
    """

    def __init__(
        self,
        folder: Path,
        *options: str,
        stage: str = "",
        diary: dict | None = None,
        slow: float = 0.0,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.folder, self.diary = folder, folder / "diary.jsonl"
        callbacks = {
            "tests.training.diary.Diary": {"path": str(self.diary)} | (diary or {}),
            "tests.training.toy.Slow": {"seconds": slow},
        }
        flags = []
        for name, init_args in callbacks.items():
            callback = json.dumps({"class_path": name, "init_args": init_args})
            flags += ["--trainer.callbacks+", callback]
        if not stage:
            stage = str(folder / "toy.yaml")
            Path(stage).write_text(TOY_STAGE)
        submit = ["submit", stage, "--nodes", "2", "--gpus", "0", "--cpus", "1", "--time", "30"]
        run = [*QUIET, *flags, "--trainer.default_root_dir", str(folder)]
        assert main([*submit, "--logs", str(folder), *run, *options]) == 0
        self.id = max(map(int, shell("squeue -h -t all -o %A").split()))

    def state(self) -> str:
        """PENDING, RUNNING ...; "" when it is over."""
        return shell(f"squeue -h -j {self.id} -o %T", check=False).strip()

    def output(self) -> str:
        """What the job has printed."""
        return "".join(path.read_text() for path in self.folder.glob("*.out"))

    def lines(self) -> list[dict]:
        """The lines of the diary, in the order in which they were written."""
        if not self.diary.exists():
            return []
        return [json.loads(line) for line in self.diary.read_text().splitlines()]

    def step(self) -> int:
        """The highest step so far."""
        return max((line["step"] for line in self.lines()), default=0)

    def until(self, condition: Callable[[], object], seconds: float = 800) -> None:
        """Wait for a condition while the job runs."""
        end = time.monotonic() + seconds
        while not condition():
            over = self.state() == ""
            assert time.monotonic() < end and (not over or condition()), self.output()[-3000:]
            time.sleep(0.2)

    def ended(self) -> str:
        """Wait for the end of the job; returns the state that Slurm reports."""
        self.until(lambda: self.state() in ("", "COMPLETED", "FAILED", "CANCELLED"), 1800)
        return shell(f"scontrol show job -o {self.id}").partition("JobState=")[2].split()[0]


def shell(command: str, check: bool = True) -> str:
    """The output of a command that has no quotes."""
    return subprocess.run(command.split(), capture_output=True, text=True, check=check).stdout
