"""The smallest possible stage, a linear fit, for tests of what surrounds a stage."""

import time
from importlib.metadata import version

import numpy as np
import torch
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor, nn

from unclip_pl.cluster import startup
from unclip_pl.cluster.checkpoint_io import AtomicCheckpointIO
from unclip_pl.data.embedding_loader import EmbeddingLoader
from unclip_pl.data.loader_config import EmbeddingLoaderConfig
from unclip_pl.stages.base import OptimizerConfig, Stage


class Toy(Stage):
    def __init__(
        self,
        width: int = 4,
        optimizer: OptimizerConfig = OptimizerConfig(lr=0.1, warmup_steps=2),
        noise: float = 0.01,
    ) -> None:
        super().__init__(width=width, optimizer=optimizer, noise=noise)
        self.noise = noise
        self.net = nn.Linear(width, 1)
        self.register_buffer("counter", torch.zeros((), dtype=torch.int64))

    def loss(self, batch: dict, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        self.counter += 1
        prediction = self.net(batch["x"]).squeeze(1)
        error = prediction - batch["y"] + self.noise * torch.randn(len(prediction))
        return {"loss": error.square().mean() * batch["scale"].mean()}

    def sample(self, batch: dict, noise: object) -> Tensor:
        return batch["image"]


class ToyData(torch.utils.data.Dataset):
    """Sample `i` is the same at each call; the loss of sample `bad` is not finite."""

    def __init__(self, size: int = 64, bad: int | None = None) -> None:
        self.x = torch.randn(size, 4, generator=torch.Generator().manual_seed(0))
        self.bad = bad

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, i: int) -> dict:
        scale = torch.tensor(float("nan") if i == self.bad else 1.0)
        return {
            "key": str(i),
            "x": self.x[i],
            "y": self.x[i].sum(),
            "scale": scale,
            "image": torch.zeros(3, 8, 8),
        }


def trainer(folder, *callbacks, steps: int = 8, **kwargs) -> Trainer:
    return Trainer(
        default_root_dir=folder,
        max_steps=steps,
        max_epochs=-1,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
        plugins=[AtomicCheckpointIO()],
        enable_checkpointing=any("Checkpoint" in type(c).__name__ for c in callbacks),
        **kwargs,
    )


def command(folder, *flags: str, steps: int = 8) -> list[str]:
    """Arguments with which `lightning` trains the toy."""
    return [
        *("fit", "--model", "tests.training.toy.Toy", "--data", "tests.training.toy.ToyRows"),
        *("--trainer.default_root_dir", str(folder), "--trainer.max_steps", str(steps)),
        *("--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", *flags),
    ]


def loader(bad: int | None = None, batch: int = 4, size: int = 64) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(ToyData(size, bad), batch_size=batch)


class ToyRows(LightningDataModule):
    """The same samples through the loader of the priors, for several ranks and resumable."""

    def __init__(self, size: int = 200, batch_size: int = 4) -> None:
        super().__init__()
        self.samples, self.batch_size = ToyData(size), batch_size

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: np.ndarray) -> dict:
        return {
            "key": [str(i) for i in index],
            "x": self.samples.x[index],
            "y": self.samples.x[index].sum(1),
            "scale": torch.ones(len(index)),
        }

    def train_dataloader(self) -> EmbeddingLoader:
        rank, world = self.trainer.global_rank, self.trainer.world_size
        return EmbeddingLoader(self, EmbeddingLoaderConfig(self.batch_size), rank=rank, world=world)


class ToyRowsAndMore(ToyRows):
    """`ToyRows` with 16 batches for validation."""

    def val_dataloader(self) -> torch.utils.data.DataLoader:
        return loader()


class Slow(Callback):
    """Makes each step slow, so that a test can interrupt the run."""

    def __init__(self, seconds: float = 0.1) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, *_, **__) -> None:
        time.sleep(self.seconds)


class Hang(Callback):
    """One step never ends, on one rank."""

    def __init__(self, step: int, rank: int = 0) -> None:
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer: Trainer, *_, **__) -> None:
        if trainer.global_step == self.step and trainer.global_rank == self.rank:
            hang_here()


def hang_here() -> None:
    while True:
        time.sleep(1)


class OtherVersion(Callback):
    """One rank reports another version of torch."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def setup(self, trainer: Trainer, pl_module: Stage, stage: str) -> None:
        if trainer.global_rank == self.rank:
            startup.version = lambda name: "0.0.1" if name == "torch" else version(name)
