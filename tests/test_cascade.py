"""Upsamplers in a row, after the decoder and alone: sizes, seeds, batches, offloading, memory, and pictures of one's own of every kind."""

import numpy as np
import pytest
import torch
from PIL import Image

from unclip_pl.cli import demo
from unclip_pl.cli import unclip as app
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.diffusion.process import DiffusionConfig
from unclip_pl.networks.unet import UNetConfig
from unclip_pl.pipeline import release
from unclip_pl.pipeline import unclip as pipeline
from unclip_pl.pipeline.cascade import SEEDS, Cascade
from unclip_pl.pipeline.release import Release
from unclip_pl.pipeline.unclip import UnCLIP, load_upsamplers
from unclip_pl.stages.decoder import Decoder, SamplingConfig
from unclip_pl.stages.upsampler import NET, Upsampler256, Upsampler1024, UpsamplingConfig
from unclip_pl.utils import images
from unclip_pl.utils.errors import UserError

SMALL = {"width": 32, "mults": (1,), "depth": 1, "dropout": 0.0}
PROMPTS = ["red heart", "waving hand"]


def spoken(stage):
    """The stage with outputs that are not zero from the start."""
    for parameter in stage.net.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return stage.eval()


def stages():
    """A decoder and both upsamplers at their real sizes, with random weights and as small as can be."""
    torch.manual_seed(0)
    net = UNetConfig(
        image_size=64,
        patch_size=4,
        attention=(),
        middle_attention=False,
        head_width=32,
        embed_dim=256,
        **SMALL,
    )
    decoder = spoken(
        Decoder(
            net=net,
            sampling=SamplingConfig(sampler="ddim", steps=2),
            diffusion=DiffusionConfig(parametrization="v"),
        )
    )
    decoder.clip_fingerprint = FrozenCLIP().fingerprint()
    few = UpsamplingConfig(steps=2)
    low = spoken(
        Upsampler256(net=UNetConfig(image_size=256, patch_size=8, **SMALL, **NET), sampling=few)
    )
    high = spoken(
        Upsampler1024(net=UNetConfig(image_size=1024, patch_size=16, **SMALL, **NET), sampling=few)
    )
    return decoder, low, high


@pytest.fixture(scope="module")
def three():
    return stages()


@pytest.fixture(scope="module")
def releases(three, tmp_path_factory):
    """Folders of the three, by name."""
    root = tmp_path_factory.mktemp("releases")
    for name, stage in zip(("decoder", "256", "1024"), three):
        release.write(
            root / name,
            Release(
                type(stage).__name__,
                dict(stage.hparams),
                stage.clip_fingerprint,
                stage.state_dict(),
                1,
            ),
            "# a card\n",
        )
    return {name: str(root / name) for name in ("decoder", "256", "1024")}


@pytest.fixture(scope="module")
def unclip(three):
    decoder, low, high = three
    return UnCLIP(decoder, upsamplers=(low, high))


@pytest.fixture
def picture():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_every_size_is_drawn_and_a_larger_one_begins_with_the_smaller(unclip):
    assert unclip.sizes == (64, 256, 1024)
    told = []
    drawn = {
        size: unclip.generate(
            PROMPTS, [3, 4], "text", size=size, callback=lambda *step: told.append(step)
        )
        for size in unclip.sizes
    }
    assert [tuple(image.shape) for image in drawn.values()] == [
        (2, 3, 64, 64),
        (2, 3, 256, 256),
        (2, 3, 1024, 1024),
    ]
    assert torch.equal(unclip.upsample(drawn[64], [3, 4], 4), drawn[256]) and torch.equal(
        unclip.upsample(drawn[256], [3, 4], 4), drawn[1024]
    )
    assert drawn[1024].abs().max() <= 1 and torch.isfinite(drawn[1024]).all()
    last = told[
        -8:
    ]  # two steps of the decoder, two of the first upsampler for both pictures together, two for each picture of the second
    assert last == [("decoder", 1, 2), ("decoder", 2, 2), ("upsampler 256", 1, 2), ("upsampler 256", 2, 2),
                    *(("upsampler 1024", step, 4) for step in (1, 2, 3, 4))]  # fmt: skip
    assert (
        unclip.generate(
            PROMPTS[:1],
            [3],
            "text",
            upsampling={256: UpsamplingConfig(steps=1), 1024: UpsamplingConfig(steps=1)},
        ).shape[-1]
        == 1024
    )


