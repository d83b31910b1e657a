"""`unclip invert | vary | interpolate | edit | inpaint` and `generate --init` with a tiny decoder: files, figures, and what bad input is told."""

import re
import shlex

import pytest
import torch
from PIL import Image

from tests.conftest import ROOT
from tests.test_cascade import stages as cascade_stages
from tests.test_generate import NET
from unclip_pl.cli import unclip as app
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.diffusion.process import DiffusionConfig
from unclip_pl.pipeline import release
from unclip_pl.pipeline.release import Release
from unclip_pl.stages.decoder import Decoder, SamplingConfig
from unclip_pl.utils.images import load_image


def decoder(folder, seed):
    torch.manual_seed(seed)
    stage = Decoder(
        net=NET,
        sampling=SamplingConfig(sampler="ddim", steps=2),
        diffusion=DiffusionConfig(parametrization="v"),
    )
    for parameter in stage.net.parameters():  # outputs start at zero: make them speak
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    return release.write(
        folder,
        Release("Decoder", dict(stage.hparams), FrozenCLIP().fingerprint(), stage.state_dict(), 1),
        "# a card\n",
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return decoder(tmp_path_factory.mktemp("decoder") / "release", 0)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with pictures, to work in."""
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((40, 40), 90).convert("RGB").save("a.png")
    Image.linear_gradient("L").resize((60, 30)).save("wide.png")
    mask = Image.new("L", (40, 40), 0)
    mask.paste(255, (20, 0, 40, 40))
    mask.save("mask.png")
    Image.new("L", (40, 40), 255).save("white.png")
    Image.new("L", (40, 40), 0).save("black.png")
    Image.new("L", (20, 40), 255).save("narrow.png")
    return tmp_path


@pytest.fixture
def run(place, folder):
    def call(command, *arguments):
        code = app.main([command, *arguments, "--decoder", str(folder), "--out", "out"])
        assert code == 0
        return sorted(path.name for path in (place / "out").iterdir())

    return call


def test_invert_saves_latents_that_the_other_commands_take(run, capsys):
    assert run("invert", "a.png", "wide.png", "--steps", "20") == [
        "a-again.png", "a.safetensors", "inversions.png", "wide-again.png", "wide.safetensors",
    ]  # fmt: skip
    told = capsys.readouterr()
    assert (
        "dB PSNR (20 steps)" in told.out
        and "wide.png is 60 x 30 pixels, of which the 30 x 30 in the centre are taken" in told.err
    )
    again, original = load_image("out/a-again.png"), load_image("a.png", 16)
    assert again.shape == original.shape and (again - original).abs().mean() < 0.1
    run("vary", "out/a.safetensors", "--eta", "0", "--num-images", "1")
    assert (load_image("out/a-0.png") - again).abs().max() < 0.05
    run("interpolate", "out/a.safetensors", "out/wide.safetensors", "--steps", "2")
    assert (load_image("out/a-wide-0-0.png") - again).abs().max() < 0.05
    run(
        "edit", "out/a.safetensors", "--to", "a fox", "--theta", "0"
    )  # each in the latent's own steps
    assert (load_image("out/a-theta0.png") - again).abs().max() < 0.05


def test_vary_draws_a_row_for_each_eta(run, assert_same_picture):
    names = run(
        "vary", "a.png", "--eta", "0", "0.5", "--num-images", "2", "--seed", "3", "--steps", "4"
    )
    assert names == [
        "a-eta0-3.png",
        "a-eta0-4.png",
        "a-eta0.5-3.png",
        "a-eta0.5-4.png",
        "variations.png",
    ]
    assert_same_picture(load_image("out/a-eta0-3.png"), load_image("out/a-eta0-4.png"))
    assert not torch.equal(load_image("out/a-eta0.5-3.png"), load_image("out/a-eta0.5-4.png"))
    with Image.open("out/a-eta0.5-4.png") as image:
        assert (
            image.text["seed"] == "4"
            and "inverted noise" in image.text["unclip"]
            and "eta=0.5" in image.text["unclip"]
        )
    run("vary", "a.png", "--eta", "0", "--noise", "fresh", "--num-images", "2", "--seed", "3")
    assert not torch.equal(load_image("out/a-3.png"), load_image("out/a-4.png"))


def test_interpolate_draws_the_way_and_with_fresh_noise_several(run):
    names = run("interpolate", "a.png", "wide.png", "--steps", "3", "--sampling-steps", "4")
    assert names == ["a-wide-0-0.png", "a-wide-0-1.png", "a-wide-0-2.png", "interpolation.png"]
    names = run(
        "interpolate",
        "a.png",
        "wide.png",
        "--steps",
        "2",
        "--noise",
        "fresh",
        "--num-images",
        "2",
        "--seed",
        "8",
    )
    assert {"a-wide-8-0.png", "a-wide-8-1.png", "a-wide-9-0.png", "a-wide-9-1.png"} <= set(names)


def test_edit_takes_ranges_and_a_file_of_edits(run, place):
    names = run(
        "edit",
        "a.png",
        "--from",
        "a photo",
        "--to",
        "a fox",
        "--theta",
        "0..0.5",
        "0.9",
        "--steps",
        "3",
    )
    assert names == [
        "a-theta0.125.png",
        "a-theta0.25.png",
        "a-theta0.375.png",
        "a-theta0.5.png",
        "a-theta0.9.png",
        "a-theta0.png",
        "edits.png",
    ]
    (place / "edits.txt").write_text(
        "a.png\ta photo\ta cat, yellow\nwide.png\t\ta fox\n", encoding="utf-8"
    )
    names = run("edit", "--file", "edits.txt", "--theta", "0.3", "--steps", "3")
    assert {"00-a-theta0.3.png", "01-wide-theta0.3.png"} <= set(names)
    with Image.open("out/00-a-theta0.3.png") as image:
        assert 'from "a photo" to "a cat, yellow"' in image.text["unclip"]


@pytest.mark.parametrize("prompt", [["a fox"], []])
def test_inpaint_keeps_what_is_black_in_the_mask(run, prompt):
    names = run("inpaint", "a.png", *prompt, "--mask", "mask.png", "--num-images", "2")
    assert names == ["a-0.png", "a-1.png", "inpainting.png"]
    first, second, original = (
        load_image(path, 16) for path in ("out/a-0.png", "out/a-1.png", "a.png")
    )
    assert (first - original)[..., :8].abs().max() < 0.02
    assert (first - second)[..., 8:].abs().mean() > 0.01


def test_generate_starts_from_a_picture(run, assert_same_picture):
    run(
        "generate",
        "a fox",
        "--condition",
        "text",
        "--num-images",
        "1",
        "--init",
        "a.png",
        "--strength",
        "0",
    )
    assert (load_image("out/a-fox-0.png") - load_image("a.png", 16)).abs().max() < 0.02
    run(
        "generate",
        "a fox",
        "--condition",
        "text",
        "--num-images",
        "1",
        "--init",
        "a.png",
        "--strength",
        "1",
    )
    forgotten = load_image("out/a-fox-0.png")
    run("generate", "a fox", "--condition", "text", "--num-images", "1")
    assert_same_picture(load_image("out/a-fox-0.png"), forgotten)


def test_a_latent_of_another_decoder_is_refused(run, folder, tmp_path, capsys):
    run("invert", "a.png", "--steps", "2")
    other = decoder(tmp_path / "other", 1)
    assert app.main(["vary", "out/a.safetensors", "--eta", "0", "--decoder", str(other)]) == 1
    assert "was made with another decoder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["invert", "gone.png"], "There is no picture gone.png"),
        (["invert", "a.png", "--steps", "0"], "--steps is 0"),
        (["vary", "gone.png", "--eta", "0"], "There is no picture gone.png"),
        (["vary", "a.png", "--eta=-0.1"], "--eta is -0.1"),
        (["vary", "a.png", "--eta", "1.5"], "--eta is 1.5"),
        (["vary", "a.png", "--eta", "0.5", "--sampler", "ddpm"], "--eta is for the sampler ddim"),
        (["vary", "a.png", "--num-images", "0"], "--num-images is 0"),
        (["interpolate", "a.png", "wide.png", "--steps", "1"], "--steps is 1"),
        (
            ["interpolate", "a.png", "wide.png", "--num-images", "2"],
            "--num-images is for --noise fresh",
        ),
        (["edit", "a.png"], "There is no --to"),
        (["edit", "--to", "a fox"], "There is no picture to edit"),
        (["edit", "a.png", "--from", "a fox", "--to", "a fox"], "From and to are the same"),
        (
            ["edit", "a.png", "--from", "a fox", "--to", "A  Fox", "--steps", "2"],
            "the same for CLIP",
        ),
        (["edit", "a.png", "--to", " "], "The caption to go to is empty"),
        (["edit", "a.png", "--to", "a fox", "--theta", "1.2"], "theta is 1.2"),
        (["edit", "a.png", "--to", "a fox", "--theta=-0.1..0.5"], "theta is -0.1"),
        (["edit", "--file", "gone.txt"], "gone.txt cannot be read"),
        (["edit", "--file", "bad.txt"], "Line 2 of bad.txt has 2 parts"),
        (["edit", "--file", "a.png"], "is not UTF-8"),
        (
            ["inpaint", "a.png", "--mask", "narrow.png"],
            "narrow.png is 20 x 40 pixels and the picture 40 x 40",
        ),
        (["inpaint", "a.png", "--mask", "white.png"], "asks for the whole picture"),
        (["inpaint", "a.png", "--mask", "black.png"], "all black"),
        (["inpaint", "a.png", "--mask", "mask.png", "--prior", "ar"], "without a PROMPT no prior"),
        (["generate", "a fox", "--strength", "0.5"], "--strength is for --init"),
        (["generate", "a fox", "--init", "a.png", "--strength", "1.5"], "strength is 1.5"),
        (["generate", "a fox", "--init", "gone.png"], "There is no picture gone.png"),
    ],
)
def test_bad_input_is_one_sentence(arguments, words, place, folder, capsys):
    (place / "bad.txt").write_text("a.png\ta photo\ta fox\na.png\ta photo\n", encoding="utf-8")
    more = ["--condition", "text"] if arguments[0] == "generate" else []
    assert app.main([*arguments, *more, "--decoder", str(folder), "--out", "out"]) == 1
    error = [
        line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("unclip: ")
    ]
    assert len(error) == 1 and words in error[0]


def test_pictures_come_at_the_sizes_of_the_cascade_from_noise_of_the_seed(place):
    for name, stage in zip(("decoder", "upsampler"), cascade_stages()):
        release.write(
            place / name,
            Release(
                type(stage).__name__,
                dict(stage.hparams),
                stage.clip_fingerprint,
                stage.state_dict(),
                1,
            ),
            "# a card\n",
        )
    arguments = [
        "vary",
        "a.png",
        "--num-images",
        "2",
        "--decoder",
        "decoder",
        "--size",
        "256",
        "--upsampler-256",
        "upsampler",
        "--out",
        "out",
    ]
    assert app.main(arguments) == 0
    first = [load_image(f"out/a-{seed}.png") for seed in (0, 1)]
    assert all(image.shape == (3, 256, 256) for image in first)
    assert app.main([*arguments, "--seed", "1"]) == 0
    assert (load_image("out/a-1.png") - first[1]).abs().max() < 0.02
    with Image.open("out/variations.png") as figure:
        assert figure.width > 2 * 256


def test_the_documents_commands_parse_and_its_pictures_are_small():
    text = (ROOT / "docs" / "manipulations.md").read_text(encoding="utf-8")
    lines = [
        line
        for block in re.findall(r"```\n(.*?)```", text, re.S)
        for line in block.splitlines()
        if line.startswith("unclip ")
    ]
    assert len(lines) >= 8 and all(
        app.parser().parse_args(shlex.split(line, comments=True)[1:]).run for line in lines
    )
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(pictures) >= 8 and all(
        (ROOT / "docs" / picture).stat().st_size < 200_000 for picture in pictures
    )


@pytest.mark.parametrize("theta", ["a", "0..b", ""])
def test_a_theta_that_is_no_number_is_refused(theta, capsys):
    with pytest.raises(SystemExit):
        app.main(["edit", "a.png", "--to", "a fox", "--theta", theta])
    assert "--theta" in capsys.readouterr().err
