"""Sharded training (FSDP2) equals DDP in losses, weights, averages, resumes and releases.

Its checkpoints are complete or absent and run no code.
"""

import os
import pickle
import shutil
import socket
import subprocess
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.cluster import ranks
from tests.training.toy import Toy
from unclip_pl.cli import unclip as app
from unclip_pl.cluster.checkpoint_io import newest_checkpoint, read_checkpoint
from unclip_pl.cluster.sharded import shard
from unclip_pl.pipeline import release
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import atomic_folder, remove_leftovers

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


def run(folder: Path, job: str, world: int) -> list[dict]:
    """The results of each rank of `tests/cluster/ranks.py`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {
        "WORLD": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "NODE_RANK": "0",
    }
    command = [sys.executable, "-m", "tests.cluster.ranks", str(folder), job]
    logs = [(folder / f"{job}-{rank}.log").open("w+") for rank in range(world)]
    processes = []
    for rank, log in enumerate(logs):
        environment = common | {"LOCAL_RANK": str(rank)}
        processes.append(
            subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        )
    try:
        codes = [process.wait() for process in processes]
    finally:
        for process in processes:
            process.kill()
    for log in logs:
        log.seek(0)
        output = log.read()
        log.close()
        assert not any(codes), output[-3000:]
    return [torch.load(folder / f"{job}-{rank}.pt", weights_only=True) for rank in range(world)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(folder):
    return run(folder, "two", 2)


def assert_close(a: dict, b: dict, rtol: float = 1e-5, atol: float = 1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=rtol, atol=atol, equal_nan=True)


def assert_equal(a: dict, b: dict) -> None:
    assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["decoder", "prior", "ar_prior"])
def test_losses_weights_averages_and_validation_equal_those_of_ddp(two, name):
    ddp, fsdp = (two[0][name, kind] for kind in ("ddp", "fsdp"))
    assert len(ddp["losses"]) == (ranks.STEPS if name == "decoder" else ranks.HALF)
    assert fsdp["class"].startswith("FSDP")
    assert fsdp["losses"] == pytest.approx(ddp["losses"], rel=1e-6, nan_ok=True)
    assert fsdp["norms"] == pytest.approx(ddp["norms"], rel=1e-5, nan_ok=True)
    expected = pytest.approx(ddp["validation"], rel=1e-4, abs=1e-5)
    assert ddp["validation"] and fsdp["validation"] == expected
    assert_close(ddp["weights"], fsdp["weights"])  # buffers too: the prior's analytic variance
    assert_close(ddp["averages"], fsdp["averages"])
    assert_equal(fsdp["weights"], two[1][name, "fsdp"]["weights"])


@pytest.mark.parametrize("name", ["prior", "ar_prior"])
def test_compiled_blocks_train_sharded_as_they_do_uncompiled(two, name):
    compiled, eager = (deepcopy(two[0][key]) for key in (("compiled", name), (name, "fsdp")))
    assert compiled["graphs"] > 0 and compiled["class"].startswith("FSDP")
    assert compiled["losses"] == pytest.approx(eager["losses"], rel=1e-5, nan_ok=True)
    for part in (compiled, eager):
        part["weights"].pop("x0_error", None)  # only the eager run has the callback
    assert_close(compiled["weights"], eager["weights"], rtol=1e-4, atol=1e-4)


def test_a_rank_holds_its_part_of_the_weights(two):
    held = [rank["decoder", "fsdp"]["held"] for rank in two]
    assert sum(held) == two[0]["decoder", "ddp"]["held"] and max(held) < 0.51 * sum(held)


def test_a_step_that_is_not_finite_on_one_rank_is_skipped_on_all(two):
    skipped = [rank["decoder", kind]["skipped"] for rank in two for kind in ("ddp", "fsdp")]
    assert skipped == [1, 1, 1, 1]
    assert all(value.isfinite().all() for value in two[0]["decoder", "fsdp"]["weights"].values())


def test_bfloat16_stays_as_near_to_ddp_as_bfloat16_is(two):
    ddp, fsdp = (two[0]["bf16", "prior", kind] for kind in ("ddp", "fsdp"))
    exact = two[0]["prior", "fsdp"]
    assert fsdp["losses"] == pytest.approx(ddp["losses"], rel=1e-2)
    assert fsdp["losses"] != exact["losses"][: len(fsdp["losses"])]
    assert all(value.dtype == torch.float32 for value in fsdp["averages"].values())


def test_pictures_are_drawn_with_sharded_weights(two, folder):
    pixels = {}
    for kind in ("ddp", "fsdp"):
        path = folder / "decoder" / kind / "pictures" / "step-0000004.png"
        pixels[kind] = np.asarray(Image.open(path)).astype(int)
    assert abs(pixels["ddp"] - pixels["fsdp"]).max() <= 1 and pixels["ddp"].std() > 1


def test_callbacks_draw_with_sharded_weights_of_bfloat16(two, folder):
    assert (folder / "bf16" / "decoder" / "fsdp" / "pictures" / "step-0000002.png").exists()
    ddp, fsdp = (two[0]["bf16", "prior", kind] for kind in ("ddp", "fsdp"))
    assert ddp["validation"] and fsdp["validation"] == pytest.approx(ddp["validation"], abs=0.05)
    variance = [part["weights"]["x0_error"] for part in (ddp, fsdp)]
    torch.testing.assert_close(*variance, rtol=0.05, atol=0.01)


def test_an_error_in_a_gathered_block_is_the_one_that_is_raised(two):
    assert [rank["broken"] for rank in two] == ["out of memory"] * 2


def test_a_resumed_run_equals_the_uninterrupted_one_to_the_last_bit(two):
    whole, resumed = two[0]["decoder", "fsdp"], two[0]["resumed", "fsdp", "fsdp"]
    assert str(resumed["losses"]) == str(whole["losses"][ranks.HALF :])
    assert_equal(whole["weights"], resumed["weights"])
    assert_equal(whole["averages"], resumed["averages"])


@pytest.mark.parametrize(("kind", "other"), [("ddp", "fsdp"), ("fsdp", "ddp")])
def test_a_checkpoint_of_the_other_kind_is_gone_on_from(two, kind, other):
    whole, resumed = two[0]["decoder", kind], two[0]["resumed", kind, other]
    assert resumed["losses"] == pytest.approx(whole["losses"][ranks.HALF :], rel=1e-6, nan_ok=True)
    assert_close(whole["weights"], resumed["weights"])
    assert_close(whole["averages"], resumed["averages"])


def test_four_ranks_go_on_from_what_two_wrote(two, folder):
    ranks_of_four = run(folder, "four", 4)
    raw = read_checkpoint(folder / "prior" / "fsdp" / "half.ckpt")["current_model_state"]
    for rank in ranks_of_four:
        assert_equal(rank["four"]["loaded"], raw)
        total = sum(value.numel() for value in rank["four"]["averages"].values())
        assert len(rank["four"]["losses"]) == 1 and rank["four"]["held"] < 0.26 * total


def test_the_release_of_a_folder_equals_that_of_the_unsharded_run(two, folder):
    releases = {}
    for kind in ("ddp", "fsdp"):
        path = newest_checkpoint(folder / "decoder" / kind)
        assert path.name == "newest-step=4.ckpt" and path.is_dir() == (kind == "fsdp")
        assert app.main(["export", str(path), "--out", str(folder / f"release-{kind}")]) == 0
        releases[kind] = release.read(folder / f"release-{kind}")
    ddp, fsdp = releases["ddp"], releases["fsdp"]
    assert (ddp.stage, ddp.steps) == (fsdp.stage, fsdp.steps) == ("Decoder", 4)
    assert ddp.hyper_parameters == fsdp.hyper_parameters
    assert_close(
        ddp.tensors, fsdp.tensors, rtol=1e-3, atol=1e-4
    )  # one unit in the last place of float16
    for name, average in two[0]["decoder", "fsdp"]["averages"].items():
        assert torch.equal(fsdp.tensors[name], average.half().float()), name


def test_the_analytic_variance_is_written_into_the_folder(two, folder):
    ddp, fsdp = (
        read_checkpoint(newest_checkpoint(folder / "prior" / kind)) for kind in ("ddp", "fsdp")
    )
    for part in ("state_dict", "current_model_state"):
        assert fsdp[part]["x0_error"].isfinite().all()
    assert_close(ddp["state_dict"], fsdp["state_dict"])


def test_a_rank_that_cannot_write_is_a_sentence_on_all_and_the_old_checkpoint_stays(two, folder):
    for rank in two:
        assert "newest-step=3.ckpt" in rank["full disk"] and "full" in rank["full disk"]
    names = [path.name for path in (folder / "full" / "checkpoints").iterdir()]
    assert names == ["newest-step=2.ckpt"]
    assert newest_checkpoint(folder / "full").name == "newest-step=2.ckpt"


@pytest.fixture
def copy(two, folder, tmp_path):
    """A copy of a complete checkpoint, to damage."""
    checkpoint = folder / "prior" / "fsdp" / "half.ckpt"
    return Path(shutil.copytree(checkpoint, tmp_path / "newest-step=2.ckpt"))


@pytest.mark.parametrize("damage", ["missing", "short"])
@pytest.mark.parametrize("name", ["__1_0.distcp", ".metadata", "meta.pt"])
def test_a_folder_that_is_incomplete_is_skipped_and_refused(copy, damage, name):
    assert newest_checkpoint(copy.parent) == copy
    part = copy / name
    if damage == "missing":
        part.unlink()
    else:
        part.write_bytes(part.read_bytes()[:200])
    assert newest_checkpoint(copy.parent) is None
    with pytest.raises(UserError, match="newest-step=2"):
        read_checkpoint(copy)


class Evil:
    def __reduce__(self):
        return (print, ("this must never be printed",))


@pytest.mark.parametrize("where", ["metadata", "inside", "meta"])
def test_a_folder_that_would_run_code_is_refused(copy, where, capsys):
    if where == "meta":
        torch.save({"state_dict": Evil()}, copy / "meta.pt")
    else:
        with (copy / ".metadata").open("rb") as file:
            metadata = pickle.load(file)
        metadata.planner_data = Evil()
        (copy / ".metadata").write_bytes(pickle.dumps(metadata if where == "inside" else Evil()))
    with pytest.raises(UserError, match="would run code"):
        read_checkpoint(copy)
    assert "never be printed" not in capsys.readouterr().out


def test_a_folder_replaces_what_had_its_name_and_leftovers_are_removed(tmp_path):
    code = f"""
import os, signal
from unclip_pl.utils.files import atomic_folder
with atomic_folder({str(tmp_path / "a.ckpt")!r}) as folder:
    (folder / "part").write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / "a.ckpt").write_text("a file of that name")
    for text in ("first", "second"):
        with atomic_folder(tmp_path / "a.ckpt", replace=True) as folder:
            (folder / "part").write_text(text)
            remove_leftovers(tmp_path, "*.ckpt")  # the killed writer's, and not this one
        assert (tmp_path / "a.ckpt" / "part").read_text() == text
        assert len(list(tmp_path.iterdir())) == 1


def test_a_parameter_that_is_a_single_number_is_a_sentence():
    stage = Toy()
    stage.scale = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(UserError, match="scale"):
        shard(stage, None, "32-true")


def test_the_ranks_samples_differ():
    assert not torch.equal(ranks.sample(0)["image"], ranks.sample(1000)["image"])
