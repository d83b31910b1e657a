"""What a set of drawn pictures is judged by: features of each picture by two networks.

Which two is the user's choice; by default neither is the CLIP whose embeddings the pictures are
drawn from, which would find in them what it asked for.
"""

import argparse
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, distributed

from eval import fid, metrics
from eval.captions import Caption
from eval.common import Figures, add_features, features_of
from eval.features import Features, clip_config, clip_features, named
from eval.folders import Batch
from unclip_pl.clip.fingerprint import ClipMismatch, Fingerprint, require_same
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.data.decoding import decode
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import to_uint8

log = logging.getLogger(__name__)
EMBEDDED_JUDGE = "openmoji-judge"
"""The CLIP in the package that judges and never conditions."""
SHOWN = {
    "kid": "KID x 1000",
    "clip_score": "CLIP score",
    "precision": "precision",
    "recall": "recall",
    "r1": "own caption first",
}
"""The figures of the tables, with titles; the Frechet distance comes before them (`shown`)."""


def shown(frechet: str) -> dict[str, str]:
    """The figures of the tables, with titles; the Frechet distance has the key `frechet`."""
    return {frechet: metrics.FRECHET[frechet], **SHOWN}


class Seen(NamedTuple):
    """This rank's pictures: number of the caption (N,), features (N, D), embeddings by the CLIP
    that scores (N, E)."""

    number: Tensor
    features: Tensor
    image_embed: Tensor

    def first(self, count: int) -> "Seen":
        """Those of the first captions."""
        return Seen(*(rows[self.number < count] for rows in self))


def add_judging(made: argparse.ArgumentParser) -> None:
    """The options that say who judges: --features, --reference-size, --score-clip."""
    add_features(made)
    made.add_argument(
        "--score-clip",
        help="which CLIP scores: openmoji-judge (the default for pictures of the embedded CLIP's "
        "embeddings), NAME/TAG of open_clip, local-dir:/folder",
    )


def score_clip(given: str | None, conditions: Fingerprint | None, option: str) -> str:
    """The CLIP that scores: the one named, else the package's judge for pictures of its data.

    Args:
        given: what the option says.
        conditions: of the CLIP whose embeddings the pictures are drawn from; None: not known.
        option: its name, for the sentence.

    Raises:
        UserError: none is named, and the CLIP that conditions is not the embedded one.
    """
    if given:
        return given
    if conditions is None or conditions["config"]["model"] == "openmoji":
        return EMBEDDED_JUDGE
    raise UserError(
        f"The pictures are drawn from embeddings of the CLIP {conditions['config']['model']}, and "
        f"the package has a CLIP to judge OpenMoji's drawings only: name another one with {option}."
    )


def same_clip(theirs: Fingerprint, ours: Fingerprint) -> bool:
    """Whether two fingerprints are of one CLIP, by what it does."""
    try:
        require_same(theirs, ours, "The decoder")
    except ClipMismatch:
        return False
    return True


