"""Every shipped YAML builds, alone and in the commands that it names; the paper's have its sizes.

A built command line has its stage, its data and a Trainer with the strategy, as `lightning fit`
makes them. Where an overlay is for GPUs, eight are pretended: Lightning touches none before it
trains.
"""

import re
import sys
import warnings
from pathlib import Path

import lightning.fabric.accelerators.cuda as fabric_cuda
import lightning.pytorch.accelerators.cuda as pytorch_cuda
import pytest
import torch
from lightning.pytorch.accelerators import CUDAAccelerator
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from tests.conftest import ROOT
from tests.training.forks import Ranks
from unclip_pl.cli import build_cli, find_config, find_configs, main, resume, sentence
from unclip_pl.errors import UserError
from unclip_pl.training.sharded import ShardedStrategy


def stems(folder: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / folder).glob("*.yaml"))


CLASSES = {"decoder_text": "Decoder"}  # files that have no class of their own
STAGES = stems("stages")
PAPER = stems("stages/paper")
CLIPS = stems("lightning_config/clip")
OVERLAYS = sorted(
    str(path.relative_to(ROOT))
    for folder in ("lightning_config", "lightning_config/data")
    for path in (ROOT / folder).glob("*.yaml")
    if path.stem != "default"
)
YAMLS = sorted([*(ROOT / "stages").rglob("*.yaml"), *(ROOT / "lightning_config").rglob("*.yaml")])
COMMANDS = {  # those that the comments of the YAML files name
    match[0].strip()
    for path in YAMLS
    for match in re.finditer(r"lightning (fit|predict)( -c \S+?\.yaml)+", path.read_text())
}
FOR_GPUS = ("gpu", "ddp", "fsdp")


def built(*arguments: str):
    """The stage, DataModule and Trainer of a command line, without running it."""
    return build_cli(["-c", "lightning_config/default.yaml", *arguments], run=False)


def build(*arguments: str):
    """`built` for the CPU."""
    return built(*arguments, "--trainer.accelerator", "cpu")


def paper(name: str, *more: str):
    """A stage with the paper's overlay, on the meta device: its weights take no memory."""
    with torch.device("meta"):
        return build("-c", f"stages/{name}.yaml", *more, "-c", f"stages/paper/{name}.yaml")


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def decay(cli) -> float:
    """That of the average (EMA)."""
    return next(c.decay for c in cli.trainer.callbacks if hasattr(c, "decay"))


def checkpointing(cli) -> set[str]:
    """How the networks of a stage checkpoint."""
    configs = [cli.model.net_config, getattr(cli.model, "text_config", None)]
    return {config.checkpointing for config in configs if hasattr(config, "checkpointing")}


@pytest.fixture
def eight_gpus(monkeypatch):
    """A machine of eight GPUs, as far as Lightning asks before it trains."""
    for module in (fabric_cuda, pytorch_cuda):
        monkeypatch.setattr(module, "num_cuda_devices", lambda: 8)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_builds(stage):
    cli = build("-c", f"stages/{stage}.yaml")
    wanted = CLASSES.get(stage, stage).lower().replace("_", "")
    assert type(cli.model).__name__.lower() == wanted
    assert cli.trainer.default_root_dir.endswith(f"runs/{stage}")
    assert cli.trainer.max_epochs == -1  # of default.yaml


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_overlay_goes_over_the_decoder(overlay, eight_gpus):
    arguments = "-c", "stages/decoder.yaml", "-c", overlay
    cli = built(*arguments) if Path(overlay).stem in FOR_GPUS else build(*arguments)
    on_gpus = isinstance(cli.trainer.accelerator, CUDAAccelerator)
    assert on_gpus == (Path(overlay).stem in FOR_GPUS)


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_in_a_comment_builds(command, eight_gpus, monkeypatch):
    """From another folder too: shipped files are found from anywhere."""
    monkeypatch.chdir("/")
    arguments = find_configs(command.split()[2:])
    default = find_config("lightning_config/default.yaml")
    with torch.device("meta"):
        cli = build_cli(["-c", default, *arguments], run=False)
    assert cli.trainer.num_devices == (8 if "ddp" in command or "fsdp" in command else 1)


def test_the_comments_name_commands():
    assert len(COMMANDS) >= len(STAGES) + len(PAPER) + 3  # of gpu, ddp and fsdp


