"""jsonargparse's error messages as one sentence, with the option that was probably meant."""

import dataclasses
import difflib
import inspect
import re
import typing
from collections.abc import Iterable, Iterator

UNKNOWN_OPTION = re.compile(
    r"unrecognized arguments: --([\w.]+)"
    r"|(?:option|Option|Key|key) '([\w.]+)'(?: is not (?:accepted|expected)|$)"
)
OTHER_NAMES = {
    "model", "data", "trainer", "seed_everything", "ckpt_path", "init", "compile", "init_args",
    "class_path", "ema", "newest", "best", "pictures", "preemption", "startup", "watchdog",
}  # fmt: skip
"""Names of the command line that are not parameters of a class."""


def to_sentence(message: str, callbacks: Iterable[type] = ()) -> str:
    """Shorten a message of several lines to one sentence.

    For an unknown option it names the most similar one that exists.

    Args:
        message: the message of an error.
        callbacks: the classes of callbacks that have options.
    """
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    if "Errors:" in lines:  # reasons why each type of a Union does not fit
        if sentence := _wrong_value(message, lines):
            return sentence
        lines = list(dict.fromkeys(lines[lines.index("Errors:") + 1 :]))
        # what its other types would be says nothing to those who meant this one
        lines = [line for line in lines if not line.startswith("Expected a <class")] or lines
    noise = lambda line: "NoneType" in line or line.startswith("Given value")  # noqa: E731
    short = " ".join(line for line in lines if line and not noise(line))
    unknown = UNKNOWN_OPTION.search(short)
    if unknown is None:
        return short or message
    names = option_names(callbacks)
    path = (unknown[1] or unknown[2]).split(".")
    wrong = next((name for name in path if name not in names), path[-1])
    similar = difflib.get_close_matches(wrong, names, 1, 0.6)
    if similar:
        return f"There is no option '{wrong}': did you mean '{similar[0]}'?"
    return f"There is no option '{wrong}'; `lightning fit --help` lists them all."


def _wrong_value(message: str, lines: list[str]) -> str | None:
    """A sentence for a value that is of none of an option's types; None: it is another error."""
    key = re.search(r'Parser key "([\w.]+)"', message)
    value = re.search(r"Given value: (.*)", message)
    reasons = [line for line in lines[lines.index("Errors:") + 1 :] if "Given value" not in line]
    if not key or not value or not all(line.startswith("Expected a ") for line in reasons):
        return None
    kinds = [line.removeprefix("Expected a ") for line in reasons if "NoneType" not in line]
    kinds = [re.sub(r"<class '(\w+)'>|typing\.Literal\[(.*)\]", r"\1\2", kind) for kind in kinds]
    return f"{key[1]} is {value[1]}: give one of {', '.join(kinds)}."


def option_names(callbacks: Iterable[type]) -> set[str]:
    """All names of options: of the trainer, the callbacks, and our stages and DataModules."""
    from lightning.pytorch import LightningDataModule, Trainer

    from unclip_pl.stages.base import Stage

    kinds = {Trainer, *callbacks}
    for base in (Stage, LightningDataModule):
        kinds |= {kind for kind in _subclasses(base) if kind.__module__.startswith("unclip_pl")}
    names = {name for kind in kinds for name in _parameters(kind)}
    return (names | OTHER_NAMES) - {"self", "args", "kwargs"}


def _parameters(kind: type) -> Iterator[str]:
    """The names of a constructor's parameters, and of those of its dataclasses."""
    constructor = kind.__init__  # type: ignore[misc]  # only its signature is read
    types = typing.get_type_hints(kind if dataclasses.is_dataclass(kind) else constructor)
    for name in inspect.signature(constructor).parameters:
        yield name
        if dataclasses.is_dataclass(types.get(name)):
            yield from _parameters(types[name])


def _subclasses(kind: type) -> Iterator[type]:
    """A class and all that derive from it, at any depth."""
    children: list[type] = kind.__subclasses__()
    yield kind
    for child in children:
        yield from _subclasses(child)
