"""`unclip submit`: a job script for Slurm from a template of `lightning_config/slurm/`, shown and handed to sbatch."""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from unclip_pl.cli.options import Command
from unclip_pl.utils.errors import UserError

RESERVED = (
    "--trainer.num_nodes",
    "--trainer.devices",
    "--resume",
    "--ckpt_path",
)  # the job says these itself


def add(command: Command) -> None:
    """The command."""
    submit = command(
        "submit",
        run_submit,
        "Train, validate or embed on a Slurm cluster: fills a job script in, shows it and submits it.",
    )
    submit.add_argument(
        "stage", help="a stage's YAML, such as stages/decoder.yaml or stages/embed.yaml"
    )
    submit.add_argument("--nodes", type=count, default=1)
    submit.add_argument(
        "--gpus", type=int, default=1, help="of a node, one rank each; 0: nodes without GPUs"
    )
    submit.add_argument("--ranks", type=count, default=1, help="of a node, where --gpus is 0")
    submit.add_argument(
        "--cpus", type=count, default=8, help="of a rank: its thread and its loader's workers"
    )
    submit.add_argument("--mem", help="memory of a node, such as 200G; by default the partition's")
    submit.add_argument(
        "--time", default="24:00:00", help="until the job is warned, saves and is queued again"
    )
    submit.add_argument(
        "--warn",
        type=count,
        default=120,
        help="seconds before the time limit for the last checkpoint",
    )
    submit.add_argument("--partition")
    submit.add_argument("--account")
    submit.add_argument("--name", help="of the job; by default the stage's")
    submit.add_argument(
        "--restarts",
        type=int,
        default=3,
        help="after failures; preemptions and time limits are not counted",
    )
    submit.add_argument(
        "--array", type=count, help="of an embedding job: so many jobs that fill one store"
    )
    submit.add_argument(
        "--validate",
        action="store_true",
        help="validate the run's newest checkpoint instead of training",
    )
    submit.add_argument(
        "--logs",
        type=Path,
        default=Path("slurm"),
        help="folder, on a disk that all nodes share, of the jobs' output",
    )
    submit.add_argument("--dry-run", action="store_true", help="show the script and submit nothing")
    submit.set_defaults(flags=[])
    submit.allow_abbrev = False
    submit.epilog = "Whatever else follows the stage goes to `lightning`: -c overlays, --model.lr 1e-4, --trainer.max_steps 100000 ..."


def count(text: str) -> int:
    """A number of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is too few: give 1 or more")
    return value


def run_submit(arguments: argparse.Namespace) -> None:
    script = job_script(arguments)
    print(script)
    if arguments.dry_run:
        return
    if not shutil.which("sbatch"):
        raise UserError(
            "There is no sbatch here: run this on a login node of a Slurm cluster, or look at the script with --dry-run."
        )
    arguments.logs.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(["sbatch"], input=script, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(
            f"sbatch refused the job ({done.stderr.strip()}): change the options, which are passed to it as shown above."
        )
    print(done.stdout.strip())


def job_script(arguments: argparse.Namespace) -> str:
    """The template of this job with its two placeholders filled in, and where its output goes."""
    from unclip_pl.cli.lightning import config_folder, find_config

    stage = Path(find_config(arguments.stage))
    if arguments.gpus < 0:
        raise UserError(
            f"--gpus is {arguments.gpus}: give 1 or more of a node, or 0 for nodes without GPUs."
        )
    if taken := [flag for flag in arguments.flags if flag.partition("=")[0] in RESERVED]:
        raise UserError(
            f"{taken[0]} is set by the job itself: leave it out, and see --nodes, --gpus and --ranks."
        )
    kind = (
        "eval"
        if arguments.validate
        else "embed"
        if "class_path: Embed\n" in stage.read_text(encoding="utf-8")
        else "train"
    )
    if arguments.array and kind != "embed":
        raise UserError(
            "--array is for an embedding job: one run of a stage is one job, on as many --nodes as you like."
        )
    template = (config_folder("lightning_config") / "slurm" / f"{kind}.sbatch").read_text(
        encoding="utf-8"
    )
    filled = {
        "{{resources}}": resources(arguments, arguments.name or f"{kind}-{stage.stem}"), "{{command}}": command_line(arguments, kind),
        "{{logs}}": str(arguments.logs.resolve()), "{{restarts}}": str(arguments.restarts),
        "{{warn}}": str(arguments.warn),
    }  # fmt: skip
    first, *lines = template.splitlines(
        keepends=True
    )  # the comments above {{resources}} are about the template
    script = first + "".join(
        lines[next(i for i, line in enumerate(lines) if line.startswith("{{resources}}")) :]
    )
    for placeholder, value in filled.items():
        script = script.replace(placeholder, value)
    return script


def resources(arguments: argparse.Namespace, name: str) -> str:
    """The #SBATCH lines."""
    if name in ("bash", "interactive"):
        raise UserError(
            f"A job called {name} is none to Lightning, and its ranks would wait for each other for ever: give another --name."
        )
    options = {
        "job-name": name, "chdir": Path.cwd(), "output": arguments.logs.resolve() / "%x-%j.out", "nodes": arguments.nodes,
        "ntasks-per-node": arguments.gpus or arguments.ranks, "gpus-per-node": arguments.gpus or None, "cpus-per-task": arguments.cpus,
        "mem": arguments.mem, "time": arguments.time, "partition": arguments.partition, "account": arguments.account,
        "array": f"0-{arguments.array - 1}" if arguments.array else None,
    }  # fmt: skip
    return "\n".join(
        f"#SBATCH --{option}={value}" for option, value in options.items() if value is not None
    )


def command_line(arguments: argparse.Namespace, kind: str) -> str:
    """What each rank runs: the stage, the overlays that the resources ask for, then the user's own flags, which win."""
    ranks = arguments.gpus or arguments.ranks
    command = [
        sys.executable,
        "-m",
        "unclip_pl",
        {"train": "fit", "embed": "predict", "eval": "validate"}[kind],
        "-c",
        arguments.stage,
    ]
    command += (
        ["-c", "lightning_config/gpu.yaml"] if arguments.gpus else ["--trainer.accelerator", "cpu"]
    )
    if arguments.nodes * ranks > 1:
        command += ["-c", "lightning_config/ddp.yaml"]
    command += [
        *arguments.flags,
        "--trainer.num_nodes",
        str(arguments.nodes),
        "--trainer.devices",
        str(ranks),
    ]
    return shlex.join(os.fspath(part) for part in command)
