"""Every shipped YAML builds, by itself and in the commands that it names; see also test_paper.py.

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

from tests.cluster.forks import Ranks
from tests.conftest import ROOT
from unclip_pl.cli.config_checks import check_configs
from unclip_pl.cli.configs import find_config, find_configs
from unclip_pl.cli.lightning import expand_resume, main
from unclip_pl.cli.lightning_cli import build_cli
from unclip_pl.cluster.sharded import ShardedStrategy
from unclip_pl.networks.unet import UNetConfig
from unclip_pl.stages.decoder import Decoder
from unclip_pl.training.arguments import add_model_flags
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.messages import to_sentence


def stems(folder: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / folder).glob("*.yaml"))


STAGES = [stem for stem in stems("stages") if stem != "decoder_text"]  # which is an overlay
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
    for text in [re.sub(r" \\\n# +", " ", path.read_text())]  # commands over two lines
    for match in re.finditer(r"lightning (fit|predict)( -c \S+?\.yaml)+", text)
}
FOR_GPUS = ("gpu", "ddp", "fsdp")


def built(*arguments: str):
    """The stage, DataModule and Trainer of a command line, without running it."""
    return build_cli(["-c", "lightning_config/default.yaml", *arguments], run=False)


def build(*arguments: str):
    """`built` for the CPU."""
    return built(*arguments, "--trainer.accelerator", "cpu")


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def decay(cli) -> float:
    """The decay of the EMA."""
    return next(c.decay for c in cli.trainer.callbacks if hasattr(c, "decay"))


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
    assert type(cli.model).__name__.lower() == stage.replace("_", "")
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
        assert options["gradient_as_bucket_view"]


@pytest.mark.slow
@pytest.mark.parametrize("overlay", ["ddp", "fsdp"])
def test_two_ranks_on_cpus_train_under_the_overlays_for_many_gpus(overlay, tmp_path):
    arguments = [
        *("fit", "--model", "tests.training.toy.Toy", "--data", "tests.training.toy.ToyRows"),
        *("-c", str(ROOT / "lightning_config" / f"{overlay}.yaml"), "--trainer.max_steps", "3"),
        *("--trainer.default_root_dir", str(tmp_path), "--trainer.enable_progress_bar", "false"),
        *("--trainer.accelerator", "cpu", "--trainer.devices", "2", "--trainer.logger", "false"),
        *("--trainer.accumulate_grad_batches", "2"),
    ]
    ranks = Ranks(tmp_path, arguments, 2, strategy=None)
    assert ranks.wait() == [0, 0], ranks.output()[-3000:]
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


@pytest.mark.parametrize("name", ["upsampler_256", "upsampler_1024"])
def test_shipped_upsamplers_fit_into_8_MB(name):
    assert count(build("-c", f"stages/{name}.yaml").model) < 4e6


def test_decoder_on_text_embeddings_differs_from_the_decoder_only_in_its_condition():
    image = build("-c", "stages/decoder.yaml")
    text = build("-c", "stages/decoder.yaml", "-c", "stages/decoder_text.yaml")
    assert dict(image.model.hparams) | {"condition": "text"} == dict(text.model.hparams)
    assert text.trainer.default_root_dir == "runs/decoder_text"
    assert text.trainer.max_steps == image.trainer.max_steps  # trained as long
    assert text.datamodule.config == image.datamodule.config
    for stage in (image.model, text.model):  # the caption's z_t reaches neither's timestep
        assert stage.text.encoder.pooled_proj is None


def test_a_checkpoints_own_model_stands_over_the_files_and_under_the_flags():
    net = UNetConfig(width=32, mults=(1,), attention=(), head_width=32, embed_dim=256)
    settings = Decoder(net).hparams
    given = ["-c", "stages/decoder.yaml", "--model.net.dropout", "0.3", "--ema.decay", "0.5"]
    net = build(*add_model_flags(given, dict(settings))).model.hparams["net"]
    assert net == settings["net"] | {"dropout": 0.3}


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


@pytest.mark.parametrize(
    ("command", "flag", "option"),
    [
        ("predict -c stages/embed.yaml", "--data.loader.max_bad_rate", "loader.max_bad_rate"),
        ("fit -c stages/diffusion_prior.yaml", "--data.loader.window", "loader.window"),
        ("fit -c stages/decoder.yaml", "--model.max_bad_rate", "max_bad_rate"),
        ("fit -c stages/decoder.yaml", "--best.decay", "best.decay"),
    ],
)
def test_an_option_of_something_else_is_not_proposed_again(command, flag, option, capsys):
    assert main([*command.split(), flag, "0.5"]) == 1
    error = capsys.readouterr().err.strip()
    assert f"There is no option '{option}' here" in error and "\n" not in error
    assert "did you mean" not in error


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
    assert expand_resume(["fit", *given]) == ["fit", *flags, "--ckpt_path", f"resume:{value}"]


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


def test_other_messages_are_one_line():
    message = 'Parser key "lr":\n  Expected a float. Got value: fast'
    assert to_sentence(message) == "lr is fast: give float."


def test_impossible_value_is_one_sentence(capsys):
    assert main(["fit", "-c", "stages/decoder.yaml", "--model.optimizer.lr=fast"]) == 1
    error = capsys.readouterr().err.strip()
    assert "lr" in error and "\n" not in error


@pytest.mark.parametrize("stage", ["decoder", "diffusion_prior", "upsampler_256", "upsampler_1024"])
@pytest.mark.parametrize(
    ("given", "steps"),
    [("30", 30), ("fast27", "fast27"), ("[10, 10, 3]", (10, 10, 3)), ("ddim25", "ddim25")],
)
def test_steps_are_a_number_sections_or_a_name(stage, given, steps, tmp_path):
    overlay = tmp_path / "steps.yaml"
    overlay.write_text(f"model: {{init_args: {{sampling: {{steps: {given}}}}}}}\n")
    for more in (("-c", str(overlay)), ("--model.sampling.steps", given)):
        with torch.device("meta"):
            cli = build("-c", f"stages/{stage}.yaml", *more)
        assert cli.model.sampling.steps == steps


@pytest.mark.parametrize("steps", ["fast28", "2.5", "[]", "[10, 0]", "ddim", "[1200, 1]", "ddim64"])
def test_steps_that_are_none_are_one_sentence(steps, capsys):
    flags = ["--model.sampling.steps", steps, "--trainer.accelerator", "cpu"]
    assert main(["fit", "-c", "stages/upsampler_256.yaml", *flags]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("lightning: ") and "steps" in error and "Traceback" not in error
    assert re.search(r"give|ask for|write", error), error


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--model.sampling.guidance_scale=0.5", "guidance_scale is 0.5: give 1"),
        ("--model.sampling.steps=0", "in 0 steps"),
        ("--model.cond_dropout=2", "cond_dropout is 2.0"),
        ("--data.loader.batch_size=0", "batch_size of at least 1"),
    ],
)
def test_setting_that_a_class_refuses_is_its_sentence(flag, said, capsys):
    flags = [flag, "--trainer.accelerator", "cpu"]
    assert main(["fit", "-c", "stages/diffusion_prior.yaml", *flags]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("lightning: ") and said in error and "Given value" not in error


def test_help_tells_stages_from_overlays(capsys):
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    listed = dict(re.findall(r"^(Stages|Overlays)[^:]*: (.*)\.$", said, re.M))
    for stage in listed["Stages"].split(", "):
        assert check_configs(["fit", "-c", find_config(f"stages/{stage}.yaml")]) is None
    for overlay in listed["Overlays"].split(", "):
        with pytest.raises(UserError, match="names no stage"):
            check_configs(["fit", "-c", find_config(f"stages/{overlay}.yaml")])
    assert "decoder_text" in listed["Overlays"]


@pytest.mark.parametrize("text", ["", "- a\n", "model:\n\tnet: 1\n", None], ids=repr)
def test_a_file_without_settings_is_named(text, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    path.write_text(text) if text is not None else path.mkdir()
    assert main(["fit", "-c", "stages/decoder.yaml", "-c", str(path)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"lightning: {path} ") and "overlay" not in error