def test_a_picture_depends_on_itself_and_its_seed_alone(unclip, picture):
    both = unclip.upsample(picture, [5, 6], 4)
    torch.testing.assert_close(
        unclip.upsample(picture[1:], [6], 4)[0], both[1], rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(unclip.upsample(picture[1:], [7], 4)[0], both[1], atol=1e-2)


def test_batches_that_are_split_equal_whole_ones(three, picture):
    sizes = []
    whole, split = Cascade(three[1:], batch_pixels=1 << 30), Cascade(three[1:], batch_pixels=1)
    expected = whole.upsample(picture, [5, 6], 4)
    handle = three[1].net.register_forward_pre_hook(
        lambda _, arguments: sizes.append(len(arguments[0]))
    )
    torch.testing.assert_close(split.upsample(picture, [5, 6], 4), expected, rtol=1e-4, atol=1e-4)
    whole.upsample(picture, [5, 6], 4)
    handle.remove()
    assert sizes == [1, 1, 1, 1, 2, 2]


def test_stages_share_no_random_numbers(three, monkeypatch):
    """For the same seeds, each stage reads generators that no other stage reads."""
    from unclip_pl.pipeline.unclip import PRIOR_SEEDS

    seen = {}
    for stage in three:
        draw = stage.sample
        monkeypatch.setattr(stage, "sample", lambda batch, noise, *rest, stage=stage, draw=draw: (
            seen.setdefault(stage, set()).update(g.initial_seed() for g in noise.generators), draw(batch, noise, *rest))[1])  # fmt: skip
    seeds = [0, 1, 2, 3, SEEDS - 1]
    UnCLIP(three[0], upsamplers=three[1:]).generate(
        ["fox"] * len(seeds), seeds, "caption", upsampling={1024: UpsamplingConfig(steps=1)}
    )
    used = [*seen.values(), {seed + PRIOR_SEEDS for seed in seeds}]
    assert len(used) == 4 and all(len(numbers) == len(seeds) for numbers in used)
    assert len(set.union(*used)) == 4 * len(seeds) and max(set.union(*used)) < 1 << 32


def test_offloading_draws_the_same_and_keeps_one_part_on_the_device(monkeypatch):
    """The device is called cpu:0 here, which is the CPU, so that it differs by name from where the stages wait."""
    decoder, low, high = stages()
    expected = UnCLIP(decoder, upsamplers=(low, high)).generate(PROMPTS[:1], [3], "text")
    clip = FrozenCLIP()
    where, crowd = {}, []
    for part in (decoder, low, high, clip):

        def moved(device, part=part, to=part.to):
            where[part] = str(device)
            crowd.append(sum(place == "cpu:0" for place in where.values()))
            return to(device)

        monkeypatch.setattr(part, "to", moved)
    offloaded = UnCLIP(decoder, clip=clip, device="cpu:0", upsamplers=(low, high), offload=True)
    assert set(where.values()) == {"cpu"} and len(where) == 4
    assert torch.equal(offloaded.generate(PROMPTS[:1], [3], "text"), expected)
    assert max(crowd) == 1 and crowd.count(1) >= 4 and set(where.values()) == {"cpu"}
    UnCLIP(decoder, clip=clip, device="cpu:0", upsamplers=(low, high))
    assert set(where.values()) == {"cpu:0"}


@pytest.mark.parametrize(
    ("side", "times", "sizes"),
    [(64, 4, [256]), (1, 4, [256]), (127, 4, [256]), (129, 4, [1024]), (256, 4, [1024]), (3000, 4, [1024]), (64, 16, [256, 1024]),
     (256, 16, [256, 1024]), (64, None, [256, 1024]), (256, None, [1024])],
)  # fmt: skip
def test_a_picture_goes_to_the_upsampler_made_for_the_nearest_size(unclip, side, times, sizes):
    assert [stage.net_config.image_size for stage in unclip.cascade.route(side, times)] == sizes


def test_any_shape_keeps_its_shape(unclip):
    for height, width in ((2, 3), (7, 70), (65, 33)):
        assert unclip.upsample(torch.zeros(1, 3, height, width), [0], 4).shape == (
            1,
            3,
            4 * height,
            4 * width,
        )


def test_upsamplers_where_they_do_not_belong_are_refused(three, releases):
    decoder, low, high = three
    with pytest.raises(
        UserError, match="from 256 to 1024 pixels cannot follow a stage that draws 64"
    ):
        UnCLIP(decoder, upsamplers=(high,))
    with pytest.raises(
        UserError, match="from 64 to 256 pixels cannot follow a stage that draws 1024"
    ):
        Cascade((high, low))
    with pytest.raises(
        UserError, match="from 256 to 1024 pixels cannot follow a stage that draws 64"
    ):
        UnCLIP.load(releases["decoder"], upsamplers=(releases["1024"], releases["256"]))
    with pytest.raises(
        UserError, match="holds a Decoder, and a Upsampler256 or Upsampler1024 is needed"
    ):
        load_upsamplers([releases["decoder"]])


def test_a_size_without_its_upsampler_is_refused_before_anything_is_drawn(three, monkeypatch):
    decoder, low, _ = three
    unclip = UnCLIP(decoder, upsamplers=(low,))
    monkeypatch.setattr(decoder, "sample", lambda *_: pytest.fail("drawn"))
    with pytest.raises(
        UserError,
        match="Pictures of 1024 pixels were asked for, and the stages here draw 64 or 256",
    ):
        unclip.generate(PROMPTS, [0, 1], "text", size=1024)
    with pytest.raises(UserError, match=r"16 times as large \(those to 256 loaded\)"):
        unclip.upsample(torch.zeros(1, 3, 64, 64), [0], 16)
    with pytest.raises(UserError, match=r"4 times as large \(none loaded\)"):
        UnCLIP(decoder).upsample(torch.zeros(1, 3, 64, 64), [0])
    with pytest.raises(ValueError, match="one seed a picture"):
        unclip.upsample(torch.zeros(1, 3, 64, 64), [0, 1])


def test_a_package_without_an_upsampler_says_so(monkeypatch, tmp_path):
    monkeypatch.setitem(pipeline.DEFAULT_UPSAMPLERS, "256", tmp_path / "upsampler-256-openmoji")
    with pytest.raises(
        UserError, match=r"no upsampler to 256 pixels \(upsampler-256-openmoji is missing\)"
    ):
        load_upsamplers(["256"])


def test_too_little_memory_is_a_sentence_before_anything_is_drawn(three, monkeypatch):
    cascade_of_two = Cascade(three[1:])
    monkeypatch.setattr(three[1], "sample", lambda *_: pytest.fail("drawn"))
    huge = torch.zeros(1, 3, 1, 1).expand(1, 3, 100_000, 200_000)
    words = (
        r"1 picture takes at least \d+ GB of memory at 800000x400000 pixels, and this machine has"
    )
    with pytest.raises(UserError, match=words):
        cascade_of_two.upsample(huge, [0], 4)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(three[1], "sample", full)
    with pytest.raises(
        UserError,
        match="The upsampler to 256 pixels has too little memory on cpu for 2 pictures of 256x256 at a time",
    ):
        cascade_of_two.upsample(torch.zeros(2, 3, 64, 64), [0, 1], 4)


@pytest.mark.parametrize("size", [64, 256, 1024])
def test_generate_writes_every_size_and_its_settings(size, releases, tmp_path):
    upsamplers = [
        f"--upsampler-{name}={releases[name]}" for name in ("256", "1024") if size >= int(name)
    ]
    steps = ["--upsampler-steps", "1"] if upsamplers else []
    arguments = [
        "generate",
        PROMPTS[0],
        "--decoder",
        releases["decoder"],
        "--condition",
        "text",
        "--size",
        str(size),
        *upsamplers,
        *steps,
    ]
    assert app.main([*arguments, "--num-images", "3", "--grid", "--out", str(tmp_path)]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "grid.png",
        *(f"red-heart-{k}.png" for k in range(3)),
    ]
    with Image.open(tmp_path / "red-heart-2.png") as image:
        assert image.size == (size, size) and image.text["seed"] == "2"
        assert [
            name
            for name in ("256", "1024")
            if f"upsampler {releases[name]} UpsamplingConfig(sampler='ddim', steps=1"
            in image.text["unclip"]
        ] == [name for name in ("256", "1024") if size >= int(name)]
    with Image.open(tmp_path / "grid.png") as image:
        assert 3 * min(size, 682) <= image.width < 2048 + 200


def test_what_generate_draws_small_upsample_draws_large(releases, tmp_path):
    """The same pixels, up to the rounding of the file between."""
    options = [f"--upsampler-256={releases['256']}", "--seed", "4", "--out"]
    common = [
        "generate",
        "fox",
        "--decoder",
        releases["decoder"],
        "--condition",
        "text",
        "--num-images",
        "1",
    ]
    assert app.main([*common, "--size", "256", *options, str(tmp_path / "large")]) == 0
    assert app.main([*common, "--seed", "4", "--out", str(tmp_path / "small")]) == 0
    small = str(tmp_path / "small" / "fox-4.png")
    assert (
        app.main(
            [
                "upsample",
                small,
                "--size",
                "256",
                f"--upsampler-1024={releases['1024']}",
                *options,
                str(tmp_path / "again"),
            ]
        )
        == 0
    )
    large, again = (
        images.load_image(tmp_path / name)
        for name in ("large/fox-4.png", "again/fox-4-256x256.png")
    )
    assert (large - again).abs().max() <= 6 / 255 and large.std() > 0.05


def drawn_by_upsample(path, releases, out, *more):
    stages = [f"--upsampler-{name}={releases[name]}" for name in ("256", "1024")]
    return app.main(
        [
            "upsample",
            *map(str, path if isinstance(path, list) else [path]),
            *stages,
            "--steps",
            "1",
            "--out",
            str(out),
            *more,
        ]
    )


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "CMYK", "RGBA", "I;16"])
def test_pictures_of_every_mode_are_drawn_as_their_rgb(mode, releases, tmp_path):
    """Grey, palette, CMYK, transparent and 16-bit files give the picture that their RGB on white gives."""
    grey = np.full((5, 9), 40000, dtype=np.uint16)
    picture = (
        Image.fromarray(grey)
        if mode == "I;16"
        else Image.new("RGB", (9, 5), (255, 255, 255) if mode == "1" else (90, 90, 90)).convert(
            mode
        )
    )
    if mode == "RGBA":
        picture.putalpha(0)
    plain = {"RGBA": (255, 255, 255), "I;16": (156, 156, 156)}.get(mode)
    picture.save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    (Image.new("RGB", (9, 5), plain) if plain else picture.convert("RGB")).save(tmp_path / "b.png")
    assert (
        drawn_by_upsample(
            [next(tmp_path.glob("a.*")), tmp_path / "b.png"], releases, tmp_path / "out"
        )
        == 0
    )
    one, other = (images.load_image(tmp_path / "out" / f"{name}-36x20.png") for name in "ab")
    assert (one - other).abs().max() <= 2 / 255


