"""Figures while a stage trains: what it draws for held-out samples against the real ones.

The callback owns the metrics, never the stage.

In YAML:
  trainer.callbacks+: [{class_path: eval.callback.Evaluate, init_args: {every_n_train_steps: 5000}}]
"""

from typing import Any

import unclip_pl.utils.torchvision  # noqa: F401  before the first import of lightning

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torchmetrics import Metric

from eval.features import Features, load_features
from eval.metrics import FRECHET, CLIPScore, FrechetDistance, KernelDistance, PrecisionRecall
from unclip_pl.diffusion.noise import Noise
from unclip_pl.utils.images import to_uint8


class Evaluate(Callback):
    """At a validation, with the weights that it uses (the EMA), evaluate what the stage draws.

    It logs `eval/fd_clip` (`eval/fid` with Inception's features), `eval/kid`, `eval/precision` and
    `eval/recall`. A prior draws embeddings: for it the same figures are of the embeddings, and
    `eval/clip_score` is of each embedding with its caption. The samples are those of the
    validation, always with the same noise. torchmetrics reduces over ranks.

    Args:
        every_n_train_steps: the first validation so many steps after the last evaluation evaluates
            again.
        count: samples of each rank; fewer if the validation has fewer.
        features: of images, as `eval.features.load_features` has them.
        seed: the noise of sample k is drawn from `seed + k`, the same whatever the batch.
    """

    def __init__(
        self,
        every_n_train_steps: int = 5000,
        count: int = 256,
        features: str = "clip",
        seed: int = 0,
    ) -> None:
        if every_n_train_steps < 1 or count < 4:
            raise ValueError(
                "eval.callback.Evaluate needs every_n_train_steps of at least 1 and count of at "
                "least 4."
            )
        self.every_n_train_steps, self.count = every_n_train_steps, count
        self.features, self.seed = features, seed
        self._network: Features | None = None
        self._frechet = "fd_clip"
        self._metrics: list[Metric] = []
        self._clip_score: CLIPScore | None = None
        self._last = 0
        self._seen = 0
        self._due = False

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._due = (
            not trainer.sanity_checking
            and trainer.global_step - self._last >= self.every_n_train_steps
        )
        self._seen, self._metrics, self._clip_score = 0, [], None

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
        if not self._due or self._seen >= self.count:
            return
        batch = {key: value[: self.count - self._seen] for key, value in batch.items()}
        first = self.seed + trainer.global_rank * self.count + self._seen
        size = len(batch["key"])
        drawn = pl_module.sample(batch, Noise(range(first, first + size)))
        self._seen += size
        if drawn.ndim == 2:
            real, fake = batch["image_embed"], drawn
            self._clip_score = self._clip_score or CLIPScore().to(pl_module.device)
            self._clip_score.update(drawn, batch["text_embed"])
        else:
            self._network = self._network or load_features(self.features, pl_module.device)
            self._frechet = self._network.frechet
            real, fake = (self._network(to_uint8(images)) for images in (batch["image"], drawn))
        for metric in self._metrics_of_width(real):
            metric.update(real, real=True)
            metric.update(fake, real=False)

    def _metrics_of_width(self, features: Tensor) -> list[Metric]:
        """The metrics of this evaluation, created when the width of the features is known."""
        if not self._metrics:
            dim = features.shape[1]
            metrics = FrechetDistance(dim, self._frechet), KernelDistance(dim), PrecisionRecall(dim)
            self._metrics = [metric.to(features.device) for metric in metrics]
        return self._metrics

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._due or not self._metrics:
            return
        self._last = trainer.global_step
        metrics = [*self._metrics]
        if self._clip_score is not None:
            metrics.append(self._clip_score)
        figures: dict[str, Tensor] = {}
        for metric in metrics:
            for name, value in metric.compute().items():
                if isinstance(value, float):
                    figures[f"eval/{name}"] = torch.tensor(value, dtype=torch.float32)
        pl_module.log_dict(figures)
        self._metrics, self._clip_score = [], None

    def logged_names(self, stage: object) -> set[str]:
        """What this callback logs, for `unclip_pl.training.monitored`."""
        names = (*FRECHET, "kid", "kid_se", "precision", "recall")
        of_embeddings = ("clip_score", "clip_score_se", "clip_score_low", "clip_score_high")
        return {f"eval/{name}" for name in (*names, *of_embeddings)}

    def state_dict(self) -> dict:
        return {"last": self._last}

    def load_state_dict(self, state_dict: dict) -> None:
        self._last = state_dict["last"]
