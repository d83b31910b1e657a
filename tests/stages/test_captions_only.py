"""A decoder that reads captions only (GLIDE): no CLIP is part of it, nor of what it draws."""

from dataclasses import replace

import pytest
import torch

from tests.data.fitkit import data_of
from tests.data.shardkit import write_shards
from tests.factories import captions_decoder, package_decoder
from unclip_pl.datamodules.image_embedding import ImageEmbeddingData
from unclip_pl.diffusion.noise import Noise
from unclip_pl.networks.ar_prior import ARPriorConfig
from unclip_pl.networks.text import TextConfig, TextContext
from unclip_pl.networks.unet import UNetConfig
from unclip_pl.pipeline.unclip import UnCLIP
from unclip_pl.planner import estimate_resources
from unclip_pl.stages.ar_prior import ARPrior
from unclip_pl.stages.decoder import Decoder
from unclip_pl.stages.diffusion_prior import DiffusionPrior
from unclip_pl.utils.errors import UserError

OWN = TextConfig("transformer", vocab_size=260, width=16, depth=1, heads=2, tokenizer="gpt2")
NET = {"width": 32, "mults": (1,), "depth": 1, "head_width": 32, "context_width": 16}
CAPTIONS = ["an apple", "two dogs", ""]


@pytest.fixture
def stage():
    return captions_decoder()


def batch():
    image = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return {"key": ["a", "b", "c"], "image": image, "caption": CAPTIONS}


def loss(stage, given, **dropout):
    dropout = replace(stage.cond_dropout, **dropout)
    return stage.loss(given, torch.Generator().manual_seed(3), dropout)["per_sample"]


def test_every_parameter_gets_a_gradient_from_images_and_captions(stage):
    stage.train().loss(batch(), cond_dropout=replace(stage.cond_dropout, text=0.5))[
        "loss"
    ].backward()
    assert [name for name, p in stage.named_parameters() if p.grad is None] == []


def test_the_caption_counts_and_nothing_else_does(stage):
    one = loss(stage, batch(), text=0.0)
    two = loss(stage, batch() | {"caption": ["an egg", "two dogs", ""]}, text=0.0)
    assert one[0] != two[0] and torch.equal(one[1:], two[1:])
    clip = {"tokens": torch.ones(3, 4, dtype=torch.int64), "text_embed": torch.randn(3, 5)}
    clip |= {"image_embed": torch.randn(3, 5), "text_mask": torch.ones(3, 4, dtype=torch.bool)}
    assert torch.equal(loss(stage, batch() | clip, text=0.0), one)
    dropped = loss(stage, batch(), text=1.0)
    assert dropped[0] != one[0] and dropped[2] == one[2]  # the empty caption is the dropped one


def test_a_batch_is_drawn_as_each_caption_alone(stage):
    drawn = stage.sample({"caption": CAPTIONS}, Noise([1, 2, 3]))
    for k, caption in enumerate(CAPTIONS):
        alone = stage.sample({"caption": [caption]}, Noise([k + 1]))
        torch.testing.assert_close(alone[0], drawn[k], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(stage.sample({}, Noise([3]))[0], drawn[2], rtol=1e-4, atol=1e-4)


def test_the_tokenizer_comes_with_the_weights(stage):
    assert stage.text.tokenize(["Apple"])[0].tolist() == [257, 258, *[259] * 6]
    fresh = Decoder(**stage.hparams)
    with pytest.raises(UserError, match="--init"):
        fresh.loss(batch())
    fresh.load_state_dict(stage.state_dict())
    assert torch.equal(fresh.text.tokenize(CAPTIONS), stage.text.tokenize(CAPTIONS))
    state = stage.state_dict() | {"text.encoder.merges": torch.tensor([[1, 2], [3, 4], [5, 6]])}
    fresh.load_state_dict(state)  # others
    assert fresh.text.tokenize(["apple"])[0, 0] < 256
    with pytest.raises(ValueError, match="CLIP's tokens"):
        TextContext(TextConfig("states", states_width=4), 8).tokenize(["apple"])


def test_the_pipeline_needs_no_clip_and_refuses_embeddings(stage):
    unclip = UnCLIP(stage)
    assert unclip.clip.config.model == "openmoji"  # to compare with, not to draw from
    drawn = unclip.generate(CAPTIONS, [1, 2, 3], "caption")
    assert torch.equal(drawn, stage.sample({"caption": CAPTIONS}, Noise([1, 2, 3])))
    assert torch.equal(drawn, unclip.decode(None, [1, 2, 3], CAPTIONS))
    with pytest.raises(UserError, match="takes no embedding"):
        unclip.generate(CAPTIONS, [1, 2, 3], "text")
    with pytest.raises(UserError, match="takes no embedding"):
        unclip.decode(torch.randn(1, 256), [1])
    with pytest.raises(UserError, match="no prior"):
        unclip.generate(CAPTIONS, [1, 2, 3])
    with pytest.raises(UserError, match="reads captions only"):
        UnCLIP(stage, DiffusionPrior.__new__(DiffusionPrior))


def test_data_of_any_clip_fit(stage, tmp_path):
    data = data_of(ImageEmbeddingData, write_shards(tmp_path, [9]), store=tmp_path / "store")
    data.prepare_data()
    data.setup("fit")
    data.image_size = 16
    stage.check_data(data)
    data.text_length = 99
    with pytest.raises(UserError, match="tokenises captions itself: set it to null"):
        stage.check_data(data)


def test_a_plan_counts_it(stage):
    with torch.device("meta"):
        planned = Decoder(**stage.hparams)
    estimate = estimate_resources(planned)
    assert estimate.parameters == sum(p.numel() for p in stage.parameters())
    assert estimate.flops > 0


def test_settings_that_do_not_fit_are_refused():
    net = UNetConfig(image_size=16, attention=(16,), **NET)
    with pytest.raises(ValueError, match="embed_dim is 0"):
        Decoder(net, OWN)
    with pytest.raises(ValueError, match="set it to 0"):
        Decoder(replace(net, embed_dim=8), OWN, condition="none")
    for kind in (TextConfig(), TextConfig("states", states_width=4)):
        with pytest.raises(ValueError, match="set it to transformer"):
            Decoder(net, kind, condition="none")
    with pytest.raises(ValueError, match='use one of "clip", "gpt2"'):
        TextConfig("transformer", tokenizer="bert")
    with pytest.raises(ValueError, match='for kind "transformer"'):
        TextConfig("states", states_width=4, tokenizer="gpt2")
    with pytest.raises(ValueError, match="vocab_size is 257"):
        TextConfig("transformer", vocab_size=257, tokenizer="gpt2")
    with pytest.raises(ValueError, match="reads the tokens of CLIP"):
        ARPrior(ARPriorConfig(embed_dim=6, width=32, depth=1, heads=2), OWN)


def test_with_clips_tokens_it_needs_that_clip():
    net = UNetConfig(image_size=16, attention=(16,), **NET)
    text = TextConfig("transformer", width=16, depth=1, heads=2)
    stage = Decoder(net, text, condition="none").eval()
    assert stage.reads_clip
    with pytest.raises(UserError, match="which CLIP"):
        UnCLIP(stage)
    stage.clip_fingerprint = package_decoder().clip_fingerprint
    assert UnCLIP(stage).generate(["apple"], [0], "caption").shape == (1, 3, 16, 16)
