"""Karlo's weights, imported: what diffusers draws with them, ours draw from the same noise; and the
same releases come out of Karlo's own files."""

import json
from dataclasses import replace

import numpy as np
import PIL.Image
import pytest
import torch
from torch.nn import functional as F

from tests.interop import kit, originals
from unclip_pl.cli.unclip import main
from unclip_pl.diffusion.schedule import Schedule
from unclip_pl.pipeline import release
from unclip_pl.pipeline.interop.importing import import_karlo
from unclip_pl.pipeline.unclip import UnCLIP
from unclip_pl.pipeline.weights import load_pretrained, load_stage
from unclip_pl.stages.decoder import Decoder
from unclip_pl.stages.diffusion_prior import DiffusionPrior
from unclip_pl.stages.upsampler import Upsampler256

CAPTIONS = ["a red apple on a blue table", "two dogs"]
SEEDS = [5, 6]
"""At t = 999 a pixel of x_0 is the sign of x_t - sigma eps, as alpha is nearly 0. With these seeds
none is so near 0 that rounding decides; with 3 one is, and the pictures part from there."""


def load(folder) -> UnCLIP:
    return UnCLIP.load(folder / "decoder", folder / "prior", upsamplers=[folder / "upsampler-256"])


@pytest.fixture(scope="module")
def karlo(tmp_path_factory):
    """diffusers' pipelines of a small Karlo, its folder, and what was imported from it."""
    torch.set_num_threads(1)
    home = tmp_path_factory.mktemp("karlo")
    generate, vary = kit.pipelines()
    kit.save(home / "theirs", generate, vary)
    import_karlo(home / "theirs", home / "ours", precision="fp32")
    return generate, vary, home


def exact(pipeline):
    """With its schedulers' tables in float64."""
    for name in ("prior_scheduler", "decoder_scheduler", "super_res_scheduler"):
        if (scheduler := getattr(pipeline, name, None)) is not None:
            kit.in_float64(scheduler)
    return pipeline


def test_captions_become_the_pictures_that_diffusers_draws(karlo):
    generate, _, home = karlo
    ours, steps = load(home / "ours"), (25, 25, 7)
    theirs = kit.drawn_by_diffusers(generate, SEEDS, steps, prompt=CAPTIONS)
    drawn = kit.drawn_by_us(ours, SEEDS, kit.captions_of(ours, CAPTIONS), steps)
    assert theirs["prior"].std() > 0.3 and theirs["decoder"].std() > 0.3  # they are no constants
    assert kit.relative(drawn["prior"], theirs["prior"]) < 1e-3
    assert kit.relative(drawn["decoder"], theirs["decoder"]) < 1e-3
    other = kit.drawn_by_us(ours, SEEDS, kit.captions_of(ours, ["a car", "rain"]), steps)
    assert kit.relative(other["prior"], theirs["prior"]) > 1e-2  # the caption shows
    assert kit.relative(other["decoder"], theirs["decoder"]) > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("size", kit.WIDTHS)
def test_with_exact_schedules_they_are_equal(size, tmp_path):
    width, head = kit.WIDTHS[size]
    generate, vary = kit.pipelines(width, head, dim=width)
    kit.save(tmp_path / "theirs", generate, vary)
    import_karlo(tmp_path / "theirs", tmp_path / "ours", precision="fp32")
    ours, steps = load(tmp_path / "ours"), (9, 6, 7)
    theirs = kit.drawn_by_diffusers(exact(generate), SEEDS, steps, prompt=CAPTIONS)
    drawn = kit.drawn_by_us(ours, SEEDS, kit.captions_of(ours, CAPTIONS), steps)
    assert kit.relative(drawn["prior"], theirs["prior"]) < 1e-4
    assert kit.relative(drawn["decoder"], theirs["decoder"]) < 1e-4
    assert (drawn["upsampler"] - theirs["upsampler"]).abs().max() / 2 < 0.01


