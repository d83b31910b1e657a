"""The stages put together: text or image -> CLIP embedding -> image, at 64, 256 or 1024 pixels. Reads releases and checkpoints through the same door."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor

import unclip_pl.stages
from unclip_pl.clip.config import CLIPConfig
from unclip_pl.clip.fingerprint import require_same
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.clip.loading import tokenize_bpe
from unclip_pl.cluster.checkpoint_io import read_checkpoint
from unclip_pl.cluster.sharded_checkpoint import META, whole
from unclip_pl.diffusion.noise import Noise
from unclip_pl.diffusion.process import DiffusionConfig, Predict
from unclip_pl.diffusion.schedule import Schedule
from unclip_pl.networks.long_text import own_length
from unclip_pl.networks.renamed import rename
from unclip_pl.pipeline import release
from unclip_pl.pipeline.cascade import (
    Cascade,
    accelerate_stages,
    at_work,
    check_order,
    resolved,
    source_side,
)
from unclip_pl.pipeline.release import Release
from unclip_pl.stages.ar_prior import ARPrior
from unclip_pl.stages.base import Stage, as_config, plain
from unclip_pl.stages.decoder import Decoder, SamplingConfig
from unclip_pl.stages.diffusion_prior import DiffusionPrior
from unclip_pl.stages.settings import require_same_model, settings_of
from unclip_pl.stages.upsampler import Upsampler, Upsampler256, Upsampler1024, UpsamplingConfig
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.precision import Precision, usable

log = logging.getLogger(__name__)
ASSETS = Path(__file__).parents[1] / "assets"
DEFAULT_DECODER = ASSETS / "decoder-openmoji"
DEFAULT_PRIORS = {
    "diffusion": ASSETS / "diffusion-prior-openmoji",
    "ar": ASSETS / "ar-prior-openmoji",
}
DEFAULT_UPSAMPLERS = {
    "256": ASSETS / "upsampler-256-openmoji",
    "1024": ASSETS / "upsampler-1024-openmoji",
}
PRIOR_SEEDS = 1 << 31
"""Added to a seed for the prior's draws, so that they share no numbers with the decoder's."""
Prior = DiffusionPrior | ARPrior
Kind = TypeVar("Kind", bound=Stage)
Condition = Literal["prior", "text", "caption"]
CONDITIONS = get_args(Condition)
Callback = Callable[[int, int], Any]


def read_weights(path: str | os.PathLike) -> Release:
    """A release folder, or a Lightning checkpoint (a file or a folder of shards) as one: its EMA weights, hyperparameters and CLIP fingerprint."""
    if Path(path).is_dir() and not (Path(path) / META).exists():
        weights = release.read(path)
        return replace(weights, hyper_parameters=completed(weights.stage, weights.hyper_parameters))
    checkpoint = read_checkpoint(path, target=whole("state_dict"))
    missing = [key for key in ("stage", "hyper_parameters", "state_dict") if key not in checkpoint]
    if missing:
        raise UserError(
            f"{path} is no checkpoint of a stage of ours ({', '.join(missing)} missing): give a .ckpt of `lightning fit` or a release."
        )
    return Release(
        checkpoint["stage"],
        completed(checkpoint["stage"], checkpoint["hyper_parameters"]),
        checkpoint.get("clip_fingerprint"),
        rename(checkpoint["stage"], checkpoint["state_dict"]),
        checkpoint["global_step"],
    )


def completed(stage: str, hyper_parameters: dict) -> dict:
    """Hyperparameters with those that older weights do not name, as they were trained."""
    found = dict(hyper_parameters)
    if stage in (Upsampler256.__name__, Upsampler1024.__name__):
        found.setdefault("clamp_condition", True)
    if "diffusion" in found:
        found["diffusion"] = plain(as_config(DiffusionConfig, found["diffusion"]))
    return found


def load_stage(path: str | os.PathLike, *kinds: type[Kind]) -> Kind:
    """The stage in a release folder or checkpoint, of one of the kinds, in eval mode on the CPU, every weight accounted for.

    Raises:
        UserError: it is another stage than one of `kinds`, or names and shapes do not fit.
    """
    weights = read_weights(path)
    known = {kind.__name__: kind for kind in kinds}
    if weights.stage not in known:
        raise UserError(
            f"{path} holds a {weights.stage}, and a {' or '.join(known)} is needed here: give another path."
        )
    stage = known[weights.stage](**weights.hyper_parameters)
    try:
        stage.load_state_dict(weights.tensors)
    except RuntimeError as error:
        raise UserError(
            f"{path} does not fit its own configuration ({str(error).splitlines()[1].strip()}): it was changed or is damaged."
        ) from None
    stage.clip_fingerprint = weights.clip_fingerprint
    return stage.eval().requires_grad_(False)


def start_from(stage: Stage, path: str | os.PathLike) -> None:
    """Give `stage` the weights of a release or checkpoint of the same stage, to train on from there; optimiser, step and skipped steps start anew.

    Raises:
        UserError: it is another stage, of another diffusion process or scale of embeddings, or names and shapes do not fit.
    """
    weights = read_weights(path)
    if weights.stage != type(stage).__name__:
        raise UserError(
            f"{path} holds a {weights.stage}, and this run trains a {type(stage).__name__}: give --init a release or checkpoint of one."
        )
    theirs = settings_of(type(stage), weights.hyper_parameters)
    require_same_model(str(path), theirs, dict(stage.hparams), stage.may_change, "leave --init out")
    try:
        stage.load_state_dict(
            weights.tensors | {"skipped_steps": torch.zeros_like(stage.skipped_steps)}
        )
    except RuntimeError as error:
        raise UserError(
            f"{path} does not fit this run's model ({str(error).splitlines()[1].strip()}): give the model that configuration."
        ) from None
    stage.clip_fingerprint = weights.clip_fingerprint


def load_upsamplers(entries: Sequence[str | os.PathLike]) -> list[Upsampler]:
    """The upsamplers in release folders or checkpoints; "256" and "1024" are those in the package."""
    stages: list[Upsampler] = []
    for entry in entries:
        own = DEFAULT_UPSAMPLERS.get(str(entry))
        if own is not None and not own.is_dir():
            raise UserError(
                f"The package here has no upsampler to {entry} pixels ({own.name} is missing): give a checkpoint or release of one."
            )
        stages.append(load_stage(own or entry, Upsampler256, Upsampler1024))
    return stages


def paired(captions: Sequence[str], seeds: Sequence[int]) -> None:
    """ValueError unless there is a seed for each caption."""
    if len(captions) != len(seeds):
        raise ValueError(
            f"{len(captions)} captions and {len(seeds)} seeds were given: give one seed a caption."
        )


class UnCLIP:
    """A CLIP, a decoder that was trained on its embeddings and, to draw from captions, a prior; to draw larger pictures, upsamplers.

    Args:
        decoder: the stage.
        prior: a DiffusionPrior or an ARPrior; None: pictures and text embeddings only.
        clip: the CLIP of both; by default the one that the decoder's fingerprint names. Another one is refused.
        device: where all of it runs.
        upsamplers: in order, the first from the decoder's size.
        offload: keep on the device only the stage that works; the others wait in the CPU's memory.
        precision: "bf16": prior, decoder and upsamplers compute in bfloat16 (autocast) on devices that have it.

    Raises:
        UserError: a stage does not say of which CLIP it is, or is of another one; a prior for a decoder that was trained on text embeddings; an
            upsampler is not for the size before it.
    """

    def __init__(
        self,
        decoder: Decoder,
        prior: Prior | None = None,
        clip: FrozenCLIP | None = None,
        device: str = "cpu",
        upsamplers: Sequence[Upsampler] = (),
        offload: bool = False,
        precision: Precision = "fp32",
    ) -> None:
        if prior is not None and decoder.condition == "text":
            raise UserError(
                'The decoder was trained on text embeddings and has no use for a prior: leave the prior out and condition on "text".'
            )
        self.device, self.offload = resolved(device), offload
        self.precision = usable(precision, self.device)  # says at once where it is not
        home = torch.device("cpu") if offload else self.device
        for name, stage in {"decoder": decoder, "prior": prior}.items():
            if stage is None:
                continue
            if stage.clip_fingerprint is None:
                raise UserError(
                    f"The {name} does not say with which CLIP it was trained: train it with `lightning fit`, which keeps that."
                )
            clip = (
                clip.to(home)
                if clip
                else FrozenCLIP(CLIPConfig.of_fingerprint(stage.clip_fingerprint), home)
            )
            require_same(stage.clip_fingerprint, clip.fingerprint(), f"The {name}")
        self.clip: FrozenCLIP = clip  # type: ignore[assignment]  # there is a decoder
        if (
            isinstance(prior, DiffusionPrior)
            and prior.sampling.sampler == "analytic"
            and bool(prior.x0_error.isnan().any())
        ):
            log.warning(
                "The prior has no analytic variance, which is estimated when training ends: it draws with the variance of plain DDPM."
            )
        check_order(
            [(source_side(stage), stage.net_config.image_size) for stage in upsamplers],
            before=decoder.net_config.image_size,
        )
        self.decoder = decoder.to(home).eval()
        self.prior = None if prior is None else prior.to(home).eval()
        self.cascade = Cascade(upsamplers, self.device, offload, precision=precision)

    @classmethod
    def load(
        cls,
        decoder: str | os.PathLike = DEFAULT_DECODER,
        prior: str | os.PathLike | None = None,
        clip: FrozenCLIP | None = None,
        device: str = "cpu",
        upsamplers: Sequence[str | os.PathLike] = (),
        offload: bool = False,
        precision: Precision = "fp32",
        compile: bool = False,
        cuda_graphs: bool = False,
    ) -> "UnCLIP":
        """From release folders or checkpoints; `prior` may be "diffusion" or "ar", `upsamplers` may have "256" and "1024": those in the package, as the
        decoder is by default. `compile` and `cuda_graphs` as in `accelerate`."""
        unclip_pl.stages.load_all()
        found: Any = (
            None
            if prior is None
            else load_stage(DEFAULT_PRIORS.get(str(prior), Path(prior)), DiffusionPrior, ARPrior)
        )
        return cls(
            load_stage(decoder, Decoder),
            found,
            clip,
            device,
            load_upsamplers(upsamplers),
            offload,
            precision,
        ).accelerate(compile, cuda_graphs)

    def accelerate(self, compile: bool = False, cuda_graphs: bool = False) -> "UnCLIP":
        """Draw faster, mainly on GPUs; the pictures are the same up to rounding. Returns itself.

        Args:
            compile: compile the blocks of prior, decoder and upsamplers (torch.compile). The first
                picture of each shape takes minutes longer.
            cuda_graphs: on a GPU, record each denoising step once per run and replay it: for small
                networks and few pictures.

        Raises:
            UserError: `compile` without a C++ compiler on a CPU.
        """
        accelerate_stages(self.stages, self.device, compile, cuda_graphs)
        return self

    @property
    def stages(self) -> list[Stage]:
        """Prior (if any), decoder and upsamplers, in the order in which they run."""
        prior = [] if self.prior is None else [self.prior]
        return [*prior, self.decoder, *self.cascade.stages]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sides of the pictures that can be drawn: the decoder's, then each upsampler's."""
        return (self.decoder.net_config.image_size, *self.cascade.sizes)

    def embed_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> CLIP image embeddings (B, D), not normalised."""
        with at_work(self.clip, self.device, self.offload):
            return self.clip.embed_images(images.to(self.device))

    def embed_text(self, captions: Sequence[str]) -> Tensor:
        """B captions -> CLIP text embeddings (B, D), not normalised."""
        return self._text(captions)["text_embed"]

    def _text(
        self, captions: Sequence[str], stage: Prior | Decoder | None = None
    ) -> dict[str, Tensor]:
        """Captions as `stage` takes them: `tokens`, `text_mask`, `text_embed`, `text_states`, and
        `text_tokens` if it reads more than CLIP."""
        tokens = self.clip.tokenize(list(captions))
        with at_work(self.clip, self.device, self.offload):
            text = self.clip.embed_text(tokens)
        given = {
            "tokens": tokens.to(self.device),
            "text_mask": text.mask,
            "text_embed": text.embed,
            "text_states": text.states,
        }
        length = own_length(stage.text_config, self.clip.context_length) if stage else None
        if length is not None:
            given["text_tokens"] = tokenize_bpe(list(captions), length).to(self.device)
        return given

    def sample_prior(
        self,
        captions: Sequence[str],
        seeds: Sequence[int],
        sampling: Any = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Draw a CLIP image embedding for each caption.

        Args:
            captions: B of them.
            seeds: B of them; embedding k depends on seed k alone, and is independent of what `decode` draws from the same seed.
            sampling: other settings than the prior's own (the `sampling` of its stage).
            callback: called with (step, steps).

        Returns:
            float32 (B, D) as CLIP gives them.
        """
        paired(captions, seeds)
        if self.prior is None:
            raise UserError(
                'There is no prior to draw embeddings from captions: load one (prior="diffusion"), or condition on "text" or "caption".'
            )
        text = self._text(captions, self.prior)
        with at_work(self.prior, self.device, self.offload, self.precision):
            return self.prior.sample(
                text, Noise([seed + PRIOR_SEEDS for seed in seeds]), sampling, callback
            )

    def decode(
        self,
        image_embed: Tensor | None,
        seeds: Sequence[int],
        captions: Sequence[str] | None = None,
        sampling: SamplingConfig | None = None,
        callback: Callback | None = None,
        x_T: Tensor | None = None,
    ) -> Tensor:
        """Draw one image a seed.

        Args:
            image_embed: (B, D) as CLIP gives it; None for the null embedding (caption alone). A decoder that was trained on text embeddings takes
                what is given here for one of those.
            seeds: B of them; image k depends on seed k alone, whatever the batch.
            captions: B of them; None drops the caption.
            sampling: other settings than the decoder's own.
            callback: called with (step, steps).
            x_T: where the sampler starts, (B, 3, 64, 64), such as an inverted image; None draws it from the seeds.

        Returns:
            float32 (B, 3, 64, 64) in [-1, 1] on the pipeline's device.
        """
        batch = self.conditions(image_embed, captions)
        with at_work(self.decoder, self.device, self.offload, self.precision):
            return self.decoder.sample(batch, Noise(seeds), sampling, callback, x_T)

    @torch.no_grad()
    def walk(
        self,
        way: Callable[[Predict, Schedule], Tensor],
        size: int,
        image_embed: Tensor | None = None,
        captions: Sequence[str] | None = None,
        sampling: SamplingConfig | None = None,
    ) -> Tensor:
        """`way(predict, schedule)` for `size` images with the decoder's predictor under these conditions: inversion, repainting and other ways to draw.

        `image_embed`, `captions`, `sampling` as for `decode`.
        """
        settings = sampling or self.decoder.sampling
        schedule = self.decoder.process.schedule.respaced(settings.steps)
        batch = self.conditions(image_embed, captions)
        with at_work(self.decoder, self.device, self.offload, self.precision):
            return way(self.decoder.predictor(batch, size, schedule, settings), schedule)

    def conditions(
        self, image_embed: Tensor | None, captions: Sequence[str] | None
    ) -> dict[str, Tensor | None]:
        """The decoder's batch: `embed` (B, D) or None for its null, and the captions' entries."""
        batch: dict = {"embed": None if image_embed is None else image_embed.to(self.device)}
        return batch if captions is None else batch | self._text(captions, self.decoder)

    def upsample(
        self,
        images: Tensor,
        seeds: Sequence[int],
        times: int | None = None,
        sampling: Mapping[int, UpsamplingConfig] | None = None,
        callback: Callable[[str, int, int], Any] | None = None,
    ) -> Tensor:
        """Pictures (B, 3, h, w) in [-1, 1], of any size, through the upsamplers: see `Cascade.upsample`."""
        return self.cascade.upsample(images, seeds, times, sampling, callback)

    def generate(
        self,
        captions: Sequence[str],
        seeds: Sequence[int],
        condition: Condition = "prior",
        *,
        size: int | None = None,
        prior_sampling: Any = None,
        sampling: SamplingConfig | None = None,
        upsampling: Mapping[int, UpsamplingConfig] | None = None,
        callback: Callable[[str, int, int], Any] | None = None,
        decode: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Draw one image a caption; the decoder sees the caption in every case.

        Args:
            captions: B of them.
            seeds: B of them; image k depends on caption and seed k alone.
            condition: what the decoder has for an image embedding: "prior", one that the prior draws; "text", the caption's text embedding
                in its place (for a decoder that was trained on those, the only one that it knows); "caption", none.
            size: one of `sizes`, such as 64, 256, 1024; None: the largest.
            prior_sampling, sampling: other settings than those of the prior and the decoder.
            upsampling: by target side, other settings than the upsamplers' own: {256: ...}.
            callback: called with ("prior", "decoder", "upsampler 256" ..., step, steps).
            decode: draws in the place of `decode` and is called like it, such as one that starts from pictures.

        Returns:
            float32 (B, 3, size, size) in [-1, 1].

        Raises:
            UserError: "prior" without one, or a size without its upsampler.
        """
        paired(captions, seeds)
        if condition not in CONDITIONS:
            raise ValueError(
                f'There is no condition "{condition}": choose one of {", ".join(CONDITIONS)}.'
            )
        size = self.sizes[-1] if size is None else size
        if size not in self.sizes:
            raise UserError(
                f"Pictures of {size} pixels were asked for, and the stages here draw {' or '.join(map(str, self.sizes))}: ask for that, or load "
                'the upsamplers as well (upsamplers=("256", "1024")).'
            )

        def told(stage: str) -> Callback | None:
            return None if callback is None else lambda step, steps: callback(stage, step, steps)

        embed = {
            "prior": lambda: self.sample_prior(captions, seeds, prior_sampling, told("prior")),
            "text": lambda: self.embed_text(captions),
        }
        images = (decode or self.decode)(
            embed.get(condition, lambda: None)(), seeds, captions, sampling, told("decoder")
        )
        return (
            images
            if size == self.sizes[0]
            else self.upsample(images, seeds, size // self.sizes[0], upsampling, callback)
        )
