"""A callback for tests: it writes down what each step saw and gave, and ends the process as a power cut would."""

import io
import json
import os
import signal
from pathlib import Path

import torch
from lightning.pytorch import Callback


class Diary(Callback):
    """One line of JSON a step: `step`, `rank`, `keys`, `loss` (to the last bit).

    Args:
        path: the file; lines are added.
        kill_at_step: SIGKILL at the end of this step, before its checkpoint.
        kill_at_save: SIGKILL at this step with half of its checkpoint written.
        kill_once: SIGKILL of the last rank at the end of this step, the first time that it comes there.
    """

    def __init__(
        self, path: str, kill_at_step: int = 0, kill_at_save: int = 0, kill_once: int = 0
    ) -> None:
        self.path, self.kill_at_step, self.kill_at_save, self.kill_once = (
            Path(path),
            kill_at_step,
            kill_at_save,
            kill_once,
        )

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        step = trainer.global_step
        with self.path.open("a") as file:
            print(
                json.dumps(
                    {
                        "step": step,
                        "rank": trainer.global_rank,
                        "keys": batch["key"],
                        "loss": outputs["loss"].item().hex(),
                    }
                ),
                file=file,
            )
        if step == self.kill_at_step:
            os.kill(os.getpid(), signal.SIGKILL)
        killed = self.path.with_suffix(".killed")
        if (
            step == self.kill_once
            and trainer.global_rank == trainer.world_size - 1
            and not killed.exists()
        ):
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        if step == self.kill_at_save:
            torch.save = half_and_die


def half_and_die(checkpoint, file, save=torch.save):
    whole = io.BytesIO()
    save(checkpoint, whole)
    file.write(whole.getvalue()[: whole.tell() // 2])
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
