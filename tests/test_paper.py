"""The paper's stages as `lightning fit --print_config` resolves them: Table 3, and nothing of the
small stages below them that nobody decided on."""

import contextlib
import functools
import io
import math
from typing import Any

import pytest
import torch
import yaml

from tests.conftest import ROOT
from unclip_pl.cli.configs import find_configs
from unclip_pl.cli.lightning_cli import build_cli

VIT_H = "lightning_config/clip/ViT-H-14.yaml"
ADAM = "model.optimizer"
NET, TEXT, DATA, TRAINER = "model.net", "model.text", "data", "trainer"


def rates(lr: float, beta2: float, eps: float, weight_decay: float = 0.0) -> dict[str, Any]:
    """Adam of Table 3; beta1 is 0.9 for all (appendix C)."""
    values: dict[str, Any] = {"name": "adamw", "lr": lr, "betas": [0.9, beta2], "eps": eps}
    values["weight_decay"] = weight_decay
    return {f"{ADAM}.{key}": value for key, value in values.items()}


def diffusion(schedule: str, steps: int, sampler: str, variance: str, predicts: str = "eps"):
    return {
        "model.diffusion.timesteps": 1000,
        "model.diffusion.schedule": schedule,
        "model.diffusion.parametrization": predicts,
        "model.diffusion.variance": variance,
        "model.sampling.steps": steps,
        "model.sampling.sampler": sampler,
    }


def run(batch: int, steps: int, ema: float) -> dict[str, Any]:
    values = {"data.loader.batch_size": batch, "trainer.max_steps": steps, "ema.decay": ema}
    return values


