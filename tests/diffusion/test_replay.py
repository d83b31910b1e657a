"""Sampling from a recording on a GPU against sampling step by step; on the CPU nothing is recorded."""

import copy

import pytest
import torch

from unclip_pl.diffusion.noise import Noise
from unclip_pl.diffusion.process import DiffusionConfig, Prediction, Process
from unclip_pl.diffusion.replay import Replay
from unclip_pl.networks.text import TextConfig
from unclip_pl.networks.unet import UNetConfig
from unclip_pl.stages.decoder import Decoder, SamplingConfig
from unclip_pl.stages.upsampler import NET, Upsampler256, UpsamplingConfig

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
DDIM = SamplingConfig("ddim", steps=6, guidance_scale=2.0)


def decoder() -> Decoder:
    torch.manual_seed(0)
    net = UNetConfig(image_size=32, width=32, mults=(1, 2), depth=1, attention=(16,), head_width=32, embed_dim=16, context_width=32)
    stage = Decoder(net, TextConfig(kind="none"), sampling=DDIM).eval().requires_grad_(False)
    for parameter in stage.parameters():  # the zeros of a new network would hide what it is given
        parameter.add_(0.05 * torch.randn_like(parameter))
    return stage


def plainly(stage, *arguments, **options):
    """`stage.sample` without recordings."""
    twin = copy.deepcopy(stage)
    twin.replay = lambda make, conditions, kind, weights: make(conditions)
    return twin.sample(*arguments, **options)


def near(one: torch.Tensor, other: torch.Tensor) -> None:
    """Pictures in [-1, 1] equal but for rounding: float32 is TF32 in cuDNN, which may pick other kernels in a recording (0.002 was seen)."""
    assert (one - other).abs().mean() < 2e-3


def embeds(seed: int, size: int = 2) -> dict:
    return {"image_embed": torch.randn(size, 16, generator=torch.Generator().manual_seed(seed)).cuda()}


def test_on_a_cpu_it_is_what_was_made():
    replay, made = Replay(), lambda x, t: Prediction(x, x, x)
    assert replay(lambda conditions: made, (torch.zeros(1),), None, []) is made


def test_a_copy_of_a_stage_has_no_recording():
    replay = Replay()
    replay._kept = object()  # no CUDA graph can be copied
    assert copy.deepcopy(replay)._kept is None


@needs_gpu
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm_solver_pp"])
@pytest.mark.parametrize("half", [False, True])
def test_runs_of_a_kind_share_a_recording_and_draw_the_same(sampler, half):
    stage, settings = decoder().cuda(), SamplingConfig(sampler, steps=6, guidance_scale=2.0)
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        kept = []
        for seed in (1, 2, 3):
            drawn = stage.sample(embeds(seed), Noise([seed, 9]), settings)
            plain = plainly(stage, embeds(seed), Noise([seed, 9]), settings)
            if half:
                torch.testing.assert_close(drawn, plain, rtol=1e-4, atol=1e-4)
            near(drawn, plain)
            kept.append(stage.replay._kept)
        assert kept[0] is kept[1] is kept[2] and kept[0].graph is not None
        stage.sample(embeds(1, 3), Noise([1, 2, 3]), settings)
        assert stage.replay._kept is not kept[0]


@needs_gpu
def test_weights_may_change_in_place_and_may_move():
    stage = decoder().cuda()
    before = stage.sample(embeds(1), Noise([1, 2]))
    with torch.no_grad():
        stage.net.exit.weight.mul_(1.5)
    after = stage.sample(embeds(1), Noise([1, 2]))
    assert (before - after).abs().mean() > 0.02
    near(after, plainly(stage, embeds(1), Noise([1, 2])))
    stage.cpu().cuda()
    near(stage.sample(embeds(1), Noise([1, 2])), after)


@needs_gpu
@torch.no_grad()
def test_two_runs_may_take_turns():
    stage = decoder().cuda()
    stage.sample(embeds(1), Noise([1, 2]))
    schedule = stage.process.schedule.respaced(6)
    one, two = (stage.predictor(embeds(seed), 2, schedule, DDIM) for seed in (1, 2))
    x, t = torch.randn(2, 3, 32, 32, device="cuda"), torch.full((2,), int(schedule.timesteps[3]), device="cuda")
    first, other, again = one(x, t).x0, two(x, t).x0, one(x, t).x0
    assert stage.replay._kept.graph is not None
    near(first, again)
    assert (first - other).abs().mean() > 0.02


@needs_gpu
def test_upsamplers_draw_the_same():
    torch.manual_seed(0)
    net = UNetConfig(image_size=256, width=32, mults=(1, 2), depth=1, dropout=0.0, **NET)
    stage = Upsampler256(net, sampling=UpsamplingConfig(steps=5)).eval().requires_grad_(False)
    for parameter in stage.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    stage.cuda()
    for seed in (1, 2):
        batch = {"low_res": torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(seed)).cuda() * 2 - 1}
        near(stage.sample(batch, Noise([seed])), plainly(stage, batch, Noise([seed])))
    assert stage.replay._kept.graph is not None


@needs_gpu
@torch.no_grad()
def test_what_cannot_be_recorded_is_drawn_plainly_and_said(caplog):
    process = Process(DiffusionConfig(variance="fixed_small")).cuda()

    def make(conditions):
        return process.adapt(lambda x, t: x * float(conditions[0].sum().item()))  # waits for the device

    replay, x, t = Replay(), torch.randn(1, 3, 4, 4, device="cuda"), torch.tensor([5], device="cuda")
    predict = replay(make, (torch.ones(2, device="cuda"),), "kind", [])
    found = [predict(x, t).x0 for _ in range(4)]
    assert all(torch.equal(found[0], one) for one in found) and caplog.text.count("without a CUDA graph") <= 1