def test_pictures_become_the_variations_that_diffusers_draws(karlo):
    _, vary, home = karlo
    ours, steps = load(home / "ours"), (25, 7)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 28, 28, 3), dtype=np.uint8)
    images = [PIL.Image.fromarray(picture) for picture in pixels]
    theirs = kit.drawn_by_diffusers(vary, SEEDS, steps, image=images)
    tensors = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
    drawn = kit.drawn_by_us(ours, SEEDS, {"image_embed": ours.embed_images(tensors)}, steps)
    assert kit.relative(drawn["prior"], theirs["prior"]) < 1e-5
    assert kit.relative(drawn["decoder"], theirs["decoder"]) < 1e-3
    assert kit.relative(drawn["upsampler"], theirs["upsampler"]) < 1e-2


def test_the_last_step_is_the_second_network(karlo):
    _, _, home = karlo
    stage = load_stage(home / "ours" / "upsampler-256", Upsampler256)
    calls = []
    stage.net.register_forward_hook(lambda net, args, out: calls.append(("first", int(args[1][0]))))
    stage.last_net.register_forward_hook(
        lambda net, args, out: calls.append(("last", int(args[1][0])))
    )
    noise = kit.noise(SEEDS)
    stage.sample({"low_res": torch.zeros(2, 3, 16, 16)}, noise)
    assert calls == [("first", t) for t in (999, 832, 666, 500, 333, 166)] + [("last", 0)]


def test_steps_are_karlos():
    scheduler = kit.schedulers()["decoder_scheduler"]
    for count in (2, 7, 10, 25, 50, 100, 1000):
        scheduler.set_timesteps(count)
        ours = Schedule.named("cosine").respaced(count).timesteps
        assert ours.tolist() == scheduler.timesteps.tolist()[::-1]


@pytest.mark.slow
def test_karlos_own_files_give_the_same_releases(tmp_path):
    generate, vary = kit.pipelines(64, 64, side=64, dim=64)
    kit.save(tmp_path / "theirs", generate, vary)
    import_karlo(tmp_path / "theirs", tmp_path / "ours", precision="fp32")
    own = originals.save(tmp_path / "own", generate)
    clip = f"local-dir:{tmp_path / 'ours' / 'clip'}"
    words = ["import", "karlo", str(own), "--out", str(tmp_path / "again"), "--precision", "fp32"]
    assert main([*words, "--clip", clip]) == 0
    for name in ("prior", "decoder", "upsampler-256"):
        one, other = (release.read(tmp_path / place / name) for place in ("ours", "again"))
        assert one.tensors.keys() == other.tensors.keys()
        for key, value in one.tensors.items():
            torch.testing.assert_close(other.tensors[key], value, rtol=0, atol=0, equal_nan=True)
        theirs, settings = dict(one.hyper_parameters), dict(other.hyper_parameters)
        if name == "prior":  # diffusers keeps its prediction within 5, Karlo within 10
            assert settings["sampling"]["threshold"] == 10
            settings["sampling"] = settings["sampling"] | {"threshold": 5.0}
        assert settings == theirs


@pytest.mark.slow
def test_a_folder_is_imported_by_the_command_and_drawn_with(tmp_path, capsys):
    kit.save(tmp_path / "theirs", *kit.pipelines(side=64))
    (tmp_path / "theirs" / "README.md").write_text("---\nlicense: openrail\n---\n# a Karlo\n")
    words = ["import", "karlo", str(tmp_path / "theirs"), "--out", str(tmp_path / "ours")]
    assert main(words) == 0
    listed = capsys.readouterr().out.splitlines()
    names = [line.split(":")[0].split("/")[-1] for line in listed]
    assert names == ["clip", "prior", "decoder", "upsampler-256"]
    config = json.loads((tmp_path / "ours" / "decoder" / "config.json").read_text())
    sampling = config["hyper_parameters"]["sampling"]
    assert (sampling["sampler"], sampling["steps"], sampling["guidance_scale"]) == ("ddpm", 25, 8)
    card = (tmp_path / "ours" / "prior" / "README.md").read_text()
    assert card.startswith("---\n") and "license: openrail\n" in card
    moved = (tmp_path / "ours").rename(tmp_path / "moved")  # the CLIP is found next to the releases
    assert UnCLIP.from_pretrained(moved).sizes == (64, 256)
    options = ["--prior", str(moved / "prior"), "--decoder", str(moved / "decoder")]
    options += ["--upsampler-256", str(moved / "upsampler-256"), "--size", "256", "--steps", "2"]
    options += ["--prior-steps", "2", "--upsampler-steps", "2", "--num-images", "1"]
    out = tmp_path / "pictures"
    assert main(["generate", "a red apple", *options, "--out", str(out)]) == 0
    assert any(PIL.Image.open(file).size == (256, 256) for file in out.glob("*.png"))


