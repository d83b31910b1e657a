"""`UnCLIP`: captions and images through either prior, the three conditions, and the assets."""

import json
from dataclasses import replace

import pytest
import torch
import yaml

from tests.conftest import ROOT
from tests.factories import package_decoder, write_release
from unclip_pl.clip.fingerprint import ClipMismatch
from unclip_pl.networks.layers import Block
from unclip_pl.pipeline.locate import ASSETS, DEFAULT_DECODER, DEFAULT_PRIORS
from unclip_pl.pipeline.unclip import UnCLIP
from unclip_pl.stages.diffusion_prior import DiffusionPrior
from unclip_pl.utils.errors import UserError

PROMPTS = ["woman firefighter, dark skin tone", "waving hand"]


@pytest.fixture
def decoder():
    return package_decoder()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A decoder release with random weights."""
    return write_release(tmp_path_factory.mktemp("decoder") / "release", package_decoder())


@pytest.fixture(scope="module", params=["diffusion", "ar"])
def unclip(request, folder):
    return UnCLIP.load(folder, request.param)


def test_both_priors_of_the_package_draw_from_captions(unclip):
    drawn = unclip.generate(PROMPTS, [3, 4])
    assert drawn.shape == (2, 3, 16, 16) and torch.isfinite(drawn).all() and drawn.abs().max() <= 1
    alone = unclip.generate(PROMPTS[1:], [4])
    # picture k depends only on caption and seed k
    torch.testing.assert_close(drawn[1], alone[0], rtol=1e-3, atol=1e-3)
    assert not torch.allclose(drawn[1], unclip.generate(PROMPTS[1:], [5])[0], atol=1e-2)


def test_a_drawn_embedding_is_nearer_to_its_caption_than_to_another(unclip):
    captions = [*PROMPTS, "bicycle", "green apple", "fox", "umbrella with rain drops"]
    drawn = unclip.sample_prior(captions, range(len(captions)))
    assert drawn.shape == (len(captions), 256)
    similarity = unclip.clip.similarity(drawn, unclip.embed_text(captions))
    assert similarity.argmax(1).tolist() == list(range(len(captions)))


def test_three_conditions_are_one_argument(unclip, monkeypatch):
    seen = []
    monkeypatch.setattr(unclip, "decode", lambda embed, *rest: seen.append(embed))
    for condition in ("prior", "text", "caption"):
        unclip.generate(PROMPTS, [0, 1], condition)
    torch.testing.assert_close(seen[0], unclip.sample_prior(PROMPTS, [0, 1]))
    assert torch.equal(seen[1], unclip.embed_text(PROMPTS)) and seen[2] is None
    with pytest.raises(ValueError, match="no condition"):
        unclip.generate(PROMPTS, [0, 1], "nothing")


def test_steps_are_reported_by_stage(unclip):
    steps = []
    unclip.generate(PROMPTS[:1], [0], callback=lambda *step: steps.append(step))
    stages = [stage for stage, _, _ in steps]
    first = stages.index("decoder")
    assert set(stages[:first]) == {"prior"} and set(stages[first:]) == {"decoder"}
    for stage, step, count in (steps[first - 1], steps[-1]):
        assert step == count, stage


def test_without_a_prior_captions_still_draw_and_the_prior_is_asked_for(folder):
    unclip = UnCLIP.load(folder)
    assert unclip.generate(PROMPTS, [0, 1], "text").shape == (2, 3, 16, 16)
    with pytest.raises(UserError, match="no prior"):
        unclip.generate(PROMPTS, [0, 1])


def test_prior_and_decoder_of_different_clips_are_refused(folder):
    unclip = UnCLIP.load(folder, "diffusion")
    unclip.prior.clip_fingerprint = unclip.prior.clip_fingerprint | {"embed_dim": 512}
    with pytest.raises(ClipMismatch, match="The prior"):
        UnCLIP(unclip.decoder, unclip.prior)
    unclip.prior.clip_fingerprint = None
    with pytest.raises(UserError, match="The prior"):
        UnCLIP(unclip.decoder, unclip.prior)


@pytest.mark.parametrize("compile", [False, True])
def test_blocks_of_all_stages_are_compiled_if_asked_under_the_same_names(compile):
    """The compiler itself runs at the first picture, which is not drawn here."""
    unclip = UnCLIP.load("openmoji", "diffusion", upsamplers=["256"], compile=compile)
    plain = UnCLIP.load("openmoji", "diffusion", upsamplers=["256"])
    assert len(unclip.stages) == 3
    for stage, expected in zip(unclip.stages, plain.stages, strict=True):
        blocks = [module for module in stage.modules() if isinstance(module, Block)]
        compiled = [block for block in blocks if block._compiled_call_impl is not None]
        assert blocks and len(compiled) == (len(blocks) if compile else 0)
        assert list(stage.state_dict()) == list(expected.state_dict())


def test_there_must_be_a_seed_for_each_caption(folder):
    unclip = UnCLIP.load(folder)
    with pytest.raises(ValueError, match="2 captions and 1 seeds"):
        unclip.generate(PROMPTS, [0], "text")
    for condition in ("text", "caption", "prior"):
        with pytest.raises(ValueError, match="No captions and no seeds"):
            unclip.generate([], [], condition)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_there_must_be_as_many_conditions_as_seeds(decoder, scale):
    unclip = UnCLIP(decoder)
    settings, embeds = replace(decoder.sampling, guidance_scale=scale), torch.randn(3, 256)
    starts, noise = torch.zeros(2, 3, 16, 16), range(3)
    for embed, captions, x_T, said in (
        (embeds[:2], None, None, "2 embeddings"),
        (embeds[:1], None, None, "1 embeddings"),
        (embeds, PROMPTS, None, "2 captions"),
        (None, PROMPTS[:1], None, "1 captions"),
        (embeds, None, starts, "2 starts"),
    ):
        with pytest.raises(ValueError, match=f"3 pictures are asked for, .* {said} were given"):
            unclip.decode(embed, noise, captions, settings, x_T=x_T)
        if x_T is None:
            with pytest.raises(ValueError, match=said):
                unclip.run_sampler(lambda *_: starts, 3, embed, captions, settings)
    with pytest.raises(ValueError, match="No seeds"):
        unclip.decode(None, [])


def test_priors_of_the_package_are_small_and_have_cards():
    for path in DEFAULT_PRIORS.values():
        assert sum(file.stat().st_size for file in path.iterdir()) <= 8_000_000
        assert "OpenMoji" in (path / "README.md").read_text(encoding="utf-8")
        assert json.loads((path / "config.json").read_text())["clip_fingerprint"]


def test_decoder_of_another_clip_is_refused(decoder):
    decoder.clip_fingerprint = decoder.clip_fingerprint | {"embed_dim": 768}
    with pytest.raises(ClipMismatch, match="embed dim"):
        UnCLIP(decoder)
    decoder.clip_fingerprint = None
    with pytest.raises(UserError, match="which CLIP"):
        UnCLIP(decoder)


def test_three_ways_to_condition(decoder):
    unclip = UnCLIP(decoder)
    embed = unclip.embed_images(torch.rand(2, 3, 80, 64) * 2 - 1)
    drawn = unclip.decode(embed, [3, 4])
    assert drawn.shape == (2, 3, 16, 16) and drawn.abs().max() <= 1
    torch.testing.assert_close(unclip.decode(embed[1:], [4])[0], drawn[1], rtol=1e-4, atol=1e-4)
    assert not torch.equal(unclip.decode(None, [3, 4]), drawn)


def test_decoder_on_text_embeddings_gets_those_of_the_captions_and_wants_no_prior(decoder):
    text = package_decoder(condition="text")
    text.load_state_dict(decoder.state_dict())
    unclip, captions = UnCLIP(text), ["dog", "cat"]
    drawn = unclip.generate(captions, [3, 4], "text")
    assert torch.equal(drawn, UnCLIP(decoder).decode(unclip.embed_text(captions), [3, 4], captions))
    assert not torch.equal(drawn, unclip.generate(captions, [3, 4], "caption"))
    with pytest.raises(UserError, match="no prior"):
        unclip.generate(captions, [3, 4])
    with pytest.raises(UserError, match="no use for a prior"):
        UnCLIP(text, DiffusionPrior.__new__(DiffusionPrior))


def test_assets_of_the_package_are_whole_and_small():
    """What a newcomer draws with: the CLIP and the decoder load, fit each other, and stay small."""
    unclip = UnCLIP.load()
    assert unclip.decoder.net_config.image_size == 64
    clips = [ASSETS / name for name in ("clip-openmoji", "clip-openmoji-judge")]
    for folder, limit in {DEFAULT_DECODER: 20, clips[0]: 16, clips[1]: 8}.items():
        assert sum(file.stat().st_size for file in folder.iterdir()) <= limit * 1_000_000
        assert "OpenMoji" in (folder / "README.md").read_text(encoding="utf-8")


def test_the_decoder_in_the_package_draws_as_its_stage_says():
    stage = yaml.safe_load((ROOT / "stages/decoder.yaml").read_text(encoding="utf-8"))
    asked = stage["model"]["init_args"]["sampling"]
    decoder = UnCLIP.load().decoder
    assert asked == {name: getattr(decoder.sampling, name) for name in asked}
    assert decoder.text.encoder.pooled_proj is None  # z_t does not reach the timestep
