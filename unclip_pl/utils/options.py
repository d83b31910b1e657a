"""Options of commands that `unclip` and `eval` share: one name for one thing. No torch."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

from unclip_pl.utils.errors import UserError

Sampler = Literal["ddpm", "ddim", "dpm_solver_pp"]
SAMPLERS = get_args(Sampler)
SAMPLING_OPTIONS = ("sampler", "steps", "guidance_scale", "eta", "temperature", "top_p")
"""The fields of sampling settings that have an option."""


def whole(value: Any) -> int:
    """An integer, from a word too."""
    try:
        number = int(value)
    except (ValueError, OverflowError):
        number = None
    if number is None or isinstance(value, bool) or (isinstance(value, float) and value != number):
        raise ValueError(f"{value} is no whole number")
    return number


def positive_int(value: Any) -> int:
    """An integer of at least 1."""
    if whole(value) < 1:
        raise ValueError(f"{value} is too small: give 1 or more")
    return int(value)


def seed(value: Any) -> int:
    """A seed that torch's generators take, with room for some more after it."""
    if not 0 <= whole(value) < 1 << 62:
        raise ValueError(f"{value} is no seed: give an integer from 0 to 2^62 - 1")
    return int(value)


def spacing(value: Any) -> int | tuple[int, ...] | str:
    """Sampling steps: a number, numbers for equal sections with commas between them, or a name."""
    try:
        counts = tuple(int(count) for count in str(value).strip("[()]").split(","))
    except ValueError:
        return str(value)
    return counts[0] if len(counts) == 1 else counts


Count = Annotated[int, positive_int]
Seed = Annotated[int, seed]
Spacing = Annotated[int | tuple[int, ...] | str, spacing]


@dataclass(frozen=True)
class StageOptions:
    """Options for the sampling settings of a stage; None: the stage's own."""

    PREFIX: ClassVar[str] = ""

    def of(self, stage: Any, **changes: Any) -> Any:
        """The sampling settings of a stage, with these options and then `changes` in their place.

        Raises:
            UserError: as `override_sampling`.
        """
        options = {self.PREFIX + name: value for name, value in (asdict(self) | changes).items()}
        return override_sampling(stage, options, self.PREFIX)

    def given(self) -> list[str]:
        """The names of the options that are given: "--prior-steps"."""
        names = [name for name, value in asdict(self).items() if value is not None]
        return [f"--{(self.PREFIX + name).replace('_', '-')}" for name in names]

    def among(self, stage: Any, stages: Iterable[Any]) -> Self:
        """The same options without those that only another of several stages has."""
        others = {name for other in stages for name in vars(other.sampling)}
        missing = others - vars(stage.sampling).keys()
        return replace(self, **dict.fromkeys(missing & vars(self).keys()))


@dataclass(frozen=True)
class SamplingOptions(StageOptions):
    """How the decoder samples.

    Args:
        sampler: by default the decoder's own
        steps: sampling steps: a number, 10,10,3,2,2 (numbers for equal sections), fast27 or
            ddim25; by default the decoder's own
        eta: noise of DDIM, 0 to 1
    """

    sampler: Sampler | None = None
    steps: Spacing | None = None
    eta: float | None = None


@dataclass(frozen=True)
class GuidedSamplingOptions(SamplingOptions):
    """How the decoder samples.

    Args:
        guidance_scale: 1: no guidance; by default the decoder's own
    """

    guidance_scale: float | None = None


@dataclass(frozen=True)
class PriorSamplingOptions(StageOptions):
    """How the prior samples.

    Args:
        guidance_scale: 1: no guidance; by default the prior's own
        steps: sampling steps of a diffusion prior, as of --steps; by default its own
        sampler: of a diffusion prior; by default its own
        temperature: of an autoregressive prior: divides its logits; by default its own
        top_p: of an autoregressive prior: share of the likeliest codes drawn from; by default its
            own
    """

    PREFIX: ClassVar[str] = "prior_"
    guidance_scale: float | None = None
    steps: Spacing | None = None
    sampler: Literal["analytic", "ddpm", "ddim", "dpm_solver_pp"] | None = None
    temperature: float | None = None
    top_p: float | None = None


def override_sampling(stage: Any, options: Mapping[str, Any], prefix: str = "") -> Any:
    """The sampling settings of a stage, with what options say in their place.

    Args:
        stage: has its own settings in `sampling`, a dataclass with the checks of single values.
        options: values by name; None: not given. Others are not read.
        prefix: of the names that are read: "prior_" for `prior_steps`, the option --prior-steps.

    Raises:
        UserError: a value is impossible, or the stage has no such setting.
    """
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
