"""jsonargparse's error messages as one sentence, with the option that was probably meant."""

import difflib
import re
from collections.abc import Collection

UNKNOWN_OPTION = re.compile(
    r"unrecognized arguments: --([\w.-]+)"
    r"|(?:option|Option|Key|key) '([\w.]+)'(?: is not (?:accepted|expected)|$)"
)
KEY = re.compile(r'Parser key "([\w.]+)"(?: element \d+)?:\s*')
EXPECTED = re.compile(r"Expected an? (.*)\. Got value: (.*)")
REFUSED = re.compile(r"Not of type \w+: (.*)")
NO_LIST = re.compile("object (does not support item assignment|is not iterable)")
TYPES = {
    "<class 'int'>": "a whole number",
    "<class 'float'>": "a number",
    "<class 'str'>": "a text",
}


def to_sentence(message: str, names: Collection[str] = (), help: str = "") -> str:
    """Shorten a message of several lines to one sentence.

    For an unknown option it names the most similar one that exists. One that exists elsewhere has
    no place here.

    Args:
        message: the message of an error.
        names: all options, without the dashes before them.
        help: the command that shows them.
    """
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    if "Errors:" in lines:  # reasons why each type of a Union does not fit
        if sentence := _wrong_union(message, lines):
            return sentence
        lines = list(dict.fromkeys(lines[lines.index("Errors:") + 1 :]))
        # what its other types would be says nothing to those who meant this one
        lines = [line for line in lines if not line.startswith("Expected a <class")] or lines
    noise = lambda line: "NoneType" in line or line.startswith("Given value")  # noqa: E731
    short = " ".join(line for line in lines if line and not noise(line))
    unknown = UNKNOWN_OPTION.search(short)
    if short.startswith("the following arguments are required: "):
        missing = short.partition(": ")[2].split(", ")
        missing = [f"--{name}" if name.replace("_", "-") in names else name for name in missing]
        return f"Missing: {', '.join(missing).replace('_', '-')}; `{help}` says what they are."
    if NO_LIST.search(short):
        return "A list in the file of --config is one value there: write it in brackets, as [a, b]."
    if short.startswith("Unexpected config"):
        return "The file of --config holds no options: write some, one NAME: VALUE per line."
    if unknown is None:
        return _wrong_value(short, names) or short or message
    path = (unknown[1] or unknown[2]).split(".")
    wrong = next((name for name in path if name not in names), None)
    if wrong is None:
        return (
            f"There is no option '{'.'.join(path)}' here: '{path[-1]}' is of another group, stage "
            "or command, so name its group, or leave it out."
        )
    similar = difflib.get_close_matches(wrong, names, 1, 0.6)
    if similar:
        return f"There is no option '{wrong}': did you mean '{similar[0]}'?"
    return f"There is no option '{wrong}'; `{help}` lists them all."


def _wrong_value(message: str, names: Collection[str]) -> str | None:
    """A sentence for a value that is not of an option's type; None: it is another error."""
    if not (found := KEY.match(message)):
        return None
    reason = message[found.end() :]
    key = found[1].replace("_", "-")
    key = f"--{key}" if key in names else found[1]
    if not reason:
        return f"{key} is null: give a value."
    if key == "--config":
        return f"--config: {reason}"
    if refused := REFUSED.fullmatch(reason):
        return f"{key}: {refused[1]}."
    if expected := EXPECTED.fullmatch(reason):
        kind = TYPES.get(expected[1], expected[1])
        kind = "a finite number" if expected[2].lstrip("-+") in ("nan", "inf") else kind
        kind = re.sub(r"typing\.Literal\[(.*)\]", r"one of \1", kind).replace("'", "")
        return f"{key} is {expected[2]}: give {kind}."
    return None


def _wrong_union(message: str, lines: list[str]) -> str | None:
    """A sentence for a value that is of none of an option's types; None: it is another error."""
    key = KEY.search(message)
    value = re.search(r"Given value: (.*)", message)
    reasons = [line for line in lines[lines.index("Errors:") + 1 :] if "Given value" not in line]
    if not key or not value or not all(line.startswith("Expected a ") for line in reasons):
        return None
    kinds = [line.removeprefix("Expected a ") for line in reasons if "NoneType" not in line]
    kinds = [re.sub(r"<class '(\w+)'>|typing\.Literal\[(.*)\]", r"\1\2", kind) for kind in kinds]
    return f"{key[1]} is {value[1]}: give one of {', '.join(kinds)}."
