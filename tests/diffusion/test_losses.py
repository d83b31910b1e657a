"""Losses: values against the oracle, who learns from what, extremes."""

import math

import pytest
import torch

from tests.oracles import diffusion as oracle
from unclip_pl.diffusion.losses import discretised_nll, gaussian_kl, training_losses
from unclip_pl.diffusion.process import DiffusionConfig, Process

T_VALUES = [0, 1, 200, 500, 950, 999]


def case(parametrization="eps", schedule="cosine", seed=0, times=T_VALUES):
    process = Process(DiffusionConfig(parametrization=parametrization, schedule=schedule))
    g = torch.Generator().manual_seed(seed)
    x0 = torch.randint(0, 256, (len(times), 2, 2, 2), generator=g) / 127.5 - 1
    noise, t = torch.randn(x0.shape, generator=g), torch.tensor(times)
    x_t = process.diffuse(x0, t, noise)
    mean = process.target(x0, t, noise) + 0.1 * torch.randn(x0.shape, generator=g)
    v = torch.randn(x0.shape, generator=g) * 0.8
    return process, x0, x_t, t, noise, torch.cat([mean, v], 1)


def test_kl_is_the_integral():
    for gap, var1, var2 in ((0.3, 0.2, 0.5), (0.0, 1e-3, 2e-3), (-0.05, 1e-3, 5e-4)):
        ours = gaussian_kl(*torch.tensor([gap, math.log(var1), math.log(var2)])).item()
        expected = oracle.kl_by_integration(0.0, var1, gap, var2)
        assert ours == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_discretised_nll_is_the_mass_of_the_bin():
    for x in (-1.0, -0.5, 3 / 255, 1.0):
        for mean in (x, x + 0.02, -0.9, 0.4):
            for log_var in (-9.0, -4.0, 0.0):
                exact = oracle.discretised_nll(x, mean, log_var)
                ours = discretised_nll(*torch.tensor([x, mean, log_var])).item()
                if exact < 8:  # further out the tanh approximation of the cdf is not the cdf
                    assert ours == pytest.approx(exact, rel=0.02, abs=0.003), (x, mean, log_var)
                else:
                    assert ours > 5


def test_the_bins_of_a_narrow_and_a_wide_gaussian_sum_to_one():
    levels = torch.arange(256, dtype=torch.float64) / 127.5 - 1
    for mean, log_var in ((0.1, -8.0), (0.9, -1.0), (-1.0, 1.0)):
        nll = discretised_nll(levels, *torch.tensor([mean, log_var], dtype=torch.float64))
        assert (-nll).exp().sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("parametrization", ["eps", "x0", "v"])
def test_hybrid_agrees_with_the_oracle(parametrization, schedule):
    process, x0, x_t, t, noise, output = case(parametrization, schedule)
    losses = training_losses(output, x0, x_t, t, noise, process)
    betas = (oracle.cosine_betas if schedule == "cosine" else oracle.linear_betas)(1000)
    abar = oracle.products(betas)
    for b, time in enumerate(t.tolist()):
        square = bits = 0.0
        before = abar[time - 1] if time else 1.0
        low = oracle.posterior(abar[max(time, 1)], abar[max(time, 1) - 1], 0.0, 0.0)[1]
        clean, mixed, n = (y[b].flatten().double().tolist() for y in (x0, x_t, noise))
        means, vs = (y.flatten().double().tolist() for y in output[b].chunk(2))
        for k in range(len(clean)):
            square += (means[k] - oracle.target(parametrization, abar[time], clean[k], n[k])) ** 2
            predicted, _ = oracle.x0_and_eps(parametrization, abar[time], means[k], mixed[k])
            model_mean, _ = oracle.posterior(abar[time], before, predicted, mixed[k])
            v = max(-2.0, min(2.0, vs[k]))
            log_var = (v + 1) / 2 * math.log(betas[time]) + (1 - v) / 2 * math.log(low)
            if time == 0:
                bits += oracle.discretised_nll(clean[k], model_mean, log_var) / math.log(2)
            else:
                true_mean, var = oracle.posterior(abar[time], before, clean[k], mixed[k])
                spread = var + (true_mean - model_mean) ** 2
                kl = 0.5 * (-1 + log_var - math.log(var) + spread / math.exp(log_var))
                bits += kl / math.log(2)
        assert losses.mse[b].item() == pytest.approx(square / len(clean), rel=1e-4)
        if time > 0 or bits / len(clean) < 8:
            expected = pytest.approx(bits / len(clean), rel=0.02 if time == 0 else 2e-3, abs=1e-5)
            assert losses.vb[b].item() == expected, time
    torch.testing.assert_close(losses.loss, losses.mse + losses.vb)  # 0.001 * T = 1 at T = 1000


