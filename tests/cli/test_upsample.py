"""`unclip upsample`: pictures of one's own, of every kind of file, drawn larger."""

import numpy as np
import pytest
from PIL import Image

from tests.cli.shell import error_of, names_in, run_unclip
from unclip_pl.utils.images import load_image


@pytest.fixture
def upsample(releases, tmp_path):
    """Runs the command with tiny upsamplers in one step; pictures go to tmp_path/out."""

    def call(*words: object) -> int:
        stages = [f"--upsampler-{name}={releases[name]}" for name in ("256", "1024")]
        return run_unclip("upsample --steps 1", *stages, "--out", tmp_path / "out", *words)

    return call


def test_what_generate_draws_small_upsample_draws_large(releases, tmp_path):
    """The same pixels, up to the rounding of the file between."""
    low, high = (f"--upsampler-{name}={releases[name]}" for name in ("256", "1024"))
    generate = f"generate fox --condition text --num-images 1 --decoder {releases['decoder']}"
    assert run_unclip(f"{generate} --size 256 --seed 4", low, "--out", tmp_path / "large") == 0
    assert run_unclip(f"{generate} --seed 4", "--out", tmp_path / "small") == 0
    small, out = tmp_path / "small" / "fox-4.png", tmp_path / "again"
    assert run_unclip("upsample --size 256 --seed 4", small, low, high, "--out", out) == 0
    large, again = load_image(tmp_path / "large/fox-4.png"), load_image(out / "fox-4-256x256.png")
    assert (large - again).abs().max() <= 6 / 255 and large.std() > 0.05


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "CMYK", "RGBA", "I;16"])
def test_pictures_of_every_mode_are_drawn_as_their_rgb(mode, upsample, tmp_path):
    """Grey, palette, CMYK, transparent and 16-bit files are drawn as their RGB on white."""
    colour = (255, 255, 255) if mode == "1" else (90, 90, 90)
    if mode == "I;16":
        picture = Image.fromarray(np.full((5, 9), 40000, dtype=np.uint16))
        plain = Image.new("RGB", (9, 5), (156, 156, 156))
    else:
        picture = Image.new("RGB", (9, 5), colour).convert(mode)
        plain = picture.convert("RGB")
    if mode == "RGBA":
        picture.putalpha(0)
        plain = Image.new("RGB", (9, 5), (255, 255, 255))
    file = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    picture.save(file)
    plain.save(tmp_path / "b.png")
    assert upsample(file, tmp_path / "b.png") == 0
    one, other = (load_image(tmp_path / "out" / f"{name}-36x20.png") for name in "ab")
    assert (one - other).abs().max() <= 2 / 255


def test_rotation_shape_and_names(releases, upsample, tmp_path, capsys):
    picture = Image.new("RGB", (40, 10), "red")
    exif = picture.getexif()
    exif[0x0112] = 6  # to be shown rotated by 90 degrees
    (tmp_path / "other").mkdir()
    paths = [tmp_path / "turned.jpg", tmp_path / "other" / "turned.jpg"]
    for path in paths:
        picture.save(path, exif=exif)
    assert upsample(*paths, "--seed", "9") == 0
    written = capsys.readouterr().out.split()
    names = [path.rsplit("/", 1)[1] for path in written]
    assert names == ["turned-40x160.png", "turned-40x160_2.png"]
    with Image.open(written[0]) as image:
        assert image.size == (40, 160)
        assert image.text["source"] == "turned.jpg" and image.text["seed"] == "9"
        assert f"upsample 4 times, upsampler {releases['256']}" in image.text["unclip"]
        assert "1024" not in image.text["unclip"]
    assert upsample(paths[0], "--size", "100") == 0
    assert upsample(paths[0], "--times", "16") == 0
    assert {"turned-25x100.png", "turned-160x640.png"} <= set(names_in(tmp_path / "out"))


@pytest.mark.parametrize(
    ("words", "steps", "total"), [("fast27", "'fast27'", 27), ("1,2", "(1, 2)", 3)]
)
def test_steps_by_name_and_by_section_are_drawn_and_counted(
    words, steps, total, upsample, tmp_path, capsys
):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    assert upsample(tmp_path / "a.png", "--steps", words) == 0
    with Image.open(tmp_path / "out" / "a-16x16.png") as image:
        assert f"steps={steps}" in image.text["unclip"]
    assert f"{total}/{total}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("gone.png", "gone.png"),
        ("text.png", "text.png"),
        ("here.png --size 8", "8 pixels at its longer side already"),
        ("here.png --size 129", "at most 128"),
        ("here.png --upsampler-256 gone.ckpt", "gone.ckpt"),
        ("here.png --upsampler-256 HIGH", "cannot follow"),
        ("here.png --upsampler-256 DECODER", "holds a Decoder"),
        ("here.png --steps 0", "--steps is 0"),
        ("here.png --steps fast28", "--steps is fast28"),
        ("here.png --steps 2,0", "--steps is (2, 0)"),
        ("here.png --offload --device cpu", "--offload"),
        ("here.png --device nothing", "device nothing"),
        ("here.png --out text.png/out", "text.png"),
    ],
)
def test_bad_input_is_one_sentence(words, named, releases, upsample, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("here.png")
    (tmp_path / "text.png").write_text("hello")
    words = words.replace("HIGH", str(releases["1024"]))
    words = words.replace("DECODER", str(releases["decoder"]))
    assert upsample(*words.split()) == 1
    assert named in error_of(capsys)


@pytest.mark.parametrize(
    "command",
    ["generate fox --size 100", "upsample a.png --times 8", "upsample a.png --times 4 --size 9"],
)
def test_sizes_that_do_not_exist_are_refused(command, capsys):
    assert run_unclip(command) == 2
    error = capsys.readouterr().err
    assert "--size" in error or "--times" in error
