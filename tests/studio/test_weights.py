"""Weights of a training run, tried at once in the place of the first ones."""

import gc
import threading
import weakref

import pytest
import torch

from tests.factories import tiny_stage, write_checkpoint, write_release
from tests.studio.conftest import tiny_models
from unclip_pl.pipeline.locate import DEFAULT_PRIORS
from unclip_pl.pipeline.weights import load_stage
from unclip_pl.stages.ar_prior import ARPrior
from unclip_pl.stages.decoder import Decoder
from unclip_pl.studio import engine as rooms
from unclip_pl.studio.engine import Engine, State
from unclip_pl.studio.models import Models
from unclip_pl.studio.requests import Create, UseWeights

QUICK = {"prior_steps": 2, "steps": 2}


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A release of a tiny decoder."""
    folder = tmp_path_factory.mktemp("first")
    return write_release(folder / "decoder", tiny_models(16).plain.decoder)


@pytest.fixture
def engine(first):
    engine = Engine(Models.load(first, "diffusion"))
    yield engine
    engine.close()


def run_of(folder, stage, step=7):
    """The folder of a run with one checkpoint."""
    (folder / "checkpoints").mkdir(parents=True)
    write_checkpoint(folder / "checkpoints" / f"newest-step={step}.ckpt", stage, step)
    return folder


def other_decoder(first):
    """The decoder of a release, trained on in another way."""
    stage = load_stage(first, Decoder)
    for parameter in stage.net.parameters():
        parameter.data.mul_(1.1)
    return stage


def ended(engine, request):
    ticket = engine.submit(request)
    assert ticket.wait(60)
    return ticket


def drawn(engine, **settings):
    ticket = ended(engine, Create(captions=("fox",), **QUICK, **settings))
    assert ticket.state is State.DONE, ticket.error
    return ticket.pictures[0].image


def test_a_checkpoint_is_used_and_the_first_weights_come_back(engine, first, tmp_path):
    run, before = run_of(tmp_path / "mine", other_decoder(first)), drawn(engine)
    former = weakref.ref(engine.models.plain.decoder)
    ticket = ended(engine, UseWeights(run=run))
    assert ticket.state is State.DONE, ticket.error
    assert "the decoder of mine, newest-step=7.ckpt" in ticket.notes[0]
    assert engine.models.standing() == ticket.notes[0]
    del ticket
    gc.collect()
    assert former() is None  # one model in memory
    assert not drawn(engine).equal(before)
    assert "started with" in ended(engine, UseWeights(run=None)).notes[0]
    assert drawn(engine).equal(before)


def test_a_prior_is_used_too_and_both_have_the_settings_of_the_studio(engine, first, tmp_path):
    engine.models.prepare_all(lambda stage: setattr(stage, "asked", True))
    prior = load_stage(
        DEFAULT_PRIORS["diffusion"], type(engine.models.with_prior["diffusion"].prior)
    )
    before = drawn(engine)
    prior.net.requires_grad_(False)
    for parameter in prior.net.parameters():
        parameter.mul_(1.2)
    for name, stage in (("prior", prior), ("decoder", other_decoder(first))):
        ticket = ended(engine, UseWeights(run=run_of(tmp_path / name, stage)))
        assert ticket.state is State.DONE, ticket.error
    unclip = engine.models.with_prior["diffusion"]
    assert unclip.prior.asked and unclip.decoder.asked
    assert unclip.decoder is engine.models.plain.decoder
    assert "diffusion prior of prior" in engine.models.standing()
    ended(engine, UseWeights(run=None))
    assert drawn(engine).equal(before)


def test_what_does_not_fit_is_one_sentence_and_changes_nothing(engine, first, tmp_path):
    decoder, before = engine.models.plain.decoder, drawn(engine)
    larger = tiny_models(32).plain.decoder
    unknown = other_decoder(first)
    unknown.clip_fingerprint = None
    runs = {
        "Upsampler256": run_of(tmp_path / "upsampler", tiny_stage("upsampler")),
        "decoder of 32 pixels": run_of(tmp_path / "larger", larger),
        "with which CLIP": run_of(tmp_path / "unknown", unknown),
        "another kind": run_of(tmp_path / "ar", load_stage(DEFAULT_PRIORS["ar"], ARPrior)),
        "no whole checkpoint": tmp_path / "empty",
    }
    half = run_of(tmp_path / "half", decoder)
    path = next(half.glob("checkpoints/*"))
    path.write_bytes(path.read_bytes()[:3000])
    runs["whole checkpoint"] = half
    for words, run in runs.items():
        ticket = ended(engine, UseWeights(run=run))
        assert ticket.state is State.FAILED and words in ticket.error, ticket.error
        assert "\n" not in ticket.error
        assert engine.models.plain.decoder is decoder and "started" in engine.models.standing()
    assert drawn(engine).equal(before)


def test_it_waits_its_turn(engine, first, tmp_path, monkeypatch):
    go, real = threading.Event(), rooms.draw

    def draw(models, requests, tell):
        assert go.wait(60)
        return real(models, requests, tell)

    monkeypatch.setattr(rooms, "draw", draw)
    request = Create(captions=("fox",), **QUICK)
    engine.submit(Create(captions=("first",), steps=1, prior_steps=2))
    before = engine.submit(request)
    engine.submit(UseWeights(run=run_of(tmp_path / "mine", other_decoder(first))))
    after = engine.submit(request)
    go.set()
    assert after.wait(60) and before.wait(60)
    assert not torch.equal(before.pictures[0].image, after.pictures[0].image)
