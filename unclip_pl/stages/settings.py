"""Settings of a stage as plain values: how they are saved, read again and compared."""

import dataclasses
import inspect
import typing
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any, TypeVar, cast

from unclip_pl.utils.errors import UserError

Config = TypeVar("Config")


def plain(value: Any) -> Any:
    """Dataclasses as dicts and tuples as lists, all the way down: what a checkpoint may hold and
    `weights_only` will load."""
    if dataclasses.is_dataclass(value):
        return {
            field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def as_config(kind: type[Config], value: Config | dict) -> Config:
    """The dataclass `kind` from an instance or from the plain dict that `plain` made of one.

    Lists become tuples, and `checkpointing` may be a bool, as it was before it had three kinds.
    """
    if not isinstance(value, dict):
        return value
    fields = {k: tuple(item) if isinstance(item, list) else item for k, item in value.items()}
    if isinstance(fields.get("checkpointing"), bool):
        fields["checkpointing"] = "full" if fields["checkpointing"] else "none"
    return kind(**fields)


def settings_of(kind: type, hyper_parameters: dict[str, Any]) -> dict[str, Any]:
    """The settings of a stage of class `kind` as plain values, those that it was saved without (by
    an older version) as the stage says, or at their defaults.

    Raises:
        UserError: there are settings that the class does not know.
    """
    constructor = kind.__init__  # type: ignore[misc]  # only its signature is read
    older = getattr(kind, "before_it_was_a_setting", {})
    hints, found = typing.get_type_hints(constructor), {}
    parameters = list(inspect.signature(constructor).parameters.values())[1:]
    try:
        for parameter in parameters:
            default = older.get(parameter.name, parameter.default)
            value = hyper_parameters.get(parameter.name, default)
            hint = hints[parameter.name]
            found[parameter.name] = plain(
                as_config(cast(type, hint), value) if dataclasses.is_dataclass(hint) else value
            )
    except (TypeError, ValueError) as error:
        raise UserError(
            f"The checkpoint has settings of model.{parameter.name} that this version does not "
            f"know ({error}): use the version that it was trained with."
        ) from error
    return found


def changes(theirs: Any, ours: Any, place: str = "") -> dict[str, tuple[Any, Any]]:
    """Where two trees of plain values differ: {"net.width": (theirs, ours), ...}; None where a value
    is missing."""
    if not (isinstance(theirs, dict) and isinstance(ours, dict)):
        return {} if theirs == ours else {place: (theirs, ours)}
    found: dict[str, tuple[Any, Any]] = {}
    for key in theirs | ours:
        below = f"{place}.{key}" if place else str(key)
        found |= changes(theirs.get(key), ours.get(key), below)
    return found


def require_same_model(
    what: str, theirs: dict[str, Any], ours: dict[str, Any], free: Sequence[str], way_out: str
) -> None:
    """UserError where weights would mean something else in this run's model.

    Args:
        what: whose weights, to begin the sentence with.
        theirs: the settings that they were trained with, from `settings_of`.
        ours: this run's.
        free: patterns of the settings that may differ ("net.dropout", "optimizer.*").
        way_out: what to do if they are not to be made equal, to end the sentence with.
    """
    found = {
        key: values
        for key, values in changes(theirs, ours).items()
        if not any(fnmatch(key, pattern) for pattern in free)
    }
    if found:
        named = ", ".join(f"model.{key} {value}" for key, (value, _) in found.items())
        instead = ", ".join(str(value) for _, value in found.values())
        raise UserError(
            f"{what} was trained with {named}, and this run has {instead}: make them equal, or "
            f"{way_out}."
        )
