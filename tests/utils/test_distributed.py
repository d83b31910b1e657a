"""Which process this is, under each of the programs that start several."""

import pytest

from unclip_pl.utils.distributed import local_rank, rank, rank_and_host, world_size

VARIABLES = (
    "RANK", "LOCAL_RANK", "WORLD_SIZE",
    "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NTASKS", "SLURM_STEP_ID",
)  # fmt: skip


@pytest.fixture
def environment(monkeypatch):
    def set_variables(**variables):
        for name in VARIABLES:
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, str(value))

    return set_variables


SLURM = {"SLURM_PROCID": 5, "SLURM_LOCALID": 1, "SLURM_NTASKS": 8}
BATCH_SCRIPT = {"SLURM_PROCID": 0, "SLURM_LOCALID": 0, "SLURM_NTASKS": 8}


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, (0, 0, 1)),
        ({"RANK": 3, "LOCAL_RANK": 1, "WORLD_SIZE": 4}, (3, 1, 4)),
        ({**SLURM, "SLURM_STEP_ID": 0}, (5, 1, 8)),
        (BATCH_SCRIPT, (0, 0, 1)),
        ({"LOCAL_RANK": 1, "WORLD_SIZE": 2}, (1, 1, 2)),
        ({**BATCH_SCRIPT, "LOCAL_RANK": 1, "WORLD_SIZE": 2}, (1, 1, 2)),
        ({**BATCH_SCRIPT, "RANK": 3, "LOCAL_RANK": 1, "WORLD_SIZE": 4}, (3, 1, 4)),
    ],
    ids=[
        "alone", "torchrun", "srun", "batch script", "lightning", "lightning in a batch script",
        "torchrun in a batch script",
    ],
)  # fmt: skip
def test_ranks_and_their_number(environment, variables, expected):
    environment(**variables)
    assert (rank(), local_rank(), world_size()) == expected


def test_only_one_of_several_processes_names_itself(environment):
    environment(**SLURM, SLURM_STEP_ID=0)
    assert "rank 5" in rank_and_host()
    environment(LOCAL_RANK=1)  # what is left of Lightning's variables at the end of a run
    assert "rank 1" in rank_and_host()
    environment(**BATCH_SCRIPT)
    assert rank_and_host() == ""
