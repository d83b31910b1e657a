"""The diffusion prior and its data: scale, widths, and a whole run that is cut in two."""

from types import SimpleNamespace

import pytest
import torch

from tests.data.fitkit import data_of
from tests.data.shardkit import write_shards
from tests.stages.tiny_diffusion_prior import batch, prior
from tests.training.toy import trainer
from unclip_pl.cluster.checkpoint_io import newest_checkpoint, read_checkpoint
from unclip_pl.data.loader_config import EmbeddingLoaderConfig
from unclip_pl.data.store_statistics import Statistics
from unclip_pl.datamodules.prior import PriorData
from unclip_pl.diffusion.noise import Noise
from unclip_pl.networks.prior import PriorTextConfig, PriorTransformerConfig
from unclip_pl.pipeline import release
from unclip_pl.pipeline.release import Release
from unclip_pl.pipeline.weights import load_pretrained
from unclip_pl.stages.diffusion_prior import DiffusionPrior, PriorSamplingConfig
from unclip_pl.training.checkpoints import NewestCheckpoint
from unclip_pl.training.ema import EMA
from unclip_pl.training.prior_monitor import PriorMonitor
from unclip_pl.training.variance import AnalyticVariance
from unclip_pl.utils.errors import UserError


@pytest.mark.parametrize("mode", ["unit", "standard", "none"])
def test_embeddings_leave_on_the_scale_of_the_clip(mode):
    """Statistics come from the data. "unit" scales the text embedding as z_i; other modes do not
    change it (Karlo)."""
    stage, given = prior(normalizer=mode), batch(64)
    embed = given["image_embed"].double()
    statistics = Statistics(64, embed.mean(0), embed.T.cov(correction=0))
    data = SimpleNamespace(statistics=lambda: statistics)
    stage._trainer = SimpleNamespace(datamodule=data)
    stage.setup("fit")
    stage._trainer = None
    z = stage.normalizer.normalize(given["image_embed"])
    back = stage.normalizer.denormalize(z)
    mean_square = lambda z: z.norm(dim=1).square().mean()
    torch.testing.assert_close(
        mean_square(back), mean_square(given["image_embed"]), rtol=1e-3, atol=1e-3
    )
    if mode == "unit":
        torch.testing.assert_close(z.norm(dim=1), torch.full((64,), 0.5375 * 12**0.5))
        torch.testing.assert_close(
            stage.conditions(given)["text_embed"], stage.normalizer.normalize(given["text_embed"])
        )
    else:
        torch.testing.assert_close(back, given["image_embed"], rtol=1e-4, atol=1e-4)
        assert torch.equal(stage.conditions(given)["text_embed"], given["text_embed"])
    assert mode != "standard" or torch.allclose(z.std(0, correction=0), torch.ones(12), atol=1e-3)


@pytest.mark.parametrize("mode", ["unit", "standard"])
def test_a_prior_that_training_starts_from_keeps_its_own_scale(mode, tmp_path):
    """Other statistics would move the space in which its weights mean something."""
    trained = prior(normalizer=mode)
    trained.normalizer.fit(torch.full((12,), 5.0), torch.full((12,), 2.0))
    content = Release("DiffusionPrior", dict(trained.hparams), None, trained.state_dict())
    release.write(tmp_path / "prior", content, "", exact=("normalizer.norm",))
    stage = DiffusionPrior(**trained.hparams)
    load_pretrained(stage, tmp_path / "prior")
    data = SimpleNamespace(statistics=lambda: Statistics(9, torch.zeros(12), 9 * torch.eye(12)))
    stage._trainer = SimpleNamespace(datamodule=data)
    stage.setup("fit")
    for name, value in trained.normalizer.named_buffers():
        torch.testing.assert_close(stage.normalizer.get_buffer(name), value)
    fresh = DiffusionPrior(**trained.hparams)
    fresh._trainer = stage._trainer
    fresh.setup("fit")  # one that starts from nothing takes the data's
    assert fresh.normalizer.fitted
    assert not torch.equal(
        torch.cat([b.flatten() for b in fresh.normalizer.buffers()]),
        torch.cat([b.flatten() for b in trained.normalizer.buffers()]),
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"embed_dim": 16}, r"set it to 16"),
        ({"context_length": 77}, r"context_length is 7: set it to 77"),
        ({"states_width": 8}, r"set it to 8"),
        ({"text_states": False}, r"data\.text_states to true"),
    ],
)
def test_data_that_do_not_fit_are_a_sentence(change, said):
    def data(embed_dim=12, context_length=7, states_width=10, text_states=True):
        clip = SimpleNamespace(
            embed_dim=embed_dim, context_length=context_length, states_width=states_width
        )
        return SimpleNamespace(clip=clip, text_states=text_states)

    prior().check_data(data())
    with pytest.raises(UserError, match=said):
        prior().check_data(data(**change))


def test_hyperparameters_rebuild_the_stage():
    stage = prior("masked", sampling=PriorSamplingConfig(steps=7), normalizer="standard")
    again = DiffusionPrior(**stage.hparams).eval()
    again.load_state_dict(stage.state_dict())
    assert torch.equal(
        again.sample(batch(), Noise(range(4))), stage.sample(batch(), Noise(range(4)))
    )
    assert again.sampling.steps == 7 and again.text_config.padding == "masked"


def test_a_run_from_the_store_cut_in_two_equals_the_whole_one(tmp_path):
    """Shards, store, token states, statistics, monitors and variance together; an epoch has 6
    batches."""
    (tmp_path / "shards").mkdir()
    shards = write_shards(tmp_path / "shards", [9, 4, 12, 7])

    def fit(folder, steps, ckpt=None):
        torch.manual_seed(0)
        data = data_of(PriorData, shards[:3], shards[3:], tmp_path / "store")
        data.config, data.text_states = EmbeddingLoaderConfig(batch_size=4), True
        text = PriorTextConfig("states", states_width=5, context_length=12, padding="masked")
        stage = DiffusionPrior(
            PriorTransformerConfig(embed_dim=6, width=16, depth=1, heads=2),
            text,
            sampling=PriorSamplingConfig(steps=2),
        )
        callbacks = [
            EMA(0.9),
            NewestCheckpoint(2),
            PriorMonitor(captions=8),
            AnalyticVariance(captions=8, draws=1),
        ]
        run = trainer(
            folder, *callbacks, steps=steps, val_check_interval=4, check_val_every_n_epoch=None
        )
        run.fit(stage, datamodule=data, ckpt_path=ckpt)
        return stage, run, data

    stage, run, data = fit(tmp_path / "whole", 9)
    fit(tmp_path / "cut", 4)
    fit(tmp_path / "cut", 9, newest_checkpoint(tmp_path / "cut"))
    whole = read_checkpoint(newest_checkpoint(tmp_path / "whole"))
    cut = read_checkpoint(newest_checkpoint(tmp_path / "cut"))
    assert whole["global_step"] == cut["global_step"] == 9
    for part in ("state_dict", "current_model_state"):
        for name, value in whole[part].items():
            assert torch.equal(value, cut[part][name]) and value.isfinite().all(), name
    assert whole["clip_fingerprint"]["config"]["model"] == "fake-0"
    statistics = data.statistics()
    torch.testing.assert_close(
        stage.normalizer.norm.double(),
        (statistics.mean.square() + statistics.std.square()).sum().sqrt(),
    )
    assert "val/prior/rank" in run.logged_metrics and "val/loss" in run.logged_metrics
    assert run.logged_metrics["val/loss_captioned"].isfinite()
