"""`null: empty`: a dropped caption is, to the network, the empty caption as CLIP gives it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.networks.ar_prior import ARPriorConfig
from unclip_pl.networks.prior import PriorTextConfig, PriorTransformerConfig
from unclip_pl.networks.text import TextConfig
from unclip_pl.networks.unet import UNetConfig
from unclip_pl.stages.ar_prior import ARPrior
from unclip_pl.stages.base import Stage
from unclip_pl.stages.decoder import Decoder
from unclip_pl.stages.diffusion_prior import DiffusionPrior

STATES: dict[str, Any] = {"kind": "states", "states_width": 80}


@pytest.fixture(scope="module")
def clip() -> FrozenCLIP:
    return FrozenCLIP()


def set_up(stage: Stage, clip: FrozenCLIP) -> None:
    """What `lightning fit` does before the first step, with the embedded CLIP."""
    stage._trainer = SimpleNamespace(datamodule=SimpleNamespace(clip=clip))
    if isinstance(stage, ARPrior):
        rows = torch.randn(512, 256, generator=torch.Generator().manual_seed(0))
        stage.quantizer.fit(rows.mean(0), rows.T.cov(), rows, rows.roll(1, 1))
    stage.setup("fit")
    stage.eval()


def captions(clip: FrozenCLIP, *words: str) -> dict[str, Tensor]:
    tokens = clip.tokenize(list(words))
    features = clip.embed_text(tokens)
    return {
        "tokens": tokens,
        "mask": features.mask,
        "text_embed": features.embed,
        "states": features.states,
    }


def decoder() -> Decoder:
    net = UNetConfig(image_size=16, width=32, mults=(1, 2), depth=1, head_width=32, attention=(8,))
    net = UNetConfig(**vars(net) | {"embed_dim": 256, "context_width": 32})
    return Decoder(net, TextConfig(**STATES, null="empty"))


def test_the_decoder_sees_the_empty_caption(clip: FrozenCLIP) -> None:
    stage = decoder()
    set_up(stage, clip)
    empty, fox = captions(clip, ""), captions(clip, "fox")
    dropped = stage.text(**fox, keep=torch.tensor([False]))
    given = stage.text(**empty)
    torch.testing.assert_close(dropped.context, given.context)
    torch.testing.assert_close(dropped.pooled, given.pooled)
    assert not [name for name, _ in stage.text.named_parameters() if "null" in name]


def test_the_diffusion_prior_sees_the_empty_caption(clip: FrozenCLIP) -> None:
    net = PriorTransformerConfig(embed_dim=256, width=64, depth=1, heads=2)
    text = PriorTextConfig(**STATES, context_length=32, padding="masked", null="empty")
    stage = DiffusionPrior(net, text)
    set_up(stage, clip)
    x, t = torch.randn(1, 256), torch.tensor([500])
    empty, fox = captions(clip, ""), captions(clip, "fox")
    for given in (empty, fox):
        given["text_embed"] = stage.on_network_scale(given["text_embed"])
    dropped = stage.net(x, t, **fox, keep=torch.tensor([False]))
    torch.testing.assert_close(dropped, stage.net(x, t, **empty), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(dropped, stage.net(x, t, **fox), rtol=1e-2)
    torch.testing.assert_close(dropped, stage.net(x, t, keep=torch.tensor([False])))


def test_the_ar_prior_sees_the_empty_caption(clip: FrozenCLIP) -> None:
    net = ARPriorConfig(embed_dim=256, width=64, depth=1, heads=2, max_codes=8, buckets=16)
    stage = ARPrior(net, TextConfig(**STATES, context_length=32, null="empty"), max_error=0.99)
    set_up(stage, clip)
    empty, fox = captions(clip, ""), captions(clip, "fox")
    dropped = stage.net.prefix(torch.tensor([False]), **fox)
    torch.testing.assert_close(dropped, stage.net.prefix(torch.tensor([True]), **empty))


def test_it_is_refused_where_it_cannot_be() -> None:
    with pytest.raises(ValueError, match='padding "masked"'):
        PriorTextConfig(**STATES, padding="learned", null="empty")
    with pytest.raises(ValueError, match='"empty"'):
        PriorTextConfig(**STATES, null="zeros")  # type: ignore[arg-type]
