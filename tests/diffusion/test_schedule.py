"""Schedules: values of the IDDPM formulas, the posterior by Bayes' rule, respacing."""

import numpy as np
import pytest
import torch

from tests.oracles import diffusion as oracle
from unclip_pl.diffusion.schedule import Schedule, check_spacing, cosine_betas, linear_betas


def test_cosine_has_the_known_values():
    schedule = Schedule.named("cosine", 1000)
    betas, abar = cosine_betas(1000), schedule.alphas_cumprod
    assert betas[0].item() == pytest.approx(4.1284e-5, rel=1e-4)
    assert abar[0].item() == pytest.approx(0.9999587, abs=1e-7)
    assert abar[499].item() == pytest.approx(0.493844, abs=1e-6)
    assert betas[999].item() == 0.999 and (betas == 0.999).sum() == 1
    assert abar[999].item() == pytest.approx(2.4288e-9, rel=1e-4)


def test_linear_has_the_known_values():
    abar = Schedule.named("linear", 1000).alphas_cumprod
    assert abar[499].item() == pytest.approx(0.0785873, abs=1e-7)
    assert abar[999].item() == pytest.approx(4.03583e-5, rel=1e-5)


@pytest.mark.parametrize(
    "name, ours, theirs",
    [("cosine", cosine_betas, oracle.cosine_betas), ("linear", linear_betas, oracle.linear_betas)],
)
@pytest.mark.parametrize("T", [50, 1000])
def test_tables_agree_with_the_oracle(name, ours, theirs, T):
    np.testing.assert_allclose(ours(T).numpy(), theirs(T), rtol=1e-12)
    schedule = Schedule.named(name, T)
    abar = oracle.products(theirs(T))
    np.testing.assert_allclose(schedule.alphas_cumprod.numpy(), abar, rtol=1e-12)
    np.testing.assert_allclose(schedule.betas.numpy(), theirs(T), rtol=1e-9)
    variances = [
        oracle.posterior(abar[t], abar[t - 1] if t else 1.0, 0.0, 0.0)[1] for t in range(T)
    ]
    np.testing.assert_allclose(
        schedule.posterior_variance.numpy(), variances, rtol=1e-8, atol=1e-18
    )
    np.testing.assert_allclose(
        schedule.posterior_log_variance.numpy()[1:], np.log(variances[1:]), rtol=1e-8
    )
    assert schedule.posterior_log_variance[0] == schedule.posterior_log_variance[1]
    for table in (
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "betas",
        "posterior_variance",
        "posterior_log_variance",
    ):
        assert getattr(schedule, table).dtype == torch.float64
        assert len(getattr(schedule, table)) == T


@pytest.mark.parametrize("steps", [1, 2, 27, 64, 1000])
def test_posterior_weights_are_those_of_bayes_rule_after_respacing(steps):
    schedule = Schedule.named("cosine").respaced(steps)
    abar, before = schedule.alphas_cumprod.tolist(), schedule.alphas_cumprod_prev.tolist()
    for i in range(steps):
        mean, _ = oracle.posterior(abar[i], before[i], 0.7, -1.3)
        ours = schedule.posterior_x0_weight[i] * 0.7 + schedule.posterior_xt_weight[i] * -1.3
        assert ours.item() == pytest.approx(mean, rel=1e-8)


@pytest.mark.parametrize(
    "spec, first, last, length",
    [
        (64, [0, 16, 32], [983, 999], 64),
        (250, [0, 4, 8], [995, 999], 250),
        (27, [0, 38, 77], [961, 999], 27),
        (15, [0, 71, 143], [928, 999], 15),
        ("15", [0, 71, 143], [928, 999], 15),
        ("ddim27", [0, 38, 76], [950, 988], 27),
        ("ddim15", [0, 67, 134], [871, 938], 15),
        ("ddim250", [0, 4, 8], [992, 996], 250),
        (1, [999], [999], 1),
        ([2, 3], [0, 499, 500], [750, 999], 5),
        ((2, 3), [0, 499, 500], [750, 999], 5),
        ((10, 10, 3, 2, 2), [0, 22, 44], [800, 999], 27),
        ("fast27", [0, 22, 44], [800, 997], 27),
    ],
)
def test_respacing_has_the_known_timesteps(spec, first, last, length):
    timesteps = Schedule.named("cosine").respaced(spec).timesteps.tolist()
    assert timesteps[: len(first)] == first
    assert timesteps[-len(last) :] == last
    assert len(timesteps) == length


