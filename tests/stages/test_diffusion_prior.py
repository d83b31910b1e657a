"""The diffusion prior: what it drops and learns, guidance, candidates, variance, and samples that do not depend on their batch."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tests.data.fitkit import data_of
from tests.data.shardkit import write_shards
from tests.training.toy import trainer
from unclip_pl.cluster.checkpoint_io import newest_checkpoint, read_checkpoint
from unclip_pl.data.loader_config import EmbeddingLoaderConfig
from unclip_pl.data.store import Statistics
from unclip_pl.datamodules.prior import PriorData
from unclip_pl.diffusion.noise import Noise
from unclip_pl.diffusion.process import DiffusionConfig
from unclip_pl.networks.prior import PriorTextConfig, PriorTransformerConfig
from unclip_pl.pipeline import release
from unclip_pl.pipeline.release import Release
from unclip_pl.pipeline.weights import load_pretrained
from unclip_pl.stages.base import OptimizerConfig
from unclip_pl.stages.diffusion_prior import DiffusionPrior, PriorSamplingConfig
from unclip_pl.training.checkpoints import NewestCheckpoint
from unclip_pl.training.ema import EMA
from unclip_pl.training.prior_monitor import PriorMonitor
from unclip_pl.training.variance import AnalyticVariance
from unclip_pl.utils.errors import UserError

NET = PriorTransformerConfig(embed_dim=12, width=32, depth=2, heads=4)
TEXT = PriorTextConfig("states", states_width=10, context_length=7)
SAMPLERS = ["analytic", "ddpm", "ddim", "dpm_solver_pp"]


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def prior(padding: str = "learned", kind: str = "states", **changes) -> DiffusionPrior:
    text = PriorTextConfig(
        kind, states_width=10, vocab_size=50_000, context_length=7, padding=padding
    )
    stage = DiffusionPrior(net=NET, text=text, **changes).eval()
    torch.nn.init.normal_(stage.net.null_text)
    torch.nn.init.normal_(stage.net.null_text_embed)
    stage.x0_error.copy_(torch.linspace(0.01, 0.2, 1000))
    return stage


def batch(size: int = 4, seed: int = 1) -> dict:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 100, (size, 6), generator=generator)
    tokens[:, 4] = 49407
    return {
        "key": [str(i) for i in range(size)],
        "image_embed": torch.randn(size, 12, generator=generator) * 3,
        "text_embed": torch.randn(size, 12, generator=generator) * 3,
        "text_states": torch.randn(size, 6, 10, generator=generator),
        "tokens": tokens,
        "text_mask": torch.arange(6).repeat(size, 1) <= 4,
    }


def settings(**changes) -> PriorSamplingConfig:
    return PriorSamplingConfig(**{"sampler": "ddim", "steps": 3, "num_candidates": 1} | changes)


def calls(stage: DiffusionPrior) -> list[int]:
    """Rows of each pass through the Transformer's last three tokens, from now on."""
    rows: list[int] = []
    denoise = stage.net.denoise
    stage.net.denoise = lambda x, t, prefix: (rows.append(len(x)), denoise(x, t, prefix))[1]
    return rows


def test_loss_is_the_mean_squared_error_of_z_on_the_networks_scale():
    stage, given = prior(text_dropout=0.0), batch()
    seen = []
    net = stage.net.forward
    stage.net.forward = lambda x, t, **kw: (seen.append((x, t)), net(x, t, **kw))[1]
    losses = stage.loss(given, torch.Generator().manual_seed(3))
    z = torch.nn.functional.normalize(given["image_embed"], dim=-1) * 0.5375 * math.sqrt(12)
    ((x, t),) = seen
    expected = (net(x, t, **stage.conditions(given)) - z).square()
    torch.testing.assert_close(losses["per_sample"], expected.mean(1))
    torch.testing.assert_close(losses["loss"], expected.mean())
    assert torch.equal(losses["t"], t) and t.shape == (4,)
    torch.testing.assert_close(
        stage.loss(given, torch.Generator().manual_seed(3))["loss"], losses["loss"]
    )


@pytest.mark.parametrize("kind", ["states", "tokens"])
def test_every_parameter_gets_a_gradient(kind):
    stage = prior(kind=kind)
    stage.loss(batch())["loss"].backward()
    assert [name for name, p in stage.named_parameters() if p.grad is None] == []


