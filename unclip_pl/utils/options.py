"""Options of commands that `unclip` and `eval` share: one name for one thing. No torch."""

import re
from collections.abc import Callable, Iterable, Mapping
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

    def __post_init__(self) -> None:
        check_sampling(
            {self.PREFIX + name: value for name, value in vars(self).items()}, self.PREFIX
        )

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
    ONLY_OF: ClassVar[dict[str, tuple[str, ...]]] = {
        "diffusion": ("steps", "sampler"),
        "ar": ("temperature", "top_p"),
    }
    """The settings that only one of the package's priors has."""

    def require_prior(self, prior: str | None) -> None:
        """Raise a UserError if a prior of the package, by its name, has no such setting."""
        if prior not in self.ONLY_OF:
            return
        for name, settings in self.ONLY_OF.items():
            for setting in settings:
                if name != prior and getattr(self, setting) is not None:
                    raise UserError(
                        f"{_option(self.PREFIX, setting)} is for the prior {name}, and the prior "
                        f"here is {prior}: leave it out, or choose --prior {name}."
                    )


def check_sampling(options: Mapping[str, Any], prefix: str = "") -> None:
    """Raise a UserError for a value that no stage takes, before any is loaded.

    Args:
        options: see `override_sampling`.
        prefix: see `override_sampling`.
    """
    for name in SAMPLING_OPTIONS:
        value, rule = options.get(prefix + name), _RULES.get(name)
        if value is not None and rule is not None and not rule[0](value):
            raise UserError(f"{_option(prefix, name)} is {value}: give {rule[1]}.")
    sampler = options.get(prefix + "sampler")
    if options.get(prefix + "eta") and sampler is not None:
        _require_ddim(prefix, sampler)


def _is_spacing(steps: Any) -> bool:
    if isinstance(steps, str):
        return re.fullmatch(r"fast27|ddim0*[1-9]\d*", steps) is not None
    counts = steps if isinstance(steps, tuple | list) else [steps]
    return min(counts, default=0) >= 1


# A decoder's own settings allow a guidance scale below 1, for only its null branch; no option does.
_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "steps": (
        _is_spacing,
        "a number of 1 or more, numbers with commas between them (10,10,3,2,2), fast27, or ddim "
        "and a number (ddim25)",
    ),
    "guidance_scale": (lambda x: 1 <= x < float("inf"), "1 (no guidance) or more"),
    "eta": (lambda x: 0 <= x <= 1, "0 (deterministic) to 1 (as much noise as DDPM)"),
    "temperature": (lambda x: 0 <= x < float("inf"), "0 (the most probable code) or more"),
    "top_p": (lambda x: 0 < x <= 1, "a share above 0 and up to 1"),
}
"""What a value must be whatever the stage, and how an error says so."""


def _option(prefix: str, name: str) -> str:
    return f"--{(prefix + name).replace('_', '-')}"


def _require_ddim(prefix: str, sampler: str) -> None:
    if sampler != "ddim":
        eta = _option(prefix, "eta")
        raise UserError(
            f"{eta} is for the sampler ddim, and this stage's is {sampler}: add "
            f"{_option(prefix, 'sampler')} ddim, or leave {eta} out."
        )


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
    check_sampling(options, prefix)
    for name in values:
        if not hasattr(stage.sampling, name):
            own = [_option(prefix, one) for one in SAMPLING_OPTIONS if hasattr(stage.sampling, one)]
            raise UserError(
                f"{_option(prefix, name)} is no setting of the {type(stage).__name__} here, which "
                f"has {', '.join(own)}: leave it out."
            )
    if "steps" in values:
        try:
            stage.process.schedule.respaced(values["steps"])
        except ValueError as error:
            steps = _option(prefix, "steps")
            raise UserError(f"{steps} is {values['steps']}, and {error}.") from None
    if values.get("eta"):
        _require_ddim(prefix, values.get("sampler", stage.sampling.sampler))
    try:
        return replace(stage.sampling, **values)
    except ValueError as error:
        raise UserError(str(error)) from None
