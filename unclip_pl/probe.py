"""Looking into the latent space of CLIP with a decoder (unCLIP section 4): reconstructions from the first principal components, typographic attacks."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import ImageDraw, ImageFont
from torch import Tensor

from unclip_pl.data.store import Statistics
from unclip_pl.networks.quantizer import pca
from unclip_pl.pipeline.unclip import UnCLIP
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import from_pil, to_pil

PAPER_DIMENSIONS = (20, 30, 40, 80, 120, 160, 200, 320)
"""Of D = 1024 (unCLIP figure 7)."""


def paper_dimensions(dim: int) -> list[int]:
    """The paper's numbers of components scaled to embeddings of `dim` dimensions, rising, each once."""
    return sorted({max(1, round(k * dim / 1024)) for k in PAPER_DIMENSIONS})


@dataclass(frozen=True)
class PrincipalComponents:
    """Of CLIP's image embeddings, as they are (not normalised): `mean` (D,), `components` (n, D) and their `variances` (n,), float64; n is the rank."""

    mean: Tensor
    components: Tensor
    variances: Tensor

    @classmethod
    def of(cls, statistics: Statistics) -> "PrincipalComponents":
        """Those of a store. UserError where its embeddings do not differ."""
        covariance = statistics.covariance.double()
        components, _ = pca(covariance, 0.0, len(covariance))
        return cls(
            statistics.mean.double(),
            components,
            torch.einsum("nd,de,ne->n", components, covariance, components),
        )

    @property
    def dim(self) -> int:
        """D."""
        return len(self.mean)

    def share(self, k: int) -> float:
        """Share of the variance that the first k have."""
        return float(self.variances[:k].sum() / self.variances.sum())

    def reconstruct(self, image_embed: Tensor, k: int) -> Tensor:
        """What the first k components say of embeddings, mu + W_k W_k^T (z - mu); all D of them say all. (B, D) -> (B, D).

        UserError for fewer than 1 or more than D.
        """
        if not 1 <= k <= self.dim:
            raise UserError(
                f"{k} principal components were asked for, and embeddings of this CLIP have 1 to {self.dim}: give a number between."
            )
        if k == self.dim:  # also what lies outside of the data's span
            return image_embed
        chosen = self.components[:k]
        z = image_embed.cpu().double() - self.mean
        return (self.mean + z @ chosen.T @ chosen).to(image_embed.device, image_embed.dtype)


def zero_shot(unclip: UnCLIP, image_embed: Tensor, captions: Sequence[str]) -> Tensor:
    """CLIP's probabilities of M captions for each of N embeddings, at its own temperature. (N, D) -> (N, M)."""
    similarity = unclip.clip.similarity(image_embed, unclip.embed_text(captions))
    return (similarity * unclip.clip.model.logit_scale.exp().to(similarity.device)).softmax(dim=1)


def labelled(image: Tensor, text: str) -> Tensor:
    """A picture (3, H, W) in [-1, 1] with a note across its middle, as the typographic attacks of Goh et al. 2021: black letters on white paper.

    The letters are as large as three quarters of the width let them be, and at most a third of the height. UserError for an empty text.
    """
    if not text.strip():
        raise UserError("The label to paste is empty: write what it shall say.")
    picture = to_pil(image)
    width, height = picture.size
    tall = max(1.0, height / 3)
    wide = ImageFont.load_default(size=tall).getlength(text)
    font = ImageFont.load_default(size=max(1.0, tall * min(1.0, 0.75 * width / wide)))
    draw = ImageDraw.Draw(picture)
    centre = (width / 2, height / 2)
    left, top, right, bottom = draw.textbbox(centre, text, font=font, anchor="mm")
    edge = max(1, height // 40)
    draw.rectangle(
        (left - 2 * edge, top - 2 * edge, right + 2 * edge, bottom + 2 * edge),
        fill="white",
        outline="black",
        width=max(1, edge // 2),
    )
    draw.text(centre, text, fill="black", font=font, anchor="mm")
    return from_pil(picture)
