"""`lightning fit | validate | predict -c stages/X.yaml`: Lightning's command line for the stages. The only file that knows jsonargparse.

Layers, each says only what differs: dataclass defaults < lightning_config/default.yaml < -c stage < further -c overlays < flags.
"""

import difflib
import logging
import os
import re
import sys
import warnings
from importlib import import_module
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn, cast

from unclip_pl import __version__
from unclip_pl.data.names import refuse_loose_shards
from unclip_pl.utils import signals
from unclip_pl.utils.errors import SharedError, UserError

USAGE = f"""unclip_pl {__version__}: train the stages of unCLIP

  lightning fit      -c stages/decoder.yaml [-c OVERLAY.yaml ...] [--flag value ...]   train a stage
  lightning validate -c stages/decoder.yaml --ckpt_path FILE                           validate it
  lightning predict  -c stages/embed.yaml                                              fill an embedding store
  lightning fit      -c stages/decoder.yaml --resume auto                              go on from the newest checkpoint
  lightning fit      -c stages/decoder.yaml --init PATH                                fine-tune the weights of a release or checkpoint
  lightning fit --help                                                                 every option

Stages: {{stages}}. Flags come after the files: what comes later wins.
`python -m unclip_pl` is the same command, where another package's `lightning` stands in the way. Pictures: `unclip --help`.
"""


def config_folder(name: str) -> Path:
    """The folder `stages` or `lightning_config`: beside the package in a checkout, inside it in a wheel."""
    beside = Path(__file__).resolve().parents[2] / name
    return beside if beside.is_dir() else Path(str(files("unclip_pl"))) / "_configs" / name


def find_config(path: str) -> str:
    """A YAML as named; where it is not there, the shipped one of that name (`stages/decoder.yaml` works from any folder)."""
    if Path(path).exists():
        return path
    for folder in ("stages", "lightning_config"):
        head, _, tail = path.partition(f"{folder}/")
        if not head and tail and (config_folder(folder) / tail).exists():
            return str(config_folder(folder) / tail)
    shipped = sorted(
        str(p.relative_to(config_folder("stages").parent))
        for f in ("stages", "lightning_config")
        for p in config_folder(f).rglob("*.yaml")
    )
    near = difflib.get_close_matches(path, shipped, 1, 0.5)
    raise UserError(
        f"There is no configuration {path}"
        + (f": did you mean {near[0]}?" if near else f". Shipped are: {', '.join(shipped)}.")
    )


def sentence(message: str) -> str:
    """jsonargparse's message cut to one sentence, with the nearest right key for one that is not accepted."""
    lines = [line.strip().removeprefix("- ") for line in message.splitlines()]
    errors = (
        lines[lines.index("Errors:") + 1 :] if "Errors:" in lines else lines
    )  # a list of why each type of a Union did not fit
    said = " ".join(
        line
        for line in errors
        if line and "NoneType" not in line and not line.startswith("Given value")
    )
    unrecognized = re.search(r"unrecognized arguments: --([\w.]+)", said)
    option = re.search(
        r"(?:option|Option|Key|key) '([\w.]+)'(?: is not (?:accepted|expected)|$)", said
    )
    found = unrecognized or option
    if not found:
        return said or message
    keys = known_keys()
    path = found[1].split(".")
    wrong = next((key for key in path if key not in keys), path[-1])
    near = difflib.get_close_matches(wrong, keys, 1, 0.6)
    return f"There is no option '{wrong}'" + (
        f": did you mean '{near[0]}'?" if near else "; `lightning fit --help` lists them all."
    )


def known_keys() -> set[str]:
    """Every parameter name of the stages, their DataModules, their configs and the trainer."""
    import dataclasses
    import inspect
    import typing

    from lightning.pytorch import LightningDataModule, Trainer

    from unclip_pl.cluster import preemption, startup, watchdog
    from unclip_pl.stages.base import Stage
    from unclip_pl.training import checkpoints, ema, pictures

    keys: set[str] = {
        "model",
        "data",
        "trainer",
        "seed_everything",
        "ckpt_path",
        "init",
        "compile",
        "init_args",
        "class_path",
    }
    keys |= {"ema", "newest", "best", "pictures", "preemption", "startup", "watchdog"}

    def add(kind: type) -> None:
        constructor = kind.__init__  # type: ignore[misc]  # only its signature is read
        names = typing.get_type_hints(kind if dataclasses.is_dataclass(kind) else constructor)
        parameters = (
            [f.name for f in dataclasses.fields(kind)]
            if dataclasses.is_dataclass(kind)
            else list(inspect.signature(constructor).parameters)
        )
        keys.update(parameters)
        for name in parameters:
            if dataclasses.is_dataclass(names.get(name)):
                add(names[name])

    def subclasses(kind: type) -> set[type]:
        children: list[type] = kind.__subclasses__()
        return {kind} | {deep for child in children for deep in subclasses(child)}

    callbacks = {
        ema.EMA,
        checkpoints.NewestCheckpoint,
        checkpoints.BestCheckpoint,
        pictures.Pictures,
    }
    for kind in {
        Trainer,
        preemption.Preemption,
        startup.StartupCheck,
        watchdog.Watchdog,
    } | callbacks:
        add(kind)
    for kind in subclasses(Stage) | subclasses(LightningDataModule):
        if kind.__module__.startswith("unclip_pl"):
            add(kind)
    return keys - {"self", "args", "kwargs"}


