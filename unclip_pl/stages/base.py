"""What every stage shares: plain hyperparameters, fused AdamW with warm-up, clipping that skips and counts non-finite steps.

A stage owns its networks, its loss and how to sample; CLIP, data, EMA, pictures and checkpoints live elsewhere.
"""

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor
from torch.distributed.tensor import DTensor

from unclip_pl.clip.fingerprint import require_same
from unclip_pl.cluster.sharded import shard
from unclip_pl.diffusion.cuda_graph import cuda_graphed
from unclip_pl.diffusion.noise import Noise
from unclip_pl.diffusion.process import Predict
from unclip_pl.networks.compilation import compile_blocks
from unclip_pl.networks.long_text import VOCABULARY, own_length
from unclip_pl.networks.renamed import rename
from unclip_pl.optim.muon import Muon, hidden_weights
from unclip_pl.stages.resume import keep_patience, use_own_settings
from unclip_pl.stages.settings import (
    as_config,
    changes,
    plain,
    require_same_model,
    settings_of,
)
from unclip_pl.utils.errors import UserError


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, with the learning rate's course and gradient clipping.

    `betas`, `eps`, `weight_decay` of AdamW as in Table 3 of the paper.
    """

    name: Literal["adamw", "muon"] = "adamw"
    """"muon": the kernels and matrices of the blocks by Muon, all else by AdamW."""
    lr: float = 1e-4
    muon_lr: float = 0.02
    """muon: learning rate of the weights that Muon trains."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 1000
    """Steps over which the rate rises linearly from 0."""
    decay: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or a half cosine down to 0 at `trainer.max_steps`."""
    clip_norm: float = 1.0
    """Largest norm of all gradients together."""

    def __post_init__(self) -> None:
        if self.name not in ("adamw", "muon"):
            raise ValueError(f'There is no optimizer "{self.name}": choose "adamw" or "muon".')
        for name in ("lr", "muon_lr", "eps", "weight_decay", "warmup_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}: give 0 or more.")
        if not all(0 <= beta < 1 for beta in self.betas):
            given = list(self.betas)
            raise ValueError(f"optimizer.betas is {given}: give two numbers from 0 to below 1.")
        if not self.clip_norm > 0:
            raise ValueError(
                f"optimizer.clip_norm is {self.clip_norm}: give more than 0, or .inf for no limit."
            )


def empty_caption(clip: Any) -> tuple[Tensor, Tensor]:
    """What a `FrozenCLIP` gives for "": states (2, W) of SOT and EOT, and the embedding (D,)."""
    features = clip.embed_text(clip.tokenize([""]))
    return features.states[0, :2], features.embed[0]


def check_clip(data: Any, embed_dim: int, text: Any) -> None:
    """UserError where the CLIP of a DataModule has embeddings or token states of another width than the stage's `embed_dim` and `text` config."""
    clip = data.clip
    if clip.embed_dim != embed_dim:
        given = clip.embed_dim
        raise UserError(
            f"The CLIP of the data gives embeddings of {given} numbers and model.net.embed_dim is {embed_dim}: set it to {given}."
        )
    if text.kind == "states" and not data.text_states:
        raise UserError(
            'model.text.kind is "states", for which the data must give CLIP\'s token states: set data.text_states to true.'
        )
    if text.kind == "states" and clip.states_width != text.states_width:
        raise UserError(
            f"The CLIP of the data has token states of {clip.states_width} numbers and model.text.states_width is {text.states_width}: set it to "
            f"{clip.states_width}."
        )


def check_length(data: Any, text: Any) -> None:
    """UserError where the CLIP of a DataModule has longer captions than the `text` config has positions."""
    if (length := data.clip.context_length) > text.context_length:
        raise UserError(
            f"The CLIP of the data has captions of {length} tokens and model.text.context_length is {text.context_length}: set it to {length}."
        )


