"""Jobs on a local Slurm, submitted with `unclip submit` and watched through the files that they write, never by a time."""

import json
import os
import subprocess
import time
from pathlib import Path

from unclip_pl.cli.unclip import main

QUIET = ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]


class Slurm:
    """The two nodes that the script `local-slurm` runs on this machine; see its own help. `with` starts and ends them.

    Raises:
        RuntimeError: it refuses to start here.
    """

    def __init__(self, script: Path, folder: str, port: int) -> None:
        self.script, self.own = script, {"LOCAL_SLURM_DIR": folder, "LOCAL_SLURM_PORT": str(port)}

    def __call__(self, *command: str) -> str:
        if command == ("hurry",):
            time.sleep(3)  # a node that revoked a job's credential takes none of the same second
        done = subprocess.run(
            ["bash", self.script, *command],
            env=os.environ | self.own,
            capture_output=True,
            text=True,
            timeout=300,
        )
        if done.returncode and command != (
            "hurry",
        ):  # a job that starts at this very moment is none to hurry
            raise RuntimeError(f"local-slurm {' '.join(command)}: {done.stderr.strip()[-300:]}")
        return done.stdout

    def __enter__(self) -> "Slurm":
        self.before = os.environ.get("SLURM_CONF")
        os.environ["SLURM_CONF"] = self("up").strip().partition("=")[2]
        return self

    def __exit__(self, *_: object) -> None:
        self("down")
        os.environ.pop("SLURM_CONF") if self.before is None else os.environ.update(
            SLURM_CONF=self.before
        )


class Job:
    """A job in a folder of its own."""

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
        callbacks = [
            ("tests.training.diary.Diary", {"path": str(self.diary)} | (diary or {})),
            ("tests.training.toy.Slow", {"seconds": slow}),
        ]
        flags = [
            flag
            for name, given in callbacks
            for flag in (
                "--trainer.callbacks+",
                json.dumps({"class_path": name, "init_args": given}),
            )
        ]
        if not stage:
            (folder / "toy.yaml").write_text(
                "model: {class_path: tests.training.toy.Toy}\ndata: {class_path: tests.training.toy.ToyRows}\n"
            )
        submit = [
            "submit",
            stage or str(folder / "toy.yaml"),
            "--nodes",
            "2",
            "--gpus",
            "0",
            "--cpus",
            "1",
            "--time",
            "30",
            "--logs",
            str(folder),
        ]
        assert (
            main([*submit, *QUIET, *flags, "--trainer.default_root_dir", str(folder), *options])
            == 0
        )
        self.id = max(map(int, shell("squeue -h -t all -o %A").split()))

    def state(self) -> str:
        """PENDING, RUNNING ...; "" once it is over."""
        return shell(f"squeue -h -j {self.id} -o %T", check=False).strip()

    def output(self) -> str:
        return "".join(path.read_text() for path in self.folder.glob("*.out"))

    def lines(self) -> list[dict]:
        return (
            [json.loads(line) for line in self.diary.read_text().splitlines()]
            if self.diary.exists()
            else []
        )

    def step(self) -> int:
        return max((line["step"] for line in self.lines()), default=0)

    def until(self, condition, seconds: float = 800) -> None:
        end = time.monotonic() + seconds
        while not condition():
            over = self.state() == ""
            assert time.monotonic() < end and (not over or condition()), self.output()[-3000:]
            time.sleep(0.2)

    def ended(self) -> str:
        """How Slurm says that it ended."""
        self.until(lambda: self.state() in ("", "COMPLETED", "FAILED", "CANCELLED"), 1800)
        return shell(f"scontrol show job -o {self.id}").partition("JobState=")[2].split()[0]


def shell(command: str, check: bool = True) -> str:
    """What a command without quotes prints."""
    return subprocess.run(command.split(), capture_output=True, text=True, check=check).stdout
