"""Options that several commands of `unclip` have, and what they mean. No torch until one runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from unclip_pl.utils.devices import announce_compiling, pick_device, require_kind
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.options import Spacing, check_sampling, override_sampling
from unclip_pl.utils.outputs import OutputFolder
from unclip_pl.utils.remote_copies import local_folder

Folder = Annotated[Path, local_folder]
"""A folder to write into."""


@dataclass(frozen=True)
class OutputOptions:
    """Where the pictures go.

    Args:
        out: folder for the PNG files; what lies there already is kept, and new pictures of the same
            name get a number
        overwrite: replace files of the same name in --out instead
    """

    out: Folder = Path("out")
    overwrite: bool = False

    def open(self) -> OutputFolder:
        """The folder; a UserError if nothing can be written there."""
        return OutputFolder(self.out, self.overwrite)


@dataclass(frozen=True)
class DeviceOptions:
    """Where and how the networks run.

    Args:
        device: cpu, cuda, cuda:1 ...
        offload: keep only the stage that works on the device: less memory there, some time for
            moves
        precision: bf16: networks compute in bfloat16, on devices that have it
        compile: compile the networks (torch.compile): minutes at the first picture, meant for GPUs
        cuda_graphs: on a GPU, record each denoising step and replay it: for small networks
    """

    device: str = "auto"
    offload: bool = False
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    cuda_graphs: bool = False

    def __post_init__(self) -> None:
        require_kind(self.device)

    def kwargs(self) -> dict[str, Any]:
        """The arguments of `UnCLIP.load` and `Cascade`.

        Raises:
            UserError: there is no such device, or --offload without another device than the CPU.
        """
        device = pick_device(self.device)
        if self.offload and device == "cpu":
            raise UserError(
                "--offload lets stages wait in the CPU's memory, and they run on the CPU here: "
                "leave it out, or choose another --device."
            )
        if self.compile:
            announce_compiling(device)
        return {
            "device": device,
            "offload": self.offload,
            "precision": self.precision,
            "compile": self.compile,
            "cuda_graphs": self.cuda_graphs,
        }


@dataclass(frozen=True)
class UpsamplerOptions:
    """How large the pictures become.

    Args:
        size: pixels per side; upsamplers draw the decoder's 64 larger
        upsampler_256: a checkpoint or release of the upsampler 64 to 256; by default the one in
            the package
        upsampler_1024: a checkpoint or release of the upsampler 256 to 1024; by default the one in
            the package
        upsampler_steps: sampling steps of each upsampler, as of --steps; by default its own
    """

    size: Literal[64, 256, 1024] = 64
    upsampler_256: str | None = None
    upsampler_1024: str | None = None
    upsampler_steps: Spacing | None = None

    def __post_init__(self) -> None:
        unused = {
            "--upsampler-256": self.upsampler_256 if self.size < 256 else None,
            "--upsampler-1024": self.upsampler_1024 if self.size < 1024 else None,
            "--upsampler-steps": self.upsampler_steps if self.size == 64 else None,
        }
        for option, value in unused.items():
            if value is not None:
                raise UserError(
                    f"{option} is given, and pictures of {self.size} pixels need no such "
                    "upsampler: leave it out, or ask for a larger --size."
                )
        check_sampling(vars(self), "upsampler_")

    @property
    def paths(self) -> list[str]:
        """The upsamplers that --size needs, as `UnCLIP.load` takes them."""
        paths = {256: self.upsampler_256, 1024: self.upsampler_1024}
        return [path or str(size) for size, path in paths.items() if self.size >= size]

    def sampling(self, cascade: Any) -> dict[int, Any]:
        """The sampling settings of each upsampler by its target size, changed by the options."""
        return {size: self.sampling_of(stage) for size, stage in zip(cascade.sizes, cascade.stages)}

    def sampling_of(self, stage: Any) -> Any:
        """The sampling settings of an upsampler, changed by the options."""
        return override_sampling(stage, {"upsampler_steps": self.upsampler_steps}, "upsampler_")


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
