"""What only a GPU can do: compiled stages, CUDA graphs, memory that checkpointing saves.

`pytest tests/test_gpu.py tests/test_device.py` is the test of a GPU; it takes some minutes.
"""

import pytest
import torch

from tests.factories import STAGES, on, randomise, tiny_batch, tiny_stage
from tests.test_device import gradients
from unclip_pl import UnCLIP
from unclip_pl.diffusion.noise import Noise
from unclip_pl.networks.compilation import compile_blocks
from unclip_pl.networks.unet import UNet, UNetConfig

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.timeout(120),
    pytest.mark.usefixtures("exact_float32"),
]
DIFFUSION = tuple(name for name in STAGES if name != "ar_prior")


def random_stage(name: str, **options) -> torch.nn.Module:
    """A tiny stage on the GPU with random weights, those of zero included."""
    stage = tiny_stage(name, **options)
    randomise(stage)
    return stage.eval().cuda()


def draw(stage: torch.nn.Module, name: str, seed: int = 4) -> torch.Tensor:
    batch = on(tiny_batch(name, 2, seed), "cuda")
    batch.pop("image", None)
    return stage.sample(batch, Noise([seed, 9]))


def assert_near(one: torch.Tensor, other: torch.Tensor, half: bool = False) -> None:
    """Equal up to rounding: libraries may choose other kernels."""
    difference = (one.float() - other.float()).abs().mean()
    assert difference < (2e-2 if half else 1e-3) * other.float().abs().mean() + 1e-5


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", DIFFUSION)
def test_a_cuda_graph_draws_the_same_for_every_seed(name, half):
    stage = random_stage(name)
    assert not stage.cuda_graphs
    with torch.autocast("cuda", torch.bfloat16, enabled=half):
        expected = [draw(stage, name, seed) for seed in (4, 5, 4)]
        stage.cuda_graphs = True
        drawn = [draw(stage, name, seed) for seed in (4, 5, 4)]
    for one, other in zip(drawn, expected):
        assert_near(one, other, half)
    assert_near(drawn[0], drawn[2], half)
    assert (drawn[0] - drawn[1]).abs().mean() > 0.05 * drawn[0].abs().mean()


def test_a_cuda_graph_sees_weights_that_changed_in_place():
    stage = random_stage("decoder")
    stage.cuda_graphs = True
    before = draw(stage, "decoder")
    with torch.no_grad():
        for parameter in stage.net.parameters():
            parameter.mul_(1.1)
    after = draw(stage, "decoder")
    assert (before - after).abs().mean() > 0.02
    stage.cuda_graphs = False
    assert_near(after, draw(stage, "decoder"))


def test_checkpointing_saves_memory_in_its_order():
    """Peak of a training step of one U-Net, above its weights."""
    config = {"image_size": 64, "width": 64, "mults": (1, 2), "depth": 2, "attention": ()}
    peaks = {}
    for kind in ("none", "selective", "full"):
        torch.manual_seed(0)
        net = UNet(UNetConfig(**config, middle_attention=False, checkpointing=kind)).cuda()
        x, t = torch.randn(8, 3, 64, 64, device="cuda"), torch.arange(8, device="cuda")
        for _ in range(2):  # the first step also allocates what libraries keep
            net.zero_grad()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            net(x, t).square().mean().backward()
            peaks[kind] = torch.cuda.max_memory_allocated() - before
        del net
    assert peaks["full"] < peaks["selective"] < peaks["none"], peaks


def test_the_pipeline_of_the_package_draws_what_the_cpu_draws():
    pictures = []
    for device in ("cpu", "cuda"):
        unclip = UnCLIP.load(prior="diffusion", device=device)
        settings = type(unclip.decoder.sampling)(sampler="ddim", steps=4, guidance_scale=1.5)
        embed = unclip.embed_text(["red apple", "fox"])
        drawn = unclip.decode(embed, [3, 4], ["red apple", "fox"], settings)
        pictures.append(drawn.float().cpu())
    assert (pictures[0] - pictures[1]).abs().mean() < 5e-3


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", ["selective", "full"])
@pytest.mark.parametrize("name", ["decoder", "diffusion_prior"])
def test_compiled_training_with_checkpointing_equals_eager(name, checkpointing):
    plain, stage = tiny_stage(name), tiny_stage(name, checkpointing)
    randomise(plain)
    stage.load_state_dict(plain.state_dict())
    assert compile_blocks(stage, "cuda") > 0
    expected, actual = gradients(plain, name, "cuda"), gradients(stage, name, "cuda")
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert (value - actual[key]).norm() < 1e-3 * value.norm() + 1e-6, key


@pytest.mark.slow
@pytest.mark.parametrize("graphs", [False, True], ids=["eager", "cuda graph"])
@pytest.mark.parametrize("name", STAGES)
def test_compiled_sampling_equals_eager(name, graphs):
    stage = random_stage(name)
    expected = draw(stage, name)
    compile_blocks(stage, "cuda")
    stage.cuda_graphs = graphs
    assert_near(draw(stage, name), expected)
