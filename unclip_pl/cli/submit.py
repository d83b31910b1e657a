"""`unclip submit`: Slurm jobs from the templates in `lightning_config/slurm/`."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from pathlib import Path

from unclip_pl.cli.configs import config_folder, find_config
from unclip_pl.utils.commands import option_string
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.options import Count

RESERVED = ("--trainer.num_nodes", "--trainer.devices", "--resume", "--ckpt_path")
"""Flags that the job itself passes to `lightning`."""
UNREACHABLE = re.compile("contact slurm controller|establish a configuration source")
"""What sbatch says where no controller answers, or no configuration names one."""
SUBCOMMANDS = {"train": "fit", "embed": "predict", "eval": "validate"}
"""The subcommand of `lightning` for each kind of job."""


@dataclass(frozen=True, kw_only=True)
class JobOptions:
    """What a job asks Slurm for.

    Args:
        nodes: of the cluster
        gpus: of a node, one rank each; 0: nodes without GPUs
        ranks: of a node, where --gpus is 0
        cpus: of a rank: its thread and its loader's workers
        mem: memory of a node, such as 200G; by default the partition's
        time: until the job is warned, saves and is queued again
        warn: seconds before the time limit for the last checkpoint
        partition: by default the cluster's
        account: by default the user's
        name: of the job; by default the stage's
        restarts: after failures; preemptions and time limits are not counted
        array: of an embedding job: the number of jobs that fill one store together
        logs: folder, on a disk that all nodes share, of the jobs' output
    """

    nodes: Count = 1
    gpus: int = 1
    ranks: Count = 1
    cpus: Count = 8
    mem: str | None = None
    time: str = "24:00:00"
    warn: Count = 120
    partition: str | None = None
    account: str | None = None
    name: str | None = None
    restarts: int = 3
    array: Count | None = None
    logs: Path = Path("slurm")

    def __post_init__(self) -> None:
        if self.gpus < 0:
            raise UserError(
                f"--gpus is {self.gpus}: give 1 or more of a node, or 0 for nodes without GPUs."
            )
        if self.restarts < 0:
            raise UserError(f"--restarts is {self.restarts}: give 0 (never) or more.")
        if self.name in ("bash", "interactive"):
            raise UserError(
                f"Lightning ignores jobs called {self.name}, and the ranks would wait for each "
                "other for ever: give another --name."
            )

    @property
    def ranks_per_node(self) -> int:
        """One for each GPU, or --ranks on nodes without GPUs."""
        return self.gpus or self.ranks


OWN = [
    option_string(name) for name in (*(f.name for f in fields(JobOptions)), "validate", "dry_run")
]
"""The options of the job itself."""


def submit(
    stage: str, *flags: str, job: JobOptions, validate: bool = False, dry_run: bool = False
) -> None:
    """Train, validate or embed on a Slurm cluster.

    Fills in a job script, shows it and submits it. Whatever else follows the stage goes to
    `lightning`: -c overlays, --model.lr 1e-4, --trainer.max_steps 100000 ...

    Args:
        stage: a stage's YAML, such as stages/decoder.yaml or stages/embed.yaml
        flags: for `lightning`
        validate: validate the run's newest checkpoint instead of training
        dry_run: show the script, submit nothing
        job: what Slurm is asked for
    """
    script = job_script(stage, flags, job, validate)
    if not dry_run and not shutil.which("sbatch"):
        raise UserError(
            "There is no sbatch here: run this on a login node of a Slurm cluster, or look at the "
            "script with --dry-run."
        )
    print(script)
    if dry_run:
        return
    is_new = not job.logs.exists()
    job.logs.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["sbatch"], input=script, capture_output=True, text=True, check=False)
    if done.returncode and is_new:
        job.logs.rmdir()
    if done.returncode and UNREACHABLE.search(done.stderr):
        raise UserError(
            "No Slurm cluster can be reached from here, so that nothing is submitted (sbatch: "
            f"{done.stderr.strip().splitlines()[-1].removeprefix('sbatch: ')}): run this on a "
            "login node of one, or only look at the job with --dry-run."
        )
    if done.returncode:
        raise UserError(
            f"sbatch refused the job ({done.stderr.strip()}): change the options, which are passed "
            "to it as shown above."
        )
    print(done.stdout.strip())


def job_script(stage: str, flags: Sequence[str], job: JobOptions, validate: bool) -> str:
    """The template of this kind of job with its placeholders filled in.

    Raises:
        UserError: options that contradict each other, or flags that the job sets itself.
    """
    path = Path(find_config(stage))
    for flag in flags:
        name = flag.partition("=")[0]
        if name in RESERVED:
            raise UserError(
                f"{flag} is set by the job itself: leave it out, and see --nodes, --gpus and "
                "--ranks."
            )
        if meant := get_close_matches(name, OWN, 1, 0.85):
            raise UserError(f"{name} is no option of the job: did you mean {meant[0]}?")
    kind = "eval" if validate else kind_of(path)
    if job.array and kind != "embed":
        raise UserError(
            "--array is for an embedding job: one run of a stage is one job, on as many --nodes as "
            "you like."
        )
    values = {
        "{{resources}}": resources(job, job.name or f"{kind}-{path.stem}"),
        "{{command}}": command_line(stage, flags, job, kind),
        "{{logs}}": str(job.logs.resolve()),
        "{{restarts}}": str(job.restarts),
        "{{warn}}": str(job.warn),
    }
    script = read_template(kind)
    for placeholder, value in values.items():
        script = script.replace(placeholder, value)
    return script


def kind_of(stage: Path) -> str:
    """ "embed" for the YAML of an embedding job, "train" for a stage's."""
    return "embed" if "class_path: Embed\n" in stage.read_text(encoding="utf-8") else "train"


def read_template(kind: str) -> str:
    """A job's template without the comments above {{resources}}, which explain the template."""
    path = config_folder("lightning_config") / "slurm" / f"{kind}.sbatch"
    shebang, rest = path.read_text(encoding="utf-8").split("\n", 1)
    start = rest.index("\n{{resources}}") + 1
    return f"{shebang}\n{rest[start:]}"


def resources(job: JobOptions, name: str) -> str:
    """The #SBATCH lines of a job called `name`."""
    options = {
        "job-name": name,
        "chdir": Path.cwd(),
        "output": job.logs.resolve() / "%x-%j.out",
        "nodes": job.nodes,
        "ntasks-per-node": job.ranks_per_node,
        "gpus-per-node": job.gpus or None,
        "cpus-per-task": job.cpus,
        "mem": job.mem,
        "time": job.time,
        "partition": job.partition,
        "account": job.account,
        "array": f"0-{job.array - 1}" if job.array else None,
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    return "\n".join(lines)


def command_line(stage: str, flags: Sequence[str], job: JobOptions, kind: str) -> str:
    """What each rank runs: the stage, overlays for the resources, then the user's own flags."""
    ranks = job.ranks_per_node
    command = [sys.executable, "-m", "unclip_pl", SUBCOMMANDS[kind], "-c", stage]
    if job.gpus:
        command += ["-c", "lightning_config/gpu.yaml"]
    else:
        command += ["--trainer.accelerator", "cpu"]
    if job.nodes * ranks > 1:
        command += ["-c", "lightning_config/ddp.yaml"]
    command += flags
    command += ["--trainer.num_nodes", str(job.nodes), "--trainer.devices", str(ranks)]
    return shlex.join(os.fspath(part) for part in command)