def test_exif_aspect_ratio_and_names(releases, tmp_path, capsys):
    picture = Image.new("RGB", (40, 10), "red")
    exif = picture.getexif()
    exif[0x0112] = 6  # to be shown a quarter turned
    (tmp_path / "other").mkdir()
    for folder in (tmp_path, tmp_path / "other"):
        picture.save(folder / "turned.jpg", exif=exif)
    paths = [tmp_path / "turned.jpg", tmp_path / "other" / "turned.jpg"]
    assert drawn_by_upsample(paths, releases, tmp_path / "out", "--seed", "9") == 0
    written = capsys.readouterr().out.split()
    assert [path.rsplit("/", 1)[1] for path in written] == [
        "turned-40x160.png",
        "turned-40x160-2.png",
    ]
    with Image.open(written[0]) as image:
        assert (
            image.size == (40, 160)
            and image.text["source"] == "turned.jpg"
            and image.text["seed"] == "9"
        )
        assert (
            f"upsample 4 times, upsampler {releases['256']}" in image.text["unclip"]
            and "1024" not in image.text["unclip"]
        )
    assert drawn_by_upsample(paths[0], releases, tmp_path / "out", "--size", "100") == 0
    assert drawn_by_upsample(paths[0], releases, tmp_path / "out", "--times", "16") == 0
    assert {
        (tmp_path / "out" / name).exists() for name in ("turned-25x100.png", "turned-160x640.png")
    } == {True}


