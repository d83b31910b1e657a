"""Shared by all tests: no network, few threads, a cache of their own, OpenMoji's shards drawn once a session."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch

import unclip_pl._torchvision  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


@pytest.fixture(autouse=True)
def _threads_and_argv(monkeypatch):
    torch.set_num_threads(1)  # the tests' networks are too small to share out
    monkeypatch.setattr(sys, "argv", ["lightning"])  # LightningCLI warns where it sees pytest's own arguments


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """A cache folder for the whole session: tests never touch the user's own."""
    folder = tmp_path_factory.mktemp("cache")
    before = os.environ.get("UNCLIP_CACHE")
    os.environ["UNCLIP_CACHE"] = str(folder)
    yield folder
    if before is None:
        del os.environ["UNCLIP_CACHE"]
    else:
        os.environ["UNCLIP_CACHE"] = before


@pytest.fixture(scope="session")
def noto():
    """Folder of real img2dataset shards (400 Noto drawings)."""
    folder = SHARED / "data" / "noto-img2dataset"
    if not folder.is_dir():
        pytest.skip("the Noto shards are not beside this checkout")
    return folder