def test_the_mean_learns_nothing_from_the_vlb_and_the_variance_nothing_from_the_mse():
    process, x0, x_t, t, noise, output = case()
    output.requires_grad_()
    losses = training_losses(output, x0, x_t, t, noise, process)
    (from_vb,) = torch.autograd.grad(losses.vb.sum(), output, retain_graph=True)
    (from_mse,) = torch.autograd.grad(losses.mse.sum(), output, retain_graph=True)
    (from_all,) = torch.autograd.grad(losses.loss.sum(), output)
    assert from_vb[:, :2].abs().max() == 0 and (from_vb[:, 2:].flatten(1).abs().amax(1) > 0).all()
    assert from_mse[:, 2:].abs().max() == 0 and (from_mse[:, :2].flatten(1).abs().amax(1) > 0).all()
    torch.testing.assert_close(from_all, from_mse + from_vb)


def test_the_variance_gradient_is_that_of_finite_differences():
    process, x0, x_t, t, noise, output = case(times=[0, 1, 20, 200])
    output[:, 2:] = output[:, 2:].clamp(-0.8, 0.8)
    output[0, :2] = process.target(x0, t, noise)[0]
    output.requires_grad_()
    (gradient,) = torch.autograd.grad(
        training_losses(output, x0, x_t, t, noise, process).vb.sum(), output
    )
    step = torch.zeros_like(output)
    step[:, 2] = 0.05
    with torch.no_grad():
        above = training_losses(output + step, x0, x_t, t, noise, process).vb
        below = training_losses(output - step, x0, x_t, t, noise, process).vb
    change = above - below
    torch.testing.assert_close(change / 0.1, gradient[:, 2].sum((1, 2)), rtol=0.03, atol=1e-3)


