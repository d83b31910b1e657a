"""Everything that is worth measuring on a GPU, the most valuable first; `gpu.sh` runs it.

    python benchmarks/gpu.py --seconds 520                   on a GPU
    python benchmarks/gpu.py --tiny --device cpu             every part with tiny shapes on a CPU
    python benchmarks/gpu.py --only 'decoder.*compiled'      some parts (a regular expression)

Each part has its own limit and writes its file when it is done. A part that fails or runs out of
time leaves its error in a file of its own, and the next one starts. After an error that makes the
GPU unusable for this process, such as an illegal memory access, the rest runs in a new one.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from _common import begin

import cascade
import pipeline
import torch
import yaml
from _paper import KINDS, build, conditions_for
from _results import HERE, RESULTS, about, name_of, write
from _sampling import measure as measure_sampling
from mfu import free, largest_batch, train

ROOT = HERE.parent
TRAINED = ["diffusion_prior", "decoder", "upsampler_1024", "upsampler_256", "ar_prior"]
"""The most valuable first."""
TESTS = [
    "tests/networks/test_blocks.py", "tests/networks/test_checkpointing.py",
    "tests/test_device.py", "tests/diffusion/test_cuda_graph.py", "tests/test_gpu.py",
]  # fmt: skip
LEAST = 5
"""With fewer seconds left no further part is started."""


class OutOfTime(BaseException):
    """The time of a part is over. No Exception, so that no other code catches it."""


class Part(NamedTuple):
    """One measurement."""

    name: str
    seconds: float
    run: Callable[[], Any]


@contextlib.contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the body after so many seconds, and every 5 seconds after that."""

    def stop(*_: Any) -> None:
        raise OutOfTime(f"cut off after {seconds:.0f} s")

    signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds, 5)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


class Parts:
    """All parts, for one device and budget."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.before = begin(arguments)
        self.batches: dict[str, int] = {}
        """The largest micro-batches, searched for once per stage."""

    def settings(self, **more: Any) -> argparse.Namespace:
        """Arguments as the other scripts have them."""
        common = {
            "device": self.arguments.device, "dtype": "bf16", "threads": self.arguments.threads,
            "results": self.arguments.results, "repeats": 2 if self.arguments.tiny else 5,
            "warmup": 2,
            "compile": False, "cuda_graphs": False, "checkpointing": "none", "mode": "bare",
        }  # fmt: skip
        return argparse.Namespace(**common | more)

    def in_order(self) -> Iterator[Part]:
        """All of them, in order."""
        yield from self.training(TRAINED[:4], "none", compile=False)
        yield Part("tests", 120, self.tests)
        yield from self.training(TRAINED[:2], "none", compile=True)
        yield from self.sampling(compile=False)
        for graphs in (False, True):
            yield Part(f"pipeline{suffix(False, graphs)}", 30, lambda g=graphs: self.pipeline(g))
            yield Part(f"cascade{suffix(False, graphs)}", 40, lambda g=graphs: self.cascade(g))
        yield from self.training(TRAINED[2:4], "none", compile=True)
        yield from self.training(TRAINED[:4], "selective", compile=False)
        for checkpointing in ("none", "selective"):
            yield from self.training(["ar_prior"], checkpointing, compile=False)
        yield from self.training(TRAINED, "selective", compile=True)
        yield from self.training(["ar_prior"], "none", compile=True)
        yield from self.sampling(compile=True)
        yield Part("pipeline/compiled", 90, lambda: self.pipeline(compile=True))
        yield Part("cascade/compiled", 90, lambda: self.cascade(compile=True))

    def training(self, names: list[str], checkpointing: str, compile: bool) -> Iterator[Part]:
        """A training step of each stage; MFU where the device's peak is known."""
        for name in names:
            more = {"checkpointing": checkpointing, "compile": compile}
            label = f"train/{name}/{checkpointing}{suffix(compile)}"
            yield Part(label, 150 if compile else 40, lambda n=name, m=more: self.train(n, **m))

    def train(self, name: str, **more: Any) -> None:
        """One stage, in all settings with the largest micro-batch that the plain one takes."""
        tiny = self.arguments.tiny
        if name not in self.batches:
            start = 2 if tiny else KINDS[name].batch
            self.batches[name] = largest_batch(name, self.settings(), start, tiny)
            free()
        train(name, self.settings(batch=self.batches[name], **more), self.before, tiny)

    def sampling(self, compile: bool) -> Iterator[Part]:
        """Draws of each stage; the AR prior has no step that could be recorded."""
        for name in TRAINED:
            for graphs in (False, True):
                if graphs and (compile or name == "ar_prior"):
                    continue
                label = f"sample/{name}{suffix(compile, graphs)}"
                more = {"compile": compile, "cuda_graphs": graphs}
                seconds = 90 if compile else 40
                yield Part(label, seconds, lambda n=name, m=more: self.sample(n, **m))

    def sample(self, name: str, **more: Any) -> None:
        """A batch of draws in a few steps."""
        tiny, paper = self.arguments.tiny, KINDS[name]
        arguments = self.settings(batch=2 if tiny else paper.draws, repeats=2, warmup=1, **more)
        stage: Any = build(name, arguments.device, tiny=tiny)
        conditions = conditions_for(name, stage, arguments.batch)
        steps = {} if paper.steps is None else {"steps": 4 if tiny else paper.steps}
        job = f"{'tiny' if tiny else 'paper'}_{name}_sample"
        measure_sampling(job, stage, conditions, arguments, self.before, **steps)

    def pipeline(self, cuda_graphs: bool = False, compile: bool = False) -> None:
        """A caption to 256 px with random weights, in the shapes of the comparison."""
        steps = {f"{name}_steps": count for name, count in pipeline.STEPS.items()}
        if self.arguments.tiny:
            steps, compile = dict.fromkeys(steps, 1), False  # its networks take minutes to compile
        arguments = self.settings(batch=1, cuda_graphs=cuda_graphs, compile=compile, **steps)
        pipeline.measure(arguments, self.before)

    def cascade(self, cuda_graphs: bool = False, compile: bool = False) -> None:
        """Captions to 1024 px with the weights of the package."""
        tiny = self.arguments.tiny
        arguments = self.settings(
            batch=1 if tiny else 4, repeats=1, warmup=0 if tiny else 1, prior="diffusion",
            upsamplers=[] if tiny else ["256", "1024"], cuda_graphs=cuda_graphs, compile=compile,
        )  # fmt: skip
        cascade.measure(arguments, self.before)

    def tests(self) -> None:
        """Run the tests that need a GPU in another process."""
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder) / "tests.xml"
            # On SIGINT pytest still reports the tests that have run.
            command = ["timeout", "-s", "INT", "-k", "8", "110", sys.executable, "-m", "pytest"]
            options = [*self.arguments.tests, *["-p", "no:logging", "-p", "no:cacheprovider"]]
            options += ["-o", "addopts="]
            options += ["-q", "-o", "timeout=60", f"--junitxml={report}"]
            code = subprocess.run([*command, *options], cwd=ROOT, check=False).returncode
            counts = {"exit": code}
            if report.exists():
                suite = ElementTree.parse(report).getroot()[0]
                kinds = ("tests", "failures", "errors", "skipped")
                counts |= {kind: int(suite.get(kind, 0)) for kind in kinds}
        line = {"job": "tests"} | about(self.arguments.device)
        write(Path(self.arguments.results) / name_of(line), line | counts)
        if code:
            raise RuntimeError(f"the tests ended with {code}")


