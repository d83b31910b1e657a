"""Checkpoints whose sharded tensors stay in shards.

A checkpoint is a folder, which any number of ranks writes and reads together, or one process:

    meta.pt               the checkpoint as one rank would write it, with a placeholder for each
                          sharded tensor
    .metadata, *.distcp   these tensors by name, in the format of torch.distributed.checkpoint

Reading executes no code: meta.pt holds plain values, and from .metadata, a pickle, only the classes
that describe tensors are accepted.
"""

import pickle
import warnings
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from unclip_pl.utils.files import atomic_folder

META_FILE = "meta.pt"
PLACEHOLDER = "sharded tensor: "  # followed by the tensor's place
Target = Callable[[str, TensorStorageMetadata], Tensor | None]
"""From the place of a sharded tensor to the tensor it is read into.

A DTensor receives this rank's part. None: the tensor is not needed.
"""
Result = TypeVar("Result")


def map_leaves(tree: Any, change: Callable[[str, Any], Any], place: str = "") -> Any:
    """Replace each leaf of nested dicts, lists and tuples by `change(place, leaf)`.

    The place of `tree["a"][0]` is "a/0".
    """
    prefix = f"{place}/" if place else ""
    if isinstance(tree, dict):
        return {key: map_leaves(value, change, f"{prefix}{key}") for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        values = [map_leaves(value, change, f"{prefix}{i}") for i, value in enumerate(tree)]
        return type(tree)(values)
    return change(place, tree)


def write_folder(
    path: Path, checkpoint: dict[str, Any], explain: Callable[[BaseException], BaseException]
) -> None:
    """Write a checkpoint atomically; all ranks call this together.

    Args:
        path: the same on all ranks. An existing checkpoint of that name is replaced.
        checkpoint: nested dicts and lists. What is no DTensor is taken from rank 0.
        explain: from an error to the one that every rank raises.
    """
    shards: dict[str, Any] = {}

    def replace_sharded(place: str, value: Any) -> Any:
        if isinstance(value, DTensor):
            shards[place] = value
            return PLACEHOLDER + place
        return value

    unsharded = map_leaves(checkpoint, replace_sharded)
    with ExitStack() as stack:

        def create() -> str:
            return str(stack.enter_context(atomic_folder(path, replace=True)))

        temporary = Path(_run_on_rank_zero(create, explain))
        try:
            dcp.save(shards, storage_writer=dcp.FileSystemWriter(temporary))
        except dcp.api.CheckpointException as error:
            raise explain(next(iter(error.failures.values()))[0]) from error

        def finish() -> None:
            torch.save(unsharded, temporary / META_FILE)
            stack.close()

        _run_on_rank_zero(finish, explain)


def _run_on_rank_zero(
    function: Callable[[], Result], explain: Callable[[BaseException], BaseException]
) -> Result:
    """Call `function` on rank 0 only; every rank returns its result or raises its error."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            outcome[1] = explain(error)
    dist.broadcast_object_list(outcome, src=0)
    result, raised = outcome
    if raised is not None:
        raise raised
    return result


def whole_tensors(*parts: str) -> Target:
    """A target that reads tensors whole, to this process.

    Args:
        parts: entries of the checkpoint to read, such as "state_dict"; none: all.
    """

    def target(place: str, stored: TensorStorageMetadata) -> Tensor | None:
        if parts and place.partition("/")[0] not in parts:
            return None
        return torch.empty(stored.size, dtype=stored.properties.dtype)

    return target


def read_folder(path: Path, target: Target, all_ranks: bool = False) -> dict[str, Any]:
    """Read a checkpoint.

    Args:
        path: the folder.
        target: where to read each sharded tensor. A tensor without a target stays a placeholder.
        all_ranks: whether all ranks of the process group call this; then an error of one is raised
            on all.

    Raises:
        pickle.UnpicklingError: reading it would execute code.
    """
    unsharded = torch.load(path / META_FILE, map_location="cpu", weights_only=True)
    stored_tensors = read_metadata(path).state_dict_metadata
    shards = {}

    def collect(place: str, value: Any) -> Any:
        if isinstance(value, str) and value.startswith(PLACEHOLDER):
            stored = stored_tensors[value.removeprefix(PLACEHOLDER)]
            # We never write bytes, which torch's reader would unpickle.
            if not isinstance(stored, TensorStorageMetadata):
                raise pickle.UnpicklingError(f"{place} is no tensor")
            tensor = target(place, stored)
            if tensor is not None:
                shards[place] = tensor
        return value

    map_leaves(unsharded, collect)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")  # as intended
        dcp.load(shards, storage_reader=SafeReader(path), no_dist=not all_ranks)
    return map_leaves(unsharded, shards.get)


def is_complete(path: Path) -> bool:
    """Whether a folder has all files that its metadata name, each in full length."""
    try:
        lengths: dict[str, int] = {}
        for part in read_metadata(path).storage_data.values():
            end = part.offset + part.length
            lengths[part.relative_path] = max(lengths.get(part.relative_path, 0), end)
        if not zipfile.is_zipfile(path / META_FILE):
            return False
        return all((path / name).stat().st_size >= length for name, length in lengths.items())
    except (OSError, EOFError, ValueError, AttributeError, pickle.UnpicklingError):
        return False


def read_metadata(path: Path) -> Metadata:
    """Which tensors a folder has, and where in its files.

    Raises:
        pickle.UnpicklingError: the file names anything but descriptions of tensors.
    """
    with (path / ".metadata").open("rb") as file:
        metadata = _Unpickler(file).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError("it is no metadata")
    return metadata


class SafeReader(dcp.FileSystemReader):
    """torch's reader with `read_metadata` in place of its own, which executes pickled code."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


DTYPES = [value for value in vars(torch).values() if isinstance(value, torch.dtype)]


class _Unpickler(pickle.Unpickler):
    """Unpickle nothing but descriptions of tensors and files."""

    ALLOWED = {
        "torch.distributed.checkpoint.metadata": (
            "Metadata",
            "MetadataIndex",
            "TensorStorageMetadata",
            "ChunkStorageMetadata",
            "TensorProperties",
            "StorageMeta",
            "_MEM_FORMAT_ENCODING",
        ),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch": ("Size", *(str(dtype).removeprefix("torch.") for dtype in DTYPES)),
        "torch.serialization": ("_get_layout",),
        "pathlib": ("PosixPath",),
        "pathlib._local": ("PosixPath",),
    }

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)
