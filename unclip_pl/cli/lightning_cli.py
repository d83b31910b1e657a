"""Lightning's command line for the stages, with the callbacks that every run has.

Each layer says only what differs: defaults of dataclasses < lightning_config/default.yaml < -c
stage < further -c overlays < flags.
"""

import dataclasses
import inspect
import sys
import typing
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import lightning.pytorch
import yaml
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_info

from unclip_pl.cli.config_checks import COMMANDS, check_settings
from unclip_pl.cli.configs import config_folder
from unclip_pl.cluster.checkpoint_io import read_settings, step_of
from unclip_pl.cluster.preemption import Preemption
from unclip_pl.cluster.startup import StartupCheck
from unclip_pl.cluster.watchdog import Watchdog
from unclip_pl.datamodules import (  # noqa: F401  YAMLs name their classes
    embedding_job,
    image_text,
    prior,
    upsampler,
)
from unclip_pl.pipeline.weights import load_pretrained
from unclip_pl.stages import load_all
from unclip_pl.stages.base import Stage
from unclip_pl.stages.settings import changes, settings_of
from unclip_pl.training.arguments import add_model_flags
from unclip_pl.training.checkpoints import BestCheckpoint, NewestCheckpoint
from unclip_pl.training.ema import EMA
from unclip_pl.training.lora import LoRA
from unclip_pl.training.mirror import Mirror, mirrored
from unclip_pl.training.monitored import require_logged
from unclip_pl.training.pictures import Pictures
from unclip_pl.training.run_folder import (
    CONFIG,
    RunConfig,
    claim_folder,
    find_checkpoint,
    refuse_search,
)
from unclip_pl.training.trainer import Trainer, fix_train_batches
from unclip_pl.utils.commands import Parser
from unclip_pl.utils.errors import SharedError, UserError

CALLBACKS = {
    "preemption": Preemption,
    "startup": StartupCheck,
    "watchdog": Watchdog,
    "ema": EMA,
    "newest": NewestCheckpoint,
    "best": BestCheckpoint,
    "pictures": Pictures,
}
"""The callbacks of every run, by their keys in YAMLs and flags."""
COMPARED = ("data", "ema", "seed_everything")
"""Options of which a run that goes on says where they differ."""
OTHER_NAMES = {
    "model", "data", "trainer", "seed_everything", "ckpt_path", "init", "compile", "init_args",
    "class_path", "ema", "newest", "best", "pictures", "preemption", "startup", "watchdog",
}  # fmt: skip
"""Names of the command line that are not parameters of a class."""
IO_PLUGIN = {"class_path": "unclip_pl.cluster.checkpoint_io.AtomicCheckpointIO"}


class TrainingParser(Parser, LightningArgumentParser):
    """The parser of all commands, for what Lightning adds to it."""

    help_command = "lightning fit --help"

    def option_names(self) -> set[str]:
        """All names: of the trainer, the callbacks, and our stages and DataModules."""
        kinds = {lightning.pytorch.Trainer, *CALLBACKS.values()}
        for base in (Stage, LightningDataModule):
            kinds |= {kind for kind in _subclasses(base) if kind.__module__.startswith("unclip_pl")}
        names = {name for kind in kinds for name in _parameter_names(kind)}
        return (names | OTHER_NAMES) - {"self", "args", "kwargs"}


