"""A module that records its batches, and fits of it, for tests."""

import torch
from lightning.pytorch import Callback, LightningModule

from tests.data.shardkit import FakeCLIP
from tests.training.toy import trainer
from unclip_pl.data.loader_config import LoaderConfig


class Recorder(LightningModule):
    """Trains nothing in particular and remembers the keys of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.keys, self.val_keys = torch.nn.Linear(1, 1), [], []

    def training_step(self, batch, batch_idx):
        self.keys.append(batch["key"])
        return self.net(torch.ones(1)).sum()

    def validation_step(self, batch, batch_idx):
        self.val_keys.append(batch["key"])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class SaveAt(Callback):
    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(data, folder, steps, *callbacks, ckpt=None, **kwargs) -> Recorder:
    module = Recorder()
    trainer(folder, *callbacks, steps=steps, **kwargs).fit(module, datamodule=data, ckpt_path=ckpt)
    return module


def data_of(kind, shards, val=None, store=None, **loader):
    config = LoaderConfig(**{"batch_size": 4, "num_workers": 0, "window": 2, **loader})
    data = kind(
        train=shards,
        val=val,
        image_size=8,
        loader=config,
        **({"store": str(store)} if store else {}),
    )
    data.clip = FakeCLIP()
    return data
