"""What every stage shares: saved settings, training and validation steps, and resuming a run.

A stage owns its networks, its loss and how to sample. CLIP, data, EMA, pictures and checkpoints
live elsewhere.
"""

import dataclasses
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from unclip_pl.clip.fingerprint import require_same
from unclip_pl.cluster.sharded import shard
from unclip_pl.diffusion.cuda_graph import CUDAGraphPredict
from unclip_pl.diffusion.noise import Noise
from unclip_pl.diffusion.process import Predict
from unclip_pl.diffusion.watch import watched
from unclip_pl.networks.compilation import compile_blocks
from unclip_pl.networks.layers import Block
from unclip_pl.networks.renamed import rename
from unclip_pl.stages.optimization import OptimizerConfig, build_optimizer, state_bytes
from unclip_pl.stages.resume import keep_own_limits, use_own_settings
from unclip_pl.stages.settings import (
    as_config,
    as_configs,
    changes,
    plain,
    require_same_model,
    settings_of,
)
from unclip_pl.utils.devices import announce_compiling
from unclip_pl.utils.distributed import rank
from unclip_pl.utils.errors import SharedError, UserError

__all__ = ["OptimizerConfig", "Stage"]
MAX_SKIPPED_STEPS = 100
"""A run ends after this many skipped steps in a row."""


