"""Commands from typed functions: the parser of `lightning`, `unclip` and `eval`. No torch.

A parameter of a function becomes an option, with its type, its default and its help from the
docstring; parameters before the `*` become words without a name. A parameter whose type is a
dataclass stands for the options of its fields, which the dataclass checks in `__post_init__`.
"""

import argparse
import dataclasses
import functools
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Annotated, Any, NoReturn, Union, get_args, get_origin, get_type_hints

import docstring_parser
import jsonargparse
import yaml
from jsonargparse.typing import register_type

from unclip_pl.utils import interrupts
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.messages import to_sentence

Command = Callable[..., Any]
# A word that is not Unicode, such as a folder's name, is no YAML: the parser takes it as it is.
jsonargparse.set_loader(
    "yaml", jsonargparse.get_loader("yaml"), (yaml.YAMLError, UnicodeEncodeError)
)


class UsageError(UserError):
    """The words of a command line do not fit its options."""


@dataclasses.dataclass(frozen=True)
class Option:
    """What a type does not say of an option: `Annotated[int, Option(renamed="--bootstrap")]`.

    Args:
        alias: a second name.
        renamed: an old name; the command ends with a sentence that says the new one.
        may_be_empty: of a list: its option may be given without a value.
        repeat: of a list: its option takes one value and may be given several times.
    """

    alias: str | None = None
    renamed: str | None = None
    may_be_empty: bool = False
    repeat: bool = False


class HelpFormatter(argparse.HelpFormatter):
    """Names defaults, except those for which the help says what happens."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        default = action.default
        words = default if isinstance(default, list) else [default]
        if not words or any(default is value for value in (None, False, argparse.SUPPRESS)):
            return action.help
        return f"{action.help} (default: {' '.join(map(str, words))})"


class _Renamed(argparse.Action):
    """Ends the command with a sentence that says the new name."""

    def __call__(self, *_: object) -> None:
        raise UsageError(f"{self.option_strings[0]} is now called {self.const}: use that name.")


class Parser(jsonargparse.ArgumentParser):
    """Errors are a `UsageError` of one sentence, and options cannot be abbreviated.

    An abbreviation would take a typo that is the start of an option for that option.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, allow_abbrev=False)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UsageError(to_sentence(message, self.option_names(), self.help_command)) from ex

    @property
    def help_command(self) -> str:
        """The command that shows all options."""
        return f"{self.prog} --help"

    def option_names(self) -> set[str]:
        """The names of all options, without the dashes before them."""
        return {name[2:] for name in self._option_string_actions if name.startswith("--")}


