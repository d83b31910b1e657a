"""The AR prior: drops text at its rate, learns eight captions to the exact codes; a sample does not
depend on its batch.
"""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.factories import fit_quantizer
from tests.stages.tiny_ar_prior import NET, TEXT, batch, prior
from unclip_pl.diffusion.noise import Noise
from unclip_pl.networks.text import TextConfig
from unclip_pl.stages.ar_prior import ARPrior, ARPriorSamplingConfig


def test_loss_is_nats_a_code_and_every_parameter_gets_a_gradient():
    stage = prior(
        text=TextConfig(kind="states", states_width=10, context_length=6), cond_dropout=0.5
    )
    data = batch(16)
    losses = stage.loss(data, torch.Generator().manual_seed(0))
    losses["loss"].backward()
    for name, parameter in stage.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name
    for parameter in stage.net.head.parameters():
        torch.nn.init.zeros_(parameter)
    # Knowing nothing costs ln(buckets).
    assert abs(stage.loss(data)["loss"].item() - torch.tensor(32.0).log()) < 1e-5


def test_loss_is_the_codes_log_likelihood_one_by_one():
    stage, data = prior(cond_dropout=0.0).eval(), batch(3)
    codes = stage.quantizer.encode(data["image_embed"])
    dot = stage.quantizer.encode_dot(data["image_embed"], data["text_embed"])
    total = 0.0
    with torch.no_grad():
        prefix = stage.prefix(data, torch.ones(3, dtype=torch.bool), dot)
        for k in range(stage.quantizer.codes):
            shares = stage.net(prefix, codes[:, :k])[:, -1].softmax(-1)
            total -= shares[torch.arange(3), codes[:, k]].log().mean().item()
    assert abs(stage.loss(data)["loss"].item() - total / stage.quantizer.codes) < 1e-5


def test_caption_embedding_and_dot_product_are_dropped_together_at_the_rate():
    stage, kept = prior(cond_dropout=0.1), []
    plain = stage.net.prefix
    stage.net.prefix = lambda keep, *a, **k: (kept.append(keep), plain(keep, *a, **k))[1]
    for _ in range(40):
        stage.loss(batch(100))
    assert abs(torch.cat(kept).float().mean() - 0.9) < 0.02
    stage.cond_dropout = 1.0
    other = batch(100, seed=2)
    text = {name: other[name] for name in ("text_embed", "text_states", "tokens", "text_mask")}
    assert torch.equal(stage.loss(batch(100))["loss"], stage.loss(batch(100) | text)["loss"])
    stage.cond_dropout = 0.0
    assert not torch.equal(stage.loss(batch(100))["loss"], stage.loss(batch(100) | text)["loss"])


@pytest.mark.parametrize("drop_dot", [True, False])
def test_a_dropped_text_keeps_the_dot_product_where_that_is_asked_for(drop_dot):
    stage, data = prior(net=replace(NET, drop_dot=drop_dot)).eval(), batch(16)
    other = data | {"text_embed": batch(16, seed=2)["text_embed"]}
    losses = [stage.loss(one, cond_dropout=1.0)["loss"] for one in (data, other)]
    assert torch.equal(*losses) == drop_dot  # z_t is gone, its product with z_i may stay
    seen, plain = [], stage.net.prefix
    stage.net.prefix = lambda *a, **k: (seen.append(plain(*a, **k)), seen[-1])[1]
    stage.sample(data, Noise(range(16)), ARPriorSamplingConfig(guidance_scale=2.0))
    text, null = (prefix[:, -1] for prefix in seen)  # the dot token, drawn once for both
    assert torch.equal(text, null) != drop_dot


def test_validation_tells_the_loss_with_captions_from_that_with_dropped_ones():
    stage, data, logged = prior(cond_dropout=1.0).eval(), batch(16), {}
    stage.log_dict = lambda values, **_: logged.update(values)
    stage.validation_step(data, 0)
    assert torch.equal(logged["val/loss"], stage.loss(data, cond_dropout=1.0)["loss"])
    assert torch.equal(logged["val/loss_captioned"], stage.loss(data, cond_dropout=0.0)["loss"])
    assert not torch.isclose(logged["val/loss"], logged["val/loss_captioned"])


@pytest.mark.parametrize(
    "settings",
    [
        ARPriorSamplingConfig(),
        ARPriorSamplingConfig(guidance_scale=3.0, temperature=0.7, top_p=0.8),
    ],
)
def test_embedding_k_is_the_same_in_any_batch_and_nothing_given_changes(settings):
    stage, given = prior().eval(), batch()
    before = {name: v.clone() for name, v in given.items() if torch.is_tensor(v)}
    whole = stage.sample(given, Noise([5, 6, 7, 8]), settings)
    assert whole.shape == (4, 12) and whole.isfinite().all()
    part = stage.sample(
        {name: value[1:3] for name, value in given.items()}, Noise([6, 7]), settings
    )
    torch.testing.assert_close(whole[1:3], part)
    assert torch.equal(whole, stage.sample(given, Noise([5, 6, 7, 8]), settings))
    assert not torch.equal(whole, stage.sample(given, Noise([1, 2, 3, 4]), settings))
    assert all(torch.equal(given[name], value) for name, value in before.items())


