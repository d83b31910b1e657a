"""A frozen CLIP (one of open_clip's models) behind a few methods.

Images come in as floats in [-1, 1] of any size. Embeddings come out as float32, as CLIP gives them:
not normalised. `FrozenCLIP` is no nn.Module, so that EMA, checkpoints and optimisers leave it out.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip_pl.clip.config import DTYPES, CLIPConfig
from unclip_pl.clip.fingerprint import Fingerprint, compute_fingerprint
from unclip_pl.clip.loading import load_model, load_tokenizer, plain_text
from unclip_pl.clip.text_tower import text_features, text_pooling
from unclip_pl.utils.precision import supports_dtype
from unclip_pl.utils.tokens import caption_mask

CPU_BATCH = 32
"""Images that go through CLIP at a time on a CPU: about 8 % less time than with 64."""


class TextFeatures(NamedTuple):
    """CLIP's embeddings and token states of B captions.

    `embed` (B, D) float32. `states` (B, L, W) float32 of the last layer after the final norm, 0
    beyond `mask`. `mask` (B, L) bool, True up to and including the end token.
    """

    embed: Tensor
    states: Tensor
    mask: Tensor


class FrozenCLIP:
    """A CLIP in eval mode without gradients.

    Weights and tokenizer are read at their first use, and are left out when it is pickled.

    Raises:
        UserError: at the first use, where the model cannot be loaded or is of a kind that the
            stages cannot use.
    """

    def __init__(
        self, config: CLIPConfig = CLIPConfig(), device: str | torch.device = "cpu"
    ) -> None:
        self.config = config
        self.device = torch.device(device)
        self._model: nn.Module | None = None
        self._tokenizer: Any = None

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_model": None, "_tokenizer": None}

    @property
    def model(self) -> Any:
        """open_clip's model."""
        if self._model is None:
            model = load_model(self.config).eval().requires_grad_(False)
            self.dtype = DTYPES[self.config.precision]
            if not supports_dtype(self.dtype, self.device):
                self.dtype = torch.float32
                model = model.float()  # the weights stay rounded
            self._model = model.to(self.device)
        return self._model

    @property
    def embed_dim(self) -> int:
        """D, the width of the joint embedding."""
        projection = self._text.text_projection
        if projection is None:
            return self.states_width
        return projection.out_features if isinstance(projection, nn.Linear) else projection.shape[1]

    @property
    def states_width(self) -> int:
        """W, the width of the text tower's token states."""
        return self._text.ln_final.normalized_shape[0]

    @property
    def context_length(self) -> int:
        """L, the number of tokens of a caption."""
        return self._text.context_length

    @property
    def vocab_size(self) -> int:
        """The number of ids that a token can have."""
        return self._text.token_embedding.num_embeddings

    @property
    def image_size(self) -> int:
        """Side of the images that the model sees, in pixels; others are resized."""
        size = self.model.visual.image_size
        return size if isinstance(size, int) else size[0]

    def to(self, device: str | torch.device) -> "FrozenCLIP":
        """Move to a device, in place."""
        self.device = torch.device(device)
        if self._model is None:
            return self
        wanted = DTYPES[self.config.precision]
        if self.dtype != wanted and supports_dtype(wanted, self.device):
            self._model = None  # read again, in the type that the last device could not compute in
        else:
            self._model.to(self.device)
        return self

    @torch.no_grad()
    def embed_images(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) float in [-1, 1] -> (B, D) float32, not normalised.

        Images are resized (antialiased), cropped and scaled as the model's configuration says.
        """
        if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                f"CLIP was given images {tuple(images.shape)} of {images.dtype}: give floats "
                "(B, 3, H, W) in [-1, 1]."
            )
        if self.device.type == "cpu" and len(images) > CPU_BATCH:
            return torch.cat([self.embed_images(part) for part in images.split(CPU_BATCH)])
        cfg = self.model.visual.preprocess_cfg
        with torch.autocast(self.device.type, enabled=False):
            images = images.to(self.device, torch.float32)
            images = resize_and_crop(
                images, self.image_size, cfg["resize_mode"], cfg["interpolation"]
            )
            mean = torch.tensor(cfg["mean"], device=self.device).view(3, 1, 1)
            std = torch.tensor(cfg["std"], device=self.device).view(3, 1, 1)
            # ((images + 1) / 2 - mean) / std in one operation
            pixels = torch.addcmul((0.5 - mean) / std, images, 0.5 / std)
            return self.model.encode_image(pixels.to(self.dtype)).float()

    @torch.no_grad()
    def embed_text(self, tokens: Tensor) -> TextFeatures:
        """(B, L) int64 of `tokenize` -> embeddings and token states, in one pass.

        The embedding is `encode_text`'s, not normalised. Tokens on the CPU are cut after the
        longest caption of the batch, which changes nothing in a causal text tower.
        """
        mask = self.caption_mask(tokens)
        if self.device.type == "cpu" and len(tokens) > CPU_BATCH:
            return self._embed_text_by_length(tokens, mask)
        length = tokens.shape[1]
        if tokens.device.type == "cpu":  # elsewhere the host would have to wait for the number
            length = int(mask.sum(1).max())
        tokens, mask = tokens.to(self.device), mask.to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            embed, states_BLW = text_features(self.model, tokens, mask.sum(1) - 1, length)
        states_BLW = F.pad(states_BLW.float(), (0, 0, 0, tokens.shape[1] - states_BLW.shape[1]))
        return TextFeatures(embed.float(), states_BLW.masked_fill(~mask[..., None], 0.0), mask)

    def _embed_text_by_length(self, tokens: Tensor, mask: Tensor) -> TextFeatures:
        """`embed_text` in parts of captions of similar lengths."""
        order = mask.sum(1).argsort()
        parts = [self.embed_text(tokens[part]) for part in order.split(CPU_BATCH)]
        original_order = order.argsort()
        return TextFeatures(*(torch.cat(part)[original_order] for part in zip(*parts)))

    def caption_mask(self, tokens: Tensor) -> Tensor:
        """Which tokens belong to the caption: (B, L) of `tokenize` -> (B, L) bool.

        True up to and including the token at which the text tower is read.
        """
        kind, end_token = text_pooling(self.model)
        return caption_mask(tokens, None if kind == "argmax" else end_token)

    def tokenize(self, captions: list[str]) -> Tensor:
        """Captions -> (B, L) int64 on the CPU, by the model's own tokenizer; reads no weights."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.config)
        return self._tokenizer([plain_text(caption) for caption in captions]).long()

    def truncated_text(self, caption: str) -> str:
        """The end of a caption that the tokenizer cuts off because the caption is too long.

        It is "" where all of the caption is read.
        """
        tokens = self.tokenize([caption])

        def reads_the_same(text: str) -> bool:
            return torch.equal(self.tokenize([text]), tokens)

        if not reads_the_same(caption + " a"):
            return ""
        too_short, enough = 0, len(caption)  # lengths of prefixes: bisect until they meet
        while enough - too_short > 1:
            middle = (too_short + enough) // 2
            if reads_the_same(caption[:middle]):
                enough = middle
            else:
                too_short = middle
        return caption[enough:]

    def similarity(self, image_embed: Tensor, text_embed: Tensor) -> Tensor:
        """(N, D), (M, D) -> cosines (N, M)."""
        return F.normalize(image_embed.float(), dim=-1) @ F.normalize(text_embed.float(), dim=-1).T

    def fingerprint(self) -> Fingerprint:
        """What tells this CLIP from another, see `unclip_pl.clip.fingerprint`."""
        return compute_fingerprint(self)

    @property
    def _text(self) -> Any:
        return getattr(self.model, "text", self.model)


def resize_and_crop(
    images: Tensor, size: int, resize_mode: str = "shortest", interpolation: str = "bicubic"
) -> Tensor:
    """(B, 3, H, W) -> (B, 3, size, size) in [-1, 1], as open_clip's transform of PIL images.

    Args:
        images: in [-1, 1].
        size: side of the result in pixels.
        resize_mode: "shortest": short side to `size`, then the centre; "squash": both sides.
        interpolation: "bicubic" or "bilinear", antialiased.
    """
    height, width = images.shape[-2:]
    if (height, width) != (size, size):
        shape = (size, size)
        if resize_mode != "squash":
            short = min(height, width)
            shape = (size * height // short, size * width // short)
        mode = "bilinear" if interpolation == "bilinear" else "bicubic"
        images = F.interpolate(images, shape, mode=mode, antialias=True, align_corners=False)
        top, left = (round((side - size) / 2) for side in shape)
        images = images[..., top : top + size, left : left + size]
    return images.clamp(-1, 1)
