"""A small CLIP trained from scratch (Radford et al. 2021, arXiv 2103.00020), so that the other
stages have one without a download.

open_clip builds the model and gives the loss; `unclip export` makes an open_clip folder of it,
which `FrozenCLIP` and stock open_clip load.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip_pl.clip.folder import build_clip
from unclip_pl.optim.sam import climb, descend
from unclip_pl.stages.base import OptimizerConfig, Stage
from unclip_pl.utils.errors import UserError


class CLIP(Stage):
    """Contrastive image-text training with open_clip's ClipLoss; the logit scale never exceeds 100
    (CLIP, section 2.5).

    Args:
        architecture: an open_clip folder (`local-dir:/path`) whose `open_clip_config.json`
            describes the model, or "openmoji", the embedded one. Its weights, if there are any, are
            not used.
        augment: strength of the random shift, scale and turn of the training images; 0 none, 1 up
            to 12 % and 17 degrees.
        sam_rho: length of sharpness-aware minimisation's move (`training.sam`; unCLIP, appendix C:
            0.1), along the gradient of each rank's own part of the batch; 0 is plain training. A
            step takes twice as long.
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
        sam_rho: float = 0.0,
        optimizer: OptimizerConfig = OptimizerConfig(
            lr=1e-3, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.2, decay="cosine"
        ),
    ) -> None:
        super().__init__()
        if not 0 <= sam_rho < math.inf:
            raise ValueError(f"model.sam_rho is {sam_rho}: give 0 (no SAM) or more, such as 0.1.")
        self.remember(optimizer, architecture=architecture, augment=augment, sam_rho=sam_rho)
        self.net, self.model_config, self.preprocess_config = build_clip(architecture)
        self.augment, self.sam_rho = augment, sam_rho
        self._before_climb: list[Tensor] = []
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
        world = self.trainer.world_size if self.training else 1
        return {"loss": self.contrast(batch, self.global_rank if self.training else 0, world)}

    def contrast(self, batch: dict, rank: int = 0, world: int = 1) -> Tensor:
        """Each caption of the batch against the images of all `world` ranks, and the reverse."""
        from open_clip.loss import ClipLoss

        image, text = self.embed(batch["image"], batch["tokens"])
        loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
        return loss(image.float(), text.float(), self.net.logit_scale.exp())

    def training_step(self, batch: dict, batch_idx: int) -> dict[str, Tensor]:
        batch = batch | {"image": shaken(batch["image"], self.augment)}
        if self.sam_rho:
            self._before_climb = climb(lambda: self.contrast(batch), self._moved, self.sam_rho)
        return super().training_step(batch, batch_idx)

    def on_after_backward(self) -> None:
        if self._before_climb:
            descend(self._moved, self._before_climb)
            self._before_climb = []

    @property
    def _moved(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.net.parameters() if parameter.requires_grad]

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
