"""The upsamplers learn with either schedule, see only low_res, and work on whole images of any size
without seams, shifts or changes of colour.
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.plugins.precision import Precision

from tests.factories import fill_zeros
from unclip_pl.diffusion.noise import Noise
from unclip_pl.diffusion.process import DiffusionConfig
from unclip_pl.networks.layers import GroupNorm32
from unclip_pl.networks.unet import Attention, UNetConfig
from unclip_pl.pipeline import release
from unclip_pl.pipeline import weights as pipeline
from unclip_pl.pipeline.locate import DEFAULT_UPSAMPLERS
from unclip_pl.pipeline.release import Release
from unclip_pl.stages.upsampler import NET, Upsampler, Upsampler256, Upsampler1024, UpsamplingConfig
from unclip_pl.training.pictures import Pictures
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import psnr

SMALL = UNetConfig(image_size=32, width=32, mults=(1, 2), depth=1, dropout=0.0, **NET)
FLAT = UNetConfig(image_size=32, width=32, mults=(1,), depth=1, patch_size=4, dropout=0.0, **NET)


def speaking(stage: Upsampler) -> Upsampler:
    """The stage with outputs that do not start at zero."""
    fill_zeros(stage.net)
    return stage.eval()


def pictures(count: int, side: int = 32, seed: int = 1) -> torch.Tensor:
    """Discs of one colour on another, antialiased by drawing them four times as large."""
    generator = torch.Generator().manual_seed(seed)
    large = torch.arange(4 * side).float()
    images = []
    for _ in range(count):
        y, x, r = 4 * side * torch.rand(3, generator=generator)
        inside, outside = torch.rand(2, 3, 1, 1, generator=generator) * 2 - 1
        radius = 0.2 * 4 * side + 0.3 * r
        disc = (large[:, None] - y) ** 2 + (large - x) ** 2 < radius**2
        images.append(F.avg_pool2d(torch.where(disc, inside, outside), 4))
    return torch.stack(images)


def reduced(images: torch.Tensor) -> torch.Tensor:
    return F.interpolate(images, scale_factor=0.25, mode="bicubic", antialias=True).clamp(-1, 1)


def batch(count: int = 4, side: int = 32) -> dict:
    images = pictures(count, side)
    return {"key": [str(i) for i in range(count)], "image": images, "low_res": reduced(images)}


@pytest.mark.parametrize("kind", [Upsampler256, Upsampler1024])  # cosine and linear
def test_either_schedule_overfits_eight_pictures(kind):
    """A network that has learned eight images restores edges that bicubic enlargement cannot."""
    stage = kind(net=FLAT, residual_std=0.15)
    assert stage.process.config.schedule == {Upsampler256: "cosine", Upsampler1024: "linear"}[kind]
    data = batch(8)
    optimizer = torch.optim.AdamW(stage.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 120)
    for _ in range(120):
        optimizer.zero_grad()
        stage.loss(data)["loss"].backward()
        optimizer.step()
        schedule.step()
    drawn = stage.eval().sample(data, Noise(range(8)))
    bicubic = psnr(stage.enlarged(data["low_res"]), data["image"])
    assert psnr(drawn, data["image"]).mean() > bicubic.mean() + 2
    assert (drawn.mean((2, 3)) - data["image"].mean((2, 3))).abs().max() < 4 / 127.5


def test_no_module_is_attention_and_none_is_accepted():
    for kind in (Upsampler256, Upsampler1024):
        with torch.device("meta"):
            stage = kind()
        assert not any(
            isinstance(module, (Attention, torch.nn.MultiheadAttention))
            for module in stage.modules()
        )
    for wrong in (
        {"middle_attention": True},
        {"attention": (8,)},
        {"embed_dim": 8},
        {"out_channels": 6},
    ):
        with pytest.raises(ValueError, match="attention"):
            Upsampler(
                net=UNetConfig(
                    image_size=32, width=32, mults=(1, 2), depth=1, head_width=32, **NET | wrong
                )
            )


@pytest.mark.parametrize(
    "change",
    [
        {"parametrization": "v", "variance": "learned_range"},
        {"parametrization": "eps", "variance": "fixed_small"},
    ],
)
def test_settings_that_do_not_go_together_are_a_sentence(change):
    with pytest.raises(ValueError, match=r"set model\.diffusion|model\.residual_std is"):
        Upsampler(net=FLAT, diffusion=DiffusionConfig(**change), residual_std=0.1)


def test_without_a_residual_the_loss_is_the_plain_mean_square_of_v():
    stage, given = speaking(Upsampler256(net=SMALL)), batch()
    seen = {}
    stage.net.register_forward_hook(
        lambda module, args, out: seen.update(x_t=args[0], t=args[1], out=out)
    )
    loss = stage.loss(given)["loss"]
    abar = stage.process.schedule.alphas_cumprod[seen["t"]].view(-1, 1, 1, 1)
    v = (abar.sqrt() * seen["x_t"].double() - given["image"].double()) / (1 - abar).sqrt()
    torch.testing.assert_close(
        loss.double(), (seen["out"].double() - v).square().mean(), rtol=1e-4, atol=1e-6
    )


def test_every_parameter_gets_a_gradient_and_the_loss_is_a_mean_over_samples():
    stage = speaking(Upsampler256(net=SMALL, residual_std=0.2))
    losses = stage.loss(batch())
    torch.testing.assert_close(losses["loss"], losses["per_sample"].mean())
    losses["loss"].backward()
    assert [name for name, p in stage.named_parameters() if p.grad is None] == []


def test_linear_estimate_is_a_conditional_mean_and_its_error_is_stated():
    """Against float64 regression of v on x_t, for x_0 = low + s r: the mean for s a fifth of
    `residual_std`, the error for `residual_std` itself."""
    stage = Upsampler256(net=FLAT, residual_std=0.3)
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(1, 1, 1, 1, generator=generator) * 2 - 1
    r, noise = torch.randn(2, 200_000, 1, 1, 1, generator=generator)
    for step in (0, 60, 300, 700, 999):
        t = torch.full((len(r),), step)
        for s in (0.06, 0.3):
            x0 = low + s * r
            x_t, v = stage.process.diffuse(x0, t, noise), stage.process.target(x0, t, noise)
            mean, error = stage._linear(x_t, t, low)
            if s == 0.06:
                design = torch.stack([x_t.flatten(), torch.ones(len(x0))], 1).double()
                best = design @ torch.linalg.lstsq(design, v.flatten().double()).solution
                torch.testing.assert_close(mean.flatten().double(), best, atol=0.03, rtol=0)
            else:
                assert abs((v - mean).square().mean().sqrt() / error[0] - 1).item() < 0.01


def test_image_k_is_the_same_in_any_batch():
    stage = speaking(Upsampler256(net=SMALL, residual_std=0.2))
    given, settings = batch(), UpsamplingConfig(steps=4, eta=0.5)
    whole = stage.sample(given, Noise([5, 6, 7, 8]), settings)
    part = stage.sample({"low_res": given["low_res"][1:3]}, Noise([6, 7]), settings)
    torch.testing.assert_close(whole[1:3], part, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(5, 7), (1, 3), (8, 8), (3, 16)])
@pytest.mark.parametrize(
    "net",
    [
        SMALL,
        UNetConfig(
            image_size=64, width=32, mults=(1, 2, 2), depth=1, patch_size=8, dropout=0.0, **NET
        ),
    ],
)
def test_any_size_comes_back_at_four_times_it(height, width, net):
    stage = speaking(Upsampler256(net=net))
    drawn = stage.sample(
        {"low_res": torch.rand(1, 3, height, width)}, Noise([0]), UpsamplingConfig(steps=2)
    )
    assert drawn.shape == (1, 3, 4 * height, 4 * width) and drawn.abs().max() <= 1


def test_an_untrained_upsampler_with_a_residual_gives_its_condition_back_in_place():
    """Alignment to a fraction of a pixel: a shift of this ramp and disc by half a pixel would be
    twenty times the tolerance."""
    stage = Upsampler256(
        net=FLAT, residual_std=0.02
    ).eval()  # its output is zero: only the linear estimate is left
    low_res = reduced(pictures(2, 64))
    drawn = stage.sample({"low_res": low_res}, Noise([0, 1]))
    for axis in (2, 3):
        shifted = (drawn + drawn.roll(1, axis)) / 2
        error, half_a_pixel = drawn - stage.enlarged(low_res), shifted - drawn
        assert error.abs().mean() < 0.5 * half_a_pixel.abs().mean() + 0.02
    assert (drawn.mean((2, 3)) - low_res.mean((2, 3))).abs().max() < 2 / 127.5


def test_a_crop_is_drawn_as_the_same_place_of_the_whole(monkeypatch):
    """With the same noise and condition a crop and the whole image agree far from the borders, so
    nothing depends on position or size (no seams).

    Group norms, which see the whole image, are switched off: what is left is local, so that seams
    would show exactly.
    """
    monkeypatch.setattr(GroupNorm32, "forward", lambda norm, x: x)
    stage = speaking(Upsampler256(net=FLAT, residual_std=0.2))
    low_res = reduced(pictures(1, 256))
    noise = torch.randn(3, 256, 256, generator=torch.Generator().manual_seed(3))
    given = lambda part: lambda shape, device: part[None]
    draw = lambda low, part: stage.sample({"low_res": low}, given(part), UpsamplingConfig(steps=2))
    whole = draw(low_res, noise)
    crop = draw(low_res[..., 8:56, 12:60], noise[:, 32:224, 48:240])
    same_place = whole[..., 32:224, 48:240]
    inner = slice(88, -88)  # two steps of eleven 3x3 convolutions on patches of four pixels
    torch.testing.assert_close(
        crop[..., inner, inner], same_place[..., inner, inner], atol=1e-4, rtol=1e-4
    )
    # At the border they may differ, or the test could not fail.
    assert (crop - same_place)[..., :8, :].abs().max() > 1e-3


def test_hyperparameters_rebuild_the_stage_and_the_other_upsampler_is_refused(tmp_path):
    stage = speaking(Upsampler1024(net=FLAT, residual_std=0.1, sampling=UpsamplingConfig(steps=7)))
    release.write(
        tmp_path / "release",
        Release("Upsampler1024", dict(stage.hparams), None, stage.state_dict()),
        "# card",
    )
    again = pipeline.load_stage(tmp_path / "release", Upsampler1024)
    assert again.sampling.steps == 7
    assert again.residual_std == 0.1
    assert again.process.config.schedule == "linear"
    with pytest.raises(UserError, match="Upsampler1024"):
        pipeline.load_stage(tmp_path / "release", Upsampler256)
    with pytest.raises(UserError, match="Upsampler1024"):
        Upsampler256(net=FLAT).on_load_checkpoint({"stage": "Upsampler1024"})


def test_data_that_do_not_fit_are_a_sentence():
    class Data:
        image_size, crop, val_crop = 32, 16, 16

    stage = Upsampler256(
        net=UNetConfig(
            image_size=32, width=32, mults=(1, 2), depth=1, patch_size=4, dropout=0.0, **NET
        )
    )
    stage.check_data(Data())
    for name, value, said in (
        ("image_size", 64, "make them equal"),
        ("crop", 12, "multiple of 8"),
        ("val_crop", 4, r"data\.val_crop"),
    ):
        data = Data()
        setattr(data, name, value)
        with pytest.raises(UserError, match=said):
            stage.check_data(data)
    with pytest.raises(UserError, match="set data to UpsamplerData"):
        stage.check_data(object())


def test_validation_shows_condition_output_and_target_with_their_psnr(tmp_path):
    stage, given, logged, shown = Upsampler256(net=FLAT, residual_std=0.2).eval(), batch(), {}, []

    class Experiment:
        def add_image(self, name, picture, step, dataformats):
            shown.append((name, picture.shape))

    trainer = SimpleNamespace(
        sanity_checking=False,
        precision_plugin=Precision(),
        is_global_zero=True,
        default_root_dir=tmp_path,
        global_step=7,
        loggers=[SimpleNamespace(experiment=Experiment())],
    )
    stage.log_dict = lambda values, **_: logged.update(values)
    Pictures(count=3).on_validation_batch_end(trainer, stage, None, given, 0)
    image = given["image"][:3].double()
    low_res = given["low_res"][:3]
    enlarged = F.interpolate(low_res, scale_factor=4, mode="bicubic", antialias=True)
    enlarged = enlarged.clamp(-1, 1).double()
    expected = [
        20 * math.log10(2 / (a - b).square().mean().sqrt())
        for a, b in zip(enlarged, image, strict=True)
    ]
    assert abs(logged["val/psnr_bicubic"].item() - sum(expected) / 3) < 1e-3
    assert 5 < logged["val/psnr"] < logged["val/psnr_bicubic"] + 1  # untrained: about its condition
    assert shown[0][0] == "bicubic / drawn / held out" and shown[0][1][0] > 3 * 32
    assert (tmp_path / "pictures" / "step-0000007.png").is_file()


def overshooting() -> torch.Tensor:
    """Black and white squares of 3 pixels, whose bicubic enlargement leaves [-1, 1] at edges."""
    squares = (torch.arange(12)[:, None] // 3 + torch.arange(12) // 3) % 2 * 2.0 - 1
    return squares.expand(1, 3, -1, -1).clone()


@pytest.mark.parametrize("kind", [Upsampler256, Upsampler1024])
@pytest.mark.parametrize("clamped", [False, True])
def test_the_condition_is_clamped_only_where_asked(kind, clamped):
    stage, seen = speaking(kind(net=SMALL, clamp_condition=clamped)), []
    stage.net.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["low_res"]), with_kwargs=True
    )
    low_res = overshooting()
    expected = F.interpolate(low_res, scale_factor=4, mode="bicubic", antialias=True)
    assert expected.max() > 1.1 and expected.min() < -1.1
    expected = expected.clamp(-1, 1) if clamped else expected
    stage.loss({"image": torch.zeros(1, 3, 48, 48), "low_res": low_res})
    drawn = stage.sample({"low_res": low_res}, Noise([0]), UpsamplingConfig(steps=2))
    assert len(seen) == 3 and all(torch.equal(given, expected) for given in seen)
    assert drawn.abs().max() <= 1  # the picture is


def test_weights_that_do_not_say_so_were_trained_with_the_clamp(tmp_path):
    stage = speaking(Upsampler256(net=FLAT, residual_std=0.2, clamp_condition=True))
    low_res, settings = overshooting(), UpsamplingConfig(steps=2)
    drawn = stage.sample({"low_res": low_res}, Noise([0]), settings)
    older = {name: value for name, value in stage.hparams.items() if name != "clamp_condition"}
    release.write(
        tmp_path / "old", Release("Upsampler256", older, None, stage.state_dict()), "# card"
    )
    checkpoint = {
        "stage": "Upsampler256",
        "hyper_parameters": older,
        "state_dict": stage.state_dict(),
        "global_step": 3,
        "pytorch-lightning_version": "2.6.0",
    }
    torch.save(checkpoint, tmp_path / "old.ckpt")
    for path in (tmp_path / "old", tmp_path / "old.ckpt"):
        again = pipeline.load_stage(path, Upsampler256)
        assert again.clamp_condition and again.hparams["clamp_condition"] is True
        torch.testing.assert_close(
            again.sample({"low_res": low_res}, Noise([0]), settings), drawn, atol=2e-3, rtol=0
        )
    free = Upsampler256(net=FLAT, residual_std=0.2)
    release.write(
        tmp_path / "new",
        Release("Upsampler256", dict(free.hparams), None, free.state_dict()),
        "# card",
    )
    assert not pipeline.load_stage(tmp_path / "new", Upsampler256).clamp_condition


@pytest.mark.parametrize("size", ["256", "1024"])
def test_upsamplers_of_the_package_say_whether_they_clamp(size):
    config = json.loads((DEFAULT_UPSAMPLERS[size] / "config.json").read_text())
    assert config["hyper_parameters"]["clamp_condition"] is False


@pytest.mark.parametrize(
    ("steps", "visited"),
    [
        ("fast27", ([997, 800, 799], 27)),
        ((2, 1), ([500, 499, 0], 3)),
        ("ddim4", ([750, 500, 250], 4)),
    ],
)
def test_steps_by_section_and_by_name_are_kept_and_walked(steps, visited, tmp_path):
    stage = speaking(Upsampler256(net=FLAT, sampling=UpsamplingConfig(steps=steps)))
    release.write(
        tmp_path / "release",
        Release("Upsampler256", dict(stage.hparams), None, stage.state_dict()),
        "# card",
    )
    again, seen = pipeline.load_stage(tmp_path / "release", Upsampler256), []
    assert again.sampling.steps == steps and again.count_steps() == visited[1]
    again.net.register_forward_hook(lambda module, args, out: seen.append(int(args[1][0])))
    again.sample({"low_res": torch.rand(1, 3, 4, 4)}, Noise([0]))
    assert (seen[:3], len(seen)) == visited


def test_steps_that_the_process_has_not_are_refused_at_once():
    with pytest.raises(ValueError, match="fast28"):
        UpsamplingConfig(steps="fast28")
    with pytest.raises(ValueError, match="600 steps"):
        Upsampler256(net=FLAT, sampling=UpsamplingConfig(steps=(1, 600)))