class CommandParser(Parser):
    """The command line of a function.

    Words that are no options of a function with `*flags` are collected there.

    Args:
        command: the function. Its docstring has the help of its parameters, and may have that of
            fields of its dataclasses, in place of their own.
        prog: how the command is called, for messages.
    """

    def __init__(self, command: Command, prog: str) -> None:
        super().__init__(prog=prog, description=summary(command), formatter_class=HelpFormatter)
        self.command = command
        self.takes_flags = False
        self.flags: list[str] = []
        self._add_parameters(self, command, {}, None)
        if not self.takes_flags and "config" not in inspect.signature(command).parameters:
            self.add_argument("--config", action="config", help="a YAML file of these options")

    def _add_parameters(self, group: Any, kind: Any, help: Mapping[str, str], own: Any) -> None:
        """Add options for the parameters of a function or dataclass.

        Args:
            group: of the parser, that gets the options.
            kind: the function or dataclass.
            help: of options, in place of what the docstring says.
            own: an instance of the dataclass with other defaults.
        """
        prefix = getattr(kind, "PREFIX", "")
        help = {prefix + name: text for name, text in read_help(kind).items()} | dict(help)
        for parameter, hint in parameters(kind):
            if parameter.kind is parameter.VAR_POSITIONAL:
                self.takes_flags = True
            elif isinstance(hint, type) and dataclasses.is_dataclass(hint):
                title = (summary(hint) or "").rstrip(".")
                defaults = getattr(own, parameter.name, parameter.default)
                self._add_parameters(self.add_argument_group(title), hint, help, defaults)
            else:
                name = prefix + parameter.name
                default = getattr(own, parameter.name, parameter.default)
                text = help.get(name, "").replace("%", "%%")
                if kind is self.command and parameter.kind is not parameter.KEYWORD_ONLY:
                    self._add_positional(name, hint, default, text)
                else:
                    self._add_option(group, name, hint, default, text)

    def _add_positional(self, name: str, hint: Any, default: Any, help: str) -> None:
        kwargs = keywords(hint)
        many = "nargs" in kwargs
        if default is not inspect.Parameter.empty:
            kwargs |= {"nargs": "*" if many else "?", "default": argparse.SUPPRESS}
        metavar = name.upper().removesuffix("S") if many else name.upper()
        self.add_argument(name, metavar=metavar, help=help, **kwargs)

    def _add_option(self, group: Any, name: str, hint: Any, default: Any, help: str) -> None:
        kwargs, strings = keywords(hint), [option_string(name)]
        for extra in get_args(hint)[1:] if get_origin(hint) is Annotated else ():
            if isinstance(extra, Option) and extra.alias:
                strings.append(extra.alias)
            if isinstance(extra, Option) and extra.renamed:
                action = {"action": _Renamed, "const": strings[0], "nargs": "*"}
                hidden = {"help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
                group.add_argument(extra.renamed, **action, **hidden)
            if isinstance(extra, Option) and extra.may_be_empty:
                kwargs["nargs"] = "*"
            if isinstance(extra, Option) and extra.repeat:
                kwargs["action"] = "append"
                del kwargs["nargs"]
        if default is inspect.Parameter.empty:
            kwargs["required"] = True
        else:  # jsonargparse has lists
            kwargs["default"] = list(default) if isinstance(default, tuple) else default
        group.add_argument(*strings, dest=name.rstrip("_"), help=help, **kwargs)

    def _parse_known_args(self, *args: Any, **kwargs: Any) -> tuple[Any, list[str]]:
        config, unknown = super()._parse_known_args(*args, **kwargs)
        if self.takes_flags:
            self.flags, unknown = unknown, []
        return config, unknown

    def bind(self, words: Sequence[str] | None = None) -> functools.partial:
        """The function with the arguments that the words say; by default those of the process.

        Raises:
            UsageError: the words do not fit the options.
            UserError: a dataclass refuses a value.
        """
        words = list(sys.argv[1:] if words is None else words)
        if not self.takes_flags:  # there, --config is a flag for another command
            words = files_first(words)
        try:
            config = self.parse_args(words)
        except UnicodeDecodeError as error:
            raise UsageError(
                f"The file of --config is not UTF-8 (byte {error.start}): save it as UTF-8."
            ) from None
        try:
            positional, named = self._build(self.command, config)
        except ValueError as error:
            raise UserError(str(error)) from None
        self._require_flags_last(words, positional)
        return functools.partial(self.command, *positional, *self.flags, **named)

    def _require_flags_last(self, words: Sequence[str], positional: Sequence[Any]) -> None:
        """UsageError for a flag before the words of the command: its value would be one of them."""
        for value in positional:
            before = words[: words.index(value)] if value in words else ()
            flags = {flag for flag in self.flags if flag.startswith("-")}
            if flag := next((word for word in before if word in flags), None):
                raise UsageError(f"{flag} stands before {value}: give flags after the other words.")

    def _build(self, kind: Any, config: Any) -> tuple[list[Any], dict[str, Any]]:
        """The positional and named arguments of a function or dataclass."""
        prefix = getattr(kind, "PREFIX", "")
        positional, named = [], {}
        for parameter, hint in parameters(kind):
            if parameter.kind is parameter.VAR_POSITIONAL:
                continue
            if isinstance(hint, type) and dataclasses.is_dataclass(hint):
                words, options = self._build(hint, config)
                value: Any = hint(*words, **options)
            else:
                value = config.get((prefix + parameter.name).rstrip("_"), parameter.default)
                check_value(prefix + parameter.name, value, parameter.default, hint)
                value = tuple(value) if isinstance(value, list) else value
            if parameter.kind is parameter.KEYWORD_ONLY:
                named[parameter.name] = value
            else:
                positional.append(value)
        return positional, named


def files_first(words: Sequence[str]) -> list[str]:
    """The words with files of options first, so that what is said next to them wins."""
    before: list[str] = []
    words = list(words)
    end = words.index("--") if "--" in words else len(words)
    for k in reversed(range(end)):
        if words[k].startswith("--config="):
            before[:0] = [words.pop(k)]
        elif words[k] == "--config" and k + 1 < end:
            before[:0] = [words.pop(k), words.pop(k)]
    return before + words


def check_value(name: str, value: Any, default: Any, hint: Any) -> None:
    """UsageError for what the parser lets a file say: null, or a switch that is not true or false.

    Args:
        name: of the option.
        value: of the option.
        default: of the option.
        hint: its type.
    """
    may_be_null = default is None or types.NoneType in get_args(hint)
    if value is None and not may_be_null:
        raise UsageError(f"{option_string(name)} is null: give a value.")
    if hint is bool and not isinstance(value, bool):
        raise UsageError(f"{option_string(name)} is {value}: write true or false.")


def option_string(name: str) -> str:
    """ "--num-images" for the parameter `num_images`, "--from" for `from_`."""
    return f"--{name.rstrip('_').replace('_', '-')}"


def parameters(kind: Command) -> Iterator[tuple[inspect.Parameter, Any]]:
    """The parameters of a function or dataclass and their types."""
    hints = get_type_hints(kind, include_extras=True)
    for parameter in inspect.signature(kind).parameters.values():
        yield parameter, hints[parameter.name]


def summary(kind: Command) -> str:
    """What a function or dataclass does or is, in the words of its docstring."""
    doc = docstring_parser.parse(inspect.getdoc(kind) or "")
    return " ".join((doc.description or "").split())


def read_help(kind: Command) -> dict[str, str]:
    """The help of each parameter, from the docstring; a dataclass has that of its bases too."""
    texts: dict[str, str] = {}
    for base in reversed(getattr(kind, "__mro__", (kind,))):
        for param in docstring_parser.parse(inspect.getdoc(base) or "").params:
            for name in param.arg_name.split(", "):
                texts[name] = " ".join((param.description or "").split())
    return texts


def keywords(hint: Any) -> dict[str, Any]:
    """The arguments of `add_argument` for a type."""
    if get_origin(hint) in (Union, types.UnionType):
        members = [member for member in get_args(hint) if member is not types.NoneType]
        hint = Union[tuple(members)]  # noqa: UP007  of one member: that one itself
    if get_origin(hint) is Annotated:
        hint, *extras = get_args(hint)
        parse = next((extra for extra in extras if not isinstance(extra, Option)), None)
        return {"type": _registered(parse)} if parse else keywords(hint)
    if hint is bool:
        return {"action": "store_true"}
    if get_origin(hint) is Sequence:
        return {**keywords(get_args(hint)[0]), "nargs": "+"}
    return {"type": hint}


@functools.cache
def _registered(parse: Callable[[Any], Any]) -> type:
    """A type of jsonargparse for the values that a function makes of words."""
    kind = type(parse.__name__, (), {})

    def serialize(value: Any) -> Any:
        if isinstance(value, tuple):
            return list(value)
        return value if isinstance(value, int) else str(value)

    register_type(kind, serialize, parse, type_check=lambda value, kind: False)
    return kind


def exit_code(prog: str, run: Callable[[], object]) -> int:
    """Run a command; an error is one sentence on stderr.

    Returns:
        0; 2 where words do not fit the options, 1 for all else that the user can mend, 130 after
        Ctrl-C.
    """
    try:
        with interrupts.watched():
            run()
    except KeyboardInterrupt:
        return interrupts.report(prog)
    except UserError as error:
        print(f"{prog}: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    except OSError as error:
        file, reason = error.filename or "A file", error.strerror or error
        print(
            f"{prog}: {file} cannot be used ({reason}): check the path and the rights to it.",
            file=sys.stderr,
        )
        return 1
    return 0
