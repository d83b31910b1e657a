"""`unclip generate`: files and their settings, sizes, seeds, starting pictures, and bad input."""

import pytest
import torch
from PIL import Image

from tests.cli.shell import error_of, names_in, run_unclip
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.utils.images import load_image

STAGES = {"decoder": "decoder", "upsampler-256": "256", "upsampler-1024": "1024"}


def test_pictures_are_named_by_prompt_and_seed(folder, tmp_path, capsys):
    file, out = tmp_path / "more.txt", tmp_path / "out"
    file.write_text("\ufeffbicycle\n\n", encoding="utf-8")
    options = "--num-images 2 --seed 7 --steps 2,1 --prior-steps 3 --guidance-scale 2"
    command = f"generate 'woman firefighter, dark skin' {options} --batch-size 3 --grid"
    assert run_unclip(command, "--file", file, "--decoder", folder, "--out", out) == 0
    assert names_in(out) == [
        "bicycle-7.png",
        "bicycle-8.png",
        "grid.png",
        "woman-firefighter-dark-skin-7.png",
        "woman-firefighter-dark-skin-8.png",
    ]
    with Image.open(out / "bicycle-8.png") as image:
        assert image.size == (16, 16)
        assert image.text["prompt"] == "bicycle" and image.text["seed"] == "8"
        for setting in ("guidance_scale=2.0", "steps=3", "steps=(2, 1)"):
            assert setting in image.text["unclip"]
    assert "grid.png" in capsys.readouterr().out


def test_a_picture_of_the_same_name_is_kept_and_the_same_picture_is_one_file(run, capsys):
    command = "generate fox --condition text --num-images 1 --grid"
    assert run(command) == ["fox-0.png", "grid.png"]
    first = load_image("out/fox-0.png")
    assert run(command) == ["fox-0.png", "grid.png"]
    assert capsys.readouterr().out.count("out/fox-0.png") == 2
    names = ["fox-0.png", "fox-0_2.png", "grid.png", "grid_2.png"]
    assert run(f"{command} --steps 1") == names
    assert torch.equal(load_image("out/fox-0.png"), first)
    output = capsys.readouterr()
    assert "fox-0_2.png" in output.out and output.err.count("--overwrite") == 1
    assert run(f"{command} --steps 1 --overwrite") == names
    assert not torch.equal(load_image("out/fox-0.png"), first)


@pytest.mark.parametrize(
    ("words", "total"),
    [
        ("--condition text --steps 3", 2 * 3),
        ("--prior-steps 4 --steps 3", 2 * (4 + 3)),
        ("--condition text --steps 10 --init a.png --strength 0.3", 2 * 3),
    ],
)
def test_the_bar_counts_every_sampling_step(words, total, run, capsys):
    run(f"generate fox cat --batch-size 4 --num-images 3 {words}")
    last = capsys.readouterr().err.strip().splitlines()[-1].split("\r")[-1]
    assert f"{total}/{total}" in last and "6 of 6 pictures" in last


def test_the_bar_counts_the_upsamplers_batches(releases, tmp_path, capsys):
    stages = [f"--{kind}={releases[name]}" for kind, name in STAGES.items()]
    options = "--size 1024 --condition text --num-images 3 --steps 2 --upsampler-steps 1"
    assert run_unclip(f"generate fox {options}", *stages, "--out", tmp_path) == 0
    assert "6/6" in capsys.readouterr().err  # 2 of the decoder, 1 for all at 256, 3 at 1024


def test_prompts_that_look_alike_have_files_of_their_own(folder, tmp_path):
    command = "generate fox fox! fox --num-images 1 --condition text"
    assert run_unclip(command, "--decoder", folder, "--out", tmp_path) == 0
    assert names_in(tmp_path) == ["fox-0.png", "fox-2-0.png"]


@pytest.mark.parametrize("seed", ["-1", "99999999999999999999999", "x"])
def test_an_impossible_seed_is_refused(seed, capsys):
    assert run_unclip(f"generate fox --seed={seed}") == 2
    assert "--seed" in capsys.readouterr().err


def test_a_prompt_that_is_too_long_is_drawn_and_what_was_cut_is_named(folder, tmp_path, capsys):
    long = "a red apple " * 40 + "and a pear"
    command = "generate --condition text --num-images 1"
    assert run_unclip(command, long, "--decoder", folder, "--out", tmp_path) == 0
    cut = error_of(capsys).partition('cut: "')[2].removesuffix('"')
    clip = FrozenCLIP()
    assert cut == clip.truncated_text(long)[:57] + "..."
    read = long[: -len(clip.truncated_text(long))]
    assert torch.equal(clip.tokenize([read]), clip.tokenize([long]))
    assert not torch.equal(clip.tokenize([read[:-1]]), clip.tokenize([long]))
    assert clip.truncated_text("a red apple") == ""


