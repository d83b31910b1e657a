"""A callback for tests that records each step and can kill the process as a power cut would."""

import io
import json
import os
import signal
from pathlib import Path

import torch
from lightning.pytorch import Callback


class Diary(Callback):
    """Writes one line of JSON per step: `step`, `rank`, `keys`, `loss` (as hexadecimal).

    Args:
        path: the file; lines are added.
        kill_at_step: SIGKILL at the end of this step, before its checkpoint.
        kill_at_save: SIGKILL at this step with half of its checkpoint written.
        kill_once: SIGKILL of the last rank at the end of this step, in the first run only.
    """

    def __init__(
        self, path: str, kill_at_step: int = 0, kill_at_save: int = 0, kill_once: int = 0
    ) -> None:
        self.path = Path(path)
        self.kill_at_step = kill_at_step
        self.kill_at_save = kill_at_save
        self.kill_once = kill_once

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        step, rank = trainer.global_step, trainer.global_rank
        loss = outputs["loss"].item().hex()
        line = {"step": step, "rank": rank, "keys": batch["key"], "loss": loss}
        with self.path.open("a") as file:
            print(json.dumps(line), file=file)
        if step == self.kill_at_step:
            os.kill(os.getpid(), signal.SIGKILL)
        killed = self.path.with_suffix(".killed")
        is_last_rank = rank == trainer.world_size - 1
        if step == self.kill_once and is_last_rank and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self.kill_at_save:
            torch.save = half_and_die


def half_and_die(checkpoint, file, save=torch.save):
    """Write half of a checkpoint and kill this process."""
    whole = io.BytesIO()
    save(checkpoint, whole)
    file.write(whole.getvalue()[: whole.tell() // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
