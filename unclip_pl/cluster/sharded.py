"""Fully sharded training (FSDP2): each rank keeps its part of weights, gradients, optimiser and average, and gathers a block's weights to compute it."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from unclip_pl.cluster.checkpoint_io import read_checkpoint, unwritten
from unclip_pl.cluster.sharded_checkpoint import mapped, write_folder
from unclip_pl.networks.layers import Block
from unclip_pl.networks.renamed import rename
from unclip_pl.utils.errors import UserError

FSDP_METHODS = ("loss", "sample", "estimate_variance", "embed")
"""Methods of a stage through which others run its networks: as in `forward`, the weights must be there."""


def shard(stage: LightningModule, mesh: DeviceMesh, precision: str) -> None:
    """Shard a stage's parameters over `mesh`: each `Block` by itself, all others, also those outside of the networks, together.

    With "bf16-mixed" blocks are gathered in bfloat16, as autocast would use them, and gradients summed in float32.

    Raises:
        UserError: a parameter is a single number, which cannot be sharded.
    """
    if isinstance(stage, FSDPModule):  # a second `fit` or `validate` of the same object
        return
    if single := [name for name, parameter in stage.named_parameters() if parameter.ndim == 0]:
        raise UserError(
            f"The {type(stage).__name__} cannot be sharded, for {single[0]} is a single number: use lightning_config/ddp.yaml."
        )
    stage.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP2 takes no other
    warnings.filterwarnings(
        "ignore", message=".*returned a view tensor.*"
    )  # of a TransformerBlock's keys and values, which nothing changes in place
    policy = (
        MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        if precision == "bf16-mixed"
        else MixedPrecisionPolicy()
    )
    for block in [module for module in stage.modules() if isinstance(module, Block)]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
        for method in block.fsdp_methods:
            register_fsdp_forward_method(block, method)
    fully_shard(
        stage, mesh=mesh, reshard_after_forward=True
    )  # so that validation's and training's ends find the parts and not the whole
    for method in FSDP_METHODS:
        if hasattr(stage, method):
            register_fsdp_forward_method(stage, method)


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2 over all ranks, with checkpoints of our kind: whole or not there, and nothing in them is executed.

    A checkpoint is a folder of shards (`cluster/sharded_checkpoint.py`), which any number of ranks reads, DDP too; the file of an unsharded run can be read as well.

    Args:
        process_group_backend: None: the accelerator's.
    """

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(process_group_backend=process_group_backend)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        self._data_parallel_size, self._tensor_parallel_size = (
            self.num_nodes * self.num_processes,
            1,
        )
        super().setup_environment()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return Strategy.optimizer_state(self, optimizer)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | os.PathLike, storage_options: Any = None
    ) -> None:
        path = Path(self.broadcast(filepath))
        write_folder(path, checkpoint, lambda error: unwritten(path, error))

    def load_checkpoint(
        self, checkpoint_path: str | os.PathLike, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The checkpoint with this rank's part of each sharded tensor."""
        parameters = self._parameters()

        def target(place: str, stored: TensorStorageMetadata) -> Tensor | None:
            like = parameters.get(self._owner(place))
            return None if like is None else torch.empty_like(like, dtype=stored.properties.dtype)

        def part(place: str, value: Any) -> Any:
            like = (
                parameters.get(self._owner(place))
                if isinstance(value, Tensor) and not isinstance(value, DTensor)
                else None
            )
            if like is None or value.shape != like.shape:
                return value
            own = distribute_tensor(
                value.to(like.device).contiguous(),
                like.device_mesh,
                like.placements,
                src_data_rank=None,
            )
            return own.clone()  # else a view that keeps the whole

        return mapped(
            read_checkpoint(self.broadcast(checkpoint_path), target=target, together=True), part
        )

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        Strategy.load_optimizer_state_dict(self, checkpoint)

    def _parameters(self) -> dict[str, DTensor]:
        """The sharded parameters by `_owner`."""
        assert self.lightning_module is not None
        found: dict[str, Any] = {
            f"weight/{name}": parameter
            for name, parameter in self.lightning_module.named_parameters()
        }
        for i, optimizer in enumerate(self.optimizers):
            of_optimizer = [
                parameter for group in optimizer.param_groups for parameter in group["params"]
            ]
            found |= {f"optimizer/{i}/{k}": parameter for k, parameter in enumerate(of_optimizer)}
        return {
            owner: parameter for owner, parameter in found.items() if isinstance(parameter, DTensor)
        }

    def _owner(self, place: str) -> str:
        """Whose weight, average or optimiser state stands at `place` of a checkpoint."""
        part, *names = place.split("/")
        if part in ("state_dict", "current_model_state"):
            stage: Any = self.lightning_module
            (name,) = rename(stage.stage_name, {names[0]: None})
            return f"weight/{name}"
        is_state = part == "optimizer_states" and names[1] == "state"
        return f"optimizer/{names[0]}/{names[2]}" if is_state else ""