def test_no_guidance_costs_one_pass_and_guidance_one_of_two_halves():
    stage, rows, steps = prior().eval(), [], []
    stage.net.transformer.blocks[0].register_forward_hook(
        lambda module, inputs, output: rows.append(tuple(inputs[0].shape[:2]))
    )
    report = lambda *step: steps.append(step)
    stage.sample(batch(), Noise(range(4)), ARPriorSamplingConfig(), callback=report)
    codes = stage.quantizer.codes
    assert rows == [(4, 8)] + [(4, 1)] * (codes - 1)
    assert steps == [(k, codes) for k in range(1, codes + 1)]
    rows.clear()
    stage.sample(batch(), Noise(range(4)), ARPriorSamplingConfig(guidance_scale=2.0))
    assert rows == [(8, 8)] + [(8, 1)] * (codes - 1)


def test_guidance_and_every_condition_change_the_draw():
    stage, given, other = prior().eval(), batch(16), batch(16, seed=2)

    def draw(data, **settings):
        return stage.sample(data, Noise(range(16)), ARPriorSamplingConfig(**settings))

    plain = draw(given)
    assert not torch.equal(plain, draw(given, guidance_scale=4.0))
    for name in ("text_embed", "text_states"):
        assert not torch.equal(plain, draw(given | {name: other[name]})), name
    # It must not know the image embedding.
    assert torch.equal(plain, draw(given | {"image_embed": other["image_embed"]}))
    null = draw({})
    assert not torch.equal(plain, null) and null.shape == (16, 12)


def test_dot_product_token_comes_from_the_top_half():
    data = batch(200)
    stage, seen = prior(data).eval(), []
    plain = stage.net.prefix
    stage.net.prefix = lambda keep, dot, *a, **k: (seen.append(dot), plain(keep, dot, *a, **k))[1]
    dots = stage.quantizer.encode_dot(data["image_embed"], data["text_embed"])
    stage.sample(batch(64), Noise(range(64)))
    assert seen[0].min() >= dots.median() and seen[0].unique().numel() > 8
    stage.sample(batch(64), Noise(range(64)), ARPriorSamplingConfig(dot_percentile=95))
    assert seen[1].min() >= dots.double().quantile(0.94)


@pytest.mark.parametrize(
    "text",
    [
        TEXT,
        TextConfig(
            kind="transformer", vocab_size=101, context_length=6, width=16, depth=1, heads=2
        ),
    ],
)
def test_it_overfits_eight_captions_to_the_exact_codes(text):
    data = batch(8)
    # Neither z_t nor the dot product tells them apart: the caption must.
    data["text_embed"] = torch.zeros(8, 12)
    stage = ARPrior(net=NET, text=text, cond_dropout=0.0, max_error=0.0)
    fit_quantizer(stage, data)
    optimizer = torch.optim.AdamW(stage.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        losses = stage.loss(data)
        losses["loss"].backward()
        optimizer.step()
    codes = stage.quantizer.encode(data["image_embed"])
    # The rank of eight rows about their mean.
    assert losses["loss"] < 0.05 and stage.quantizer.codes == 7
    for settings in (ARPriorSamplingConfig(temperature=0.0), ARPriorSamplingConfig(top_p=0.5)):
        drawn = stage.eval().sample(data, Noise(range(8)), settings)
        assert torch.equal(stage.quantizer.encode(drawn), codes)
        exact = stage.quantizer.unproject(stage.quantizer.project(data["image_embed"]))
        torch.testing.assert_close(drawn, exact, rtol=1e-4, atol=1e-4)


def test_hyperparameters_and_weights_rebuild_the_stage_with_its_quantiser(tmp_path):
    stage = prior(sampling=ARPriorSamplingConfig(guidance_scale=2.0, top_p=0.9)).eval()
    save_file(stage.state_dict(), tmp_path / "weights.safetensors")
    again = ARPrior(**stage.hparams)
    assert again.quantizer.codes == 0
    again.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert again.quantizer.codes == stage.quantizer.codes and again.sampling == stage.sampling
    assert torch.equal(
        again.eval().sample(batch(), Noise(range(4))), stage.sample(batch(), Noise(range(4)))
    )


def test_unfitted_quantiser_or_half_a_text_is_a_sentence():
    with pytest.raises(ValueError, match="not fitted"):
        ARPrior(net=NET, text=TEXT).sample(batch(), Noise(range(4)))
    with pytest.raises(ValueError, match="not fitted"):
        ARPrior(net=NET, text=TEXT).loss(batch())
    stage = prior()
    without = {name: value for name, value in batch().items() if name != "text_states"}
    for call in (
        lambda: stage.loss(without),
        lambda: stage.eval().sample(without, Noise(range(4))),
    ):
        with pytest.raises(ValueError, match="needs text_states"):
            call()


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"guidance_scale": 0.5}, "guidance_scale"),
        ({"temperature": -1.0}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"dot_percentile": 100.0}, "dot_percentile"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"temperature": float("nan")}, "temperature"),
    ],
)
def test_impossible_settings_are_a_sentence(values, name):
    with pytest.raises(ValueError, match=name):
        ARPriorSamplingConfig(**values)


def test_a_share_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"model\.cond_dropout is 1\.5"):
        prior(cond_dropout=1.5)
