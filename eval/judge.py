"""What a set of drawn pictures is judged by: features of each picture by two networks, and from them the figures."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from eval import distances, fid, metrics
from eval.captions import Caption
from eval.common import Figures
from eval.features import Features, clip_config, clip_features, named
from eval.folders import Batch
from unclip_pl.clip import FrozenCLIP
from unclip_pl.data.shards import decode
from unclip_pl.errors import UserError
from unclip_pl.images import to_uint8

log = logging.getLogger(__name__)
SHOWN = {"kid": "KID x 1000", "clip_score": "CLIP score", "precision": "precision", "recall": "recall", "r1": "own caption first"}
"""The figures of the tables, with their titles; the Frechet distance comes before them (`shown`)."""
SMALLER = (*metrics.FRECHET, "kid", "cmmd", "rank_mean", "rank_median")
"""Figures of which the smaller is the better."""


def shown(frechet: str) -> dict[str, str]:
    """The figures of the tables, with their titles, where the Frechet distance has the key `frechet`."""
    return {frechet: metrics.FRECHET[frechet], **SHOWN}


class Seen(NamedTuple):
    """This rank's pictures: number of the caption (N,), features (N, D), embeddings by the CLIP that scores (N, E)."""

    number: Tensor
    features: Tensor
    image_embed: Tensor

    def first(self, count: int) -> "Seen":
        """Those of the first captions."""
        return Seen(*(rows[self.number < count] for rows in self))


class Judge:
    """Two networks that look at pictures.

    Args:
        features: of FID, KID, precision and recall, as `eval.features.named` has it.
        clip: of the CLIP score and the rank of the caption, as `eval.features.clip_config` has it.
    """

    def __init__(self, features: str = "clip", clip: str = "openmoji", device: str = "cpu", precision: str = "fp32") -> None:
        self.clip = FrozenCLIP(clip_config(clip, precision), device)
        self.scores = clip_features(self.clip)
        self.network: Features = named(features, device, precision)
        if self.network.key == self.scores.key:
            self.network = self.scores

    def look(self, batches: Iterable[Batch]) -> Seen:
        """The features of `images` uint8 (B, 3, H, W); `keys` are the captions' numbers."""
        rows = []
        for batch in batches:
            scored = self.scores(batch["images"])
            features = scored if self.network is self.scores else self.network(batch["images"])
            rows.append((torch.tensor([int(key) for key in batch["keys"]]), features.float().cpu(), scored.float().cpu()))
        if not rows:
            return Seen(torch.zeros(0, dtype=torch.int64), torch.zeros(0, self.network.dim), torch.zeros(0, self.clip.embed_dim))
        return Seen(*(torch.cat(part) for part in zip(*rows, strict=True)))

    def text(self, captions: Sequence[Caption], batch_size: int = 256) -> Tensor:
        """The captions' embeddings (N, E)."""
        texts = [caption.text for caption in captions]
        parts = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
        return torch.cat([self.clip.embed_text(self.clip.tokenize(part)).embed.float().cpu() for part in parts])

    def figures(self, real: Tensor | None, seen: Seen, text: Tensor) -> Figures:
        """Over all ranks, from each one's share of the reference's features (M, D) and of the pictures; `text` (N, E) is of all captions.

        Without a reference: CLIP score and ranks alone.
        """
        figures = {} if real is None else fid.judge(self.network, real, seen.features, bootstrap=0, device=str(self.clip.device))
        for metric in (metrics.CLIPScore(), metrics.RetrievalRank(self.clip.embed_dim)):
            if distributed.is_initialized() and distributed.get_backend() == "nccl":
                metric.to("cuda")
            metric.update(seen.image_embed, text[seen.number])
            figures |= metric.compute()
        return figures


def spread(real: Seen, seen: Seen, resamples: int, seed: int = 0, frechet: str = "fd") -> Figures:
    """Error, interval and limit of the Frechet distance from the pictures of all ranks in the order of their captions: the same from any number of ranks."""
    metric = metrics.FrechetSpread(real.features.shape[1], resamples, seed, frechet, sync_on_compute=False)  # each rank has all of them
    metric.update(real.features, real=True)
    metric.update(seen.features, real=False)
    return metric.compute()


