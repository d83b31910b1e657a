"""Fully sharded training (FSDP2).

Each rank keeps its part of the weights, gradients, optimiser state and weight average. It gathers
the weights of a block only while it computes that block.
"""

import os
import warnings
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, nn
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

from unclip_pl.cluster.checkpoint_io import explain_write_error, read_checkpoint
from unclip_pl.cluster.sharded_checkpoint import map_leaves, write_folder
from unclip_pl.networks.layers import Block
from unclip_pl.networks.renamed import rename
from unclip_pl.utils.errors import UserError

FSDP_METHODS = ("loss", "sample", "estimate_variance", "embed")
"""Methods of a stage that others call to run its networks; they gather weights like `forward`."""


def shard(stage: LightningModule, mesh: DeviceMesh, precision: str) -> None:
    """Shard a stage's parameters in place.

    Each `Block` is one group of parameters, and all other parameters of the stage form one more.

    Args:
        stage: with all its networks. A stage that is sharded already is left as it is.
        mesh: the ranks to shard over.
        precision: of the trainer. With "bf16-mixed" all weights of blocks are gathered in bfloat16
            (autocast leaves those of norms in float32), and gradients are summed in float32.

    Raises:
        UserError: a parameter is a single number, which cannot be sharded.
    """
    if isinstance(stage, FSDPModule):  # a second `fit` or `validate` of the same object
        return
    if single := [name for name, parameter in stage.named_parameters() if parameter.ndim == 0]:
        raise UserError(
            f"The {type(stage).__name__} cannot be sharded, for {single[0]} is a single number: "
            "use lightning_config/ddp.yaml."
        )
    # FSDP2 takes no other format
    stage.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    # The views are a TransformerBlock's keys and values, which nothing changes in place.
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*")
    policy = MixedPrecisionPolicy()
    if precision == "bf16-mixed":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for block in [module for module in stage.modules() if isinstance(module, Block)]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
        for method in block.fsdp_methods:
            register_fsdp_forward_method(block, method)
    # Resharded after the forward pass, so that callbacks find parts and not whole tensors at the
    # end of validation and training.
    fully_shard(stage, mesh=mesh, reshard_after_forward=True)
    for method in FSDP_METHODS:
        if hasattr(stage, method):
            register_fsdp_forward_method(stage, method)


def reshard(stage: nn.Module) -> None:
    """Give up the gathered weights of blocks, so that parameters are parts again."""
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


class ShardedStrategy(ModelParallelStrategy):
    """Lightning's strategy for FSDP2 over all ranks, with atomic checkpoints.

    A checkpoint is a folder of shards (`cluster/sharded_checkpoint.py`). Any number of ranks can
    read it, and so can a run with DDP. The file that an unsharded run wrote can be read as well.

    Args:
        process_group_backend: such as "nccl" or "gloo"; None: the accelerator's.
    """

    def __init__(self, process_group_backend: str | None = None) -> None:
        super().__init__(process_group_backend=process_group_backend)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def setup_environment(self) -> None:
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
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
        write_folder(path, checkpoint, partial(explain_write_error, path))

    def load_checkpoint(
        self, checkpoint_path: str | os.PathLike, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """The checkpoint with this rank's part of each sharded tensor."""
        parameters = self._parameters()

        def target(place: str, stored: TensorStorageMetadata) -> Tensor | None:
            like = parameters.get(self._owner(place))
            return None if like is None else torch.empty_like(like, dtype=stored.properties.dtype)

        def shard_whole_tensor(place: str, value: Any) -> Any:
            if not isinstance(value, Tensor) or isinstance(value, DTensor):
                return value
            like = parameters.get(self._owner(place))
            if like is None or value.shape != like.shape:
                return value
            whole = value.to(like.device).contiguous()
            part = distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)
            return part.clone()  # `part` is a view that keeps the whole tensor in memory

        path = self.broadcast(checkpoint_path)
        checkpoint = read_checkpoint(path, target=target, all_ranks=True)
        return map_leaves(checkpoint, shard_whole_tensor)

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        Strategy.load_optimizer_state_dict(self, checkpoint)

    def _parameters(self) -> dict[str, DTensor]:
        """The sharded parameters by `_owner`."""
        assert self.lightning_module is not None
        parameters: dict[str, Any] = {}
        for name, parameter in self.lightning_module.named_parameters():
            parameters[f"weight/{name}"] = parameter
        for i, optimizer in enumerate(self.optimizers):
            groups = [group["params"] for group in optimizer.param_groups]
            for k, parameter in enumerate(chain.from_iterable(groups)):
                parameters[f"optimizer/{i}/{k}"] = parameter
        return {owner: value for owner, value in parameters.items() if isinstance(value, DTensor)}

    def _owner(self, place: str) -> str:
        """The parameter that a place of a checkpoint belongs to; "": none.

        It is "weight/NAME" for weights and their averages, and "optimizer/I/K" for the state of
        optimiser I for its parameter K.
        """
        part, *names = place.split("/")
        if part in ("state_dict", "current_model_state"):
            stage: Any = self.lightning_module
            (name,) = rename(stage.stage_name, {names[0]: None})
            return f"weight/{name}"
        is_state = part == "optimizer_states" and names[1] == "state"
        return f"optimizer/{names[0]}/{names[2]}" if is_state else ""