def test_gpu_overlay_is_one_gpu_in_bfloat16(eight_gpus):
    trainer = built("-c", "stages/decoder.yaml", "-c", "lightning_config/gpu.yaml").trainer
    assert isinstance(trainer.strategy, SingleDeviceStrategy) and trainer.num_devices == 1
    assert trainer.strategy.root_device == torch.device("cuda", 0)
    assert trainer.precision == "bf16-mixed"


@pytest.mark.parametrize("stage", PAPER)
@pytest.mark.parametrize(("overlay", "kind"), [("ddp", DDPStrategy), ("fsdp", ShardedStrategy)])
def test_paper_stages_build_for_all_gpus_of_a_node(stage, overlay, kind, eight_gpus):
    files = [f"stages/{stage}", f"stages/paper/{stage}", "lightning_config/gpu"]
    files.append(f"lightning_config/{overlay}")
    with torch.device("meta"):
        trainer = built(*(word for file in files for word in ("-c", f"{file}.yaml"))).trainer
    assert type(trainer.strategy) is kind and trainer.num_devices == 8
    assert [d.index for d in trainer.strategy.parallel_devices] == list(range(8))
    assert trainer.precision == "bf16-mixed"
    if overlay == "ddp":
        options = trainer.strategy._ddp_kwargs
        assert options["static_graph"] and options["gradient_as_bucket_view"]


@pytest.mark.slow
@pytest.mark.parametrize("overlay", ["ddp", "fsdp"])
def test_two_ranks_on_cpus_train_under_the_overlays_for_many_gpus(overlay, tmp_path):
    arguments = [
        *("fit", "--model", "tests.training.toy.Toy", "--data", "tests.training.toy.ToyRows"),
        *("-c", str(ROOT / "lightning_config" / f"{overlay}.yaml"), "--trainer.max_steps", "3"),
        *("--trainer.default_root_dir", str(tmp_path), "--trainer.enable_progress_bar", "false"),
        *("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.logger", "false"),
    ]
    ranks = Ranks(tmp_path, arguments, 2, strategy=None)
    assert ranks.wait() == [0, 0], ranks.said()[-3000:]
    saved = tmp_path / "checkpoints" / "newest-step=3.ckpt"
    assert saved.is_dir() if overlay == "fsdp" else saved.is_file()


def test_debug_overlay_is_two_steps_of_everything():
    cli = build("-c", "stages/decoder.yaml", "-c", "lightning_config/debug.yaml")
    trainer = cli.trainer
    found = trainer.max_steps, trainer.val_check_interval, trainer.limit_val_batches
    assert found == (2, 2, 1)
    assert [c.count for c in trainer.callbacks if type(c).__name__ == "Pictures"] == [2]


@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("stage", ["decoder", "diffusion_prior", "ar_prior"])
def test_clip_overlays_agree_with_open_clip(stage, clip):
    with torch.device("meta"):
        cli = build("-c", f"stages/{stage}.yaml", "-c", f"lightning_config/clip/{clip}.yaml")
    import open_clip

    config = open_clip.get_model_config(cli.datamodule.clip.config.model)
    text = cli.model.text_config
    assert cli.model.net_config.embed_dim == config["embed_dim"]
    assert text.states_width == config["text_cfg"]["width"]
    assert text.context_length == config["text_cfg"]["context_length"]


PAPER_PARAMETERS = {  # of Table 3, in the stage as a whole
    "ar_prior": (2.0e9, 2.2e9),
    "decoder": (3.4e9, 3.6e9),
    "diffusion_prior": (1.19e9, 1.34e9),
    "upsampler_256": (6.9e8, 7.5e8),
    "upsampler_1024": (2.7e8, 3.2e8),
}


@pytest.mark.parametrize("name", PAPER)
def test_every_paper_overlay_has_the_papers_size_and_checkpoints(name):
    low, high = PAPER_PARAMETERS[name]
    cli = paper(name)
    size = count(cli.model)
    assert low < size < high, f"{size / 1e9:.3f} B parameters"
    assert all(parameter.is_meta for parameter in cli.model.parameters())
    assert checkpointing(cli) <= {"selective", "full"}
    assert cli.trainer.default_root_dir.endswith(f"runs/paper/{name}")


def test_paper_ar_prior_has_the_papers_settings():
    cli = paper("ar_prior", "-c", "lightning_config/clip/ViT-H-14.yaml")
    net = cli.model.net
    # 0.80 B, which the paper's "1B" counts roughly, and 1.21 B
    assert abs(count(net.transformer) / (12 * 24 * 1664**2) - 1) < 0.01
    assert abs(count(net.text.encoder.transformer) / (12 * 24 * 2048**2) - 1) < 0.01
    config = net.config
    assert (config.heads, config.max_codes, config.buckets, net.length) == (26, 319, 1024, 256)
    optimizer = cli.model.optimizer_config
    rates = optimizer.lr, optimizer.betas, optimizer.eps, optimizer.weight_decay
    assert rates == (1.6e-4, (0.9, 0.91), 1e-10, 0.04)
    assert cli.trainer.max_steps == 1_000_000 and cli.model.drop_text == 0.1


