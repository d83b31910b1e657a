"""Releases and checkpoints through one door: what is written comes back, what does not fit is refused by name, commands give pictures."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image

from unclip_pl.cli import unclip as app
from unclip_pl.clip.fingerprint import ClipMismatch
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.diffusion.noise import Noise
from unclip_pl.diffusion.process import DiffusionConfig
from unclip_pl.networks.unet import UNetConfig
from unclip_pl.pipeline import release
from unclip_pl.pipeline import unclip as pipeline
from unclip_pl.pipeline.release import Release
from unclip_pl.pipeline.unclip import DEFAULT_DECODER, UnCLIP, load_stage, read_weights, start_from
from unclip_pl.stages.base import OptimizerConfig
from unclip_pl.stages.clip import CLIP
from unclip_pl.stages.decoder import Decoder, SamplingConfig
from unclip_pl.stages.diffusion_prior import DiffusionPrior
from unclip_pl.utils.errors import UserError

NET = UNetConfig(
    image_size=16,
    width=32,
    mults=(1,),
    depth=1,
    attention=(),
    middle_attention=False,
    head_width=32,
    embed_dim=256,
)
QUICK = SamplingConfig(sampler="ddim", steps=2)


@pytest.fixture(scope="module")
def fingerprint():
    return FrozenCLIP().fingerprint()


@pytest.fixture
def decoder(fingerprint):
    torch.manual_seed(0)
    stage = Decoder(net=NET, sampling=QUICK, diffusion=DiffusionConfig(parametrization="v"))
    for parameter in stage.net.parameters():  # outputs start at zero: make them speak
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    stage.clip_fingerprint = fingerprint
    return stage


@pytest.fixture
def folder(tmp_path, decoder):
    weights = Release(
        "Decoder", dict(decoder.hparams), decoder.clip_fingerprint, decoder.state_dict(), 7
    )
    return release.write(tmp_path / "release", weights, "# a card\n")


@pytest.fixture
def checkpoint(tmp_path, decoder):
    path = tmp_path / "newest-step=7.ckpt"
    torch.save(
        {"stage": "Decoder", "hyper_parameters": dict(decoder.hparams), "state_dict": decoder.state_dict(), "global_step": 7,
         "clip_fingerprint": decoder.clip_fingerprint}, path,
    )  # fmt: skip
    return path


def test_release_and_checkpoint_draw_the_same(folder, checkpoint, decoder):
    given = {"image_embed": torch.randn(2, 256)}
    expected = decoder.eval().sample(given, Noise([1, 2]))
    torch.testing.assert_close(
        load_stage(checkpoint, Decoder).sample(given, Noise([1, 2])), expected, rtol=0, atol=0
    )
    torch.testing.assert_close(
        load_stage(folder, Decoder).sample(given, Noise([1, 2])), expected, rtol=0, atol=0.02
    )  # float16 weights
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "model.safetensors",
        "README.md",
    }
    assert read_weights(folder).steps == 7


def test_release_is_not_overwritten(folder, decoder):
    with pytest.raises(UserError, match="exists already"):
        release.write(folder, Release("Decoder", {}, None, decoder.state_dict()), "")


def test_another_stage_is_refused(folder, checkpoint):
    for path in (folder, checkpoint):
        with pytest.raises(UserError, match="holds a Decoder, and a CLIP is needed"):
            load_stage(path, CLIP)


def test_damaged_newer_and_foreign_folders_are_sentences(folder, tmp_path):
    with pytest.raises(UserError, match=r"is no release \(config.json is missing\)"):
        release.read(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"format": 99}))
    with pytest.raises(UserError, match="has format 99"):
        release.read(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        release.read(folder)
    torch.save({"model": 1}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="no checkpoint of a stage of ours"):
        read_weights(tmp_path / "other.ckpt")


def test_weights_that_do_not_fit_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["hyper_parameters"]["net"]["width"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not fit its own configuration"):
        load_stage(folder, Decoder)


def test_decoder_of_another_clip_is_refused(decoder, fingerprint):
    decoder.clip_fingerprint = fingerprint | {"embed_dim": 768}
    with pytest.raises(ClipMismatch, match="embed dim"):
        UnCLIP(decoder)
    decoder.clip_fingerprint = None
    with pytest.raises(UserError, match="does not say with which CLIP"):
        UnCLIP(decoder)


def test_three_ways_to_condition(decoder):
    unclip = UnCLIP(decoder)
    embed = unclip.embed_images(torch.rand(2, 3, 80, 64) * 2 - 1)
    drawn = unclip.decode(embed, [3, 4])
    assert drawn.shape == (2, 3, 16, 16) and drawn.abs().max() <= 1
    torch.testing.assert_close(unclip.decode(embed[1:], [4])[0], drawn[1], rtol=1e-4, atol=1e-4)
    assert not torch.equal(unclip.decode(None, [3, 4]), drawn)


def test_decoder_on_text_embeddings_gets_those_of_the_captions_and_wants_no_prior(
    decoder, fingerprint
):
    text = Decoder(
        net=NET, sampling=QUICK, diffusion=DiffusionConfig(parametrization="v"), condition="text"
    )
    text.load_state_dict(decoder.state_dict())
    text.clip_fingerprint = fingerprint
    unclip, captions = UnCLIP(text), ["dog", "cat"]
    drawn = unclip.generate(captions, [3, 4], "text")
    assert torch.equal(drawn, UnCLIP(decoder).decode(unclip.embed_text(captions), [3, 4], captions))
    assert not torch.equal(drawn, unclip.generate(captions, [3, 4], "caption"))
    with pytest.raises(UserError, match="There is no prior"):
        unclip.generate(captions, [3, 4])
    with pytest.raises(UserError, match="trained on text embeddings and has no use for a prior"):
        UnCLIP(text, DiffusionPrior.__new__(DiffusionPrior))


def test_training_starts_from_the_weights_of_a_release_or_checkpoint_and_from_nothing_else(
    folder, checkpoint, decoder, tmp_path
):
    fresh = lambda **changes: Decoder(**(dict(decoder.hparams) | changes))
    for path, tolerance in ((checkpoint, 0), (folder, 1e-3)):
        stage = fresh(condition="text", optimizer=OptimizerConfig(lr=3e-4))
        stage.skipped_steps += 3
        start_from(stage, path)
        torch.testing.assert_close(
            dict(stage.named_parameters()),
            dict(decoder.named_parameters()),
            rtol=tolerance,
            atol=tolerance,
        )
        assert stage.skipped_steps == 0 and stage.clip_fingerprint == decoder.clip_fingerprint
        assert stage.optimizer_config.lr == 3e-4 and stage.condition == "text" and stage.training
    for changes, words in (
        (
            {"net": replace(NET, width=64)},
            r"trained with model\.net\.width 32, and this run has 64",
        ),
        ({"diffusion": DiffusionConfig(parametrization="eps")}, "was trained with model.diffusion"),
        ({"normalizer": "none"}, "was trained with model.normalizer unit, and this run has none"),
    ):
        with pytest.raises(UserError, match=words):
            start_from(fresh(**changes), checkpoint)
    with pytest.raises(UserError, match="holds a DiffusionPrior, and this run trains a Decoder"):
        start_from(decoder, pipeline.DEFAULT_PRIORS["diffusion"])


def test_training_starts_from_weights_that_are_older_than_a_setting(decoder, tmp_path):
    """A setting of the diffusion process that they do not name has its default in them."""
    older = dict(decoder.hparams)
    older["diffusion"] = dict(older["diffusion"])
    del older["diffusion"]["variance_bound"]
    release.write(
        tmp_path / "old", Release("Decoder", older, None, decoder.state_dict(), 1), "# a card\n"
    )
    start_from(Decoder(**dict(decoder.hparams)), tmp_path / "old")
    unbound = DiffusionConfig(parametrization="v", variance_bound=None)
    with pytest.raises(UserError, match="was trained with model.diffusion"):
        start_from(Decoder(**dict(decoder.hparams) | {"diffusion": unbound}), tmp_path / "old")


def test_vary_writes_pictures_with_their_settings(folder, tmp_path, capsys):
    Image.new("RGBA", (90, 40), (200, 30, 30, 255)).save(tmp_path / "red.png")
    arguments = [
        "vary",
        str(tmp_path / "red.png"),
        "--decoder",
        str(folder),
        "--num-images",
        "2",
        "--seed",
        "5",
        "--out",
        str(tmp_path / "out"),
    ]
    assert app.main(arguments) == 0
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["red-5.png", "red-6.png", "variations.png"]
    with Image.open(tmp_path / "out" / "red-5.png") as image:
        assert (
            image.size == (16, 16)
            and image.text["seed"] == "5"
            and "steps=2" in image.text["unclip"]
        )
    assert "variations.png" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["vary", "gone.png"], "There is no picture gone.png"),
        (["vary", "gone.png", "--num-images", "0"], "give 1 or more"),
        (["vary", "here.png", "--decoder", "gone.ckpt"], "There is no checkpoint gone.ckpt"),
        (["export", "gone.ckpt", "--out", "x"], "There is no checkpoint gone.ckpt"),
        (["data", "verify", "gone"], "no whole embedding store"),
    ],
)
def test_bad_input_is_one_sentence(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("here.png")
    assert app.main(arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("unclip: ") and words in error[0]


def test_a_release_keeps_statistics_exact_and_refuses_what_float16_cannot_hold(tmp_path):
    tensors = {"net.weight": torch.tensor([0.1]), "edges": torch.tensor([0.1])}
    found = release.read(
        release.write(tmp_path / "a", Release("Decoder", {}, None, tensors), "", exact=["edges"])
    ).tensors
    assert found["edges"] == tensors["edges"] and found["net.weight"] != tensors["net.weight"]
    with pytest.raises(UserError, match=r"not finite in float16 \(net.weight\)"):
        release.write(
            tmp_path / "b", Release("Decoder", {}, None, {"net.weight": torch.tensor([1e6])}), ""
        )
    assert not (tmp_path / "b").exists()


def test_export_makes_a_release_of_a_checkpoint(checkpoint, tmp_path):
    assert app.main(["export", str(checkpoint), "--out", str(tmp_path / "mine")]) == 0
    assert read_weights(tmp_path / "mine").stage == "Decoder"


def test_assets_of_the_package_are_whole_and_small():
    """What a newcomer draws with: the CLIP and the decoder load, fit each other, and stay small."""
    unclip = UnCLIP.load()
    assert unclip.decoder.net_config.image_size == 64
    clips = [pipeline.ASSETS / name for name in ("clip-openmoji", "clip-openmoji-judge")]
    for folder, limit in {DEFAULT_DECODER: 20, clips[0]: 16, clips[1]: 8}.items():
        assert sum(file.stat().st_size for file in folder.iterdir()) <= limit * 1_000_000
        assert "OpenMoji" in (folder / "README.md").read_text(encoding="utf-8")
