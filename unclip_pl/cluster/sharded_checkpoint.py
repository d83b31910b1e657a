"""A checkpoint whose sharded tensors stay in shards: a folder that any number of ranks writes and reads together, or one process alone.

    meta.pt               the checkpoint as one rank would write it, with a name in the place of each sharded tensor
    .metadata, *.distcp   those tensors by name, as torch.distributed.checkpoint keeps them

Nothing in it is executed on reading: meta.pt holds plain values, and of .metadata, a pickle, only the classes that describe tensors are accepted.
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

META = "meta.pt"
MARK = "sharded tensor: "
Target = Callable[[str, TensorStorageMetadata], Tensor | None]
"""Place of a sharded tensor -> where to read it to, a DTensor for this rank's part; None: it is not needed."""
Result = TypeVar("Result")


def mapped(tree: Any, change: Callable[[str, Any], Any], place: str = "") -> Any:
    """Nested dicts, lists and tuples with `change(place, leaf)` for each leaf; the place of `tree["a"][0]` is "a/0"."""
    if isinstance(tree, dict):
        return {
            key: mapped(value, change, f"{place}/{key}" if place else str(key))
            for key, value in tree.items()
        }
    if isinstance(tree, (list, tuple)):
        return type(tree)(
            mapped(value, change, f"{place}/{i}" if place else str(i))
            for i, value in enumerate(tree)
        )
    return change(place, tree)


def write_folder(
    path: Path, checkpoint: dict[str, Any], describe: Callable[[BaseException], BaseException]
) -> None:
    """All ranks together: write `checkpoint`, the same on each but for its DTensors, so that the folder is there whole or not at all.

    Args:
        path: the same on all ranks; a checkpoint of that name is replaced.
        checkpoint: nested dicts and lists; what is no DTensor is taken from rank 0.
        describe: an error in the words for the user; every rank raises what it gives.
    """
    shards: dict[str, Any] = {}

    def leave_out(place: str, value: Any) -> Any:
        if isinstance(value, DTensor):
            shards[place] = value
            return MARK + place
        return value

    rest = mapped(checkpoint, leave_out)
    with ExitStack() as stack:
        temporary = Path(
            _from_rank_zero(
                lambda: str(stack.enter_context(atomic_folder(path, replace=True))), describe
            )
        )
        try:
            dcp.save(shards, storage_writer=dcp.FileSystemWriter(temporary))
        except dcp.api.CheckpointException as error:
            raise describe(next(iter(error.failures.values()))[0]) from error

        def finish() -> None:
            torch.save(rest, temporary / META)
            stack.close()

        _from_rank_zero(finish, describe)


def _from_rank_zero(
    step: Callable[[], Result], describe: Callable[[BaseException], BaseException]
) -> Result:
    """What `step` gives on rank 0, which alone runs it, on every rank; so too an error."""
    result: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            result[0] = step()
        except Exception as error:
            result[1] = describe(error)
    dist.broadcast_object_list(result, src=0)
    if result[1] is not None:
        raise result[1]
    return result[0]


def whole(*parts: str) -> Target:
    """Reads tensors whole, to this process: all, or those of some entries of the checkpoint alone ("state_dict")."""

    def target(place: str, stored: TensorStorageMetadata) -> Tensor | None:
        return (
            torch.empty(stored.size, dtype=stored.properties.dtype)
            if not parts or place.partition("/")[0] in parts
            else None
        )

    return target


def read_folder(path: Path, target: Target, together: bool = False) -> dict[str, Any]:
    """The checkpoint in a folder; a sharded tensor for which `target` gives None stays a name.

    Args:
        path: the folder.
        target: where each sharded tensor is read to.
        together: all ranks of the process group call this, and an error of one is an error of all.
    """
    rest = torch.load(path / META, map_location="cpu", weights_only=True)
    known = read_metadata(path).state_dict_metadata
    shards = {}

    def collect(place: str, value: Any) -> Any:
        if isinstance(value, str) and value.startswith(MARK):
            stored = known[value.removeprefix(MARK)]
            if not isinstance(
                stored, TensorStorageMetadata
            ):  # we never write bytes, which torch's reader would unpickle
                raise pickle.UnpicklingError(f"{place} is no tensor")
            if (found := target(place, stored)) is not None:
                shards[place] = found
        return value

    mapped(rest, collect)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*single process.*")  # it is meant
        dcp.load(shards, storage_reader=Reader(path), no_dist=not together)
    return mapped(rest, shards.get)


def is_whole(path: Path) -> bool:
    """Whether a folder has everything that its metadata name, in full length."""
    try:
        ends: dict[str, int] = {}
        for part in read_metadata(path).storage_data.values():
            ends[part.relative_path] = max(
                ends.get(part.relative_path, 0), part.offset + part.length
            )
        return zipfile.is_zipfile(path / META) and all(
            (path / name).stat().st_size >= end for name, end in ends.items()
        )
    except (OSError, EOFError, ValueError, AttributeError, pickle.UnpicklingError):
        return False


def read_metadata(path: Path) -> Metadata:
    """What tensors a folder has and where they lie.

    Raises:
        pickle.UnpicklingError: the file names anything but descriptions of tensors.
    """
    with (path / ".metadata").open("rb") as file:
        metadata = _Unpickler(file).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError("it is no metadata")
    return metadata


class Reader(dcp.FileSystemReader):
    """torch's reader with `read_metadata` in the place of its own, which executes what the file says."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class _Unpickler(pickle.Unpickler):
    """Of what a pickle may name, only what describes tensors and files."""

    ALLOWED = {
        "torch.distributed.checkpoint.metadata": (
            "Metadata", "MetadataIndex", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING",
        ),
        "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
        "torch": ("Size", *(str(value).removeprefix("torch.") for value in vars(torch).values() if isinstance(value, torch.dtype))),
        "torch.serialization": ("_get_layout",),
        "pathlib": ("PosixPath",), "pathlib._local": ("PosixPath",),
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if name not in self.ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)
