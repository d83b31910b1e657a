"""Optimizers of the stages: their settings, parameter groups, and the state that they load."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from unclip_pl.optim.adamw8bit import adamw_8bit, bytes_8bit
from unclip_pl.optim.muon import Muon, hidden_weights
from unclip_pl.utils.choices import check_choices
from unclip_pl.utils.errors import UserError


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer, the schedule of its learning rate, and gradient clipping.

    `betas`, `eps` and `weight_decay` are AdamW's, as in Table 3 of the paper.
    """

    name: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """"adamw8bit": AdamW with a state of 8 bits, by bitsandbytes; "muon": Muon trains the kernels
    and matrices of the blocks, AdamW everything else."""
    lr: float = 1e-4
    muon_lr: float = 0.02
    """muon: learning rate of the weights that Muon trains."""
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_steps: int = 1000
    """Steps over which the learning rate rises linearly from 0."""
    decay: Literal["constant", "cosine"] = "constant"
    """After the warm-up: constant, or a half cosine down to 0 at `trainer.max_steps`."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this norm, taken over all of them together."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in ("lr", "muon_lr", "eps", "weight_decay", "warmup_steps"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"optimizer.{name} is {getattr(self, name)}: give 0 or more.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(
                f"optimizer.betas is {list(self.betas)}: give two numbers from 0 to below 1."
            )
        if not self.clip_norm > 0:
            raise ValueError(
                f"optimizer.clip_norm is {self.clip_norm}: give more than 0, or .inf for no limit."
            )

    def lr_factor(self, step: int, max_steps: int) -> float:
        """Compute the learning rate at an optimizer step, as a share of `lr`.

        Args:
            step: optimizer steps done so far, 0 for the first one.
            max_steps: the last step, which a cosine needs; <= 0: not known.

        Raises:
            UserError: a cosine, and the last step is not known.
        """
        if self.decay == "cosine" and max_steps <= 0:
            raise UserError(
                "optimizer.decay: cosine needs to know the last step: give --trainer.max_steps."
            )
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay == "constant":
            return 1.0
        share = (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, share)))


def build_optimizer(module: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW, or Muon with AdamW for the rest, for the parameters that require gradients.

    Norms, biases and other vectors have no weight decay.

    Raises:
        UserError: Muon or 8 bits with sharded weights; Muon without weights that it trains; 8 bits
            on a CPU, or without bitsandbytes.
    """
    muon = config.name == "muon"
    if config.name != "adamw" and any(isinstance(p, DTensor) for p in module.parameters()):
        raise UserError(
            f"optimizer.name {config.name} needs whole weights, and this run shards them: train "
            "with lightning_config/ddp.yaml, or with optimizer.name adamw."
        )
    if config.name == "adamw8bit" and any(p.device.type == "cpu" for p in module.parameters()):
        raise UserError(
            "optimizer.name adamw8bit needs a GPU, and this run is on the CPU: set it to adamw."
        )
    hidden = hidden_weights(module) if muon else []
    if muon and not hidden:
        raise UserError(
            f"optimizer.name muon trains the kernels and matrices of a network's blocks, and the "
            f"{type(module).__name__} has none: set it to adamw."
        )
    hidden_ids = {id(p) for p in hidden}
    rest = [p for p in module.parameters() if p.requires_grad and id(p) not in hidden_ids]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in rest if p.ndim > 1]},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
        {"params": hidden, "muon": True, "lr": config.muon_lr},
    ]
    groups = [group for group in groups if group["params"]]
    settings: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "eps": config.eps,
        "weight_decay": config.weight_decay,
    }
    optimizer: torch.optim.Optimizer
    if muon:
        optimizer = Muon(groups, **settings)
    elif config.name == "adamw8bit":
        optimizer = adamw_8bit(groups, **settings)
    else:
        optimizer = torch.optim.AdamW(groups, fused=True, **settings)
    optimizer.register_load_state_dict_post_hook(follow_layout)
    return optimizer


def state_bytes(module: nn.Module, config: OptimizerConfig) -> float:
    """Bytes of the optimizer state that `build_optimizer` needs for a module's float32 weights."""
    trained = [p.numel() for p in module.parameters() if p.requires_grad]
    if config.name == "adamw8bit":
        return sum(map(bytes_8bit, trained))
    hidden = hidden_weights(module) if config.name == "muon" else []
    return 8.0 * sum(trained) - 4.0 * sum(p.numel() for p in hidden)


def follow_layout(optimizer: torch.optim.Optimizer) -> None:
    """Give loaded state the memory format of its weights.

    The state may come from a run with another memory format, and fused AdamW goes through weights
    and state in the order of memory.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if not isinstance(value, Tensor) or value.shape != parameter.shape:
                continue
            if value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter).copy_(value)
