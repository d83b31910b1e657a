"""The checkpoints that a run writes: the newest, to resume from, and the best, to sample from."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from unclip_pl.cluster.checkpoint_io import checkpoint_folder
from unclip_pl.utils.files import remove, remove_leftovers


class NewestCheckpoint(Checkpoint):
    """Saves the checkpoint to resume from, `newest-step=N.ckpt`, every so often and at the end.

    Earlier ones that this run wrote, or resumed from in its own folder, are then removed, and no
    others. A run that is asked to stop saves at that step, where its position in the data is exact.

    Args:
        every_n_train_steps: steps between two checkpoints.
    """

    def __init__(self, every_n_train_steps: int = 500) -> None:
        if every_n_train_steps < 1:
            raise ValueError(
                f"newest.every_n_train_steps is {every_n_train_steps}: give 1 or more."
            )
        self.every_n_train_steps = every_n_train_steps
        self._saved_step = -1
        self._last_step = -1
        self._stop = False  # asked for while gradients were accumulated
        self._replaceable: list[str] = []  # checkpoints that the next one replaces

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._saved_step = self._last_step = trainer.global_step
        self._stop = False
        folder = checkpoint_folder(trainer)
        source = Path(trainer.ckpt_path or "")
        if source.resolve().parent != folder.resolve():
            self._replaceable = []  # the names that were loaded belong to another folder
        elif source.name.startswith("newest-"):
            self._replaceable.append(source.name)
        if trainer.is_global_zero:
            remove_leftovers(folder, "*.ckpt")  # of a run that was killed while it wrote

    def on_train_batch_end(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        accumulating = trainer.global_step == self._last_step
        self._last_step = trainer.global_step
        if accumulating:  # a checkpoint has no gradients: the step ends first
            self._stop |= trainer.should_stop
            trainer.should_stop = False
        else:
            trainer.should_stop |= self._stop
        if trainer.global_step % self.every_n_train_steps == 0 or trainer.should_stop:
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]  # set outside of the class
            return
        if trainer.global_step == self._saved_step:
            return
        self._saved_step = trainer.global_step
        folder = checkpoint_folder(trainer)
        path = folder / f"newest-step={trainer.global_step}.ckpt"
        # All names are saved: the process may be killed before the old ones are removed.
        old = list(dict.fromkeys(self._replaceable))
        self._replaceable = [*old, path.name]
        trainer.save_checkpoint(path)
        for name in old:
            if trainer.is_global_zero and name != path.name:
                remove(folder / name)
        self._replaceable = [path.name]

    def state_dict(self) -> dict[str, Any]:
        return {"own": self._replaceable}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._replaceable = list(state_dict["own"])


class BestCheckpoint(ModelCheckpoint):
    """Saves the checkpoint to sample from, `best-step=N.ckpt`, after each best validation so far.

    Args:
        monitor: the logged value to compare.
        mode: "min" where smaller is better, else "max".
    """

    def __init__(self, monitor: str = "val/loss", mode: str = "min") -> None:
        super().__init__(
            filename="best-{step}",
            monitor=monitor,
            mode=mode,
            save_top_k=1,
            save_on_train_epoch_end=False,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.dirpath = str(checkpoint_folder(trainer).absolute())
        super().setup(trainer, pl_module, stage)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the best one so far, in a copy of the run's folder too.

        Where another folder lacks it, the first validation is the best.
        """
        folder = str(self.dirpath)
        if state_dict["dirpath"] != folder:
            path = Path(folder) / Path(state_dict["best_model_path"]).name
            if not state_dict["best_model_path"] or not path.exists():
                return
            state_dict = state_dict | {
                "dirpath": folder,
                "best_model_path": str(path),
                "kth_best_model_path": str(path),
                "best_k_models": {str(path): state_dict["best_model_score"]},
            }
        super().load_state_dict(state_dict)
