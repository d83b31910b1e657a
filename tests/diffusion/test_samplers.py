"""Samplers agree with the float64 oracle and with diffusers, and take their noise per sample."""

import inspect

import numpy as np
import pytest
import torch

from tests.oracles import diffusion as oracle
from unclip_pl.diffusion.noise import Noise
from unclip_pl.diffusion.process import DiffusionConfig, Process
from unclip_pl.diffusion.samplers import (
    SAMPLERS,
    ddim,
    ddpm,
    dpm_solver_pp,
    invert,
)


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
    adapted = process.adapt(network, schedule)
    ours = SAMPLERS[name](adapted, start(), schedule, noise=Noise([8, 9]), eta=eta)
    timesteps = oracle.strided(1000, steps)
    abar = oracle.products(oracle.linear_betas(1000))[timesteps]
    betas = 1 - abar / np.concatenate([[1.0], abar[:-1]])
    predict = double_predict(abar, betas, timesteps)
    stream, x = Noise([8, 9]), start().double().numpy()
    noises = [stream((3, 4, 4)).double().numpy() for _ in range(steps - 1)]
    if name == "ddpm":
        theirs = oracle.ddpm(predict, x, abar, timesteps, noises)
    else:
        theirs = oracle.ddim(predict, x, abar, timesteps, eta, noises)
    np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-3 * np.abs(theirs).max())


def run_scheduler(scheduler, x, generator, channels):
    """What a scheduler of diffusers draws with the first `channels` channels of the network."""
    for t in scheduler.timesteps:
        output = network(x, torch.full((1,), int(t)))[:, :channels]
        x = scheduler.step(output, t, x, generator=generator).prev_sample
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
    x = run_scheduler(scheduler, start(1), torch.Generator().manual_seed(5), channels)
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
    options = {"clip_sample": False, "timestep_spacing": "leading", "prediction_type": theirs}
    scheduler = diffusers.DDIMScheduler(1000, 1e-4, 0.02, "linear", **options)
    scheduler.set_timesteps(50)
    x, generator = start(1), torch.Generator().manual_seed(5)
    for t in scheduler.timesteps:
        output = network(x, t.view(1))[:, :3]
        x = scheduler.step(output, t, x, eta=eta, generator=generator).prev_sample
    config = DiffusionConfig(schedule="linear", parametrization=kind, variance="fixed_small")
    process = Process(config)
    schedule = process.schedule.at(tuple(range(0, 1000, 20)))
    predict = process.adapt(lambda x, t: network(x, t)[:, :3], schedule)
    ours = ddim(predict, start(1), schedule, noise=Noise([5]), eta=eta)
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("steps", [2, 12, 40])
def test_dpm_solver_agrees_with_diffusers(steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        1000, 1e-4, 0.02, "linear", solver_order=2, final_sigmas_type="zero"
    )
    scheduler.set_timesteps(steps)
    x = run_scheduler(scheduler, start(1), None, channels=3)
    process = Process(DiffusionConfig(schedule="linear", variance="fixed_small"))
    schedule = process.schedule.at(tuple(int(t) for t in reversed(scheduler.timesteps)))
    predict = process.adapt(lambda x, t: network(x, t)[:, :3], schedule)
    ours = dpm_solver_pp(predict, start(1), schedule)
    torch.testing.assert_close(ours, x, rtol=1e-3, atol=1e-3)


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

    report = lambda *step: done.append(step)
    noise = Noise([1, 2])
    ours = SAMPLERS[name](watched, start(), schedule, noise=noise, eta=eta, callback=report)
    assert done == [(1, 4), (2, 4), (3, 4), (4, 4)]
    torch.testing.assert_close(ours, seen[-1].x0)


def test_samplers_share_one_signature():
    assert len({inspect.signature(sampler) for sampler in SAMPLERS.values()}) == 1


@pytest.mark.parametrize("sampler", [*SAMPLERS.values(), invert])
def test_one_step_and_all_steps_give_finite_samples(sampler):
    options = {} if sampler is invert else {"noise": Noise([1])}
    process = Process(DiffusionConfig(parametrization="v", variance="fixed_large"))
    for steps in (1, 2, 1000):
        predict, x = process.adapt(lambda x, t: -0.1 * x), Noise([0])((5,))
        drawn = sampler(predict, x, process.schedule.respaced(steps), **options)
        assert drawn.shape == (1, 5) and drawn.dtype == torch.float32 and drawn.isfinite().all()


def test_missing_noise_is_a_sentence():
    process = Process(DiffusionConfig(variance="fixed_small"))
    call = (process.adapt(lambda x, t: x), torch.zeros(1, 2), process.schedule.respaced(2))
    for sampler, eta in ((ddpm, 0.0), (ddim, 0.5)):
        with pytest.raises(ValueError, match="pass noise"):
            sampler(*call, eta=eta)