class UnclipCLI(LightningCLI):
    """See `build_cli`."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        for key, callback in CALLBACKS.items():
            parser.add_lightning_class_args(callback, key)
        parser.add_argument(
            "--init",
            type=str | None,
            help="a release or checkpoint of the same stage whose weights training starts from; "
            "openmoji: the package's",
        )
        parser.add_argument(
            "--mirror",
            type=str | None,
            help="a folder in a bucket (s3://, gs://) to which checkpoints are copied, and from "
            "which --resume auto takes a newer one",
        )
        parser.add_argument(
            "--compile",
            type=bool,
            default=False,
            help="compile the blocks of all networks (torch.compile): the first steps take "
            "minutes; meant for GPUs",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Find the checkpoint that is meant. Validation then uses the checkpoint's own model."""
        super().parse_arguments(parser, args)
        if not (subcommand := self.config.get("subcommand")):
            return
        config = self.config[subcommand]
        check_settings(config.as_dict())
        wanted = str(config.get("ckpt_path") or "") or None
        folder = Path(config.trainer.default_root_dir or ".")
        if config.get("mirror"):
            if subcommand != "fit":
                raise UserError(f"--mirror is for `lightning fit`: leave it out of {subcommand}.")
            if wanted == "resume:auto":
                Mirror(config.mirror, folder).fetch_newest()
        checkpoint = find_checkpoint(wanted, folder)
        if checkpoint and subcommand != "fit" and config.get("model"):
            stage, settings = read_settings(checkpoint)
            module, _, name = config.model.class_path.rpartition(".")
            if name == stage:
                settings = settings_of(getattr(import_module(module), name), settings)
                super().parse_arguments(parser, add_model_flags(args, settings))
        self.config[subcommand]["ckpt_path"] = str(checkpoint) if checkpoint else None
        if wanted and wanted.startswith("resume:"):
            fresh = f"No checkpoint in {folder}: starting from scratch."
            print(f"Resuming from {checkpoint}." if checkpoint else fresh, file=sys.stderr)

    def _parse_ckpt_path(self) -> None:
        """Files and flags win over a checkpoint's settings; Lightning does it the other way."""

    def instantiate_trainer(self, **kwargs: object) -> Trainer:
        """A run is one folder, in which TensorBoard writes too.

        `--trainer.logger false` turns it off. Under Slurm the job script requeues: Lightning would
        save inside its signal handler, where ranks wait for each other for ever.
        """
        trainer = self._get(self.config_init, "trainer")
        if trainer.get("logger") is None:
            if self.subcommand in (None, "fit"):
                folder = trainer.default_root_dir or "."
                kwargs["logger"] = TensorBoardLogger(
                    folder, name="", version="", purge_step=self._first_new_step()
                )
            else:  # validation has no place in the run's curves
                kwargs["logger"] = False
        callbacks = trainer.callbacks or []
        bars = [callback for callback in callbacks if isinstance(callback, ProgressBar)]
        if trainer.get("enable_progress_bar") is False:
            unwanted = bars
        else:
            unwanted = bars[:1] if len(bars) > 1 else []  # the user's own replaces ours
        trainer.callbacks = [callback for callback in callbacks if callback not in unwanted]
        if SLURMEnvironment.detect():
            trainer.plugins = [*(trainer.plugins or []), SLURMEnvironment(auto_requeue=False)]
        return cast(Trainer, super().instantiate_trainer(**kwargs))

    def _first_new_step(self) -> int | None:
        """The step from which the curves of a resumed run replace those of before.

        A run that was killed has logged steps after its last checkpoint.
        """
        step = step_of(Path(self._get(self.config, "ckpt_path") or ""))
        return step + 1 if step >= 0 else None

    def instantiate_classes(self) -> None:
        """A ValueError of a stage, DataModule or callback reaches the user as one sentence."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            self.parser.error(str(error), error)
        config = self.config[self.subcommand] if self.subcommand else self.config
        if config.get("compile") and isinstance(self.model, Stage):
            self.model.compile_networks = True
        # a run that is resumed has its weights from the checkpoint
        if config.get("init") and not config.get("ckpt_path"):
            load_pretrained(self.model, config["init"])

    def _set_seed(self) -> None:
        seed = self._get(self.config, "seed_everything")
        if not isinstance(seed, bool) and not 0 <= seed < 2**32:
            raise UserError(f"seed_everything is {seed}: give a number from 0 to {2**32 - 1}.")
        super()._set_seed()

    def before_test(self) -> None:
        raise UserError("There is no test of a stage: `lightning validate` measures its loss.")

    def before_predict(self) -> None:
        if isinstance(self.model, Stage):
            raise UserError(
                "`lightning predict` fills an embedding store (-c stages/embed.yaml), and this "
                "is a stage: draw with `unclip generate`."
            )

    def before_validate(self) -> None:
        config = self.config[self.subcommand]
        if not config.get("ckpt_path") and not config.get("init"):
            raise UserError(
                "Without weights there is nothing to validate: give --ckpt_path FILE, last or "
                "best, or --init with a release."
            )
        if config.get("ckpt_path"):
            self._announce_changes(Path(config["ckpt_path"]))

    def _announce_changes(self, checkpoint: Path) -> None:
        """Say which data and options a run uses that are not those of the checkpoint's run."""
        parser, config = self._parser(self.subcommand), self.config[self.subcommand]
        ours = yaml.safe_load(parser.dump(config, skip_none=False))
        if different := changed_options(checkpoint, ours):
            folder = checkpoint.resolve().parent.parent
            rank_zero_info(f"Other options than those of {folder}: {different}.")

    def fit(self, **kwargs: Any) -> None:
        """Train in a folder that no other run uses."""
        trainer: Any = self.trainer
        config, checkpoint = self.config[self.subcommand], kwargs.get("ckpt_path")
        adapts = any(isinstance(callback, LoRA) for callback in trainer.callbacks)
        if adapts and not checkpoint and not config.get("init"):
            raise SharedError(
                "LoRA adapts weights that exist, and this run starts from scratch: give --init "
                "with a release or checkpoint."
            )
        if trainer.fixed_batches:
            fix_train_batches(self.datamodule, trainer.fixed_batches)
        validates = (
            trainer.limit_val_batches != 0 and getattr(self.datamodule, "val", "") is not None
        )
        require_logged(trainer, self.model, validates)
        if trainer.fast_dev_run:  # writes nothing
            self.trainer.fit(**kwargs)
            return
        source = Path(checkpoint) if checkpoint else None
        folder = Path(self.trainer.default_root_dir)
        if source:
            refuse_search(trainer.callbacks, folder)
            self._announce_changes(source)
            if 0 < trainer.max_steps <= step_of(source):
                rank_zero_info(
                    f"{source} is at step {step_of(source)} already: give --trainer.max_steps "
                    "more to go on."
                )
        url, is_writer = config.get("mirror"), self.trainer.is_global_zero
        mirror = Mirror(url, folder) if url else None
        with claim_folder(folder, source, is_writer), mirrored(mirror, is_writer):
            self.trainer.fit(**kwargs)


