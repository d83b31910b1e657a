"""Checks of the files and flags of `lightning`, and of the settings parsed from them.

What is wrong with them can be said better here than by what reads them next.
"""

import dataclasses
import math
import typing
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from unclip_pl.networks.renamed import SETTINGS
from unclip_pl.utils.errors import UserError

COMMANDS = ("fit", "validate", "test", "predict")
"""The subcommands of `lightning`."""
MAY_BE_INFINITE = "model.optimizer.clip_norm"


def check_configs(arguments: list[str]) -> None:
    """Check the `-c` files and `--model` flags of a command.

    Args:
        arguments: the command line, with the paths of its files as `find_config` returns them.

    Raises:
        UserError: a model setting has an older name, an overlay has no stage before it, or a
            file has no settings or cannot be read.
    """
    documents = {path: _read_yaml(path) for path in _config_files(arguments)}
    for path, content in documents.items():
        if not isinstance(content, dict):
            raise UserError(
                f"{path} has no settings: write some, such as `trainer: {{max_steps: 100}}`, or "
                "leave it out."
            )
    models = {path: _mapping(content, "model") for path, content in documents.items()}
    for path, model in models.items():
        for name in [*model, *_mapping(model, "init_args")]:
            if name in SETTINGS:
                raise UserError(
                    f"{path}: model.{name} is now called model.{SETTINGS[name]}: use that name."
                )
    options = [argument.partition("=")[0] for argument in arguments]
    for option in options:
        name = option.removeprefix("--model.").removeprefix("init_args.").split(".")[0]
        if option.startswith("--model.") and name in SETTINGS:
            raise UserError(
                f"--model.{name} is now called --model.{SETTINGS[name]}: use that name."
            )
    if not {"--model", "--model.class_path"} & set(options):
        _require_stage(models)


def _require_stage(models: dict[str, dict[str, Any]]) -> None:
    """UserError unless the first file with a model names a stage."""
    with_model = [path for path, model in models.items() if model]
    if not models or (with_model and "class_path" in models[with_model[0]]):
        return
    overlay = with_model[0] if with_model else ", ".join(models)
    raise UserError(
        f"{overlay} is an overlay and names no stage: give the file of a stage before it, such as "
        "-c stages/decoder.yaml."
    )


def _config_files(arguments: list[str]) -> list[str]:
    files = []
    for i, argument in enumerate(arguments):
        option, equals, path = argument.partition("=")
        if option in ("-c", "--config"):
            files += [path] if equals else arguments[i + 1 : i + 2]
    return files


def _read_yaml(path: str) -> Any:
    """The document in a file.

    Raises:
        UserError: it cannot be read.
    """
    import yaml

    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read as a YAML file ({reason}).") from error


def _mapping(content: Any, key: str) -> dict[str, Any]:
    """The mapping under a key of a YAML document; empty if there is none."""
    value = content.get(key) if isinstance(content, dict) else None
    return value if isinstance(value, dict) else {}


def check_settings(settings: Mapping[str, Any]) -> None:
    """Check the parsed settings of a run: of all files and flags together.

    Raises:
        UserError: a number is not finite, or a group of settings is null.
    """
    for option, value in _leaves(settings):
        is_allowed = option == MAY_BE_INFINITE and value == math.inf
        if isinstance(value, float) and not math.isfinite(value) and not is_allowed:
            raise UserError(f"{option} is {value}: give a finite number.")
    for part in ("model", "data"):
        if settings.get(part):
            _require_groups(part, settings[part])


def _require_groups(part: str, settings: Mapping[str, Any]) -> None:
    """UserError if a setting that is a group of its own, such as `model.net`, is null."""
    module, _, name = settings["class_path"].rpartition(".")
    try:
        types = typing.get_type_hints(getattr(import_module(module), name).__init__)
    except NameError:  # a user's own class may name types that are not imported
        return
    for name, value in (settings.get("init_args") or {}).items():
        if value is None and dataclasses.is_dataclass(types.get(name)):
            raise UserError(
                f"{part}.{name} is null, and it is a group of settings: leave it out to have "
                "their defaults, or give those that differ."
            )


def _leaves(settings: Any, option: str = "") -> Iterator[tuple[str, Any]]:
    """All single values in the settings, with the names of their options."""
    if isinstance(settings, (list, tuple)):
        for value in settings:
            yield from _leaves(value, option)
    elif isinstance(settings, Mapping):
        for name, value in settings.items():
            is_part = name != "init_args"
            yield from _leaves(value, f"{option}.{name}".lstrip(".") if is_part else option)
    else:
        yield option, settings
