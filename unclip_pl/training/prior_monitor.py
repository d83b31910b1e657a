"""Compare a prior's image embeddings with held-out data at every validation."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from unclip_pl.diffusion.noise import Noise
from unclip_pl.utils.precision import autocast_of

METRICS = (
    "cosine_image",
    "cosine_text",
    "cosine_text_data",
    "cosine_text_other",
    "rank",
    "r1",
    "r5",
    "spread",
    "spread_data",
    "spread_all",
)


def ranks(similarity: Tensor) -> Tensor:
    """The rank (N,) of the right answer in each row, 1 the best; ties count against it.

    Args:
        similarity: (N, M), with the right answer to row i in column i.
    """
    return (similarity >= similarity.diagonal()[:, None]).sum(1)


def median_rank(rank: Tensor) -> float:
    """The median of ranks (N,): of an even number the mean of the two in the middle.

    Torch's `median` gives the lower of the two, and its `quantile` takes 16 million numbers only.
    """
    return float(np.median(rank.cpu().numpy()))


def mean_pairwise(z: Tensor, group: Tensor) -> Tensor | None:
    """The mean cosine over all pairs of rows in the same group, with equal weight for each group.

    Args:
        z: (N, D).
        group: (N,), the number of each row's group, from 0.

    Returns:
        None: no group has a pair.
    """
    sums = torch.zeros(int(group.max()) + 1, z.shape[1], dtype=torch.float64)
    sums.index_add_(0, group, F.normalize(z.double(), dim=1))
    counts = torch.bincount(group).double()
    has_pair = counts > 1
    if not has_pair.any():
        return None
    # |sum of unit vectors|^2 has each pair twice, and each vector with itself.
    means = (sums.square().sum(1) - counts) / (counts * (counts - 1))
    return means[has_pair].mean().float()


def measure(drawn: Tensor, image_embed: Tensor, text_embed: Tensor) -> dict[str, Tensor]:
    """Compare sampled embeddings with the data.

    Args:
        drawn: (N, D), sampled for the first N captions.
        image_embed: (M, D), M >= N, the images of the captions; those after the first N are
            distractors.
        text_embed: (M, D), the captions.

    Returns:
        Scalars by name. `cosine_image`, `cosine_text`, `cosine_text_other`: the mean cosine of the
        samples to the true image, to their caption and to all other captions. `cosine_text_data`:
        that of the true images to their captions. `rank`: the median rank of the true image among
        all M. `r1`, `r5`: how often it is among the first 1 and 5.
    """
    drawn, image, text = (F.normalize(z.float(), dim=1) for z in (drawn, image_embed, text_embed))
    n = len(drawn)
    to_image, to_text = drawn @ image.T, drawn @ text.T
    rank = ranks(to_image)
    values = {
        "cosine_image": to_image.diagonal().mean(),
        "cosine_text": to_text.diagonal().mean(),
        "cosine_text_data": (image[:n] * text[:n]).sum(1).mean(),
        "rank": torch.tensor(median_rank(rank)),
        "r1": (rank <= 1).float().mean(),
        "r5": (rank <= 5).float().mean(),
    }
    if len(text) > 1:
        others = to_text.sum() - to_text.diagonal().sum()
        values["cosine_text_other"] = others / (n * (len(text) - 1))
    return values


class PriorMonitor(Callback):
    """Logs the values of `measure` and the spread of the samples as `val/prior/...`.

    The spread is a mean pairwise cosine: `spread` of several samples for one caption, `spread_data`
    of the real images of one caption (if the validation data have several), and `spread_all` of all
    real images. A prior whose `spread` is near 1 has collapsed; one whose `spread` is as low as
    `spread_all` ignores its captions.

    The weights are those of validation (the EMA), and captions and noise are always the same. Each
    rank measures its own part of the data, and the values are averaged.

    Args:
        captions: how many held-out captions to sample for; 0: none.
        draws: samples per caption for `spread`, which is measured on the first eighth of the
            captions.
        seed: the noise of caption k comes from `seed + k`.
    """

    def __init__(self, captions: int = 64, draws: int = 4, seed: int = 0) -> None:
        if captions < 0 or draws < 2:
            raise ValueError(
                f"PriorMonitor has captions {captions} and draws {draws}: give at least 0 and at "
                "least 2."
            )
        self.captions, self.draws, self.seed = captions, draws, seed
        self._real: dict[str, list[Tensor]] = {}
        self._drawn: list[Tensor] = []
        self._repeated: Tensor | None = None  # `draws` samples per caption

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._real = {"image_embed": [], "text_embed": [], "tokens": []}
        self._drawn = []
        self._repeated = None

    @torch.no_grad()
    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: object,
        batch: dict,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not self.captions or trainer.sanity_checking:
            return
        for name, values in self._real.items():
            values.append(batch[name].cpu())
        start = sum(map(len, self._drawn))
        count = min(self.captions - start, len(batch["key"]))
        if count <= 0:
            return
        noise = Noise(range(self.seed + start, self.seed + start + count))
        part = {key: value[:count] for key, value in batch.items()}
        with autocast_of(trainer):
            self._drawn.append(pl_module.sample(part, noise).cpu())
            if start == 0:
                self._repeated = self._sample_repeatedly(pl_module, batch, max(1, count // 8))

    def _sample_repeatedly(self, stage: Any, batch: dict, count: int) -> Tensor:
        """`draws` samples for each of the first `count` captions of a batch."""
        rows = torch.arange(count).repeat_interleave(self.draws)
        repeated: dict = {"key": [batch["key"][i] for i in rows.tolist()]}
        for key, value in batch.items():
            if torch.is_tensor(value):
                repeated[key] = value[rows.to(value.device)]
        first = self.seed + self.captions
        return stage.sample(repeated, Noise(range(first, first + len(rows)))).cpu()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.captions or trainer.sanity_checking:
            return
        values = self._values() if self._repeated is not None else {}
        # (sum, count) of each metric. Its shape is the same on every rank, whatever values its part
        # of the data gives.
        sums = torch.zeros(len(METRICS), 2)
        for i, name in enumerate(METRICS):
            if name in values:
                sums[i] = torch.tensor([float(values[name]), 1.0])
        sums = trainer.strategy.reduce(sums.to(pl_module.device), reduce_op="sum")
        for name, (total, count) in zip(METRICS, sums, strict=True):
            if count > 0:
                pl_module.log(f"val/prior/{name}", total / count)

    def logged_names(self, stage: object) -> set[str]:
        """What this callback logs, for `training.monitored`."""
        return {f"val/prior/{name}" for name in METRICS} if self.captions else set()

    def _values(self) -> dict[str, Tensor]:
        """The metrics of this rank's part of the data."""
        assert self._repeated is not None
        real = {name: torch.cat(values) for name, values in self._real.items()}
        metrics = measure(torch.cat(self._drawn), real["image_embed"], real["text_embed"])
        group = torch.arange(len(self._repeated)) // self.draws
        caption = real["tokens"].unique(dim=0, return_inverse=True)[1]
        spreads = {
            "spread": mean_pairwise(self._repeated, group),
            "spread_data": mean_pairwise(real["image_embed"], caption),
            "spread_all": mean_pairwise(real["image_embed"], torch.zeros_like(caption)),
        }
        return metrics | {name: value for name, value in spreads.items() if value is not None}
