"""Files of measurements, from which `table.py` makes the table.

They are named `<job>-<machine>-<dtype>-<eager|compiled>....json`. A file says what was measured
(job, commit, machine, torch, settings) and holds a list of rounds. Another run of the same thing
adds a round; one with another commit or setting starts the file over.
"""

import json
import os
import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
SETTING = (
    "job", "impl", "env", "commit", "machine", "cores", "threads", "torch", "device", "dtype",
    "computed_in", "mode", "checkpointing", "cuda_graphs", "items", "nfe", "params",
)  # fmt: skip
"""What stays the same in all rounds; everything else of a line belongs to its round."""
UNSAID = {"unclip_pl", "trainer", "compiled"}
"""Parts of `impl` that a file's name does not repeat."""


@cache
def commit() -> str | None:
    """The commit of this checkout, with "-dirty" where tracked files other than results differ."""
    tracked = ["status", "--porcelain", "--untracked-files=no", "--", ":/", f":!{RESULTS}"]
    try:
        head, changed = _git("rev-parse", "--short=10", "HEAD"), _git(*tracked)
    except (OSError, subprocess.CalledProcessError):
        return None  # no git, or no repository
    return f"{head}-dirty" if changed else head


def _git(*words: str) -> str:
    command = ["git", "-C", str(HERE), *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@cache
def machine(device: str = "cpu") -> str:
    """Name of the GPU, or of the CPU with its vector instructions."""
    import torch

    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    match = re.search(r"model name\s*:\s*(.*)", _read("/proc/cpuinfo"))
    name = match[1].strip() if match else "CPU"
    return f"{name}, {cores()} cores, {torch.backends.cpu.get_cpu_capability()}"


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8") if Path(path).exists() else ""


def about(device: str = "cpu") -> dict[str, Any]:
    """Commit, machine and version of torch."""
    import torch

    return {
        "commit": commit(), "machine": machine(device), "cores": cores(),
        "torch": torch.__version__, "device": device,
    }  # fmt: skip


def name_of(line: dict[str, Any]) -> str:
    """The file's name for a line: job, machine, dtype, mode, and what else makes it different."""
    more = [part for part in line.get("impl", "").split("/") if part not in UNSAID]
    parts = [line["job"], line["machine"], line.get("dtype"), line.get("mode"), *more]
    slugs = (re.sub(r"[^a-z0-9_]+", "-", part.lower()).strip("-") for part in parts if part)
    prefix = "gpu-" if str(line.get("device")).startswith("cuda") else ""
    return prefix + "-".join(slugs) + ".json"


def save(line: dict[str, Any], folder: str | os.PathLike | None) -> Path | None:
    """Add the line of one run to its file in `folder`; None does nothing."""
    if folder is None:
        return None
    path = Path(folder) / name_of(line)
    setting = {key: line[key] for key in SETTING if key in line}
    this = {key: value for key, value in line.items() if key not in SETTING}
    before = json.loads(_read(str(path)) or "{}")
    same = all(before.get(key) == setting.get(key) for key in SETTING)
    rounds = before.get("rounds", []) if same else []
    this.setdefault("round", 1 + max((each["round"] for each in rounds), default=-1))
    rounds = [each for each in rounds if each["round"] != this["round"]]
    return write(path, setting | {"rounds": [*rounds, this]})


def save_rows(job: str, folder: str | os.PathLike | None, rows: Any, device: str = "cpu") -> None:
    """Write a table of figures as one file, without rounds; does nothing if `folder` is None."""
    if folder is not None:
        line = {"job": job} | about(device)
        write(Path(folder) / name_of(line), line | {"rows": rows})


def write(path: Path, content: dict[str, Any]) -> Path:
    """Write a JSON file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return part.replace(path)
