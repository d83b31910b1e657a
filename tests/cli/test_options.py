"""Options of sampling are the fields of the stages' settings, which also check their values."""

import argparse
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest

from unclip_pl.cli import unclip
from unclip_pl.diffusion.samplers import SAMPLERS
from unclip_pl.stages import ar_prior, decoder, diffusion_prior, upsampler
from unclip_pl.utils.options import SAMPLING_OPTIONS

VALUES = {
    "sampler": "ddim",
    "steps": 3,
    "guidance_scale": 2.0,
    "eta": 0.5,
    "temperature": 0.5,
    "top_p": 0.5,
}


def parse_generate(*options: str) -> argparse.Namespace:
    return unclip.parser().parse_args(["generate", "fox", *options])


def types_of(annotation: object) -> set[object]:
    """The types of a field: its own, those of a Union, or those of a Literal's values."""
    members = get_args(annotation) or (annotation,)
    return {member if isinstance(member, type) else type(member) for member in members}


@pytest.mark.parametrize(
    ("prefix", "settings"),
    [
        ("", [decoder.DecoderSamplingConfig]),
        ("prior-", [diffusion_prior.PriorSamplingConfig, ar_prior.ARPriorSamplingConfig]),
        ("upsampler-", [upsampler.UpsamplingConfig]),
    ],
)
def test_every_option_is_a_field_with_its_type(prefix, settings):
    arguments = vars(parse_generate())
    names = [name for name in SAMPLING_OPTIONS if f"{prefix}{name}".replace("-", "_") in arguments]
    assert "steps" in names
    for name in names:
        option = f"--{prefix}{name}".replace("_", "-")
        parsed = parse_generate(option, str(VALUES[name]))
        value = getattr(parsed, option.removeprefix("--").replace("-", "_"))
        owners = [kind for kind in settings if name in {field.name for field in fields(kind)}]
        assert owners, option
        for kind in owners:
            assert getattr(kind(**{name: value}), name) == VALUES[name]
            assert type(value) in types_of(get_type_hints(kind)[name])


def test_samplers_of_the_options_are_those_that_there_are():
    for sampler in SAMPLERS:
        assert parse_generate("--sampler", sampler).sampler == sampler
        assert parse_generate("--prior-sampler", sampler).prior_sampler == sampler
    assert parse_generate("--prior-sampler", "analytic").prior_sampler == "analytic"
