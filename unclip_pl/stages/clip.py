"""A small CLIP trained from scratch (Radford et al. 2021, arXiv 2103.00020), so that the other
stages have one without a download.

open_clip builds the model and gives the loss; `unclip export` makes an open_clip folder of it,
which `FrozenCLIP` and stock open_clip load.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip_pl.clip import build_clip
from unclip_pl.errors import UserError
from unclip_pl.stages.base import OptimizerConfig, Stage


class CLIP(Stage):
    """Contrastive image-text training with open_clip's ClipLoss; the logit scale never exceeds 100
    (CLIP, section 2.5).

    Args:
        architecture: an open_clip folder (`local-dir:/path`) whose `open_clip_config.json`
            describes the model, or "openmoji", the embedded one. Its weights, if there are any, are
            not used.
        augment: strength of the random shift, scale and turn of the training images; 0 none, 1 up
            to 12 % and 17 degrees.
        optimizer: CLIP's: betas 0.9 and 0.98, eps 1e-6, decay 0.2 on the weights that are no gains
            or biases.
    """

    net: Any  # open_clip's CLIP, which has no types
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        architecture: str = "openmoji",
        augment: float = 1.0,
        optimizer: OptimizerConfig = OptimizerConfig(
            lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, decay="cosine"
        ),
    ) -> None:
        super().__init__()
        self.remember(optimizer, architecture=architecture, augment=augment)
        self.net, self.model_config, self.preprocess_config = build_clip(architecture)
        self.augment = augment
        for name in ("mean", "std"):
            self.register_buffer(
                name, torch.tensor(self.preprocess_config[name]).view(3, 1, 1), persistent=False
            )

    def setup(self, stage: str) -> None:
        if stage == "fit" and hasattr(
            self.trainer, "datamodule"
        ):  # a CLIP in the making has no other to agree with
            self.check_data(self.trainer.datamodule)

    def check_data(self, data: Any) -> None:
        size = self.model_config["vision_cfg"]["image_size"]
        if data.image_size != size:
            raise UserError(
                f"The CLIP {self.hparams['architecture']} sees {size} px images and "
                f"data.image_size is {data.image_size}: set it to {size}."
            )

    def embed(self, images: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W) in [-1, 1] and (B, L) -> unit-norm image and text embeddings (B, D)."""
        pixels = (images.add(1).div(2) - self.mean) / self.std
        return self.net.encode_image(pixels, normalize=True), self.net.encode_text(
            tokens, normalize=True
        )

    def loss(self, batch: dict, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        from open_clip.loss import ClipLoss

        image, text = self.embed(
            shaken(batch["image"], self.augment) if self.training else batch["image"],
            batch["tokens"],
        )
        world = self.trainer.world_size if self.training else 1
        contrast = ClipLoss(
            local_loss=True,
            gather_with_grad=True,
            rank=self.global_rank if self.training else 0,
            world_size=world,
        )
        return {"loss": contrast(image.float(), text.float(), self.net.logit_scale.exp())}

    def on_train_batch_end(self, outputs: Any, batch: dict, batch_idx: int) -> None:
        with torch.no_grad():
            self.net.logit_scale.clamp_(0, math.log(100))
        self.log("train/logit_scale", self.net.logit_scale.detach().exp())


def shaken(images: Tensor, strength: float) -> Tensor:
    """Each of (B, 3, H, W) shifted, scaled and turned a little at random, on the white that
    surrounds the drawings."""
    if not strength:
        return images
    draw = torch.rand(4, len(images), device=images.device, dtype=images.dtype) * 2 - 1
    angle, scale, shift = (
        0.3 * strength * draw[0],
        1 + 0.12 * strength * draw[1],
        0.12 * strength * draw[2:],
    )
    cos, sin = angle.cos() * scale, angle.sin() * scale
    matrix = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images - 1, grid, align_corners=False) + 1  # zeros outside mean white
