"""Settings and checkpoints that cannot be meant end in one sentence, before anything is trained."""

import zipfile

import pytest

from tests.factories import package_decoder, write_release
from tests.training.toy import command
from unclip_pl.cli import unclip
from unclip_pl.cli.lightning import main


def sentence(capsys, arguments: list[str], run=main) -> str:
    assert run(arguments) == 1
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--model.optimizer.lr", ".nan"], "model.optimizer.lr is nan"),
        (["--model.optimizer.lr", ".inf"], "model.optimizer.lr is inf"),
        (["--model.optimizer.lr", "nan"], "optimizer.lr"),
        (["--model.optimizer.weight_decay", ".nan"], "model.optimizer.weight_decay is nan"),
        (["--model.optimizer.betas", "[.nan,0.9]"], "optimizer.betas"),
        (["--model.optimizer.clip_norm", ".nan"], "model.optimizer.clip_norm is nan"),
        (["--model.noise", ".nan"], "model.noise is nan"),
        (["--startup.clock_seconds", ".inf"], "startup.clock_seconds is inf"),
        (["--trainer.logger=CSVLogger", "--trainer.logger.save_dirr=x"], "save_dirr"),
        (["--trainer.logger=CSVLogger", "--trainer.logger.init_args.save_dirr=x"], "save_dirr"),
    ],
)
def test_a_setting_that_cannot_be_meant_is_named(flags, named, tmp_path, capsys):
    assert named in sentence(capsys, command(tmp_path / "run", *flags))
    assert not (tmp_path / "run").exists()


def test_a_norm_without_limit_may_be_infinite(tmp_path):
    assert main(command(tmp_path, "--model.optimizer.clip_norm", ".inf", steps=1)) == 0


@pytest.mark.parametrize("group", ["net", "optimizer", "diffusion"])
def test_a_group_of_settings_that_is_null_is_named(group, tmp_path, capsys):
    overlay = tmp_path / "mine.yaml"
    overlay.write_text(f"model: {{class_path: Decoder, init_args: {{{group}: null}}}}")
    words = ["fit", "-c", "stages/decoder.yaml", "-c", str(overlay)]
    folder = ["--trainer.default_root_dir", str(tmp_path / "run")]
    assert f"model.{group} is null" in sentence(capsys, [*words, *folder])
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Folder of what is no checkpoint, and of a run."""
    folder = tmp_path_factory.mktemp("others")
    (folder / "text.txt").write_text("hello")
    (folder / "nothing.ckpt").write_bytes(b"")
    with zipfile.ZipFile(folder / "archive.zip", "w") as archive:
        archive.writestr("hello.txt", "hello")
    (folder / "folder").mkdir()
    write_release(folder / "release", package_decoder())
    assert main(command(folder / "run", steps=1)) == 0
    return folder


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("text.txt", "give a .ckpt"),
        ("nothing.ckpt", "give a .ckpt"),
        ("archive.zip", "another archive"),
        ("folder", "without a checkpoint"),
        ("release", "--init"),
        ("run", "newest-step=1.ckpt"),
        ("gone.ckpt", "check the path"),
    ],
)
def test_what_is_no_checkpoint_is_named(name, cure, others, tmp_path, capsys):
    path = str(others / name)
    for option in ("--resume", "--ckpt_path"):
        last = sentence(capsys, command(tmp_path / "run", option, path))
        assert path in last and cure in last
    assert not (tmp_path / "run").exists()


def test_a_command_that_starts_nothing_does_not_speak_of_a_start(others, tmp_path, capsys):
    words = ["generate", "fox", "--out", str(tmp_path), "--decoder"]
    for name in ("gone.ckpt", "text.txt"):
        last = sentence(capsys, [*words, str(others / name)], unclip.main)
        assert name in last and "scratch" not in last
