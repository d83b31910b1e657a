"""`unclip invert | vary | interpolate | edit | inpaint`: files, figures, and bad input."""

import re
import shlex

import pytest
from PIL import Image

from tests.cli.shell import error_of, run_unclip
from tests.conftest import ROOT
from tests.factories import package_decoder, write_release
from unclip_pl.cli import unclip
from unclip_pl.utils.images import load_image


def distance(path, other) -> float:
    """The largest difference of two pictures; `other` is a path or the pixels."""
    other = load_image(other) if isinstance(other, str) else other
    return float((load_image(path) - other).abs().max())


def test_invert_saves_latents_that_the_other_commands_take(run, capsys):
    assert run("invert a.png wide.png --steps 20") == [
        "a-again.png",
        "a.safetensors",
        "inversions.png",
        "wide-again.png",
        "wide.safetensors",
    ]
    output = capsys.readouterr()
    assert "dB PSNR (20 steps)" in output.out and "wide.png is 60 x 30 pixels" in output.err
    again, original = load_image("out/a-again.png"), load_image("a.png", 16)
    assert again.shape == original.shape and (again - original).abs().mean() < 0.1
    run("vary out/a.safetensors --eta 0 --num-images 1")
    assert distance("out/a-0.png", again) < 0.05
    run("interpolate out/a.safetensors out/wide.safetensors --num-images 2")
    assert distance("out/a-wide-0-0.png", again) < 0.05
    run("edit out/a.safetensors --to 'a fox' --theta 0")  # each in the latent's own steps
    assert distance("out/a-theta0.png", again) < 0.05


def test_latents_and_figures_are_kept_as_well(run):
    first = run("invert a.png --steps 2")
    assert run("invert a.png --steps 2") == first
    more = {"a_2.safetensors", "a-again_2.png", "inversions_2.png"}
    assert {*run("invert a.png --steps 3")} == {*first} | more


def test_vary_writes_pictures_with_their_settings(run, capsys):
    assert run("vary a.png --num-images 2 --seed 5") == ["a-5.png", "a-6.png", "variations.png"]
    with Image.open("out/a-5.png") as image:
        assert image.size == (16, 16) and image.text["seed"] == "5"
        assert "steps=2" in image.text["unclip"]
    assert "variations.png" in capsys.readouterr().out


def test_vary_draws_a_row_for_each_eta(run, assert_same_picture):
    names = run("vary a.png --eta 0 0.5 --num-images 2 --seed 3 --steps 4")
    assert names == [
        "a-eta0-3.png",
        "a-eta0-4.png",
        "a-eta0.5-3.png",
        "a-eta0.5-4.png",
        "variations.png",
    ]
    assert_same_picture(load_image("out/a-eta0-3.png"), load_image("out/a-eta0-4.png"))
    assert distance("out/a-eta0.5-3.png", "out/a-eta0.5-4.png") > 0
    with Image.open("out/a-eta0.5-4.png") as image:
        assert image.text["seed"] == "4"
        assert "inverted noise" in image.text["unclip"] and "eta=0.5" in image.text["unclip"]
    run("vary a.png --eta 0 --noise fresh --num-images 2 --seed 3")
    assert distance("out/a-3.png", "out/a-4.png") > 0


def test_interpolate_draws_the_way_and_with_fresh_noise_several(run):
    names = run("interpolate a.png wide.png --num-images 3 --steps 4")
    assert names == ["a-wide-0-0.png", "a-wide-0-1.png", "a-wide-0-2.png", "interpolation.png"]
    names = run("interpolate a.png wide.png --num-images 2 --noise fresh --num-rows 2 --seed 8")
    assert {"a-wide-8-0.png", "a-wide-8-1.png", "a-wide-9-0.png", "a-wide-9-1.png"} <= set(names)


def test_edit_takes_ranges_and_a_file_of_edits(run, place):
    names = run("edit a.png --from 'a photo' --to 'a fox' --theta 0..0.5 0.9 --steps 3")
    thetas = ("0.125", "0.25", "0.375", "0.5", "0.9", "0")
    assert names == [*(f"a-theta{theta}.png" for theta in thetas), "edits.png"]
    lines = "a.png\ta photo\ta cat, yellow\nwide.png\t\ta fox\n"
    (place / "edits.txt").write_text(lines, encoding="utf-8")
    names = run("edit --file edits.txt --theta 0.3 --steps 3")
    assert {"00-a-theta0.3.png", "01-wide-theta0.3.png"} <= set(names)
    with Image.open("out/00-a-theta0.3.png") as image:
        assert 'from "a photo" to "a cat, yellow"' in image.text["unclip"]


