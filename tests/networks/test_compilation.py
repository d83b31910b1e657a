"""Compiled networks compute what plain ones do, under the same names, in training and sampling."""

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from tests.factories import fill_zeros
from unclip_pl.diffusion.noise import Noise
from unclip_pl.diffusion.process import DiffusionConfig
from unclip_pl.networks.ar_prior import ARPriorConfig
from unclip_pl.networks.checkpointing import apply_checkpointing
from unclip_pl.networks.compilation import compile_blocks
from unclip_pl.networks.layers import Block
from unclip_pl.networks.prior import PriorTextConfig, PriorTransformerConfig
from unclip_pl.networks.text import TextConfig
from unclip_pl.networks.unet import UNetConfig
from unclip_pl.stages.ar_prior import ARPrior
from unclip_pl.stages.decoder import Decoder, DecoderSamplingConfig
from unclip_pl.stages.diffusion_prior import DiffusionPrior, PriorSamplingConfig
from unclip_pl.stages.upsampler import NET, Upsampler256, UpsamplingConfig
from unclip_pl.utils.compilers import is_whole_library, remove_broken_libraries
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import file_lock

DIM, LENGTH = 12, 6


def decoder(**thumbnail: int) -> Decoder:
    net = UNetConfig(
        image_size=8, width=32, mults=(1,), depth=1, attention=(8,), head_width=16,
        dropout=0.0, embed_dim=DIM, context_width=16, checkpointing="selective", **thumbnail,
    )  # fmt: skip
    text = TextConfig(kind="states", states_width=10)
    return Decoder(net, text, sampling=DecoderSamplingConfig("ddim", steps=2, guidance_scale=2.0))


def upsampler() -> Upsampler256:
    net = UNetConfig(image_size=8, width=32, mults=(1,), depth=1, dropout=0.0, **NET)
    return Upsampler256(net, sampling=UpsamplingConfig(steps=2))


def diffusion_prior() -> DiffusionPrior:
    net = PriorTransformerConfig(embed_dim=DIM, width=16, depth=2, heads=2)
    text = PriorTextConfig("states", states_width=10, context_length=LENGTH)
    process = DiffusionConfig(timesteps=8, parametrization="x0", variance="fixed_small")
    sampling = PriorSamplingConfig("ddpm", steps=2, guidance_scale=2.0)
    return DiffusionPrior(net, text, process, sampling=sampling)


def ar_prior() -> ARPrior:
    net = ARPriorConfig(embed_dim=DIM, width=16, depth=2, heads=2, max_codes=4, buckets=8)
    text = TextConfig(kind="states", states_width=10, context_length=LENGTH)
    stage = ARPrior(net, text, 0.0)
    rows = torch.randn(512, DIM, generator=torch.Generator().manual_seed(0))
    stage.quantizer.fit(rows.mean(0), rows.T.cov(), rows, rows.roll(1, 1))
    return stage


STAGES = {
    "decoder": decoder,
    "upsampler": upsampler,
    "diffusion_prior": diffusion_prior,
    "ar_prior": ar_prior,
}
COMPILED = STAGES | {"thumbnail": partial(decoder, thumbnail=4, thumbnail_width=16)}


def batch() -> dict:
    draw = torch.Generator().manual_seed(1)
    tokens = torch.randint(1, 60, (2, LENGTH), generator=draw)
    tokens[0, 3], tokens[1, 5] = 63, 63
    return {
        "key": ["0", "1"],
        "image": torch.rand(2, 3, 8, 8, generator=draw) * 2 - 1,
        "low_res": torch.rand(2, 3, 2, 2, generator=draw) * 2 - 1,
        "tokens": tokens,
        "text_states": torch.randn(2, LENGTH, 10, generator=draw),
        "text_embed": torch.randn(2, DIM, generator=draw),
        "image_embed": torch.randn(2, DIM, generator=draw),
    }


