"""Kandinsky's prior, imported: it draws the embeddings that diffusers draws from the same noise."""

import json
from dataclasses import replace
from types import SimpleNamespace

import diffusers
import pytest
import torch

from tests.interop import kit
from unclip_pl.cli.unclip import main
from unclip_pl.clip.config import CLIPConfig
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.networks.prior import PriorTransformerConfig
from unclip_pl.pipeline.interop.karlo import prior_stage
from unclip_pl.pipeline.weights import load_stage
from unclip_pl.stages.diffusion_prior import DiffusionPrior

CAPTIONS = ["a red apple on a blue table", "two dogs"]
SEEDS = [5, 6]


def pipeline(kind="KandinskyV22PriorPipeline", activation="gelu", limit=10.0, dim=40):
    text, vision = kit.towers(dim, activation)
    prior = diffusers.PriorTransformer(
        num_attention_heads=2, attention_head_dim=32, num_layers=2, embedding_dim=dim
    )
    scheduler = diffusers.UnCLIPScheduler(clip_sample_range=limit, prediction_type="sample")
    made = getattr(diffusers, kind)(
        prior=kit.randomise(prior, 10),
        image_encoder=vision,
        text_encoder=text,
        tokenizer=kit.tokenizer(),
        scheduler=scheduler,
        image_processor=kit.transformers.CLIPImageProcessor(
            size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
        ),
    )
    made.set_progress_bar_config(disable=True)
    return made


def imported(folder, out):
    words = ["import", "kandinsky-prior", str(folder), "--out", str(out), "--precision", "fp32"]
    return main(words)


@pytest.mark.parametrize(
    ("kind", "activation", "limit"),
    [
        ("KandinskyV22PriorPipeline", "gelu", 10.0),
        ("KandinskyPriorPipeline", "quick_gelu", 0.5),
    ],
)
def test_it_draws_the_embeddings_that_diffusers_draws(kind, activation, limit, tmp_path, capsys):
    theirs = pipeline(kind, activation, limit)
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# a prior\n")
    assert imported(tmp_path / "theirs", tmp_path / "ours") == 0
    listed = [line.split(":")[0].split("/")[-1] for line in capsys.readouterr().out.splitlines()]
    assert listed == ["clip", "prior"]
    card = (tmp_path / "ours" / "prior" / "README.md").read_text()
    assert "license: apache-2.0\n" in card and "unclip import kandinsky-prior" in card
    prior = load_stage(tmp_path / "ours" / "prior", DiffusionPrior)
    clip = FrozenCLIP(CLIPConfig(model=f"local-dir:{tmp_path / 'ours' / 'clip'}"))
    batch = kit.captions_of(SimpleNamespace(clip=clip), CAPTIONS)
    kit.in_float64(theirs.scheduler)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    expected = theirs(CAPTIONS, generator=generators, num_inference_steps=9).image_embeds
    sampling = replace(prior.sampling, steps=9)
    drawn = prior.sample(batch, kit.noise(SEEDS), sampling)
    assert expected.std() > 0.2
    assert kit.relative(drawn, expected) < 1e-4
    assert prior.sampling.threshold == limit  # which shows:
    other = prior.sample(batch, kit.noise(SEEDS), replace(sampling, threshold=limit / 20))
    assert kit.relative(other, expected) > 1e-2
    assert (prior.sampling.steps, prior.sampling.guidance_scale) == (25, 4.0)
    other = kit.captions_of(SimpleNamespace(clip=clip), ["a car", "rain"])
    assert kit.relative(prior.sample(other, kit.noise(SEEDS), sampling), expected) > 1e-2


def test_it_is_of_kandinskys_size():
    prior = prior_stage(PriorTransformerConfig(1280, 2048, 20, 32), 77, 10.0)
    with torch.device("meta"):
        theirs = diffusers.PriorTransformer(embedding_dim=1280)
    count = sum(parameter.numel() for parameter in theirs.parameters())
    statistics = 2 * 1280  # parameters there, buffers here
    assert sum(parameter.numel() for parameter in prior.parameters()) == count - statistics


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("KandinskyV22Pipeline", "another network than an unCLIP decoder of pixels"),
        ("StableUnCLIPPipeline", "another network than an unCLIP decoder of pixels"),
        ("UnCLIPPipeline", "Kandinsky's prior is a KandinskyV22PriorPipeline"),
    ],
)
def test_another_model_is_a_sentence(kind, said, tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": kind}))
    assert imported(folder, tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and not (tmp_path / "out").exists()
    if kind != "UnCLIPPipeline":
        assert main(["import", "karlo", str(folder), "--out", str(tmp_path / "out")]) == 1
        assert said in capsys.readouterr().err


@pytest.mark.parametrize("lost", ["prior", "scheduler", "text_encoder", "image_encoder"])
def test_a_part_that_is_missing_is_a_sentence(lost, tmp_path, capsys):
    pipeline().save_pretrained(tmp_path / "in")
    (tmp_path / "in" / lost).rename(tmp_path / "elsewhere")
    capsys.readouterr()
    assert imported(tmp_path / "in", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert lost in error and "missing" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()
