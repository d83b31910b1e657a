"""A command line of `lightning` before it is parsed; no torch."""

import json
from typing import Any


def with_model(arguments: list[str], settings: dict[str, Any]) -> list[str]:
    """The command line with a checkpoint's own model: over the files, under the flags.

    Args:
        arguments: of a subcommand.
        settings: of the checkpoint's stage, as plain values.
    """
    files = [i for i, word in enumerate(arguments) if word in ("-c", "--config")]
    files = [i + 1 for i in files] + [
        i for i, word in enumerate(arguments) if word.startswith("--config=")
    ]
    models = [i + 1 for i, word in enumerate(arguments) if word == "--model"]  # names the class
    at = max([0, *files, *models]) + 1
    flags = [
        word
        for name, value in settings.items()
        if name not in ("optimizer", "sampling")
        for word in (f"--model.{name}", value if isinstance(value, str) else json.dumps(value))
    ]
    return [*arguments[:at], *flags, *arguments[at:]]