def test_the_vlb_finds_the_variance_of_an_imperfect_mean():
    process = Process(DiffusionConfig(parametrization="x0"))
    g = torch.Generator().manual_seed(0)
    x0 = torch.rand((1, 4000), generator=g) - 0.5
    noise, t = torch.randn(x0.shape, generator=g), torch.tensor([1])
    x_t = process.diffuse(x0, t, noise)
    predicted = x0 + 0.003 * torch.randn(x0.shape, generator=g)
    v = torch.zeros(1, 1, requires_grad=True)
    optimizer = torch.optim.Adam([v], lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        training_losses(
            torch.cat([predicted, v.expand_as(x0)], 1), x0, x_t, t, noise, process
        ).vb.sum().backward()
        optimizer.step()
    weight = process.schedule.posterior_x0_weight[1].item()
    best = process.schedule.posterior_variance[1].item() + (0.003 * weight) ** 2
    assert process.log_variance(v, t, 2).exp().item() == pytest.approx(best, rel=0.05)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_a_fixed_variance_leaves_the_simple_loss(variance):
    process = Process(DiffusionConfig(parametrization="x0", variance=variance))
    x0, noise, t = torch.randn(4, 8), torch.randn(4, 8), torch.tensor([0, 1, 500, 999])
    output = torch.randn(4, 8)
    ours = training_losses(output, x0, process.diffuse(x0, t, noise), t, noise, process)
    assert ours.vb is None and torch.equal(ours.loss, ours.mse)
    torch.testing.assert_close(ours.loss, (output - x0).square().mean(1))
    assert torch.equal(
        training_losses(output, x0, process.diffuse(x0, t, noise), t, noise, process).loss,
        ours.loss,
    )


@pytest.mark.parametrize("parametrization", ["x0", "v"])
def test_max_snr_weights_the_error_in_x0_whatever_is_predicted(parametrization):
    process = Process(
        DiffusionConfig(parametrization=parametrization, variance="fixed_small", max_snr=20.0)
    )
    x0, noise, output = torch.randn(5, 8), torch.randn(5, 8), torch.randn(5, 8)
    t = torch.tensor([0, 50, 300, 700, 999])
    x_t = process.diffuse(x0, t, noise)
    abar = process.schedule.alphas_cumprod[t]
    weight = (abar / (1 - abar)).clamp(max=20) + 1
    error = (process.to_x0(output, x_t, t) - x0).square().mean(1)
    found = training_losses(output, x0, x_t, t, noise, process)
    torch.testing.assert_close(found.loss, (weight * error).float(), rtol=2e-4, atol=1e-6)
    assert weight[0] == 21 and float(weight[-1]) == pytest.approx(1, abs=1e-3)


def test_max_snr_without_a_limit_is_the_loss_of_v():
    plain = Process(DiffusionConfig(parametrization="v"))
    assert torch.equal(plain.loss_weights, torch.ones(1000))
    held = Process(DiffusionConfig(parametrization="v", max_snr=1e9))
    torch.testing.assert_close(held.loss_weights, plain.loss_weights, rtol=1e-5, atol=0)


@pytest.mark.parametrize("wrong", [{"max_snr": 0.0}, {"parametrization": "eps", "max_snr": 5.0}])
def test_a_max_snr_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match="max_snr"):
        DiffusionConfig(**wrong)


EXTREMES = [0.0, 1.0, -1.0, 1e2, -1e4, 1e10, 3e38, -3e38, float("inf"), float("-inf")]


@pytest.mark.parametrize("parametrization", ["eps", "x0", "v"])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_no_extreme_output_gives_nan_nor_a_gradient_of_nan(parametrization, schedule):
    process, x0, x_t, t, noise, _ = case(parametrization, schedule)
    for mean in EXTREMES:
        for v in EXTREMES:
            output = torch.cat([torch.full_like(x0, mean), torch.full_like(x0, v)], 1)
            output = output.bfloat16().requires_grad_()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                losses = training_losses(output, x0, x_t, t, noise, process)
            (gradient,) = torch.autograd.grad(losses.loss.sum(), output)
            assert not losses.loss.isnan().any() and losses.vb.isfinite().all(), (mean, v)
            assert not gradient.isnan().any() and gradient[:, 2:].isfinite().all(), (mean, v)
            if abs(mean) < 1e11:
                assert losses.loss.isfinite().all() and gradient.isfinite().all(), (mean, v)


def test_a_nan_output_is_not_hidden():
    process, x0, x_t, t, noise, output = case()
    assert training_losses(output * float("nan"), x0, x_t, t, noise, process).loss.isnan().all()


def test_losses_are_float32_and_the_same_under_autocast():
    process, x0, x_t, t, noise, output = case()
    plain = training_losses(output, x0, x_t, t, noise, process)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = training_losses(output, x0, x_t, t, noise, process)
    assert cast.loss.dtype == torch.float32
    assert torch.equal(cast.loss, plain.loss)
    assert torch.equal(cast.vb, plain.vb)
    half = training_losses(output.bfloat16(), x0, x_t, t, noise, process)
    assert half.loss.dtype == torch.float32
