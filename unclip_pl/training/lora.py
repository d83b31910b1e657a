"""Fine-tuning by low-rank adapters (LoRA, Hu et al. 2021), through peft."""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from unclip_pl.utils.errors import UserError


class LoRA(Callback):
    """Trains low-rank adapters of some layers of a stage's network, and nothing else.

    The stage starts from the weights of --init. Checkpoints hold the adapters next to the weights;
    whatever reads one (`unclip export`, `generate`, --init) merges them.

    Args:
        rank: of the adapters.
        alpha: what an adapter gives counts alpha / rank times; None: as `rank`.
        targets: the last part of the names of the layers: linear layers or convolutions. The
            default is the attention of a U-Net or a Transformer; ("conv1", "conv2") are those of an
            upsampler, which has no attention.
        dropout: of what goes into the adapters.

    Raises:
        UserError: peft is missing, no layer has such a name, or the optimiser is Muon.
    """

    def __init__(
        self,
        rank: int = 16,
        alpha: float | None = None,
        targets: Sequence[str] = ("qkv", "context_kv", "proj"),
        dropout: float = 0.0,
    ) -> None:
        if rank < 1 or not 0 <= dropout < 1:
            raise ValueError(
                f"LoRA has rank {rank} and dropout {dropout}: give a rank of 1 or more and a "
                "dropout from 0 to below 1."
            )
        self.rank, self.alpha = rank, float(rank if alpha is None else alpha)
        self.targets, self.dropout = tuple(targets), dropout

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        net: Any = pl_module.net
        if not any("lora_" in name for name, _ in net.named_parameters()):
            if pl_module.optimizer_config.name == "muon":  # type: ignore[union-attr]
                raise UserError(
                    "LoRA trains with AdamW, as its matrices are of low rank, and "
                    "model.optimizer.name is muon: set it to adamw."
                )
            pl_module.requires_grad_(False)
            self._inject(net)

    def _inject(self, net: nn.Module) -> None:
        try:
            from peft import LoraConfig, inject_adapter_in_model
        except ImportError:
            raise UserError(
                "LoRA needs the package peft, which is missing: pip install 'unclip_pl[lora]'."
            ) from None
        layers = adaptable(net)
        targets = [name for name in layers if name.rpartition(".")[2] in self.targets]
        if not targets:
            known = {name.rpartition(".")[2] for name in layers} - {""}
            raise UserError(
                f"LoRA finds no layers {', '.join(self.targets)} in the network: set targets to "
                f"some of {', '.join(sorted(known))}."
            )
        config = LoraConfig(
            r=self.rank,
            lora_alpha=self.alpha,  # type: ignore[arg-type]  # any number divides
            target_modules=targets,
            lora_dropout=self.dropout,
        )
        inject_adapter_in_model(config, net)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint["lora_scale"] = self.alpha / self.rank


def adaptable(net: nn.Module) -> list[str]:
    """Names of the layers that can have adapters: linear layers and convolutions that are called.

    torch's MultiheadAttention takes the weights of its layers without calling them.
    """
    found: list[str] = []
    inside: tuple[str, ...] = ()
    for name, module in net.named_modules():
        if isinstance(module, nn.MultiheadAttention):
            inside += (f"{name}.",)
        elif isinstance(module, (nn.Linear, nn.Conv2d)) and not name.startswith(inside):
            found.append(name)
    return found
