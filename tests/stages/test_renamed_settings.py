"""Settings that were renamed: weights saved under the old names load, configurations with them are
refused by a sentence that has the new name."""

import json

import pytest
import torch

from tests.factories import tiny_stage
from unclip_pl.cli.config_checks import check_configs
from unclip_pl.cli.lightning import main
from unclip_pl.networks.renamed import SETTINGS, rename_settings
from unclip_pl.pipeline import release
from unclip_pl.pipeline.release import Release
from unclip_pl.pipeline.weights import load_pretrained, load_stage
from unclip_pl.stages.base import Stage
from unclip_pl.stages.settings import settings_of
from unclip_pl.utils.errors import UserError

RENAMED = [
    ("decoder", "dropout", "cond_dropout"),
    ("diffusion_prior", "text_dropout", "cond_dropout"),
    ("ar_prior", "drop_text", "cond_dropout"),
    ("upsampler", "residual", "residual_std"),
]
FILES = {"upsampler": "upsampler_256"}


def old_hyper_parameters(stage: Stage, old: str, new: str) -> dict:
    """A stage's settings as they were saved before the new name."""
    return {old if key == new else key: value for key, value in stage.hparams.items()}


def test_every_renamed_setting_is_tested_here():
    assert {(old, new) for _, old, new in RENAMED} == set(SETTINGS.items())


@pytest.mark.parametrize(("name", "old", "new"), RENAMED)
def test_names_of_today_stay(name, old, new):
    stage = tiny_stage(name)
    assert new in stage.hparams and old not in stage.hparams
    assert rename_settings(stage.hparams) == dict(stage.hparams)


@pytest.mark.parametrize(("name", "old", "new"), RENAMED)
@pytest.mark.parametrize("kind", ["release", "checkpoint"])
def test_weights_with_an_old_setting_load(name, old, new, kind, tmp_path):
    stage = tiny_stage(name)
    values = {"cond_dropout": 0.3, "residual_std": 0.0}
    if name == "decoder":
        values["cond_dropout"] = {"embed": 0.3, "text": 0.4, "null_embed": "learned"}
    hyper_parameters = old_hyper_parameters(stage, old, new) | {old: values[new]}
    class_name, path = type(stage).__name__, tmp_path / "old"
    if kind == "release":
        state = stage.state_dict()
        content = Release(class_name, hyper_parameters, None, state)
        release.write(path, content, "card", exact=state)
        assert old in json.loads((path / "config.json").read_text())["hyper_parameters"]
    else:
        checkpoint = {"stage": class_name, "hyper_parameters": hyper_parameters, "global_step": 3}
        checkpoint |= {"state_dict": stage.state_dict(), "pytorch-lightning_version": "2.6.0"}
        torch.save(checkpoint, path)
    loaded = load_stage(path, type(stage))
    assert loaded.hparams[new] == values[new]
    load_pretrained(tiny_stage(name), path)  # trains on from it


@pytest.mark.parametrize(("name", "old", "new"), RENAMED)
def test_a_run_goes_on_from_a_checkpoint_with_an_old_setting(name, old, new):
    stage = tiny_stage(name)
    hyper_parameters = old_hyper_parameters(stage, old, new)
    assert settings_of(type(stage), hyper_parameters) == dict(stage.hparams)
    tiny_stage(name).on_load_checkpoint(
        {"stage": stage.stage_name, "hyper_parameters": hyper_parameters}
    )


def test_an_upsampler_of_another_residual_std_is_still_refused():
    stage = tiny_stage("upsampler")
    hyper_parameters = old_hyper_parameters(stage, "residual", "residual_std") | {"residual": 0.2}
    with pytest.raises(UserError, match=r"model\.residual_std 0\.2"):
        tiny_stage("upsampler").on_load_checkpoint(
            {"stage": stage.stage_name, "hyper_parameters": hyper_parameters}
        )


@pytest.mark.parametrize(("name", "old", "new"), RENAMED)
@pytest.mark.parametrize("where", ["init_args", "model"])
def test_an_old_name_in_a_yaml_gets_the_new_one(name, old, new, where, tmp_path, capsys):
    overlay = tmp_path / "mine.yaml"
    setting = f"{{{old}: 0.2}}"
    nested = f"{{init_args: {setting}}}" if where == "init_args" else setting
    overlay.write_text(f"model: {nested}\n")
    stage = f"stages/{FILES.get(name, name)}.yaml"
    assert main(["fit", "-c", stage, "-c", str(overlay)]) == 1
    error = capsys.readouterr().err.strip()
    assert "mine.yaml" in error and f"model.{new}" in error and "\n" not in error


@pytest.mark.parametrize(("name", "old", "new"), RENAMED)
@pytest.mark.parametrize("flag", ["--model.{}=0.2", "--model.init_args.{}.text=0.2"])
def test_an_old_name_on_the_command_line_gets_the_new_one(name, old, new, flag, capsys):
    assert main(["fit", "-c", f"stages/{FILES.get(name, name)}.yaml", flag.format(old)]) == 1
    error = capsys.readouterr().err.strip()
    assert f"--model.{new}" in error and "\n" not in error


@pytest.mark.parametrize(
    "files",
    [
        ["stages/decoder_text.yaml"],
        ["stages/paper/decoder.yaml", "stages/decoder.yaml"],
        ["lightning_config/gpu.yaml"],
        ["lightning_config/gpu.yaml", "stages/decoder_text.yaml"],
    ],
)
def test_an_overlay_without_a_stage_before_it_is_one_sentence(files, capsys):
    assert main(["fit", *(word for file in files for word in ("-c", file))]) == 1
    error = capsys.readouterr().err.strip()
    assert "overlay" in error and "stages/decoder.yaml" in error and "\n" not in error


@pytest.mark.parametrize(
    "words",
    [
        ["-c", "lightning_config/gpu.yaml", "-c", "stages/decoder.yaml"],
        ["--model", "Decoder", "-c", "stages/decoder_text.yaml"],
        ["--model=Decoder", "--config=stages/decoder_text.yaml"],
        [
            "--model.net.dropout",
            "0.1",
            "-c",
            "stages/decoder.yaml",
            "-c",
            "lightning_config/gpu.yaml",
        ],
    ],
)
def test_what_names_a_stage_passes(words):
    check_configs(["fit", *words])
