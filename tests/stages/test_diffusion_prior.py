"""The diffusion prior: what it drops and learns, guidance, candidates and variance.

A sample does not depend on its batch.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from tests.stages.tiny_diffusion_prior import NET, TEXT, batch, prior
from unclip_pl.diffusion.noise import Noise
from unclip_pl.diffusion.process import DiffusionConfig
from unclip_pl.stages.base import OptimizerConfig
from unclip_pl.stages.diffusion_prior import DiffusionPrior, PriorSamplingConfig

SAMPLERS = ["analytic", "ddpm", "ddim", "dpm_solver_pp"]


def settings(**changes) -> PriorSamplingConfig:
    return PriorSamplingConfig(**{"sampler": "ddim", "steps": 3, "num_candidates": 1} | changes)


def calls(stage: DiffusionPrior) -> list[int]:
    """Rows of each pass through the Transformer's last three tokens, from now on."""
    rows: list[int] = []
    denoise = stage.net.denoise
    stage.net.denoise = lambda x, t, prefix: (rows.append(len(x)), denoise(x, t, prefix))[1]
    return rows


def test_loss_is_the_mean_squared_error_of_z_on_the_networks_scale():
    stage, given = prior(cond_dropout=0.0), batch()
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
    """Rows after the conditional ones are unconditional: other captions do not change them, another
    x_t does."""
    stage, one, two = prior(padding), batch(), batch(seed=2)
    x, t = torch.randn(4, 12), torch.full((4,), 300)
    last_row = torch.full((4,), 4)
    null = [stage.encode_text(given, 4, null=True).index_select(last_row) for given in (one, two)]
    ours = stage.net.denoise(x, t, null[0])
    assert torch.equal(ours, stage.net.denoise(x, t, null[1]))
    moved = (ours - stage.net.denoise(x + 0.1, t, null[0])).abs()
    assert moved.min(1).values.max() > 1e-5
    dropped = stage.net(x, t, keep=torch.zeros(4, dtype=torch.bool))
    torch.testing.assert_close(ours, dropped, rtol=1e-5, atol=1e-5)


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
    cond = stage.sample(given, Noise(range(4)), one)
    null = stage.sample({}, Noise(range(4)), one)
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
    candidates = torch.arange(4).repeat_interleave(2).repeat(2)
    keep = torch.tensor([True] * 8 + [False] * 8)
    conditions = stage.conditions(given)
    rows = {key: value[candidates] for key, value in conditions.items() if value is not None}
    stage.net.denoise = lambda x, t, prefix: stage.net(x, t, **rows, keep=keep)
    plain = stage.sample(given, Noise(range(4)), wanted)
    torch.testing.assert_close(plain, cached, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("padding", ["learned", "masked"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_embedding_k_is_the_same_in_any_batch(sampler, padding):
    stage, given = prior(padding), batch()
    given["text_mask"][0, 2:] = False
    wanted = settings(sampler=sampler, guidance_scale=2.0, num_candidates=2, eta=0.5)
    whole = stage.sample(given, Noise([5, 6, 7, 8]), wanted)
    for k in range(4):
        row = {key: value[k : k + 1] for key, value in given.items()}
        single = stage.sample(row, Noise([5 + k]), wanted)
        torch.testing.assert_close(whole[k : k + 1], single, rtol=1e-4, atol=1e-4)
    other = stage.sample(given, Noise([15, 16, 17, 18]), wanted)
    assert not torch.allclose(whole, other, atol=1e-3)


def test_nothing_of_the_caller_is_changed():
    stage, given = prior(), batch()
    before = copy.deepcopy(given)
    stage.sample(given, Noise(range(4)), settings(guidance_scale=2.0, num_candidates=2))
    stage.loss(given)
    stage.estimate_variance([given], draws=1)
    assert given.keys() == before.keys()
    assert given["key"] == before["key"]
    for name, value in given.items():
        assert not torch.is_tensor(value) or torch.equal(value, before[name]), name


def test_the_candidate_nearer_to_the_text_embedding_is_kept():
    stage, given = prior(), batch()
    both = []
    denormalize = stage.normalizer.denormalize
    stage.normalizer.denormalize = lambda z: (both.append(denormalize(z)), denormalize(z))[1]
    kept = stage.sample(given, Noise(range(4)), settings(num_candidates=3))
    near = F.cosine_similarity(both[0], given["text_embed"][:, None], dim=-1)
    assert both[0].shape == (4, 3, 12) and (near.max(1).values - near.min(1).values).min() > 0
    torch.testing.assert_close(F.cosine_similarity(kept, given["text_embed"]), near.max(1).values)
    without = stage.sample({"tokens": given["tokens"]}, Noise(range(4)), settings(num_candidates=3))
    assert without.shape == (4, 12)


def test_every_condition_changes_the_embedding():
    stage, given, other = prior(), batch(), batch(seed=2)
    draw = lambda b: stage.sample(b, Noise(range(4)), settings())
    for name in ("text_states", "text_embed"):
        assert (draw(given) - draw(given | {name: other[name]})).abs().max() > 1e-4, name


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
    stage, given, logged = prior(cond_dropout=0.5), batch(16), {}
    stage.log_dict = lambda values, **_: logged.update(values)
    stage.validation_step(given, 3)
    seeded = lambda: torch.Generator().manual_seed(3)
    one = stage.loss(given, seeded())["per_sample"]
    other = stage.loss(given | {"text_states": None, "text_embed": None}, seeded())["per_sample"]
    kept = stage.loss(given, seeded(), cond_dropout=0.0)["per_sample"]
    dropped = torch.isclose(one, other)
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
    # Pure noise: the error hardly depends on it.
    assert abs(stage.x0_error[-50:].mean() / error - 1) < 0.2
    again = DiffusionPrior(**stage.hparams)
    again.load_state_dict(stage.state_dict())
    assert torch.equal(draw(again.eval(), "analytic"), draw(stage, "analytic"))


def test_it_overfits_eight_embeddings():
    """Eight captions and embeddings: each must come back from its caption, also with guidance."""
    torch.manual_seed(1)
    stage, given = prior(optimizer=OptimizerConfig(lr=2e-3)), batch(8)
    optimizer = torch.optim.AdamW(stage.parameters(), lr=2e-3, weight_decay=0.0)
    rows = torch.arange(8).repeat(8)
    many = {name: value[rows] for name, value in given.items() if torch.is_tensor(value)}
    for _ in range(300):
        optimizer.zero_grad()
        stage.loss(many)["loss"].backward()
        optimizer.step()
    stage.estimate_variance([many], draws=5)
    guided = PriorSamplingConfig(sampler="ddim", steps=8, guidance_scale=1.5)
    for wanted in (PriorSamplingConfig(steps=16), guided):
        drawn = stage.sample(given, Noise(range(8)), wanted)
        similarity = F.cosine_similarity(drawn[:, None], given["image_embed"][None], dim=-1)
        assert similarity.argmax(1).tolist() == list(range(8))
        assert similarity.diagonal().min() > 0.95


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"guidance_scale": 0.5}, r"guidance_scale is 0\.5: give 1"),
        ({"guidance_scale": math.nan}, r"guidance_scale is nan"),
        ({"steps": 0}, r"in 0 steps"),
        ({"num_candidates": 0}, r"among 0 candidates"),
        ({"sampler": "euler"}, r'no sampler "euler"'),
    ],
)
def test_bad_sampling_is_a_sentence(wrong, said):
    with pytest.raises(ValueError, match=said):
        PriorSamplingConfig(**wrong)


def test_more_steps_than_timesteps_is_a_sentence():
    with pytest.raises(ValueError, match="1000"):
        prior().sample(batch(), Noise(range(4)), settings(steps=1001))


def test_bad_settings_are_sentences():
    with pytest.raises(ValueError, match=r"no learned variance"):
        DiffusionPrior(net=NET, text=TEXT, diffusion=DiffusionConfig(parametrization="x0"))
    with pytest.raises(ValueError, match=r"cond_dropout is 1\.0"):
        DiffusionPrior(net=NET, text=TEXT, cond_dropout=1.0)
