"""What reaches the decoder in each arm: what its row says, and nothing through another door."""

import pytest
import torch

from eval import arms
from eval.captions import read_captions
from eval.source import Model
from tests.eval import tiny
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.data.shards import decode
from unclip_pl.pipeline.unclip import UnCLIP
from unclip_pl.pipeline.weights import DEFAULT_PRIORS, load_stage
from unclip_pl.stages.ar_prior import ARPrior, ARPriorSamplingConfig

SEED = 5


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    """Four drawings of 100 pixels: neither the decoder's size nor CLIP's."""
    return tiny.shards(tmp_path_factory.mktemp("drawings"), 4, size=100)


@pytest.fixture(scope="module", params=[False, True], ids=["no z_t", "z_t with the timestep"])
def all_arms(request, tmp_path_factory, shard):
    """Every arm of a decoder whose `text.pooled` is off, and of one where it is on."""
    folder = tmp_path_factory.mktemp("stages")
    models = [
        Model(str(tiny.decoder(folder / kind, kind, pooled=request.param)))
        for kind in ("image", "text")
    ]
    image, text = models
    captions = read_captions(str(shard))
    found = [arms.of_caption(image, captions, SEED), arms.of_text(image, captions, SEED)]
    found.append(arms.of_text(text, captions, SEED, "text-decoder"))
    prior = load_stage(DEFAULT_PRIORS["ar"], ARPrior)
    unclip = UnCLIP(image.unclip.decoder, prior, image.unclip.clip)
    found.append(arms.of_prior("ar", image, unclip, {}, ARPriorSamplingConfig(), captions, SEED))
    found.append(arms.of_image(image, captions, SEED))
    return request.param, {arm.name: arm for arm in found}


def pictures(arm: arms.Arm) -> torch.Tensor:
    sampling = arm.model.unclip.decoder.sampling
    return arm.draw(sampling)(range(4))


def swapped(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Give each caption the `embed` or the `states` of another one; the rest stays its own."""
    own = FrozenCLIP.embed_text

    def embed_text(self, tokens):
        text = own(self, tokens)
        return text._replace(**{name: getattr(text, name).roll(1, 0)})

    monkeypatch.setattr(FrozenCLIP, "embed_text", embed_text)


@pytest.mark.parametrize("name", ["caption", "text", "text-decoder", "ar", "image"])
def test_z_t_reaches_the_decoder_only_where_the_arm_says_so(all_arms, name, monkeypatch):
    """With the embedding held, z_t of another caption must not move a bit; its tokens must."""
    pooled, found = all_arms
    arm = found[name]
    before = pictures(arm)  # the embeddings are remembered from here on
    with monkeypatch.context() as patch:
        swapped(patch, "embed")
        moved = not torch.equal(pictures(arm), before)
    assert moved == (arm.sees.text_embed == "yes") == (pooled and name != "caption")
    with monkeypatch.context() as patch:
        swapped(patch, "states")
        assert not torch.equal(pictures(arm), before)


def test_the_caption_alone_is_without_any_embedding(all_arms, monkeypatch):
    """Drawn again with another caption's z_t: nothing is remembered, and nothing may change."""
    pooled, found = all_arms
    captions = found["caption"].captions
    before = pictures(found["caption"])
    swapped(monkeypatch, "embed")
    arm = arms.of_caption(found["caption"].model, captions, SEED)
    assert torch.equal(pictures(arm), before)
    text = arms.of_text(found["text"].model, captions, SEED)  # the same check can fail
    assert not torch.equal(pictures(text), pictures(found["text"]))
    assert str(arm.sees) == "the caption's tokens" + (" + z_t's null" if pooled else "")
    batch = arm.conditions(range(4), range(4))
    assert batch["embed"] is None and "text_embed" not in batch


def test_what_arms_say_that_they_see(all_arms):
    pooled, found = all_arms
    more = " + the caption's tokens" + (" + z_t with the timestep" if pooled else "")
    assert {name: str(arm.sees) for name, arm in found.items() if name != "caption"} == {
        "text": f"z_t as the embedding{more}",
        "text-decoder": f"z_t as the embedding{more}",
        "ar": f"z_i of the prior{more}",
        "image": f"z_i of the caption's picture{more}",
    }
    drawn = found["text"].drawn(tiny.Path("x"), found["text"].model.unclip.decoder.sampling)
    assert drawn.settings["decoder sees"]["text_embed"] == ("yes" if pooled else "no")


def test_true_image_comes_to_clip_at_clips_own_size(all_arms):
    """Not after a cut to the decoder's 16 pixels, which loses most of it."""
    arm = all_arms[1]["image"]
    unclip = arm.model.unclip
    stored = {
        size: unclip.embed_images(torch.stack([decode(one.image, size) for one in arm.captions]))
        for size in (64, 16)
    }
    found = arm.embed(range(4), range(4))
    assert torch.allclose(found, stored[64], atol=1e-5)
    assert not torch.allclose(found, stored[16], atol=1e-1)


def test_another_picture_of_a_caption_has_other_noise_and_another_draw_of_the_prior(all_arms):
    arm = all_arms[1]["ar"]
    sampling = arm.model.unclip.decoder.sampling
    first, second = (arm.draw(sampling, repeat)([1]) for repeat in (0, 1))
    assert not torch.equal(first, second)
    seeds = [SEED + 1, SEED + arms.SEED_STEP + 1]
    assert not torch.equal(arm.embed([1], seeds[:1]), arm.embed([1], seeds[1:]))
    shifted = arms.of_caption(arm.model, arm.captions, SEED + arms.SEED_STEP)
    caption = arms.of_caption(arm.model, arm.captions, SEED)
    assert torch.equal(caption.draw(sampling, 1)([1]), shifted.draw(sampling)([1]))


def test_a_prior_at_another_guidance_is_another_arm(all_arms):
    arm = all_arms[1]["ar"]
    other = arm.with_guidance(3.0)
    assert (arm.prior_scale, other.prior_scale, other.name) == (1.0, 3.0, "ar")
    assert not torch.equal(arm.embed([0], [9]), other.embed([0], [9]))
    assert all_arms[1]["text"].prior_scale is None


def test_priors_are_drawn_once_whatever_the_guidance():
    calls = []

    def make(indices, seeds):
        calls.append(list(zip(indices, seeds)))
        return torch.tensor([[float(k), float(seed)] for k, seed in zip(indices, seeds)])

    embed = arms.remembered(make)
    assert embed([3, 4], [7, 8]).tolist() == embed([3, 4], [7, 8]).tolist() == [[3, 7], [4, 8]]
    assert embed([4], [8]).tolist() == [[4, 8]] and calls == [[(3, 7), (4, 8)]]
    assert embed([4], [9]).tolist() == [[4, 9]]


def test_upsamplers_enlarge_what_the_decoder_draws_with_the_same_seeds(tmp_path, shard):
    captions = read_captions(str(shard))
    decoder, larger = tiny.decoder(tmp_path / "decoder"), str(tiny.upsampler(tmp_path / "larger"))
    model = Model(str(decoder), upsamplers=[larger])
    assert model.size == 64
    small = arms.of_caption(Model(str(decoder)), captions, SEED)
    large = arms.of_caption(model, captions, SEED)
    expected = model.unclip.upsample(pictures(small), [SEED + k for k in range(4)])
    assert torch.equal(pictures(large), expected) and expected.shape == (4, 3, 64, 64)