TEXT_ENCODER = {  # width, depth and heads of it: 2048, 24, 32
    f"{TEXT}.kind": "transformer",
    f"{TEXT}.context_length": 256,
    f"{TEXT}.width": 2048,
    f"{TEXT}.depth": 24,
    f"{TEXT}.heads": 32,
    "data.text_length": 256,  # which fills the context
    "data.text_states": False,
}
TABLE_3 = {
    "ar_prior": {
        **TEXT_ENCODER,
        f"{NET}.width": 1664,
        f"{NET}.depth": 24,
        f"{NET}.heads": 26,
        f"{NET}.max_codes": 319,  # section 2.2, as are the next four
        f"{NET}.buckets": 1024,
        "model.max_error": 0.01,
        "model.cond_dropout": 0.1,
        "model.sampling.dot_percentile": 50,
        **rates(1.6e-4, 0.91, 1e-10, 4.0e-2),
        **run(4096, 1_000_000, 0.999),
    },
    "diffusion_prior": {
        **{f"{TEXT}.kind": "tokens", f"{TEXT}.context_length": 256},
        **{"data.text_length": 256, "data.text_states": False},
        f"{NET}.width": 2048,
        f"{NET}.depth": 24,
        f"{NET}.heads": 32,
        **diffusion("cosine", 64, "analytic", "fixed_small", "x0"),
        "model.sampling.num_candidates": 2,  # section 2.2
        "model.cond_dropout": 0.1,
        "model.normalizer": "unit",  # 17.2, appendix C
        **rates(1.1e-4, 0.96, 1e-6, 6.0e-2),
        **run(4096, 600_000, 0.9999),
    },
    "decoder": {
        **TEXT_ENCODER,
        f"{NET}.image_size": 64,
        f"{NET}.width": 512,
        f"{NET}.depth": 3,
        f"{NET}.mults": [1, 2, 3, 4],
        f"{NET}.head_width": 64,
        f"{NET}.attention": [32, 16, 8],
        f"{NET}.dropout": 0.1,
        f"{NET}.embed_tokens": 4,  # section 2.1, as is what is dropped
        f"{TEXT}.pooled": True,  # of the last token, as in GLIDE
        "model.diffusion.max_snr": None,  # each step of the loss counts alike
        "model.cond_dropout.embed": 0.1,
        "model.cond_dropout.text": 0.5,
        **diffusion("cosine", 250, "ddpm", "learned_range"),
        "model.sampling.guidance_scale": 1.25,  # Table 2
        **rates(1.2e-4, 0.999, 1e-8),
        **run(2048, 800_000, 0.9999),
    },
    "upsampler_256": {
        f"{NET}.image_size": 256,
        f"{NET}.width": 320,
        f"{NET}.depth": 3,
        f"{NET}.mults": [1, 2, 3, 4],
        f"{NET}.dropout": 0.1,
        **{f"{NET}.attention": [], f"{NET}.middle_attention": False},
        **diffusion("cosine", "fast27", "ddim", "fixed_small"),
        "data.image_size": 256,
        "data.crop": 64,  # a quarter
        "data.degradation.kind": "blur",
        "data.degradation.kernel_size": 3,
        "data.degradation.sigma": 0.6,
        **rates(1.2e-4, 0.999, 1e-8),
        **run(1024, 1_000_000, 0.9999),
    },
    "upsampler_1024": {
        f"{NET}.image_size": 1024,
        f"{NET}.width": 192,
        f"{NET}.depth": 2,
        f"{NET}.mults": [1, 1, 2, 2, 4, 4],
        f"{NET}.dropout": 0.0,
        **{f"{NET}.attention": [], f"{NET}.middle_attention": False},
        **diffusion("linear", 15, "ddim", "fixed_small"),
        "data.image_size": 1024,
        "data.crop": 256,
        "data.degradation.kind": "bsr",
        **rates(1.0e-4, 0.999, 1e-8),
        **run(512, 1_000_000, 0.9999),
    },
}
SAME = {  # values of every small stage that hold for the paper's too, and why
    "model.class_path": "it is the same stage",
    "data.class_path": "its data are of the same kind",
    "trainer.check_val_every_n_epoch": "validations are counted in steps",
}
INHERITED = {  # of one stage
    "ar_prior": {
        "trainer.callbacks+": "what a prior draws is measured at any size",
        "model.optimizer.muon_lr": "of Muon, and the paper's optimizer is AdamW",
    },
    "diffusion_prior": {
        "trainer.callbacks+": "what a prior draws, and the analytic variance of Table 3",
        "model.optimizer.muon_lr": "of Muon, and the paper's optimizer is AdamW",
    },
    "decoder": {
        "data.image_size": "64 px, as in Table 3",
        "model.optimizer.muon_lr": "of Muon, and the paper's optimizer is AdamW",
    },
    "upsampler_256": {"model.optimizer.muon_lr": "as the decoder's"},
    "upsampler_1024": {"model.optimizer.muon_lr": "as the decoder's"},
}
NOT_NAMED = {  # values of the classes that no file of these stages names, and why they hold
    "model.optimizer.muon_lr": (0.02, "of Muon, and the paper's optimizer is AdamW"),
    "model.text.vocab_size": (49408, "CLIP's tokens"),
    "model.text.tokenizer": ("clip", "open_clip's BPE"),
    "model.text.null": ("learned", "an embedding for a dropped caption"),
    "model.net.in_channels": (3, "RGB"),
}
UPSAMPLERS = {
    "model.net.head_width": (64, "there is no attention"),
    "model.net.embed_dim": (0, "no embedding"),
    "model.net.thumbnail": (0, "no embedding"),
    "model.net.thumbnail_width": (384, "there is no thumbnail"),
    "model.net.embed_tokens": (4, "no embedding"),
    "model.net.context_width": (0, "no captions"),
    "model.net.scale_shift": (True, "GLIDE's FiLM"),
    "model.diffusion.max_snr": (None, "each step of the loss counts alike"),
    "model.diffusion.variance_bound": (2.0, "there is no learned variance"),
    "model.sampling.threshold": ("static", "keeps x_0 in [-1, 1]"),
    "model.sampling.eta": (0.0, "DDIM without noise"),
    "model.clamp_condition": (False, "of older weights"),
    "model.last_net": (False, "of Karlo"),
}
NOT_NAMED_BY = {  # of one stage, with those of all
    "ar_prior": {"model.text.pooled": (True, "nothing reads it in a prior")},
    "diffusion_prior": {
        "model.diffusion.max_snr": (None, "each step of the loss counts alike"),
        "model.diffusion.variance_bound": (2.0, "there is no learned variance"),
        "model.sampling.threshold": (None, "z_i has no range"),
        "model.sampling.eta": (0.0, "of DDIM, and Table 3 has Analytic-DPM"),
    },
    "decoder": {
        "model.net.out_channels": (6, "mean and variance"),
        "model.net.low_res_channels": (0, "no image for a condition"),
        "model.net.thumbnail_width": (384, "there is no thumbnail"),
        "model.net.scale_shift": (True, "GLIDE's FiLM"),
        "model.net.middle_attention": (True, "as GLIDE"),
        "model.cond_dropout.null_embed": ("learned", "section 2.1"),
        "model.sampling.threshold": ("static", "keeps x_0 in [-1, 1]"),
        "model.condition": ("image", "the paper's decoder"),
    },
    "upsampler_256": UPSAMPLERS,
    "upsampler_1024": UPSAMPLERS,
}
SIZES = {  # Table 3, and what the stage counts in all
    "ar_prior": (2.0e9, 2.2e9),
    "diffusion_prior": (1.19e9, 1.34e9),
    "decoder": (3.4e9, 3.6e9),
    "upsampler_256": (6.9e8, 7.5e8),
    "upsampler_1024": (2.7e8, 3.2e8),
}


