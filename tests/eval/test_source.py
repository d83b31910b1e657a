"""The images that options ask for: a model draws what its pipeline draws."""

import json
from dataclasses import replace

import pytest
import torch

from eval import clip_score
from eval.captions import read_captions
from eval.source import Model, conditioning_clip, describe_weights, drawn_settings, open_source
from eval.stored import ImageSource
from tests.eval import tiny
from tests.factories import captions_decoder, tiny_stage, write_release
from unclip_pl.pipeline import devices
from unclip_pl.pipeline.locate import DEFAULT_PRIORS
from unclip_pl.pipeline.unclip import UnCLIP
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import to_uint8


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return tiny.decoder(tmp_path_factory.mktemp("decoder") / "release")


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return tiny.shards(tmp_path_factory.mktemp("drawings"), 6)


def open_images(*words: str) -> ImageSource:
    found = tiny.arguments(clip_score, *words, "--device", "cpu", "--seed", "7")
    return open_source(found["source"], found["options"])


@pytest.mark.parametrize("condition", ["prior", "text", "caption"])
def test_a_model_draws_what_its_pipeline_draws(release, shard, tmp_path, condition):
    words = ["--decoder", str(release), "--captions", str(shard), "--condition", condition]
    words += ["--samples", str(tmp_path)]
    prior = sampling = None
    if condition == "prior":
        words += ["--prior-sampler", "ddim", "--prior-steps", "2"]
        prior = DEFAULT_PRIORS["diffusion"]
    images = torch.cat([batch["images"] for batch in open_images(*words).batches(8)])
    captions = [caption.text for caption in read_captions(str(shard))]
    unclip = UnCLIP.load(release, prior)
    if condition == "prior":
        sampling = replace(unclip.prior.sampling, sampler="ddim", steps=2)
    expected = unclip.generate(captions, range(7, 13), condition, prior_sampling=sampling)
    assert torch.equal(images, to_uint8(expected))
    settings = json.loads((tmp_path / "samples.json").read_text())["settings"]
    assert settings["condition"] == condition
    embedding = {"prior": "z_i of the prior + ", "text": "z_t as the embedding + "}
    seen = drawn_settings(open_images(*words))["decoder sees"]
    assert seen == embedding.get(condition, "") + "the caption's tokens"


def test_settings_say_that_z_t_reaches_a_decoder_that_adds_it_to_the_timestep(shard, tmp_path):
    decoder = tiny.decoder(tmp_path / "pooled", pooled=True)
    words = ["--decoder", str(decoder), "--captions", str(shard), "--condition", "caption"]
    settings = drawn_settings(open_images(*words))
    assert settings["decoder sees"] == "the caption's tokens + z_t with the timestep"


def test_compile_reaches_the_networks_that_draw(release, shard, monkeypatch):
    asked = []
    load = UnCLIP.load

    def watched(*args, compile, **kwargs):
        asked.append(compile)
        return load(*args, **kwargs)

    monkeypatch.setattr(UnCLIP, "load", watched)
    words = ["--decoder", str(release), "--captions", str(shard), "--condition", "caption"]
    for more in ([], ["--compile"]):
        next(iter(open_images(*words, *more, "--num-captions", "1").batches(1)))
    assert asked == [False, True]


@pytest.mark.parametrize("compile", [False, True])
def test_compile_reaches_a_prior_of_a_comparison(release, compile, monkeypatch):
    compiled = []
    monkeypatch.setattr(devices, "compile_blocks", lambda stage, device: compiled.append(stage))
    model = Model(str(release), compile=compile)
    prior = tiny_stage("diffusion_prior")
    prior.clip_fingerprint = model.unclip.decoder.clip_fingerprint
    assert model.with_prior(prior).prior is prior
    assert compiled == ([model.unclip.decoder, prior] if compile else [])


def test_samples_lie_in_the_cache_in_a_folder_of_their_settings(release, shard, cache):
    words = ["--decoder", str(release), "--captions", str(shard), "--condition", "caption"]
    folders = [
        open_images(*words, *more).folder
        for more in ([], [], ["--guidance-scale", "2"], ["--num-captions", "5"])
    ]
    assert folders[0] == folders[1] and len(set(folders)) == 3
    assert all(folder.parent == cache / "samples" for folder in folders)


def test_a_decoder_on_text_embeddings_is_conditioned_on_them_by_default(tmp_path, shard):
    decoder = tiny.decoder(tmp_path / "text", "text")
    source = open_images("--decoder", str(decoder), "--captions", str(shard))
    assert source.settings["condition"] == "text" and source.settings["prior"] is None


def test_a_decoder_of_captions_only_draws_from_them_by_default_and_sees_no_clip(tmp_path, shard):
    release = write_release(tmp_path / "captions", captions_decoder())
    source = open_images("--decoder", str(release), "--captions", str(shard))
    assert source.settings["condition"] == "caption" and source.settings["prior"] is None
    assert conditioning_clip(source) is None
    images = torch.cat([batch["images"] for batch in source.batches(8)])
    captions = [caption.text for caption in read_captions(str(shard))]
    expected = UnCLIP.load(release).generate(captions, range(7, 13), "caption")
    assert torch.equal(images, to_uint8(expected))
    with pytest.raises(UserError, match="no use for a prior"):
        open_images("--decoder", str(release), "--captions", str(shard), "--condition", "prior")


def test_a_folder_of_images_needs_no_model(shard):
    batches = open_images("--images", str(shard.parent)).batches(4)
    assert sum(len(batch["keys"]) for batch in batches) == 6


@pytest.mark.parametrize(
    ("words", "keyword"),
    [
        ("", "only one"),
        ("--images {shards} --decoder openmoji", "only one"),
        ("--images {shards} --prior ar", "--prior"),
        ("--decoder openmoji --condition text --prior ar", "--condition text"),
        ("--decoder openmoji --condition caption --prior-steps 5", "--prior-steps"),
        ("--decoder openmoji --condition text --prior-top-p 0.5", "--prior-top-p"),
        ("--decoder {prior} --condition text", "DiffusionPrior"),
        ("--decoder openmoji --prior {decoder}", "DiffusionPrior or ARPrior"),
        ("--decoder gone.ckpt", "gone.ckpt"),
        ("--decoder {decoder} --captions gone.txt --condition text", "gone.txt"),
        ("--decoder {decoder} --steps 0 --condition text --captions {shards}", "--steps is 0"),
    ],
)
def test_what_cannot_be_opened_is_refused(words, keyword, release, shard):
    places = {"shards": shard.parent, "prior": DEFAULT_PRIORS["diffusion"], "decoder": release}
    with pytest.raises(UserError, match=keyword):
        open_images(*words.format(**places).split())


def test_another_file_of_the_same_name_is_another_model(tmp_path):
    tiny.decoder(tmp_path / "a" / "mine")
    tiny.decoder(tmp_path / "b" / "mine", seed=1)
    one, two = (describe_weights(tmp_path / name / "mine") for name in "ab")
    assert one["name"] == two["name"] and one["sha256"] != two["sha256"]
    assert one == describe_weights(tmp_path / "a" / "mine")
