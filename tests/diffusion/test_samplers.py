"""Samplers: steps against the float64 oracle and diffusers, Gaussian data with its known best denoiser, inversion, one noise a sample."""

import inspect

import numpy as np
import pytest
import torch

from tests.oracles import diffusion as oracle
from unclip_pl.diffusion.noise import Noise
from unclip_pl.diffusion.process import DiffusionConfig, Prediction, Process
from unclip_pl.diffusion.samplers import (
    SAMPLERS,
    ddim,
    ddpm,
    dpm_solver_pp,
    invert,
    invert_implicit,
)

MEAN = torch.tensor([0.6, -0.3])
COVARIANCE = torch.tensor([[0.40, 0.18], [0.18, 0.25]])


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def network(x, t):
    """A stand-in for a trained network: smooth, of both arguments; eps and v channels."""
    time = (t.double() / 1000).to(x.dtype).view((-1,) + (1,) * (x.ndim - 1))
    return torch.cat([x * (0.4 + 0.5 * time) + 0.2 * torch.sin(3 * x), torch.cos(x + time)], 1)


def start(size=2):
    return Noise(range(size))((3, 4, 4))


def double_predict(abar, betas, timesteps):
    """The same network for the oracle, in numpy; betas and abar of the respaced schedule."""
    index = {t: i for i, t in enumerate(timesteps)}

    def predict(x, t):
        i = index[t]
        output = network(torch.from_numpy(x), torch.tensor([t])).numpy()
        eps, v = output[:, :3], output[:, 3:]
        x0, _ = oracle.x0_and_eps("eps", abar[i], eps, x)
        low = oracle.posterior(abar[max(i, 1)], abar[max(i, 1) - 1], 0.0, 0.0)[1]
        return x0, eps, (v + 1) / 2 * np.log(betas[i]) + (1 - v) / 2 * np.log(low)

    return predict


@pytest.mark.parametrize("steps", [5, 50])
@pytest.mark.parametrize("name, eta", [("ddpm", 0.0), ("ddim", 0.0), ("ddim", 0.7), ("ddim", 1.0)])
def test_whole_trajectories_agree_with_the_oracle(name, eta, steps):
    process = Process(DiffusionConfig(schedule="linear"))
    schedule = process.schedule.respaced(steps)
    ours = SAMPLERS[name](
        process.adapt(network, schedule), start(), schedule, noise=Noise([8, 9]), eta=eta
    )
    timesteps = oracle.strided(1000, steps)
    abar = oracle.products(oracle.linear_betas(1000))[timesteps]
    betas = 1 - abar / np.concatenate([[1.0], abar[:-1]])
    predict, stream, x = (
        double_predict(abar, betas, timesteps),
        Noise([8, 9]),
        start().double().numpy(),
    )
    noises = [stream((3, 4, 4)).double().numpy() for _ in range(steps - 1)]
    theirs = (
        oracle.ddpm(predict, x, abar, timesteps, noises)
        if name == "ddpm"
        else oracle.ddim(predict, x, abar, timesteps, eta, noises)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3 * np.abs(theirs).max())


def walk(scheduler, timesteps, x, generator, **options):
    for t in timesteps:
        x = scheduler.step(
            network(x, torch.full((1,), int(t)))[:, : options["channels"]],
            t,
            x,
            generator=generator,
        ).prev_sample
    return x


