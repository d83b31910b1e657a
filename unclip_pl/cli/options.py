"""Options that several commands of `unclip` have, and what they mean. No torch until one runs."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from unclip_pl.utils.devices import pick_device
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.options import SPACING_HELP, HelpFormatter, override_sampling, seed, spacing
from unclip_pl.utils.remote_copies import local_folder, path_or_url

Run = Callable[[argparse.Namespace], None]
SIZES = (64, 256, 1024)


class AddCommand(Protocol):
    """Adds a command: its name, the function that runs it, its help. Returns its parser."""

    def __call__(self, name: str, run: Run, help: str) -> argparse.ArgumentParser: ...


def command_adder(group: argparse._SubParsersAction) -> AddCommand:
    """An `AddCommand` for a group of subcommands."""

    def add_command(name: str, run: Run, help: str) -> argparse.ArgumentParser:
        parser = group.add_parser(name, help=help, description=help, formatter_class=HelpFormatter)
        parser.set_defaults(run=run)
        return parser

    return add_command


def add_decoder_option(parser: argparse.ArgumentParser) -> None:
    """Which decoder draws: --decoder."""
    parser.add_argument(
        "--decoder",
        type=path_or_url,
        help="a checkpoint or release; by default the one in the package",
    )


def add_output_options(parser: argparse.ArgumentParser, seed_help: str, out_help: str) -> None:
    """From which seed and where to: --seed, --out."""
    parser.add_argument("--seed", type=seed, default=0, help=seed_help)
    parser.add_argument("--out", type=local_folder, default=Path("out"), help=out_help)


def add_size_option(parser: argparse.ArgumentParser) -> None:
    """How large the pictures become: --size."""
    parser.add_argument(
        "--size",
        type=int,
        choices=SIZES,
        default=64,
        help="pixels per side; upsamplers draw the decoder's 64 larger",
    )


def add_upsampler_options(parser: argparse.ArgumentParser, steps: str) -> None:
    """Which upsamplers draw: --upsampler-256, --upsampler-1024.

    `steps` is the name of the option for their sampling steps.
    """
    for source, target in ((64, 256), (256, 1024)):
        parser.add_argument(
            f"--upsampler-{target}",
            type=path_or_url,
            help=f"a checkpoint or release of the upsampler {source} to {target}; by default the "
            "one in the package",
        )
    parser.add_argument(
        steps, type=spacing, help=f"{SPACING_HELP} of each upsampler; by default its own"
    )


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Where and how the networks run; `device_kwargs` reads these."""
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...")
    parser.add_argument(
        "--offload",
        action="store_true",
        help="keep only the stage that works on the device: less memory there, some time for moves",
    )
    parser.add_argument(
        "--precision",
        choices=["fp32", "bf16"],
        default="fp32",
        help="bf16: networks compute in bfloat16, on devices that have it",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="compile the networks (torch.compile): minutes at the first picture, faster on GPUs",
    )
    parser.add_argument(
        "--cuda-graphs",
        action="store_true",
        help="on a GPU, record each denoising step and replay it: for small networks",
    )


def device_kwargs(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of `add_device_options` as arguments of `UnCLIP.load` and `Cascade`.

    Raises:
        UserError: there is no such device, or --offload without another device than the CPU.
    """
    device = pick_device(arguments.device)
    if arguments.offload and device == "cpu":
        raise UserError(
            "--offload lets stages wait in the CPU's memory, and they run on the CPU here: leave "
            "it out, or choose another --device."
        )
    return {
        "device": device,
        "offload": arguments.offload,
        "precision": arguments.precision,
        "compile": arguments.compile,
        "cuda_graphs": arguments.cuda_graphs,
    }


def upsampler_paths(arguments: argparse.Namespace) -> list[str | Path]:
    """The upsamplers that --size needs, as `UnCLIP.load` takes them.

    Raises:
        UserError: an option is for an upsampler that --size does not need.
    """
    paths = {256: arguments.upsampler_256, 1024: arguments.upsampler_1024}
    needed = [size for size in paths if arguments.size >= size]
    unused = {f"--upsampler-{size}": path for size, path in paths.items() if size not in needed}
    if not needed:
        unused["--upsampler-steps"] = arguments.upsampler_steps
    for option, value in unused.items():
        if value is not None:
            raise UserError(
                f"{option} is given, and pictures of {arguments.size} pixels need no such "
                "upsampler: leave it out, or ask for a larger --size."
            )
    return [paths[size] or str(size) for size in needed]


def override_upsampling(
    cascade: Any, arguments: argparse.Namespace, prefix: str = ""
) -> dict[int, Any]:
    """The sampling settings of each upsampler by its target size, changed by the options."""
    options = vars(arguments)
    stages = zip(cascade.sizes, cascade.stages)
    return {size: override_sampling(stage, options, prefix) for size, stage in stages}


def require_minimum(arguments: argparse.Namespace, **minimum: int) -> None:
    """Raise a UserError if an option is below its smallest value: `num_images=1`."""
    for name, value in minimum.items():
        if getattr(arguments, name) < value:
            option = name.replace("_", "-")
            raise UserError(f"--{option} is {getattr(arguments, name)}: give {value} or more.")


def read_file(path: Path, content: str) -> str:
    """The text of the UTF-8 file that --file names; `content` says what is in it: "prompts".

    Raises:
        UserError: the file cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(
            f"The file of {content} {path} cannot be read ({error.strerror}): check --file."
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"The file of {content} {path} is not UTF-8 (byte {error.start}): save it as UTF-8."
        ) from None