def test_caption_and_embedding_are_dropped_together_at_their_rate():
    stage, kept = prior(), []
    stage.net.forward = lambda x, t, keep, **_: (kept.append(keep), x)[1]
    for _ in range(100):
        stage.loss(batch(40))
    assert abs(torch.cat(kept).double().mean() - 0.9) < 0.015


@pytest.mark.parametrize("padding", ["learned", "masked"])
def test_null_branch_depends_on_x_t_and_on_nothing_of_the_text(padding):
    """Rows behind the conditional ones are the null branch's: other captions leave them, other x_t change them."""
    stage, one, two = prior(padding), batch(), batch(seed=2)
    x, t = torch.randn(4, 12), torch.full((4,), 300)
    null = [
        stage.encode_text(given, 4, null=True).index_select(torch.full((4,), 4))
        for given in (one, two)
    ]
    torch.testing.assert_close(
        stage.net.denoise(x, t, null[0]), stage.net.denoise(x, t, null[1]), rtol=0, atol=0
    )
    assert (stage.net.denoise(x, t, null[0]) - stage.net.denoise(x + 0.1, t, null[0])).abs().min(
        1
    ).values.max() > 1e-5
    torch.testing.assert_close(
        stage.net.denoise(x, t, null[0]),
        stage.net(x, t, keep=torch.zeros(4, dtype=torch.bool)),
        rtol=1e-5,
        atol=1e-5,
    )


def test_scale_one_is_the_conditional_model_and_costs_one_pass():
    stage, given = prior(), batch()
    rows = calls(stage)
    drawn = stage.sample(given, Noise(range(4)), settings())
    assert rows == [4, 4, 4]
    x = Noise(range(4))((1, 12))[:, 0]
    schedule = stage.process.schedule.respaced(3)
    for i in (2, 1, 0):  # DDIM, eta 0, with the plain network
        t = torch.full((4,), int(schedule.timesteps[i]))
        z = stage.net(x, t, **stage.conditions(given))
        eps = stage.process.x0_to_eps(z, x, t)
        a = float(schedule.alphas_cumprod_prev[i])
        x = a**0.5 * z + (1 - a) ** 0.5 * eps
    torch.testing.assert_close(drawn, stage.normalizer.denormalize(x), rtol=1e-4, atol=1e-5)


def test_guidance_moves_away_from_the_null_branch_in_one_doubled_pass():
    stage, given = prior(), batch()
    rows = calls(stage)
    one = settings(steps=1)
    cond, null = stage.sample(given, Noise(range(4)), one), stage.sample({}, Noise(range(4)), one)
    del rows[:]
    guided = stage.sample(given, Noise(range(4)), settings(steps=1, guidance_scale=3.0))
    assert rows == [8]
    torch.testing.assert_close(guided, null + 3 * (cond - null), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["states", "tokens"])