@pytest.mark.parametrize(
    "schedule_name, theirs", [("linear", "linear"), ("cosine", "squaredcos_cap_v2")]
)
@pytest.mark.parametrize(
    "variance, channels", [("fixed_small", 3), ("fixed_large", 3), ("learned_range", 6)]
)
def test_ddpm_agrees_with_diffusers(schedule_name, theirs, variance, channels):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(
        1000, 1e-4, 0.02, theirs, variance_type=variance, clip_sample=False
    )
    positions = (0, 40, 200, 201, 400, 650, 900)
    scheduler.set_timesteps(timesteps=list(positions[::-1]))
    x = walk(
        scheduler,
        scheduler.timesteps,
        start(1),
        torch.Generator().manual_seed(5),
        channels=channels,
    )
    process = Process(DiffusionConfig(schedule=schedule_name, variance=variance))
    schedule = process.schedule.at(positions)
    predict = process.adapt(lambda x, t: network(x, t)[:, :channels], schedule)
    ours = ddpm(predict, start(1), schedule, noise=Noise([5]))
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize(
    "kind, theirs", [("eps", "epsilon"), ("x0", "sample"), ("v", "v_prediction")]
)
def test_ddim_agrees_with_diffusers(kind, theirs, eta):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        1000,
        1e-4,
        0.02,
        "linear",
        prediction_type=theirs,
        clip_sample=False,
        timestep_spacing="leading",
    )
    scheduler.set_timesteps(50)
    x, generator = start(1), torch.Generator().manual_seed(5)
    for t in scheduler.timesteps:
        x = scheduler.step(
            network(x, t.view(1))[:, :3], t, x, eta=eta, generator=generator
        ).prev_sample
    process = Process(
        DiffusionConfig(schedule="linear", parametrization=kind, variance="fixed_small")
    )
    schedule = process.schedule.at(tuple(range(0, 1000, 20)))
    ours = ddim(
        process.adapt(lambda x, t: network(x, t)[:, :3], schedule),
        start(1),
        schedule,
        noise=Noise([5]),
        eta=eta,
    )
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("steps", [2, 12, 40])
def test_dpm_solver_agrees_with_diffusers(steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        1000, 1e-4, 0.02, "linear", solver_order=2, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(steps)
    x = walk(scheduler, scheduler.timesteps, start(1), None, channels=3)
    process = Process(DiffusionConfig(schedule="linear", variance="fixed_small"))
    schedule = process.schedule.at(tuple(int(t) for t in reversed(scheduler.timesteps)))
    ours = dpm_solver_pp(
        process.adapt(lambda x, t: network(x, t)[:, :3], schedule), start(1), schedule
    )
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-3)


def best_denoiser(process, steps=None, true_variance=False):
    """E[x_0 | x_t] for x_0 ~ N(MEAN, COVARIANCE); log_var of the process, or of p(x_{t-1} | x_t) itself (its diagonal)."""
    abar = process.schedule.alphas_cumprod
    positions = {} if steps is None else {t: i for i, t in enumerate(steps.timesteps.tolist())}

    def predict(x, t):
        a = abar[t[0]].float()
        gain = a.sqrt() * COVARIANCE @ torch.linalg.inv(a * COVARIANCE + (1 - a) * torch.eye(2))
        x0 = MEAN + (x - a.sqrt() * MEAN) @ gain.T
        log_var = process.log_variance(None, t, x.ndim)
        if true_variance:
            i = positions[int(t[0])]
            left = torch.diagonal(COVARIANCE - a.sqrt() * gain @ COVARIANCE)
            log_var = (
                (steps.posterior_variance[i] + steps.posterior_x0_weight[i] ** 2 * left)
                .float()
                .log()
            )
        return Prediction(x0, process.x0_to_eps(x0, x, t), log_var)

    return predict