def suffix(compile: bool = False, cuda_graphs: bool = False) -> str:
    """Of a part's name."""
    return "/compiled" * compile + "/cuda_graphs" * cuda_graphs


def attempt(part: Part, seconds: float, arguments: argparse.Namespace) -> bool:
    """Run one part within its limit; True if it went well."""
    start, error = time.monotonic(), None
    print(f"\n[{part.name}] at most {seconds:.0f} s", flush=True)
    try:
        with limit(seconds):
            part.run()
    except (Exception, OutOfTime):
        error = traceback.format_exc().strip()
    failures = Path(arguments.results) / "errors"
    line = {"job": part.name.replace("/", "_")} | about(arguments.device)
    path = failures / name_of(line)
    path.unlink(missing_ok=True)
    if error:
        write(path, line | {"error": error.splitlines()[-1], "traceback": error[-3000:]})
        print(error[-1500:], flush=True)
    torch._dynamo.reset()
    took = time.monotonic() - start
    print(f"[{part.name}] {'FAILED' if error else 'done'} in {took:.0f} s", flush=True)
    return not error


def usable(device: str) -> bool:
    """Give back what the last part held; False if this process cannot use the device any more."""
    try:
        free()
        return torch.zeros((), device=device).item() == 0
    except RuntimeError:
        traceback.print_exc()
        return False


def go_on(arguments: argparse.Namespace, name: str, seconds: float) -> None:
    """Replace this process by a new one for the parts after `name`."""
    words = [*sys.argv, "--after", name, "--seconds", f"{seconds:.0f}"]
    words += ["--results", arguments.results]
    print("the GPU is no longer usable for this process: going on in a new one", flush=True)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))  # the driver's files, which hold memory of the GPU
    os.execv(sys.executable, [sys.executable, *words])


def main() -> None:
    """Measure the chosen parts until the time is over, and print which are done or failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=520, help="for all parts together")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes, to try the script")
    parser.add_argument("--only", default="", help="parts whose name this expression finds")
    parser.add_argument("--after", help="go on after this part, which failed in a process before")
    parser.add_argument("--threads", type=int, default=1 if torch.cuda.is_available() else 2)
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files for pytest")
    parser.add_argument("--results", metavar="DIR", help="where the files go")
    arguments = parser.parse_args()
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device here: try it with --tiny --device cpu")
    end = time.monotonic() + arguments.seconds
    with contextlib.ExitStack() as stack:
        if arguments.results is None and arguments.tiny:
            arguments.results = stack.enter_context(tempfile.TemporaryDirectory())
        arguments.results = arguments.results or str(RESULTS)
        overlay = ROOT / "lightning_config" / "gpu.yaml"  # as a training run has it
        trainer = yaml.safe_load(overlay.read_text(encoding="utf-8"))["trainer"]
        torch.backends.cudnn.benchmark = bool(trainer.get("benchmark"))
        outcome: dict[str, list[str]] = {"done": [], "FAILED": [], "skipped": []}
        parts = list(Parts(arguments).in_order())
        start = 1 + [part.name for part in parts].index(arguments.after) if arguments.after else 0
        for part in parts[start:]:
            if not re.search(arguments.only, part.name):
                continue
            left = end - time.monotonic()
            if left < LEAST:
                outcome["skipped"].append(part.name)
            elif attempt(part, min(part.seconds * (3 if arguments.tiny else 1), left), arguments):
                outcome["done"].append(part.name)
            else:
                outcome["FAILED"].append(part.name)
            if left >= LEAST and not usable(arguments.device):
                go_on(arguments, part.name, end - time.monotonic())
        print()
        for word, names in outcome.items():
            print(f"{word}: {len(names)}")
            if word != "done":
                print(*(f"    {name}" for name in names), sep="\n")
        sys.exit(1 if outcome["FAILED"] or arguments.after else 0)


if __name__ == "__main__":
    main()