@pytest.mark.parametrize("padding", ["learned", "masked"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_cached_and_plain_sampling_agree(sampler, padding, kind):
    stage, given = prior(padding, kind), batch()
    wanted = settings(sampler=sampler, guidance_scale=2.0, num_candidates=2, eta=0.5)
    cached = stage.sample(given, Noise(range(4)), wanted)
    null = {"keep": torch.tensor([True] * 8 + [False] * 8)}
    plain = {
        key: None
        if value is None
        else value.repeat_interleave(2, 0).repeat(2, *[1] * (value.ndim - 1))
        for key, value in stage.conditions(given).items()
    }
    stage.net.denoise = lambda x, t, prefix: stage.net(x, t, **plain, **null)
    torch.testing.assert_close(
        stage.sample(given, Noise(range(4)), wanted), cached, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("padding", ["learned", "masked"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_embedding_k_is_the_same_in_any_batch(sampler, padding):
    stage, given = prior(padding), batch()
    given["text_mask"][0, 2:] = False
    wanted = settings(sampler=sampler, guidance_scale=2.0, num_candidates=2, eta=0.5)
    whole = stage.sample(given, Noise([5, 6, 7, 8]), wanted)
    for k in range(4):
        alone = stage.sample(
            {key: value[k : k + 1] for key, value in given.items()}, Noise([5 + k]), wanted
        )
        torch.testing.assert_close(whole[k : k + 1], alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(
        whole, stage.sample(given, Noise([15, 16, 17, 18]), wanted), atol=1e-3
    )


def test_nothing_of_the_caller_is_changed():
    stage, given = prior(), batch()
    before = {
        key: value.clone() if torch.is_tensor(value) else list(value)
        for key, value in given.items()
    }
    stage.sample(given, Noise(range(4)), settings(guidance_scale=2.0, num_candidates=2))
    stage.loss(given)
    stage.estimate_variance([given], draws=1)
    assert given.keys() == before.keys()
    assert all(
        torch.equal(given[key], before[key])
        if torch.is_tensor(given[key])
        else given[key] == before[key]
        for key in given
    )


def test_the_candidate_nearer_to_the_text_embedding_is_kept():
    stage, given = prior(), batch()
    both = []
    denormalize = stage.normalizer.denormalize
    stage.normalizer.denormalize = lambda z: (both.append(denormalize(z)), denormalize(z))[1]
    kept = stage.sample(given, Noise(range(4)), settings(num_candidates=3))
    near = F.cosine_similarity(both[0], given["text_embed"][:, None], dim=-1)
    assert both[0].shape == (4, 3, 12) and (near.max(1).values - near.min(1).values).min() > 0
    torch.testing.assert_close(F.cosine_similarity(kept, given["text_embed"]), near.max(1).values)
    assert stage.sample(
        {"tokens": given["tokens"]}, Noise(range(4)), settings(num_candidates=3)
    ).shape == (4, 12)


def test_every_condition_changes_the_embedding():
    stage, given, other = prior(), batch(), batch(seed=2)
    draw = lambda b: stage.sample(b, Noise(range(4)), settings())
    for name in ("text_states", "text_embed"):
        assert (draw(given) - draw(given | {name: other[name]})).abs().max() > 1e-4, name


@pytest.mark.parametrize("mode", ["unit", "standard", "none"])
def test_embeddings_leave_on_the_scale_of_the_clip(mode):
    """Statistics come from the data; the text embedding is scaled as z_i where that is its norm, and left as it is otherwise (Karlo)."""
    stage, given = prior(normalizer=mode), batch(64)
    data = SimpleNamespace(
        statistics=lambda: Statistics(
            64,
            given["image_embed"].mean(0).double(),
            given["image_embed"].double().T.cov(correction=0),
        )
    )
    stage._trainer = SimpleNamespace(datamodule=data)
    stage.setup("fit")
    stage._trainer = None
    z = stage.normalizer.normalize(given["image_embed"])
    back = stage.normalizer.denormalize(z)
    torch.testing.assert_close(
        back.norm(dim=1).square().mean(),
        given["image_embed"].norm(dim=1).square().mean(),
        rtol=1e-3,
        atol=1e-3,
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


def test_candidates_are_compared_by_direction_only():
    """A longer draw is no nearer: the paper's embeddings are all of unit length."""
    stage, given = prior(normalizer="none"), batch()
    axes = torch.eye(12)
    given["text_embed"] = axes[:1].repeat(4, 1)
    near, long = axes[0] + 0.1 * axes[1], 10 * axes[0] + 30 * axes[1]
    stage.normalizer.denormalize = lambda z: torch.stack([near, long]).expand(4, 2, 12)
    kept = stage.sample(given, Noise(range(4)), settings(num_candidates=2))
    assert torch.equal(kept, near.expand(4, 12))


def test_validation_tells_the_loss_with_captions_from_that_with_dropped_ones():
    stage, given, logged = prior(text_dropout=0.5), batch(16), {}
    stage.log_dict = lambda values, **_: logged.update(values)
    stage.log = lambda name, value, **_: logged.update({name: value})
    stage.validation_step(given, 3)
    one = stage.loss(given, torch.Generator().manual_seed(3))["per_sample"]
    other = stage.loss(
        given | {"text_states": None, "text_embed": None}, torch.Generator().manual_seed(3)
    )
    kept = stage.loss(given, torch.Generator().manual_seed(3), text_dropout=0.0)["per_sample"]
    dropped = torch.isclose(one, other["per_sample"])
    assert 2 < dropped.sum() < 14 and torch.isclose(one, kept)[~dropped].all()  # the same noise
    torch.testing.assert_close(logged["val/loss"], one.mean())
    torch.testing.assert_close(logged["val/loss_captioned"], kept.mean())
    assert not torch.isclose(logged["val/loss"], logged["val/loss_captioned"])


def test_threshold_holds_the_prediction():
    stage, given = prior(normalizer="none"), batch()
    assert stage.sample(given, Noise(range(4)), settings(threshold=0.1)).abs().max() <= 0.1 + 1e-6
    assert stage.sample(given, Noise(range(4)), settings()).abs().max() > 0.1


def test_analytic_variance_is_estimated_saved_and_used():
    stage, given = prior(), batch(8)
    stage.x0_error.fill_(math.nan)
    draw = lambda s, sampler: s.sample(given, Noise(range(8)), settings(sampler=sampler))
    assert torch.equal(draw(stage, "analytic"), draw(stage, "ddpm"))  # not estimated yet
    stage.estimate_variance([given], draws=2)
    assert not stage.x0_error.isnan().any()
    assert (draw(stage, "analytic") - draw(stage, "ddpm")).abs().max() > 1e-3
    z, t = stage.normalizer.normalize(given["image_embed"]), torch.full((8,), 999)
    error = (stage.net(torch.randn(8, 12), t, **stage.conditions(given)) - z).square().mean()
    assert (
        abs(stage.x0_error[-50:].mean() / error - 1) < 0.2
    )  # pure noise: the error hardly depends on it
    again = DiffusionPrior(**stage.hparams)
    again.load_state_dict(stage.state_dict())
    assert torch.equal(draw(again.eval(), "analytic"), draw(stage, "analytic"))


def test_it_overfits_eight_embeddings():
    """Eight captions and embeddings: each must come back from its caption, also with guidance."""
    torch.manual_seed(1)
    stage, given = prior(optimizer=OptimizerConfig(lr=2e-3)), batch(8)
    optimizer = torch.optim.AdamW(stage.parameters(), lr=2e-3, weight_decay=0.0)
    many = {
        key: value * 8 if isinstance(value, list) else value.repeat(8, *[1] * (value.ndim - 1))
        for key, value in given.items()
    }
    for _ in range(300):
        optimizer.zero_grad()
        stage.loss(many)["loss"].backward()
        optimizer.step()
    stage.estimate_variance([many], draws=5)
    for wanted in (
        PriorSamplingConfig(steps=16),
        PriorSamplingConfig(sampler="ddim", steps=8, guidance_scale=1.5),
    ):
        drawn = stage.sample(given, Noise(range(8)), wanted)
        similarity = torch.nn.functional.cosine_similarity(
            drawn[:, None], given["image_embed"][None], dim=-1
        )
        assert similarity.argmax(1).tolist() == list(range(8))
        assert similarity.diagonal().min() > 0.95


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"guidance_scale": 0.5}, r"guidance_scale is 0\.5: give 1"),
        ({"guidance_scale": math.nan}, r"guidance_scale is nan"),
        ({"steps": 0}, r"draw in 0 steps"),
        ({"num_candidates": 0}, r"among 0 candidates"),
        ({"sampler": "euler"}, r'no sampler "euler"'),
    ],
)
def test_bad_sampling_is_a_sentence(wrong, said):
    with pytest.raises(ValueError, match=said):
        PriorSamplingConfig(**wrong)


def test_more_steps_than_timesteps_is_a_sentence():
    with pytest.raises(ValueError, match=r"ask for a number between 1 and 1000"):
        prior().sample(batch(), Noise(range(4)), settings(steps=1001))


def test_bad_settings_are_sentences():
    with pytest.raises(ValueError, match=r"no learned variance"):
        DiffusionPrior(net=NET, text=TEXT, diffusion=DiffusionConfig(parametrization="x0"))
    with pytest.raises(ValueError, match=r"text_dropout is 1\.0"):
        DiffusionPrior(net=NET, text=TEXT, text_dropout=1.0)


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
    """Shards, store, token states, statistics, monitors and variance together; a permutation has 6 batches."""
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
    whole, cut = (
        read_checkpoint(newest_checkpoint(tmp_path / folder)) for folder in ("whole", "cut")
    )
    assert whole["global_step"] == cut["global_step"] == 9
    for part in ("state_dict", "current_model_state"):
        assert all(
            torch.equal(value, cut[part][name]) and value.isfinite().all()
            for name, value in whole[part].items()
        )
    assert whole["clip_fingerprint"]["config"]["model"] == "fake-0"
    statistics = data.statistics()
    torch.testing.assert_close(
        stage.normalizer.norm.double(),
        (statistics.mean.square() + statistics.std.square()).sum().sqrt(),
    )
    assert "val/prior/rank" in run.logged_metrics and "val/loss" in run.logged_metrics
    assert run.logged_metrics["val/loss_captioned"].isfinite()
