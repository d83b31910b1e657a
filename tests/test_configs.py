"""Every YAML that is shipped builds, alone and with the overlays that it names; the paper's have the paper's size."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from unclip_pl.cli import build_cli, find_config, find_configs, main, resume, sentence
from unclip_pl.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
CLASSES = {"decoder_text": "Decoder"}  # files that have no class of their own
STAGES = sorted(path.stem for path in (ROOT / "stages").glob("*.yaml"))
OVERLAYS = sorted(str(path.relative_to(ROOT)) for folder in ("", "data/") for path in (ROOT / "lightning_config" / folder).glob("*.yaml"))
PAPER = sorted(path.stem for path in (ROOT / "stages" / "paper").glob("*.yaml"))


def build(*arguments: str):
    """The stage, DataModule and trainer of a command line, without running it."""
    return build_cli([*arguments, "--trainer.accelerator", "cpu"], run=False)


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_builds(stage):
    cli = build("-c", f"stages/{stage}.yaml")
    assert type(cli.model).__name__.lower() == CLASSES.get(stage, stage).lower().replace("_", "")
    assert cli.trainer.default_root_dir.endswith(f"runs/{stage}")


@pytest.mark.parametrize("overlay", [overlay for overlay in OVERLAYS if "default" not in overlay])
def test_every_overlay_goes_over_the_decoder(overlay, monkeypatch):
    if any(word in overlay for word in ("gpu", "ddp", "fsdp")):
        pytest.importorskip("torch.cuda")
        if not torch.cuda.is_available():
            text = (ROOT / overlay).read_text()
            import yaml

            assert set(yaml.safe_load(text)) == {"trainer"}
            return
    build("-c", "stages/decoder.yaml", "-c", overlay)


@pytest.mark.parametrize("clip", ["ViT-L-14", "ViT-H-14"])
def test_clip_overlays_agree_with_open_clip(clip):
    cli = build("-c", "stages/decoder.yaml", "-c", f"lightning_config/clip/{clip}.yaml")
    import open_clip

    config = open_clip.get_model_config(cli.datamodule.clip.config.model)
    assert cli.model.net_config.embed_dim == config["embed_dim"]
    assert cli.model.text_config.states_width == config["text_cfg"]["width"]


def test_every_paper_overlay_has_a_test_of_its_size():
    assert set(PAPER) == {"decoder", "ar_prior", "diffusion_prior", "upsampler_256", "upsampler_1024"}


def test_paper_ar_prior_has_the_papers_size():
    with torch.device("meta"):
        cli = build("-c", "stages/ar_prior.yaml", "-c", "lightning_config/clip/ViT-H-14.yaml", "-c", "stages/paper/ar_prior.yaml")
    size = lambda module: sum(parameter.numel() for parameter in module.parameters())
    net = cli.model.net
    assert abs(size(net.transformer) / (12 * 24 * 1664**2) - 1) < 0.01  # 0.80 B, which the paper's "1B" counts roughly
    assert abs(size(net.text.encoder.transformer) / (12 * 24 * 2048**2) - 1) < 0.01  # 1.21 B
    assert 2.0e9 < size(cli.model) < 2.2e9
    assert (net.config.heads, net.config.max_codes, net.config.buckets, net.length) == (26, 319, 1024, 256)
    optimizer = cli.model.optimizer_config
    assert (optimizer.lr, optimizer.betas, optimizer.eps, optimizer.weight_decay) == (1.6e-4, (0.9, 0.91), 1e-10, 0.04)
    assert cli.trainer.max_steps == 1_000_000 and cli.model.drop_text == 0.1


def test_paper_decoder_has_the_papers_size():
    with torch.device("meta"):
        cli = build("-c", "stages/decoder.yaml", "-c", "stages/paper/decoder.yaml")
    count = sum(parameter.numel() for parameter in cli.model.parameters())
    assert 3.4e9 < count < 3.6e9, f"{count / 1e9:.3f} B parameters, the paper has 3.5 B"
    assert cli.model.optimizer_config.lr == 1.2e-4 and cli.trainer.max_steps == 800_000
    assert cli.model.process.config.parametrization == "eps" and cli.model.process.config.schedule == "cosine"
    assert cli.model.sampling.sampler == "ddpm" and cli.model.sampling.steps == 250


def test_paper_diffusion_prior_has_the_papers_size():
    with torch.device("meta"):
        cli = build("-c", "stages/diffusion_prior.yaml", "-c", "stages/paper/diffusion_prior.yaml")
    blocks = sum(parameter.numel() for parameter in cli.model.net.transformer.parameters())
    count = sum(parameter.numel() for parameter in cli.model.parameters())
    assert 1.19e9 < blocks < 1.22e9, f"{blocks / 1e9:.3f} B parameters of the Transformer, 24 blocks of width 2048 have 1.21 B, the paper's \"1B\""
    assert count - blocks < 0.12e9  # token embedding, positions, projections
    optimizer = cli.model.optimizer_config
    assert (optimizer.lr, optimizer.betas, optimizer.eps, optimizer.weight_decay) == (1.1e-4, (0.9, 0.96), 1e-6, 6e-2)
    assert cli.trainer.max_steps == 600_000 and cli.datamodule.config.batch_size == 4096 and cli.model.text_dropout == 0.1
    assert cli.model.process.config.schedule == "cosine" and cli.model.process.config.parametrization == "x0"
    assert cli.model.sampling.sampler == "analytic" and cli.model.sampling.steps == 64 and cli.model.sampling.num_candidates == 2
    assert any(getattr(callback, "decay", None) == 0.9999 for callback in cli.trainer.callbacks)


@pytest.mark.parametrize(
    ("name", "low", "high", "net", "schedule", "rate", "batch"),
    [
        ("upsampler_256", 6.9e8, 7.5e8, (320, (1, 2, 3, 4), 3, 0.1), ("cosine", 27), 1.2e-4, 1024),
        ("upsampler_1024", 2.7e8, 3.2e8, (192, (1, 1, 2, 2, 4, 4), 2, 0.0), ("linear", 15), 1.0e-4, 512),
    ],
)
def test_paper_upsamplers_have_the_papers_size(name, low, high, net, schedule, rate, batch):
    with torch.device("meta"):
        cli = build("-c", f"stages/{name}.yaml", "-c", f"stages/paper/{name}.yaml")
    count = sum(parameter.numel() for parameter in cli.model.parameters())
    assert low < count < high, f"{count / 1e6:.0f} M parameters, the paper has 700 M and 300 M"
    config, optimizer = cli.model.net_config, cli.model.optimizer_config
    assert (config.width, config.mults, config.depth, config.dropout) == net and config.patch_size == 1
    assert config.attention == () and not config.middle_attention
    assert (cli.model.process.config.schedule, cli.model.sampling.steps) == schedule and cli.model.sampling.sampler == "ddim"
    assert cli.model.process.config.parametrization == "eps" and cli.model.residual == 0
    assert (optimizer.lr, optimizer.betas, optimizer.eps, optimizer.weight_decay) == (rate, (0.9, 0.999), 1e-8, 0.0)
    assert cli.trainer.max_steps == 1_000_000 and cli.datamodule.config.batch_size == batch
    assert cli.datamodule.crop * 4 == cli.datamodule.image_size == config.image_size  # crop fraction 0.25
    assert any(getattr(callback, "decay", None) == 0.9999 for callback in cli.trainer.callbacks)


@pytest.mark.parametrize("name", ["upsampler_256", "upsampler_1024"])
def test_shipped_upsamplers_fit_into_8_MB(name):
    cli = build("-c", f"stages/{name}.yaml")
    assert sum(parameter.numel() for parameter in cli.model.parameters()) < 4e6


def test_every_paper_overlay_goes_over_its_stage():
    assert set(PAPER) <= set(STAGES) and PAPER
    for name in PAPER:
        with torch.device("meta"):
            assert build("-c", f"stages/{name}.yaml", "-c", f"stages/paper/{name}.yaml").trainer.default_root_dir.endswith(f"runs/paper/{name}")


@pytest.mark.parametrize("clip", ["ViT-L-14", "ViT-H-14"])
def test_clip_overlays_go_over_the_diffusion_prior(clip):
    cli = build("-c", "stages/diffusion_prior.yaml", "-c", f"lightning_config/clip/{clip}.yaml", "--model.net.depth", "1", "--model.text.context_length", "77")
    import open_clip

    config = open_clip.get_model_config(cli.datamodule.clip.config.model)
    assert cli.model.net_config.embed_dim == config["embed_dim"] and cli.model.text_config.states_width == config["text_cfg"]["width"]


def test_decoder_on_text_embeddings_differs_from_the_decoder_in_its_condition_alone():
    image, text = (build("-c", f"stages/{name}.yaml") for name in ("decoder", "decoder_text"))
    assert dict(image.model.hparams) | {"condition": "text"} == dict(text.model.hparams)
    assert image.trainer.max_steps == text.trainer.max_steps and image.datamodule.config == text.datamodule.config


def test_files_merge_and_flags_win():
    cli = build("-c", "stages/decoder.yaml", "--model.optimizer.lr", "5e-4", "--ema.decay", "0.5")
    assert cli.model.optimizer_config.lr == 5e-4 and cli.model.optimizer_config.warmup_steps == 100
    assert cli.model.net_config.width == 96
    assert any(getattr(callback, "decay", None) == 0.5 for callback in cli.trainer.callbacks)


@pytest.mark.parametrize(
    ("flag", "near"),
    [("--model.net.widht=64", "width"), ("--trainer.max_stesp=3", "max_steps"), ("--data.loader.bach_size=3", "batch_size"), ("--emma.decay=0.9", "ema"),
     ("--trainer.max_step=3", "max_steps"), ("--trainer.accel=cpu", "accelerator"), ("--seed_everythin=3", "seed_everything")],
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
        (["--resume"], "auto"), (["--resume", "auto"], "auto"), (["--resume", "a.ckpt"], "a.ckpt"), (["--resume=a=b.ckpt"], "a=b.ckpt"),
        (["--resume="], "auto"), (["--resume", "--trainer.max_steps", "3"], "auto"), (["--resume", "-c", "x.yaml"], "auto"),
        (["--resume=auto", "--ema.decay", "0"], "auto"),
    ],
)  # fmt: skip
def test_resume_takes_a_file_or_auto_and_no_flag(given, value):
    flags = [word for word in given if not word.startswith("--resume") and word != value]
    assert resume(["fit", *given]) == ["fit", *flags, "--ckpt_path", f"resume:{value}"]


@pytest.mark.parametrize("given", [["-c", "stages/decoder.yaml"], ["--config", "stages/decoder.yaml"], ["--config=stages/decoder.yaml"]])
def test_every_way_to_name_a_configuration_finds_the_shipped(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = find_configs(["fit", *given, "--ema.decay=0.5", "-c"])
    assert found[0] == "fit" and found[-2:] == ["--ema.decay=0.5", "-c"] and found[1].partition("=")[0] == given[0].partition("=")[0]
    assert Path(found[-3].rpartition("=")[2]).is_file()


def test_a_command_says_nothing_of_lightnings_ways(tmp_path):
    command = [sys.executable, "-W", "default", "-m", "unclip_pl", "fit", "-c", "stages/decoder.yaml", "--model.optimizer.lr=fast"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stderr
    assert "lr" in said and "args parameter" not in said


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
    assert sentence('Parser key "lr":\n  Expected a float. Got value: fast') == 'Parser key "lr": Expected a float. Got value: fast'


def test_impossible_value_is_one_sentence(capsys):
    assert main(["fit", "-c", "stages/decoder.yaml", "--model.optimizer.lr=fast"]) == 1
    error = capsys.readouterr().err.strip()
    assert "lr" in error and "\n" not in error


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("--model.sampling.guidance_scale=0.5", "guidance_scale is 0.5: give 1"), ("--model.sampling.steps=0", "in 0 steps"),
        ("--model.text_dropout=2", "text_dropout is 2.0"), ("--data.loader.batch_size=0", "batch_size of at least 1"),
    ],
)
def test_setting_that_a_class_refuses_is_its_sentence(flag, said, capsys):
    assert main(["fit", "-c", "stages/diffusion_prior.yaml", flag]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("lightning: ") and said in error and "Given value" not in error
