"""Which device a command works on."""

import sys

from unclip_pl.utils.errors import UserError

KINDS = ("auto", "cpu", "cuda", "mps", "xpu")


def require_kind(name: str) -> None:
    """Raise a UserError for a name that is no device's on any machine. No torch."""
    if name.partition(":")[0] not in KINDS:
        raise UserError(
            f"There is no device {name}: choose another with --device, one of {', '.join(KINDS)} "
            "(cuda:1: the second GPU)."
        )


def pick_device(name: str = "auto") -> str:
    """The device of a name, as torch writes it.

    Args:
        name: "cpu", "cuda", "cuda:1", "mps" ...; "auto" is a GPU where there is one, else the CPU.

    Raises:
        UserError: this machine has no such device.
    """
    require_kind(name)
    import torch

    if name != "auto":
        try:
            torch.empty(1, device=name)
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"There is no device {name} here ({reason}): choose another with --device."
            ) from None
        return name
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def announce_compiling(device: str) -> None:
    """Say on stderr that a CPU compiles for minutes, in which nothing else is seen."""
    if device == "cpu":
        print(
            "The networks are compiled at their first use (--compile), for minutes on a CPU.",
            file=sys.stderr,
        )
