"""`unclip submit`: Slurm jobs from the templates in `lightning_config/slurm/`."""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from unclip_pl.cli.configs import config_folder, find_config
from unclip_pl.cli.options import AddCommand
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.options import positive_int

RESERVED = ("--trainer.num_nodes", "--trainer.devices", "--resume", "--ckpt_path")
"""Flags that the job itself passes to `lightning`."""
SUBCOMMANDS = {"train": "fit", "embed": "predict", "eval": "validate"}
"""The subcommand of `lightning` for each kind of job."""


def add(command: AddCommand) -> None:
    parser = command(
        "submit",
        run,
        "Train, validate or embed on a Slurm cluster: fills in a job script, shows it and submits "
        "it.",
    )
    parser.add_argument(
        "stage", help="a stage's YAML, such as stages/decoder.yaml or stages/embed.yaml"
    )
    parser.add_argument("--nodes", type=positive_int, default=1)
    parser.add_argument(
        "--gpus", type=int, default=1, help="of a node, one rank each; 0: nodes without GPUs"
    )
    parser.add_argument(
        "--ranks", type=positive_int, default=1, help="of a node, where --gpus is 0"
    )
    parser.add_argument(
        "--cpus",
        type=positive_int,
        default=8,
        help="of a rank: its thread and its loader's workers",
    )
    parser.add_argument("--mem", help="memory of a node, such as 200G; by default the partition's")
    parser.add_argument(
        "--time", default="24:00:00", help="until the job is warned, saves and is queued again"
    )
    parser.add_argument(
        "--warn",
        type=positive_int,
        default=120,
        help="seconds before the time limit for the last checkpoint",
    )
    parser.add_argument("--partition")
    parser.add_argument("--account")
    parser.add_argument("--name", help="of the job; by default the stage's")
    parser.add_argument(
        "--restarts",
        type=int,
        default=3,
        help="after failures; preemptions and time limits are not counted",
    )
    parser.add_argument(
        "--array",
        type=positive_int,
        help="of an embedding job: the number of jobs that fill one store together",
    )
    parser.add_argument(
        "--validate",
        action="store_true",
        help="validate the run's newest checkpoint instead of training",
    )
    parser.add_argument(
        "--logs",
        type=Path,
        default=Path("slurm"),
        help="folder, on a disk that all nodes share, of the jobs' output",
    )
    parser.add_argument("--dry-run", action="store_true", help="show the script, submit nothing")
    parser.set_defaults(flags=[])
    parser.allow_abbrev = False
    parser.epilog = (
        "Whatever else follows the stage goes to `lightning`: -c overlays, --model.lr 1e-4, "
        "--trainer.max_steps 100000 ..."
    )


def run(arguments: argparse.Namespace) -> None:
    script = job_script(arguments)
    print(script)
    if arguments.dry_run:
        return
    if not shutil.which("sbatch"):
        raise UserError(
            "There is no sbatch here: run this on a login node of a Slurm cluster, or look at the "
            "script with --dry-run."
        )
    arguments.logs.mkdir(parents=True, exist_ok=True)
    job = subprocess.run(["sbatch"], input=script, capture_output=True, text=True, check=False)
    if job.returncode:
        raise UserError(
            f"sbatch refused the job ({job.stderr.strip()}): change the options, which are passed "
            "to it as shown above."
        )
    print(job.stdout.strip())


def job_script(arguments: argparse.Namespace) -> str:
    """The template of this kind of job with its placeholders filled in.

    Raises:
        UserError: options that contradict each other, or flags that the job sets itself.
    """
    stage = Path(find_config(arguments.stage))
    if arguments.gpus < 0:
        raise UserError(
            f"--gpus is {arguments.gpus}: give 1 or more of a node, or 0 for nodes without GPUs."
        )
    for flag in arguments.flags:
        if flag.partition("=")[0] in RESERVED:
            raise UserError(
                f"{flag} is set by the job itself: leave it out, and see --nodes, --gpus and "
                "--ranks."
            )
    kind = "eval" if arguments.validate else kind_of(stage)
    if arguments.array and kind != "embed":
        raise UserError(
            "--array is for an embedding job: one run of a stage is one job, on as many --nodes as "
            "you like."
        )
    values = {
        "{{resources}}": resources(arguments, arguments.name or f"{kind}-{stage.stem}"),
        "{{command}}": command_line(arguments, kind),
        "{{logs}}": str(arguments.logs.resolve()),
        "{{restarts}}": str(arguments.restarts),
        "{{warn}}": str(arguments.warn),
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


def resources(arguments: argparse.Namespace, name: str) -> str:
    """The #SBATCH lines of a job called `name`."""
    if name in ("bash", "interactive"):
        raise UserError(
            f"Lightning ignores jobs called {name}, and the ranks would wait for each other for "
            "ever: give another --name."
        )
    options = {
        "job-name": name,
        "chdir": Path.cwd(),
        "output": arguments.logs.resolve() / "%x-%j.out",
        "nodes": arguments.nodes,
        "ntasks-per-node": arguments.gpus or arguments.ranks,
        "gpus-per-node": arguments.gpus or None,
        "cpus-per-task": arguments.cpus,
        "mem": arguments.mem,
        "time": arguments.time,
        "partition": arguments.partition,
        "account": arguments.account,
        "array": f"0-{arguments.array - 1}" if arguments.array else None,
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    return "\n".join(lines)


def command_line(arguments: argparse.Namespace, kind: str) -> str:
    """What each rank runs: the stage, overlays for the resources, then the user's own flags."""
    ranks = arguments.gpus or arguments.ranks
    command = [sys.executable, "-m", "unclip_pl", SUBCOMMANDS[kind], "-c", arguments.stage]
    if arguments.gpus:
        command += ["-c", "lightning_config/gpu.yaml"]
    else:
        command += ["--trainer.accelerator", "cpu"]
    if arguments.nodes * ranks > 1:
        command += ["-c", "lightning_config/ddp.yaml"]
    command += arguments.flags
    command += ["--trainer.num_nodes", str(arguments.nodes), "--trainer.devices", str(ranks)]
    return shlex.join(os.fspath(part) for part in command)
