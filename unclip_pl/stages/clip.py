"""A small CLIP trained from scratch (Radford et al. 2021, arXiv 2103.00020).

With it the other stages have a CLIP without a download.

open_clip provides the model and the loss. `unclip export` turns a checkpoint into an open_clip
folder, which `FrozenCLIP` and open_clip itself load.
"""

import math
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unclip_pl.clip.folder import build_clip
from unclip_pl.optim.sam import climb, descend
from unclip_pl.stages.base import OptimizerConfig, Stage
from unclip_pl.utils.errors import UserError


class CLIP(Stage):
    """Contrastive image-text training with open_clip's ClipLoss.

    The logit scale never exceeds 100 (CLIP, section 2.5).

    Args:
        architecture: an open_clip folder (`local-dir:/path`) whose `open_clip_config.json`
            describes the model, or "openmoji", the embedded one. Its weights, if there are any, are
            not used.
        augment: strength of the random shift, scale and rotation of the training images; 0: none,
            1: up to 12 % and 17 degrees.
        sam_rho: length of the step of sharpness-aware minimisation (`optim.sam`; unCLIP, appendix
            C: 0.1), along the gradient of each rank's own part of the batch; 0: plain training. A
            training step takes twice as long with it.
        optimizer: CLIP's: betas 0.9 and 0.98, eps 1e-6, decay 0.2 on all weights but gains and
            biases.

    Raises:
        ValueError: `sam_rho` is negative or infinite.
    """

    scalars = ("loss",)
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
        super().__init__(
            architecture=architecture, augment=augment, sam_rho=sam_rho, optimizer=optimizer
        )
        if not 0 <= sam_rho < math.inf:
            raise ValueError(f"model.sam_rho is {sam_rho}: give 0 (no SAM) or more, such as 0.1.")
        self.net, self.model_config, self.preprocess_config = build_clip(architecture)
        self.augment, self.sam_rho = augment, sam_rho
        self._before_climb: list[Tensor] = []
        for name in ("mean", "std"):
            per_channel = torch.tensor(self.preprocess_config[name]).view(3, 1, 1)
            self.register_buffer(name, per_channel, persistent=False)

    def use_data(self, data: Any) -> None:
        self.check_data(data)  # there is no other CLIP to agree with

    @property
    def block_kind(self) -> type[nn.Module]:
        from open_clip.transformer import ResidualAttentionBlock

        return ResidualAttentionBlock

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
        image_embed = self.net.encode_image(pixels, normalize=True)
        return image_embed, self.net.encode_text(tokens, normalize=True)

    def loss(self, batch: dict, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        world = self.trainer.world_size if self.training else 1
        return {"loss": self.contrast(batch, self.global_rank if self.training else 0, world)}

    def contrast(self, batch: dict, rank: int = 0, world: int = 1) -> Tensor:
        """Compute the contrastive loss, a scalar.

        Each caption of this rank is compared with the images of all `world` ranks, and the reverse.
        """
        from open_clip.loss import ClipLoss

        image, text = self.embed(batch["image"], batch["tokens"])
        loss = ClipLoss(local_loss=True, gather_with_grad=True, rank=rank, world_size=world)
        return loss(image.float(), text.float(), self.net.logit_scale.exp())

    def training_step(self, batch: dict, batch_idx: int) -> dict[str, Tensor]:
        batch = batch | {"image": random_affine(batch["image"], self.augment)}
        if self.sam_rho:  # the same patches are dropped in both passes
            devices = [self.device] if self.device.type == "cuda" else []
            contrast, rho = partial(self.contrast, batch), self.sam_rho
            with torch.random.fork_rng(devices):
                self._before_climb = climb(contrast, self._trained, rho)
        return super().training_step(batch, batch_idx)

    def on_after_backward(self) -> None:
        if self._before_climb:
            descend(self._trained, self._before_climb)
            self._before_climb = []

    def logged_names(self) -> set[str]:
        return {*(super().logged_names() or ()), "train/logit_scale"}

    @property
    def _trained(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.net.parameters() if parameter.requires_grad]

    def on_train_batch_end(self, outputs: Any, batch: dict, batch_idx: int) -> None:
        with torch.no_grad():
            self.net.logit_scale.clamp_(0, math.log(100))
        self.log("train/logit_scale", self.net.logit_scale.detach().exp())


def random_affine(images: Tensor, strength: float) -> Tensor:
    """Shift, scale and rotate each of (B, 3, H, W) a little at random, on a white background."""
    if not strength:
        return images
    uniform = torch.rand(4, len(images), device=images.device, dtype=images.dtype) * 2 - 1
    angle = 0.3 * strength * uniform[0]
    scale = 1 + 0.12 * strength * uniform[1]
    shift = 0.12 * strength * uniform[2:]
    cos, sin = angle.cos() * scale, angle.sin() * scale
    matrix = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
    return F.grid_sample(images - 1, grid, align_corners=False) + 1  # zeros outside mean white