def pictures_of(captions: Sequence[Caption], size: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Iterator[Batch]:
    """The captions' own pictures, cut to `size`, in batches; rank r takes every n-th."""
    mine = range(rank, len(captions), world_size)
    for start in range(0, len(mine), batch_size):
        some = mine[start : start + batch_size]
        images = torch.stack([to_uint8(decode(captions[k].image or b"", size)) for k in some])
        yield {"images": images, "keys": [str(k) for k in some], "captions": [captions[k].text for k in some]}


def gathered(seen: Seen, device: str) -> Seen:
    """The pictures of all ranks, by the numbers of their captions."""
    if distributed.is_initialized():
        from torchmetrics.utilities.distributed import gather_all_tensors

        place = device if distributed.get_backend() == "nccl" else "cpu"
        seen = Seen(*(torch.cat([part.cpu() for part in gather_all_tensors(rows.to(place))]) for rows in seen))
    order = seen.number.argsort()
    return Seen(*(rows[order] for rows in seen))


@dataclass(frozen=True)
class Difference:
    """Of a figure between two sets of pictures of the same captions, with its 95 % interval."""

    value: float
    low: float
    high: float

    @property
    def sure(self) -> bool:
        """Whether 0 lies outside of the interval."""
        return self.low > 0 or self.high < 0


def paired_differences(
    a: Seen, b: Seen, text: Tensor, real: Tensor | None, resamples: int = 500, seed: int = 0, paired: bool = True, frechet: str = "fd",
) -> dict[str, Difference]:
    """b less a, of `frechet` (the Frechet distance's key), `clip_score` and `r1`, with their intervals.

    These come from random halves of the captions, the same ones for both sets. Drawn without replacement, they spread as fresh sets of the
    whole size do (see `distances.bootstrap`). Where they lie says nothing, for the Frechet
    distance of halves is more biased: the interval is the value +- 1.96 times the spread. `paired`: row k of the reference belongs to caption k, and goes
    into the halves that it does; else halves of the reference are drawn too.
    """
    if not torch.equal(a.number, b.number):
        raise UserError("The two sets of pictures are not of the same captions: draw both from the same ones.")
    generator, n = torch.Generator().manual_seed(seed), len(a.number)
    halves = [torch.randperm(n, generator=generator)[: n // 2] for _ in range(resamples)]
    captions, found = text[a.number], {}
    for name, values in {"clip_score": metrics.clip_scores, "r1": _found_first}.items():
        apart = values(b.image_embed, captions) - values(a.image_embed, captions)
        found[name] = _interval(apart.mean().item(), [apart[half].mean().item() for half in halves])
    if real is not None:
        others = halves if paired else [torch.randperm(len(real), generator=generator)[: len(real) // 2] for _ in halves]
        everything = torch.arange(n), torch.arange(len(real))
        value, *spread = (
            _frechet(reference, b.features[half]) - _frechet(reference, a.features[half])
            for half, reference in ((half, distances.gaussian(real[other])) for half, other in (everything, *zip(halves, others, strict=True)))
        )
        found[frechet] = _interval(value, spread)
    return found


def _found_first(image_embed: Tensor, text_embed: Tensor) -> Tensor:
    """(N,) 1.0 where a picture's own caption is the nearest of all."""
    image, text = (torch.nn.functional.normalize(rows.double(), dim=1) for rows in (image_embed, text_embed))
    return (metrics.retrieval_ranks(image, text) <= 1).double()


def _frechet(reference: distances.Gaussian, features: Tensor) -> float:
    return distances.frechet_of(reference, distances.gaussian(features))


def _interval(value: float, draws: list[float]) -> Difference:
    spread = 1.96 * torch.tensor(draws, dtype=torch.float64).std().item()
    return Difference(value, value - spread, value + spread)
