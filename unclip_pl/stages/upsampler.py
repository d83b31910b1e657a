"""The upsamplers 64 -> 256 and 256 -> 1024: diffusion on crops (unCLIP section 2.1).

The only condition is the image at a quarter of the side.

An ADM U-Net without attention, so that a network trained on crops works on whole images of any
size. No caption, no embedding, no guidance.
"""

import copy
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from unclip_pl.diffusion.guidance import thresholded
from unclip_pl.diffusion.losses import training_losses
from unclip_pl.diffusion.noise import Noise
from unclip_pl.diffusion.process import DiffusionConfig, Predict, Prediction, Process
from unclip_pl.diffusion.sampler_config import SamplerConfig
from unclip_pl.diffusion.samplers import SAMPLERS
from unclip_pl.diffusion.schedule import Spacing
from unclip_pl.diffusion.training_draws import draw_timesteps_and_noise
from unclip_pl.networks.unet import UNet, UNetConfig
from unclip_pl.stages.base import OptimizerConfig, Stage
from unclip_pl.utils.errors import UserError

NET: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "low_res_channels": 3,
    "attention": (),
    "middle_attention": False,
    "embed_dim": 0,
    "context_width": 0,
}


@dataclass(frozen=True)
class UpsamplingConfig(SamplerConfig):
    """How an upsampler samples; every value can be changed after training."""

    owner: ClassVar[str] = "An upsampler"

    steps: Spacing = 27
    """A number, numbers for equal sections, "fast27" or "ddimK"; see `Schedule.respaced`."""
    threshold: Literal["static"] | None = "static"
    """Keeps x_0 in [-1, 1] at each step, or not."""


