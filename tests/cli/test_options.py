"""Options of sampling are the fields of the stages' settings, which also check their values."""

from dataclasses import fields
from typing import Any, get_args, get_type_hints

import pytest
import yaml

from tests.cli.shell import error_of, run_unclip
from unclip_pl.cli import unclip
from unclip_pl.diffusion.samplers import SAMPLERS
from unclip_pl.stages import ar_prior, decoder, diffusion_prior, upsampler
from unclip_pl.utils.commands import CommandParser

VALUES = {
    "sampler": "ddim",
    "steps": 3,
    "guidance_scale": 2.0,
    "eta": 0.5,
    "temperature": 0.5,
    "top_p": 0.5,
}


def options_of_generate(*words: str) -> Any:
    """The values of the options, by their names with underscores."""
    parser = CommandParser(unclip.COMMANDS["generate"], "unclip generate")
    return parser.parse_args(["fox", *words])


def types_of(annotation: object) -> set[object]:
    """The types of a field: its own, those of a Union, or those of a Literal's values."""
    members = get_args(annotation) or (annotation,)
    return {member if isinstance(member, type) else type(member) for member in members}


@pytest.mark.parametrize(
    ("prefix", "settings"),
    [
        ("", [decoder.DecoderSamplingConfig]),
        ("prior_", [diffusion_prior.PriorSamplingConfig, ar_prior.ARPriorSamplingConfig]),
        ("upsampler_", [upsampler.UpsamplingConfig]),
    ],
)
def test_every_option_is_a_field_with_its_type(prefix, settings):
    names = [name for name in VALUES if prefix + name in options_of_generate()]
    assert "steps" in names
    for name in names:
        option = f"--{prefix}{name}".replace("_", "-")
        value = options_of_generate(option, str(VALUES[name]))[prefix + name]
        owners = [kind for kind in settings if name in {field.name for field in fields(kind)}]
        assert owners, option
        for kind in owners:
            assert getattr(kind(**{name: value}), name) == VALUES[name]
            assert type(value) in types_of(get_type_hints(kind)[name])


def test_samplers_of_the_options_are_those_that_there_are():
    for sampler in SAMPLERS:
        assert options_of_generate("--sampler", sampler).sampler == sampler
        assert options_of_generate("--prior-sampler", sampler).prior_sampler == sampler
    assert options_of_generate("--prior-sampler", "analytic").prior_sampler == "analytic"


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("generate fox --num-imags 3", ["num-imags", "num-images"]),
        ("generate fox --num-images 0", ["--num-images", "0 is too small"]),
        ("generate fox --num-images x", ["--num-images", "x is no whole number"]),
        ("generate fox --eta much", ["--eta is much", "a number"]),
        ("generate fox --condition image", ["--condition is image", "prior, text, caption"]),
        ("generate fox --gri", ["grid"]),
        (
            "generate fox --prior-guidance-scale inf",
            ["--prior-guidance-scale is inf", "a finite number"],
        ),
        ("vary", ["Missing", "images"]),
        ("inpaint a.png", ["Missing: --mask"]),
        ("generate fox --num-images null", ["--num-images is null"]),
        ("interpolate a.png b.png --sampling-steps 5", ["now called --steps"]),
        ("data verif store", ["data verify"]),
        ("draw fox", ["draw"]),
    ],
)
def test_words_that_do_not_fit_are_one_sentence(command, words, capsys):
    assert run_unclip(command) == 2
    error = error_of(capsys)
    assert all(word in error for word in words), error


def test_options_of_a_command_may_be_a_file(tmp_path, capsys):
    parser = CommandParser(unclip.COMMANDS["generate"], "unclip generate")
    words = ["--prior-steps", "10,5", "--size", "256", "--num-images", "2"]
    with pytest.raises(SystemExit):
        parser.parse_args([*words, "--print_config"])
    file = tmp_path / "drawing.yaml"
    file.write_text(capsys.readouterr().out + "prompts: [fox, cat]\n", encoding="utf-8")
    assert yaml.safe_load(file.read_text(encoding="utf-8"))["prior_steps"] == [10, 5]
    bound = unclip.bind(["generate", "--config", str(file), "--num-images", "3"])
    assert bound.args == (("fox", "cat"),)
    assert bound.keywords["num_images"] == 3
    assert bound.keywords["prior_sampling"].steps == (10, 5)
    assert bound.keywords["upsamplers"].size == 256


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("num_images: null", ["--num-images is null"]),
        ("size: null", ["--size is null"]),
        ("out: null", ["--out is null"]),
        ("grid: 3", ["--grid is 3", "true or false"]),
        ("seed: 1.7", ["1.7 is no whole number"]),
        ("prompts: a cat", ["list", "[a, b]"]),
        ("num_imags: 3", ["num-images"]),
        ("", ["--config holds no options"]),
        (b"prompts: [f\xfcchs]", ["not UTF-8"]),
    ],
)
def test_a_file_of_options_that_do_not_fit_is_one_sentence(text, words, tmp_path, capsys):
    file = tmp_path / "drawing.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert run_unclip(f"generate fox --config {file}") == 2
    error = error_of(capsys)
    assert all(word in error for word in words), error


@pytest.mark.parametrize("order", ["fox --seed 3 --config {}", "--config={} fox --seed 3"])
def test_what_is_said_next_to_a_file_of_options_wins(order, tmp_path):
    file = tmp_path / "drawing.yaml"
    file.write_text("prompts: [cat]\nseed: 5\nnum_images: 2\n", encoding="utf-8")
    bound = unclip.bind(["generate", *order.format(file).split()])
    assert bound.args == (("fox",),)
    assert bound.keywords["num_images"] == 2 and bound.keywords["seed"] == 3


def test_every_option_of_every_command_has_a_help_text():
    for name, command in unclip.COMMANDS.items():
        for action in CommandParser(command, name)._actions:
            assert action.help, (name, action.dest)


def test_a_compilation_on_a_cpu_is_announced(capsys):
    words = ["generate", "fox", "--device", "cpu"]
    for more, expected in (([], False), (["--compile"], True)):
        options = unclip.bind([*words, *more]).keywords["compute"].kwargs()
        assert options["compile"] is expected
        assert ("--compile" in capsys.readouterr().err) is expected