@pytest.mark.parametrize("prompt", ["'a fox'", ""])
def test_inpaint_keeps_what_is_black_in_the_mask(run, prompt):
    names = run(f"inpaint a.png {prompt} --mask mask.png --num-images 2")
    assert names == ["a-0.png", "a-1.png", "inpainting.png"]
    paths = ("out/a-0.png", "out/a-1.png", "a.png")
    first, second, original = (load_image(path, 16) for path in paths)
    assert (first - original)[..., :8].abs().max() < 0.02
    assert (first - second)[..., 8:].abs().mean() > 0.01


def test_a_latent_of_another_decoder_is_refused(run, tmp_path, capsys):
    run("invert a.png --steps 2")
    other = write_release(tmp_path / "other", package_decoder(seed=1))
    assert run_unclip("vary out/a.safetensors --eta 0", "--decoder", other) == 1
    assert "another decoder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("invert gone.png", "gone.png"),
        ("invert a.png --steps 0", "--steps is 0"),
        ("vary gone.png --eta 0", "gone.png"),
        ("vary a.png --eta=-0.1", "--eta is -0.1"),
        ("vary a.png --eta 1.5", "--eta is 1.5"),
        ("vary a.png --eta 0.5 --sampler ddpm", "--eta"),
        ("interpolate a.png wide.png --num-images 1", "--num-images is 1"),
        ("interpolate a.png wide.png --num-rows 2", "--noise fresh"),
        ("edit a.png", "--to"),
        ("edit --to 'a fox'", "no picture to edit"),
        ("edit a.png --from 'a fox' --to 'a fox'", "the same"),
        ("edit a.png --from 'a fox' --to 'A  Fox' --steps 2", "the same for CLIP"),
        ("edit a.png --to ' '", "empty"),
        ("edit a.png --to 'a fox' --theta 1.2", "theta is 1.2"),
        ("edit a.png --to 'a fox' --theta=-0.1..0.5", "theta is -0.1"),
        ("edit --file gone.txt", "gone.txt"),
        ("edit --file bad.txt", "Line 2 of bad.txt"),
        ("edit --file a.png", "UTF-8"),
        ("inpaint a.png --mask narrow.png", "narrow.png is 20 x 40 pixels"),
        ("inpaint a.png --mask white.png", "whole picture"),
        ("inpaint a.png --mask black.png", "all black"),
        ("inpaint a.png --mask mask.png --prior ar", "PROMPT"),
        ("vary a.png --decoder gone.ckpt", "gone.ckpt"),
    ],
)
def test_bad_input_is_one_sentence(command, named, place, folder, capsys):
    (place / "bad.txt").write_text("a.png\ta photo\ta fox\na.png\ta photo\n", encoding="utf-8")
    more = [] if "--decoder" in command else ["--decoder", folder]
    assert run_unclip(command, *more, "--out", "out") == 1
    assert named in error_of(capsys)


def test_pictures_come_at_the_sizes_of_the_cascade_from_noise_of_the_seed(place, releases):
    command = "vary a.png --num-images 2 --size 256 --out out"
    stages = ["--decoder", releases["decoder"], "--upsampler-256", releases["256"]]
    assert run_unclip(command, *stages) == 0
    first = [load_image(f"out/a-{seed}.png") for seed in (0, 1)]
    assert all(image.shape == (3, 256, 256) for image in first)
    assert run_unclip(command, *stages, "--seed", "1", "--overwrite") == 0
    assert distance("out/a-1.png", first[1]) < 0.02
    with Image.open("out/variations.png") as figure:
        assert figure.width > 2 * 256


def test_the_documents_commands_parse_and_its_pictures_are_small():
    text = (ROOT / "docs" / "manipulations.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```\n(.*?)```", text, re.S)
    lines = [line for block in blocks for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("unclip ")]
    assert len(commands) >= 8
    for command in commands:
        assert unclip.bind(shlex.split(command, comments=True)[1:])
    pictures = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(pictures) >= 8
    for picture in pictures:
        assert (ROOT / "docs" / picture).stat().st_size < 200_000


@pytest.mark.parametrize("theta", ["a", "0..b", ""])
def test_a_theta_that_is_no_number_is_refused(theta, capsys):
    assert run_unclip("edit a.png --to 'a fox' --theta", theta) == 2
    assert "--theta" in capsys.readouterr().err
