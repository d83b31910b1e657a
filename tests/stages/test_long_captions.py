"""A caption that is longer than CLIP reads reaches the stages' own text encoders whole."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from tests.data.test_text_tokens import LENGTH, long_caption
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.clip.loading import tokenize_bpe
from unclip_pl.networks.ar_prior import ARPriorConfig
from unclip_pl.networks.prior import PriorTextConfig, PriorTransformerConfig
from unclip_pl.networks.text import TextConfig
from unclip_pl.networks.unet import UNetConfig
from unclip_pl.pipeline.unclip import UnCLIP
from unclip_pl.stages import ar_prior, decoder, diffusion_prior
from unclip_pl.utils.errors import UserError

D = 256  # of the package's CLIP, which reads 32 tokens
STAGES = ("decoder", "diffusion_prior", "ar_prior")


@pytest.fixture(scope="module")
def clip() -> FrozenCLIP:
    return FrozenCLIP()


def stage_of(name: str, length: int = LENGTH, clip: FrozenCLIP | None = None):
    """A tiny stage with a text encoder of its own, whose parts all speak."""
    torch.manual_seed(0)
    text = TextConfig(kind="transformer", context_length=length, width=16, depth=1, heads=2)
    if name == "decoder":
        net = UNetConfig(
            image_size=16,
            width=32,
            mults=(1,),
            depth=1,
            attention=(16,),
            head_width=32,
            embed_dim=D,
            context_width=16,
        )
        sampling = decoder.DecoderSamplingConfig("ddim", steps=2, threshold=None)
        stage = decoder.Decoder(net, text, sampling=sampling)
    elif name == "diffusion_prior":
        net = PriorTransformerConfig(embed_dim=D, width=32, depth=1, heads=2)
        text = PriorTextConfig("tokens", context_length=length)
        sampling = diffusion_prior.PriorSamplingConfig("ddim", steps=2, num_candidates=1)
        stage = diffusion_prior.DiffusionPrior(net, text, sampling=sampling)
    else:
        net = ARPriorConfig(embed_dim=D, width=32, depth=1, heads=2, max_codes=4, buckets=64)
        stage = ar_prior.ARPrior(net, text, max_error=0.0)
        z = torch.randn(64, D)
        stage.quantizer.fit(z.double().mean(0), z.double().T.cov(correction=0), z, z)
    for parameter in stage.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    stage.clip_fingerprint = clip.fingerprint() if clip else None
    return stage.eval()


def batch_of(captions: list[str], clip: FrozenCLIP) -> dict:
    """What the data give for training."""
    generator = torch.Generator().manual_seed(1)
    size, tokens = len(captions), clip.tokenize(captions)
    return {
        "key": [str(i) for i in range(size)],
        "image": torch.rand(size, 3, 16, 16, generator=generator) * 2 - 1,
        "image_embed": torch.randn(size, D, generator=generator),
        "text_embed": torch.randn(size, D, generator=generator),
        "tokens": tokens,
        "text_mask": clip.caption_mask(tokens),
        "text_tokens": tokenize_bpe(captions, LENGTH),
    }


CAPTIONS = [long_caption(0, 80 * f"{last} ") for last in ("cat", "dog")]


def test_the_captions_differ_after_position_77_only():
    one, other = tokenize_bpe(CAPTIONS, LENGTH)
    assert (one != other).nonzero().min() > 140


@pytest.mark.parametrize("name", STAGES)
def test_training_reads_the_end_of_a_long_caption(name, clip):
    stage, batch = stage_of(name), batch_of(CAPTIONS[:1] * 4, clip)
    other = batch | {"text_tokens": batch_of(CAPTIONS[1:] * 4, clip)["text_tokens"]}
    assert torch.equal(batch["tokens"], batch_of(CAPTIONS[1:] * 4, clip)["tokens"])

    def loss(batch: dict) -> torch.Tensor:
        return stage.loss(batch, torch.Generator().manual_seed(0))["loss"]

    assert torch.equal(loss(batch), loss(batch))
    assert not torch.equal(loss(batch), loss(other))
    assert torch.equal(loss(batch), loss(batch | {"tokens": batch["tokens"] * 0}))


@pytest.mark.parametrize("name", STAGES)
def test_what_is_drawn_depends_on_the_end_of_a_long_caption(name, clip):
    """Through the pipeline, as `unclip generate` and the evaluation draw."""
    stage = stage_of(name, clip=clip)
    decoder_ = stage if name == "decoder" else stage_of("decoder", clip=clip)
    model = UnCLIP(decoder_, None if name == "decoder" else stage, clip=clip)
    assert torch.equal(*model.embed_text(CAPTIONS).split(1))  # CLIP sees no difference

    def draw(caption: str) -> torch.Tensor:
        captions, seeds = [caption] * 8, range(8)
        if name == "decoder":
            return model.generate(captions, seeds, "caption")
        return model.sample_prior(captions, seeds)

    one, again, other = draw(CAPTIONS[0]), draw(CAPTIONS[0]), draw(CAPTIONS[1])
    assert torch.equal(one, again)
    assert (one - other).norm() > 1e-4 * one.norm()


def test_a_stage_that_reads_as_much_as_clip_is_given_clips_tokens(clip):
    model = UnCLIP(stage_of("decoder", 32, clip), clip=clip)
    assert torch.equal(*(model.generate([c], [0], "caption") for c in CAPTIONS))


@pytest.mark.parametrize("name", STAGES)
def test_data_that_do_not_fill_the_context_are_a_sentence(name, clip):
    data = SimpleNamespace(clip=clip, text_states=False, text_length=LENGTH, image_size=16)
    stage_of(name).check_data(data)
    for given in (None, 128):
        data.text_length = given
        with pytest.raises(UserError, match=r"data\.text_length to"):
            stage_of(name).check_data(data)
    data.text_length = 40
    with pytest.raises(UserError, match="null"):
        stage_of(name, 32).check_data(data)
    stage = stage_of(name)
    stage.text_config = replace(stage.text_config, vocab_size=1000)
    with pytest.raises(UserError, match="49408"):
        stage.check_data(data)


@pytest.mark.parametrize("name", STAGES)
def test_too_few_ids_for_clips_tokens_are_a_sentence(name, clip):
    data = SimpleNamespace(clip=clip, text_states=False, text_length=None, image_size=16)
    stage = stage_of(name, 32)
    stage.check_data(data)
    stage.text_config = replace(stage.text_config, vocab_size=300)
    with pytest.raises(UserError, match=r"vocab_size is 300, and the CLIP of the data has 49408"):
        stage.check_data(data)


@pytest.mark.parametrize("name", STAGES)
def test_a_context_shorter_than_clips_captions_is_a_sentence(name, clip):
    data = SimpleNamespace(clip=clip, text_states=False, text_length=None, image_size=16)
    with pytest.raises(UserError, match=r"captions of 32 tokens and .* is 16: set it to 32"):
        stage_of(name, 16).check_data(data)
