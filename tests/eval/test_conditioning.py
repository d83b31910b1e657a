"""What reaches the decoder under each condition: what its row says, and nothing else."""

from dataclasses import replace

import pytest
import torch

from eval import conditioning
from eval.captions import read_captions
from eval.source import Model
from tests.eval import tiny
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.data.decoding import decode
from unclip_pl.pipeline.locate import DEFAULT_PRIORS
from unclip_pl.pipeline.unclip import UnCLIP
from unclip_pl.pipeline.weights import load_stage
from unclip_pl.stages.ar_prior import ARPrior, ARPriorSamplingConfig
from unclip_pl.utils.errors import UserError

SEED = 5


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """Four drawings of 100 pixels: neither the decoder's size nor CLIP's."""
    return tiny.shards(tmp_path_factory.mktemp("drawings"), 4, size=100)


@pytest.fixture(scope="module", params=[False, True], ids=["no z_t", "z_t with the timestep"])
def all_conditions(request, tmp_path_factory, shard):
    """Every condition of a decoder whose `text.pooled` is off, and of one where it is on."""
    folder = tmp_path_factory.mktemp("stages")
    image = Model(str(tiny.decoder(folder / "image", "image", pooled=request.param)))
    text = Model(str(tiny.decoder(folder / "text", "text", pooled=request.param)))
    captions = read_captions(str(shard))
    prior = load_stage(DEFAULT_PRIORS["ar"], ARPrior)
    unclip = UnCLIP(image.unclip.decoder, prior, image.unclip.clip)
    conditions = [
        conditioning.from_caption(image, captions, SEED),
        conditioning.from_text(image, captions, SEED),
        conditioning.from_text(text, captions, SEED, "text-decoder"),
        conditioning.from_prior("ar", image, unclip, {}, ARPriorSamplingConfig(), captions, SEED),
        conditioning.from_image(image, captions, SEED),
    ]
    return request.param, {condition.name: condition for condition in conditions}


def draw(condition: conditioning.Conditioning) -> torch.Tensor:
    sampling = condition.model.unclip.decoder.sampling
    return condition.sampler(sampling)(range(4))


