"""What several ranks do in `test_sharded.py`: `python -m tests.cluster.ranks FOLDER JOB`.

The program is started once per rank, with the rank in the environment.
"""

import os
import shutil
import sys
from functools import partial
from pathlib import Path

import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.tensor import DTensor

from unclip_pl.cluster.checkpoint_io import AtomicCheckpointIO
from unclip_pl.cluster.sharded import ShardedStrategy
from unclip_pl.data.loader import collate
from unclip_pl.diffusion.process import DiffusionConfig
from unclip_pl.networks.ar_prior import ARPriorConfig
from unclip_pl.networks.compilation import compile_blocks
from unclip_pl.networks.layers import Block
from unclip_pl.networks.prior import PriorTextConfig, PriorTransformerConfig
from unclip_pl.networks.text import TextConfig
from unclip_pl.networks.unet import UNetConfig
from unclip_pl.stages import base
from unclip_pl.stages.ar_prior import ARPrior
from unclip_pl.stages.base import OptimizerConfig, Stage
from unclip_pl.stages.decoder import CondDropoutConfig, Decoder
from unclip_pl.stages.decoder import DecoderSamplingConfig as DecoderSampling
from unclip_pl.stages.diffusion_prior import DiffusionPrior, PriorSamplingConfig
from unclip_pl.training.checkpoints import NewestCheckpoint
from unclip_pl.training.ema import EMA
from unclip_pl.training.pictures import Pictures
from unclip_pl.training.prior_monitor import PriorMonitor
from unclip_pl.training.variance import AnalyticVariance
from unclip_pl.utils.errors import UserError

STEPS, HALF, DIM, LENGTH = 4, 2, 16, 8
# With a smaller eps AdamW makes full steps of the rounding noise in gradients that are zero, such
# as that of a convolution's bias before GroupNorm.
OPTIMIZER = OptimizerConfig(lr=1e-2, eps=1e-3, warmup_steps=2, weight_decay=0.01, clip_norm=0.5)
TEXT = TextConfig(
    kind="transformer",
    vocab_size=64,
    context_length=LENGTH,
    width=24,
    depth=1,
    heads=2,
    checkpointing="full",
)


def decoder() -> Decoder:
    net = UNetConfig(
        image_size=16,
        width=32,
        mults=(1, 2),
        depth=1,
        attention=(8,),
        head_width=16,
        dropout=0.1,
        embed_dim=DIM,
        context_width=20,
        thumbnail=4,
        thumbnail_width=16,
        checkpointing="selective",
    )
    return Decoder(
        net,
        TEXT,
        cond_dropout=CondDropoutConfig(),
        sampling=DecoderSampling("ddim", steps=2, guidance_scale=2.0),
        optimizer=OPTIMIZER,
    )


def prior() -> DiffusionPrior:
    net = PriorTransformerConfig(embed_dim=DIM, width=32, depth=2, heads=2, checkpointing="full")
    text = PriorTextConfig(kind="tokens", vocab_size=64, context_length=LENGTH)
    process = DiffusionConfig(timesteps=8, parametrization="x0", variance="fixed_small")
    sampling = PriorSamplingConfig("ddpm", steps=2, guidance_scale=2.0)
    return DiffusionPrior(net, text, process, sampling=sampling, optimizer=OPTIMIZER)


def ar_prior() -> ARPrior:
    net = ARPriorConfig(
        embed_dim=DIM,
        width=32,
        depth=2,
        heads=2,
        max_codes=4,
        buckets=8,
        checkpointing="selective",
    )
    stage = ARPrior(net, TEXT, 0.0, optimizer=OPTIMIZER)
    rows = torch.randn(512, DIM, generator=torch.Generator().manual_seed(0))
    stage.quantizer.fit(rows.mean(0), rows.T.cov(), rows, rows.roll(1, 1))
    return stage


STAGES = {"decoder": decoder, "prior": prior, "ar_prior": ar_prior}
WATCHING = {
    "decoder": lambda: [Pictures(2)],
    "prior": lambda: [PriorMonitor(4, 2), AnalyticVariance(4, 1)],
    "ar_prior": lambda: [PriorMonitor(4, 2)],
}


def sample(i: int) -> dict:
    """Sample `i`, the same at each call."""
    draw = torch.Generator().manual_seed(i)
    tokens = torch.randint(1, 60, (LENGTH,), generator=draw)
    tokens[LENGTH // 2 + i % 3] = 63
    embed = torch.randn(2, DIM, generator=draw)
    return {
        "key": str(i),
        "image": torch.rand(3, 16, 16, generator=draw) * 2 - 1,
        "tokens": tokens,
        "image_embed": embed[0],
        "text_embed": embed[1],
    }


class Batches:
    """Batches of four samples. The loss of rank 1 is not finite at batch `bad`."""

    def __init__(self, rank: int, count: int, bad: int | None = None) -> None:
        self.rank, self.count, self.bad, self.done = rank, count, bad, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self):
        self.done = 0 if self.done == self.count else self.done
        while self.done < self.count:
            batch = collate([sample(1000 * self.rank + 4 * self.done + i) for i in range(4)])
            if self.rank == 1 and self.done == self.bad:
                batch["image"].fill_(float("nan"))
            self.done += 1
            yield batch

    def state_dict(self) -> dict:
        return {"done": self.done}

    def load_state_dict(self, state: dict) -> None:
        self.done = state["done"]


class Data(LightningDataModule):
    def train_dataloader(self) -> Batches:
        return Batches(self.trainer.global_rank, 2 * STEPS, bad=HALF)

    def val_dataloader(self) -> Batches:
        return Batches(self.trainer.global_rank, 1)