class Upsampler(Stage):
    """Trains on `image` (B, 3, H, W) and degraded `low_res` (B, 3, H/4, W/4) of a batch.

    It samples from `low_res`.

    Args:
        net: the U-Net, without attention. `image_size` is the side of the images that it is for;
            its crops may be smaller.
        diffusion: the process, with a fixed variance.
        sampling: how to sample.
        residual_std: root mean square of images minus their enlarged low_res, on [-1, 1]. If it is
            not 0, the network predicts, at unit scale, what a linear estimate of v from x_t and
            low_res leaves, as EDM (Karras et al. 2022, sigma_data) does with x_t: colours are right
            from the first step. 0: it predicts all of its target, as in the paper.
        clamp_condition: keep the enlarged low_res in [-1, 1]. Bicubic enlargement overshoots at
            edges; guided-diffusion, GLIDE and Karlo do not clamp.
        last_net: a second network of the same shape draws the last step (Karlo, whose second one
            was tuned for sharp edges). Training leaves it as it is: it comes from weights that have
            one.

    Raises:
        ValueError: settings that do not fit each other.
    """

    factor = 4
    """Side of the output divided by the side of `low_res`."""

    scalars = ("loss", "mse")
    legacy_defaults = {"clamp_condition": True}

    def __init__(
        self,
        net: UNetConfig = UNetConfig(image_size=256, dropout=0.0, **NET),  # type: ignore[arg-type]
        diffusion: DiffusionConfig = DiffusionConfig(parametrization="v", variance="fixed_small"),
        sampling: UpsamplingConfig = UpsamplingConfig(),
        residual_std: float = 0.0,
        optimizer: OptimizerConfig = OptimizerConfig(lr=1.2e-4),
        clamp_condition: bool = False,
        last_net: bool = False,
    ) -> None:
        super().__init__(
            net=net,
            diffusion=diffusion,
            sampling=sampling,
            residual_std=residual_std,
            optimizer=optimizer,
            clamp_condition=clamp_condition,
            last_net=last_net,
        )
        self.net_config: UNetConfig = self.config.net
        self.sampling: UpsamplingConfig = self.config.sampling
        self.residual_std, self.clamp_condition = residual_std, clamp_condition
        self.process = Process(self.config.diffusion)
        self.count_steps()  # refuses what is impossible at once
        self._check_settings()
        self.net = UNet(self.net_config)
        self.net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.last_net = copy.deepcopy(self.net).requires_grad_(False) if last_net else None

    def _check_settings(self) -> None:
        for name, value in NET.items():
            if getattr(self.net_config, name) != value:
                shown = list(value) if isinstance(value, tuple) else value
                raise ValueError(
                    "The network of an upsampler sees x_t and low_res, gives what it predicts, and "
                    f"has no attention: set model.net {name}: {shown}."
                )
        if self.process.config.variance == "learned_range":
            raise ValueError(
                "An upsampler learns no variance (DDIM does not use it): set "
                "model.diffusion.variance to fixed_small or fixed_large."
            )
        predicts_v = self.process.config.parametrization == "v"
        if self.residual_std < 0 or (self.residual_std and not predicts_v):
            raise ValueError(
                f"model.residual_std is {self.residual_std}: give 0, or the root mean square with "
                "model.diffusion.parametrization v."
            )

    @property
    def stride(self) -> int:
        """The sides of the network's images must be multiples of this."""
        return self.net_config.patch_size * 2 ** (len(self.net_config.mults) - 1)

    def use_data(self, data: Any) -> None:
        self.check_data(data)  # there is no CLIP to agree with

    def check_data(self, data: Any) -> None:
        if not hasattr(data, "crop"):
            raise UserError(
                "An upsampler trains on crops and their low_res, which "
                f"{type(data).__name__} does not give: set data to UpsamplerData."
            )
        if data.image_size != self.net_config.image_size:
            raise UserError(
                f"data.image_size is {data.image_size} and model.net.image_size is "
                f"{self.net_config.image_size}: make them equal."
            )
        for name in ("crop", "val_crop"):
            if (side := getattr(data, name)) % self.stride:
                raise UserError(
                    f"data.{name} is {side}, and the network needs a multiple of {self.stride}: "
                    f"change data.{name}."
                )

    def on_fit_start(self) -> None:
        """Raise a UserError where training begins without weights for `last_net`."""
        if self.last_net is not None and not bool(self.last_net.conv_out.weight.any()):
            raise UserError(
                "model.last_net is true, and that network is not trained here: start from weights "
                "that have one (--init), or set model.last_net to false."
            )

    def enlarged(self, low_res: Tensor) -> Tensor:
        """The condition as the network sees it: (B, 3, h, w) in [-1, 1] -> (B, 3, 4h, 4w), bicubic.

        At edges it overshoots [-1, 1] by up to some tenths, unless `clamp_condition` is set.
        """
        large = F.interpolate(
            low_res.float(), scale_factor=self.factor, mode="bicubic", antialias=True
        )
        return large.clamp(-1, 1) if self.clamp_condition else large

    def _linear(self, x_t: Tensor, t: Tensor, enlarged: Tensor) -> tuple[Tensor, Tensor]:
        """An estimate of v (B, 3, H, W), and its root mean square error (B, 1, 1, 1).

        E[v | x_t] for x_0 ~ N(enlarged, s^2), with s a fifth of `residual_std`: the network can
        tell most of the difference from low_res, and x_t has it only with noise that would have to
        be removed again. The error is that for x_0 ~ N(enlarged, residual_std^2). Without
        `residual_std`: 0 and 1.
        """
        alpha, sigma = self.process.forward_weights[t].view(-1, 2, 1, 1, 1).unbind(1)
        if not self.residual_std:
            return torch.zeros_like(x_t), torch.ones_like(alpha)
        variance = (self.residual_std / 5) ** 2
        total = alpha**2 * variance + sigma**2
        mean = sigma / total * (alpha * (1 - variance) * x_t - enlarged)
        error = ((sigma * self.residual_std) ** 2 + (alpha * variance) ** 2).sqrt() / total
        return mean, error

    def predict_target(
        self, x_t: Tensor, t: Tensor, enlarged: Tensor, net: UNet | None = None
    ) -> tuple[Tensor, Tensor]:
        """Predict the process's target, and give the scale of the network's own part in it.

        The network is `net`; None: the trained one.
        """
        mean, scale = self._linear(x_t, t, enlarged)
        return mean + scale * (net or self.net)(x_t, t, low_res=enlarged), scale

    def loss(self, batch: dict, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        image = batch["image"].contiguous(memory_format=torch.channels_last)
        t, noise = draw_timesteps_and_noise(image, self.process.config.timesteps, generator)
        x_t = self.process.diffuse(image, t, noise)
        output, scale = self.predict_target(x_t, t, self.enlarged(batch["low_res"]))
        mse = training_losses(output, image, x_t, t, noise, self.process).mse
        own_mse = mse / scale.flatten().square()  # that of the network's output
        return {"loss": own_mse.mean(), "mse": mse.mean(), "t": t, "per_sample": own_mse}

    @torch.no_grad()
    def sample(
        self,
        batch: dict,
        noise: Noise,
        sampling: UpsamplingConfig | None = None,
        callback: Any = None,
    ) -> Tensor:
        """Draw images at four times the side.

        Args:
            batch: `low_res` (B, 3, h, w) in [-1, 1], of any h and w: sides that the network cannot
                take are padded by reflection, and the result is cropped.
            noise: one generator per image; their number is B.
            sampling: settings in place of the stage's own.
            callback: called with (step, steps) after each step.

        Returns:
            float32 (B, 3, 4h, 4w) in [-1, 1].
        """
        settings = sampling or self.sampling
        enlarged = self.enlarged(batch["low_res"])
        height, width = enlarged.shape[-2:]
        down, right = -height % self.stride, -width % self.stride
        mode = "reflect" if down < height and right < width else "replicate"
        enlarged = F.pad(enlarged, (0, right, 0, down), mode)
        enlarged = enlarged.contiguous(memory_format=torch.channels_last)
        schedule = self.process.schedule.respaced(settings.steps)

        def predictor(net: UNet) -> Predict:
            predict = self.process.adapt(
                lambda x, t: self.predict_target(x, t, enlarged, net)[0], schedule
            )
            return self.wrap_predict(thresholded(predict, self.process, settings.threshold))

        predict = predictor(self.net)
        if self.last_net is not None:
            predict = in_turn(predict, predictor(self.last_net), len(schedule))
        x = noise(enlarged.shape[1:], self.device)
        sampler = SAMPLERS[settings.sampler]
        images = sampler(predict, x, schedule, noise=noise, eta=settings.eta, callback=callback)
        return images[..., :height, :width].clamp(-1, 1)


def in_turn(first: Predict, last: Predict, steps: int) -> Predict:
    """`last` for the last of so many steps, `first` before it; a sampler calls it once per step."""
    calls = count(1)

    def predict(x: Tensor, t: Tensor) -> Prediction:
        return (first if next(calls) < steps else last)(x, t)

    return predict


class Upsampler256(Upsampler):
    """Upsampler 64 -> 256: cosine schedule, 27 steps (unCLIP Table 3).

    Trained on conditions degraded by Gaussian blur.
    """


class Upsampler1024(Upsampler):
    """Upsampler 256 -> 1024: linear schedule, 15 steps (unCLIP Table 3).

    Trained on conditions degraded by BSR-light.
    """

    def __init__(
        self,
        net: UNetConfig = UNetConfig(
            image_size=1024, width=64, mults=(1, 1, 2, 2, 4, 4), depth=2, dropout=0.0, **NET
        ),
        diffusion: DiffusionConfig = DiffusionConfig(
            schedule="linear", parametrization="v", variance="fixed_small"
        ),
        sampling: UpsamplingConfig = UpsamplingConfig(steps=15),
        residual_std: float = 0.0,
        optimizer: OptimizerConfig = OptimizerConfig(lr=1.0e-4),
        clamp_condition: bool = False,
        last_net: bool = False,
    ) -> None:
        super().__init__(
            net, diffusion, sampling, residual_std, optimizer, clamp_condition, last_net
        )