def test_fast27_visits_the_timesteps_of_glide():
    """Those that `space_timesteps(1000, "fast27")` of GLIDE gives."""
    first = [0, 22, 44, 66, 88, 111, 133, 155, 177, 199]
    expected = [*first, *(200 + t for t in first), 400, 500, 599, 600, 799, 800, 997]
    assert Schedule.named("linear").respaced("fast27").timesteps.tolist() == expected


@pytest.mark.parametrize("steps", [2, 5, 27, 50, 64, 100, 250, 500, 1000])
def test_even_spacing_is_the_summed_stride_of_iddpm(steps):
    assert Schedule.named("linear").respaced(steps).timesteps.tolist() == oracle.strided(
        1000, steps
    )


def test_respacing_keeps_abar_and_makes_betas_of_the_longer_steps():
    full = Schedule.named("cosine")
    short = full.respaced(64)
    assert torch.equal(short.alphas_cumprod, full.alphas_cumprod[short.timesteps])
    torch.testing.assert_close(
        torch.cumprod(1 - short.betas, 0), short.alphas_cumprod, rtol=1e-6, atol=0
    )
    assert torch.equal(full.respaced(1000).betas, full.betas)


def test_respacing_twice_still_names_original_timesteps():
    assert Schedule.named("cosine").respaced("ddim250").at((0, 1, 249)).timesteps.tolist() == [
        0,
        4,
        996,
    ]


@pytest.mark.parametrize("spec", [0, 1001, "ddim64", "often", [600, 600], [], (), (-1, 3)])
def test_an_impossible_spacing_is_a_sentence(spec):
    with pytest.raises(ValueError, match=r"\w+ \w+ \w+"):
        Schedule.named("cosine").respaced(spec)


def test_fast27_of_a_schedule_that_is_too_short_is_a_sentence():
    with pytest.raises(ValueError, match="section 0"):
        Schedule.named("cosine", 40).respaced("fast27")


@pytest.mark.parametrize("positions", [(), (5, 3), (3, 3), (-1, 3), (0, 1000)])
def test_impossible_positions_are_a_sentence(positions):
    with pytest.raises(ValueError, match="rise"):
        Schedule.named("cosine").at(positions)


@pytest.mark.parametrize("spec", [1, 27, "250", "ddim27", "fast27", [10, 10, 3], (2, 3)])
def test_spacings_are_known_for_what_they_are(spec):
    check_spacing(spec, "The decoder")


WRONG = [0, -3, True, 2.5, None, "", "0", "fast28", "27 steps", "ddim", [], [0, 3], [1.5], [[3]]]


@pytest.mark.parametrize("spec", WRONG)
def test_what_is_no_spacing_is_one_sentence(spec):
    with pytest.raises(ValueError, match=r"^The decoder cannot sample in .* steps: give [^\n]*\.$"):
        check_spacing(spec, "The decoder")


def test_an_impossible_schedule_is_a_sentence():
    with pytest.raises(ValueError, match="choose one of cosine, linear"):
        Schedule.named("quadratic")
    with pytest.raises(ValueError, match="at least 21"):
        linear_betas(20)


def test_tables_are_on_the_cpu_inside_a_meta_context():
    with torch.device("meta"):
        schedule = Schedule.named("cosine", 100).respaced(10)
        assert schedule.betas.device.type == schedule.posterior_log_variance.device.type == "cpu"
