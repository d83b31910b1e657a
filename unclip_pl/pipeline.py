"""The stages put together: text or image -> CLIP embedding -> image. Reads releases and Lightning checkpoints through the same door."""

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

import unclip_pl.stages
from unclip_pl import release
from unclip_pl.clip import CLIPConfig, FrozenCLIP, require_same
from unclip_pl.diffusion.noise import Noise
from unclip_pl.errors import UserError
from unclip_pl.release import Release
from unclip_pl.stages.base import Stage
from unclip_pl.stages.decoder import Decoder, SamplingConfig
from unclip_pl.training.checkpoint import read_checkpoint

ASSETS = Path(__file__).parent / "assets"
DEFAULT_DECODER = ASSETS / "decoder-openmoji"


def read_weights(path: str | os.PathLike) -> Release:
    """A release folder, or a Lightning checkpoint as one: its EMA weights, hyperparameters and CLIP fingerprint."""
    if Path(path).is_dir():
        return release.read(path)
    checkpoint = read_checkpoint(path)
    missing = [key for key in ("stage", "hyper_parameters", "state_dict") if key not in checkpoint]
    if missing:
        raise UserError(f"{path} is no checkpoint of a stage of ours ({', '.join(missing)} missing): give a .ckpt of `lightning fit` or a release.")
    return Release(
        checkpoint["stage"], checkpoint["hyper_parameters"], checkpoint.get("clip_fingerprint"), checkpoint["state_dict"], checkpoint["global_step"]
    )


def load_stage(path: str | os.PathLike, kind: type[Stage]) -> Stage:
    """The stage in a release folder or checkpoint, in eval mode on the CPU, every weight accounted for.

    Raises:
        UserError: it is another stage than `kind`, or names and shapes do not fit.
    """
    weights = read_weights(path)
    if weights.stage != kind.__name__:
        raise UserError(f"{path} holds a {weights.stage}, and a {kind.__name__} is needed here: give another path.")
    stage = kind(**weights.hyper_parameters)
    try:
        stage.load_state_dict(weights.tensors)
    except RuntimeError as error:
        raise UserError(f"{path} does not fit its own configuration ({str(error).splitlines()[1].strip()}): it was changed or is damaged.") from None
    stage.clip_fingerprint = weights.clip_fingerprint
    return stage.eval().requires_grad_(False)


class UnCLIP:
    """A CLIP and a decoder that was trained on its embeddings.

    Args:
        decoder: the stage.
        clip: its CLIP; by default the one that the decoder's fingerprint names. Another one is refused.
        device: where all of it runs.
    """

    def __init__(self, decoder: Decoder, clip: FrozenCLIP | None = None, device: str = "cpu") -> None:
        if decoder.clip_fingerprint is None:
            raise UserError("The decoder does not say with which CLIP it was trained: train it with `lightning fit`, which keeps that.")
        self.clip = clip or FrozenCLIP(CLIPConfig.of_fingerprint(decoder.clip_fingerprint), device)
        require_same(decoder.clip_fingerprint, self.clip.fingerprint(), "The decoder")
        self.decoder = decoder.to(device).eval()
        self.device = torch.device(device)

    @classmethod
    def load(cls, decoder: str | os.PathLike = DEFAULT_DECODER, clip: FrozenCLIP | None = None, device: str = "cpu") -> "UnCLIP":
        """From a release folder or checkpoint of the decoder; by default the one that comes with the package."""
        unclip_pl.stages.load_all()
        return cls(load_stage(decoder, Decoder), clip, device)

    def embed_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> CLIP image embeddings (B, D), not normalised."""
        return self.clip.embed_images(images.to(self.device))

    def decode(
        self, image_embed: Tensor | None, seeds: Sequence[int], captions: Sequence[str] | None = None,
        sampling: SamplingConfig | None = None, callback: object = None,
    ) -> Tensor:
        """Draw one image a seed.

        Args:
            image_embed: (B, D) as CLIP gives it; None for the null embedding (caption alone).
            seeds: B of them; image k depends on seed k alone, whatever the batch.
            captions: B of them; None drops the caption.
            sampling: other settings than the decoder's own.
            callback: called with (step, steps).

        Returns:
            float32 (B, 3, 64, 64) in [-1, 1] on the pipeline's device.
        """
        batch: dict = {} if image_embed is None else {"image_embed": image_embed.to(self.device)}
        if captions is not None:
            tokens = self.clip.tokenize(list(captions)).to(self.device)
            text = self.clip.embed_text(tokens)
            batch |= {"tokens": tokens, "text_mask": text.mask, "text_embed": text.embed, "text_states": text.states}
        return self.decoder.sample(batch, Noise(seeds), sampling, callback)