@pytest.mark.parametrize(
    ("given", "steps", "total"), [("fast27", "'fast27'", 27), ("1,2", "(1, 2)", 3)]
)
def test_steps_by_name_and_by_section_are_drawn_and_counted(
    given, steps, total, releases, tmp_path, capsys
):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    given = ["--steps", given]
    assert drawn_by_upsample(tmp_path / "a.png", releases, tmp_path / "out", *given) == 0
    with Image.open(tmp_path / "out" / "a-16x16.png") as image:
        assert f"steps={steps}" in image.text["unclip"]
    assert f"{total}/{total}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["upsample", "gone.png"], "There is no picture gone.png"),
        (["upsample", "text.png"], "text.png cannot be read as a picture"),
        (["upsample", "here.png", "--size", "8"], "has 8 pixels at its longer side already"),
        (["upsample", "here.png", "--size", "129"], "ask for at most 128"),
        (
            ["upsample", "here.png", "--upsampler-256", "gone.ckpt"],
            "There is no checkpoint gone.ckpt",
        ),
        (
            ["upsample", "here.png", "--upsampler-256", "1024"],
            "from 256 to 1024 pixels cannot follow",
        ),
        (
            ["upsample", "here.png", "--upsampler-256", "decoder"],
            "holds a Decoder, and a Upsampler256 or Upsampler1024 is needed",
        ),
        (["upsample", "here.png", "--steps", "0"], "--steps is 0"),
        (["upsample", "here.png", "--steps", "fast28"], "--steps is fast28, and respacing"),
        (["upsample", "here.png", "--steps", "2,0"], "--steps is (2, 0), and section 1"),
        (["upsample", "here.png", "--offload", "--device", "cpu"], "--offload lets stages wait"),
        (["upsample", "here.png", "--device", "nothing"], "There is no device nothing"),
        (["upsample", "here.png", "--out", "text.png/out"], "cannot be used"),
        (
            ["generate", "fox", "--upsampler-256", "256"],
            "--upsampler-256 is given, and pictures of 64 pixels",
        ),
        (
            ["generate", "fox", "--size", "256", "--upsampler-1024", "1024"],
            "--upsampler-1024 is given, and pictures of 256 pixels",
        ),
        (["generate", "fox", "--upsampler-steps", "3"], "--upsampler-steps is given"),
        (
            [
                "generate",
                "fox",
                "--size",
                "256",
                "--upsampler-256",
                "256",
                "--upsampler-steps",
                "1001",
            ],
            "--upsampler-steps is 1001",
        ),
        (
            ["generate", "fox", "--size", "256", "--upsampler-256", "1024"],
            "from 256 to 1024 pixels cannot follow a stage that draws 64",
        ),
        (["generate", "fox", "--offload", "--device", "cpu"], "--offload lets stages wait"),
    ],
)
def test_bad_input_is_one_sentence(arguments, words, releases, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("here.png")
    (tmp_path / "text.png").write_text("hello")
    found = [
        releases.get(argument, argument) if before.startswith("--upsampler") else argument
        for before, argument in zip(["", *arguments], arguments)
    ]
    given = " ".join(arguments)
    defaults = [
        f"--upsampler-{name}={releases[name]}"
        for name in ("256", "1024")
        if arguments[0] == "upsample" and f"--upsampler-{name}" not in given
    ]
    decoder = (
        ["--decoder", releases["decoder"], "--condition", "text"]
        if arguments[0] == "generate"
        else []
    )
    assert app.main([*found, *defaults, *decoder]) == 1
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("unclip: ") and words in error[0]


def test_sizes_that_do_not_exist_are_refused(capsys):
    for arguments in (
        ["generate", "fox", "--size", "100"],
        ["upsample", "a.png", "--times", "8"],
        ["upsample", "a.png", "--times", "4", "--size", "9"],
    ):
        with pytest.raises(SystemExit):
            app.main(arguments)
        assert "--size" in (error := capsys.readouterr().err) or "--times" in error


def test_the_demo_shows_three_sizes_side_by_side(releases, tmp_path, monkeypatch):
    """The same picture three times: blocks of 16, of 4 and of 1 pixel, each the file's own pixels."""
    load = UnCLIP.load
    monkeypatch.setattr(
        UnCLIP,
        "load",
        lambda prior, upsamplers: load(
            releases["decoder"], prior, upsamplers=[releases[name] for name in upsamplers]
        ),
    )
    monkeypatch.setattr(demo, "ROOT", tmp_path)
    report = demo.draw_cascade("fox")
    assert all(f"{size} pixels in" in report for size in (64, 256, 1024))
    shown = images.load_image(tmp_path / "cascade.png")[:, 2:1026, 2:]
    panels = [shown[:, :, k * 1026 : k * 1026 + 1024] for k in range(3)]
    for panel, block in zip(panels, (16, 4)):
        blocks = panel.unfold(1, block, block).unfold(2, block, block).flatten(3)
        assert (
            torch.equal(blocks.amin(-1), blocks.amax(-1))
            and blocks.shape[1:3] == (1024 // block,) * 2
        )
    assert panels[2].unfold(1, 2, 2).std(-1).max() > 0
    expected = load(releases["decoder"], "diffusion").generate(["fox"], [0])[0]
    assert (panels[0][:, ::16, ::16] - expected).abs().max() <= 2 / 255


def test_export_knows_both_upsamplers(three, tmp_path):
    for stage in three[1:]:
        torch.save(
            {"stage": type(stage).__name__, "hyper_parameters": dict(stage.hparams), "state_dict": stage.state_dict(), "global_step": 7,
             "clip_fingerprint": None}, tmp_path / "a.ckpt",
        )  # fmt: skip
        assert (
            app.main(
                ["export", str(tmp_path / "a.ckpt"), "--out", str(tmp_path / type(stage).__name__)]
            )
            == 0
        )
        assert load_upsamplers([tmp_path / type(stage).__name__])[0].net_config == stage.net_config
