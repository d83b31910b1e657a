"""A folder holds one run: a second one is refused, and nothing of the first is lost or mixed."""

import multiprocessing
import shutil

import pytest
import torch

from tests.training.toy import command
from unclip_pl.cli.lightning import expand_resume, main
from unclip_pl.cli.lightning_cli import build_cli
from unclip_pl.cluster.checkpoint_io import newest_checkpoint, read_checkpoint
from unclip_pl.training.run_folder import check_same_run, claim_folder, find_checkpoint, set_aside
from unclip_pl.utils.errors import SharedError, UserError


def contents(folder) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """Folder of a run of four steps."""
    folder = tmp_path_factory.mktemp("first")
    assert main(command(folder, steps=4)) == 0
    return folder


def last_error(capsys) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_second_fit_in_a_folder_that_holds_a_run_is_refused(first, capsys):
    before = contents(first)
    assert main(command(first, "--model.optimizer.lr", "0.5", steps=2)) == 1
    sentence = last_error(capsys)
    assert str(first) in sentence and "newest-step=4.ckpt" in sentence
    assert "--resume auto" in sentence and "--trainer.default_root_dir" in sentence
    assert contents(first) == before


def test_a_run_goes_on_in_its_folder_as_often_as_one_likes(first, tmp_path):
    folder = shutil.copytree(first, tmp_path / "run")
    for steps in (6, 6, 8):  # the second finds nothing to do
        assert main(command(folder, "--resume", "auto", steps=steps)) == 0
        names = [path.name for path in folder.rglob("newest-*.ckpt")]
        assert names == [f"newest-step={steps}.ckpt"]


def test_configuration_of_a_resumed_run_can_be_used_again(first, tmp_path, capsys):
    folder = shutil.copytree(first, tmp_path / "run")
    assert main(command(folder, "--resume", "auto", steps=6)) == 0
    config = ["fit", "-c", str(folder / "config.yaml")]
    elsewhere = ["--trainer.default_root_dir", str(tmp_path / "again"), "--trainer.max_steps", "1"]
    assert main([*config, *elsewhere]) == 0
    assert newest_checkpoint(tmp_path / "again").name == "newest-step=1.ckpt"
    assert main(config) == 1 and "newest-step=6.ckpt" in last_error(capsys)
    assert main([*config, "--resume", "auto", "--trainer.max_steps", "7"]) == 0
    assert newest_checkpoint(folder).name == "newest-step=7.ckpt"


def test_looking_at_a_run_writes_nothing_into_its_folder(first):
    before, flags = contents(first), ["--trainer.limit_val_batches", "0"]
    arguments = ["validate", *command(first, *flags)[1:]]
    arguments = [*arguments, "--ckpt_path", "last"]
    assert main(arguments) == 0
    assert contents(first) == before


def test_going_back_in_a_run_is_refused_where_it_would_lose_its_end(first, tmp_path):
    folder = shutil.copytree(first, tmp_path / "run")
    old = shutil.copy(folder / "checkpoints" / "newest-step=4.ckpt", folder / "best-step=2.ckpt")
    other = shutil.copy(old, tmp_path / "newest-step=9.ckpt")
    for checkpoint in (old, other):
        with pytest.raises(SharedError, match="newest-step=4.ckpt"):
            check_same_run(folder, checkpoint)
    check_same_run(folder, folder / "checkpoints" / "newest-step=4.ckpt")
    check_same_run(tmp_path / "new", old)


def test_two_runs_at_one_time_in_one_folder_are_refused(tmp_path):
    def second(queue):
        try:
            with claim_folder(tmp_path, None, is_writer=True):
                queue.put("began")
        except SharedError as error:
            queue.put(str(error))

    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with claim_folder(tmp_path, None, is_writer=True):
        process = context.Process(target=second, args=(queue,))
        process.start()
        assert "Another run" in queue.get(timeout=60)
        process.join()
    process = context.Process(target=second, args=(queue,))
    process.start()
    assert queue.get(timeout=60) == "began"
    process.join()


def test_what_a_run_without_a_checkpoint_left_is_set_aside(first, tmp_path, capsys):
    folder = shutil.copytree(first, tmp_path / "run")
    shutil.rmtree(folder / "checkpoints")
    before = contents(folder)
    assert main(command(folder, "--resume", "auto", steps=2)) == 0
    assert contents(folder / "earlier-1") == before
    assert len(list(folder.glob("events*"))) == len(list(folder.glob("config.yaml"))) == 1
    shutil.rmtree(folder / "checkpoints")
    set_aside(folder)
    set_aside(folder)
    assert sorted(path.name for path in folder.glob("earlier-*")) == ["earlier-1", "earlier-2"]


def test_a_run_that_cannot_start_leaves_no_configuration(tmp_path):
    assert main(command(tmp_path, "--resume", "gone.ckpt")) == 1
    assert not (tmp_path / "config.yaml").exists()


def test_names_of_checkpoints(first, tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    newest = folder / "checkpoints" / "newest-step=8.ckpt"
    best = folder / "checkpoints" / "best-step=4.ckpt"
    for path in (newest, best):
        torch.save({}, path)
    assert find_checkpoint(None, folder) is None
    assert find_checkpoint("last", folder) == find_checkpoint("resume:auto", folder) == newest
    assert find_checkpoint("best", folder) == best and find_checkpoint(str(best), folder) == best
    assert find_checkpoint("resume:auto", tmp_path) is None
    for option in ("last", "best", "hpc", "auto", "gone.ckpt"):
        with pytest.raises(UserError, match=option):
            find_checkpoint(option, tmp_path)


def test_last_is_where_a_run_goes_on(first, tmp_path):
    folder = shutil.copytree(first, tmp_path / "run")
    build_cli(expand_resume(command(folder, "--ckpt_path", "last", steps=5)))
    assert read_checkpoint(newest_checkpoint(folder))["global_step"] == 5