def swap(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Give each caption the `embed` or the `states` of another one; the rest stays its own."""
    own = FrozenCLIP.embed_text

    def embed_text(self, tokens):
        text = own(self, tokens)
        return text._replace(**{name: getattr(text, name).roll(1, 0)})

    monkeypatch.setattr(FrozenCLIP, "embed_text", embed_text)


@pytest.mark.parametrize("name", ["caption", "text", "text-decoder", "ar", "image"])
def test_z_t_reaches_the_decoder_only_where_the_condition_says_so(
    all_conditions, name, monkeypatch
):
    """With the embedding held, z_t of another caption must not move a bit; its tokens must."""
    pooled, found = all_conditions
    condition = found[name]
    before = draw(condition)  # the embeddings are cached from here on
    with monkeypatch.context() as patch:
        swap(patch, "embed")
        moved = not torch.equal(draw(condition), before)
    assert moved == (condition.inputs.text_embed == "yes") == (pooled and name != "caption")
    with monkeypatch.context() as patch:
        swap(patch, "states")
        assert not torch.equal(draw(condition), before)


def test_the_caption_only_is_without_any_embedding(all_conditions, monkeypatch):
    """Drawn again with another caption's z_t, without a cache: nothing may change."""
    pooled, found = all_conditions
    captions = found["caption"].captions
    before = draw(found["caption"])
    swap(monkeypatch, "embed")
    condition = conditioning.from_caption(found["caption"].model, captions, SEED)
    assert torch.equal(draw(condition), before)
    text = conditioning.from_text(found["text"].model, captions, SEED)  # the same check can fail
    assert not torch.equal(draw(text), draw(found["text"]))
    assert str(condition.inputs) == "the caption's tokens" + (" + z_t's null" if pooled else "")
    batch = condition.decoder_batch(range(4), range(4))
    assert batch["embed"] is None and "text_embed" not in batch


def test_what_conditions_say_that_the_decoder_sees(all_conditions):
    pooled, found = all_conditions
    more = " + the caption's tokens" + (" + z_t with the timestep" if pooled else "")
    assert {
        name: str(condition.inputs) for name, condition in found.items() if name != "caption"
    } == {
        "text": f"z_t as the embedding{more}",
        "text-decoder": f"z_t as the embedding{more}",
        "ar": f"z_i of the prior{more}",
        "image": f"z_i of the caption's picture{more}",
    }
    drawn = found["text"].generate(tiny.Path("x"), found["text"].model.unclip.decoder.sampling)
    assert drawn.settings["decoder sees"]["text_embed"] == ("yes" if pooled else "no")


def test_true_image_comes_to_clip_at_clips_own_size(all_conditions):
    """Not after a cut to the decoder's 16 pixels, which loses most of it."""
    condition = all_conditions[1]["image"]
    unclip = condition.model.unclip
    stored = {
        size: unclip.embed_images(
            torch.stack([decode(one.image, size) for one in condition.captions])
        )
        for size in (64, 16)
    }
    found = condition.embed(range(4), range(4))
    assert torch.allclose(found, stored[64], atol=1e-5)
    assert not torch.allclose(found, stored[16], atol=1e-1)


def test_images_of_other_pictures_are_not_taken_for_these(all_conditions, tmp_path):
    """The same captions with their pictures in another order."""
    condition = all_conditions[1]["image"]
    sampling = condition.model.unclip.decoder.sampling
    condition.generate(tmp_path, sampling).check_manifest()
    pictures = [caption.image for caption in condition.captions]
    captions = [
        replace(caption, image=picture)
        for caption, picture in zip(condition.captions, reversed(pictures), strict=True)
    ]
    other = conditioning.from_image(condition.model, captions, SEED)
    with pytest.raises(UserError, match="pictures"):
        other.generate(tmp_path, sampling).check_manifest()
    conditioning.from_image(condition.model, condition.captions, SEED).generate(
        tmp_path, sampling
    ).check_manifest()


def test_another_picture_of_a_caption_has_other_noise_and_another_draw_of_the_prior(all_conditions):
    condition = all_conditions[1]["ar"]
    sampling = condition.model.unclip.decoder.sampling
    first, second = (condition.sampler(sampling, repeat)([1]) for repeat in (0, 1))
    assert not torch.equal(first, second)
    seeds = [SEED + 1, SEED + conditioning.SEED_STEP + 1]
    assert not torch.equal(condition.embed([1], seeds[:1]), condition.embed([1], seeds[1:]))
    shifted = conditioning.from_caption(
        condition.model, condition.captions, SEED + conditioning.SEED_STEP
    )
    caption = conditioning.from_caption(condition.model, condition.captions, SEED)
    assert torch.equal(caption.sampler(sampling, 1)([1]), shifted.sampler(sampling)([1]))


def test_a_prior_at_another_guidance_is_another_condition(all_conditions):
    condition = all_conditions[1]["ar"]
    other = condition.with_guidance(3.0)
    assert (condition.prior_scale, other.prior_scale, other.name) == (1.0, 3.0, "ar")
    assert not torch.equal(condition.embed([0], [9]), other.embed([0], [9]))
    assert all_conditions[1]["text"].prior_scale is None


def test_priors_are_drawn_once_whatever_the_guidance():
    calls = []

    def make(indices, seeds):
        calls.append(list(zip(indices, seeds)))
        return torch.tensor([[float(k), float(seed)] for k, seed in zip(indices, seeds)])

    embed = conditioning.cache_embeddings(make)
    assert embed([3, 4], [7, 8]).tolist() == embed([3, 4], [7, 8]).tolist() == [[3, 7], [4, 8]]
    assert embed([4], [8]).tolist() == [[4, 8]] and calls == [[(3, 7), (4, 8)]]
    assert embed([4], [9]).tolist() == [[4, 9]]


def test_upsamplers_enlarge_what_the_decoder_draws_with_the_same_seeds(tmp_path, shard):
    captions = read_captions(str(shard))
    decoder, larger = tiny.decoder(tmp_path / "decoder"), str(tiny.upsampler(tmp_path / "larger"))
    model = Model(str(decoder), upsamplers=[larger])
    assert model.size == 64
    small = conditioning.from_caption(Model(str(decoder)), captions, SEED)
    large = conditioning.from_caption(model, captions, SEED)
    expected = model.unclip.upsample(draw(small), [SEED + k for k in range(4)])
    assert torch.equal(draw(large), expected) and expected.shape == (4, 3, 64, 64)
