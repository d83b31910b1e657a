"""`unclip submit`: scripts that bash and sbatch take, with the resources and the user's flags."""

import shlex
import shutil
import stat
import subprocess
import sys

import pytest

from tests.cli.shell import error_of
from tests.conftest import ROOT
from unclip_pl.cli.submit import JobOptions, job_script
from unclip_pl.cli.unclip import main


def script(capsys, *arguments: str) -> str:
    assert main(["submit", *arguments, "--dry-run"]) == 0
    return capsys.readouterr().out


def sbatch_options(text: str) -> dict[str, str]:
    return dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in text.splitlines()
        if line.startswith("#SBATCH")
    )


def command(text: str) -> list[str]:
    """What srun starts, without srun's own options."""
    line = next(line for line in text.splitlines() if "-m unclip_pl" in line)
    words = shlex.split(line)
    return words[words.index("-m") - 1 :]


@pytest.mark.parametrize("stage", ["stages/decoder.yaml", "stages/embed.yaml"])
@pytest.mark.parametrize(
    "flags",
    [
        ["--gpus", "8"],
        ["--gpus", "0", "--ranks", "2"],
        ["--validate", "--partition", "a100", "--account", "x", "--mem", "200G"],
    ],
)
def test_every_script_is_one_that_bash_takes_with_nothing_left_to_fill_in(capsys, stage, flags):
    text = script(capsys, stage, *flags)
    assert text.startswith("#!/usr/bin/env bash\n#SBATCH --job-name=") and "{{" not in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0
    if shellcheck := shutil.which("shellcheck"):
        assert subprocess.run([shellcheck, "-"], input=text, text=True).returncode == 0


def test_ranks_of_slurm_are_those_of_lightning(capsys):
    resources = "--nodes 8 --gpus 4 --time 12:00:00 --warn 300 --cpus 6"
    text = script(capsys, "stages/decoder.yaml", *resources.split())
    options, words = sbatch_options(text), command(text)
    names = ("nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task")
    assert [options[name] for name in names] == ["8", "4", "4", "6"]
    assert options["signal"] == "USR1@300" and options["time"] == "12:00:00"
    assert words[words.index("--trainer.num_nodes") + 1] == "8"
    assert words[words.index("--trainer.devices") + 1] == "4"
    assert words[:3] == [sys.executable, "-m", "unclip_pl"]
    assert words[3:6] == ["fit", "-c", "stages/decoder.yaml"]
    assert words[-2:] == ["--resume", "auto"]
    assert {"lightning_config/gpu.yaml", "lightning_config/ddp.yaml"} <= set(words)
    assert "gpus-per-task" not in text


def test_nodes_without_gpus_get_ranks_on_cpus(capsys):
    text = script(capsys, "stages/ar_prior.yaml", "--nodes", "2", "--gpus", "0", "--ranks", "2")
    options, words = sbatch_options(text), command(text)
    assert options["ntasks-per-node"] == "2" and "gpus-per-node" not in options
    assert "lightning_config/gpu.yaml" not in words
    assert words[words.index("--trainer.accelerator") + 1] == "cpu"
    alone = command(script(capsys, "stages/ar_prior.yaml", "--gpus", "0"))
    assert "lightning_config/ddp.yaml" not in alone


def test_flags_of_lightning_come_last_and_keep_their_quotes(capsys):
    flags = "-c 'my overlay.yaml' --nodes 2 --model.net '{\"width\": 32}' --name mine"
    words = command(script(capsys, "stages/decoder.yaml", *shlex.split(flags)))
    assert words[words.index("--model.net") + 1] == '{"width": 32}'
    # what comes later wins
    assert words.index("my overlay.yaml") > words.index("lightning_config/ddp.yaml")


def test_embedding_and_validation_have_their_own_jobs(capsys):
    text = script(capsys, "stages/embed.yaml", "--array", "4", "--gpus", "1")
    assert sbatch_options(text)["array"] == "0-3"
    assert command(text)[3] == "predict" and "kill-on-bad-exit" not in text
    assert command(script(capsys, "stages/decoder.yaml", "--validate"))[3] == "validate"


@pytest.mark.parametrize("flag", ["-c", "--config"])
def test_an_overlay_goes_to_the_job_and_is_not_taken_for_its_stage(capsys, flag):
    own = "--nodes", "8", "stages/decoder.yaml"
    text = script(capsys, *own, flag, "stages/decoder_text.yaml", "--trainer.max_steps", "8")
    assert "--job-name=train-decoder\n" in text
    assert f"{flag} stages/decoder_text.yaml" in text
    words = ["submit", flag, "stages/decoder_text.yaml", "stages/decoder.yaml", "--dry-run"]
    assert main(words) == 2
    assert f"{flag} stands before" in error_of(capsys)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("stages/decodr.yaml", "stages/decoder.yaml"),
        ("stages/decoder.yaml --gpus -1", "--gpus is -1"),
        ("stages/decoder.yaml --trainer.devices=4", "--trainer.devices=4"),
        ("stages/decoder.yaml --array 4", "--array"),
        ("stages/decoder.yaml --name bash", "--name"),
        ("stages/decoder.yaml --restarts -1", "--restarts is -1"),
        ("stages/decoder.yaml --node 2", "did you mean --nodes"),
        ("stages/decoder.yaml --dryrun", "did you mean --dry-run"),
    ],
)
def test_what_cannot_run_is_one_sentence(capsys, words, named):
    assert main(["submit", *words.split(), "--dry-run"]) == 1
    assert named in error_of(capsys)