class Stage(LightningModule):
    """One stage of unCLIP. Subclasses define `loss` and `sample`.

    Args:
        optimizer, settings: every argument of the subclass's constructor, by name: dataclasses, or
            the dicts that were saved of them. They are saved as plain values, from which
            `type(self)(**hparams)` builds the stage again.
    """

    config: SimpleNamespace
    """The settings by name, as dataclasses where the constructor's type hints say so."""
    clip_fingerprint: dict | None = None
    """The CLIP whose embeddings this stage was trained on, as `Fingerprint` data; kept in
    checkpoints and releases."""
    trained_steps: int = 0
    """Optimiser steps of the release or checkpoint that the weights were loaded from."""
    cuda_graphs: bool = False
    """Sampling on a GPU records the denoising step as a CUDA graph."""
    watch: Callable[[Tensor], object] | None = None
    """Called with x0 of each step of `sample`, (B, 3, H, W) on the stage's device."""
    compile_networks: bool = False
    """Training compiles the blocks of all networks."""
    skipped_steps: Tensor
    """Optimizer steps that were skipped because a gradient was not finite, int64."""
    may_change: tuple[str, ...] = (
        *("optimizer.*", "sampling.*", "condition", "diffusion.max_snr", "*checkpointing"),
        *("net.dropout", "cond_dropout", "cond_dropout.embed", "cond_dropout.text"),
        *("augment", "sam_rho"),
    )
    """Settings with which other weights still mean the same, as patterns. All others must be those
    of the checkpoint or release that a run starts from."""
    legacy_defaults: dict[str, Any] = {}
    """Values of settings that older weights do not name, where they are not today's defaults."""
    scalars: tuple[str, ...] | None = None
    """The scalars that `loss` returns; None: not known, so that monitors cannot be checked."""
    captioned_dropout: Any = None
    """`cond_dropout` that drops no caption. Validation logs `val/loss_captioned` with it: the loss
    with the same noise. None: the stage reads no captions."""
    _last_check: tuple[int, int] | None = None
    """A step of this run, and how many had been skipped before it."""
    _resumed: bool = False
    """A checkpoint was loaded, and training has not begun yet."""

    def __init__(
        self, *, optimizer: OptimizerConfig | dict = OptimizerConfig(), **settings: Any
    ) -> None:
        super().__init__()
        settings = {"optimizer": optimizer} | settings
        self.config = SimpleNamespace(**as_configs(type(self), settings))
        self.save_hyperparameters({name: plain(value) for name, value in vars(self.config).items()})
        self.optimizer_config: OptimizerConfig = as_config(OptimizerConfig, optimizer)
        self.stage_name = type(self).__name__  # sharding gives the object another class
        self.register_buffer("skipped_steps", torch.zeros((), dtype=torch.int64))

    def loss(self, batch: dict, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """The loss of a batch.

        Args:
            batch: see the stage.
            generator: fixes what is random, for validation; None: torch's own generator.

        Returns:
            scalars by name, of which "loss" is minimised; "t" (B,) and "per_sample" (B,) may come
            with them for the monitors.
        """
        raise NotImplementedError

    def sample(self, batch: dict, noise: Noise) -> Tensor:
        """Draw one result per condition in `batch`; result k comes from generator k of `noise`."""
        raise NotImplementedError

    def count_steps(self, sampling: Any = None) -> int:
        """How many steps `sample` reports with these settings, by default the stage's own."""
        stage: Any = self  # what draws has `process` and `sampling`
        return len(stage.process.schedule.respaced((sampling or stage.sampling).steps))

    def wrap_predict(self, predict: Predict) -> Predict:
        """`predict`, recorded as a CUDA graph if `cuda_graphs` is set, and watched by `watch`."""
        predict = CUDAGraphPredict(predict) if self.cuda_graphs else predict
        return predict if self.watch is None else watched(predict, self.watch)

    def setup(self, stage: str) -> None:
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and data is not None:
            self.use_data(data)

    def use_data(self, data: Any) -> None:
        """Check the DataModule, and take from it what must be known before the first step."""
        if not hasattr(data, "fingerprint"):
            return
        self.check_data(data)
        fingerprint = data.fingerprint()
        if self.clip_fingerprint is not None:
            require_same(self.clip_fingerprint, fingerprint, "The checkpoint")
        self.clip_fingerprint = fingerprint

    def configure_model(self) -> None:
        if self.device_mesh is not None:  # a sharded run
            shard(self, self.device_mesh["data_parallel"], self.trainer.precision)
        if self.compile_networks:
            device = self.trainer.strategy.root_device
            if rank() == 0:
                announce_compiling(device.type)
            if not compile_blocks(self, device, kind=self.block_kind):
                raise UserError(
                    f"compile: the networks have no {self.block_kind.__name__}, which is what is "
                    "compiled here: leave compile out."
                )

    @property
    def block_kind(self) -> type[nn.Module]:
        """The class of the blocks that are compiled."""
        return Block

    def check_data(self, data: Any) -> None:
        """UserError where the DataModule does not fit the stage (widths, image size)."""

    def logged_names(self) -> set[str] | None:
        """What the stage logs in training and validation; None: not known."""
        if self.scalars is None:
            return None
        names = {f"{part}/{name}" for part in ("train", "val") for name in self.scalars}
        names |= {"val/loss_captioned"} if self.captioned_dropout is not None else set()
        return names | {"train/grad_norm", "train/skipped_steps"}

    def on_train_start(self) -> None:
        if self._resumed:
            optimizer: Any = self.optimizers(use_pl_optimizer=False)  # a stage has one of each
            scheduler: Any = self.lr_schedulers()
            use_own_settings(optimizer, scheduler, self._configured_groups)
            self._resumed = False

    def on_train_batch_start(self, batch: dict, batch_idx: int) -> None:
        # Noise, timesteps and dropout of a step depend only on the seed, the step and the rank, so
        # that a resumed run draws the same.
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) * 1_000_003 + self.global_step
        seed = seed * 65_537 + batch_idx * 8_191 + self.global_rank
        torch.manual_seed(seed % 2**64)  # the largest that torch takes
        if self._trainer is not None:
            # Where the curves go on. Lightning's count is one too high after the end of a run.
            self._trainer.fit_loop.epoch_loop._batches_that_stepped = self.global_step

    def training_step(self, batch: dict, batch_idx: int) -> dict[str, Tensor]:
        losses = self.loss(batch)
        self.log_dict(
            {f"train/{name}": value for name, value in losses.items() if value.ndim == 0},
            batch_size=len(batch["key"]),
        )
        return losses

    def validation_step(self, batch: dict, batch_idx: int) -> None:
        losses = self.loss(batch, torch.Generator().manual_seed(batch_idx))
        scalars = {f"val/{name}": value for name, value in losses.items() if value.ndim == 0}
        if self.captioned_dropout is not None:
            generator, loss = torch.Generator().manual_seed(batch_idx), cast(Any, self.loss)
            scalars["val/loss_captioned"] = loss(batch, generator, self.captioned_dropout)["loss"]
        self.log_dict(scalars, batch_size=len(batch["key"]), sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = build_optimizer(self, self.optimizer_config)
        # As configured, before a checkpoint (of a sharded run: after this) overwrites it.
        self._configured_groups = [
            {k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups
        ]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    @property
    def optimizer_bytes(self) -> float:
        """Bytes of the state that the optimizer comes to hold, over all shards."""
        return state_bytes(self, self.optimizer_config)

    @property
    def lr(self) -> float:
        """`optimizer.lr`, by the name under which Lightning's LearningRateFinder sets it."""
        return self.optimizer_config.lr

    @lr.setter
    def lr(self, rate: float) -> None:
        self.optimizer_config = dataclasses.replace(self.optimizer_config, lr=rate)
        self.hparams["optimizer"]["lr"] = rate
        for group in self._configured_groups:
            if not group.get("muon"):
                group["lr"] = rate
        self._resumed = True  # the search ends by loading a checkpoint from before it

    def lr_factor(self, step: int) -> float:
        """The learning rate at an optimizer step, as a share of `optimizer.lr`."""
        max_steps = self._trainer.max_steps if self._trainer else -1
        return self.optimizer_config.lr_factor(step, max_steps)

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        # The trainer's own comes after the next forward pass, when both would be in memory.
        optimizer.zero_grad()

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any
    ) -> None:
        plugin = getattr(self._trainer, "precision_plugin", None)
        scaler = getattr(plugin, "scaler", None)  # of 16-mixed
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)  # Lightning leaves it to the fused step, which comes later
        # A step whose gradients are not finite is skipped inside the fused kernel (`found_inf`), so
        # that no value travels to the host.
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), self.optimizer_config.clip_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        bad = torch.logical_not(torch.isfinite(norm))
        # Not an attribute of the class; torch's GradScaler sets it in the same way.
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        self.skipped_steps += bad
        self.log_dict({"train/grad_norm": norm, "train/skipped_steps": self.skipped_steps.float()})
        self._require_progress()

    def _require_progress(self) -> None:
        """Check every `MAX_SKIPPED_STEPS` steps, because it waits for the device.

        Raises:
            SharedError: all steps since the last check were skipped.
        """
        if self._last_check is None:
            self._last_check = self.global_step, int(self.skipped_steps)
        step, skipped = self._last_check
        if self.global_step - step < MAX_SKIPPED_STEPS:
            return
        self._last_check = self.global_step, int(self.skipped_steps)
        if self._last_check[1] - skipped >= MAX_SKIPPED_STEPS:
            raise SharedError(
                f"The last {MAX_SKIPPED_STEPS} steps were all skipped, because their gradients "
                "were not finite: go on from an earlier checkpoint, such as the best one, with "
                "--init and a lower --model.optimizer.lr."
            )

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["stage"] = self.stage_name
        checkpoint["clip_fingerprint"] = self.clip_fingerprint

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        theirs = checkpoint.get("stage")
        if theirs != self.stage_name:
            raise UserError(
                f"The checkpoint holds a {theirs or 'model of another program'}, and this run "
                f"trains a {self.stage_name}: give a checkpoint of the same stage, or leave "
                "--ckpt_path out to start from scratch."
            )
        adapted = any(".lora_A." in name for name, _ in self.named_parameters())
        if ("lora_scale" in checkpoint) != adapted:
            had = "has no" if adapted else "has"
            raise UserError(
                f"The checkpoint {had} adapters (LoRA), and this run is otherwise: give it the "
                "same lightning_config/lora.yaml, or give the checkpoint to --init, which merges "
                "them."
            )
        for part in ("state_dict", "current_model_state"):
            if part in checkpoint:
                checkpoint[part] = rename(self.stage_name, checkpoint[part])
        if checkpoint.get("clip_fingerprint") and self.clip_fingerprint:
            require_same(checkpoint["clip_fingerprint"], self.clip_fingerprint, "The checkpoint")
        self.clip_fingerprint = checkpoint.get("clip_fingerprint") or self.clip_fingerprint
        if "hyper_parameters" not in checkpoint:
            return
        settings = settings_of(type(self), checkpoint["hyper_parameters"])
        fit = self._trainer is not None and self.trainer.state.fn == "fit"
        way_out = "train in another folder, without it" if fit else "leave those options out"
        require_same_model("The checkpoint", settings, dict(self.hparams), self.may_change, way_out)
        if fit:
            self._go_on_from(checkpoint, settings)

    def _go_on_from(self, checkpoint: dict, settings: dict[str, Any]) -> None:
        """Let this run's settings win over the checkpoint's, and report what differs."""
        name = settings["optimizer"]["name"]
        if name != self.optimizer_config.name:
            raise UserError(
                f"The checkpoint was trained with model.optimizer.name {name}, whose state does "
                f"not fit {self.optimizer_config.name}: keep {name}, or give the checkpoint to "
                "--init instead, which starts with a new optimizer."
            )
        if different := changes(settings, dict(self.hparams)):
            changed = ", ".join(
                f"model.{key} {ours} (it was {theirs})" for key, (theirs, ours) in different.items()
            )
            rank_zero_info(f"Going on with other settings than the checkpoint's: {changed}.")
        keep_own_limits(self.trainer, checkpoint)
        self._resumed = True