@pytest.mark.parametrize(
    ("size", "upsamplers"), [(64, ()), (256, ("256",)), (1024, ("256", "1024"))]
)
def test_every_size_is_written_with_its_settings(size, upsamplers, releases, tmp_path):
    more = [f"--upsampler-{name}={releases[name]}" for name in upsamplers]
    more += ["--upsampler-steps", "1"] if upsamplers else []
    command = f"generate 'red heart' --condition text --size {size} --num-images 3 --grid"
    assert run_unclip(command, "--decoder", releases["decoder"], *more, "--out", tmp_path) == 0
    assert names_in(tmp_path) == ["grid.png", *(f"red-heart-{k}.png" for k in range(3))]
    with Image.open(tmp_path / "red-heart-2.png") as image:
        assert image.size == (size, size) and image.text["seed"] == "2"
        for name in ("256", "1024"):
            settings = f"upsampler {releases[name]} UpsamplingConfig(sampler='ddim', steps=1"
            assert (settings in image.text["unclip"]) == (name in upsamplers)
    with Image.open(tmp_path / "grid.png") as image:
        assert 3 * min(size, 682) <= image.width < 2048 + 200


def test_a_picture_to_start_from_stays_at_strength_0_and_is_forgotten_at_1(
    run, assert_same_picture
):
    command = "generate 'a fox' --condition text --num-images 1 --overwrite"
    run(f"{command} --init a.png --strength 0")
    assert (load_image("out/a-fox-0.png") - load_image("a.png", 16)).abs().max() < 0.02
    run(f"{command} --init a.png --strength 1")
    forgotten = load_image("out/a-fox-0.png")
    run(command)
    assert_same_picture(load_image("out/a-fox-0.png"), forgotten)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("", "no prompt"),
        ("'  '", "prompt is empty"),
        ("--file gone.txt", "gone.txt"),
        ("--file latin.txt", "UTF-8"),
        ("apple --steps 0", "--steps is 0"),
        ("apple --steps 1001", "--steps is 1001"),
        ("apple --prior-steps 1001", "--prior-steps is 1001"),
        ("apple --prior-steps fast28", "--prior-steps is fast28"),
        ("apple --guidance-scale 0.5", "--guidance-scale is 0.5"),
        ("apple --prior-guidance-scale 0", "--prior-guidance-scale is 0.0"),
        ("apple --prior gone.ckpt", "gone.ckpt"),
        ("apple --prior foo", "diffusion or ar"),
        ("apple --prior ar --prior-steps 5", "--prior-steps"),
        ("apple --prior ar --prior-top-p 0", "--prior-top-p is 0"),
        ("apple --prior-temperature 0.5", "--prior-temperature"),
        ("apple --condition text --prior-steps 5", "--condition text"),
        ("apple --sampler ddpm --eta 1", "--eta"),
        ("apple --device nothing", "device nothing"),
        ("apple --condition text --num-images 1 --out latin.txt/out", "latin.txt"),
        ("apple --prior DECODER", "holds a Decoder"),
        ("apple --condition text --strength 0.5", "--strength"),
        ("apple --condition text --init a.png --strength 1.5", "strength is 1.5"),
        ("apple --condition text --init gone.png", "gone.png"),
        ("apple --upsampler-256 256", "--upsampler-256"),
        ("apple --size 256 --upsampler-1024 1024", "--upsampler-1024"),
        ("apple --upsampler-steps 3", "--upsampler-steps"),
        ("apple --offload --device cpu", "--offload"),
    ],
)
def test_bad_input_is_one_sentence(words, named, folder, place, capsys):
    (place / "latin.txt").write_bytes("é".encode("latin-1"))
    words = words.replace("DECODER", str(folder))
    assert run_unclip(f"generate {words}", "--decoder", folder) == 1
    assert named in error_of(capsys)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("--upsampler-256 256 --upsampler-steps 1001", "--upsampler-steps is 1001"),
        ("--upsampler-256 1024", "cannot follow"),
    ],
)
def test_bad_input_for_upsamplers_is_one_sentence(words, named, releases, tmp_path, capsys):
    for name in ("256", "1024"):
        words = words.replace(f"-256 {name}", f"-256 {releases[name]}")
    command = f"generate fox --size 256 --condition text {words}"
    assert run_unclip(command, "--decoder", releases["decoder"], "--out", tmp_path) == 1
    assert named in error_of(capsys)