class Record(Callback):
    """Records the loss of each step, averaged over ranks, and what validation logs."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []
        self.validation: dict[str, float] = {}
        self.loaded: dict = {}

    def on_train_start(self, trainer, pl_module):
        self.loaded = whole(pl_module.state_dict().items())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        loss = trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")
        self.losses.append(loss.item())
        self.norms.append(trainer.callback_metrics["train/grad_norm"].item())

    def on_validation_end(self, trainer, pl_module):
        self.validation = {
            name: value.item()
            for name, value in trainer.callback_metrics.items()
            if name.startswith("val/")
        }


class Halfway(Callback):
    """Saves a checkpoint; the last callback, so that the others have finished the step."""

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == HALF:
            trainer.save_checkpoint(Path(trainer.default_root_dir) / "half.ckpt")


def whole(tensors) -> dict:
    """Named tensors, gathered if they are sharded and copied if they are not."""
    return {
        name: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()
        for name, tensor in tensors
    }


def fit(
    folder: Path,
    stage: Stage,
    sharded: bool,
    steps: int = STEPS,
    resume: Path | None = None,
    callbacks=(),
    **options,
) -> dict:
    """Train and return what the tests compare, with whole weights and averages."""
    record, ema = Record(), EMA(0.9)
    trainer = Trainer(
        default_root_dir=folder,
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        devices=int(os.environ["WORLD"]),
        logger=False,
        strategy=ShardedStrategy() if sharded else DDPStrategy(),
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=False,
        callbacks=[record, ema, NewestCheckpoint(1000), *callbacks, Halfway()],
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        check_val_every_n_epoch=None,
        val_check_interval=HALF,
        limit_val_batches=1 if callbacks else 0,
        **options,
    )
    trainer.fit(stage, Data(), ckpt_path=resume)
    return {
        "losses": record.losses,
        "norms": record.norms,
        "validation": record.validation,
        "loaded": record.loaded,
        "weights": whole(stage.state_dict().items()),
        "averages": whole(ema._averages.items()),
        "skipped": stage.skipped_steps.item(),
        "class": type(stage).__name__,
        "held": sum(getattr(p, "_local_tensor", p).numel() for p in stage.parameters()),
    }


def seeded(name: str) -> Stage:
    torch.manual_seed(1)
    return STAGES[name]()


def compiled(folder: Path, name: str) -> dict:
    """A sharded run of compiled blocks, traced as usual but run without generated code."""
    stage, inductor = seeded(name), base.compile_blocks
    stage.compile_networks = True
    base.compile_blocks = partial(compile_blocks, backend="aot_eager")
    try:
        results = fit(folder, stage, True, HALF)
    finally:
        base.compile_blocks = inductor
    return results | {"graphs": torch._dynamo.utils.counters["stats"]["unique_graphs"]}


def two(folder: Path) -> dict:
    """All that is compared on two ranks."""
    results = {}
    for name in STAGES:
        for kind in ("ddp", "fsdp"):
            results[name, kind] = fit(
                folder / name / kind,
                seeded(name),
                kind == "fsdp",
                STEPS if name == "decoder" else HALF,
                callbacks=WATCHING[name](),
            )
    for name, kind in (("prior", "ddp"), ("prior", "fsdp"), ("decoder", "fsdp")):
        results["bf16", name, kind] = fit(
            folder / "bf16" / name / kind,
            seeded(name),
            kind == "fsdp",
            HALF,
            callbacks=WATCHING[name](),
            precision="bf16-mixed",
        )
    for name in ("prior", "ar_prior"):
        results["compiled", name] = compiled(folder / "compiled" / name, name)
    for kind, other in (("ddp", "fsdp"), ("fsdp", "ddp"), ("fsdp", "fsdp")):
        half = folder / "decoder" / kind / "half.ckpt"
        results["resumed", kind, other] = fit(
            folder / f"{kind} to {other}", seeded("decoder"), other == "fsdp", resume=half
        )
    results["broken"] = broken(folder / "broken")
    results["full disk"] = full_disk(folder / "full", folder / "prior" / "fsdp" / "half.ckpt")
    return results


class OutOfMemory(Callback):
    """An error inside a block, when its weights are gathered, in validation."""

    def on_validation_batch_end(self, trainer, pl_module, outputs, batch, *_):
        block = next(module for module in pl_module.modules() if isinstance(module, Block))

        def fail(*_):
            raise RuntimeError("out of memory")

        next(block.children()).register_forward_pre_hook(fail)
        pl_module.loss(batch)


def broken(folder: Path) -> str:
    """The error of a run that fails in validation."""
    try:
        fit(folder, seeded("prior"), True, callbacks=[OutOfMemory()])
    except RuntimeError as error:
        return str(error)
    return ""


def full_disk(folder: Path, half: Path) -> str:
    """The error on this rank when the other cannot write its shard."""
    write = FileSystemWriter.write_data

    def fail(self, plan, planner):
        if torch.distributed.get_rank() == 1:
            raise OSError(28, "No space left on device")
        return write(self, plan, planner)

    if os.environ["LOCAL_RANK"] == "0":
        shutil.copytree(half, folder / "checkpoints" / f"newest-step={HALF}.ckpt")
    FileSystemWriter.write_data = fail
    try:
        fit(folder, seeded("prior"), True, HALF + 1, resume=half)
    except UserError as error:
        return str(error)
    finally:
        FileSystemWriter.write_data = write
    return ""


def four(folder: Path) -> dict:
    """The weights as four ranks read them from what two wrote, and a step with them."""
    half = folder / "prior" / "fsdp" / "half.ckpt"
    return {"four": fit(folder / "four", seeded("prior"), True, HALF + 1, resume=half)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    results = {"two": two, "four": four}[sys.argv[2]](folder)
    torch.save(results, folder / f"{sys.argv[2]}-{os.environ['LOCAL_RANK']}.pt")