def test_half_precision_halves_weights_and_keeps_statistics(karlo, tmp_path):
    _, _, home = karlo
    import_karlo(home / "theirs", tmp_path / "half")
    half, whole = (release.read(path / "prior") for path in (tmp_path / "half", home / "ours"))
    for name, value in whole.tensors.items():
        kept = name.startswith(("normalizer.", "x0_error", "net.empty", "skipped"))
        expected = value if kept else value.half().float()
        torch.testing.assert_close(half.tensors[name], expected, rtol=0, atol=0, equal_nan=True)


def test_parts_that_are_cut_in_pieces_are_read(karlo, tmp_path):
    generate, vary, home = karlo
    kit.save(tmp_path / "pieces", generate, vary)
    for file in (tmp_path / "pieces" / "prior").glob("*.safetensors"):
        file.unlink()
    generate.prior.save_pretrained(tmp_path / "pieces" / "prior", max_shard_size="200KB")
    assert len(list((tmp_path / "pieces" / "prior").glob("*.safetensors"))) > 1
    import_karlo(tmp_path / "pieces", tmp_path / "ours", precision="fp32")
    one, other = (release.read(path / "ours" / "prior").tensors for path in (tmp_path, home))
    assert all(torch.equal(one[name], other[name]) for name in one if name != "x0_error")


def test_releases_are_of_the_size_of_karlo():
    """All parameters that diffusers counts at Karlo's own size, and no others, without weights."""
    from unclip_pl.networks.prior import PriorTransformerConfig
    from unclip_pl.networks.unet import UNetConfig
    from unclip_pl.pipeline.interop.karlo import decoder_stage, prior_stage, upsampler_stage
    from unclip_pl.stages.upsampler import NET

    prior = prior_stage(PriorTransformerConfig(768, 2048, 20, 32), 77, 5.0)
    decoder = decoder_stage(UNetConfig(width=320, embed_dim=768, context_width=1536))
    net = UNetConfig(image_size=256, width=320, scale_shift=False, **NET)
    upsampler = upsampler_stage(net)
    with torch.device("meta"):
        theirs = kit.karlo_size()
    count = {name: sum(p.numel() for p in module.parameters()) for name, module in theirs.items()}

    def own(stage) -> int:
        return sum(parameter.numel() for parameter in stage.parameters())

    statistics = 2 * 768  # parameters there, buffers here
    assert own(prior) == count["prior"] - statistics == 1_022_028_544
    assert own(decoder) == count["decoder"] + count["text_proj"] == 893_318_086
    assert own(upsampler) == 2 * count["super_res_first"] == 2 * 691_579_523


def test_imported_weights_train_on_from_where_they_are(karlo, tmp_path):
    """The loss of imported weights is not that of fresh ones, and the scale of embeddings stays."""
    _, _, home = karlo
    prior = load_stage(home / "ours" / "prior", DiffusionPrior)
    fresh = DiffusionPrior(**prior.hparams)
    assert not fresh.normalizer.fitted
    load_pretrained(fresh, home / "ours" / "prior")
    assert fresh.normalizer.fitted
    torch.testing.assert_close(fresh.normalizer.std, prior.normalizer.std)
    decoder = load_stage(home / "ours" / "decoder", Decoder)
    again = Decoder(**decoder.hparams)
    load_pretrained(again, home / "ours" / "decoder")
    batch = {"image": torch.rand(4, 3, 16, 16), "image_embed": torch.randn(4, 32)}
    batch |= {"text_embed": torch.randn(4, 32), "text_states": torch.randn(4, 77, 32)}
    batch["text_mask"] = torch.arange(77).expand(4, -1) < 5
    optimizer = torch.optim.Adam(again.parameters(), lr=1e-3)
    generator = torch.Generator()
    losses = []
    for _ in range(12):
        loss = again.loss(batch, generator.manual_seed(0))["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert F.mse_loss(again.null_embed, decoder.null_embed) < 1e-3  # went on from there
    settings = replace(decoder.sampling, steps=2)
    assert again.sample(batch, kit.noise([0, 1, 2, 3]), settings).isfinite().all()
