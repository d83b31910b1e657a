"""The monitors of a prior: numbers known beforehand for perfect, collapsed and deaf priors; logged at validation with the EMA weights."""

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule
from lightning.pytorch.loggers import CSVLogger

from tests.training.toy import trainer
from unclip_pl.cluster.checkpoint_io import newest_checkpoint, read_checkpoint
from unclip_pl.data.loader_config import EmbeddingLoaderConfig
from unclip_pl.networks.prior import PriorTextConfig, PriorTransformerConfig
from unclip_pl.stages.base import OptimizerConfig
from unclip_pl.stages.diffusion_prior import DiffusionPrior, PriorSamplingConfig
from unclip_pl.training.checkpoints import BestCheckpoint, NewestCheckpoint
from unclip_pl.training.ema import EMA
from unclip_pl.training.prior_monitor import PriorMonitor, mean_pairwise, measure, ranks
from unclip_pl.training.variance import AnalyticVariance, add_variance

D = 12


def rows(size: int, seed: int = 0) -> dict:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 100, (size, 5), generator=generator)
    tokens[:, 4] = 400
    image = torch.randn(size, D, generator=generator)
    text = image + torch.randn(size, D, generator=generator)
    return {
        "key": [str(i) for i in range(size)],
        "tokens": tokens,
        "text_mask": tokens > 0,
        "text_embed": text,
        "image_embed": image,
    }


class Batches:
    def __init__(self, size: int, batch: int, seed: int) -> None:
        data = rows(size, seed)
        self.batches = [
            {key: value[i : i + batch] for key, value in data.items()}
            for i in range(0, size, batch)
        ]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


class Data(LightningDataModule):
    config = EmbeddingLoaderConfig()

    def train_dataloader(self):
        return Batches(32, 8, 0)

    def val_dataloader(self):
        return Batches(20, 8, 1)


def prior() -> DiffusionPrior:
    torch.manual_seed(0)
    return DiffusionPrior(
        PriorTransformerConfig(embed_dim=D, width=16, depth=1, heads=2),
        PriorTextConfig("tokens", vocab_size=401, context_length=5),
        sampling=PriorSamplingConfig(steps=2),
        optimizer=OptimizerConfig(lr=1e-2, warmup_steps=0),
    )


def test_rank_counts_ties_against():
    similarity = torch.tensor([[0.5, 0.1, 0.9], [0.2, 0.2, 0.1], [0.0, 0.1, 0.9]])
    assert ranks(similarity).tolist() == [2, 2, 1]


def test_a_perfect_prior_finds_every_image_and_a_deaf_one_is_at_chance():
    data = rows(200)
    perfect = measure(data["image_embed"][:50] * 3, data["image_embed"], data["text_embed"])
    torch.testing.assert_close(perfect["cosine_image"], torch.tensor(1.0))
    assert perfect["rank"] == perfect["r1"] == perfect["r5"] == 1
    torch.testing.assert_close(perfect["cosine_text"], perfect["cosine_text_data"])
    expected = F.cosine_similarity(data["image_embed"][:50], data["text_embed"][:50]).mean()
    torch.testing.assert_close(perfect["cosine_text_data"], expected)
    deaf = measure(
        torch.randn(50, D, generator=torch.Generator().manual_seed(5)),
        data["image_embed"],
        data["text_embed"],
    )
    assert (
        deaf["rank"] > 40
        and deaf["r5"] < 0.2
        and abs(deaf["cosine_text"] - deaf["cosine_text_other"]) < 0.15
    )
    others = F.cosine_similarity(data["image_embed"][:50, None], data["text_embed"][None], dim=-1)
    mask = ~torch.eye(50, 200, dtype=torch.bool)
    torch.testing.assert_close(perfect["cosine_text_other"], others[mask].mean())


def test_copying_the_caption_is_told_from_a_prior():
    """A prior that gives z_t back looks too near to z_t: above the data's own value."""
    data = rows(50)
    copied = measure(data["text_embed"], data["image_embed"], data["text_embed"])
    assert copied["cosine_text"] > copied["cosine_text_data"] + 0.2 and copied["cosine_image"] < 0.9


def test_mean_pairwise_cosine_is_over_pairs_of_one_group():
    z = torch.randn(7, D)
    group = torch.tensor([0, 0, 0, 1, 2, 2, 3])
    pair = lambda i, j: F.cosine_similarity(z[i], z[j], dim=0)
    torch.testing.assert_close(
        mean_pairwise(z, group), ((pair(0, 1) + pair(0, 2) + pair(1, 2)) / 3 + pair(4, 5)) / 2
    )
    assert mean_pairwise(z, torch.arange(7)) is None