def check_own_tokens(data: Any, text: Any) -> None:
    """UserError where a DataModule gives no `text_tokens` to fill the `text` config's context, or
    gives some that the stage does not read or has no embedding for."""
    length, given = data.clip.context_length, getattr(data, "text_length", None)
    wanted = own_length(text, length)
    if wanted is not None and text.vocab_size < VOCABULARY:
        raise UserError(
            f"model.text.vocab_size is {text.vocab_size}, and the tokenizer of whole captions has "
            f"{VOCABULARY} ids: set it to that."
        )
    if wanted == given:
        return
    if wanted is None:
        raise UserError(
            f"data.text_length is {given}, and the stage reads the CLIP's own {length} tokens: set "
            "it to null."
        )
    raise UserError(
        f"model.text.context_length is {wanted}, and the CLIP of the data has captions of {length} "
        f"tokens: set data.text_length to {wanted}, so that the data tokenise whole captions for "
        "the stage as well."
    )


def follow_layout(optimizer: torch.optim.Optimizer) -> None:
    """Bring state that was loaded from a run of another memory format into that of its weights: fused AdamW goes through both in the order of memory."""
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if (
                isinstance(value, Tensor)
                and value.shape == parameter.shape
                and value.stride() != parameter.stride()
            ):
                state[name] = torch.empty_like(parameter).copy_(value)