def test_paper_decoder_has_the_papers_settings():
    cli = paper("decoder")
    assert cli.model.optimizer_config.lr == 1.2e-4 and cli.trainer.max_steps == 800_000
    diffusion = cli.model.process.config
    assert (diffusion.parametrization, diffusion.schedule) == ("eps", "cosine")
    assert (cli.model.sampling.sampler, cli.model.sampling.steps) == ("ddpm", 250)


def test_paper_diffusion_prior_has_the_papers_settings():
    cli = paper("diffusion_prior")
    blocks = count(cli.model.net.transformer)
    # 24 blocks of width 2048 have 1.21 B, the paper's "1B"
    assert 1.19e9 < blocks < 1.22e9, f"{blocks / 1e9:.3f} B parameters of the Transformer"
    assert count(cli.model) - blocks < 0.12e9  # token embedding, positions, projections
    optimizer = cli.model.optimizer_config
    rates = optimizer.lr, optimizer.betas, optimizer.eps, optimizer.weight_decay
    assert rates == (1.1e-4, (0.9, 0.96), 1e-6, 6e-2)
    assert cli.trainer.max_steps == 600_000 and cli.datamodule.config.batch_size == 4096
    diffusion, sampling = cli.model.process.config, cli.model.sampling
    assert (diffusion.schedule, diffusion.parametrization) == ("cosine", "x0")
    assert (sampling.sampler, sampling.steps, sampling.num_candidates) == ("analytic", 64, 2)
    assert cli.model.text_dropout == 0.1 and decay(cli) == 0.9999


@pytest.mark.parametrize(
    ("name", "net", "schedule", "rate", "batch"),
    [
        ("upsampler_256", (320, (1, 2, 3, 4), 3, 0.1), ("cosine", 27), 1.2e-4, 1024),
        ("upsampler_1024", (192, (1, 1, 2, 2, 4, 4), 2, 0.0), ("linear", 15), 1.0e-4, 512),
    ],
)
def test_paper_upsamplers_have_the_papers_settings(name, net, schedule, rate, batch):
    cli = paper(name)
    config, optimizer = cli.model.net_config, cli.model.optimizer_config
    assert (config.width, config.mults, config.depth, config.dropout) == net
    assert config.patch_size == 1 and config.attention == () and not config.middle_attention
    sampling, diffusion = cli.model.sampling, cli.model.process.config
    assert (diffusion.schedule, sampling.steps, sampling.sampler) == (*schedule, "ddim")
    assert diffusion.parametrization == "eps" and cli.model.residual == 0
    rates = optimizer.lr, optimizer.betas, optimizer.eps, optimizer.weight_decay
    assert rates == (rate, (0.9, 0.999), 1e-8, 0.0)
    data = cli.datamodule
    assert cli.trainer.max_steps == 1_000_000 and data.config.batch_size == batch
    assert data.crop * 4 == data.image_size == config.image_size  # crop fraction 0.25
    assert decay(cli) == 0.9999


@pytest.mark.parametrize("name", ["upsampler_256", "upsampler_1024"])
def test_shipped_upsamplers_fit_into_8_MB(name):
    assert count(build("-c", f"stages/{name}.yaml").model) < 4e6


def test_decoder_on_text_embeddings_differs_from_the_decoder_in_its_condition_alone():
    image, text = (build("-c", f"stages/{name}.yaml") for name in ("decoder", "decoder_text"))
    assert dict(image.model.hparams) | {"condition": "text"} == dict(text.model.hparams)
    assert image.trainer.max_steps == text.trainer.max_steps
    assert image.datamodule.config == text.datamodule.config


def test_files_merge_and_flags_win():
    flags = "--model.optimizer.lr", "5e-4", "--ema.decay", "0.5"
    cli = build("-c", "stages/decoder.yaml", *flags)
    optimizer = cli.model.optimizer_config
    assert optimizer.lr == 5e-4 and optimizer.warmup_steps == 100
    assert cli.model.net_config.width == 64 and decay(cli) == 0.5


