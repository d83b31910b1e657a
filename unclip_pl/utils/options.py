"""Options of command lines that `unclip` and `eval` share: one name for one thing. No torch."""

import argparse
from collections.abc import Mapping
from typing import Any

from unclip_pl.utils.errors import UserError

SAMPLERS = ("ddpm", "ddim", "dpm_solver_pp")
SPACING_HELP = (
    "sampling steps: a number, 10,10,3,2,2 (numbers for equal sections), fast27 or ddim25"
)
"""Help of the options of type `spacing`."""
SAMPLING_OPTIONS = ("sampler", "steps", "guidance_scale", "eta", "temperature", "top_p")
"""The fields of sampling settings that have an option."""


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Names defaults, except None and empty lists, for which the help says what happens."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.default == []:
            return action.help
        return super()._get_help_string(action)


class _Renamed(argparse.Action):
    """Ends the command with a sentence that says the new name."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        parser.error(f"{option_string} is now called {self.const}: use that name.")


def add_renamed(parser: argparse.ArgumentParser, old: str, new: str) -> None:
    """An option's old name, which only says the new one."""
    parser.add_argument(
        old,
        action=_Renamed,
        const=new,
        nargs="*",
        help=argparse.SUPPRESS,
        default=argparse.SUPPRESS,
    )


def positive_int(text: str) -> int:
    """An integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is too small: give 1 or more")
    return value


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


def add_sampling_options(parser: argparse.ArgumentParser, guidance: bool = True) -> None:
    """How the decoder samples: --sampler, --steps, --eta and with `guidance` --guidance-scale."""
    parser.add_argument("--sampler", choices=SAMPLERS, help="by default the decoder's own")
    parser.add_argument(
        "--steps", type=spacing, help=f"{SPACING_HELP}; by default the decoder's own"
    )
    parser.add_argument("--eta", type=float, help="noise of DDIM, 0 to 1")
    if guidance:
        parser.add_argument(
            "--guidance-scale", type=float, help="1: no guidance; by default the decoder's own"
        )


def add_prior_option(parser: argparse.ArgumentParser) -> None:
    """Which prior draws the image embeddings: --prior."""
    parser.add_argument(
        "--prior",
        help='"diffusion" (the default) or "ar", those in the package; or a checkpoint or release',
    )


def add_prior_sampling_options(parser: argparse.ArgumentParser, own: str = "its own") -> None:
    """Add the options for how a prior samples.

    --prior-guidance-scale, --prior-steps, --prior-sampler, --prior-temperature, --prior-top-p.

    Args:
        parser: the options are added to it.
        own: what guidance scale, temperature and top-p are by default, for the help.
    """
    parser.add_argument(
        "--prior-guidance-scale",
        type=float,
        help=f"of a prior: 1 is no guidance; by default {own}",
    )
    parser.add_argument(
        "--prior-steps",
        type=spacing,
        help=f"{SPACING_HELP} of a diffusion prior; by default its own",
    )
    parser.add_argument(
        "--prior-sampler",
        choices=["analytic", *SAMPLERS],
        help="of a diffusion prior; by default its own",
    )
    parser.add_argument(
        "--prior-temperature",
        type=float,
        help=f"of an autoregressive prior: divides its logits; by default {own}",
    )
    parser.add_argument(
        "--prior-top-p",
        type=float,
        help="of an autoregressive prior: share of the likeliest codes drawn from; "
        f"by default {own}",
    )


def override_sampling(stage: Any, options: Mapping[str, Any], prefix: str = "") -> Any:
    """The sampling settings of a stage, with what options say in their place.

    Args:
        stage: has its own settings in `sampling`, a dataclass with the checks of single values.
        options: values by name, such as `vars(arguments)`; None: not given. Others are not read.
        prefix: of the names that are read: "prior_" for `prior_steps`, the option --prior-steps.

    Raises:
        UserError: a value is impossible, or the stage has no such setting.
    """
    from dataclasses import replace

    named = {name: options.get(prefix + name) for name in SAMPLING_OPTIONS}
    values = {name: value for name, value in named.items() if value is not None}

    def option(name: str) -> str:
        return f"--{(prefix + name).replace('_', '-')}"

    for name in values:
        if not hasattr(stage.sampling, name):
            raise UserError(f"{option(name)} is no setting of this stage: leave it out.")
    if "steps" in values:
        try:
            stage.process.schedule.respaced(values["steps"])
        except ValueError as error:
            raise UserError(f"{option('steps')} is {values['steps']}, and {error}.") from None
    if values.get("eta"):
        sampler = values.get("sampler", stage.sampling.sampler)
        if sampler != "ddim":
            raise UserError(
                f"{option('eta')} is for the sampler ddim, and this stage's is {sampler}: add "
                f"{option('sampler')} ddim, or leave {option('eta')} out."
            )
    # A decoder's own settings allow less than 1, for only its null branch; no option does.
    if not 1 <= values.get("guidance_scale", 1) < float("inf"):
        raise UserError(
            f"{option('guidance_scale')} is {values['guidance_scale']}: give 1 (no guidance) or "
            "more."
        )
    try:
        return replace(stage.sampling, **values)
    except ValueError as error:
        raise UserError(str(error)) from None
