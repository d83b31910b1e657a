"""`benchmarks/gpu.py` gets a GPU for nine minutes: nothing that goes wrong may end it early."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
DONE: list[str] = []


@pytest.fixture
def scripts(monkeypatch):
    """The modules of benchmarks/, by the names that they have for each other."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import _common

    import _results
    import _sampling
    import cascade
    import gpu
    import mfu

    return SimpleNamespace(
        common=_common, results=_results, sampling=_sampling, cascade=cascade, gpu=gpu, mfu=mfu
    )


def part(name: str, error: type[BaseException] | None = None):
    def run() -> None:
        DONE.append(name)
        if error is not None:
            raise error(name)

    return name, 30, run


def run(gpu, monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["gpu.py", *words])
    with pytest.raises(SystemExit) as ended:
        gpu.main()
    return ended.value.code


def test_after_an_error_that_breaks_the_gpu_the_rest_runs_in_a_new_process(
    scripts, monkeypatch, tmp_path
):
    gpu, started = scripts.gpu, []
    DONE.clear()

    def execv(program: str, words: list[str]) -> None:
        started.extend(words[2:])
        raise SystemExit(3)

    parts = [part("first"), part("second", RuntimeError), part("third")]
    monkeypatch.setattr(gpu.Parts, "in_order", lambda _: (gpu.Part(*each) for each in parts))
    monkeypatch.setattr(gpu.os, "execv", execv)
    monkeypatch.setattr(gpu.os, "closerange", lambda *_: None)
    broken = lambda: DONE[-1] == "second"

    def free() -> None:
        if broken():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(gpu, "free", free)
    words = [
        "--tiny",
        "--device",
        "cpu",
        "--results",
        str(tmp_path),
        "--only",
        "first|second|third",
    ]
    assert run(gpu, monkeypatch, *words) == 3
    assert DONE == ["first", "second"]
    (error,) = (tmp_path / "errors").glob("*.json")
    assert json.loads(error.read_text())["error"].endswith("second")
    assert run(gpu, monkeypatch, *started) == 1  # of the part that failed before
    assert DONE == ["first", "second", "third"]


def test_a_part_that_fails_or_takes_too_long_does_not_end_the_others(
    scripts, monkeypatch, tmp_path
):
    gpu = scripts.gpu
    DONE.clear()
    parts = [part("first", gpu.OutOfTime), part("second", ValueError), part("third")]
    monkeypatch.setattr(gpu.Parts, "in_order", lambda _: (gpu.Part(*each) for each in parts))
    assert run(gpu, monkeypatch, "--tiny", "--device", "cpu", "--results", str(tmp_path)) == 1
    assert DONE == ["first", "second", "third"]
    assert len(list((tmp_path / "errors").glob("*.json"))) == 2


def test_memory_is_read_where_the_system_does_not_tell_the_peak(scripts, monkeypatch, tmp_path):
    status = tmp_path / "status"
    monkeypatch.setattr(scripts.common, "STATUS", status)
    status.write_text("Name:\tpython\nVmSize:\t2048 kB\nVmRSS:\t1024 kB\n")  # as gVisor has it
    assert scripts.common.peak_mib() > 100
    status.write_text("Name:\tpython\nVmHWM:\t  3072 kB\n")
    assert scripts.common.peak_mib() == 3
    status.unlink()
    assert scripts.common.peak_mib() > 100


def test_a_stage_is_timed_where_the_peak_may_not_be_reset(scripts, monkeypatch, tmp_path):
    monkeypatch.setattr(scripts.cascade, "CLEAR_REFS", tmp_path)  # writing to a folder is refused
    stages = scripts.cascade.Stages()
    assert stages.run("prior", lambda: torch.ones(2)).sum() == 2
    assert len(stages.seconds["prior"]) == 1


def test_the_search_for_a_batch_ends_at_one_sample(scripts, monkeypatch):
    tried, mfu = [], scripts.mfu
    monkeypatch.setattr(mfu, "build", lambda *_: torch.nn.Module())
    monkeypatch.setattr(mfu, "batch_for", lambda name, stage, size, tiny: tried.append(size))
    monkeypatch.setattr(mfu, "plain_step", lambda *_: lambda: None)
    monkeypatch.setattr(mfu, "retried", lambda _: len(tried) < 9)
    assert mfu.largest_batch("decoder", SimpleNamespace(device="cpu"), 4) == 1
    assert tried == [4, 2, 1]


def test_times_are_kept_when_the_count_of_operations_is_cut_off(scripts, monkeypatch, tmp_path):
    gpu = scripts.gpu

    def cut_off(step):
        raise gpu.OutOfTime("cut off")

    monkeypatch.setattr(scripts.sampling, "flops_of", cut_off)
    words = ["--tiny", "--device", "cpu", "--results", str(tmp_path), "--threads", "1"]
    assert run(gpu, monkeypatch, *words, "--only", "sample/upsampler_256$") == 1
    (path,) = tmp_path.glob("*.json")
    (measured,) = json.loads(path.read_text())["rounds"]
    assert measured["flops_per_step"] is None and len(measured["times_s"]) == 2


def test_a_further_run_adds_its_round(scripts, tmp_path):
    line = {"job": "decoder_train", "machine": "a CPU", "impl": "unclip_pl"}
    for flops in (100, 101):  # conditions that are dropped at random change the count
        path = scripts.results.save(line | {"flops_per_step": flops}, tmp_path)
    rounds = json.loads(path.read_text())["rounds"]
    assert [(each["round"], each["flops_per_step"]) for each in rounds] == [(0, 100), (1, 101)]


def test_its_tests_are_there(scripts):
    assert all((ROOT / name).is_file() for name in scripts.gpu.TESTS)


@pytest.mark.slow
def test_every_stage_is_trained_and_drawn(scripts, monkeypatch, tmp_path):
    """With tiny shapes, without the compiler."""
    words = ["--tiny", "--device", "cpu", "--threads", "1", "--results", str(tmp_path)]
    code = run(
        scripts.gpu, monkeypatch, *words, "--only", "^(train/.*(none|selective)|sample/[^/]*)$"
    )
    errors = [json.loads(path.read_text())["error"] for path in tmp_path.glob("errors/*.json")]
    assert not errors and code == 0
    measured = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    jobs = {(line["job"], line["checkpointing"]) for line in measured}
    for name in scripts.gpu.TRAINED:
        assert {(f"tiny_{name}_train", kind) for kind in ("none", "selective")} <= jobs
        assert (f"tiny_{name}_sample", "none") in jobs
