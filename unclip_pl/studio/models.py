"""The networks of a studio: one decoder, its CLIP and upsamplers, and all priors that serve it.

All that the studio calls in the pipeline is called here and in `drawing.py`.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from unclip_pl.pipeline.devices import accelerate_stages
from unclip_pl.pipeline.unclip import Prior, UnCLIP
from unclip_pl.pipeline.weights import DEFAULT_DECODER, DEFAULT_PRIORS, load_stage
from unclip_pl.probe import PrincipalComponents, principal_components
from unclip_pl.stages.ar_prior import ARPrior
from unclip_pl.stages.diffusion_prior import DiffusionPrior
from unclip_pl.studio.requests import (
    Create,
    Drawing,
    Inpaint,
    PriorSettings,
    Request,
    Upsample,
    Vary,
)
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.options import override_sampling

MOST_PIXELS = 16 * 2**20
"""Of all pictures of one request together."""
WITHOUT_PRIOR = ("text", "none")


class Models:
    """What a studio draws with; the priors share decoder, CLIP and upsamplers.

    Args:
        unclip: the decoder with its CLIP and upsamplers; a prior in it counts as one of `priors`.
        priors: by the name under which they are asked for.
        store: the embedding store whose principal components are shown; None: OpenMoji's.
    """

    def __init__(
        self,
        unclip: UnCLIP,
        priors: Mapping[str, Prior] | None = None,
        store: str | os.PathLike | None = None,
    ) -> None:
        self.plain = unclip
        self.store = None if store is None else Path(store)
        self.with_prior = {
            name: UnCLIP(
                unclip.decoder,
                prior,
                unclip.clip,
                str(unclip.device),
                unclip.cascade.stages,
                unclip.offload,
                unclip.precision,  # type: ignore[arg-type]  # as it was given
            )
            for name, prior in (priors or {}).items()
        }

    @classmethod
    def load(
        cls,
        decoder: str | os.PathLike | None = None,
        prior: str | os.PathLike | None = None,
        upsamplers: Sequence[str | os.PathLike] = (),
        store: str | os.PathLike | None = None,
        compile: bool = False,
        cuda_graphs: bool = False,
        **placement: Any,
    ) -> "Models":
        """Load releases or checkpoints, by default those in the package.

        Args:
            decoder: a release or a checkpoint; None: the decoder in the package.
            prior: "diffusion", "ar", a release or a checkpoint; None: both in the package, unless
                the decoder was trained on text embeddings and needs none.
            upsamplers: releases or checkpoints, or "256" and "1024" for those in the package.
            store: the embedding store whose principal components are shown; None: OpenMoji's.
            compile: compile the stages' blocks; see `UnCLIP.accelerate`.
            cuda_graphs: record and replay the denoising steps; see `UnCLIP.accelerate`.
            placement: further arguments of `UnCLIP.load`: `clip`, `device`, `offload`, `precision`.

        Raises:
            UserError: as `UnCLIP.load`.
        """
        unclip = UnCLIP.load(decoder or DEFAULT_DECODER, upsamplers=upsamplers, **placement)
        if prior is not None:
            paths = [Path(DEFAULT_PRIORS.get(str(prior), prior))]
        elif unclip.decoder.condition == "text":
            paths = []
        else:
            paths = list(DEFAULT_PRIORS.values())
        stages: list[Any] = [load_stage(path, DiffusionPrior, ARPrior) for path in paths]
        accelerate_stages([*stages, *unclip.stages], unclip.device, compile, cuda_graphs)
        priors = {"ar" if isinstance(s, ARPrior) else "diffusion": s for s in stages}
        return cls(unclip, priors, store)

    @property
    def priors(self) -> tuple[str, ...]:
        """What a request may name as its prior; the first is what it gets if it names none."""
        if self.plain.decoder.condition == "text":
            return ("text", "none")
        return (*self.with_prior, "none", "text")

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sides of the pictures that can be drawn, the decoder's first."""
        return self.plain.sizes

    def unclip_for(self, request: PriorSettings) -> tuple[UnCLIP, str]:
        """What draws a request's captions, and the `condition` for `UnCLIP.generate`."""
        name = request.prior or self.priors[0]
        if name in WITHOUT_PRIOR:
            return self.plain, "text" if name == "text" else "caption"
        return self.with_prior[name], "prior"

    def sampling(self, request: Drawing, **other: Any) -> Any:
        """The decoder's settings with what the request says in their place."""
        names = ("sampler", "steps", "guidance_scale")
        asked = {name: getattr(request, name) for name in names}
        asked["eta"] = getattr(request, "eta", None)
        return override_sampling(self.plain.decoder, asked | other)

    def prior_sampling(self, request: PriorSettings) -> Any:
        """The prior's settings with what the request says in their place; None without a prior."""
        unclip, _ = self.unclip_for(request)
        if unclip.prior is None:
            return None
        return override_sampling(unclip.prior, vars(request), "prior_")

    def upsampling(self, request: Drawing | Upsample) -> dict[int, Any]:
        """The settings of each upsampler, by its target side."""
        cascade = self.plain.cascade
        asked = {"upsampler_steps": request.upsampler_steps}
        return {
            size: override_sampling(stage, asked, "upsampler_")
            for size, stage in zip(cascade.sizes, cascade.stages, strict=True)
        }

    def check(self, request: Request) -> None:
        """A UserError where these models cannot do what a request asks for."""
        self.upsampling(request)
        if isinstance(request, Upsample):
            return
        size = request.size or self.sizes[0]
        if size not in self.sizes:
            raise UserError(
                f"Pictures of {size} pixels are asked for, and this studio draws "
                f"{' or '.join(map(str, self.sizes))}: choose one of these."
            )
        if request.pictures() * size * size > MOST_PIXELS:
            raise UserError(
                f"{request.pictures()} pictures of {size} pixels are too many for one request: ask "
                f"for at most {MOST_PIXELS // size**2}."
            )
        needs_prior = isinstance(request, Create) or (
            isinstance(request, Inpaint) and bool(request.caption)
        )
        if isinstance(request, Create | Inpaint) and needs_prior:
            if request.prior is not None and request.prior not in self.priors:
                raise UserError(
                    f'There is no prior "{request.prior}" here: choose one of '
                    f"{', '.join(self.priors)}."
                )
            self.prior_sampling(request)
        if isinstance(request, Vary) and request.eta is not None:
            self.sampling(request, sampler=request.sampler or "ddim")
        else:
            self.sampling(request)

    @cached_property
    def components(self) -> PrincipalComponents:
        """Of CLIP's image embeddings; of OpenMoji's, which are made where they are missing."""
        return principal_components(self.plain.clip, self.store)

    @contextmanager
    def watched(self, watch: Callable[[Tensor], object]) -> Iterator[None]:
        """While the body runs, `watch` is shown each x0 of decoder and upsamplers."""
        stages = [self.plain.decoder, *self.plain.cascade.stages]
        try:
            for stage in stages:
                stage.watch = watch
            yield
        finally:
            for stage in stages:
                stage.watch = None
