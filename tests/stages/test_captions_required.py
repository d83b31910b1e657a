"""A stage that reads captions does not begin to train on data without any."""

import pytest

from tests.data.fitkit import data_of
from tests.data.shardkit import picture, write_shards, write_tar
from unclip_pl.datamodules.image_embedding import ImageEmbeddingData
from unclip_pl.networks.ar_prior import ARPriorConfig
from unclip_pl.networks.prior import PriorTextConfig, PriorTransformerConfig
from unclip_pl.networks.text import TextConfig
from unclip_pl.networks.unet import UNetConfig
from unclip_pl.stages.ar_prior import ARPrior
from unclip_pl.stages.decoder import Decoder
from unclip_pl.stages.diffusion_prior import DiffusionPrior
from unclip_pl.utils.errors import UserError

NET = UNetConfig(
    image_size=8,
    width=32,
    mults=(1,),
    depth=1,
    attention=(8,),
    head_width=32,
    embed_dim=6,
    context_width=16,
)
TEXT = TextConfig(kind="transformer", context_length=12, width=16, depth=1, heads=2)


def decoder(text: TextConfig, condition: str = "image") -> Decoder:
    return Decoder(NET, text, condition=condition)


def diffusion_prior() -> DiffusionPrior:
    net = PriorTransformerConfig(embed_dim=6, width=32, depth=1, heads=2)
    return DiffusionPrior(net, PriorTextConfig("tokens", context_length=12))


def ar_prior(text: TextConfig) -> ARPrior:
    net = ARPriorConfig(embed_dim=6, width=32, depth=1, heads=2, max_codes=4, buckets=64)
    return ARPrior(net, text)


def ready(shards: list[str], folder) -> ImageEmbeddingData:
    """`text_states` is off, so that the DataModule does not ask for captions itself."""
    data = data_of(ImageEmbeddingData, shards, store=folder / "store")
    data.prepare_data()
    data.setup("fit")
    return data


@pytest.fixture(scope="module")
def without_captions(tmp_path_factory) -> ImageEmbeddingData:
    folder = tmp_path_factory.mktemp("without")
    return ready(
        [write_tar(folder / "a.tar", {f"{n}.png": picture(n) for n in range(120)})], folder
    )


STAGES = {
    "decoder that reads tokens": lambda: decoder(TEXT),
    "decoder on text embeddings": lambda: decoder(TextConfig(kind="none"), "text"),
    "diffusion prior": diffusion_prior,
    "AR prior": lambda: ar_prior(TEXT),
    "AR prior on text embeddings": lambda: ar_prior(TextConfig(kind="none")),
}


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_that_reads_captions_is_refused_data_without_them(name, without_captions, tmp_path):
    stage = STAGES[name]()
    with pytest.raises(UserError, match="120 of 120 samples have no caption"):
        stage.check_data(without_captions)
    stage.check_data(ready(write_shards(tmp_path, [9]), tmp_path))


def test_a_decoder_that_reads_none_needs_none(without_captions):
    decoder(TextConfig(kind="none")).check_data(without_captions)


def test_a_decoder_without_an_embedding_is_refused():
    with pytest.raises(ValueError, match=r"embed_dim is 0"):
        Decoder()
