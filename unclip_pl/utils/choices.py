"""Check the fields of a configuration: words, shares and the least of numbers. No torch."""

from typing import Any, Literal, get_args, get_origin, get_type_hints


def check_choices(config: Any) -> None:
    """ValueError where a `Literal` field of a dataclass has none of its values."""
    for name, hint in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if get_origin(hint) is Literal and value not in get_args(hint):
            choices = ", ".join(f'"{choice}"' for choice in get_args(hint))
            raise ValueError(f"{type(config).__name__}.{name} is {value!r}: use one of {choices}.")


def check_least(config: Any, least: int, *names: str) -> None:
    """ValueError where one of these fields of a dataclass is a number below `least`."""
    for name in names:
        if (value := getattr(config, name)) < least:
            raise ValueError(f"{type(config).__name__}.{name} is {value}: give {least} or more.")


def check_share(name: str, value: float) -> None:
    """ValueError where a probability is none; `name` is that of the setting."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}: give a share from 0 to 1.")