def whitened(size):
    """Standard normal draws whose own mean is 0 and covariance I, exactly: what a linear sampler does to the moments shows without scatter."""
    x = torch.randn((size, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x - x.mean(0)
    return (x @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T).float()


def moments_error(name, eta, schedule, steps, size):
    """Largest error of the mean and of the covariance of what is drawn."""
    process = Process(
        DiffusionConfig(schedule=schedule, parametrization="x0", variance="fixed_small")
    )
    if steps == "even log SNR":
        abar = process.schedule.alphas_cumprod
        lam = (abar / (1 - abar)).log()
        even = torch.linspace(lam[0], lam[-1], 20, dtype=torch.float64)
        respaced = process.schedule.at(
            sorted({int((lam - value).abs().argmin()) for value in even})
        )
    else:
        respaced = process.schedule.respaced(steps)
    drawn = SAMPLERS[name](
        best_denoiser(process), whitened(size), respaced, noise=OneStream(), eta=eta
    )
    return (drawn.mean(0) - MEAN).abs().max().item(), (
        drawn.T.cov() - COVARIANCE
    ).abs().max().item()


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("name, steps", [("ddim", 500), ("dpm_solver_pp", 200)])
def test_deterministic_samplers_draw_the_gaussian_they_were_given(name, steps, schedule):
    mean, covariance = moments_error(name, 0.0, schedule, steps, size=500)
    assert mean < 0.005 and covariance < 0.008


@pytest.mark.parametrize("name, eta", [("ddpm", 0.0), ("ddim", 1.0), ("ddim", 0.5)])
def test_stochastic_samplers_draw_the_gaussian_they_were_given(name, eta):
    mean, covariance = moments_error(name, eta, "cosine", 1000, size=8000)
    assert mean < 0.03 and covariance < 0.03  # four standard deviations of the scatter


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_dpm_solver_is_nearer_than_ddim_where_steps_are_even_in_log_snr(schedule):
    """Even timesteps end in a step many times the one before it, where extrapolating does not pay (diffusers does the same)."""
    errors = {
        name: moments_error(name, 0.0, schedule, "even log SNR", 200)[1]
        for name in ("ddim", "dpm_solver_pp")
    }
    assert errors["dpm_solver_pp"] < 0.5 * errors["ddim"], errors


class OneStream(Noise):
    """Thousands of generators would be slow: one stream for the batch is enough for moments."""

    def __init__(self):
        super().__init__([1])

    def like(self, x):
        return self(x.shape)[0]


def test_ddpm_uses_the_variance_that_it_is_told():
    """With Var[x_{t-1} | x_t] as log_var, 20 steps keep the variance of Gaussian data; btilde or beta miss it."""
    process = Process(DiffusionConfig(parametrization="x0", variance="fixed_small"))
    steps = process.schedule.respaced(20)
    x = whitened(8000)
    variances = COVARIANCE.diagonal()
    right = ddpm(
        best_denoiser(process, steps, true_variance=True), x, steps, noise=OneStream()
    ).var(0)
    torch.testing.assert_close(right, variances, rtol=0.06, atol=0)

    def fixed(table):
        def predict(x, t):
            position = int((steps.timesteps == t[0]).nonzero())
            return best_denoiser(process)(x, t)._replace(log_var=table[position].float())

        return ddpm(predict, x, steps, noise=OneStream()).var(0)

    assert (fixed(steps.posterior_log_variance) < 0.9 * variances).all()
    assert (fixed(steps.betas.log()) > right).all()


def round_trip_error(name, steps):
    process = Process(DiffusionConfig(variance="fixed_small", schedule=name))
    schedule = process.schedule.respaced(steps)

    def denoise(x, t):  # the best denoiser of pixels from N(+-0.6, 0.2^2): not linear
        a = process.schedule.alphas_cumprod[t[0]].item()
        variance = a * 0.2**2 + 1 - a
        x0 = (
            a**0.5 * 0.2**2 * x + (1 - a) * 0.6 * torch.tanh(0.6 * a**0.5 / variance * x)
        ) / variance
        return process.x0_to_eps(x0, x, t)

    predict = process.adapt(denoise, schedule)
    x = (
        0.6 * torch.randint(0, 2, (2, 3, 4, 4), generator=torch.Generator().manual_seed(0)) * 2
        - 0.6
    )
    x = x + 0.2 * Noise([0, 1])((3, 4, 4))
    latent = invert(predict, x, schedule)
    return (ddim(predict, latent, schedule) - x).square().mean().sqrt().item()


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_the_error_of_an_inversion_round_trip_falls_with_the_steps(name):
    errors = [round_trip_error(name, steps) for steps in (25, 100, 500)]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.02, errors


def test_inversion_of_gaussian_data_comes_near_the_exact_flow_and_back():
    """For a Gaussian the probability flow maps (x - m) / std of the data to that of the noise."""
    process = Process(DiffusionConfig(parametrization="x0", variance="fixed_small"))
    x = MEAN + whitened(200) @ torch.linalg.cholesky(COVARIANCE).T
    errors = []
    for steps in (50, 200, 1000):
        schedule = process.schedule.respaced(steps)
        latent = invert(best_denoiser(process), x, schedule)
        errors.append((ddim(best_denoiser(process), latent, schedule) - x).abs().max().item())
    assert errors[0] > errors[1] > errors[2] and errors[2] < 0.01, errors
    values, vectors = torch.linalg.eigh(COVARIANCE)
    whiten = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    torch.testing.assert_close(latent, (x - MEAN) @ whiten, atol=0.02, rtol=0)


@pytest.mark.parametrize("steps", [8, 10, 30])
def test_implicit_inversion_solves_the_step_down(steps):
    """With enough rounds the way back is exact at any number of steps; with one it is better than the explicit inversion."""
    process = Process(DiffusionConfig(parametrization="v", variance="fixed_small"))
    schedule = process.schedule.respaced(steps)
    predict = process.adapt(lambda x, t: 0.8 * torch.sin(2 * x) - 0.3, schedule)
    x = 0.5 * start()

    def error(inversion, **options):
        return float(
            (ddim(predict, inversion(predict, x, schedule, **options), schedule) - x).abs().max()
        )

    assert error(invert_implicit, rounds=60) < 1e-4
    assert error(invert_implicit) < 0.7 * error(invert)


def test_implicit_inversion_asks_as_often_as_the_explicit_one():
    process = Process(DiffusionConfig(variance="fixed_small"))
    schedule, seen = process.schedule.respaced(5), []

    def predict(x, t):
        seen.append(int(t[0]))
        return process.adapt(lambda x, t: 0.1 * x, schedule)(x, t)

    invert_implicit(predict, start(), schedule)
    assert seen == [0, 0, 250, 500, 749, 999]


def test_inversion_and_sampling_visit_the_same_timesteps():
    process = Process(DiffusionConfig(variance="fixed_small"))
    schedule = process.schedule.respaced(5)
    seen = []

    def predict(x, t):
        seen.append(int(t[0]))
        return process.adapt(lambda x, t: 0.1 * x, schedule)(x, t)

    ddim(predict, start(), schedule)
    invert(predict, start(), schedule)
    assert seen == [999, 749, 500, 250, 0, 0, 0, 250, 500, 749]


@pytest.mark.parametrize("name, eta", [("ddpm", 0.0), ("ddim", 0.5), ("dpm_solver_pp", 0.0)])
def test_a_sample_is_the_same_whatever_its_batch(name, eta):
    process = Process(DiffusionConfig())
    schedule = process.schedule.respaced(12)
    predict = process.adapt(network, schedule)

    def draw(seeds):
        noise = Noise(seeds)
        return SAMPLERS[name](predict, noise((3, 4, 4)), schedule, noise=noise, eta=eta)

    batch = draw([4, 5, 6])
    for k, seed in enumerate([4, 5, 6]):
        torch.testing.assert_close(draw([seed])[0], batch[k], rtol=1e-5, atol=1e-5)
    assert (batch[0] - batch[1]).abs().max() > 0.1


@pytest.mark.parametrize("name, eta", [("ddpm", 0.0), ("ddim", 1.0)])
def test_the_last_step_adds_no_noise(name, eta):
    process = Process(DiffusionConfig())
    schedule = process.schedule.respaced(4)
    predict, seen, done = process.adapt(network, schedule), [], []

    def watched(x, t):
        seen.append(predict(x, t))
        return seen[-1]

    ours = SAMPLERS[name](
        watched,
        start(),
        schedule,
        noise=Noise([1, 2]),
        eta=eta,
        callback=lambda *step: done.append(step),
    )
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    torch.testing.assert_close(ours, seen[-1].x0)


@pytest.mark.parametrize("sampler", [*SAMPLERS.values(), invert])
def test_samplers_share_one_signature(sampler):
    assert inspect.signature(sampler) == inspect.signature(ddpm)
    process = Process(DiffusionConfig(parametrization="v", variance="fixed_large"))
    for steps in (1, 2, 1000):
        drawn = sampler(
            process.adapt(lambda x, t: -0.1 * x),
            Noise([0])((5,)),
            process.schedule.respaced(steps),
            noise=Noise([1]),
        )
        assert drawn.shape == (1, 5) and drawn.dtype == torch.float32 and drawn.isfinite().all()


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_implicit_inversion_of_very_few_steps_stays_finite(steps):
    process = Process(DiffusionConfig(parametrization="v", variance="fixed_small"))
    latent = invert_implicit(
        process.adapt(lambda x, t: -0.5 * x), 0.5 * start(), process.schedule.respaced(steps)
    )
    assert latent.abs().max() < 10


def test_missing_noise_is_a_sentence():
    process = Process(DiffusionConfig(variance="fixed_small"))
    call = (process.adapt(lambda x, t: x), torch.zeros(1, 2), process.schedule.respaced(2))
    for sampler, eta in ((ddpm, 0.0), (ddim, 0.5)):
        with pytest.raises(ValueError, match="pass noise"):
            sampler(*call, eta=eta)
