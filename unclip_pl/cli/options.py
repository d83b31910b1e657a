"""What the commands of `unclip` share: how one is added, the options of drawing and of devices. No torch until a command runs."""

import argparse
from pathlib import Path
from typing import Any, Protocol

from unclip_pl.utils.errors import UserError

SPACING = "sampling steps: a number, 10,10,3,2,2 (numbers for equal sections), fast27 or ddim25"
"""Help of the options of type `spacing`."""


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Names defaults, except those that are None: their help says what happens."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return (
            action.help
            if action.default is None or action.default == []
            else super()._get_help_string(action)
        )


class Command(Protocol):
    """Adds a command: its name, what it runs with the parsed arguments, its help."""

    def __call__(self, name: str, run: object, text: str) -> argparse.ArgumentParser: ...


def command_of(group: argparse._SubParsersAction) -> Command:
    """`command(name, run, text)` for a group of subcommands."""

    def command(name: str, run: object, text: str) -> argparse.ArgumentParser:
        added = group.add_parser(name, help=text, description=text, formatter_class=Help)
        added.set_defaults(run=run)
        return added

    return command


def seed(text: str) -> int:
    """A seed that torch's generators take, with room for some more after it."""
    value = int(text)
    if not 0 <= value < 1 << 62:
        raise argparse.ArgumentTypeError(f"{value} is no seed: give an integer from 0 to 2^62 - 1")
    return value


def spacing(text: str) -> int | tuple[int, ...] | str:
    """Sampling steps: a number, numbers for equal sections with commas between them, or a name."""
    try:
        counts = tuple(int(count) for count in text.strip("[]").split(","))
    except ValueError:
        return text
    return counts[0] if len(counts) == 1 else counts


def drawing(command: argparse.ArgumentParser, what: str) -> None:
    """The options of every command that draws with a decoder."""
    command.add_argument("--num-images", type=int, default=4, help=what)
    command.add_argument(
        "--decoder", type=Path, help="a checkpoint or release; by default the one in the package"
    )
    command.add_argument(
        "--sampler", choices=["ddpm", "ddim", "dpm_solver_pp"], help="by default the decoder's own"
    )
    command.add_argument("--steps", type=spacing, help=f"{SPACING}; by default the decoder's own")
    command.add_argument(
        "--guidance-scale", type=float, help="1: no guidance; by default the decoder's own"
    )
    command.add_argument("--eta", type=float, help="noise of DDIM, 0 to 1")
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
        steps, type=spacing, help=f"{SPACING} of each upsampler; by default its own"
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


def chosen(arguments: argparse.Namespace, stage: Any, prefix: str = "") -> Any:
    """A stage's sampling settings with what the options say otherwise; one sentence where a value is impossible or not this stage's."""
    from dataclasses import replace

    own = stage.sampling
    options = {
        name: getattr(arguments, prefix + name, None)
        for name in ("sampler", "steps", "guidance_scale", "eta", "temperature", "top_p")
    }
    given = {name: value for name, value in options.items() if value is not None}
    unknown = [f"--{(prefix + name).replace('_', '-')}" for name in given if not hasattr(own, name)]
    if unknown:
        raise UserError(f"{unknown[0]} is no setting of this stage: leave it out.")
    if "steps" in given:
        try:
            stage.process.schedule.respaced(given["steps"])
        except ValueError as error:
            option = f"--{prefix.replace('_', '-')}steps"
            raise UserError(f"{option} is {given['steps']}, and {error}.") from None
    if given.get("eta") and given.get("sampler", own.sampler) != "ddim":
        raise UserError(
            f"--eta is for the sampler ddim, and the decoder's is {given.get('sampler', own.sampler)}: add --sampler ddim, or leave --eta out."
        )
    if not 1 <= given.get("guidance_scale", 1) < float("inf"):
        raise UserError(
            f"--{prefix.replace('_', '-')}guidance-scale is {given['guidance_scale']}: give 1 (no guidance) or more."
        )
    try:
        return replace(own, **given)
    except ValueError as error:
        raise UserError(str(error)) from None


def pick_device(name: str) -> str:
    """ "auto" is a GPU where there is one, else the CPU; one sentence where the device that is named is not there."""
    import torch

    if name != "auto":
        try:
            torch.empty(1, device=name)
        except (RuntimeError, AssertionError) as error:
            raise UserError(
                f"There is no device {name} here ({str(error).splitlines()[0]}): choose another with --device."
            ) from None
        return name
    return (
        "cuda"
        if torch.cuda.is_available()
        else "mps"
        if torch.backends.mps.is_available()
        else "cpu"
    )
