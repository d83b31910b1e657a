"""What the commands of `unclip` share: how one is added, the options of drawing and of devices. No torch until a command runs."""

import argparse
from pathlib import Path
from typing import Any, Protocol

from unclip_pl.utils.devices import pick_device
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.options import (
    SPACING_HELP,
    HelpFormatter,
    add_sampling_options,
    seed,
    spacing,
)


class Command(Protocol):
    """Adds a command: its name, what it runs with the parsed arguments, its help."""

    def __call__(self, name: str, run: object, text: str) -> argparse.ArgumentParser: ...


def command_of(group: argparse._SubParsersAction) -> Command:
    """`command(name, run, text)` for a group of subcommands."""

    def command(name: str, run: object, text: str) -> argparse.ArgumentParser:
        added = group.add_parser(name, help=text, description=text, formatter_class=HelpFormatter)
        added.set_defaults(run=run)
        return added

    return command


def drawing(command: argparse.ArgumentParser, what: str) -> None:
    """The options of every command that draws with a decoder."""
    command.add_argument("--num-images", type=int, default=4, help=what)
    command.add_argument(
        "--decoder", type=Path, help="a checkpoint or release; by default the one in the package"
    )
    add_sampling_options(command)
    command.add_argument("--seed", type=seed, default=0, help="picture k of each uses seed + k")
    command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...")
    command.add_argument("--out", type=Path, default=Path("out"), help="folder for the PNG files")


def upsampling(command: argparse.ArgumentParser, steps: str) -> None:
    """The options of every command that draws with upsamplers; `steps` names that of their sampling steps."""
    command.add_argument(
        "--upsampler-256",
        type=Path,
        help="a checkpoint or release of the upsampler 64 to 256; by default the one in the package",
    )
    command.add_argument(
        "--upsampler-1024",
        type=Path,
        help="a checkpoint or release of the upsampler 256 to 1024; by default the one in the package",
    )
    command.add_argument(
        steps, type=spacing, help=f"{SPACING_HELP} of each upsampler; by default its own"
    )
    command.add_argument(
        "--offload",
        action="store_true",
        help="keep on the device only the stage that works: less of its memory, some time for the moves",
    )
    command.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        default="fp32",
        help="bf16: networks compute in bfloat16, on devices that have it",
    )
    command.add_argument(
        "--compile",
        action="store_true",
        help="compile the networks (torch.compile): minutes at the first picture, faster on GPUs",
    )
    command.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="on a GPU, record each denoising step and replay it: for small networks",
    )


def placement(arguments: argparse.Namespace) -> dict[str, Any]:
    """Where and how the networks run, as `UnCLIP.load` and `Cascade` take it; a sentence where there is nothing to move stages to."""
    device = pick_device(arguments.device)
    if arguments.offload and device == "cpu":
        raise UserError(
            "--offload lets stages wait in the CPU's memory, and they run on the CPU here: leave it out, or choose another --device."
        )
    names = ("offload", "precision", "compile", "cuda_graphs")
    return {"device": device} | {name: getattr(arguments, name) for name in names}
