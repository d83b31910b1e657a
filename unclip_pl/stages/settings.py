"""Settings of a stage as plain values: how they are saved, read again and compared."""

import dataclasses
import inspect
import typing
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import Any, TypeVar

from unclip_pl.networks.renamed import rename_settings
from unclip_pl.utils.errors import UserError

Config = TypeVar("Config")


def plain(value: Any) -> Any:
    """A dataclass as a dict, with lists in place of tuples; any other value as it is.

    This is what a checkpoint may hold and `weights_only` loads.
    """
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    return dataclasses.asdict(value, dict_factory=_with_lists)


def _with_lists(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in items}


def as_config(kind: type[Config], value: Config | dict) -> Config:
    """The dataclass `kind`, from an instance or from the dict that `plain` made of one.

    Lists become tuples, and `checkpointing` may be a bool, as it was before it had three kinds.
    """
    if not isinstance(value, dict):
        return value
    fields = {k: tuple(item) if isinstance(item, list) else item for k, item in value.items()}
    if isinstance(fields.get("checkpointing"), bool):
        fields["checkpointing"] = "full" if fields["checkpointing"] else "none"
    return kind(**fields)


def as_configs(kind: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for the constructor of `kind`, as dataclasses where its type hints say so."""
    hints = typing.get_type_hints(kind.__init__)  # type: ignore[misc]  # only its hints are read
    configs = dict(settings)
    for name, value in settings.items():
        if dataclasses.is_dataclass(hint := hints.get(name)):
            configs[name] = as_config(hint, value)  # type: ignore[arg-type]  # a class, no instance
    return configs


def settings_of(kind: type, hyper_parameters: Mapping[str, Any]) -> dict[str, Any]:
    """All settings of a stage of class `kind` as plain values, by the names of today.

    Settings that an older version did not save are as the stage's `legacy_defaults` say, or at
    their defaults.

    Raises:
        UserError: there are settings that the class does not know.
    """
    saved = rename_settings(hyper_parameters)
    legacy_defaults = getattr(kind, "legacy_defaults", {})
    settings = {}
    constructor = kind.__init__  # type: ignore[misc]  # only its signature is read
    for parameter in list(inspect.signature(constructor).parameters.values())[1:]:
        default = legacy_defaults.get(parameter.name, parameter.default)
        value = saved.get(parameter.name, default)
        try:
            config = as_configs(kind, {parameter.name: value})[parameter.name]
        except (TypeError, ValueError) as error:
            raise UserError(
                f"The checkpoint has settings of model.{parameter.name} that this version does "
                f"not know ({error}): use the version that it was trained with."
            ) from error
        settings[parameter.name] = plain(config)
    return settings


def changes(theirs: Any, ours: Any, place: str = "") -> dict[str, tuple[Any, Any]]:
    """Where two trees of plain values differ: {"net.width": (theirs, ours), ...}.

    A value that is missing is None.
    """
    if not (isinstance(theirs, dict) and isinstance(ours, dict)):
        return {} if theirs == ours else {place: (theirs, ours)}
    different: dict[str, tuple[Any, Any]] = {}
    for key in theirs | ours:
        path = f"{place}.{key}" if place else str(key)
        different |= changes(theirs.get(key), ours.get(key), path)
    return different


def require_same_model(
    what: str, theirs: dict[str, Any], ours: dict[str, Any], free: Sequence[str], way_out: str
) -> None:
    """Check that weights mean the same in this run's model as where they were trained.

    Args:
        what: whose weights they are; begins the sentence.
        theirs: the settings that they were trained with, from `settings_of`.
        ours: this run's.
        free: patterns of the settings that may differ ("net.dropout", "optimizer.*").
        way_out: what to do instead of making them equal; ends the sentence.

    Raises:
        UserError: another setting differs.
    """
    different = {
        key: values
        for key, values in changes(theirs, ours).items()
        if not any(fnmatch(key, pattern) for pattern in free)
    }
    if different:
        trained = ", ".join(f"model.{key} {value}" for key, (value, _) in different.items())
        instead = ", ".join(str(value) for _, value in different.values())
        raise UserError(
            f"{what} was trained with {trained}, and this run has {instead}: make them equal, or "
            f"{way_out}."
        )
