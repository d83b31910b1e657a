"""Releases and checkpoints are read alike; what does not fit is refused by name."""

import json
from dataclasses import replace

import pytest
import torch

from tests.factories import package_decoder, write_checkpoint, write_release
from unclip_pl.diffusion.noise import Noise
from unclip_pl.diffusion.process import DiffusionConfig
from unclip_pl.pipeline import release
from unclip_pl.pipeline.hub import write_parts
from unclip_pl.pipeline.locate import DEFAULT_PRIORS, OF_STAGE
from unclip_pl.pipeline.release import Release
from unclip_pl.pipeline.weights import load_pretrained, load_stage, read_weights
from unclip_pl.stages.ar_prior import ARPrior
from unclip_pl.stages.base import OptimizerConfig
from unclip_pl.stages.clip import CLIP
from unclip_pl.stages.decoder import Decoder
from unclip_pl.stages.diffusion_prior import DiffusionPrior
from unclip_pl.stages.upsampler import Upsampler256, Upsampler1024
from unclip_pl.utils.errors import UserError

NET = package_decoder().net_config


@pytest.fixture
def decoder():
    return package_decoder()


@pytest.fixture
def folder(tmp_path, decoder):
    return write_release(tmp_path / "release", decoder, steps=7)


@pytest.fixture
def checkpoint(tmp_path, decoder):
    return write_checkpoint(tmp_path / "newest-step=7.ckpt", decoder)


@pytest.mark.parametrize("place", sorted({*OF_STAGE.values()}))
def test_openmoji_names_the_packages_weights_of_every_stage(place):
    stage = load_stage(place, Decoder, DiffusionPrior, ARPrior, Upsampler256, Upsampler1024)
    fresh = type(stage)(**stage.hparams)
    load_pretrained(fresh, "openmoji")
    for name, value in stage.state_dict().items():
        if name != "skipped_steps":
            assert torch.equal(fresh.state_dict()[name], value), name


def same_decoder(decoder, **changes):
    """A new decoder with the same settings, but for the changes."""
    return Decoder(**(dict(decoder.hparams) | changes))


def test_release_and_checkpoint_draw_the_same(folder, checkpoint, decoder):
    batch = {"image_embed": torch.randn(2, 256)}
    expected = decoder.sample(batch, Noise([1, 2]))
    for path, tolerance in ((checkpoint, 0), (folder, 0.02)):  # a release has float16 weights
        drawn = load_stage(path, Decoder).sample(batch, Noise([1, 2]))
        torch.testing.assert_close(drawn, expected, rtol=0, atol=tolerance)
    names = {file.name for file in folder.iterdir()}
    assert names == {"config.json", "model.safetensors", "README.md"}
    assert read_weights(folder).steps == 7


def test_release_is_not_overwritten(folder, decoder):
    with pytest.raises(UserError, match="exists"):
        release.write(folder, Release("Decoder", {}, None, decoder.state_dict()), "")


def test_another_stage_is_refused(folder, checkpoint):
    for path in (folder, checkpoint):
        with pytest.raises(UserError, match="holds a Decoder"):
            load_stage(path, CLIP)


def test_damaged_newer_and_foreign_folders_are_sentences(folder, tmp_path):
    with pytest.raises(UserError, match="config.json is missing"):
        release.read(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"format": 99}))
    with pytest.raises(UserError, match="format 99"):
        release.read(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(UserError, match="damaged"):
        release.read(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        release.read(folder)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="model.safetensors is missing"):
        release.read(folder)
    torch.save({"model": 1}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="not a checkpoint"):
        read_weights(tmp_path / "other.ckpt")


def test_weights_that_do_not_fit_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["hyper_parameters"]["net"]["width"] = 64
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not fit"):
        load_stage(folder, Decoder)


@pytest.mark.parametrize(
    "settings", [{"newer": 1}, {"net": 5}, {"net": {"newer": 1}}, {"net": {"width": 33}}]
)
def test_settings_that_make_no_stage_are_a_sentence(folder, settings):
    config = json.loads((folder / "config.json").read_text())
    config["hyper_parameters"] |= settings
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="has settings that make no Decoder"):
        load_stage(folder, Decoder)


