"""Networks in other projects' files, read one tensor at a time and with nothing executed."""

import json
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from unclip_pl.utils.errors import UserError

STEMS = "diffusion_pytorch_model", "model", "pytorch_model"
VARIANTS = "", ".fp16"
"""diffusers calls a copy of the weights in another type a variant."""


class Tensors:
    """The tensors of one network by name; each is read from its file when it is asked for.

    Args:
        where: what they are of, to begin a sentence with: "karlo/prior".
        found: what gives each tensor.
    """

    def __init__(self, where: str, found: Mapping[str, Callable[[], Tensor]]) -> None:
        self.where, self._found = where, dict(found)

    @property
    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._found)

    def __getitem__(self, name: str) -> Tensor:
        """A tensor as its file has it. UserError where there is none of this name."""
        if name not in self._found:
            raise UserError(
                f"{self.where} has no tensor {name}: it is another model or a part of one, so give "
                "the files as their authors published them."
            )
        with explained(self.where):
            return self._found[name]()

    def below(self, prefix: str) -> "Tensors":
        """Those whose names begin with `prefix`, without it."""
        found = {
            name.removeprefix(prefix): read
            for name, read in self._found.items()
            if name.startswith(prefix)
        }
        return Tensors(self.where, found)

    def without(self, ending: str) -> "Tensors":
        """Those whose names end otherwise."""
        found = {name: read for name, read in self._found.items() if not name.endswith(ending)}
        return Tensors(self.where, found)

    def joined(self, other: "Tensors", prefix: str) -> "Tensors":
        """These and those of `other` behind a prefix."""
        more = {prefix + name: read for name, read in other._found.items()}
        return Tensors(self.where, self._found | more)


def read_safetensors(*files: Path, where: str | None = None) -> Tensors:
    """The tensors of safetensors files, which may be the parts of one network.

    Raises:
        UserError: a file is missing, cut off or of another kind.
    """
    found: dict[str, Callable[[], Tensor]] = {}
    for file in files:
        with explained(str(file)):
            opened = safe_open(file, framework="pt")
            names = list(opened.keys())
            found |= {name: partial(opened.get_tensor, name) for name in names}
    return Tensors(where or str(files[0]), found)


def unpickle(file: Path) -> Any:
    """What torch.save wrote, with tensors that are mapped into memory; nothing is executed.

    Raises:
        UserError: the file is missing, damaged, or holds more than tensors and plain values.
    """
    with explained(str(file)):
        try:
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):  # a file of torch before 1.6
                raise
            return torch.load(file, map_location="cpu", weights_only=True)


def read_pickle(file: Path, key: str | None = None, where: str | None = None) -> Tensors:
    """The tensors of a dict that torch.save wrote, or of the dict in its entry `key`.

    Raises:
        UserError: as `unpickle`, or there is no such dict in it.
    """
    held = unpickle(file)
    held = held.get(key) if key is not None and isinstance(held, dict) else held
    if not isinstance(held, dict):
        inside = f"in its entry {key}" if key else "in it"
        raise UserError(f"{file} has no tensors by name {inside}: it is a file of another model.")
    tensors = {name: value for name, value in held.items() if isinstance(value, Tensor)}
    found = {name: partial(_same, value) for name, value in tensors.items()}
    return Tensors(where or str(file), found)


def _same(value: Tensor) -> Tensor:
    return value


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object. UserError where the file is missing or holds something else."""
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{file} is missing: give a folder with all that its authors published."
        ) from None
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}): get the file again.") from None
    if not isinstance(held, dict):
        raise UserError(f"{file} holds no settings by name: get the file again.")
    return held


def read_network(folder: Path) -> tuple[dict[str, Any], Tensors]:
    """`config.json` and the tensors of a network as diffusers and transformers save it.

    Of several copies of the weights the first counts: safetensors before torch.save's files, whole
    precision before fp16. Weights in parts are found by their index.

    Raises:
        UserError: the folder or its weights are missing, or a file is damaged.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} is missing: give a folder with all that its authors published, "
            f"{folder.name} among it."
        )
    config = read_json(folder / "config.json")
    for ending, read in ((".safetensors", read_safetensors), (".bin", _read_bins)):
        for name in (f"{stem}{variant}" for stem in STEMS for variant in VARIANTS):
            if (whole := folder / f"{name}{ending}").is_file():
                return config, read(whole, where=str(folder))
            stem, _, variant = name.partition(".")
            index = folder / f"{stem}{ending}.index{'.' + variant if variant else ''}.json"
            if index.is_file():
                return config, read(*_parts(index), where=str(folder))
    raise UserError(
        f"{folder} has no weights ({STEMS[0]}.safetensors or a name like it): get them as well."
    )


def _parts(index: Path) -> list[Path]:
    """The files that an index names."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict):
        raise UserError(f"{index} does not say which file holds which tensor: get it again.")
    names = sorted({Path(str(name)).name for name in places.values()})  # never outside the folder
    return [index.with_name(name) for name in names]


def _read_bins(*files: Path, where: str | None = None) -> Tensors:
    found: dict[str, Callable[[], Tensor]] = {}
    for file in files:
        found |= read_pickle(file)._found
    return Tensors(where or str(files[0]), found)


@contextmanager
def sensible(where: str) -> Iterator[None]:
    """Settings and shapes that make no network become one sentence about their source."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        said = str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
        raise UserError(
            f"{where} has settings or weights that make no network ({said}): it is another model, "
            "or damaged, so give the files as their authors published them."
        ) from error


@contextmanager
def explained(where: str) -> Iterator[None]:
    """What goes wrong while a file is read becomes one sentence about it."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(
            f"{where} is missing: give a folder with all that its authors published."
        ) from None
    except OSError as error:
        raise UserError(
            f"{where} cannot be read ({error.strerror or error}): check the file and the rights to "
            "it."
        ) from error
    except pickle.UnpicklingError as error:
        if "global" in str(error).lower():
            raise UserError(
                f"{where} holds Python objects that could run code when loaded, not only weights, "
                "so it was not loaded: get a safetensors file of it."
            ) from None
        raise UserError(f"{where} holds no weights, or is damaged: get the file again.") from None
    except (SafetensorError, RuntimeError, EOFError, ValueError) as error:
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"{where} is damaged or cut off ({said[0][:120].rstrip('.')}): get the file again."
        ) from None