def files(name: str) -> list[str]:
    """A stage's own file and what is laid over it, as the overlay's comment has them."""
    clip = [] if name.startswith("upsampler") else [VIT_H]
    return [f"stages/{name}.yaml", *clip, f"stages/paper/{name}.yaml"]


def leaves(values: dict, at: str = "") -> dict[str, Any]:
    """Values by dotted key, `init_args` left out; a list is a value."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        path = at if key == "init_args" else f"{at}.{key}".lstrip(".")
        found |= leaves(value, path) if isinstance(value, dict) else {path: value}
    return found


def written(file: str) -> dict[str, Any]:
    """What a file says."""
    return leaves(yaml.safe_load((ROOT / file).read_text(encoding="utf-8")))


@functools.cache
def resolved(name: str) -> dict[str, Any]:
    """What `lightning fit --print_config` prints."""
    arguments = [word for file in files(name) for word in ("-c", file)]
    with contextlib.redirect_stdout(io.StringIO()) as said, pytest.raises(SystemExit) as end:
        build_cli(["fit", *find_configs(arguments), "--print_config"])
    assert not end.value.code
    return leaves(yaml.safe_load(said.getvalue()))


@pytest.mark.parametrize("name", TABLE_3)
def test_every_value_is_table_3s(name):
    found = resolved(name)
    assert {key: found.get(key) for key in TABLE_3[name]} == TABLE_3[name]


@pytest.mark.parametrize("name", TABLE_3)
def test_nothing_comes_from_the_small_stage_without_a_reason(name):
    small, *overlays = files(name)
    decided = {key for file in overlays for key in written(file)}
    inherited = written(small).keys() - decided
    assert inherited == (SAME | INHERITED[name]).keys()
    resolved_values = resolved(name)
    of_classes = resolved_values.keys() - decided - TABLE_3[name].keys() - inherited
    known = NOT_NAMED | NOT_NAMED_BY[name]
    for key in sorted(key for key in of_classes if key.startswith("model.")):
        assert resolved_values[key] == known[key][0], key


@pytest.mark.parametrize("name", TABLE_3)
def test_overlays_say_what_holds(name):
    """No later file, and no replacement of a whole part, undoes what the paper's says."""
    found, paper = resolved(name), written(files(name)[-1])
    assert {key: found.get(key) for key in paper} == paper


@pytest.mark.parametrize("name", TABLE_3)
def test_what_the_paper_leaves_open_is_the_same_in_all_stages(name):
    found = resolved(name)
    course = {key: found[f"{ADAM}.{key}"] for key in ("warmup_steps", "decay", "clip_norm")}
    assert course == {"warmup_steps": 1000, "decay": "constant", "clip_norm": 1.0}
    assert found["trainer.val_check_interval"] >= 5000 and found["trainer.limit_val_batches"] == 4
    assert found["newest.every_n_train_steps"] == 5000


@functools.cache
def stage(name: str) -> Any:
    """On the meta device: its weights take no memory."""
    arguments = [word for file in files(name) for word in ("-c", file)]
    default = ["-c", "lightning_config/default.yaml", "--trainer.accelerator", "cpu"]
    with torch.device("meta"):
        return build_cli([*find_configs([*default, *arguments])], run=False).model


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("name", TABLE_3)
def test_it_has_the_papers_size_and_checkpoints(name):
    low, high = SIZES[name]
    assert low < count(stage(name)) < high
    assert all(parameter.is_meta for parameter in stage(name).parameters())
    configs = [stage(name).net_config, getattr(stage(name), "text_config", None)]
    kinds = {config.checkpointing for config in configs if hasattr(config, "checkpointing")}
    assert kinds <= {"selective", "full"}


def test_transformers_have_the_parameters_of_their_widths_and_depths():
    """12 x depth x width^2: 0.80 B and 1.21 B, and 1.21 B, the "1B" of either prior."""
    ar, diffusion_prior = stage("ar_prior").net, stage("diffusion_prior").net
    for transformer, width in (
        (ar.transformer, 1664),
        (ar.text.encoder.transformer, 2048),
        (diffusion_prior.transformer, 2048),
    ):
        assert math.isclose(count(transformer), 12 * 24 * width**2, rel_tol=0.01)
    rest = count(stage("diffusion_prior")) - count(diffusion_prior.transformer)
    assert rest < 0.12e9  # token embedding, positions, projections
    assert ar.length == 256


@pytest.mark.parametrize("name", ["decoder", "diffusion_prior", "ar_prior"])
def test_the_context_of_256_tokens_is_filled(name):
    """The data of the overlay are those that the stage asks for."""
    found = resolved(name)
    assert found["data.text_length"] == stage(name).text_config.context_length == 256
    assert found["data.clip.model"] == "ViT-H-14"
