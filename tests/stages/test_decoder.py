"""The decoder: it drops as in the paper, conditions and guidance matter, and a sample does not
depend on its batch.
"""

from dataclasses import replace

import pytest
import torch

from tests.factories import fill_zeros, randomise, tiny_captions
from unclip_pl.diffusion.noise import Noise
from unclip_pl.diffusion.process import DiffusionConfig
from unclip_pl.networks.text import TextConfig
from unclip_pl.networks.unet import UNetConfig
from unclip_pl.stages.base import OptimizerConfig
from unclip_pl.stages.decoder import CondDropoutConfig, Decoder, DecoderSamplingConfig

NET = UNetConfig(
    image_size=16,
    width=32,
    mults=(1, 2),
    depth=1,
    attention=(8,),
    head_width=16,
    dropout=0.0,
    embed_dim=12,
    context_width=24,
)
TEXT = TextConfig(kind="states", states_width=10)


def decoder(**changes) -> Decoder:
    stage = Decoder(**{"net": NET, "text": TEXT} | changes)
    fill_zeros(stage.net)
    return stage


def batch(size: int = 4) -> dict:
    generator = torch.Generator().manual_seed(1)
    image = torch.rand(size, 3, 16, 16, generator=generator) * 2 - 1
    captions = tiny_captions(size, generator, embed=12, states=10, length=6)
    return captions | {"key": [str(i) for i in range(size)], "image": image}


@pytest.mark.parametrize("thumbnail", [0, 4])
def test_loss_is_a_mean_over_samples_and_every_parameter_gets_a_gradient(thumbnail):
    stage = decoder(net=replace(NET, thumbnail=thumbnail))
    losses = stage.loss(batch())
    assert losses["per_sample"].shape == losses["t"].shape == (4,)
    torch.testing.assert_close(losses["mse"], losses["per_sample"].mean())
    assert set(stage.scalars) == {name for name, value in losses.items() if value.ndim == 0}
    losses["loss"].backward()
    assert [name for name, p in stage.named_parameters() if p.grad is None] == []


def test_embedding_and_caption_are_dropped_independently_at_their_rates():
    stage = decoder(cond_dropout=CondDropoutConfig(embed=0.1, text=0.5))
    kept = []
    conditions = stage.conditions
    stage.conditions = lambda b, size, embed, text: (
        kept.append(torch.stack([embed, text])),
        conditions(b, size, embed, text),
    )[1]
    stage.net.forward = lambda x, t, **_: torch.zeros(len(x), 6, 16, 16, requires_grad=True)
    for _ in range(100):
        stage.loss(batch(40))
    embed, text = torch.cat(kept, 1).double()
    assert abs(embed.mean() - 0.9) < 0.02 and abs(text.mean() - 0.5) < 0.03
    assert abs((embed * text).mean() - 0.45) < 0.03  # 45 % both, 5 % only text: paper, section 2.1


@pytest.mark.parametrize("thumbnail", [0, 4])
def test_dropped_embedding_has_no_influence_and_a_kept_one_has(thumbnail):
    dropout = CondDropoutConfig(embed=1.0, text=1.0)
    stage = decoder(cond_dropout=dropout, net=replace(NET, thumbnail=thumbnail)).eval()
    one, two = batch(), batch() | {"image_embed": torch.randn(4, 12)}
    loss = lambda b: stage.loss(b, torch.Generator().manual_seed(3))["loss"]
    assert torch.equal(loss(one), loss(two))
    stage.cond_dropout = CondDropoutConfig(embed=0.0, text=1.0)
    assert not torch.equal(loss(one), loss(two))


def test_loss_trains_the_thumbnail_of_what_the_network_saw():
    """Added to the loss, of the embedding as it was after dropping; the rest does not change it."""
    stage = decoder(net=replace(NET, thumbnail=4)).eval()
    given = batch()
    losses = stage.loss(given)
    small = given["image"].unflatten(-1, (4, 4)).unflatten(-3, (4, 4)).mean((-1, -3))
    drawn = stage.net.clip_to_thumbnail
    keep = stage.loss(given, cond_dropout=CondDropoutConfig(embed=0.0))["thumbnail_mse"]
    guess = drawn(stage.normalizer.normalize(given["image_embed"]))
    torch.testing.assert_close(keep, (guess - small).square().mean())
    dropped = stage.loss(given, cond_dropout=CondDropoutConfig(embed=1.0))["thumbnail_mse"]
    torch.testing.assert_close(dropped, (drawn(stage.null_embed[None]) - small).square().mean())
    weights = list(drawn.parameters())
    of_loss = torch.autograd.grad(losses["loss"], weights, retain_graph=True)
    of_thumbnail = torch.autograd.grad(losses["thumbnail_mse"], weights)
    torch.testing.assert_close(of_loss, of_thumbnail)


