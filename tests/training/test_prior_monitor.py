"""The monitors of a prior: known values for perfect, collapsed and deaf priors.

They are logged at validation with the EMA weights.
"""

from unittest import mock

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
from unclip_pl.training.prior_monitor import (
    METRICS,
    PriorMonitor,
    mean_pairwise,
    measure,
    median_rank,
    ranks,
)
from unclip_pl.training.variance import AnalyticVariance, add_variance

D = 12
VALIDATION = {"val_check_interval": 2, "check_val_every_n_epoch": None}


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


def test_the_median_of_an_even_number_is_between_the_two_in_the_middle():
    assert median_rank(torch.tensor([7, 1, 2, 5])) == 3.5
    assert median_rank(torch.tensor([7, 1, 2])) == 2
    count = 2**24 + 2  # more than torch.quantile takes
    assert median_rank(torch.arange(count).flip(0)) == (count - 1) / 2
    assert measure(torch.eye(2)[[0, 0]], torch.eye(2), torch.eye(2))["rank"] == 1.5


def test_a_perfect_prior_finds_every_image_and_a_deaf_one_is_at_chance():
    data = rows(200)
    perfect = measure(data["image_embed"][:50] * 3, data["image_embed"], data["text_embed"])
    torch.testing.assert_close(perfect["cosine_image"], torch.tensor(1.0))
    assert perfect["rank"] == perfect["r1"] == perfect["r5"] == 1
    torch.testing.assert_close(perfect["cosine_text"], perfect["cosine_text_data"])
    expected = F.cosine_similarity(data["image_embed"][:50], data["text_embed"][:50]).mean()
    torch.testing.assert_close(perfect["cosine_text_data"], expected)
    random = torch.randn(50, D, generator=torch.Generator().manual_seed(5))
    deaf = measure(random, data["image_embed"], data["text_embed"])
    assert deaf["rank"] > 40 and deaf["r5"] < 0.2
    assert abs(deaf["cosine_text"] - deaf["cosine_text_other"]) < 0.15
    others = F.cosine_similarity(data["image_embed"][:50, None], data["text_embed"][None], dim=-1)
    mask = ~torch.eye(50, 200, dtype=torch.bool)
    torch.testing.assert_close(perfect["cosine_text_other"], others[mask].mean())


def test_a_prior_that_copies_the_caption_is_seen():
    """Its samples are nearer to the captions than the data are."""
    data = rows(50)
    copied = measure(data["text_embed"], data["image_embed"], data["text_embed"])
    assert copied["cosine_text"] > copied["cosine_text_data"] + 0.2 and copied["cosine_image"] < 0.9


def test_mean_pairwise_cosine_is_over_pairs_of_one_group():
    z = torch.randn(7, D)
    group = torch.tensor([0, 0, 0, 1, 2, 2, 3])
    pair = lambda i, j: F.cosine_similarity(z[i], z[j], dim=0)
    expected = ((pair(0, 1) + pair(0, 2) + pair(1, 2)) / 3 + pair(4, 5)) / 2
    torch.testing.assert_close(mean_pairwise(z, group), expected)
    assert mean_pairwise(z, torch.arange(7)) is None


def test_values_are_logged_at_validation_from_the_averaged_weights(tmp_path):
    stage, seen = prior(), []
    sample = stage.sample

    def watched_sample(batch, noise):
        seen.append((stage.net.proj_out.weight.clone(), len(noise)))
        return sample(batch, noise)

    stage.sample = watched_sample
    ema = EMA(0.5)
    run = trainer(tmp_path, PriorMonitor(captions=12, draws=3), ema, steps=4, **VALIDATION)
    run.loggers = [CSVLogger(tmp_path)]
    run.fit(stage, datamodule=Data())
    prefix = "val/prior/"
    metrics = {
        name.removeprefix(prefix): value
        for name, value in run.logged_metrics.items()
        if name.startswith(prefix)
    }
    assert metrics.keys() == set(METRICS) - {"spread_data"}  # no caption has several images
    assert all(value.isfinite() for value in metrics.values())
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


def test_ranks_reduce_one_tensor_of_one_shape_whatever_their_part_of_the_data(tmp_path):
    """Otherwise a rank with several images of one caption and one without would hang."""
    shapes = []
    for double in (False, True):
        data = Data()
        batches = data.val_dataloader()
        if double:
            batches.batches[1]["tokens"][0] = batches.batches[0]["tokens"][3]
        data.val_dataloader = lambda batches=batches: batches
        run = trainer(tmp_path, PriorMonitor(captions=8))
        with mock.patch.object(run.strategy, "reduce", wraps=run.strategy.reduce) as reduce:
            run.validate(prior(), datamodule=data, verbose=False)
        reduced = [tuple(call.args[0].shape) for call in reduce.call_args_list if call.args]
        shapes.append([shape for shape in reduced if len(shape) == 2])
    assert shapes[0] == shapes[1] and len(shapes[0]) == 1


def test_no_captions_is_no_draw(tmp_path):
    stage = prior()
    stage.sample = None
    trainer(tmp_path, PriorMonitor(captions=0)).validate(stage, datamodule=Data(), verbose=False)


@pytest.mark.parametrize("wrong", [{"captions": -1}, {"draws": 1}])
def test_bad_settings_are_sentences(wrong):
    with pytest.raises(ValueError, match="PriorMonitor"):
        PriorMonitor(**wrong)
    with pytest.raises(ValueError, match="AnalyticVariance"):
        AnalyticVariance(captions=0)


# The last checkpoint is written before training ends, or when it ends.
@pytest.mark.parametrize("every", [3, 100])
def test_variance_is_estimated_with_the_averaged_weights_when_training_ends(tmp_path, every):
    stage = prior()
    variance = AnalyticVariance(captions=16, draws=1)
    callbacks = [variance, EMA(0.9), NewestCheckpoint(every), BestCheckpoint()]
    trainer(tmp_path, *callbacks, steps=6, **VALIDATION).fit(stage, datamodule=Data())
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
    raw = read_checkpoint(newest_checkpoint(tmp_path))["current_model_state"]
    assert torch.equal(stage.net.proj_out.weight, raw["net.proj_out.weight"])


def test_variance_can_be_added_to_a_checkpoint(tmp_path):
    trainer(tmp_path, EMA(0.9), NewestCheckpoint(100), steps=2).fit(prior(), datamodule=Data())
    path = newest_checkpoint(tmp_path)
    assert read_checkpoint(path)["state_dict"]["x0_error"].isnan().all()
    add_variance(path, prior(), Batches(32, 8, 0).batches, draws=1)
    checkpoint = read_checkpoint(path)
    assert checkpoint["state_dict"]["x0_error"].isfinite().all() and checkpoint["global_step"] == 2
    stage = prior()
    callbacks = [EMA(0.9), AnalyticVariance(captions=16, draws=1), NewestCheckpoint(3)]
    trainer(tmp_path, *callbacks, steps=4).fit(stage, datamodule=Data(), ckpt_path=path)
    # The estimate for the weights of step 2 is not used for later weights.
    assert read_checkpoint(newest_checkpoint(tmp_path))["state_dict"]["x0_error"].isfinite().all()
    AnalyticVariance().on_train_start(None, stage)
    assert stage.x0_error.isnan().all()
