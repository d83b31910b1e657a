"""Reading trained stages: releases, Lightning checkpoints and adapters.

All kinds of files are read as a `Release`, so that nothing else needs to know which one it was.
"""

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch

from unclip_pl.cluster.checkpoint_io import read_checkpoint
from unclip_pl.cluster.sharded_checkpoint import META_FILE, whole_tensors
from unclip_pl.diffusion.process import DiffusionConfig
from unclip_pl.networks.lora import weights_of
from unclip_pl.networks.renamed import rename, rename_settings
from unclip_pl.pipeline import adapters, release
from unclip_pl.pipeline.locate import OF_STAGE, locate, refuse_run, what_else
from unclip_pl.pipeline.release import Release
from unclip_pl.stages.base import Stage
from unclip_pl.stages.settings import as_config, plain, require_same_model, settings_of
from unclip_pl.stages.upsampler import Upsampler, Upsampler256, Upsampler1024
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.remote_copies import local_path

StageT = TypeVar("StageT", bound=Stage)


def read_weights(path: str | os.PathLike) -> Release:
    """Read a release folder or a Lightning checkpoint, here or at a remote URL.

    A checkpoint is a file, or a folder of shards; its EMA weights are read. Adapters (LoRA) are
    merged, whether they are in a checkpoint or in their own folder. Hyperparameters that are newer
    than the weights are filled in.

    Raises:
        UserError: there is nothing there, or it is none of these.
    """
    path = local_path(path)
    if adapters.is_adapters(path):
        found = adapters.read(path)
        tuned = found.onto(_adapted_weights(found.base, path))
        hyper_parameters = complete_hyper_parameters(tuned.stage, tuned.hyper_parameters)
        return replace(tuned, hyper_parameters=hyper_parameters)
    if path.is_dir() and not (path / META_FILE).exists():
        refuse_run(path)
        weights = release.read(path)
        hyper_parameters = complete_hyper_parameters(weights.stage, weights.hyper_parameters)
        return replace(weights, hyper_parameters=hyper_parameters)
    if not path.exists():
        raise UserError(f"There is no {path}: {what_else(path)}.")
    checkpoint = read_checkpoint(path, target=whole_tensors("state_dict"))
    missing = [key for key in ("stage", "hyper_parameters", "state_dict") if key not in checkpoint]
    if missing:
        raise UserError(
            f"{path} is not a checkpoint of a stage ({', '.join(missing)} missing): give a .ckpt "
            "of `lightning fit`, or a release."
        )
    stage = checkpoint["stage"]
    tensors = rename(stage, weights_of(checkpoint))
    return Release(
        stage,
        complete_hyper_parameters(stage, checkpoint["hyper_parameters"]),
        checkpoint.get("clip_fingerprint"),
        tensors,
        checkpoint["global_step"],
    )


def _adapted_weights(base: str, folder: Path) -> Release:
    """The weights that the adapters in a folder belong to."""
    place = local_path(base)
    if not place.exists() or adapters.is_adapters(place):
        fault = "holds adapters as well" if place.exists() else "is not there"
        raise UserError(
            f"The adapters {folder} belong to {base}, which {fault}: set base_model_name_or_path "
            f"in their {adapters.CONFIG_FILE} to the release or checkpoint that they were trained "
            "on."
        )
    return read_weights(place)


def complete_hyper_parameters(stage: str, hyper_parameters: dict) -> dict:
    """Hyperparameters with those added that older weights lack, at the values of their training."""
    complete = rename_settings(hyper_parameters)
    if stage in (Upsampler256.__name__, Upsampler1024.__name__):
        complete = Upsampler.legacy_defaults | complete
    if "diffusion" in complete:
        complete["diffusion"] = plain(as_config(DiffusionConfig, complete["diffusion"]))
    return complete


def load_stage(path: str | os.PathLike, *kinds: type[StageT]) -> StageT:
    """Build the stage in a release folder or checkpoint.

    Args:
        path: the release or checkpoint.
        kinds: the classes of stages that are accepted.

    Returns:
        The stage in eval mode on the CPU, with every weight loaded.

    Raises:
        UserError: it is a stage of another class, or names and shapes of the weights do not fit.
    """
    weights = read_weights(path)
    classes = {kind.__name__: kind for kind in kinds}
    if weights.stage not in classes:
        raise UserError(
            f"{path} holds a {weights.stage}, and a {' or '.join(classes)} is needed here: give "
            "another path."
        )
    try:
        stage = classes[weights.stage](**weights.hyper_parameters)
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} has settings that make no {weights.stage} here ({error}): it was changed, or "
            "a newer unclip_pl wrote it, so update that."
        ) from None
    try:
        stage.load_state_dict(weights.tensors)
    except RuntimeError as error:
        raise UserError(
            f"{path} does not fit its own configuration ({_first_mismatch(error)}): it was changed "
            "or is damaged."
        ) from None
    stage.clip_fingerprint = weights.clip_fingerprint
    stage.trained_steps = weights.steps
    return stage.eval().requires_grad_(False)


def load_pretrained(stage: Stage, path: str | os.PathLike) -> None:
    """Load the weights of a release or checkpoint of the same stage into `stage`, for training.

    The optimiser, the step and the count of skipped steps start from zero. "openmoji" names the
    package's release of this stage.

    Raises:
        UserError: it is another stage, of another diffusion process or scale of embeddings, or
            names and shapes of the weights do not fit.
    """
    if str(path) == "openmoji":
        path = OF_STAGE.get(type(stage).__name__, path)
    weights = read_weights(path)
    if weights.stage != type(stage).__name__:
        raise UserError(
            f"{path} holds a {weights.stage}, and this run trains a {type(stage).__name__}: give "
            "--init a release or checkpoint of one."
        )
    theirs = settings_of(type(stage), weights.hyper_parameters)
    require_same_model(str(path), theirs, dict(stage.hparams), stage.may_change, "leave --init out")
    tensors = weights.tensors | {"skipped_steps": torch.zeros_like(stage.skipped_steps)}
    try:
        stage.load_state_dict(tensors)
    except RuntimeError as error:
        raise UserError(
            f"{path} does not fit this run's model ({_first_mismatch(error)}): give the model that "
            "configuration."
        ) from None
    stage.clip_fingerprint = weights.clip_fingerprint


def load_upsamplers(paths: Sequence[str | os.PathLike]) -> list[Upsampler]:
    """Load upsamplers from release folders or checkpoints; "256" and "1024" are the package's.

    Raises:
        UserError: the package here has no such upsampler, or `load_stage` refuses one.
    """
    kinds = (Upsampler256, Upsampler1024)
    return [load_stage(locate("upsampler", path), *kinds) for path in paths]


def _first_mismatch(error: RuntimeError) -> str:
    """The first line of `load_state_dict`'s error that names a weight."""
    return str(error).splitlines()[1].strip()
