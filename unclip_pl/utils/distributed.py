"""This process among all processes of a job, read from the environment. No torch."""

import os
import socket


def rank() -> int:
    """The number of this process, from 0; 0 if it is the only one.

    torchrun sets RANK. srun sets SLURM_PROCID; a batch script and a shell inside of an allocation
    have that variable too, but no step of srun, and count as single. Processes that Lightning
    starts by itself have LOCAL_RANK only.
    """
    return int(os.environ.get("RANK") or _of_step("SLURM_PROCID") or local_rank())


def local_rank() -> int:
    """The number of this process on its machine, from 0."""
    return int(os.environ.get("LOCAL_RANK") or _of_step("SLURM_LOCALID") or 0)


def world_size() -> int:
    """The number of processes of the job."""
    return int(os.environ.get("WORLD_SIZE") or _of_step("SLURM_NTASKS") or 1)


def _of_step(variable: str) -> str | None:
    """A variable that srun sets for each task; None outside of a step of srun."""
    return os.environ.get(variable) if os.environ.get("SLURM_STEP_ID") else None


def rank_and_host() -> str:
    """ " (rank 3 on node7)" in a job of several processes, else "": for error messages."""
    # At the end of a run Lightning removes its WORLD_SIZE, and LOCAL_RANK stays.
    several = world_size() > 1 or "LOCAL_RANK" in os.environ
    return f" (rank {rank()} on {socket.gethostname()})" if several else ""
