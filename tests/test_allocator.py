"""Memory of large tensors is kept for the next ones: counted in the system's page faults, in processes of their own."""

import os
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
from unclip_pl.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
import torch
def large():
    for _ in range(8):
        torch.zeros(2**24)  # 64 MiB, beyond what the C library keeps by itself
large()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
large()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how, **environment):
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "THP_MEM"))}
    done = subprocess.run([sys.executable, "-c", FAULTS, how], env=clean | environment, capture_output=True, text=True, check=True, timeout=120)
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are glibc's")
def test_memory_of_large_tensors_is_not_fetched_again():
    assert faults("kept") < 100 < faults("left")


@pytest.mark.skipif(sys.platform != "linux", reason="the settings are glibc's")
def test_settings_of_the_user_stay():
    assert faults("kept", MALLOC_ARENA_MAX="4", THP_MEM_ALLOC_ENABLE="0") > 100
