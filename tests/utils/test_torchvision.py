"""Every module that a program may import first works where torchvision does not fit torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

FIRST = (
    "from unclip_pl.stages.decoder import Decoder",
    "from unclip_pl.training.ema import EMA",
    "from unclip_pl.datamodules.image_text import ImageTextData",
    "from unclip_pl.clip.frozen import FrozenCLIP; FrozenCLIP().tokenize(['fox'])",
    "from unclip_pl.pipeline.weights import load_stage",
    "from unclip_pl.planner import estimate_resources",
    "from eval.metrics import FrechetDistance",
    "from eval.callback import Evaluate",
)
CODE = f"""
import os, sys, traceback
import torch, torch._dynamo, scipy.signal, matplotlib.pyplot  # what takes longest, once for all
assert "torchvision" not in sys.modules and "lightning" not in sys.modules
for line in {FIRST!r}:
    if os.fork() == 0:  # a process that has imported nothing else
        try:
            exec(line)
        except BaseException:
            print(line, traceback.format_exc(), file=sys.stderr)
            os._exit(1)
        os._exit(0)
for _ in {FIRST!r}:
    os.wait()
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_any_module_may_be_imported_first():
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-W", "ignore", "-c", CODE]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
