"""What several ranks do in `test_sharded.py`: `python -m tests.training.ranks FOLDER JOB`, once for each rank, with its place in the environment."""

import os
import sys
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.strategies import DDPStrategy

import unclip_pl._torchvision  # noqa: F401
from unclip_pl.errors import UserError
from unclip_pl.networks.ar_prior import ARPriorConfig
from unclip_pl.networks.prior import PriorTextConfig, PriorTransformerConfig
from unclip_pl.networks.text import TextConfig
from unclip_pl.networks.unet import UNetConfig
from unclip_pl.stages.ar_prior import ARPrior
from unclip_pl.stages.base import OptimizerConfig, Stage
from unclip_pl.stages.decoder import Decoder, DropoutConfig
from unclip_pl.stages.decoder import SamplingConfig as DecoderSampling
from unclip_pl.stages.diffusion_prior import DiffusionPrior, PriorSamplingConfig
from unclip_pl.training.checkpoint import AtomicCheckpointIO, NewestCheckpoint, newest_checkpoint
from unclip_pl.training.ema import EMA
from unclip_pl.training.pictures import Pictures
from unclip_pl.training.prior_monitor import PriorMonitor
from unclip_pl.training.sharded import ShardedStrategy
from unclip_pl.training.variance import AnalyticVariance

STEPS, HALF, DIM, LENGTH = 6, 3, 16, 8
OPTIMIZER = OptimizerConfig(lr=1e-2, warmup_steps=2, weight_decay=0.01, clip_norm=0.5)
TEXT = TextConfig(kind="transformer", vocab_size=64, context_length=LENGTH, width=24, depth=2, heads=2, checkpointing=True)


def decoder() -> Decoder:
    net = UNetConfig(
        image_size=16, width=32, mults=(1, 2), depth=1, attention=(8,), head_width=16, dropout=0.1, embed_dim=DIM, context_width=20, checkpointing=True
    )
    return Decoder(net, TEXT, dropout=DropoutConfig(), sampling=DecoderSampling("ddim", steps=2, guidance_scale=2.0), optimizer=OPTIMIZER)


def prior() -> DiffusionPrior:
    net = PriorTransformerConfig(embed_dim=DIM, width=32, depth=2, heads=2, checkpointing=True)
    text = PriorTextConfig(kind="tokens", vocab_size=64, context_length=LENGTH)
    return DiffusionPrior(net, text, sampling=PriorSamplingConfig("ddpm", steps=2, guidance_scale=2.0), optimizer=OPTIMIZER)


def ar_prior() -> ARPrior:
    stage = ARPrior(ARPriorConfig(embed_dim=DIM, width=32, depth=2, heads=2, max_codes=4, buckets=8, checkpointing=True), TEXT, 0.0, optimizer=OPTIMIZER)
    rows = torch.randn(512, DIM, generator=torch.Generator().manual_seed(0))
    stage.quantizer.fit(rows.mean(0), rows.T.cov(), rows, rows.roll(1, 1))
    return stage


STAGES = {"decoder": decoder, "prior": prior, "ar_prior": ar_prior}