@pytest.mark.parametrize("null", ["learned", "zeros"])
def test_null_embedding_is_learned_or_zero(null):
    stage = decoder(cond_dropout=CondDropoutConfig(null_embed=null))
    assert (dict(stage.named_parameters()).get("null_embed") is not None) == (null == "learned")
    assert stage.null_embed.any() == (null == "learned")
    assert "null_embed" in stage.state_dict()


def test_embedding_is_seen_at_one_scale():
    """Embeddings ten times as long must not change the image: the network sees unit norm."""
    stage = decoder().eval()
    given = batch()
    settings = DecoderSamplingConfig(sampler="ddim", steps=3)
    same = stage.sample(
        given | {"image_embed": given["image_embed"] * 10}, Noise(range(4)), settings
    )
    torch.testing.assert_close(
        same, stage.sample(given, Noise(range(4)), settings), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm_solver_pp"])
def test_image_k_is_the_same_in_any_batch(sampler):
    stage = decoder().eval()
    given = batch()
    settings = DecoderSamplingConfig(sampler=sampler, steps=4, guidance_scale=2.0, eta=0.5)
    whole = stage.sample(given, Noise([5, 6, 7, 8]), settings)
    part = stage.sample({key: value[1:3] for key, value in given.items()}, Noise([6, 7]), settings)
    torch.testing.assert_close(whole[1:3], part, rtol=1e-4, atol=1e-4)
    assert whole.abs().max() <= 1 and torch.isfinite(whole).all()


def test_guidance_is_applied_and_one_is_none():
    stage = decoder(diffusion=DiffusionConfig(parametrization="v")).eval()
    given = batch()
    draw = lambda scale, b=given: stage.sample(
        b,
        Noise(range(4)),
        DecoderSamplingConfig(sampler="ddim", steps=3, guidance_scale=scale, threshold=None),
    )
    assert (draw(1.0) - draw(3.0)).abs().max() > 1e-3
    null = draw(1.0, {})  # nothing given: only the null branch
    torch.testing.assert_close(draw(0.0), null, rtol=1e-4, atol=1e-4)


def test_every_condition_changes_the_picture():
    stage = decoder().eval()
    given, settings = batch(), DecoderSamplingConfig(sampler="ddim", steps=3)
    draw = lambda b: stage.sample(b, Noise(range(4)), settings)
    for change in (
        {"image_embed": torch.randn(4, 12)},
        {"text_states": torch.randn(4, 6, 10)},
        {"text_embed": torch.randn(4, 12)},
    ):
        assert (draw(given) - draw(given | change)).abs().max() > 1e-4, change.keys()
    without = {
        key: value for key, value in given.items() if not key.startswith("text") and key != "tokens"
    }
    assert (draw(given) - draw(without)).abs().max() > 1e-4


def test_wrong_number_of_output_channels_is_a_sentence():
    with pytest.raises(ValueError, match=r"fixed_small needs 3"):
        Decoder(net=NET, text=TEXT, diffusion=DiffusionConfig(variance="fixed_small"))


def test_hyperparameters_rebuild_the_stage():
    stage = decoder(
        diffusion=DiffusionConfig(parametrization="v"), sampling=DecoderSamplingConfig(steps=7)
    )
    again = Decoder(**stage.hparams)
    again.load_state_dict(stage.state_dict())
    settings = DecoderSamplingConfig(sampler="ddim", steps=2)
    assert torch.equal(
        again.eval().sample(batch(), Noise(range(4)), settings),
        stage.eval().sample(batch(), Noise(range(4)), settings),
    )
    assert again.sampling.steps == 7 and again.process.config.parametrization == "v"


@pytest.mark.slow
def test_it_overfits_eight_pictures():
    """Eight flat images of different colours, which only their embeddings tell apart: each must
    come back in its own colour."""
    stage = Decoder(
        net=UNetConfig(
            image_size=8,
            width=32,
            mults=(1,),
            depth=1,
            attention=(),
            middle_attention=False,
            dropout=0.0,
            embed_dim=8,
            embed_tokens=0,
        ),
        diffusion=DiffusionConfig(parametrization="v"),
        optimizer=OptimizerConfig(lr=3e-3),
    )
    colours = torch.tensor(
        [[r, g, b] for r in (-0.8, 0.8) for g in (-0.8, 0.8) for b in (-0.8, 0.8)]
    )
    data = {
        "key": list("abcdefgh"),
        "image": colours[:, :, None, None].expand(8, 3, 8, 8).contiguous(),
        "image_embed": torch.eye(8),
    }
    optimizer = torch.optim.AdamW(stage.parameters(), lr=3e-3)
    many = {
        key: value * 4 if isinstance(value, list) else value.repeat(4, *[1] * (value.ndim - 1))
        for key, value in data.items()
    }
    for _ in range(250):
        optimizer.zero_grad()
        stage.loss(many)["loss"].backward()
        optimizer.step()
    drawn = stage.eval().sample(
        data, Noise(range(8)), DecoderSamplingConfig(sampler="ddim", steps=20, guidance_scale=1.0)
    )
    assert (drawn.mean((2, 3)) - colours).abs().max() < 0.25


def test_decoder_on_text_embeddings_trains_and_draws_as_one_on_image_embeddings_that_gets_those():
    """Swapping the two entries of the batch must be all that the flag does."""
    text = Decoder(net=NET, text=TextConfig(kind="none"), condition="text")
    image = Decoder(net=NET, text=TextConfig(kind="none"))
    text.load_state_dict(image.state_dict())
    given = batch()
    swapped = given | {"image_embed": given["text_embed"], "text_embed": given["image_embed"]}
    losses = [
        stage.loss(entries, torch.Generator().manual_seed(3))["loss"]
        for stage, entries in ((text, given), (image, swapped), (image, given))
    ]
    assert losses[0] == losses[1]
    for stage in (image, text):
        for parameter in stage.net.parameters():
            torch.nn.init.normal_(parameter, std=0.05, generator=torch.Generator().manual_seed(4))
    draw = lambda stage, entries: stage.eval().sample(
        entries, Noise(range(4)), DecoderSamplingConfig(sampler="ddim", steps=2)
    )
    assert torch.equal(draw(text, given), draw(image, swapped)) and not torch.equal(
        draw(text, given), draw(image, given)
    )
    assert torch.equal(draw(text, given | {"embed": given["image_embed"]}), draw(image, given))
    assert torch.equal(draw(image, given | {"embed": None}), draw(image, {}))


def test_condition_that_is_none_of_the_two_is_refused_and_older_releases_have_the_first():
    with pytest.raises(ValueError, match='knows no condition "caption"'):
        decoder(condition="caption")
    older = {name: value for name, value in decoder().hparams.items() if name != "condition"}
    assert Decoder(**older).condition == "image"
    assert Decoder(**decoder(condition="text").hparams).condition == "text"


@pytest.mark.parametrize(
    ("condition", "kind"), [("image", "states"), ("text", "states"), ("text", "none")]
)
def test_validation_tells_the_loss_with_captions_from_that_with_dropped_ones(condition, kind):
    """With `condition: text` the embedding is the caption's: it stays as well."""
    dropout, of_both = CondDropoutConfig(0.3, 0.3), CondDropoutConfig(0.0, 0.0)
    captioned = of_both if condition == "text" else replace(dropout, text=0.0)
    stage = decoder(condition=condition, text=replace(TEXT, kind=kind), cond_dropout=dropout)
    given, logged = batch(16), {}
    randomise(stage)
    stage.eval()
    stage.log_dict = lambda values, **_: logged.update(values)
    with torch.no_grad():
        stage.validation_step(given, 3)
        generators = [torch.Generator().manual_seed(3) for _ in range(2)]
        one = stage.loss(given, generators[0])["per_sample"]
        kept = stage.loss(given, generators[1], captioned)
    same = torch.isclose(one, kept["per_sample"], rtol=1e-4)
    assert 2 < same.sum() < 14  # the same noise, and some of the captions dropped
    assert logged["val/loss_captioned"] == kept["loss"]
    assert not torch.isclose(logged["val/loss"], logged["val/loss_captioned"])


@pytest.mark.parametrize("name", ["embed", "text"])
def test_a_share_that_is_none_is_refused(name):
    with pytest.raises(ValueError, match=rf"model\.cond_dropout\.{name} is -0\.1"):
        CondDropoutConfig(**{name: -0.1})


@pytest.mark.parametrize("condition", ["image", "text"])
def test_a_context_that_nothing_fills_is_refused(condition):
    empty = {"net": replace(NET, embed_tokens=0), "text": TextConfig(), "condition": condition}
    with pytest.raises(ValueError, match=r"context_width is 24, and neither .*: set one of"):
        decoder(**empty)
    decoder(**empty | {"text": TEXT})
    decoder(**empty | {"net": replace(NET, embed_tokens=0, context_width=0)})
    decoder(**empty | {"net": NET})
