"""A folder that diffusers' unCLIP pipelines load, from stages of ours: `export_diffusers`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from unclip_pl.clip.config import CLIPConfig
from unclip_pl.clip.fingerprint import require_same
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.pipeline.interop import exchange
from unclip_pl.pipeline.interop.exchange import Exchangeable
from unclip_pl.pipeline.interop.importing import Precision
from unclip_pl.pipeline.interop.keys import Names, prior_names, text_proj_names, unet_names
from unclip_pl.pipeline.interop.towers import write_towers
from unclip_pl.pipeline.weights import load_stage
from unclip_pl.stages.ar_prior import ARPrior
from unclip_pl.stages.base import Stage
from unclip_pl.stages.decoder import Decoder
from unclip_pl.stages.diffusion_prior import DiffusionPrior
from unclip_pl.stages.upsampler import Upsampler256, Upsampler1024
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import atomic_folder
from unclip_pl.utils.outputs import require_new

DTYPES = {"fp16": torch.float16, "fp32": torch.float32}
WEIGHTS_FILE = "diffusion_pytorch_model.safetensors"
LEADING_AXES = {"positional_embedding": 1, "prd_embedding": 2, "clip_mean": 1, "clip_std": 1}
"""Axes of length 1 that diffusers has in front of ours."""
Network = tuple[str, dict[str, Any], Names]
"""Folder, config.json, and which of our tensors are its."""


def export_diffusers(
    checkpoints: list[str] | list[Path],
    out: Path,
    clip: CLIPConfig | None = None,
    precision: Precision = "fp16",
) -> list[str]:
    """Write the stages in checkpoints or releases as diffusers keeps them, all of them or nothing.

    A decoder and an upsampler make an UnCLIPImageVariationPipeline, and with a prior an
    UnCLIPPipeline; their CLIP goes with them. Other stages become single modules (PriorTransformer,
    UNet2DConditionModel ...). diffusers up to 0.33 loads the pipelines by `from_pretrained`; later
    versions do not find text_proj so, and take the modules one by one (docs/finetuning.md).

    Args:
        checkpoints: one of each stage.
        out: a new folder.
        clip: the CLIP of the stages; None: the one that they name.
        precision: of the weights.

    Returns:
        notes on what diffusers will do otherwise.

    Raises:
        UserError: a setting that diffusers cannot hold is named; or stages do not belong together.
    """
    require_new(out)
    kinds = (DiffusionPrior, ARPrior, Decoder, Upsampler256, Upsampler1024)
    written: set[type] = set()
    notes: list[str] = []
    frozen: FrozenCLIP | None = None
    with atomic_folder(out) as temporary:
        for path in checkpoints:  # one stage in memory at a time
            loaded: Stage = load_stage(path, *kinds)
            if type(loaded) in written:
                raise UserError(
                    f"{path} is a second {type(loaded).__name__}: give one of each stage."
                )
            stage = exchange.check(loaded)
            frozen = _clip_of(stage, clip, frozen)
            _write(stage, temporary, DTYPES[precision])
            notes += _notes(stage)
            written.add(type(stage))
            del loaded, stage
        if {Decoder, Upsampler256} <= written and frozen is not None:
            write_towers(frozen, temporary)
            names = _pipeline(DiffusionPrior in written)
            _write_json(temporary / "model_index.json", names)
    return notes


def _clip_of(
    stage: Exchangeable, clip: CLIPConfig | None, frozen: FrozenCLIP | None
) -> FrozenCLIP | None:
    """The CLIP of a stage: `frozen`, that of the stages before it, or the first one.

    Raises:
        UserError: the stage was trained with another CLIP than those.
    """
    if stage.clip_fingerprint is None:
        return frozen
    if frozen is None:
        frozen = FrozenCLIP(clip or CLIPConfig.of_fingerprint(stage.clip_fingerprint))
    require_same(stage.clip_fingerprint, frozen.fingerprint(), f"The {type(stage).__name__}")
    return frozen


def _networks(stage: Exchangeable) -> list[Network]:
    if isinstance(stage, DiffusionPrior):
        names = prior_names(stage.net_config.depth, "diffusers")
        return [("prior", exchange.prior_settings(stage), names)]
    if isinstance(stage, Decoder):
        names = unet_names(stage.net_config, "diffusers")
        return [
            ("decoder", exchange.decoder_settings(stage), names),
            ("text_proj", exchange.text_proj_settings(stage), text_proj_names("diffusers")),
        ]
    last = "net." if stage.last_net is None else "last_net."
    return [
        (folder, exchange.upsampler_settings(stage), unet_names(stage.net_config, "diffusers", net))
        for folder, net in (("super_res_first", "net."), ("super_res_last", last))
    ]


def theirs(ours: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Their tensors from ours, the way back of `keys.fill`."""
    found = {}
    for name, others in names.items():
        if name not in ours:
            continue
        for other, part in zip(others, ours[name].chunk(len(others))):
            found[other] = part.reshape((1,) * LEADING_AXES.get(other, 0) + part.shape)
    return found