def changed_options(checkpoint: Path, ours: dict[str, Any]) -> str:
    """The options other than those of the model and the trainer that a run's folder differs in.

    Args:
        checkpoint: of the run, in whose folder its `config.yaml` lies.
        ours: the options of the command, as plain values.

    Returns:
        such as "data.train shards/a.tar (it was openmoji)", "" where nothing differs or no such
        file can be read.
    """
    file = checkpoint.resolve().parent.parent / CONFIG
    try:
        theirs = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return ""
    if not isinstance(theirs, dict):
        return ""
    theirs, ours = ({k: v for k, v in all_.items() if k in COMPARED} for all_ in (theirs, ours))
    return ", ".join(
        f"{key.replace('.init_args', '')} {new} (it was {old})"
        for key, (old, new) in changes(theirs, ours).items()
        if old is not None  # an older version did not have it
    )


def build_cli(arguments: list[str], run: bool = True) -> UnclipCLI:
    """Parse a command line of `lightning` and build its stage, data and trainer.

    Args:
        arguments: the words after `lightning`. Without `run` there is no subcommand among them.
        run: also carry the subcommand out.

    Raises:
        UserError: an option or a value that is not possible.
    """
    load_all()  # so that a YAML may name a stage by its short name
    default = str(config_folder("lightning_config") / "default.yaml")
    return UnclipCLI(
        LightningModule,
        LightningDataModule,
        trainer_class=Trainer,
        run=run,
        args=arguments,
        parser_class=TrainingParser,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_callback=RunConfig,
        trainer_defaults={"plugins": [IO_PLUGIN]},
        parser_kwargs={name: {"default_config_files": [default]} for name in COMMANDS},
    )


def _parameter_names(kind: type) -> Iterator[str]:
    """The names of a constructor's parameters, and of those of its dataclasses."""
    constructor = kind.__init__  # type: ignore[misc]  # only its signature is read
    types = typing.get_type_hints(kind if dataclasses.is_dataclass(kind) else constructor)
    for name in inspect.signature(constructor).parameters:
        yield name
        if dataclasses.is_dataclass(types.get(name)):
            yield from _parameter_names(types[name])


def _subclasses(kind: type) -> Iterator[type]:
    """A class and all that derive from it, at any depth."""
    children: list[type] = kind.__subclasses__()
    yield kind
    for child in children:
        yield from _subclasses(child)