@pytest.mark.parametrize(
    ("flag", "near"),
    [
        ("--model.net.widht=64", "width"),
        ("--trainer.max_stesp=3", "max_steps"),
        ("--data.loader.bach_size=3", "batch_size"),
        ("--emma.decay=0.9", "ema"),
        ("--trainer.max_step=3", "max_steps"),
        ("--trainer.accel=cpu", "accelerator"),
        ("--seed_everythin=3", "seed_everything"),
    ],
)
def test_typo_names_the_nearest_key(flag, near, capsys):
    assert main(["fit", "-c", "stages/decoder.yaml", flag]) == 1
    error = capsys.readouterr().err.strip()
    assert f"did you mean '{near}'" in error and "\n" not in error


def test_start_of_a_key_is_no_key(capsys):
    assert main(["fit", "-c", "stages/decoder.yaml", "--trainer.max_step", "3"]) == 1
    assert "did you mean 'max_steps'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "value"),
    [
        (["--resume"], "auto"),
        (["--resume", "auto"], "auto"),
        (["--resume", "a.ckpt"], "a.ckpt"),
        (["--resume=a=b.ckpt"], "a=b.ckpt"),
        (["--resume="], "auto"),
        (["--resume", "--trainer.max_steps", "3"], "auto"),
        (["--resume", "-c", "x.yaml"], "auto"),
        (["--resume=auto", "--ema.decay", "0"], "auto"),
    ],
)
def test_resume_takes_a_file_or_auto_and_no_flag(given, value):
    flags = [word for word in given if not word.startswith("--resume") and word != value]
    assert resume(["fit", *given]) == ["fit", *flags, "--ckpt_path", f"resume:{value}"]


@pytest.mark.parametrize(
    "given",
    [
        ["-c", "stages/decoder.yaml"],
        ["--config", "stages/decoder.yaml"],
        ["--config=stages/decoder.yaml"],
    ],
)
def test_every_way_to_name_a_configuration_finds_the_shipped(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = find_configs(["fit", *given, "--ema.decay=0.5", "-c"])
    assert found[0] == "fit" and found[-2:] == ["--ema.decay=0.5", "-c"]
    assert found[1].partition("=")[0] == given[0].partition("=")[0]
    assert Path(found[-3].rpartition("=")[2]).is_file()


def test_a_command_says_nothing_of_lightnings_ways(monkeypatch, capsys):
    arguments = ["fit", "-c", "stages/decoder.yaml", "--model.optimizer.lr=fast"]
    monkeypatch.setattr(sys, "argv", ["lightning", *arguments])  # as in a process of its own
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        assert main(arguments) == 1
        assert not [str(one.message) for one in caught if "args parameter" in str(one.message)]
        warnings.simplefilter("default")  # without the filter of `main` it would be said
        with pytest.raises(UserError, match="lr"):
            build_cli(find_configs(arguments))
        assert [one for one in caught if "args parameter" in str(one.message)]
    assert "lr" in capsys.readouterr().err


def test_typo_in_a_yaml_names_the_nearest_key(tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text("model: {init_args: {net: {widht: 64}}}\n")
    assert main(["fit", "-c", "stages/decoder.yaml", "-c", str(path)]) == 1
    error = capsys.readouterr().err.strip()
    assert "'widht'" in error and "did you mean 'width'" in error and "\n" not in error


def test_configuration_that_is_not_there_names_the_nearest():
    with pytest.raises(UserError, match=r"did you mean stages/decoder\.yaml"):
        find_config("stages/decodr.yaml")


def test_stage_files_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Path(find_config("stages/decoder.yaml")).is_file()


def test_sentence_keeps_other_messages():
    given = 'Parser key "lr":\n  Expected a float. Got value: fast'
    assert sentence(given) == 'Parser key "lr": Expected a float. Got value: fast'


def test_impossible_value_is_one_sentence(capsys):
    assert main(["fit", "-c", "stages/decoder.yaml", "--model.optimizer.lr=fast"]) == 1
    error = capsys.readouterr().err.strip()
    assert "lr" in error and "\n" not in error


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--model.sampling.guidance_scale=0.5", "guidance_scale is 0.5: give 1"),
        ("--model.sampling.steps=0", "in 0 steps"),
        ("--model.text_dropout=2", "text_dropout is 2.0"),
        ("--data.loader.batch_size=0", "batch_size of at least 1"),
    ],
)
def test_setting_that_a_class_refuses_is_its_sentence(flag, said, capsys):
    flags = [flag, "--trainer.accelerator", "cpu"]
    assert main(["fit", "-c", "stages/diffusion_prior.yaml", *flags]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("lightning: ") and said in error and "Given value" not in error
