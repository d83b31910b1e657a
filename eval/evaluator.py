"""What a set of images is evaluated by: features of each image by two networks.

Which two is the user's choice. By default neither is the CLIP whose embeddings the images are drawn
from, which would find in them what it asked for.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed

from eval import metrics
from eval.captions import Caption
from eval.commands import FeatureOptions, Figures, RunOptions, choose_features, clip_name
from eval.features import Features, clip_config, clip_features, load_features
from eval.stored import Batch
from unclip_pl.clip.config import CLIPConfig
from unclip_pl.clip.fingerprint import ClipMismatch, Fingerprint, require_same
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.data.decoding import decode
from unclip_pl.utils.commands import Option
from unclip_pl.utils.distributed import rank, world_size
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import to_uint8

log = logging.getLogger(__name__)
AnyMetric = TypeVar("AnyMetric", bound=metrics.Metric)
SCORING_CLIP = "openmoji-judge"
"""The CLIP in the package that scores images and never conditions."""
METRIC_TITLES = {
    "kid": "KID x 1000",
    "clip_score": "CLIP score",
    "precision": "precision",
    "recall": "recall",
    "r1": "own caption first",
}
"""The figures of the tables; the Frechet distance comes before them (`metric_titles`)."""


def metric_titles(frechet: str) -> dict[str, str]:
    """The figures of the tables with their titles; the Frechet distance has the key `frechet`."""
    return {frechet: metrics.FRECHET[frechet], **METRIC_TITLES}


class ImageFeatures(NamedTuple):
    """Images as two networks see them.

    Args:
        number: of each image's caption, int64 (N,).
        features: for the distances, (N, D).
        image_embed: by the CLIP that scores, (N, E).
    """

    number: Tensor
    features: Tensor
    image_embed: Tensor

    def first(self, count: int) -> "ImageFeatures":
        """Those of the first `count` captions."""
        return ImageFeatures(*(rows[self.number < count] for rows in self))


ScoreClip = Annotated[Annotated[str, clip_name] | None, Option(renamed="--clip")]


@dataclass(frozen=True)
class EvaluatorOptions(FeatureOptions):
    """What evaluates.

    Args:
        score_clip: the CLIP that scores, not the one that conditions: openmoji-judge (the default
            for images from the embedded CLIP's embeddings or for the captions openmoji), NAME/TAG
            of open_clip, or local-dir:/folder
    """

    score_clip: ScoreClip = None

    def load(
        self, captions: str, fingerprint: Fingerprint | None, options: RunOptions
    ) -> "Evaluator":
        """The networks for what is drawn for `captions`, from embeddings of a CLIP or of none."""
        return Evaluator(
            choose_features(self.features, captions),
            choose_score_clip(self.score_clip, fingerprint, captions),
            options.device,
            options.precision,
        )


def choose_score_clip(
    name: str | None, fingerprint: Fingerprint | None, captions: str | None
) -> str:
    """The CLIP that scores: the one with a name, or the package's for images of its data.

    Args:
        name: of the option --score-clip; None: not given.
        fingerprint: of the CLIP whose embeddings the images are drawn from; None: of none, or not
            known.
        captions: what the images are drawn for; None: not known.

    Raises:
        UserError: no name is given, and the images are neither drawn from the embedded CLIP's
            embeddings nor for the embedded drawings' captions.
    """
    if name:
        return name
    conditioning = None if fingerprint is None else fingerprint["config"]["model"]
    if conditioning == "openmoji" or (conditioning is None and captions == "openmoji"):
        return SCORING_CLIP
    if conditioning:
        raise UserError(
            f"The images are drawn from embeddings of the CLIP {conditioning}, and the scoring "
            "CLIP in the package knows OpenMoji's drawings only: name another with --score-clip."
        )
    raise UserError(
        "It is not known that the images are OpenMoji's drawings, and the scoring CLIP in the "
        f"package knows no others: name a CLIP with --score-clip ({SCORING_CLIP} for such "
        "drawings)."
    )


def same_clip(theirs: Fingerprint, ours: Fingerprint) -> bool:
    """Whether two fingerprints are of one CLIP, by what it does."""
    try:
        require_same(theirs, ours, "The decoder")
    except ClipMismatch:
        return False
    return True


def shared_clip_warnings(
    conditioning: Fingerprint | None,
    features: Fingerprint | None = None,
    scores: Fingerprint | None = None,
) -> list[str]:
    """A sentence for each use of the CLIP that conditions the decoder as a judge, logged too.

    Args:
        conditioning: the fingerprint of the CLIP that conditions; None: not known.
        features: of the network of the distances; None: no CLIP.
        scores: of the CLIP that scores; None: none scores.
    """
    warnings = []
    if conditioning and scores and same_clip(conditioning, scores):
        warnings.append(
            f"The CLIP that scores ({CLIPConfig.of_fingerprint(scores)}) is the one that "
            "conditions the decoder, which flatters what was drawn from its embeddings: name "
            "another with --score-clip."
        )
    if conditioning and features and same_clip(conditioning, features):
        warnings.append(
            "The features of the Frechet distance, KID, precision and recall are of the CLIP "
            f"({CLIPConfig.of_fingerprint(features)}) that conditions the decoder, which flatters "
            "what was drawn from its embeddings: name others with --features."
        )
    for text in warnings if rank() == 0 else ():
        log.warning(text)
    return warnings


def on_ranks_device(metric: AnyMetric) -> AnyMetric:
    """The metric where the ranks can exchange its state: on the GPU if they use NCCL."""
    if distributed.is_initialized() and distributed.get_backend() == "nccl":
        metric.to("cuda")
    return metric


def compute_distances(
    network: Features,
    real: Tensor,
    fake: Tensor,
    resamples: int = 100,
    seed: int = 0,
    device: str = "cpu",
) -> Figures:
    """Compute all distances between two sets of features, over all ranks.

    Args:
        network: computed the features.
        real: this rank's share of the features of the reference, (N, D).
        fake: this rank's share of the features of the evaluated images, (M, D).
        resamples: random halves for the interval of the Frechet distance; 0: no interval.
        seed: of the halves.
        device: computes; where ranks use NCCL it must be a GPU.

    Returns:
        The figures by name, `cmmd` only for features of a CLIP; and `notes`, sentences about the
        sizes of the sets.
    """
    dim = network.dim
    distances: list[metrics.TwoSets] = [
        metrics.FrechetDistance(dim, network.frechet),
        metrics.KernelDistance(dim),
        metrics.PrecisionRecall(dim),
    ]
    if network.is_clip:
        distances.append(metrics.CMMD(dim))
    if resamples:
        distances.append(metrics.FrechetSpread(dim, resamples, seed, network.frechet))
    figures: Figures = {}
    for metric in distances:
        metric.to(device if device.startswith("cuda") else "cpu")  # others have no float64
        metric.update(real, real=True)
        metric.update(fake, real=False)
        figures |= metric.compute()
    notes = metrics.sample_size_warnings(dim, figures["n_real"], figures["n_fake"])
    return figures | {"notes": notes}


class Evaluator:
    """Two networks that look at images.

    Args:
        features: of the Frechet distance, KID, precision and recall, as `load_features` has it.
        clip: of the CLIP score and the rank of the caption, as `clip_config` has it.
        device, precision: of both networks.
    """

    def __init__(
        self, features: str, clip: str, device: str = "cpu", precision: str = "fp32"
    ) -> None:
        features = "openmoji" if features == "clip" else features
        self.clip = FrozenCLIP(clip_config(clip, precision), device)
        self.scores = clip_features(self.clip)
        self.network: Features = self.scores
        if features != clip:
            self.network = load_features(features, device, precision)

    def shared_clip_warnings(self, conditioning: Fingerprint | None) -> list[str]:
        """`shared_clip_warnings` of both networks."""
        return shared_clip_warnings(conditioning, self.network.fingerprint, self.scores.fingerprint)

    def extract(self, batches: Iterable[Batch]) -> ImageFeatures:
        """The features of batches of images; their `keys` are the captions' numbers."""
        rows = []
        for batch in batches:
            scored = self.scores(batch["images"])
            features = scored if self.network is self.scores else self.network(batch["images"])
            number = torch.tensor([int(key) for key in batch["keys"]])
            rows.append((number, features.float().cpu(), scored.float().cpu()))
        if rows:
            return ImageFeatures(*(torch.cat(part) for part in zip(*rows, strict=True)))
        no_features, no_scores = torch.zeros(0, self.network.dim), torch.zeros(0, self.scores.dim)
        return ImageFeatures(torch.zeros(0, dtype=torch.int64), no_features, no_scores)

    def embed_captions(self, captions: Sequence[Caption], batch_size: int = 256) -> Tensor:
        """The captions' embeddings (N, E) by the CLIP that scores."""
        texts = [caption.text for caption in captions]
        parts = []
        for start in range(0, len(texts), batch_size):
            tokens = self.clip.tokenize(texts[start : start + batch_size])
            parts.append(self.clip.embed_text(tokens).embed.float().cpu())
        return torch.cat(parts)

    def compute(self, real: Tensor | None, images: ImageFeatures, text: Tensor) -> Figures:
        """All figures of images, over all ranks.

        Args:
            real: this rank's share of the reference's features (M, D); None: CLIP score and ranks
                only.
            images: this rank's share.
            text: the embeddings (N, E) of all captions.
        """
        figures: Figures = {}
        if real is not None:
            device = str(self.clip.device)
            figures |= compute_distances(self.network, real, images.features, 0, device=device)
        for metric in (metrics.CLIPScore(), metrics.RetrievalRank(self.clip.embed_dim)):
            on_ranks_device(metric).update(images.image_embed, text[images.number])
            figures |= metric.compute()
        return figures


def number_rows(features: Tensor) -> ImageFeatures:
    """This rank's features (N, D) of a reference, numbered like captions for `gather_ranks`."""
    number = torch.arange(len(features)) * world_size() + rank()
    return ImageFeatures(number, features, features)


def caption_images(captions: Sequence[Caption], size: int, batch_size: int) -> Iterator[Batch]:
    """This rank's share of the captions' own pictures, cut to `size` pixels, in batches."""
    own = range(rank(), len(captions), world_size())
    for start in range(0, len(own), batch_size):
        numbers = own[start : start + batch_size]
        images = [to_uint8(decode(captions[k].image or b"", size)) for k in numbers]
        yield {
            "images": torch.stack(images),
            "keys": [str(k) for k in numbers],
            "captions": [captions[k].text for k in numbers],
        }


def gather_ranks(images: ImageFeatures, device: str) -> ImageFeatures:
    """The features of all ranks, in the order of their captions."""
    if distributed.is_initialized():
        from torchmetrics.utilities.distributed import gather_all_tensors

        place = device if distributed.get_backend() == "nccl" else "cpu"
        shares = [gather_all_tensors(rows.to(place)) for rows in images]
        images = ImageFeatures(*(torch.cat([part.cpu() for part in share]) for share in shares))
    order = images.number.argsort()
    return ImageFeatures(*(rows[order] for rows in images))
