"""Shared by all tests: the device, no network, one thread, a separate cache folder."""

import os
import sys
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes that tests start share the cores
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from tests.bucketkit import bucket, gs, hf  # noqa: F401  fixtures
from tests.remotekit import faults, s3_server  # noqa: F401  fixtures

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"


def pytest_addoption(parser):
    parser.addoption(
        "--device",
        choices=["cpu", "cuda"],
        help="the device of the tests; by default a GPU where there is one. "
        "cpu: as on a machine without a GPU",
    )


def pytest_configure(config):
    if config.getoption("--device") == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before anything asks for a GPU
    if config.getoption("--device") == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: there is no CUDA device here.")


def pytest_collection_modifyitems(config, items):
    """With pytest-xdist, files with slow tests come first: its workers then end together."""
    if not hasattr(config, "workerinput"):
        return
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


@pytest.fixture(scope="session")
def device() -> str:
    """ "cuda" where there is a GPU, else "cpu". `--device cpu` hides the GPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def exact_float32():
    """No TF32: a GPU's convolutions and products are compared with those of a CPU."""
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in backends]
    for backend in backends:
        backend.allow_tf32 = False
    yield
    for backend, value in zip(backends, before):
        backend.allow_tf32 = value


@pytest.fixture
def assert_same_picture(device):
    """Asserts that two pictures of one seed are equal; on a GPU to two levels of 255.

    On a GPU cuDNN may choose other kernels for the second picture.
    """

    def check(one: torch.Tensor, other: torch.Tensor) -> None:
        assert one.shape == other.shape
        limit = 0.0 if device == "cpu" else 2 / 127.5 + 1e-6  # of [-1, 1]
        assert (one - other).abs().max() <= limit

    return check


@pytest.fixture(autouse=True)
def _threads_and_argv(monkeypatch):
    torch.set_num_threads(1)  # the tests' networks are too small for more
    # LightningCLI warns if it sees pytest's own arguments.
    monkeypatch.setattr(sys, "argv", ["lightning"])


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory, request):
    """A cache folder for the whole session: tests never touch the user's."""
    folder = tmp_path_factory.getbasetemp()
    if hasattr(request.config, "workerinput"):  # one for all workers of pytest-xdist
        folder = folder.parent
    folder = folder / "unclip-cache"
    folder.mkdir(exist_ok=True)
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
        pytest.skip("the Noto shards are not next to this checkout")
    return folder