def _write(stage: Exchangeable, out: Path, dtype: torch.dtype) -> None:
    """The networks of a stage, and its scheduler."""
    ours = stage.state_dict()
    if isinstance(stage, DiffusionPrior) and stage.normalizer.mode == "none":
        dim = stage.net_config.embed_dim
        ours |= {"normalizer.mean": torch.zeros(dim), "normalizer.std": torch.ones(dim)}
    for folder, settings, names in _networks(stage):
        tensors = {k: v.to(dtype).contiguous() for k, v in theirs(ours, names).items()}
        if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise UserError(
                f"The {folder} has weights that are not finite in {dtype} ({broken[0]}): export it "
                "with --precision fp32."
            )
        (out / folder).mkdir()
        _write_json(out / folder / "config.json", settings)
        save_file(tensors, out / folder / WEIGHTS_FILE, metadata={"format": "pt"})
    name = {DiffusionPrior: "prior", Decoder: "decoder"}.get(type(stage), "super_res")
    _write_json(out / f"{name}_scheduler" / "scheduler_config.json", exchange.scheduler(stage))


def _write_json(file: Path, values: dict[str, Any]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _pipeline(with_prior: bool) -> dict[str, Any]:
    """model_index.json: which class of which library loads each folder."""
    modules = {"decoder": "UNet2DConditionModel"}
    modules |= dict.fromkeys(("super_res_first", "super_res_last"), "UNet2DModel")
    modules |= dict.fromkeys(("decoder_scheduler", "super_res_scheduler"), "UnCLIPScheduler")
    towers = {"text_encoder": "CLIPTextModelWithProjection", "tokenizer": "CLIPTokenizer"}
    kind = "UnCLIPPipeline"
    if with_prior:
        modules |= {"prior": "PriorTransformer", "prior_scheduler": "UnCLIPScheduler"}
    else:
        kind = "UnCLIPImageVariationPipeline"
        towers["image_encoder"] = "CLIPVisionModelWithProjection"
        towers["feature_extractor"] = "CLIPImageProcessor"
    own = {"text_proj": "UnCLIPTextProjModel"}  # a module of the pipeline, as Karlo's folder has it
    libraries = {"diffusers": modules, "transformers": towers, "unclip": own}
    places = {n: [lib, cls] for lib, classes in libraries.items() for n, cls in classes.items()}
    return {"_class_name": kind, "_diffusers_version": "0.33.1"} | places


def _notes(stage: Exchangeable) -> list[str]:
    """What the pipelines do in another way than the stage's sampling settings say."""
    sampling: Any = stage.sampling
    name, found = type(stage).__name__, []
    if sampling.sampler != "ddpm":
        found.append(f"{name}: diffusers draws with ddpm, and model.sampling says otherwise.")
    if getattr(sampling, "num_candidates", 1) != 1:
        found.append(f"{name}: diffusers draws 1 candidate, here {sampling.num_candidates} are.")
    if sampling.threshold == "dynamic":
        found.append(f"{name}: diffusers clamps x_0, and the threshold here is dynamic.")
    steps = f"{sampling.steps} steps"
    scale = getattr(sampling, "guidance_scale", None)
    guidance = "" if scale is None else f" and guidance {scale}"
    return [*found, f"{name}: give the pipeline {steps}{guidance}, which its folder cannot hold."]
