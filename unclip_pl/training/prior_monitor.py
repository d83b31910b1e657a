"""At every validation of a prior: how its embeddings for held-out captions stand to the true ones, to the captions, and to each other."""

from typing import cast

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from unclip_pl.diffusion.noise import Noise
from unclip_pl.training.protocols import Draws

MEASURED = (
    "cosine_image",
    "cosine_text",
    "cosine_text_data",
    "cosine_text_other",
    "rank",
    "r1",
    "r5",
)


def ranks(similarity: Tensor) -> Tensor:
    """(N, M) with the right answer to row i in column i -> (N,) rank of it in its row, 1 the best; ties count against it."""
    return (similarity >= similarity.diagonal()[:, None]).sum(1)


def mean_pairwise(z: Tensor, group: Tensor) -> Tensor | None:
    """Mean cosine over all pairs of rows of z (N, D) that are in the same group (N,), each group with the same weight; None: there is no pair."""
    sums = torch.zeros(int(group.max()) + 1, z.shape[1], dtype=torch.float64).index_add_(
        0, group, F.normalize(z.double(), dim=1)
    )
    counts = torch.bincount(group).double()
    several = counts > 1
    if not several.any():
        return None
    return ((sums.square().sum(1) - counts) / (counts * (counts - 1)))[several].mean().float()


def measure(drawn: Tensor, image_embed: Tensor, text_embed: Tensor) -> dict[str, Tensor]:
    """Drawn embeddings against the data, as scalars by name.

    Args:
        drawn: (N, D), for the first N captions.
        image_embed, text_embed: (M, D), M >= N; the others are distractors.

    Returns:
        `cosine_image`: to the true image embedding; `cosine_text`: to the caption's, beside `cosine_text_data`, the true image's own; `cosine_text_other`:
        to all other captions'; `rank`: median place of the true image among all M, `r1`, `r5`: share within the first 1 and 5.
    """
    drawn, image, text = (F.normalize(z.float(), dim=1) for z in (drawn, image_embed, text_embed))
    n, to_image, to_text = len(drawn), drawn @ image.T, drawn @ text.T
    rank = ranks(to_image)
    values = {
        "cosine_image": to_image.diagonal().mean(),
        "cosine_text": to_text.diagonal().mean(),
        "cosine_text_data": (image[:n] * text[:n]).sum(1).mean(),
        "rank": rank.float().quantile(0.5),
        "r1": (rank <= 1).float().mean(),
        "r5": (rank <= 5).float().mean(),
    }
    if len(text) > 1:
        values["cosine_text_other"] = (to_text.sum() - to_text.diagonal().sum()) / (
            n * (len(text) - 1)
        )
    return values


class PriorMonitor(Callback):
    """Logs `val/prior/...`: see `measure`; and the spread, a mean pairwise cosine: `spread` of several draws of one caption, beside `spread_data` of
    real images of one caption (where the validation data have several) and `spread_all` of all real images: draws that are as alike as one picture
    have collapsed, draws as different as all images do not listen.

    It draws with the weights that validation uses (the EMA), always for the same captions from the same noise. On several ranks each measures its own
    part, and the values are averaged.

    Args:
        captions: how many held-out captions to draw for; 0 draws none.
        draws: how many embeddings of one caption the spread is measured on, for the first eighth of the captions.
        seed: the noise of caption k comes from `seed + k`.
    """

    def __init__(self, captions: int = 64, draws: int = 4, seed: int = 0) -> None:
        if captions < 0 or draws < 2:
            raise ValueError(
                f"PriorMonitor was given captions {captions} and draws {draws}: give at least 0 and at least 2."
            )
        self.captions, self.draws, self.seed = captions, draws, seed
        self._real: dict[str, list[Tensor]] = {}
        self._drawn: list[Tensor] = []
        self._several: Tensor | None = None

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._real, self._drawn, self._several = (
            {"image_embed": [], "text_embed": [], "tokens": []},
            [],
            None,
        )

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: dict,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not self.captions or trainer.sanity_checking:
            return
        for name, kept in self._real.items():
            kept.append(batch[name].cpu())
        start = sum(map(len, self._drawn))
        count = min(self.captions - start, len(batch["key"]))
        if count <= 0:
            return
        stage, noise = (
            cast(Draws, pl_module),
            Noise(range(self.seed + start, self.seed + start + count)),
        )
        self._drawn.append(
            stage.sample({key: value[:count] for key, value in batch.items()}, noise).cpu()
        )
        if start == 0:
            few = torch.arange(max(1, count // 8)).repeat_interleave(self.draws)
            same = {
                key: value[few.to(value.device)]
                for key, value in batch.items()
                if torch.is_tensor(value)
            }
            first = self.seed + self.captions
            self._several = stage.sample(
                same | {"key": [batch["key"][i] for i in few.tolist()]},
                Noise(range(first, first + len(few))),
            ).cpu()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.captions or trainer.sanity_checking:
            return
        values = self._values() if self._several is not None else {}
        names = (
            *MEASURED,
            "spread",
            "spread_data",
            "spread_all",
        )  # the same on every rank, whatever its part of the data has
        sums = torch.stack(
            [
                torch.stack([values[name].float().cpu(), torch.ones(())])
                if name in values
                else torch.zeros(2)
                for name in names
            ]
        )
        sums = trainer.strategy.reduce(sums.to(pl_module.device), reduce_op="sum")
        known = {
            name: total / count
            for name, (total, count) in zip(names, sums, strict=True)
            if count > 0
        }
        pl_module.log_dict({f"val/prior/{name}": value for name, value in known.items()})

    def _values(self) -> dict[str, Tensor]:
        """What this rank's part of the data says."""
        assert self._several is not None
        real = {name: torch.cat(kept) for name, kept in self._real.items()}
        values = measure(torch.cat(self._drawn), real["image_embed"], real["text_embed"])
        group = torch.arange(len(self._several)) // self.draws
        caption = real["tokens"].unique(dim=0, return_inverse=True)[1]
        alike = {
            "spread": mean_pairwise(self._several, group),
            "spread_data": mean_pairwise(real["image_embed"], caption),
            "spread_all": mean_pairwise(real["image_embed"], torch.zeros_like(caption)),
        }
        return values | {name: value for name, value in alike.items() if value is not None}
