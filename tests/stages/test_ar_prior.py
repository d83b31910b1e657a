"""The AR prior: fitted to the store, drops text at its rate, learns eight captions to the exact codes, draws that do not depend on their batch."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader

from unclip_pl.data.store import EmbeddingStore
from unclip_pl.diffusion.noise import Noise
from unclip_pl.networks.ar_prior import ARPriorConfig
from unclip_pl.networks.text import TextConfig
from unclip_pl.pipeline import release
from unclip_pl.pipeline.release import Release
from unclip_pl.pipeline.weights import load_pretrained, load_stage
from unclip_pl.stages.ar_prior import ARPrior, SamplingConfig, spread_rows
from unclip_pl.training.ema import EMA
from unclip_pl.utils.errors import UserError

NET = ARPriorConfig(embed_dim=12, width=32, depth=2, heads=4, max_codes=8, buckets=32)
TEXT = TextConfig(kind="states", states_width=10, context_length=6)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def batch(size: int = 4, seed: int = 1) -> dict:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 100, (size, 6), generator=generator)
    tokens[:, 4] = 100  # EOT: the largest
    image = torch.randn(size, 12, generator=generator) * 0.7 ** torch.arange(12)
    return {
        "key": [str(i) for i in range(size)],
        "image_embed": image,
        "text_embed": image + torch.randn(size, 12, generator=generator),
        "text_states": torch.randn(size, 6, 10, generator=generator),
        "tokens": tokens,
        "text_mask": torch.arange(6).repeat(size, 1) <= 4,
    }


def prior(data: dict | None = None, **changes) -> ARPrior:
    """Fitted to `data`, with weights that make every part of the text speak."""
    stage = ARPrior(**{"net": NET, "text": TEXT} | changes)
    data = data or batch(200)
    stage.quantizer.fit(
        data["image_embed"].double().mean(0),
        data["image_embed"].double().T.cov(correction=0),
        data["image_embed"],
        data["text_embed"],
    )
    for parameter in stage.net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return stage


def fake_store(folder, shards: dict[str, int], dim: int = 12, without: str = "") -> EmbeddingStore:
    """A store's files as `EmbeddingStore.embed` writes them, of random embeddings, without a CLIP."""
    store = EmbeddingStore(folder)
    entries = {}
    for number, (name, rows) in enumerate(shards.items()):
        data = batch(rows, seed=number)
        image = data["image_embed"].repeat(1, -(-dim // 12))[:, :dim].half()
        exact = image.double()
        tensors = {
            "image_embed": image,
            "text_embed": (image + torch.randn_like(image.float())).half(),
            "tokens": data["tokens"].int(),
            "mean": exact.mean(0),
            "scatter": (exact - exact.mean(0)).T @ (exact - exact.mean(0)),
        }
        meta = json.dumps({"keys": [f"{name}{i}" for i in range(rows)], "source": {"size": 1}})
        save_file(
            {key: value for key, value in tensors.items() if key != without},
            store.path(name),
            {"rows": meta},
        )
        entries[name] = {"file": store.path(name).name, "rows": rows}
    (folder / "manifest.json").write_text(
        json.dumps({"format": 1, "clip": {}, "rows": sum(shards.values()), "shards": entries})
    )
    return store


def test_loss_is_nats_a_code_and_every_parameter_gets_a_gradient():
    stage = prior(text=TextConfig(kind="states", states_width=10, context_length=6), drop_text=0.5)
    data = batch(16)
    losses = stage.loss(data, torch.Generator().manual_seed(0))
    losses["loss"].backward()
    assert [
        name for name, p in stage.named_parameters() if p.grad is None or not p.grad.any()
    ] == []
    for parameter in stage.net.head.parameters():
        torch.nn.init.zeros_(parameter)
    assert (
        abs(stage.loss(data)["loss"].item() - torch.tensor(32.0).log()) < 1e-5
    )  # knowing nothing costs ln(buckets)


def test_loss_is_the_codes_log_likelihood_one_by_one():
    stage, data = prior(drop_text=0.0).eval(), batch(3)
    codes, dot = (
        stage.quantizer.encode(data["image_embed"]),
        stage.quantizer.encode_dot(data["image_embed"], data["text_embed"]),
    )
    total = 0.0
    with torch.no_grad():
        prefix = stage.prefix(data, torch.ones(3, dtype=torch.bool), dot)
        for k in range(stage.quantizer.codes):
            shares = stage.net(prefix, codes[:, :k])[:, -1].softmax(-1)
            total -= shares[torch.arange(3), codes[:, k]].log().mean().item()
    assert abs(stage.loss(data)["loss"].item() - total / stage.quantizer.codes) < 1e-5


def test_caption_embedding_and_dot_product_are_dropped_together_at_the_rate():
    stage, kept = prior(drop_text=0.1), []
    plain = stage.net.prefix
    stage.net.prefix = lambda keep, *a, **k: (kept.append(keep), plain(keep, *a, **k))[1]
    for _ in range(40):
        stage.loss(batch(100))
    assert abs(torch.cat(kept).float().mean() - 0.9) < 0.02
    stage.drop_text = 1.0
    other = batch(100, seed=2)
    text = {name: other[name] for name in ("text_embed", "text_states", "tokens", "text_mask")}
    assert torch.equal(stage.loss(batch(100))["loss"], stage.loss(batch(100) | text)["loss"])
    stage.drop_text = 0.0
    assert not torch.equal(stage.loss(batch(100))["loss"], stage.loss(batch(100) | text)["loss"])


@pytest.mark.parametrize("drop_dot", [True, False])
def test_a_dropped_text_keeps_the_dot_product_where_that_is_asked_for(drop_dot):
    stage, data = prior(net=replace(NET, drop_dot=drop_dot)).eval(), batch(16)
    other = data | {"text_embed": batch(16, seed=2)["text_embed"]}
    losses = [stage.loss(one, drop_text=1.0)["loss"] for one in (data, other)]
    assert torch.equal(*losses) == drop_dot  # z_t is gone, its product with z_i may stay
    seen, plain = [], stage.net.prefix
    stage.net.prefix = lambda *a, **k: (seen.append(plain(*a, **k)), seen[-1])[1]
    stage.sample(data, Noise(range(16)), SamplingConfig(guidance_scale=2.0))
    text, null = (prefix[:, -1] for prefix in seen)  # the dot token, drawn once for both
    assert torch.equal(text, null) != drop_dot


def test_validation_tells_the_loss_with_captions_from_that_with_dropped_ones():
    stage, data, logged = prior(drop_text=1.0).eval(), batch(16), {}
    stage.log_dict = lambda values, **_: logged.update(values)
    stage.log = lambda name, value, **_: logged.update({name: value})
    stage.validation_step(data, 0)
    assert torch.equal(logged["val/loss"], stage.loss(data, drop_text=1.0)["loss"])
    assert torch.equal(logged["val/loss_captioned"], stage.loss(data, drop_text=0.0)["loss"])
    assert not torch.isclose(logged["val/loss"], logged["val/loss_captioned"])


@pytest.mark.parametrize(
    "settings", [SamplingConfig(), SamplingConfig(guidance_scale=3.0, temperature=0.7, top_p=0.8)]
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
    stage.sample(
        batch(), Noise(range(4)), SamplingConfig(), callback=lambda *step: steps.append(step)
    )
    codes = stage.quantizer.codes
    assert rows == [(4, 8)] + [(4, 1)] * (codes - 1) and steps == [
        (k, codes) for k in range(1, codes + 1)
    ]
    rows.clear()
    stage.sample(batch(), Noise(range(4)), SamplingConfig(guidance_scale=2.0))
    assert rows == [(8, 8)] + [(8, 1)] * (codes - 1)


def test_guidance_and_every_condition_change_the_draw():
    stage, given, other = prior().eval(), batch(16), batch(16, seed=2)
    draw = lambda b, **settings: stage.sample(b, Noise(range(16)), SamplingConfig(**settings))
    plain = draw(given)
    assert not torch.equal(plain, draw(given, guidance_scale=4.0))
    for name in ("text_embed", "text_states"):
        assert not torch.equal(plain, draw(given | {name: other[name]})), name
    assert torch.equal(
        plain, draw(given | {"image_embed": other["image_embed"]})
    )  # which it must not know
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
    stage.sample(batch(64), Noise(range(64)), SamplingConfig(dot_percentile=95))
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
    data["text_embed"] = torch.zeros(
        8, 12
    )  # neither z_t nor the dot product says which it is: the caption must
    stage = ARPrior(net=NET, text=text, drop_text=0.0, max_error=0.0)
    image = data["image_embed"].double()
    stage.quantizer.fit(
        image.mean(0), image.T.cov(correction=0), data["image_embed"], data["text_embed"]
    )
    optimizer = torch.optim.AdamW(stage.parameters(), lr=3e-3)
    for _ in range(150):
        optimizer.zero_grad()
        losses = stage.loss(data)
        losses["loss"].backward()
        optimizer.step()
    codes = stage.quantizer.encode(data["image_embed"])
    assert (
        losses["loss"] < 0.05 and stage.quantizer.codes == 7
    )  # the rank of eight rows about their mean
    for settings in (SamplingConfig(temperature=0.0), SamplingConfig(top_p=0.5)):
        drawn = stage.eval().sample(data, Noise(range(8)), settings)
        assert torch.equal(stage.quantizer.encode(drawn), codes)
        assert torch.allclose(
            drawn,
            stage.quantizer.unproject(stage.quantizer.project(data["image_embed"])),
            rtol=1e-4,
            atol=1e-4,
        )


def test_hyperparameters_and_weights_rebuild_the_stage_with_its_quantiser(tmp_path):
    stage = prior(sampling=SamplingConfig(guidance_scale=2.0, top_p=0.9)).eval()
    save_file(stage.state_dict(), tmp_path / "weights.safetensors")
    again = ARPrior(**stage.hparams)
    assert again.quantizer.codes == 0
    again.load_state_dict(load_file(tmp_path / "weights.safetensors"))
    assert again.quantizer.codes == stage.quantizer.codes and again.sampling == stage.sampling
    assert torch.equal(
        again.eval().sample(batch(), Noise(range(4))), stage.sample(batch(), Noise(range(4)))
    )


def test_setup_fits_to_the_training_shards_once_and_says_what_it_costs(tmp_path, capsys, caplog):
    store = fake_store(tmp_path, {"a": 70, "b": 50, "val": 40})
    stage = ARPrior(net=NET, text=TEXT)
    stage._trainer = SimpleNamespace(
        datamodule=SimpleNamespace(store=store, train_shards=["a", "b"])
    )
    with caplog.at_level("INFO"):
        stage.setup("fit")
    images = torch.cat(
        [torch.from_numpy(store.shard(name).image_embed.copy()) for name in ("a", "b")]
    ).double()
    torch.testing.assert_close(stage.quantizer.mean.double(), images.mean(0), rtol=1e-5, atol=1e-6)
    said = caplog.text + capsys.readouterr().err
    assert "AR prior: 7 codes from 120 embeddings" in said and "PCA alone loses" in said
    mean = stage.quantizer.mean.clone()
    few = ARPrior(net=replace(NET, max_codes=5), text=TEXT)
    with pytest.raises(UserError, match=r"set model\.net\.max_codes to 7"):
        few.fit_quantizer(store, ["a", "b"])
    assert not few.quantizer.codes
    stage._trainer.datamodule.train_shards = ["val"]
    stage.setup("fit")
    assert torch.equal(stage.quantizer.mean, mean)
    twin = ARPrior(net=NET, text=TEXT)
    twin.fit_quantizer(EmbeddingStore(tmp_path), ["a", "b"])
    assert all(
        torch.equal(a, b)
        for a, b in zip(stage.quantizer.buffers(), twin.quantizer.buffers(), strict=True)
    )


class Toy(LightningDataModule):
    """Batches that go with a store."""

    def __init__(self, store: EmbeddingStore, train_shards: list[str]) -> None:
        super().__init__()
        self.store, self.train_shards = store, train_shards

    def train_dataloader(self) -> DataLoader:
        return DataLoader([batch(8, seed) for seed in range(4)], batch_size=None)

    val_dataloader = train_dataloader


def test_a_fit_keeps_the_quantiser_and_a_resumed_one_keeps_it_too(tmp_path):
    store = fake_store(tmp_path, {"a": 70, "other": 40})

    def trained(steps: int, shards: list[str], **options) -> ARPrior:
        trainer = Trainer(
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            num_sanity_val_steps=0,
            callbacks=[EMA(0.9)],
        )
        stage = ARPrior(net=NET, text=TEXT)
        trainer.fit(stage, datamodule=Toy(store, shards), **options)
        trainer.save_checkpoint(tmp_path / f"{steps}.ckpt")
        figures = trainer.callback_metrics
        assert figures["val/loss"].isfinite() and figures["val/loss_captioned"].isfinite()
        assert 0 <= trainer.callback_metrics["val/accuracy"] <= 1
        return stage

    first = trained(4, ["a"])
    loaded = load_stage(tmp_path / "4.ckpt", ARPrior)
    resumed = trained(8, ["other"], ckpt_path=tmp_path / "4.ckpt")
    assert not torch.equal(first.net.head.weight, resumed.net.head.weight)
    for stage in (loaded, resumed):
        assert stage.quantizer.codes == first.quantizer.codes
        assert all(
            torch.equal(a, b)
            for a, b in zip(stage.quantizer.buffers(), first.quantizer.buffers(), strict=True)
        )


def test_training_starts_from_a_prior_that_reads_the_dot_product_in_the_same_place_only(tmp_path):
    stage = prior()
    tensors = stage.state_dict()
    content = Release("ARPrior", dict(stage.hparams), None, tensors)
    release.write(tmp_path / "prior", content, "", exact=tuple(tensors))
    other = ARPrior(net=replace(NET, dot_first=True), text=TEXT)
    with pytest.raises(UserError, match=r"trained with model\.net\.dot_first False"):
        load_pretrained(other, tmp_path / "prior")
    again = ARPrior(net=NET, text=TEXT)
    load_pretrained(again, tmp_path / "prior")
    assert torch.equal(again.net.head.weight, stage.net.head.weight)


def test_rows_are_spread_over_all_shards(tmp_path):
    store = fake_store(tmp_path, {"a": 7, "b": 12, "c": 6})
    every = torch.cat([torch.from_numpy(store.shard(name).image_embed.copy()) for name in "abc"])
    for count, step in ((25, 1), (1000, 1), (13, 2), (9, 3), (5, 5), (1, 25)):
        images, texts = spread_rows(store, list("abc"), count)
        assert (
            torch.equal(images, every[::step])
            and texts.shape == images.shape
            and len(images) <= count
        )


def test_bad_stores_and_data_are_sentences(tmp_path):
    stage = ARPrior(net=NET, text=TEXT)
    with pytest.raises(UserError, match="no whole rows for a"):
        stage.fit_quantizer(EmbeddingStore(tmp_path / "nothing"), ["a"])
    with pytest.raises(UserError, match=r"set data\.train"):
        stage.fit_quantizer(EmbeddingStore(tmp_path), [])
    folder = tmp_path / "wide"
    folder.mkdir()
    with pytest.raises(
        UserError, match=r"16 numbers and model\.net\.embed_dim is 12: set it to 16"
    ):
        stage.fit_quantizer(fake_store(folder, {"a": 5}, dim=16), ["a"])
    folder = tmp_path / "old"
    folder.mkdir()
    with pytest.raises(UserError, match="no statistics"):
        stage.fit_quantizer(fake_store(folder, {"a": 5}, without="scatter"), ["a"])

    def data(text_states=True, **changed):
        return SimpleNamespace(
            clip=SimpleNamespace(
                **{"embed_dim": 12, "context_length": 6, "states_width": 10} | changed
            ),
            text_states=text_states,
        )

    stage.check_data(data())
    for given, message in (
        (data(embed_dim=16), r"model\.net\.embed_dim is 12: set it to 16"),
        (data(text_states=False), r"set data\.text_states to true"),
        (data(states_width=8), r"model\.text\.states_width is 10: set it to 8"),
        (data(context_length=77), r"model\.text\.context_length is 6: set it to 77"),
    ):
        with pytest.raises(UserError, match=message):
            stage.check_data(given)


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
    with pytest.raises(ValueError, match=f"{name} of the AR prior is .*: give "):
        SamplingConfig(**values)