class Samples(torch.utils.data.Dataset):
    """Sample i depends on i alone; `bad` is one whose loss is not finite."""

    def __init__(self, size: int, bad: int | None = None) -> None:
        self.size, self.bad = size, bad

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> dict:
        draw = torch.Generator().manual_seed(i)
        tokens = torch.randint(1, 60, (LENGTH,), generator=draw)
        tokens[LENGTH // 2 + i % 3] = 63
        image = torch.rand(3, 16, 16, generator=draw) * 2 - 1
        embed = torch.randn(2, DIM, generator=draw) * (float("nan") if i == self.bad else 1)
        return {"key": str(i), "image": image, "tokens": tokens, "image_embed": embed[0], "text_embed": embed[1]}


class Data(LightningDataModule):
    """Four samples a rank and batch; each rank has its own."""

    def __init__(self, bad: int | None = None) -> None:
        super().__init__()
        self.bad = bad

    def _loader(self, size: int) -> torch.utils.data.DataLoader:
        mine = range(self.trainer.global_rank, size, self.trainer.world_size)
        return torch.utils.data.DataLoader(torch.utils.data.Subset(Samples(size, self.bad), mine), batch_size=4)

    def train_dataloader(self) -> torch.utils.data.DataLoader:
        return self._loader(4 * self.trainer.world_size * HALF)  # an epoch of HALF steps, so that a resumed run starts with a batch that is known

    def val_dataloader(self) -> torch.utils.data.DataLoader:
        return self._loader(4 * self.trainer.world_size)


class Record(Callback):
    """The loss of each step, averaged over ranks, and what validation logs."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.validation: dict[str, float] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean").item())
        self.norms.append(trainer.callback_metrics["train/grad_norm"].item())

    def on_validation_end(self, trainer, pl_module):
        self.validation = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("val/")}


def fit(folder: Path, stage: Stage, sharded: bool, steps: int = STEPS, resume: Path | None = None, data: Data | None = None, **options) -> dict:
    """Train, and say what came of it; every weight and average whole."""
    record, ema = Record(), EMA(0.9)
    callbacks = [record, ema, NewestCheckpoint(1000), *options.pop("callbacks", [])]
    trainer = Trainer(
        default_root_dir=folder, max_steps=steps, max_epochs=-1, accelerator="cpu", devices=int(os.environ["WORLD"]), logger=False,
        strategy=ShardedStrategy() if sharded else DDPStrategy(), plugins=[AtomicCheckpointIO()], callbacks=callbacks, enable_progress_bar=False,
        enable_model_summary=False, num_sanity_val_steps=0, use_distributed_sampler=False, check_val_every_n_epoch=None, val_check_interval=HALF, **options,
    )
    trainer.fit(stage, data or Data(), ckpt_path=resume)
    full = lambda tensors: {name: t.full_tensor() if hasattr(t, "full_tensor") else t.detach().clone() for name, t in tensors}
    return {
        "losses": record.losses, "norms": record.norms, "validation": record.validation, "weights": full(stage.state_dict().items()),
        "averages": full(ema._averages.items()), "local": sum(getattr(p, "_local_tensor", p).numel() for p in stage.parameters()),
        "skipped": stage.skipped_steps.item(), "name": type(stage).__name__,
    }


def seeded(name: str) -> Stage:
    torch.manual_seed(1)
    return STAGES[name]()


def two(folder: Path) -> dict:
    """All that is compared on two ranks."""
    results = {}
    for name in STAGES:
        for kind in ("ddp", "fsdp"):
            watching = {"decoder": [Pictures(2)], "prior": [PriorMonitor(4, 2), AnalyticVariance(4, 1)], "ar_prior": [PriorMonitor(4, 2)]}[name]
            results[name, kind] = fit(folder / name / kind, seeded(name), kind == "fsdp", callbacks=watching)
    for kind in ("ddp", "fsdp"):
        results["bf16", kind] = fit(folder / "bf16" / kind, seeded("decoder"), kind == "fsdp", precision="bf16-mixed", limit_val_batches=0)
        results["prior bf16", kind] = fit(folder / "prior bf16" / kind, seeded("prior"), kind == "fsdp", precision="bf16-mixed", limit_val_batches=0)
        results["bad", kind] = fit(folder / "bad" / kind, seeded("decoder"), kind == "fsdp", data=Data(bad=9), limit_val_batches=0)  # rank 1, second step
        fit(folder / "half" / kind, seeded("decoder"), kind == "fsdp", HALF, limit_val_batches=0)
    for kind, other in (("ddp", "fsdp"), ("fsdp", "ddp"), ("fsdp", "fsdp"), ("ddp", "ddp")):
        half = newest_checkpoint(folder / "half" / kind)
        results["resumed", kind, other] = fit(folder / "resumed" / kind / other, seeded("decoder"), other == "fsdp", resume=half, limit_val_batches=0)
    results["full disk"] = full_disk(folder / "full")
    return results


def full_disk(folder: Path) -> str:
    """What this rank says when the other cannot write its shard."""
    from torch.distributed.checkpoint import FileSystemWriter

    write = FileSystemWriter.write_data

    def fail(self, plan, planner):
        if torch.distributed.get_rank() == 1:
            raise OSError(28, "No space left on device")
        return write(self, plan, planner)

    fit(folder, seeded("decoder"), True, 1, limit_val_batches=0)
    FileSystemWriter.write_data = fail
    try:
        fit(folder, seeded("decoder"), True, 2, resume=newest_checkpoint(folder), limit_val_batches=0)
    except UserError as error:
        return str(error)
    finally:
        FileSystemWriter.write_data = write
    return ""


def four(folder: Path) -> dict:
    """The weights as four ranks read them from what two wrote, and one step on."""
    stage = seeded("decoder")
    return {"loaded": fit(folder / "four", stage, True, HALF, resume=newest_checkpoint(folder / "half" / "fsdp"), limit_val_batches=0)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    results = {"two": two, "four": four}[sys.argv[2]](folder)
    torch.save(results, folder / f"{sys.argv[2]}-{os.environ['LOCAL_RANK']}.pt")
