"""Process: parametrisations, learned variance, tables that survive casts."""

import copy

import numpy as np
import pytest
import torch

from tests.oracles import diffusion as oracle
from unclip_pl.diffusion.process import DiffusionConfig, Process

KINDS = ["eps", "x0", "v"]
SHAPES = [(6, 3, 4, 4), (6, 8)]
T_VALUES = [0, 1, 250, 500, 900, 998]


def draw(shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.rand(shape, generator=g) * 2 - 1,
        torch.randn(shape, generator=g),
        torch.tensor(T_VALUES),
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_parametrisation_agrees_with_the_oracle(kind, shape):
    process = Process(DiffusionConfig(parametrization=kind, variance="fixed_small"))
    x0, noise, t = draw(shape)
    x_t, target = process.diffuse(x0, t, noise), process.target(x0, t, noise)
    output = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    abar = oracle.products(oracle.cosine_betas(1000))
    for b, time in enumerate(T_VALUES):
        np.testing.assert_allclose(
            x_t[b],
            oracle.diffuse(abar[time], x0[b].double().numpy(), noise[b].double().numpy()),
            atol=1e-6,
        )
        np.testing.assert_allclose(
            target[b],
            oracle.target(kind, abar[time], x0[b].double().numpy(), noise[b].double().numpy()),
            atol=1e-6,
        )
        clean, eps = oracle.x0_and_eps(
            kind, abar[time], output[b].double().numpy(), x_t[b].double().numpy()
        )
        np.testing.assert_allclose(process.to_x0(output, x_t, t)[b], clean, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(process.to_eps(output, x_t, t)[b], eps, rtol=1e-4, atol=1e-5)
        mean, _ = oracle.posterior(
            abar[time],
            abar[time - 1] if time else 1.0,
            x0[b].double().numpy(),
            x_t[b].double().numpy(),
        )
        weight_xt = process.schedule.posterior_xt_weight[time].float()
        ours = process.posterior_x0_weight[time] * x0[b] + weight_xt * x_t[b]
        np.testing.assert_allclose(ours, mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_as_output_gives_x0_and_noise_back(kind):
    process = Process(DiffusionConfig(parametrization=kind, variance="fixed_small"))
    x0, noise, t = draw((6, 3, 4, 4))
    prediction = process.adapt(lambda x, t: process.target(x0, t, noise))(
        process.diffuse(x0, t, noise), t
    )
    torch.testing.assert_close(prediction.x0, x0, atol=1e-3, rtol=0)
    torch.testing.assert_close(
        prediction.eps, noise, atol=5e-4, rtol=0
    )  # x0 -> eps divides by sigma_0 = 0.0064


@pytest.mark.parametrize("steps", [None, 27])
def test_learned_variance_spans_btilde_to_beta_of_the_steps(steps):
    process = Process(DiffusionConfig())
    schedule = process.schedule if steps is None else process.schedule.respaced(steps)
    position = torch.tensor([0, 1, 13, 26])
    t = schedule.timesteps[position]
    x = torch.zeros(4, 3, 2, 2)
    for v, expected in ((-1.0, schedule.posterior_log_variance), (1.0, schedule.betas.log())):
        output = torch.cat([x, torch.full_like(x, v)], 1)
        log_var = process.adapt(lambda x, t, output=output: output, schedule)(x, t).log_var
        torch.testing.assert_close(
            log_var[:, 0, 0, 0].double(), expected[position], rtol=1e-5, atol=1e-5
        )
    fixed = (
        Process(DiffusionConfig(variance="fixed_large"))
        .adapt(lambda x, t: x, schedule)(x, t)
        .log_var
    )
    torch.testing.assert_close(fixed, log_var[:, :1, :1, :1])


def test_a_variance_asked_outside_of_the_steps_is_nan():
    process = Process(DiffusionConfig(variance="fixed_small"))
    predict = process.adapt(lambda x, t: x, process.schedule.respaced(27))
    assert predict(torch.zeros(1, 2), torch.tensor([5])).log_var.isnan().all()
    assert predict(torch.zeros(1, 2), torch.tensor([38])).log_var.isfinite().all()


def test_steps_of_another_process_are_refused():
    process = Process(DiffusionConfig())
    with pytest.raises(ValueError, match="process.schedule.respaced"):
        process.adapt(
            lambda x, t: x, Process(DiffusionConfig(schedule="linear")).schedule.respaced(10)
        )


@pytest.mark.parametrize("bound", [2.0, 1.0])
def test_variance_is_bounded_and_can_come_back(bound):
    process = Process(DiffusionConfig(variance_bound=bound))
    t = torch.full((4,), 300)
    v = torch.tensor([[-50.0], [50.0], [float("inf")], [0.3]], requires_grad=True)
    log_var = process.log_variance(v, t, 2)
    edges = process.log_variance(torch.tensor([[-bound], [bound]]), t[:2], 2)
    torch.testing.assert_close(log_var[:3], edges[[0, 1, 1]])
    (toward_larger,) = torch.autograd.grad(-log_var.sum(), v, retain_graph=True)
    (toward_smaller,) = torch.autograd.grad(log_var.sum(), v)
    assert [g != 0 for g in toward_larger.flatten().tolist()] == [True, False, False, True]
    assert [g != 0 for g in toward_smaller.flatten().tolist()] == [False, True, True, True]


def test_without_a_bound_the_variance_of_any_v_is_that_of_the_formula():
    """Weights that were trained without one, such as Karlo's, give |v| > 2 and sample with it."""
    process = Process(DiffusionConfig(variance_bound=None))
    low, high = process.schedule.posterior_log_variance[300], process.schedule.betas[300].log()
    v = torch.tensor([[-7.0], [-2.5], [0.3], [2.5], [7.0]], requires_grad=True)
    log_var = process.log_variance(v, torch.full((5,), 300), 2)
    expected = (v.double() + 1) / 2 * high + (1 - v.double()) / 2 * low
    torch.testing.assert_close(log_var.double(), expected, rtol=1e-5, atol=0)
    predict = process.adapt(lambda x, t: torch.cat([x, v.detach()], 1))
    seen = predict(torch.zeros(5, 1), torch.full((5,), 300)).log_var
    torch.testing.assert_close(seen, log_var.detach())
    (gradient,) = torch.autograd.grad(log_var.sum(), v)
    assert gradient.unique().numel() == 1 and gradient[0] != 0


@pytest.mark.parametrize("bound", [0.5, -2.0, float("nan")])
def test_a_bound_that_cuts_between_beta_and_btilde_is_refused(bound):
    with pytest.raises(ValueError, match="variance_bound is .*: give 1"):
        DiffusionConfig(variance_bound=bound)


def test_tables_stay_float32_and_right_under_casts_and_meta():
    reference = Process(DiffusionConfig())
    assert not reference.state_dict()
    with torch.device("meta"):
        built_on_meta = Process(DiffusionConfig())
    for process in (
        copy.deepcopy(reference).half(),
        copy.deepcopy(reference).to(torch.bfloat16),
        built_on_meta.to_empty(device="cpu"),
    ):
        for (name, ours), (_, right) in zip(
            process.named_buffers(), reference.named_buffers(), strict=True
        ):
            assert ours.dtype == torch.float32 and torch.equal(ours, right), name


def test_predictions_are_float32_for_a_bfloat16_network():
    process = Process(DiffusionConfig())
    predict = process.adapt(lambda x, t: torch.cat([x, x], 1).bfloat16())
    assert {p.dtype for p in predict(torch.zeros(2, 3, 4, 4), torch.tensor([3, 7]))} == {
        torch.float32
    }


@pytest.mark.parametrize("field", ["schedule", "parametrization", "variance"])
def test_a_wrong_word_in_the_config_is_a_sentence(field):
    with pytest.raises(ValueError, match="choose one of"):
        DiffusionConfig(**{field: "other"})


def test_missing_variance_channels_are_named():
    process = Process(DiffusionConfig())
    assert process.out_channels(3) == 6
    with pytest.raises(ValueError, match=r"process.out_channels\(3\)"):
        process.adapt(lambda x, t: x)(torch.zeros(2, 3, 4, 4), torch.tensor([0, 1]))
