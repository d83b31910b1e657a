"""`lightning fit | validate | predict -c stages/X.yaml`: the entry point.

`lightning_cli.py` has the command line itself. Here is what comes before torch is imported.
"""

import logging
import os
import sys
import warnings

from unclip_pl import __version__
from unclip_pl.cli.config_checks import COMMANDS, check_configs
from unclip_pl.cli.configs import find_configs, stage_names
from unclip_pl.data.names import refuse_loose_shards
from unclip_pl.utils import interrupts, signals
from unclip_pl.utils.distributed import rank, rank_and_host
from unclip_pl.utils.errors import SharedError, UserError

USAGE = f"""unclip_pl {__version__}: train the stages of unCLIP

  lightning fit -c stages/decoder.yaml [-c OVERLAY.yaml ...] [--flag value ...]
      train a stage
  lightning fit -c stages/decoder.yaml --resume auto
      go on from the newest checkpoint
  lightning fit -c stages/decoder.yaml --init PATH
      fine-tune the weights of a release or checkpoint
  lightning validate -c stages/decoder.yaml --ckpt_path FILE
      validate it
  lightning predict -c stages/embed.yaml
      fill an embedding store
  lightning fit --help
      every option

Stages: {{stages}}.
Overlays, to give after the file of their stage: {{overlays}}.
Flags come after the files: what comes later wins. `python -m unclip_pl` is the same command, for
places where another package's `lightning` comes first. Pictures: `unclip --help`.
"""
IGNORED_WARNINGS = (
    ".*LeafSpec.*",
    ".*does not have many workers.*",
    ".*has `__len__` defined.*",
    ".*set_vital.*",
    ".*`weights_only` was not set.*",
    "LightningCLI's args parameter is intended to run from within Python.*",
)
IGNORED_LOGS = {
    "lightning.pytorch.utilities.rank_zero": ("Tip:", "Detected KeyboardInterrupt"),
    "lightning.pytorch.trainer.connectors.checkpoint_connector": ("`weights_only` was not set",),
}


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `lightning`; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help"):
        stages, overlays = stage_names()
        print(USAGE.format(stages=", ".join(stages), overlays=", ".join(overlays)))
        return 0
    if arguments[0] == "--version":
        print(f"unclip_pl {__version__}")
        return 0
    # All of this comes before torch is imported, which takes its time.
    signals.install_handlers(training=arguments[0] == "fit")
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # waiting threads sleep soon (docs/cluster.md)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    silence_lightning()
    try:
        check_command(arguments[0])
        refuse_loose_shards(arguments)
        arguments = find_configs(arguments)
        check_configs(arguments)
        with interrupts.watched():
            from unclip_pl.cli.lightning_cli import build_cli
            from unclip_pl.stages import load_all

            load_all()
        build_cli(expand_resume(arguments))
    except KeyboardInterrupt:
        return interrupts.report(f"lightning{rank_and_host()}")
    except SystemExit as error:
        if isinstance(error.__context__, KeyboardInterrupt):  # which Lightning turns into code 1
            return interrupts.report(f"lightning{rank_and_host()}")
        raise
    except UserError as error:
        if not isinstance(error, SharedError) or rank() == 0:
            # an error of a loader's worker has that process's traceback before the sentence
            report(str(error).strip().rpartition("UserError: ")[2])
        return 1
    except Exception as error:
        from unclip_pl.training.trainer import explain_error

        if (message := explain_error(error)) is None:
            raise
        report(message)
        return 1
    return signals.EXIT_CODES[signals.stop_state.agreed]


def check_command(word: str) -> None:
    """Raise a UserError where the first word is no command of `lightning`."""
    if word in COMMANDS:
        return
    if word.startswith("-"):
        raise UserError(f"{word} stands before the command: give that first, as in lightning fit.")
    from unclip_pl.cli import unclip

    if word and (word in unclip.GROUPS or word in unclip.COMMANDS):
        raise UserError(
            f"{word} is a command of `unclip`, and this is `lightning`: write unclip {word}."
        )
    raise UserError(f"There is no command {word}: give fit, validate or predict.")


def report(message: str) -> None:
    """Print why the run failed, with the rank and the host if there are several."""
    print(f"lightning{rank_and_host()}: {message}", file=sys.stderr)


def silence_lightning() -> None:
    """Filter warnings and log lines that say nothing to the user."""
    for message in IGNORED_WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name, texts in IGNORED_LOGS.items():

        def keep(record: logging.LogRecord, texts: tuple[str, ...] = texts) -> bool:
            return not any(text in record.getMessage() for text in texts)

        logging.getLogger(name).addFilter(keep)


def expand_resume(arguments: list[str]) -> list[str]:
    """The command line with `--resume [auto|FILE]` written as `--ckpt_path resume:FILE`.

    "auto", or no value, is the newest whole checkpoint of the run's folder, if there is one.
    """
    for i, word in enumerate(arguments):
        option, equals, value = word.partition("=")
        if option != "--resume":
            continue
        rest = arguments[i + 1 :]
        if not equals and rest and not rest[0].startswith("-"):
            value, *rest = rest
        return [*arguments[:i], *rest, "--ckpt_path", f"resume:{value or 'auto'}"]
    return arguments
