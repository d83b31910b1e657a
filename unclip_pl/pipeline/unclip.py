"""The whole pipeline: captions or images -> CLIP embeddings -> images of 64, 256 or 1024 pixels."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

import unclip_pl.stages
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.clip.loading import tokenize_bpe
from unclip_pl.diffusion.noise import Noise
from unclip_pl.diffusion.process import Predict
from unclip_pl.diffusion.schedule import Schedule
from unclip_pl.networks.long_text import has_own_tokenizer, text_tokens_length
from unclip_pl.pipeline.cascade import Cascade, check_sizes, source_side
from unclip_pl.pipeline.compatibility import (
    Prior,
    check_counts,
    check_prior,
    check_same_length,
    require_embeddings,
    shared_clip,
    warn_without_variance,
)
from unclip_pl.pipeline.devices import accelerate_stages, canonical_device, on_device
from unclip_pl.pipeline.hub import Pretrained
from unclip_pl.pipeline.locate import locate
from unclip_pl.pipeline.seeds import PRIOR_OFFSET
from unclip_pl.pipeline.weights import load_stage, load_upsamplers
from unclip_pl.stages.ar_prior import ARPrior
from unclip_pl.stages.base import Stage
from unclip_pl.stages.decoder import Decoder, DecoderSamplingConfig
from unclip_pl.stages.diffusion_prior import DiffusionPrior
from unclip_pl.stages.upsampler import Upsampler, UpsamplingConfig
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import Images, as_pil_list, from_pil
from unclip_pl.utils.precision import Precision, supported_precision

Condition = Literal["prior", "text", "caption"]
CONDITIONS = get_args(Condition)
Callback = Callable[[int, int], Any]
"""Called with (step, steps) after each sampling step."""


class UnCLIP(Pretrained):
    """A CLIP and a decoder that was trained on its embeddings, with a prior and upsamplers.

    The prior is needed to draw with `condition="prior"`, the upsamplers to draw larger than the
    decoder.

    Args:
        decoder: the decoder stage.
        prior: a DiffusionPrior or an ARPrior; None: captions are drawn without one, by
            `condition="text"` or "caption".
        clip: the CLIP of both; by default the one that the decoder's fingerprint names, or that of
            the package for a decoder that reads captions only.
        device: where everything runs.
        upsamplers: in the order of their sizes, the first one from the decoder's size.
        offload: keep only the stage that works on the device; the others wait in the CPU's memory.
        precision: "bf16": prior, decoder and upsamplers compute in bfloat16 (autocast) on devices
            that have it.

    Raises:
        UserError: a stage does not say with which CLIP it was trained, or was trained with another
            one; a prior for a decoder that takes no image embeddings; an upsampler that does
            not start at the size before it.
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
        check_prior(decoder, prior)
        self.device = canonical_device(device)
        self.offload = offload
        self.precision = supported_precision(
            precision, self.device
        )  # warns where the device does not have it
        home = torch.device("cpu") if offload else self.device
        self.clip = shared_clip(decoder, prior, clip, home)
        warn_without_variance(prior)
        sides = [(source_side(stage), stage.net_config.image_size) for stage in upsamplers]
        check_sizes(sides, start=decoder.net_config.image_size)
        self.decoder = decoder.to(home).eval()
        self.prior = None if prior is None else prior.to(home).eval()
        self.cascade = Cascade(upsamplers, self.device, offload, precision=precision)

    @classmethod
    def load(
        cls,
        decoder: str | os.PathLike = "openmoji",
        prior: str | os.PathLike | None = None,
        clip: FrozenCLIP | None = None,
        device: str = "cpu",
        upsamplers: Sequence[str | os.PathLike] = (),
        offload: bool = False,
        precision: Precision = "fp32",
        compile: bool = False,
        cuda_graphs: bool = False,
    ) -> "UnCLIP":
        """Build the pipeline from release folders or checkpoints.

        Args:
            decoder: a path or URL, or "openmoji" for the decoder in the package.
            prior: a path or URL, or "diffusion" or "ar" for those in the package.
            clip: the CLIP of decoder and prior; None: the one that the decoder's fingerprint names.
            device: where everything runs, such as "cpu" or "cuda:1".
            upsamplers: paths or URLs, or "256" and "1024" for those in the package.
            offload: keep only the stage that works on the device.
            precision: "fp32", or "bf16" for bfloat16 (autocast) on devices that have it.
            compile: compile the stages' blocks; see `accelerate`.
            cuda_graphs: record and replay the denoising steps on a GPU; see `accelerate`.

        Raises:
            UserError: a path holds no such stage, or the stages do not fit together.
        """
        unclip_pl.stages.load_all()
        prior_stage: Any = None
        if prior is not None:
            prior_stage = load_stage(locate("prior", prior), DiffusionPrior, ARPrior)
        unclip = cls(
            load_stage(locate("decoder", decoder), Decoder),
            prior_stage,
            clip,
            device,
            load_upsamplers(upsamplers),
            offload,
            precision,
        )
        return unclip.accelerate(compile, cuda_graphs)

    def accelerate(self, compile: bool = False, cuda_graphs: bool = False) -> "UnCLIP":
        """Draw faster, mainly on GPUs; the pictures are the same up to rounding. Returns itself.

        Args:
            compile: compile the blocks of prior, decoder and upsamplers (torch.compile). The first
                picture of each shape takes minutes longer.
            cuda_graphs: on a GPU, record each denoising step once per run and replay it: for small
                networks and few pictures.

        Raises:
            UserError: `compile` without a compiler: C++ for a CPU, C for a GPU.
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

    def embed_images(self, images: Images) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> CLIP image embeddings (B, D), not normalised.

        Of PIL images, which may have several sizes, CLIP sees the centre square.
        """
        if isinstance(images, Tensor):
            batches = [images]
        else:
            pictures = as_pil_list(images)
            batches = [from_pil(picture, min(picture.size))[None] for picture in pictures]
        with on_device(self.clip, self.device, self.offload):
            embeds = [self.clip.embed_images(batch.to(self.device)) for batch in batches]
        return torch.cat(embeds)

    def embed_text(self, captions: Sequence[str]) -> Tensor:
        """B captions -> CLIP text embeddings (B, D), not normalised."""
        return self._encode_captions(captions)["text_embed"]

    def _encode_captions(
        self, captions: Sequence[str], stage: Prior | Decoder | None = None
    ) -> dict[str, Tensor]:
        """Captions as entries of a batch: `tokens`, `text_mask`, `text_embed`, `text_states`.

        There is also `text_tokens` if `stage` reads longer captions than CLIP, and nothing else if
        it has a tokenizer of its own.
        """
        if isinstance(stage, Decoder) and has_own_tokenizer(stage.text_config):
            return {"text_tokens": stage.text.tokenize(captions).to(self.device)}
        tokens = self.clip.tokenize(list(captions))
        with on_device(self.clip, self.device, self.offload):
            text = self.clip.embed_text(tokens)
        batch = {
            "tokens": tokens.to(self.device),
            "text_mask": text.mask,
            "text_embed": text.embed,
            "text_states": text.states,
        }
        length = text_tokens_length(stage.text_config, self.clip.context_length) if stage else None
        if length is not None:
            batch["text_tokens"] = tokenize_bpe(list(captions), length).to(self.device)
        return batch

    def sample_prior(
        self,
        captions: Sequence[str],
        seeds: Sequence[int],
        sampling: Any = None,
        callback: Callback | None = None,
    ) -> Tensor:
        """Draw a CLIP image embedding for each caption.

        Args:
            captions: B captions.
            seeds: B seeds. Embedding k depends only on caption and seed k, and is independent of
                what `decode` draws from the same seed.
            sampling: other settings than the prior's own (the `sampling` of its stage).
            callback: called with (step, steps).

        Returns:
            float32 (B, D) as CLIP gives them.

        Raises:
            UserError: there is no prior.
        """
        check_same_length(captions, seeds)
        if self.prior is None:
            raise UserError(
                "There is no prior to draw embeddings from captions: load one "
                '(prior="diffusion"), or condition on "text" or "caption".'
            )
        text = self._encode_captions(captions, self.prior)
        noise = Noise([seed + PRIOR_OFFSET for seed in seeds])
        with on_device(self.prior, self.device, self.offload, self.precision):
            return self.prior.sample(text, noise, sampling, callback)

    def decode(
        self,
        image_embed: Tensor | None,
        seeds: Sequence[int],
        captions: Sequence[str] | None = None,
        sampling: DecoderSamplingConfig | None = None,
        callback: Callback | None = None,
        x_T: Tensor | None = None,
    ) -> Tensor:
        """Draw one image per seed.

        Args:
            image_embed: (B, D) as CLIP gives it; None for the null embedding, which leaves only the
                caption. A decoder that was trained on text embeddings takes these as text
                embeddings.
            seeds: B seeds. Image k depends only on seed k and its conditions, not on the batch.
            captions: B captions; None drops the caption.
            sampling: other settings than the decoder's own.
            callback: called with (step, steps).
            x_T: where the sampler starts, (B, 3, 64, 64), such as an inverted image; None draws it
                from the seeds.

        Returns:
            float32 (B, 3, 64, 64) on the pipeline's device, about [-1, 1]: within it where the
            decoder's sampling has a threshold.

        Raises:
            ValueError: the numbers of seeds, embeddings, captions and starts differ.
        """
        check_counts(len(seeds), embeddings=image_embed, captions=captions, starts=x_T)
        batch = self.conditions(image_embed, captions)
        with on_device(self.decoder, self.device, self.offload, self.precision):
            return self.decoder.sample(batch, Noise(seeds), sampling, callback, x_T)

    @torch.no_grad()
    def run_sampler(
        self,
        sampler: Callable[[Predict, Schedule], Tensor],
        size: int,
        image_embed: Tensor | None = None,
        captions: Sequence[str] | None = None,
        sampling: DecoderSamplingConfig | None = None,
    ) -> Tensor:
        """Run a sampler of one's own with the decoder, such as an inversion or inpainting.

        Args:
            sampler: called with (predict, schedule): the decoder's predictor under the conditions,
                and the respaced schedule. Its result is returned.
            size: the number of images.
            image_embed: (B, D) as CLIP gives it; None for the null embedding.
            captions: B captions; None drops the caption.
            sampling: other settings than the decoder's own. Its sampler is not used.

        Raises:
            ValueError: there are more or fewer embeddings or captions than images.
        """
        check_counts(size, embeddings=image_embed, captions=captions)
        settings = sampling or self.decoder.sampling
        schedule = self.decoder.process.schedule.respaced(settings.steps)
        batch = self.conditions(image_embed, captions)
        with on_device(self.decoder, self.device, self.offload, self.precision):
            predict = self.decoder.predictor(batch, size, schedule, settings)
            return sampler(predict, schedule)

    def conditions(
        self, image_embed: Tensor | None, captions: Sequence[str] | None
    ) -> dict[str, Tensor | None]:
        """The decoder's batch: `embed` (B, D) or None for its null, and the captions' entries."""
        if image_embed is not None:
            require_embeddings(self.decoder)
        batch: dict = {"embed": None if image_embed is None else image_embed.to(self.device)}
        if captions is None:
            return batch
        return batch | self._encode_captions(captions, self.decoder)

    def upsample(
        self,
        images: Images,
        seeds: Sequence[int],
        times: int | None = None,
        sampling: Mapping[int, UpsamplingConfig] | None = None,
        callback: Callable[[str, int, int], Any] | None = None,
    ) -> Tensor:
        """Images (B, 3, h, w) in [-1, 1] or PIL images, enlarged: see `Cascade.upsample`."""
        return self.cascade.upsample(images, seeds, times, sampling, callback)

    def generate(
        self,
        captions: Sequence[str],
        seeds: Sequence[int],
        condition: Condition = "prior",
        *,
        size: int | None = None,
        prior_sampling: Any = None,
        sampling: DecoderSamplingConfig | None = None,
        upsampling: Mapping[int, UpsamplingConfig] | None = None,
        callback: Callable[[str, int, int], Any] | None = None,
        decode: Callable[..., Tensor] | None = None,
    ) -> Tensor:
        """Draw one image per caption. The decoder reads the caption in every case.

        Args:
            captions: B captions.
            seeds: B seeds. Image k depends only on caption and seed k.
            condition: what the decoder gets as its image embedding. "prior": one that the prior
                draws. "text": the caption's text embedding, for decoders that were trained on
                those. "caption": none.
            size: one of `sizes`, such as 64, 256 or 1024; None: the largest.
            prior_sampling: other settings than the prior's own.
            sampling: other settings than the decoder's own.
            upsampling: other settings than the upsamplers' own, by target side: {256: ...}.
            callback: called with (stage, step, steps), where stage is "prior", "decoder",
                "upsampler 256" or "upsampler 1024".
            decode: called in place of the method `decode` with the same arguments. To start from a
                picture: `partial(image_to_image, unclip, images=picture, strength=0.7)`, see
                `unclip_pl.manipulate`.

        Returns:
            float32 (B, 3, size, size), about [-1, 1]; `unclip_pl.to_pil` makes a PIL image of each.

        Raises:
            UserError: condition "prior" without a prior, or a size without its upsampler.
        """
        check_same_length(captions, seeds)
        if condition not in CONDITIONS:
            raise ValueError(
                f'There is no condition "{condition}": choose one of {", ".join(CONDITIONS)}.'
            )
        size = self.sizes[-1] if size is None else size
        if size not in self.sizes:
            raise UserError(
                f"Pictures of {size} pixels were asked for, and the stages here draw "
                f"{' or '.join(map(str, self.sizes))}: ask for that, or load the upsamplers as "
                'well (upsamplers=("256", "1024")).'
            )

        def progress_for(stage: str) -> Callback | None:
            if callback is None:
                return None
            return lambda step, steps: callback(stage, step, steps)

        embed = None
        if condition == "prior":
            embed = self.sample_prior(captions, seeds, prior_sampling, progress_for("prior"))
        elif condition == "text":
            embed = self.embed_text(captions)
        draw = decode or self.decode
        images = draw(embed, seeds, captions, sampling, progress_for("decoder"))
        if size == self.sizes[0]:
            return images
        return self.upsample(images, seeds, size // self.sizes[0], upsampling, callback)