@pytest.mark.parametrize("part", ["hyper_parameters", "clip_fingerprint"])
def test_a_release_whose_parts_are_of_another_kind_is_damaged(folder, part):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {part: 5}))
    with pytest.raises(UserError, match="is damaged"):
        read_weights(folder)


def test_a_whole_model_and_nothing_at_all_are_told_from_a_release(folder, tmp_path):
    write_parts(tmp_path, ["decoder"], "# a card")
    with pytest.raises(UserError, match="is a whole model"):
        read_weights(tmp_path)
    with pytest.raises(UserError, match="There is no .*nowhere"):
        read_weights(tmp_path / "nowhere")


def test_a_checkpoint_that_is_not_there_is_answered_with_one_that_is(tmp_path):
    (tmp_path / "newest-step=500.ckpt").touch()
    with pytest.raises(UserError, match="such as .*newest-step=500.ckpt"):
        read_weights(tmp_path / "newest-step=N.ckpt")


def test_training_starts_from_the_weights_of_a_release_or_checkpoint_and_keeps_its_settings(
    folder, checkpoint, decoder
):
    for path, tolerance in ((checkpoint, 0), (folder, 1e-3)):
        stage = same_decoder(decoder, condition="text", optimizer=OptimizerConfig(lr=3e-4))
        stage.skipped_steps += 3
        load_pretrained(stage, path)
        parameters = dict(stage.named_parameters()), dict(decoder.named_parameters())
        torch.testing.assert_close(*parameters, rtol=tolerance, atol=tolerance)
        assert stage.skipped_steps == 0 and stage.clip_fingerprint == decoder.clip_fingerprint
        assert stage.optimizer_config.lr == 3e-4 and stage.condition == "text" and stage.training


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"net": replace(NET, width=64)}, r"model\.net\.width"),
        ({"diffusion": DiffusionConfig(parametrization="eps")}, r"model\.diffusion"),
        ({"normalizer": "none"}, r"model\.normalizer"),
    ],
)
def test_training_does_not_start_from_weights_of_another_model(checkpoint, decoder, changes, word):
    with pytest.raises(UserError, match=word):
        load_pretrained(same_decoder(decoder, **changes), checkpoint)


def test_training_does_not_start_from_weights_of_another_stage(decoder):
    with pytest.raises(UserError, match="holds a DiffusionPrior"):
        load_pretrained(decoder, DEFAULT_PRIORS["diffusion"])


def test_training_starts_from_weights_that_are_older_than_a_setting(decoder, tmp_path):
    """A setting of the diffusion process that they do not name has its default in them."""
    older = dict(decoder.hparams)
    older["diffusion"] = dict(older["diffusion"])
    del older["diffusion"]["variance_bound"]
    weights = Release("Decoder", older, None, decoder.state_dict(), 1)
    release.write(tmp_path / "old", weights, "# a card\n")
    load_pretrained(same_decoder(decoder), tmp_path / "old")
    unbound = DiffusionConfig(parametrization="v", variance_bound=None)
    with pytest.raises(UserError, match=r"model\.diffusion"):
        load_pretrained(same_decoder(decoder, diffusion=unbound), tmp_path / "old")


def test_a_release_keeps_statistics_exact_and_refuses_what_float16_cannot_hold(tmp_path):
    tensors = {"net.weight": torch.tensor([0.1]), "edges": torch.tensor([0.1])}
    weights = Release("Decoder", {}, None, tensors)
    loaded = release.read(release.write(tmp_path / "a", weights, "", exact=["edges"])).tensors
    assert loaded["edges"] == tensors["edges"] and loaded["net.weight"] != tensors["net.weight"]
    large = Release("Decoder", {}, None, {"net.weight": torch.tensor([1e6])})
    with pytest.raises(UserError, match=r"net\.weight"):
        release.write(tmp_path / "b", large, "")
    assert not (tmp_path / "b").exists()


def test_the_folder_of_a_run_is_no_release(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "newest-step=3.ckpt").touch()
    with pytest.raises(UserError, match=r"folder of a run: give one of .*newest-step=3\.ckpt"):
        read_weights(tmp_path)
