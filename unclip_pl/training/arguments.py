"""Edit a command line of `lightning` before it is parsed; no torch."""

import json
from typing import Any


def add_model_flags(arguments: list[str], settings: dict[str, Any]) -> list[str]:
    """Add a checkpoint's model settings to a command line.

    They override configuration files and are overridden by the user's flags. The optimiser and the
    sampling are left out.

    Args:
        arguments: of a subcommand.
        settings: hyperparameters of the checkpoint's stage, as plain values.
    """
    position = 0
    for i, word in enumerate(arguments):
        # "--model" names the class; flags of the model come after it.
        if word in ("-c", "--config", "--model"):
            position = max(position, i + 2)
        elif word.startswith("--config="):
            position = max(position, i + 1)
    position = max(1, position)
    flags = []
    for name, value in settings.items():
        if name not in ("optimizer", "sampling"):
            text = value if isinstance(value, str) else json.dumps(value)
            flags += [f"--model.{name}", text]
    return [*arguments[:position], *flags, *arguments[position:]]
