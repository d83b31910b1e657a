"""One training step of the 64x64 decoder: the real stage, AdamW, clipping, EMA and logger, under our Lightning trainer.

The network has the shape that the other systems are timed with: 64 channels x 1, 2, 3, 4, two blocks a level, attention at 32, 16 and 8,
captions as 77 states of 512. `--mode bare` steps the same module in a plain loop: what the trainer costs is the difference.
"""

import tempfile
import time
from typing import Any

from _common import begin, flops_of, parser, peak_mib, report, wait  # sets what must be set before torch

# isort: split
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.data import DataLoader

from unclip_pl.networks.text import TextConfig
from unclip_pl.networks.unet import UNetConfig
from unclip_pl.stages.base import OptimizerConfig
from unclip_pl.stages.decoder import Decoder, SamplingConfig
from unclip_pl.training.ema import EMA
from unclip_pl.training.progress import LossByTimestep, Progress

EMBED, STATES, LENGTH = 512, 512, 77


def decoder(checkpointing: bool = False) -> Decoder:
    """The decoder of the comparison, with random weights."""
    net = UNetConfig(
        width=64, mults=(1, 2, 3, 4), depth=2, attention=(32, 16, 8), embed_dim=EMBED, context_width=256, dropout=0.0, checkpointing=checkpointing
    )
    sampling = SamplingConfig(sampler="ddpm", steps=5, guidance_scale=2.0)
    return Decoder(net, TextConfig(kind="states", states_width=STATES), sampling=sampling, optimizer=OptimizerConfig(lr=1e-4, warmup_steps=0))


def batch_of(size: int) -> dict[str, Any]:
    """Random images and conditions, as the DataModule gives them."""
    return {
        "key": [str(i) for i in range(size)], "image": torch.rand(size, 3, 64, 64) * 2 - 1, "image_embed": torch.randn(size, EMBED),
        "text_embed": torch.randn(size, EMBED), "text_states": torch.randn(size, LENGTH, STATES), "text_mask": torch.ones(size, LENGTH, dtype=torch.bool),
    }


class Clock(Callback):
    """Seconds from the end of one step to the end of the next; the first ones belong to the warm-up."""

    def __init__(self, device: str) -> None:
        self.device, self.ends = device, []

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        wait(self.device)
        self.ends.append(time.perf_counter())


def trained(module: Decoder, batch: dict[str, Any], given: Any) -> list[float]:
    """Seconds a step under the trainer that `lightning fit` makes: EMA, progress bar, monitors, TensorBoard."""
    clock, steps = Clock(given.device), given.warmup + given.repeats + 1
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            max_steps=steps, accelerator=given.device.split(":")[0], devices=1, precision="bf16-mixed" if given.dtype == "bf16" else "32-true",
            callbacks=[EMA(0.9999), Progress(), LossByTimestep(), clock], logger=TensorBoardLogger(folder, name="", version=""),
            enable_checkpointing=False, enable_model_summary=False, log_every_n_steps=25, default_root_dir=folder, use_distributed_sampler=False,
        )
        trainer.fit(module, DataLoader([batch] * steps, batch_size=None))
    return [b - a for a, b in zip(clock.ends[given.warmup :], clock.ends[given.warmup + 1 :])]


def bare(module: Decoder, batch: dict[str, Any], given: Any) -> list[float]:
    """Seconds a step of the same module, optimiser and EMA in a plain loop."""
    module.to(given.device)
    batch = {key: value.to(given.device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)
    averages = [p.detach().clone() for p in module.parameters()]
    times = []
    for _ in range(given.warmup + given.repeats):
        start = time.perf_counter()
        with torch.autocast(given.device.split(":")[0], torch.bfloat16, enabled=given.dtype == "bf16"):
            loss = module.loss(batch)["loss"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch._foreach_lerp_(averages, [p.detach() for p in module.parameters()], 1e-4)
        wait(given.device)
        times.append(time.perf_counter() - start)
    return times[given.warmup :]


def main() -> None:
    arguments = parser(__doc__, repeats=7, warmup=2, batch=4)
    arguments.add_argument("--mode", choices=["trainer", "bare"], default="trainer")
    arguments.add_argument("--checkpointing", action="store_true", help="compute activations again in the backward pass")
    given = arguments.parse_args()
    before = begin(given)
    seed_everything(0, verbose=False)
    module, batch = decoder(given.checkpointing).train(), batch_of(given.batch)
    times = {"trainer": trained, "bare": bare}[given.mode](module, batch, given)
    peak = peak_mib()  # counting the operations takes memory of its own
    flops = flops_of(lambda: module.loss(batch)["loss"].backward())
    report(
        "decoder_train", given, times, given.batch, before, f"unclip_pl/{given.mode}",
        params=sum(p.numel() for p in module.parameters()), flops_per_step=flops, peak_rss_mib=peak,
    )


if __name__ == "__main__":
    main()
