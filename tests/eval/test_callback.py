"""The callback that evaluates while a stage trains."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.plugins.precision import Precision
from torch import nn

from eval.callback import Evaluate
from eval.features import load_features
from eval.metrics import CLIPScore, FrechetDistance
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.diffusion.noise import Noise
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import to_uint8


class Toy(LightningModule):
    """A stage whose samples are those of a function."""

    def __init__(self, draws) -> None:
        super().__init__()
        self.weight, self.draws, self.logged = nn.Parameter(torch.zeros(1)), draws, {}

    def sample(self, batch, noise):
        return self.draws(batch, noise)

    def log_dict(self, values, **_):
        self.logged |= values


def validate(
    callback: Evaluate, stage: Toy, batches: list[dict], step: int, val: str = "openmoji"
) -> None:
    trainer = SimpleNamespace(sanity_checking=False, global_step=step, global_rank=0)
    trainer.datamodule = SimpleNamespace(val=val)
    trainer.precision_plugin = Precision()
    callback.on_validation_epoch_start(trainer, stage)
    for number, batch in enumerate(batches):
        callback.on_validation_batch_end(trainer, stage, None, batch, number)
    callback.on_validation_epoch_end(trainer, stage)


def batches(count: int = 3, size: int = 4) -> list[dict]:
    generator = torch.Generator().manual_seed(0)

    def batch():
        return {
            "key": ["x"] * size,
            "image": torch.randn(size, 3, 16, 16, generator=generator).clamp(-1, 1),
            "image_embed": torch.randn(size, 8, generator=generator),
            "text_embed": torch.randn(size, 8, generator=generator),
        }

    return [batch() for _ in range(count)]


def test_callback_has_the_figures_of_the_pictures_and_keeps_metrics_out_of_the_stage():
    validation = batches()
    stage = Toy(lambda batch, noise: noise((3, 16, 16)).clamp(-1, 1))
    validate(Evaluate(10, count=10), stage, validation, 10)
    network = load_features("openmoji-judge")  # not the CLIP that conditions
    metric = FrechetDistance(network.dim)
    real = torch.cat([batch["image"] for batch in validation])[:10]
    metric.update(network(to_uint8(real)), real=True)
    metric.update(network(to_uint8(Noise(range(10))((3, 16, 16)).clamp(-1, 1))), real=False)
    assert stage.logged["eval/fd_clip"] == pytest.approx(metric.compute()["fd"], rel=1e-4)
    assert {"eval/kid", "eval/precision", "eval/recall"} < set(stage.logged)
    assert "eval/clip_score" not in stage.logged
    assert list(stage.state_dict()) == ["weight"] and len(list(stage.modules())) == 1


def test_callback_evaluates_a_priors_embeddings_and_scores_them_with_their_captions():
    validation = batches(3, 8)
    stage = Toy(lambda batch, noise: batch["image_embed"])
    validate(Evaluate(1, count=24), stage, validation, 1)
    score = CLIPScore()
    for batch in validation:
        score.update(batch["image_embed"], batch["text_embed"])
    assert stage.logged["eval/fd_clip"] == pytest.approx(0, abs=1e-5)
    assert stage.logged["eval/recall"] == 1
    assert stage.logged["eval/clip_score"] == pytest.approx(score.compute()["clip_score"], rel=1e-5)


def evaluated_at(step: int, *arguments, **options) -> Evaluate:
    callback = Evaluate(*arguments, **options)
    callback.load_state_dict({"last": step, "figures": {"eval/kid": 0.5}})
    return callback


def test_features_of_other_pictures_are_inception_s_and_missing_weights_are_found_at_once(
    tmp_path, monkeypatch
):
    """At the first validation of a resumed run, long before the next evaluation is due."""
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path))

    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    stage = Toy(lambda batch, noise: pytest.fail("nothing is due"))
    with pytest.raises(UserError, match="Inception"):
        validate(evaluated_at(0, 1000), stage, batches(), 1, val="data/{00000..00009}.tar")
    validate(evaluated_at(0, 1000), stage, batches(), 1)


def test_features_of_the_clip_that_conditions_are_said_to_be_its(recwarn):
    stage = Toy(lambda batch, noise: batch["image"])
    stage.clip_fingerprint = FrozenCLIP().fingerprint()
    validate(evaluated_at(0, 1000), stage, batches(), 1)
    assert not [one for one in recwarn if "conditions" in str(one.message)]
    with pytest.warns(UserWarning, match="conditions this stage"):
        validate(evaluated_at(0, 1000, features="clip"), stage, batches(), 1)


def test_callback_waits_for_its_steps_also_after_a_resume():
    """In between it logs the last figures again, for whatever watches them."""
    drawn: list[int] = []
    stage = Toy(lambda batch, noise: drawn.append(1) or batch["image_embed"])
    callback = Evaluate(10, count=12)
    for step, evaluated in ((5, True), (14, False), (15, True), (20, False), (25, True)):
        stage.logged = {}
        drawn.clear()
        validate(callback, stage, batches(), step)
        assert bool(drawn) == evaluated, step
        assert stage.logged["eval/fd_clip"] == pytest.approx(0, abs=1e-5)
        state, callback = callback.state_dict(), Evaluate(10, count=12)
        callback.load_state_dict(state)
    with pytest.raises(ValueError, match="every_n_train_steps"):
        Evaluate(0)


def test_callback_is_one_of_lightnings_and_its_yaml_builds():
    from unclip_pl.cli.lightning_cli import build_cli

    callback = '{"class_path": "eval.callback.Evaluate", "init_args": {"every_n_train_steps": 7}}'
    words = ["-c", "stages/decoder.yaml", "--trainer.accelerator", "cpu"]
    trainer: Trainer = build_cli([*words, "--trainer.callbacks+", callback], run=False).trainer
    (evaluate,) = (one for one in trainer.callbacks if isinstance(one, Evaluate))
    assert evaluate.every_n_train_steps == 7
