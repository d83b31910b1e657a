"""Figures while a stage trains: what it draws for held-out samples against the real ones.

The callback owns the metrics, never the stage.

In YAML:
  trainer.callbacks+: [{class_path: eval.callback.Evaluate, init_args: {every_n_train_steps: 5000}}]
"""

from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from eval.commands import choose_features
from eval.evaluator import same_clip
from eval.features import Features, load_features
from eval.metrics import FRECHET, CLIPScore, FrechetDistance, KernelDistance, PrecisionRecall
from unclip_pl.diffusion.noise import Noise
from unclip_pl.utils.images import to_uint8
from unclip_pl.utils.precision import autocast_of


class Evaluate(Callback):
    """At a validation, with the weights that it uses (the EMA), evaluate what the stage draws.

    It logs `eval/fid` (`eval/fd_clip` with a CLIP's features), `eval/kid`, `eval/precision` and
    `eval/recall`. A prior draws embeddings: for it the same figures are of the embeddings, under
    `eval/fd_clip`, and `eval/clip_score` is of each embedding with its caption. The samples are
    those of the validation, always with the same noise. torchmetrics reduces over ranks.

    Args:
        every_n_train_steps: the first validation evaluates, and then the first one so many steps
            after the last evaluation. The others log the last figures again, so that a checkpoint
            can watch them; the patience of early stopping counts those validations too.
        count: samples of each rank; fewer if the validation has fewer.
        features: of images, as `eval.features.load_features` has them; by default openmoji-judge
            where the embedded drawings are held out, and inception for everything else. The
            network is loaded at the first validation.
        seed: the noise of sample k is drawn from `seed + k`, the same whatever the batch.
    """

    def __init__(
        self,
        every_n_train_steps: int = 5000,
        count: int = 256,
        features: str | None = None,
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
        self._last: int | None = None
        self._figures: dict[str, float] = {}
        self._seen = 0
        self._due = False

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        steps = None if self._last is None else trainer.global_step - self._last
        self._due = not trainer.sanity_checking and (
            steps is None or steps >= self.every_n_train_steps
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
        if "image" in batch and self._network is None:
            self._network = self._load_features(trainer, pl_module)
        if not self._due or self._seen >= self.count:
            return
        batch = {key: value[: self.count - self._seen] for key, value in batch.items()}
        first = self.seed + trainer.global_rank * self.count + self._seen
        size = len(batch["key"])
        with autocast_of(trainer):
            drawn = pl_module.sample(batch, Noise(range(first, first + size)))
        self._seen += size
        if drawn.ndim == 2:
            real, fake = batch["image_embed"], drawn
            self._clip_score = self._clip_score or CLIPScore().to(pl_module.device)
            self._clip_score.update(drawn, batch["text_embed"])
        else:
            network = cast(Features, self._network)
            self._frechet = network.frechet
            real, fake = (network(to_uint8(images)) for images in (batch["image"], drawn))
        for metric in self._metrics_of_width(real):
            metric.update(real, real=True)
            metric.update(fake, real=False)

    def _load_features(self, trainer: Trainer, pl_module: LightningModule) -> Features:
        """The network for images; it warns of the CLIP whose embeddings the stage draws from."""
        held_out = getattr(getattr(trainer, "datamodule", None), "val", None)
        network = load_features(choose_features(self.features, held_out), pl_module.device)
        conditioning = getattr(pl_module, "clip_fingerprint", None)
        if conditioning and network.fingerprint and same_clip(conditioning, network.fingerprint):
            rank_zero_warn(
                f"The features of eval.callback.Evaluate are of {network.name}, which conditions "
                "this stage and flatters what it draws: set its `features` to another network."
            )
        return network

    def _metrics_of_width(self, features: Tensor) -> list[Metric]:
        """The metrics of this evaluation, created when the width of the features is known."""
        if not self._metrics:
            dim = features.shape[1]
            metrics = FrechetDistance(dim, self._frechet), KernelDistance(dim), PrecisionRecall(dim)
            self._metrics = [metric.to(features.device) for metric in metrics]
        return self._metrics

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking:
            return
        if self._due and self._metrics:
            self._last, self._figures = trainer.global_step, self._compute()
            self._metrics, self._clip_score = [], None
        logged = {name: torch.tensor(value) for name, value in self._figures.items()}
        pl_module.log_dict(logged)

    def _compute(self) -> dict[str, float]:
        """The figures of this evaluation, reduced over ranks."""
        metrics = [*self._metrics]
        if self._clip_score is not None:
            metrics.append(self._clip_score)
        computed = {name: value for metric in metrics for name, value in metric.compute().items()}
        return {f"eval/{name}": v for name, v in computed.items() if isinstance(v, float)}

    def logged_names(self, stage: object) -> set[str]:
        """What this callback logs, for `unclip_pl.training.monitored`."""
        names = (*FRECHET, "kid", "kid_se", "precision", "recall")
        of_embeddings = ("clip_score", "clip_score_se", "clip_score_low", "clip_score_high")
        return {f"eval/{name}" for name in (*names, *of_embeddings)}

    def state_dict(self) -> dict:
        return {"last": self._last, "figures": self._figures}

    def load_state_dict(self, state_dict: dict) -> None:
        self._figures = state_dict.get("figures", {})
        self._last = state_dict["last"] if self._figures else None
