"""The AR prior is fitted to the store, keeps its quantiser in a resumed run, refuses other data."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule, Trainer
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from tests.stages.tiny_ar_prior import NET, TEXT, batch, prior
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.pipeline import release
from unclip_pl.pipeline.release import Release
from unclip_pl.pipeline.weights import load_pretrained, load_stage
from unclip_pl.stages.ar_prior import ARPrior, spread_rows
from unclip_pl.training.ema import EMA
from unclip_pl.utils.errors import UserError


def same_buffers(ours: torch.nn.Module, theirs: torch.nn.Module) -> bool:
    pairs = zip(ours.buffers(), theirs.buffers(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def embeddings(store: EmbeddingStore, shards: list[str]) -> torch.Tensor:
    """The image embeddings of some shards."""
    parts = [torch.from_numpy(store.shard(name).image_embed.copy()) for name in shards]
    return torch.cat(parts)


def fake_store(folder, shards: dict[str, int], dim: int = 12, without: str = "") -> EmbeddingStore:
    """A store as `EmbeddingStore.embed` writes it, with random embeddings instead of a CLIP's."""
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
        tensors.pop(without, None)
        save_file(tensors, store.path(name), {"rows": meta})
        entries[name] = {"file": store.path(name).name, "rows": rows}
    manifest = {"format": 1, "clip": {}, "rows": sum(shards.values()), "shards": entries}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return store


def test_setup_fits_to_the_training_shards_once_and_says_what_it_costs(tmp_path, capsys, caplog):
    store = fake_store(tmp_path, {"a": 70, "b": 50, "val": 40})
    stage = ARPrior(net=NET, text=TEXT)
    data = SimpleNamespace(store=store, train_shards=["a", "b"])
    stage._trainer = SimpleNamespace(datamodule=data)
    with caplog.at_level("INFO"):
        stage.setup("fit")
    images = embeddings(store, ["a", "b"]).double()
    torch.testing.assert_close(stage.quantizer.mean.double(), images.mean(0), rtol=1e-5, atol=1e-6)
    said = caplog.text + capsys.readouterr().err
    assert "AR prior: 7 codes from 120 embeddings" in said and "PCA loses" in said
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
    assert same_buffers(stage.quantizer, twin.quantizer)


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
        assert same_buffers(stage.quantizer, first.quantizer)


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
    every = embeddings(store, list("abc"))
    for count, step in ((25, 1), (1000, 1), (13, 2), (9, 3), (5, 5), (1, 25)):
        images, texts = spread_rows(store, list("abc"), count)
        assert torch.equal(images, every[::step])
        assert texts.shape == images.shape
        assert len(images) <= count


def test_bad_stores_and_data_are_sentences(tmp_path):
    stage = ARPrior(net=NET, text=TEXT)
    with pytest.raises(UserError, match="no whole rows for a"):
        stage.fit_quantizer(EmbeddingStore(tmp_path / "nothing"), ["a"])
    with pytest.raises(UserError, match=r"set data\.train"):
        stage.fit_quantizer(EmbeddingStore(tmp_path), [])
    folder = tmp_path / "wide"
    folder.mkdir()
    with pytest.raises(UserError, match=r"embed_dim is 12: set it to 16"):
        stage.fit_quantizer(fake_store(folder, {"a": 5}, dim=16), ["a"])
    folder = tmp_path / "old"
    folder.mkdir()
    with pytest.raises(UserError, match="no statistics"):
        stage.fit_quantizer(fake_store(folder, {"a": 5}, without="scatter"), ["a"])

    def data(text_states=True, **changed):
        widths = {"embed_dim": 12, "context_length": 6, "states_width": 10} | changed
        return SimpleNamespace(clip=SimpleNamespace(**widths), text_states=text_states)

    stage.check_data(data())
    for given, message in (
        (data(embed_dim=16), r"model\.net\.embed_dim is 12: set it to 16"),
        (data(text_states=False), r"set data\.text_states to true"),
        (data(states_width=8), r"model\.text\.states_width is 10: set it to 8"),
        (data(context_length=77), r"model\.text\.context_length is 6: set it to 77"),
    ):
        with pytest.raises(UserError, match=message):
            stage.check_data(given)