def results(stage, given: dict) -> list[torch.Tensor]:
    """A loss with its gradients, and what the stage draws."""
    torch.manual_seed(3)  # of the thumbnail's dropout
    loss = stage.train().loss(given, torch.Generator().manual_seed(2))["loss"]
    gradients = torch.autograd.grad(loss, list(stage.parameters()), allow_unused=True)
    drawn = stage.eval().sample(given, Noise(range(2)))
    return [loss.detach(), drawn, *(gradient for gradient in gradients if gradient is not None)]


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("name", COMPILED)
def test_compiled_equals_eager(name, backend, device, exact_float32):
    """On a CPU, where inductor calls a C++ compiler for a minute per stage, one stage has both."""
    if backend == "inductor" and device == "cpu" and name != "ar_prior":
        pytest.skip("a GPU compiles every stage")
    torch.manual_seed(0)
    stage = COMPILED[name]()
    fill_zeros(stage, 0.1)
    stage = stage.to(device)
    given = {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch().items()}
    eager, names = results(stage, given), list(stage.state_dict())
    blocks = [module for module in stage.modules() if isinstance(module, Block)]
    assert compile_blocks(stage, device, backend) == len(blocks) > 0
    compiled = results(stage, given)
    for ours, expected in zip(compiled, eager, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4)
    assert list(stage.state_dict()) == names
    assert all(block._compiled_call_impl is not None for block in blocks)


@pytest.mark.slow
@pytest.mark.parametrize("encoded", [False, True], ids=["training", "sampling"])
@pytest.mark.parametrize("checkpointing", ["none", "selective"])
def test_a_unet_is_compiled_once_for_captions_of_all_lengths(checkpointing, encoded):
    """On a CPU, where they are cut to the longest of a batch. Torch keeps its limits per thread."""
    torch._dynamo.reset()
    counters.clear()
    net = decoder().net
    apply_checkpointing(net, checkpointing)
    compile_blocks(net, backend="eager")
    x, t = torch.zeros(2, 3, 8, 8), torch.zeros(2)

    def compiled_for(length: int) -> int:
        mask = torch.arange(length) < torch.tensor([[2], [length]])
        context = torch.zeros(2, length, 16)
        conditions = {"embed": torch.zeros(2, DIM), "context": context, "context_mask": mask}
        with torch.set_grad_enabled(not encoded):
            if encoded:
                conditions = {"encoded": net.encode_context(**conditions)}
            net(x, t, **conditions)
        return counters["stats"]["unique_graphs"]

    with ThreadPoolExecutor(1) as thread:
        compiled = list(thread.map(compiled_for, (5, 6, 9)))
    assert compiled == [compiled[0]] * 3 and compiled[0] > 0


def test_without_a_cpp_compiler_there_is_one_sentence():
    from torch._inductor import config

    nothing = config.patch({"cpp.cxx": (None, "no-such-compiler")})
    with nothing, pytest.raises(UserError, match="C\\+\\+ compiler") as raised:
        compile_blocks(diffusion_prior())
    assert "no-such-compiler" in str(raised.value) and "\n" not in str(raised.value)


def test_on_a_gpu_without_a_c_compiler_there_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    with pytest.raises(UserError, match="needs a C compiler"):
        compile_blocks(diffusion_prior(), "cuda")
    monkeypatch.setenv("CC", "tcc")
    assert compile_blocks(diffusion_prior(), "cuda")


def test_libraries_that_a_killed_job_left_cut_off_are_removed(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr("torch._inductor.codecache.cache_dir", lambda: str(tmp_path))
    content = Path(torch._C.__file__).read_bytes()
    kinds = {"whole": content, "empty": b"", "short": content[: -(len(content) // 2)]}
    kinds |= {"zeros": bytes(len(content))}
    for name, data in kinds.items():
        (tmp_path / name[:2]).mkdir()
        (tmp_path / name[:2] / f"c{name}.main.so").write_bytes(data)
    compile_blocks(diffusion_prior())
    assert [path.name for path in tmp_path.glob("*/*.so")] == ["cwhole.main.so"]
    assert caplog.text.count("was cut off") == 3


def test_a_library_that_another_process_compiles_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("torch._inductor.codecache.cache_dir", lambda: str(tmp_path))
    library = tmp_path / "ab" / "cab.main.so"
    library.parent.mkdir()
    library.touch()
    with file_lock(tmp_path / "locks" / "cab.lock"):
        remove_broken_libraries()
    assert library.exists()
    remove_broken_libraries()
    assert not library.exists() and is_whole_library(library)