def test_values_are_logged_at_validation_from_the_averaged_weights(tmp_path):
    stage, seen = prior(), []
    sample = stage.sample
    stage.sample = lambda batch, noise: (
        seen.append((stage.net.proj_out.weight.clone(), len(noise))),
        sample(batch, noise),
    )[1]
    ema = EMA(0.5)
    run = trainer(
        tmp_path,
        PriorMonitor(captions=12, draws=3),
        ema,
        steps=4,
        val_check_interval=2,
        check_val_every_n_epoch=None,
    )
    run.loggers = [CSVLogger(tmp_path)]
    run.fit(stage, datamodule=Data())
    names = {
        name.removeprefix("val/prior/")
        for name in run.logged_metrics
        if name.startswith("val/prior/")
    }
    assert names == {
        "cosine_image",
        "cosine_text",
        "cosine_text_data",
        "cosine_text_other",
        "rank",
        "r1",
        "r5",
        "spread",
        "spread_all",
    }
    assert all(torch.isfinite(run.logged_metrics[f"val/prior/{name}"]) for name in names)
    assert [count for _, count in seen] == [8, 3, 4] * 2
    torch.testing.assert_close(seen[-1][0], ema._averages["net.proj_out.weight"])
    assert not torch.equal(seen[-1][0], stage.net.proj_out.weight)


def test_real_images_of_one_caption_are_compared_where_there_are_several(tmp_path):
    data = Data()
    batches = data.val_dataloader()
    batches.batches[1]["tokens"][0] = batches.batches[0]["tokens"][3]
    data.val_dataloader = lambda: batches
    run = trainer(tmp_path, PriorMonitor(captions=8))
    run.validate(prior(), datamodule=data, verbose=False)
    expected = F.cosine_similarity(
        batches.batches[1]["image_embed"][0], batches.batches[0]["image_embed"][3], dim=0
    )
    torch.testing.assert_close(run.logged_metrics["val/prior/spread_data"], expected)


def test_ranks_talk_equally_often_whatever_their_part_of_the_data(tmp_path):
    """One collective of one shape, with and without several images of a caption: else two ranks would wait for each other for ever."""
    shapes = []
    for double in (False, True):
        data = Data()
        batches = data.val_dataloader()
        if double:
            batches.batches[1]["tokens"][0] = batches.batches[0]["tokens"][3]
        data.val_dataloader = lambda batches=batches: batches
        run, told = trainer(tmp_path, PriorMonitor(captions=8)), []
        reduce = run.strategy.reduce
        run.strategy.reduce = lambda tensor, *rest, told=told, reduce=reduce, **more: (
            told.append(tuple(tensor.shape)),
            reduce(tensor, *rest, **more),
        )[1]
        run.validate(prior(), datamodule=data, verbose=False)
        shapes.append([shape for shape in told if len(shape) == 2])
    assert shapes[0] == shapes[1] and len(shapes[0]) == 1


def test_no_captions_is_no_draw(tmp_path):
    stage = prior()
    stage.sample = None
    trainer(tmp_path, PriorMonitor(captions=0)).validate(stage, datamodule=Data(), verbose=False)


@pytest.mark.parametrize("wrong", [{"captions": -1}, {"draws": 1}])
def test_bad_settings_are_sentences(wrong):
    with pytest.raises(ValueError, match=r"PriorMonitor was given"):
        PriorMonitor(**wrong)
    with pytest.raises(ValueError, match=r"AnalyticVariance was given"):
        AnalyticVariance(captions=0)


@pytest.mark.parametrize(
    "every", [3, 100]
)  # the last checkpoint is written before, or when training ends
def test_variance_is_estimated_with_the_averaged_weights_when_training_ends(tmp_path, every):
    stage = prior()
    callbacks = [
        AnalyticVariance(captions=16, draws=1),
        EMA(0.9),
        NewestCheckpoint(every),
        BestCheckpoint(),
    ]
    trainer(tmp_path, *callbacks, steps=6, val_check_interval=2, check_val_every_n_epoch=None).fit(
        stage, datamodule=Data()
    )
    batches = Batches(32, 8, 0).batches[:2]
    paths = list(tmp_path.rglob("*.ckpt"))
    assert len(paths) == 2 and newest_checkpoint(tmp_path) in paths
    for path in paths:
        checkpoint = read_checkpoint(path)
        again = prior()
        again.load_state_dict(checkpoint["state_dict"])
        again.estimate_variance(batches, 1)
        for part in ("state_dict", "current_model_state"):
            torch.testing.assert_close(checkpoint[part]["x0_error"], again.x0_error)
    assert torch.equal(
        stage.net.proj_out.weight,
        read_checkpoint(newest_checkpoint(tmp_path))["current_model_state"]["net.proj_out.weight"],
    )


def test_variance_can_be_added_to_a_checkpoint(tmp_path):
    trainer(tmp_path, EMA(0.9), NewestCheckpoint(100), steps=2).fit(prior(), datamodule=Data())
    path = newest_checkpoint(tmp_path)
    assert read_checkpoint(path)["state_dict"]["x0_error"].isnan().all()
    add_variance(path, prior(), Batches(32, 8, 0).batches, draws=1)
    checkpoint = read_checkpoint(path)
    assert checkpoint["state_dict"]["x0_error"].isfinite().all() and checkpoint["global_step"] == 2
    stage = prior()
    trainer(
        tmp_path, EMA(0.9), AnalyticVariance(captions=16, draws=1), NewestCheckpoint(3), steps=4
    ).fit(stage, datamodule=Data(), ckpt_path=path)
    # what was estimated of the weights of step 2 is not taken for that of later ones
    assert read_checkpoint(newest_checkpoint(tmp_path))["state_dict"]["x0_error"].isfinite().all()
    AnalyticVariance().on_train_start(None, stage)
    assert stage.x0_error.isnan().all()
