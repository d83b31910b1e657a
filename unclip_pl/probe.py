"""Probing CLIP's latent space with a decoder (unCLIP section 4).

Reconstructions from the first principal components, and typographic attacks.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import ImageDraw, ImageFont
from torch import Tensor

from unclip_pl.clip.fingerprint import require_same
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.data.store_statistics import Statistics
from unclip_pl.networks.quantizer import pca
from unclip_pl.pipeline.unclip import UnCLIP
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import from_pil, to_pil

PAPER_DIMENSIONS = (20, 30, 40, 80, 120, 160, 200, 320)
"""Numbers of components of D = 1024 (unCLIP figure 7)."""


def paper_dimensions(dim: int) -> list[int]:
    """The paper's numbers of components, scaled to embeddings of `dim` dimensions.

    They rise, and each comes once.
    """
    return sorted({max(1, round(k * dim / 1024)) for k in PAPER_DIMENSIONS})


@dataclass(frozen=True)
class PrincipalComponents:
    """Principal components of CLIP's image embeddings, which are not normalised. All in float64."""

    mean: Tensor
    """(D,)."""
    components: Tensor
    """(n, D), the one with the largest variance first; n is the rank."""
    variances: Tensor
    """(n,)."""

    @classmethod
    def from_statistics(cls, statistics: Statistics) -> "PrincipalComponents":
        """The components of an embedding store, by its statistics.

        Raises:
            UserError: all embeddings are the same.
        """
        covariance = statistics.covariance.double()
        components, _ = pca(covariance, 0.0, len(covariance))
        variances = torch.einsum("nd,de,ne->n", components, covariance, components)
        return cls(statistics.mean.double(), components, variances)

    @property
    def dim(self) -> int:
        """D."""
        return len(self.mean)

    def explained_variance(self, k: int) -> float:
        """The share of the variance that the first k components explain, 0 to 1."""
        return float(self.variances[:k].sum() / self.variances.sum())

    def reconstruct(self, image_embed: Tensor, k: int) -> Tensor:
        """Project embeddings onto the first k components: mu + W_k W_k^T (z - mu).

        With all D components the embeddings come back as they are.

        Args:
            image_embed: (B, D).
            k: 1 to D.

        Returns:
            (B, D), with the dtype and device of `image_embed`.

        Raises:
            UserError: fewer than 1 or more than D components.
        """
        if not 1 <= k <= self.dim:
            raise UserError(
                f"{k} principal components were asked for, and embeddings of this CLIP have 1 to "
                f"{self.dim}: give a number between."
            )
        if k == self.dim:  # also what lies outside of the data's span
            return image_embed
        basis = self.components[:k]
        z = image_embed.cpu().double() - self.mean
        return (self.mean + z @ basis.T @ basis).to(image_embed.device, image_embed.dtype)


def principal_components(
    clip: FrozenCLIP, store: str | os.PathLike | None = None
) -> PrincipalComponents:
    """The principal components of a store's image embeddings.

    Args:
        clip: the CLIP that the store must be of.
        store: its folder or URL; None: OpenMoji's, which is made if it is missing.

    Raises:
        UserError: the store is damaged, or of another CLIP.
    """
    from unclip_pl.datamodules.image_embedding import ImageEmbeddingData

    if store is None:
        data = ImageEmbeddingData(clip=clip.config)
        data.prepare_data()
        return PrincipalComponents.from_statistics(data.store.statistics(data.train_shards))
    embeddings = EmbeddingStore(store)
    require_same(embeddings.manifest["clip"], clip.fingerprint(), f"The store {store}")
    return PrincipalComponents.from_statistics(embeddings.statistics())


def zero_shot(unclip: UnCLIP, image_embed: Tensor, captions: Sequence[str]) -> Tensor:
    """CLIP's probabilities of M captions for each of N embeddings, at CLIP's own temperature.

    (N, D) -> (N, M), rows sum to 1.
    """
    similarity = unclip.clip.similarity(image_embed, unclip.embed_text(captions))
    scale = unclip.clip.model.logit_scale.exp().to(similarity.device)
    return (similarity * scale).softmax(dim=1)


def paste_label(image: Tensor, text: str) -> Tensor:
    """Paste a note with black letters on white paper across the middle of an image.

    This is the typographic attack of Goh et al. 2021. The letters fill at most three quarters of
    the width and a third of the height.

    Args:
        image: (3, H, W) in [-1, 1].
        text: what the note says.

    Returns:
        (3, H, W) in [-1, 1].

    Raises:
        UserError: the text is empty.
    """
    if not text.strip():
        raise UserError("The label to paste is empty: write what it shall say.")
    picture = to_pil(image)
    width, height = picture.size
    largest = max(1.0, height / 3)
    text_width = ImageFont.load_default(size=largest).getlength(text)
    size = max(1.0, largest * min(1.0, 0.75 * width / text_width))
    font = ImageFont.load_default(size=size)
    draw = ImageDraw.Draw(picture)
    centre = (width / 2, height / 2)
    left, top, right, bottom = draw.textbbox(centre, text, font=font, anchor="mm")
    edge = max(1, height // 40)
    margin = 2 * edge
    paper = (left - margin, top - margin, right + margin, bottom + margin)
    draw.rectangle(paper, fill="white", outline="black", width=max(1, edge // 2))
    draw.text(centre, text, fill="black", font=font, anchor="mm")
    return from_pil(picture)