class Judge:
    """Two networks that look at pictures.

    Args:
        features: of the Frechet distance, KID, precision and recall, as `eval.features.named` has
            it.
        clip: of the CLIP score and the rank of the caption, as `eval.features.clip_config` has it.
    """

    def __init__(
        self, features: str, clip: str, device: str = "cpu", precision: str = "fp32"
    ) -> None:
        features = "openmoji" if features == "clip" else features
        self.clip = FrozenCLIP(clip_config(clip, precision), device)
        self.scores = clip_features(self.clip)
        self.network: Features = self.scores
        self.of_network: FrozenCLIP | None = self.clip
        if features == "inception":
            self.network, self.of_network = named(features, device, precision), None
        elif features != clip:
            self.of_network = FrozenCLIP(clip_config(features, precision), device)
            self.network = clip_features(self.of_network)

    @classmethod
    def asked(cls, given: argparse.Namespace, conditions: Fingerprint) -> "Judge":
        """As the options of `add_judging` say; `conditions` is of the decoder's CLIP."""
        clip = score_clip(given.score_clip, conditions, "--score-clip")
        return cls(features_of(given), clip, given.device, given.precision)

    def bias(self, conditions: Fingerprint) -> list[str]:
        """A sentence for each of the two networks that is the CLIP which conditions the decoder."""
        said = []
        if same_clip(conditions, self.clip.fingerprint()):
            said.append(
                "The CLIP that scores is the one that conditions the decoder, which flatters what "
                "was drawn from its embeddings: name another with --score-clip."
            )
        if self.of_network is not None and same_clip(conditions, self.of_network.fingerprint()):
            said.append(
                "The features of the Frechet distance, KID, precision and recall are of the CLIP "
                "that conditions the decoder: name others with --features."
            )
        for text in said:
            log.warning(text)
        return said

    def look(self, batches: Iterable[Batch]) -> Seen:
        """The features of `images` uint8 (B, 3, H, W); `keys` are the captions' numbers."""
        rows = []
        for batch in batches:
            scored = self.scores(batch["images"])
            features = scored if self.network is self.scores else self.network(batch["images"])
            number = torch.tensor([int(key) for key in batch["keys"]])
            rows.append((number, features.float().cpu(), scored.float().cpu()))
        if not rows:
            empty = torch.zeros(0, dtype=torch.int64)
            return Seen(
                empty, torch.zeros(0, self.network.dim), torch.zeros(0, self.clip.embed_dim)
            )
        return Seen(*(torch.cat(part) for part in zip(*rows, strict=True)))

    def text(self, captions: Sequence[Caption], batch_size: int = 256) -> Tensor:
        """The captions' embeddings (N, E)."""
        texts = [caption.text for caption in captions]
        parts = [texts[i : i + batch_size] for i in range(0, len(texts), batch_size)]
        tokens = (self.clip.tokenize(part) for part in parts)
        return torch.cat([self.clip.embed_text(part).embed.float().cpu() for part in tokens])

    def figures(self, real: Tensor | None, seen: Seen, text: Tensor) -> Figures:
        """Over all ranks, from each one's share of the reference's features (M, D) and of the
        pictures; `text` (N, E) is of all captions.

        Without a reference: CLIP score and ranks alone.
        """
        figures = (
            {}
            if real is None
            else fid.judge(
                self.network, real, seen.features, bootstrap=0, device=str(self.clip.device)
            )
        )
        for metric in (metrics.CLIPScore(), metrics.RetrievalRank(self.clip.embed_dim)):
            if distributed.is_initialized() and distributed.get_backend() == "nccl":
                metric.to("cuda")
            metric.update(seen.image_embed, text[seen.number])
            figures |= metric.compute()
        return figures


def numbered(features: Tensor, rank: int, world_size: int) -> Seen:
    """Features (N, D) of every n-th picture as if they were of captions: for `gathered`."""
    number = torch.arange(len(features)) * world_size + rank
    return Seen(number, features, features)


def pictures_of(
    captions: Sequence[Caption], size: int, batch_size: int, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """The captions' own pictures, cut to `size`, in batches; rank r takes every n-th."""
    mine = range(rank, len(captions), world_size)
    for start in range(0, len(mine), batch_size):
        some = mine[start : start + batch_size]
        images = torch.stack([to_uint8(decode(captions[k].image or b"", size)) for k in some])
        yield {
            "images": images,
            "keys": [str(k) for k in some],
            "captions": [captions[k].text for k in some],
        }


def gathered(seen: Seen, device: str) -> Seen:
    """The pictures of all ranks, by the numbers of their captions."""
    if distributed.is_initialized():
        from torchmetrics.utilities.distributed import gather_all_tensors

        place = device if distributed.get_backend() == "nccl" else "cpu"
        seen = Seen(
            *(
                torch.cat([part.cpu() for part in gather_all_tensors(rows.to(place))])
                for rows in seen
            )
        )
    order = seen.number.argsort()
    return Seen(*(rows[order] for rows in seen))
