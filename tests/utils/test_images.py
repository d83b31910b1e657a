"""Pictures of every mode are read as RGB on white in [-1, 1], upright and square."""

import numpy as np
import pytest
import torch
from PIL import Image

from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import from_pil, grid, load_image, save_png, to_pil, to_uint8

RED = torch.tensor([1.0, -1.0, -1.0])


def test_values_survive_the_way_through_a_file(tmp_path):
    image = torch.linspace(-1, 1, 3 * 8 * 8).view(3, 8, 8)
    save_png(image, tmp_path / "a.png", seed="7")
    assert (load_image(tmp_path / "a.png") - image).abs().max() <= 1 / 255
    assert to_uint8(torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0])).tolist() == [0, 0, 128, 255, 255]
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.text == {"seed": "7"}


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "CMYK", "L", "LA", "1", "I;16"])
def test_every_mode_comes_in_as_rgb(mode):
    if mode == "I;16":
        picture = Image.fromarray(np.full((6, 6), 65535, dtype=np.uint16))
        expected = torch.ones(3)
    elif mode in ("L", "LA", "1"):
        picture, expected = Image.new("L", (6, 6), 255).convert(mode), torch.ones(3)
    else:
        picture, expected = Image.new("RGB", (6, 6), (255, 0, 0)).convert(mode), RED
    image = from_pil(picture)
    assert image.shape == (3, 6, 6) and image.dtype == torch.float32
    assert (image - expected[:, None, None]).abs().max() < 0.02


def test_transparency_is_white_also_in_a_palette(tmp_path):
    picture = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert torch.equal(from_pil(picture), torch.ones(3, 4, 4))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([255, 0, 0])
    palette.save(tmp_path / "p.png", transparency=0)
    assert torch.equal(load_image(tmp_path / "p.png"), torch.ones(3, 4, 4))


def test_exif_rotation_is_followed(tmp_path):
    picture = Image.new("RGB", (8, 4), "white")
    picture.paste((255, 0, 0), (0, 0, 4, 4))
    exif = picture.getexif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter to the right
    picture.save(tmp_path / "r.png", exif=exif)
    image = load_image(tmp_path / "r.png")
    assert image.shape == (3, 8, 4)
    assert torch.equal(image[:, 0, 0], RED) and torch.equal(image[:, -1, 0], torch.ones(3))


@pytest.mark.parametrize("shape", [(100, 40), (40, 100), (33, 33), (7, 5)])
def test_centre_square_of_any_size(shape):
    picture = Image.new("RGB", shape, "white")
    middle = (shape[0] // 2, shape[1] // 2)
    picture.paste((255, 0, 0), (middle[0] - 2, middle[1] - 2, middle[0] + 2, middle[1] + 2))
    image = from_pil(picture, 16)
    assert image.shape == (3, 16, 16)
    assert image[1, 8, 8] < 0.3  # the middle stays in the middle


@pytest.mark.parametrize("size", [16, 47, 64, 200])
@pytest.mark.parametrize("shape", [(97, 64), (64, 97), (80, 80), (64, 64), (300, 110)])
def test_it_is_resized_as_pillow_does_it_and_cut_out(shape, size):
    noise = np.random.default_rng(0).integers(0, 256, (shape[1], shape[0], 3), dtype=np.uint8)
    scale = size / min(shape)
    resized_shape = (round(shape[0] * scale), round(shape[1] * scale))
    resized = Image.fromarray(noise).resize(resized_shape, Image.Resampling.BICUBIC)
    left, top = (resized.width - size) // 2, (resized.height - size) // 2
    expected = from_pil(resized.crop((left, top, left + size, top + size)))
    difference = (from_pil(Image.fromarray(noise), size) - expected).abs() * 127.5
    assert difference.max() < 2.5 and difference.mean() < 0.05


def test_grid_shows_every_picture_in_its_place():
    rows = [RED[:, None, None].expand(2, 3, 8, 8), -torch.ones(2, 3, 8, 8)]
    picture = np.array(grid(rows))
    assert picture.shape[0] >= 16
    assert (picture[6, 6] == [255, 0, 0]).all() and (picture[16, 6] == 0).all()
    assert grid(rows, ["a long label", "b"]).width > grid(rows).width
    assert to_pil(rows[0][0]).size == (8, 8)


def test_what_is_no_picture_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="gone"):
        load_image(tmp_path / "gone.png")
    (tmp_path / "text.png").write_text("hello")
    with pytest.raises(UserError, match="text.png"):
        load_image(tmp_path / "text.png")


@pytest.mark.parametrize("white", [1.0, 255.0, 65535.0])
def test_a_tiff_of_floats_keeps_its_brightness(white, tmp_path):
    ramp = np.linspace(0, white, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "a.tiff")
    expected = torch.from_numpy(np.rint(ramp * (255 / white)) / 127.5 - 1)
    assert (load_image(tmp_path / "a.tiff") - expected).abs().max() < 1e-2
    Image.fromarray(ramp - white).save(tmp_path / "b.tiff")
    with pytest.raises(UserError, match="floats"):
        load_image(tmp_path / "b.tiff")