class Stage(LightningModule):
    """One stage of unCLIP. Subclasses give `loss` and `sample`, and call `remember` with their arguments.

    Args of `remember`: every constructor argument, as given; saved as plain values, from which `type(self)(**hparams)` builds it again.
    """

    clip_fingerprint: dict | None = None
    """The CLIP whose embeddings this stage was trained on, as `Fingerprint` data; kept in checkpoints and releases."""
    cuda_graphs: bool = False
    """Sampling on a GPU records the denoising step as a CUDA graph."""
    compile_networks: bool = False
    """Training compiles the blocks of all networks."""
    skipped_steps: Tensor
    may_change: tuple[str, ...] = (
        *("optimizer.*", "sampling.*", "condition", "diffusion.max_snr", "*checkpointing"),
        *("net.dropout", "dropout.embed", "dropout.text", "text_dropout", "drop_text"),
        *("augment", "sam_rho"),
    )
    """Settings with which other weights still mean the same, as patterns; all others must be those
    of the checkpoint or release that a run starts from."""
    before_it_was_a_setting: dict[str, Any] = {}
    """What stands for settings that older weights do not name, where it is not their default."""
    _resumed: bool = False
    """A checkpoint was loaded, and training has not begun yet."""

    def remember(self, optimizer: OptimizerConfig | dict, **arguments: Any) -> None:
        self.optimizer_config = as_config(OptimizerConfig, optimizer)
        self.save_hyperparameters(
            {"optimizer": plain(self.optimizer_config)}
            | {k: plain(v) for k, v in arguments.items()}
        )
        self.stage_name = type(self).__name__  # sharding gives the object another class
        self.register_buffer("skipped_steps", torch.zeros((), dtype=torch.int64))

    def loss(self, batch: dict, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Scalars by name, of which "loss" is minimised; "t" (B,) and "per_sample" (B,) may come along for the monitors.

        `generator` fixes what is drawn at random (validation); without it torch's own is used.
        """
        raise NotImplementedError

    def sample(self, batch: dict, noise: Noise) -> Tensor:
        """What the stage draws for the conditions in `batch`: one per sample, image k from generator k of `noise`."""
        raise NotImplementedError

    def with_cuda_graph(self, predict: Predict) -> Predict:
        """`predict`, recorded as a CUDA graph if `cuda_graphs` is set."""
        return cuda_graphed(predict) if self.cuda_graphs else predict

    def setup(self, stage: str) -> None:
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage != "fit" or not hasattr(data, "fingerprint"):
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
            compile_blocks(self, self.trainer.strategy.root_device)

    def check_data(self, data: Any) -> None:
        """Raise a sentence where the DataModule does not fit the stage (widths, image size)."""

    def on_train_start(self) -> None:
        if self._resumed:
            optimizer: Any = self.optimizers(use_pl_optimizer=False)  # a stage has one of each
            scheduler: Any = self.lr_schedulers()
            use_own_settings(optimizer, scheduler, self._own)
            self._resumed = False

    def on_train_batch_start(self, batch: dict, batch_idx: int) -> None:
        # Noise, timesteps and dropout of a step depend on the seed, the step and the rank alone: a resumed run draws the same.
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        torch.manual_seed(
            ((seed * 1_000_003 + self.global_step) * 65_537 + batch_idx * 8_191 + self.global_rank)
            % 2**64
        )  # torch takes no larger one

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
        self.log_dict(scalars, batch_size=len(batch["key"]), sync_dist=True)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        config = self.optimizer_config
        muon = config.name == "muon"
        hidden = hidden_weights(self) if muon else []
        known = {id(p) for p in hidden}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in known]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in rest if p.ndim > 1]},
            {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
            {"params": hidden, "muon": True, "lr": config.muon_lr},
        ]
        groups = [group for group in groups if group["params"]]
        if muon and any(isinstance(p, DTensor) for p in self.parameters()):
            raise UserError(
                "optimizer.name muon needs whole weights, and this run shards them: train with "
                "lightning_config/ddp.yaml, or with optimizer.name adamw."
            )
        settings: dict[str, Any] = {
            "lr": config.lr,
            "betas": config.betas,
            "eps": config.eps,
            "weight_decay": config.weight_decay,
        }
        optimizer: torch.optim.Optimizer = (
            Muon(groups, **settings) if muon else torch.optim.AdamW(groups, fused=True, **settings)
        )
        optimizer.register_load_state_dict_post_hook(follow_layout)
        # what the settings say, before a checkpoint (of a sharded run: after this) says otherwise
        self._own = [
            {k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups
        ]
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, self.lr_factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    @property
    def lr(self) -> float:
        """`optimizer.lr`, by the name under which Lightning's LearningRateFinder sets it."""
        return self.optimizer_config.lr

    @lr.setter
    def lr(self, rate: float) -> None:
        self.optimizer_config = dataclasses.replace(self.optimizer_config, lr=rate)
        self.hparams["optimizer"]["lr"] = rate
        for group in self._own:
            if not group.get("muon"):
                group["lr"] = rate
        self._resumed = True  # its search ends with a checkpoint from before it

    def lr_factor(self, step: int) -> float:
        """The learning rate at an optimiser step, as a share of `optimizer.lr`."""
        config = self.optimizer_config
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        if config.decay == "constant":
            return 1.0
        total = self.trainer.max_steps
        if total <= 0:
            raise UserError(
                "optimizer.decay: cosine needs to know the last step: give --trainer.max_steps."
            )
        share = (step - config.warmup_steps) / max(1, total - config.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None
    ) -> None:
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        optimizer.zero_grad()  # the trainer's own comes after the next forward pass, which would lie beside these gradients

    def configure_gradient_clipping(
        self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any
    ) -> None:
        plugin = getattr(self._trainer, "precision_plugin", None)
        scaler = getattr(plugin, "scaler", None)  # of 16-mixed
        if scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            scaler.unscale_(optimizer)  # Lightning leaves it to the fused step, which comes later
        # A step whose gradients are not finite is skipped inside the fused kernel (`found_inf`): no value travels to the host.
        norm = torch.nn.utils.clip_grad_norm_(self.parameters(), self.optimizer_config.clip_norm)
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        bad = torch.logical_not(torch.isfinite(norm))
        optimizer.found_inf = bad.float()  # type: ignore[attr-defined]  # no part of the class: torch's GradScaler sets it so too
        self.skipped_steps += bad
        self.log_dict({"train/grad_norm": norm, "train/skipped_steps": self.skipped_steps.float()})

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        checkpoint["stage"] = self.stage_name
        checkpoint["clip_fingerprint"] = self.clip_fingerprint

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        theirs = checkpoint.get("stage")
        if theirs != self.stage_name:
            raise UserError(
                f"The checkpoint holds a {theirs or 'model of another program'}, and this run trains a {self.stage_name}: "
                "give a checkpoint of the same stage, or leave --ckpt_path out to start from "
                "scratch."
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
        """What this run's settings say wins over the checkpoint's, and a line says what differs."""
        name = settings["optimizer"]["name"]
        if name != self.optimizer_config.name:
            raise UserError(
                f"The checkpoint was trained with model.optimizer.name {name}, whose state does "
                f"not fit {self.optimizer_config.name}: keep {name}, or give the checkpoint to "
                "--init instead, which starts with a new optimizer."
            )
        if changed := changes(settings, dict(self.hparams)):
            said = ", ".join(
                f"model.{key} {ours} (it was {theirs})" for key, (theirs, ours) in changed.items()
            )
            rank_zero_info(f"Going on with other settings than the checkpoint's: {said}.")
        keep_patience(self.trainer, checkpoint)
        self._resumed = True
