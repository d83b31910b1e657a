"""Runs with a mirror for tests."""

import json
from pathlib import Path

import pytest
import torch

from tests.remotekit import BUCKET
from unclip_pl.cluster.checkpoint_io import step_of
from unclip_pl.training import mirror
from unclip_pl.training.mirror import Mirror, mirrored
from unclip_pl.utils import remote, remote_lease

URL = f"s3://{BUCKET}/run"


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(mirror, "LOOK_EVERY", 0.05)
    for name, seconds in {"RENEW_EVERY": 0.1, "LEASE_ENDS": 30.0, "SETTLES": 0.0}.items():
        monkeypatch.setattr(remote_lease, name, seconds)


def save(folder, *names: str) -> None:
    """Write checkpoints of a run."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    for name in names:
        torch.save({"global_step": step_of(Path(name))}, folder / "checkpoints" / name)


def train(folder, steps: int, kind: str = "newest") -> None:
    """What a run up to a step leaves in its folder, and copies at its end."""
    with mirrored(Mirror(URL, folder), True):
        for old in (folder / "checkpoints").glob(f"{kind}-*"):
            old.unlink()
        save(folder, f"{kind}-step={steps}.ckpt")


def named() -> list[str]:
    """The checkpoints that mirror.json names."""
    return sorted(json.loads(remote.read(f"{URL}/mirror.json"))["checkpoints"])