def test_the_script_goes_to_sbatch_as_it_was_shown(capsys, tmp_path, monkeypatch):
    fake = tmp_path / "bin" / "sbatch"
    fake.parent.mkdir()
    fake.write_text(f"#!/bin/sh\ncat >{tmp_path}/got\necho Submitted batch job 7\n")
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{fake.parent}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    assert main(["submit", "stages/decoder.yaml"]) == 0
    out = capsys.readouterr().out
    assert out.endswith("Submitted batch job 7\n") and (tmp_path / "got").read_text() in out
    assert (tmp_path / "slurm").is_dir()
    fake.write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: x' >&2; exit 1\n")
    assert main(["submit", "stages/decoder.yaml", "--partition", "x"]) == 1
    assert "invalid partition specified: x" in error_of(capsys)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert main(["submit", "stages/decoder.yaml"]) == 1
    assert "no sbatch" in error_of(capsys)


@pytest.mark.parametrize(
    "said",
    [
        "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect "
        "failure)",
        "sbatch: error: fetch_config: DNS SRV lookup failed\n"
        "sbatch: fatal: Could not establish a configuration source",
    ],
)
def test_without_a_cluster_one_sentence_names_dry_run(said, capsys, tmp_path, monkeypatch):
    fake = tmp_path / "sbatch"
    fake.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    fake.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    assert main(["submit", "stages/decoder.yaml"]) == 1
    error = error_of(capsys)
    assert "No Slurm cluster" in error and "--dry-run" in error
    assert not (tmp_path / "slurm").exists()


def test_a_wheel_has_the_templates():
    names = {path.name for path in (ROOT / "lightning_config" / "slurm").glob("*.sbatch")}
    assert names == {"train.sbatch", "embed.sbatch", "eval.sbatch"}
    assert '"**/*.sbatch"' in (ROOT / "setup.py").read_text()


def run_template(tmp_path, kind, codes, words=(), restarts=2):
    """Exit code and output of a job whose commands of Slurm are replaced.

    srun ends with `codes` in turn and writes `words` in turn as the reasons. The arguments of
    scontrol are recorded.
    """
    stage = "stages/embed.yaml" if kind == "embed" else "stages/decoder.yaml"
    job = JobOptions(restarts=restarts, logs=tmp_path)
    srun = [
        f"n=$(cat {tmp_path}/n 2>/dev/null || echo 0); echo $((n + 1)) >{tmp_path}/n",
        f"set -- {' '.join(map(str, codes))}",
        "shift $n; code=$1",
        f"set -- {' '.join(words) or '-'}",
        '[ $# -gt $n ] && shift $n && [ "$1" != - ] && echo $1 >"$UNCLIP_ENDED"',
        "exit $code",
    ]
    scontrol = f'echo "$@" >>{tmp_path}/asked'
    commands = {"srun": "\n".join(srun), "scontrol": scontrol, "sleep": "exit 0"}
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    text = job_script(stage, [], job, validate=False)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "123456"}
    options = {"capture_output": True, "text": True, "timeout": 60}
    return subprocess.run(["bash"], input=text, env=environment, **options)


@pytest.mark.parametrize(
    ("codes", "words", "restarts", "code", "starts", "requeued"),
    [
        ([0], [], 2, 0, 1, False),
        ([75], ["requeue"], 2, 75, 1, True),
        ([143], ["stop"], 2, 143, 1, False),
        ([137, 0], [], 2, 0, 2, False),
        ([137, 143, 9], [], 2, 9, 3, False),
        ([7], [], 0, 7, 1, False),
        ([137, 75], ["-", "requeue"], 2, 75, 2, True),
    ],
)
def test_the_training_job_restarts_requeues_or_ends(
    tmp_path, codes, words, restarts, code, starts, requeued
):
    done = run_template(tmp_path, "train", codes, words, restarts)
    assert done.returncode == code, done.stdout + done.stderr
    assert int((tmp_path / "n").read_text()) == starts
    assert (tmp_path / "asked").exists() == requeued
    assert not requeued or (tmp_path / "asked").read_text() == "requeue 123456\n"


def test_failures_are_counted_across_requeues(tmp_path):
    assert run_template(tmp_path, "train", [137, 75], ["-", "requeue"], 1).returncode == 75
    (tmp_path / "n").unlink()
    done = run_template(tmp_path, "train", [137], [], 1)
    assert done.returncode == 137 and "failed with code 137 after 1 restarts" in done.stdout
