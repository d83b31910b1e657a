"""Stages of ours in diffusers: a folder loads there, draws the same, and comes back to the bit."""

import json
import weakref

import pytest
import torch

from tests.factories import randomise
from tests.interop import kit
from unclip_pl.cli.unclip import main
from unclip_pl.diffusion.process import DiffusionConfig
from unclip_pl.networks.prior import PriorTextConfig, PriorTransformerConfig
from unclip_pl.networks.text import TextConfig
from unclip_pl.networks.unet import UNetConfig
from unclip_pl.pipeline import release
from unclip_pl.pipeline.interop import exporting
from unclip_pl.pipeline.interop.importing import import_karlo
from unclip_pl.pipeline.release import Release
from unclip_pl.pipeline.unclip import UnCLIP
from unclip_pl.pipeline.weights import load_stage
from unclip_pl.stages.ar_prior import ARPrior
from unclip_pl.stages.data_checks import empty_caption
from unclip_pl.stages.decoder import Decoder, DecoderSamplingConfig
from unclip_pl.stages.diffusion_prior import DiffusionPrior, PriorSamplingConfig
from unclip_pl.stages.upsampler import NET, Upsampler256, Upsampler1024, UpsamplingConfig
from unclip_pl.utils.errors import UserError

CAPTIONS, SEEDS = ["a red apple on a blue table", "two dogs"], [5, 6]
STAGES = "prior", "decoder", "upsampler-256"
SMALL = {"width": 32, "mults": (1, 2), "depth": 1}
PRIOR = {
    "net": PriorTransformerConfig(embed_dim=32, width=64, depth=1, heads=2),
    "text": PriorTextConfig(states_width=32, padding="masked", null="empty"),
    "diffusion": DiffusionConfig(parametrization="x0", variance="fixed_small"),
    "sampling": PriorSamplingConfig("ddpm", 4, guidance_scale=2.0, num_candidates=1),
    "normalizer": "none",
}
DECODER = {
    "net": UNetConfig(
        image_size=16, attention=(16, 8), head_width=32, embed_dim=32, context_width=48, **SMALL
    ),
    "text": TextConfig("states", states_width=32, null="empty"),
    "diffusion": DiffusionConfig(variance_bound=None),
    "sampling": DecoderSamplingConfig("ddpm", 4, guidance_scale=3.0, threshold=None),
    "normalizer": "none",
}
UPSAMPLER = {
    "net": UNetConfig(image_size=64, **SMALL, **NET),
    "diffusion": DiffusionConfig(variance="fixed_small"),
    "sampling": UpsamplingConfig("ddpm", 3),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a Karlo of diffusers, "theirs", and what was imported from it, "ours"."""
    folder = tmp_path_factory.mktemp("export")
    kit.save(folder / "theirs", *kit.pipelines())
    import_karlo(folder / "theirs", folder / "ours", precision="fp32")
    return folder


def exported(folder, out, stages=STAGES, precision="fp32"):
    paths = [str(folder / name) for name in stages]
    words = ["export", *paths, "--to", "diffusers", "--out", str(out), "--precision", precision]
    assert main(words) == 0
    return out


def test_import_export_import_is_equal_to_the_bit(home, tmp_path, capsys):
    back = exported(home / "ours", tmp_path / "back")
    assert "DiffusionPrior: give the pipeline 25 steps and guidance 4.0" in capsys.readouterr().out
    import_karlo(back, tmp_path / "again", precision="fp32")
    for name in STAGES:
        one, other = (release.read(place / name) for place in (home / "ours", tmp_path / "again"))
        assert one.hyper_parameters == other.hyper_parameters
        assert one.tensors.keys() == other.tensors.keys()
        for key, value in one.tensors.items():
            torch.testing.assert_close(other.tensors[key], value, rtol=0, atol=0, equal_nan=True)
        ours, theirs = one.clip_fingerprint, other.clip_fingerprint
        if ours is not None:
            assert (ours["image"], ours["text"]) == (theirs["image"], theirs["text"])
    for part in ("prior", "decoder", "text_proj", "super_res_first", "super_res_last"):
        files = (place / part / "config.json" for place in (home / "theirs", back))
        named = [json.loads(file.read_text()) for file in files]
        assert {key: named[0][key] for key in named[1]} == named[1]


def own(home, tmp_path):
    """Releases of stages as they are trained here, with the CLIP of "ours" and random weights."""
    clip = UnCLIP.load(home / "ours" / "decoder").clip
    torch.manual_seed(0)
    prior = DiffusionPrior(**PRIOR)
    decoder = Decoder(**DECODER)
    upsampler = Upsampler256(**UPSAMPLER)
    states, embed = empty_caption(clip)
    for stage in (prior, decoder, upsampler):
        randomise(stage, 0.02)
    prior.net.set_null(states, embed)
    decoder.text.set_null(states, embed)
    for name, stage in zip(STAGES, (prior, decoder, upsampler)):
        fingerprint = clip.fingerprint() if name != "upsampler-256" else None
        made = Release(type(stage).__name__, dict(stage.hparams), fingerprint, stage.state_dict())
        release.write(tmp_path / name, made, "# own", exact=stage.state_dict())
    return tmp_path


def test_a_model_of_ours_draws_the_same_in_diffusers(home, tmp_path):
    made = own(home, tmp_path / "own")
    folder = exported(made, tmp_path / "theirs")
    pipeline = kit.loaded(folder, "UnCLIPPipeline")
    for name in ("prior_scheduler", "decoder_scheduler", "super_res_scheduler"):
        kit.in_float64(getattr(pipeline, name))
    scales = {"prior_guidance_scale": 2.0, "decoder_guidance_scale": 3.0}
    theirs = kit.drawn_by_diffusers(pipeline, SEEDS, (4, 4, 3), prompt=CAPTIONS, **scales)
    ours = UnCLIP.load(made / "decoder", made / "prior", upsamplers=[made / "upsampler-256"])
    drawn = kit.drawn_by_us(ours, SEEDS, kit.captions_of(ours, CAPTIONS), (4, 4, 3))
    for name in ("prior", "decoder", "upsampler"):
        assert theirs[name].std() > 0.05
        assert kit.relative(drawn[name], theirs[name]) < 1e-3, name
    single = kit.diffusers.PriorTransformer.from_pretrained(folder / "prior")
    stage = load_stage(made / "prior", DiffusionPrior)
    own_count = sum(parameter.numel() for parameter in stage.parameters())
    assert sum(p.numel() for p in single.parameters()) == own_count + 2 * 32  # mean and std


def test_without_a_prior_it_is_the_variation_pipeline(home, tmp_path):
    folder = exported(home / "ours", tmp_path / "vary", STAGES[1:], precision="fp16")
    pipeline = kit.loaded(folder, "UnCLIPImageVariationPipeline")
    images = torch.randn(2, 3, 28, 28)
    embeds = pipeline.image_encoder(images).image_embeds
    expected = kit.pipelines()[1].image_encoder(images).image_embeds
    torch.testing.assert_close(embeds, expected)
    drawn = pipeline(image_embeddings=embeds.detach(), decoder_num_inference_steps=2).images
    assert len(drawn) == 2 and drawn[0].size == (64, 64)


def refusal(stage, tmp_path, capsys, fingerprint=None) -> str:
    made = Release(type(stage).__name__, dict(stage.hparams), fingerprint, stage.state_dict())
    release.write(tmp_path / "stage", made, "# card", exact=stage.state_dict())
    capsys.readouterr()
    words = ["export", str(tmp_path / "stage"), "--to", "diffusers", "--out", str(tmp_path / "x")]
    assert main(words) == 1
    assert not (tmp_path / "x").exists()
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"text": PriorTextConfig(states_width=32)}, "text.padding learned"),
        ({"text": PriorTextConfig(states_width=32, padding="masked")}, "text.null learned"),
        ({"text": PriorTextConfig("tokens", vocab_size=50)}, "text.kind tokens"),
        (
            {"text": PriorTextConfig(states_width=24, padding="masked", null="empty")},
            "text.states_width 24",
        ),
        ({"normalizer": "unit"}, "normalizer unit"),
        (
            {"diffusion": DiffusionConfig(parametrization="v", variance="fixed_small")},
            "diffusion.parametrization v",
        ),
        (
            {"diffusion": DiffusionConfig(parametrization="x0", variance="fixed_large")},
            "diffusion.variance fixed_large",
        ),
    ],
)
def test_a_prior_that_diffusers_cannot_hold(change, setting, tmp_path, capsys):
    said = refusal(DiffusionPrior(**(PRIOR | change)), tmp_path, capsys)
    assert f"DiffusionPrior has model.{setting}, which" in said


def unet(**change) -> UNetConfig:
    return UNetConfig(**(vars(DECODER["net"]) | change))


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"text": TextConfig("states", states_width=32)}, "text.null learned"),
        ({"text": TextConfig("transformer", width=32, depth=1, heads=1)}, "text.kind transformer"),
        (
            {"text": TextConfig("states", states_width=32, null="empty", pooled=False)},
            "text.pooled False",
        ),
        ({"normalizer": "unit"}, "normalizer unit"),
        ({"condition": "text"}, "condition text"),
        ({"diffusion": DiffusionConfig(parametrization="v")}, "diffusion.parametrization v"),
        ({"diffusion": DiffusionConfig(parametrization="x0")}, "diffusion.parametrization x0"),
        ({"diffusion": DiffusionConfig(schedule="linear")}, "diffusion.schedule linear"),
        ({"diffusion": DiffusionConfig()}, "diffusion.variance_bound 2.0"),
        ({"net": unet(patch_size=2, attention=(4,))}, "net.patch_size 2"),
        ({"net": unet(scale_shift=False)}, "net.scale_shift False"),
        ({"net": unet(thumbnail=4)}, "net.thumbnail 4"),
    ],
)
def test_a_decoder_that_diffusers_cannot_hold(change, setting, tmp_path, capsys):
    said = refusal(Decoder(**(DECODER | change)), tmp_path, capsys)
    assert f"Decoder has model.{setting}, which" in said


@pytest.mark.parametrize(
    ("change", "setting"),
    [
        ({"clamp_condition": True}, "clamp_condition True"),
        (
            {
                "residual_std": 0.2,
                "diffusion": DiffusionConfig(parametrization="v", variance="fixed_small"),
            },
            "diffusion.parametrization v",
        ),
    ],
)
def test_an_upsampler_that_diffusers_cannot_hold(change, setting, tmp_path, capsys):
    said = refusal(Upsampler256(**(UPSAMPLER | change)), tmp_path, capsys)
    assert f"Upsampler256 has model.{setting}, which" in said


def test_one_stage_is_in_memory_at_a_time(home, tmp_path, monkeypatch):
    loaded: list[weakref.ref] = []

    def watched(path, *kinds):
        assert not any(stage() for stage in loaded)
        stage = load_stage(path, *kinds)
        loaded.append(weakref.ref(stage))
        return stage

    monkeypatch.setattr(exporting, "load_stage", watched)
    parts = [home / "ours" / name for name in ("prior", "decoder", "upsampler-256")]
    exporting.export_diffusers(parts, tmp_path / "out")
    assert len(loaded) == 3 and (tmp_path / "out" / "model_index.json").is_file()


def test_stages_that_diffusers_does_not_know(home, tmp_path, capsys):
    assert "no counterpart of Upsampler1024" in refusal(
        Upsampler1024(**UPSAMPLER), tmp_path, capsys
    )
    from tests.factories import tiny_stage

    stage = tiny_stage("ar_prior")
    assert isinstance(stage, ARPrior)
    assert "no counterpart of ARPrior" in refusal(stage, tmp_path / "ar", capsys)
    decoder = str(home / "ours" / "decoder")
    words = ["export", decoder, decoder, "--out", str(tmp_path / "two")]
    assert main([*words, "--to", "diffusers"]) == 1
    assert "a second Decoder" in capsys.readouterr().err
    assert main(words) == 1
    assert "is made of one checkpoint" in capsys.readouterr().err
    with pytest.raises(UserError, match="exists already"):
        from unclip_pl.pipeline.interop.exporting import export_diffusers

        export_diffusers([], home)