def resume(arguments: list[str]) -> list[str]:
    """Replace `--resume [auto|FILE]` by `--ckpt_path resume:FILE`; `auto`, or nothing, is the newest whole checkpoint of the run's folder, or none."""
    for i, argument in enumerate(arguments):
        if argument == "--resume" or argument.startswith("--resume="):
            given = [
                value
                for value in arguments[i + 1 : i + 2]
                if argument == "--resume" and not value.startswith("-")
            ]
            value = argument.partition("=")[2] or "".join(given) or "auto"
            return [
                *arguments[:i],
                *arguments[i + 1 + len(given) :],
                "--ckpt_path",
                f"resume:{value}",
            ]
    return arguments


def find_configs(arguments: list[str]) -> list[str]:
    """The command line with `find_config` of each `-c FILE`, `--config FILE` and `--config=FILE`."""
    found = list(arguments)
    for i, argument in enumerate(arguments):
        option, equals, path = argument.partition("=")
        if option in ("-c", "--config"):
            if equals:
                found[i] = f"{option}={find_config(path)}"
            elif i + 1 < len(arguments):
                found[i + 1] = find_config(arguments[i + 1])
    return found


def build_cli(arguments: list[str], run: bool = True):  # noqa: ANN201
    """The parsed command line as a LightningCLI; with `run` its subcommand is carried out."""
    from unclip_pl.stages import load_all

    load_all()  # first, so that lightning can import torchvision
    from lightning.pytorch import LightningDataModule, LightningModule
    from lightning.pytorch.callbacks import ProgressBar
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
    from lightning.pytorch.loggers import TensorBoardLogger
    from lightning.pytorch.plugins.environments import SLURMEnvironment

    from unclip_pl.cluster.checkpoint_io import read_settings
    from unclip_pl.cluster.preemption import Preemption
    from unclip_pl.cluster.startup import StartupCheck
    from unclip_pl.cluster.watchdog import Watchdog
    from unclip_pl.datamodules import embedding_job, image_text, prior, upsampler  # noqa: F401  their short names
    from unclip_pl.pipeline.unclip import start_from
    from unclip_pl.stages.base import Stage
    from unclip_pl.stages.settings import settings_of
    from unclip_pl.training.arguments import with_model
    from unclip_pl.training.checkpoints import BestCheckpoint, NewestCheckpoint
    from unclip_pl.training.ema import EMA
    from unclip_pl.training.pictures import Pictures
    from unclip_pl.training.run_folder import RunConfig, claimed, find_checkpoint
    from unclip_pl.training.trainer import Trainer, hold_first

    always = {
        "preemption": Preemption, "startup": StartupCheck, "watchdog": Watchdog, "ema": EMA, "newest": NewestCheckpoint, "best": BestCheckpoint,
        "pictures": Pictures,
    }  # fmt: skip

    class Parser(LightningArgumentParser):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(
                *args, **kwargs, allow_abbrev=False
            )  # else a typo that is the start of an option is taken for it

        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            raise UserError(sentence(message)) from ex

    class UnclipCLI(LightningCLI):
        def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
            for key, callback in always.items():
                parser.add_lightning_class_args(callback, key)
            parser.add_argument(
                "--init",
                type=str | None,
                help="a release or checkpoint of the same stage whose weights training starts from",
            )
            parser.add_argument(
                "--compile",
                type=bool,
                default=False,
                help="compile the blocks of all networks (torch.compile): the first steps take "
                "minutes, later ones less time on GPUs",
            )

        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            """Find the checkpoint that is meant; what is not trained is of its model."""
            super().parse_arguments(parser, args)
            if not (subcommand := self.config.get("subcommand")):
                return
            config = self.config[subcommand]
            given, folder = config.get("ckpt_path"), Path(config.trainer.default_root_dir or ".")
            found = find_checkpoint(given and str(given), folder)
            if found and subcommand != "fit" and config.get("model"):
                stage, settings = read_settings(found)
                module, _, name = config.model.class_path.rpartition(".")
                if name == stage:
                    settings = settings_of(getattr(import_module(module), name), settings)
                    super().parse_arguments(parser, with_model(args, settings))
            self.config[subcommand]["ckpt_path"] = str(found) if found else None
            if given and str(given).startswith("resume:"):
                fresh = f"No checkpoint in {folder}: starting from scratch."
                print(f"Resuming from {found}." if found else fresh, file=sys.stderr)

        def _parse_ckpt_path(self) -> None:
            """Nothing more: files and flags win over what a checkpoint remembers (Lightning's
            default is the other way round)."""

        def instantiate_trainer(self, **kwargs: object) -> Trainer:
            """TensorBoard writes into the run's folder itself, so that a run is one folder; `--trainer.logger false` turns it off.

            Under Slurm the job script requeues: Lightning saves inside its signal handler, where ranks wait for each other for ever.
            """
            trainer = self._get(self.config_init, "trainer")
            if trainer.get("logger") is None and self.subcommand not in (None, "fit"):
                kwargs["logger"] = False  # what is only looked at has no place in the run's curves
            elif trainer.get("logger") is None:
                kwargs["logger"] = TensorBoardLogger(
                    trainer.default_root_dir or ".", name="", version=""
                )
            trainer.callbacks = trainer.callbacks or []
            bars = [bar for bar in trainer.callbacks if isinstance(bar, ProgressBar)]
            if len(bars) > 1:  # another than ours was asked for
                trainer.callbacks = [each for each in trainer.callbacks if each is not bars[0]]
            if trainer.get("enable_progress_bar") is False:
                trainer.callbacks = [
                    callback
                    for callback in trainer.callbacks
                    if not isinstance(callback, ProgressBar)
                ]
            if SLURMEnvironment.detect():
                trainer.plugins = [*(trainer.plugins or []), SLURMEnvironment(auto_requeue=False)]
            return cast(Trainer, super().instantiate_trainer(**kwargs))

        def instantiate_classes(self) -> None:
            """What a stage, DataModule or callback says of its settings reaches the user as one sentence."""
            try:
                super().instantiate_classes()
            except ValueError as error:
                raise UserError(sentence(str(error))) from error
            config = self.config[self.subcommand] if self.subcommand else self.config
            if config.get("compile") and isinstance(self.model, Stage):
                self.model.compile_networks = True
            if config.get("init") and not config.get(
                "ckpt_path"
            ):  # else a run that is resumed has its weights from there
                start_from(self.model, config["init"])

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

        def fit(self, **kwargs: Any) -> None:
            """Trains in a folder that no other run has."""
            trainer: Any = self.trainer
            if trainer.held_batches:
                hold_first(self.datamodule, trainer.held_batches)
            if trainer.fast_dev_run:  # which writes nothing
                self.trainer.fit(**kwargs)
                return
            folder, checkpoint = Path(self.trainer.default_root_dir), kwargs.get("ckpt_path")
            source = Path(checkpoint) if checkpoint else None
            with claimed(folder, source, self.trainer.is_global_zero):
                self.trainer.fit(**kwargs)

    return UnclipCLI(
        LightningModule,
        LightningDataModule,
        trainer_class=Trainer,
        run=run,
        args=arguments,
        parser_class=Parser,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        seed_everything_default=0,
        save_config_callback=RunConfig,
        trainer_defaults={
            "plugins": [{"class_path": "unclip_pl.cluster.checkpoint_io.AtomicCheckpointIO"}]
        },
        parser_kwargs={
            s: {"default_config_files": [str(config_folder("lightning_config") / "default.yaml")]}
            for s in ("fit", "validate", "test", "predict")
        },
    )


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `lightning`; returns the exit code. `--version` and `--help` answer before torch is imported."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        stages = sorted(p.stem for p in config_folder("stages").glob("*.yaml"))
        print(USAGE.format(stages=", ".join(stages)))
        return 0
    if arguments[0] == "--version":
        print(f"unclip_pl {__version__}")
        return 0
    signals.listen(training=arguments[0] == "fit")  # before torch is imported, which takes its time
    # Before torch is imported: threads soon sleep while they wait (docs/cluster.md, "CPUs").
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    for message in (
        ".*LeafSpec.*", ".*does not have many workers.*", ".*has `__len__` defined.*", ".*set_vital.*", ".*`weights_only` was not set.*",
        "LightningCLI's args parameter is intended to run from within Python.*",
    ):  # fmt: skip
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: "Tip:" not in record.getMessage()
    )
    saving = logging.getLogger("lightning.pytorch.trainer.connectors.checkpoint_connector")
    saving.addFilter(
        lambda record: "`weights_only` was not set" not in record.getMessage()
    )  # with every checkpoint
    try:
        refuse_loose_shards(arguments)
        build_cli(resume(find_configs(arguments)))
    except UserError as error:
        # from a loader's worker the sentence comes wrapped in that process's traceback
        if not isinstance(error, SharedError) or signals.rank() == 0:
            print(
                f"lightning{signals.rank_and_host()}: {str(error).strip().rpartition('UserError: ')[2]}",
                file=sys.stderr,
            )
        return 1
    except Exception as error:
        from unclip_pl.training.trainer import of_others

        if (said := of_others(error)) is None:
            raise
        print(f"lightning{signals.rank_and_host()}: {said}", file=sys.stderr)
        return 1
    return signals.EXIT_CODES[signals.notes.agreed]
