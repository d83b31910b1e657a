"""Options that `unclip` and `eval` share, and what they make of a stage's sampling settings."""

import pytest

from tests.factories import tiny_stage
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.options import override_sampling, positive_int, seed, spacing


def test_options_replace_the_settings_of_a_stage_and_nothing_else():
    decoder = tiny_stage("decoder")
    options = {"steps": 3, "guidance_scale": None, "prior_steps": 5, "out": "elsewhere"}
    sampling = override_sampling(decoder, options)
    assert sampling.steps == 3
    assert sampling.guidance_scale == decoder.sampling.guidance_scale
    assert override_sampling(decoder, {}) == decoder.sampling


def test_a_prefix_chooses_the_options():
    prior = tiny_stage("diffusion_prior")
    sampling = override_sampling(prior, {"steps": 3, "prior_steps": 5}, "prior_")
    assert sampling.steps == 5


@pytest.mark.parametrize(
    ("stage", "options", "keyword"),
    [
        ("decoder", {"prior_temperature": 0.5}, "--prior-temperature"),
        ("decoder", {"prior_steps": 5000}, "--prior-steps"),
        ("decoder", {"prior_sampler": "ddpm", "prior_eta": 0.5}, "--prior-eta"),
        ("decoder", {"prior_eta": 2.0}, "eta"),
        ("decoder", {"prior_guidance_scale": 0.5}, "--prior-guidance-scale"),
        ("decoder", {"prior_sampler": "euler"}, "euler"),
        ("ar_prior", {"prior_steps": 5}, "--prior-steps"),
        ("ar_prior", {"prior_top_p": 2.0}, "--prior-top-p"),
    ],
)
def test_what_a_stage_cannot_do_is_refused(stage, options, keyword):
    with pytest.raises(UserError, match=keyword):
        override_sampling(tiny_stage(stage), options, "prior_")


@pytest.mark.parametrize(
    ("kind", "text"), [(positive_int, "0"), (seed, "-1"), (seed, str(1 << 62))]
)
def test_numbers_out_of_range_are_refused(kind, text):
    with pytest.raises(ValueError, match=text):
        kind(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [("25", 25), ("10,5", (10, 5)), ("[10,5]", (10, 5)), ("fast27", "fast27"), ((10, 5), (10, 5))],
)
def test_steps_are_a_number_several_or_a_name(text, value):
    assert spacing(text) == value
