"""The networks of a studio: one decoder, its CLIP and upsamplers, and all priors that serve it.

All that the studio calls in the pipeline is called here and in `drawing.py`.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from unclip_pl.diffusion.watch import watching
from unclip_pl.pipeline.devices import accelerate_stages
from unclip_pl.pipeline.locate import DEFAULT_PRIORS, locate
from unclip_pl.pipeline.unclip import Prior, UnCLIP
from unclip_pl.pipeline.weights import load_stage
from unclip_pl.probe import PrincipalComponents, principal_components
from unclip_pl.stages.ar_prior import ARPrior
from unclip_pl.stages.base import Stage
from unclip_pl.stages.decoder import Decoder
from unclip_pl.stages.diffusion_prior import DiffusionPrior
from unclip_pl.studio.requests import (
    Create,
    Drawing,
    Inpaint,
    PriorSettings,
    Request,
    Upsample,
    UseWeights,
    Vary,
)
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.options import override_sampling

MOST_PIXELS = 16 * 2**20
"""Of all pictures of one request together."""
WITHOUT_PRIOR = ("text", "none")
PRIOR_WORDS = {"diffusion": "diffusion prior", "ar": "autoregressive prior"}


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
        self.first: dict[str, str | os.PathLike] = {}
        """Where the decoder and the priors at the start came from, by name."""
        self.others: dict[str, str] = {}
        """What is used in the place of these, by the same names."""
        self._preparations: list[Callable[[Any], object]] = []
        self.with_prior = {
            name: self._joined(unclip.decoder, prior) for name, prior in (priors or {}).items()
        }

    def _joined(self, decoder: Decoder, prior: Prior | None) -> UnCLIP:
        """A decoder and a prior with the CLIP and the upsamplers that are here."""
        own = self.plain
        return UnCLIP(
            decoder,
            prior,
            own.clip,
            str(own.device),
            own.cascade.stages,
            own.offload,
            own.precision,  # type: ignore[arg-type]  # as it was given
        )

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
                the decoder was trained on text embeddings, or reads captions only.
            upsamplers: releases or checkpoints, or "256" and "1024" for those in the package.
            store: the embedding store whose principal components are shown; None: OpenMoji's.
            compile: compile the stages' blocks; see `UnCLIP.accelerate`.
            cuda_graphs: record and replay the denoising steps; see `UnCLIP.accelerate`.
            placement: further arguments of `UnCLIP.load`: `clip`, `device`, `offload`, `precision`.

        Raises:
            UserError: as `UnCLIP.load`.
        """
        decoder = locate("decoder", decoder or "openmoji")
        unclip = UnCLIP.load(decoder, upsamplers=upsamplers, **placement)
        paths: list[str | os.PathLike]
        if prior is not None:
            paths = [locate("prior", prior)]
        elif unclip.decoder.condition != "image":
            paths = []
        else:
            paths = [*DEFAULT_PRIORS.values()]
        stages: list[Any] = [load_stage(path, DiffusionPrior, ARPrior) for path in paths]
        accelerate_stages([*stages, *unclip.stages], unclip.device, compile, cuda_graphs)
        models = cls(unclip, {name_of(stage): stage for stage in stages}, store)
        models.first = {"decoder": decoder}
        models.first |= {name_of(stage): path for stage, path in zip(stages, paths, strict=True)}
        device = unclip.device  # the lambda would keep all of `unclip` in memory
        models._preparations.append(
            lambda stage: accelerate_stages([stage], device, compile, cuda_graphs)
        )
        return models

    def prepare_all(self, prepare: Callable[[Any], object]) -> None:
        """Call `prepare` with each stage that is here, and with those that are loaded later."""
        for stage in (*self.plain.stages, *(u.prior for u in self.with_prior.values())):
            prepare(stage)
        self._preparations.append(prepare)

    def use(self, path: str | os.PathLike, label: str) -> None:
        """Draw with another decoder or prior from now on; the former one is let go.

        Args:
            path: a release or a checkpoint.
            label: what `standing` calls it.

        Raises:
            UserError: it is no whole checkpoint, another stage, or does not fit the other stages or
                the page; everything stays as it was.
        """
        stage = load_stage(path, Decoder, DiffusionPrior, ARPrior)
        name, own = name_of(stage), self.plain.decoder
        if name != "decoder" and name not in self.with_prior:
            raise UserError(f"{label} is a prior of another kind than this studio has: {name}.")
        if isinstance(stage, Decoder):
            theirs = (stage.net_config.image_size, stage.condition)
            if theirs != (own.net_config.image_size, own.condition):
                raise UserError(
                    f"{label} is a decoder of {theirs[0]} pixels and condition {theirs[1]}, other "
                    "than this studio's: start another one with --decoder."
                )
        decoder = stage if isinstance(stage, Decoder) else own
        priors: dict[str, Any] = {key: unclip.prior for key, unclip in self.with_prior.items()}
        if name != "decoder":
            priors[name] = stage
        plain = self._joined(decoder, None)
        with_prior = {key: self._joined(decoder, prior) for key, prior in priors.items()}
        for prepare in self._preparations:
            prepare(stage)
        self.plain, self.with_prior = plain, with_prior
        self.others[name] = label

    def use_first(self) -> None:
        """Draw with the weights of the start again."""
        for name in list(self.others):
            self.use(self.first[name], "")
            del self.others[name]

    def standing(self) -> str:
        """Which weights everybody's pictures are drawn with, as a sentence."""
        if not self.others:
            return "Everything is drawn with the weights that the studio was started with."
        parts = " and ".join(
            f"the {name if name == 'decoder' else PRIOR_WORDS[name]} of {label}"
            for name, label in self.others.items()
        )
        return f"Everything is drawn with {parts}."

    @property
    def takes_embeddings(self) -> bool:
        """Whether the decoder draws from embeddings, and not from captions only."""
        return self.plain.decoder.condition != "none"

    @property
    def priors(self) -> tuple[str, ...]:
        """What a request may name as its prior; the first is what it gets if it names none."""
        if self.plain.decoder.condition == "text":
            return ("text", "none")
        if not self.takes_embeddings:
            return ("none",)
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
        if isinstance(request, UseWeights):
            return
        self.upsampling(request)
        if isinstance(request, Upsample):
            return
        captioned = isinstance(request, Create) or (
            isinstance(request, Inpaint) and bool(request.caption)
        )
        if not captioned and not self.takes_embeddings:
            raise UserError(
                "This studio's decoder draws from captions only, not from embeddings of pictures: "
                "write a caption (Create, or Inpaint with one)."
            )
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
        if isinstance(request, Create | Inpaint) and captioned:
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

    def watched(self, watch: Callable[[Tensor], object]) -> AbstractContextManager[None]:
        """While the body runs, `watch` is shown each x0 of decoder and upsamplers."""
        return watching([self.plain.decoder, *self.plain.cascade.stages], watch)


def name_of(stage: Stage) -> str:
    """Under which name a decoder or a prior is known here."""
    if isinstance(stage, Decoder):
        return "decoder"
    return "ar" if isinstance(stage, ARPrior) else "diffusion"
