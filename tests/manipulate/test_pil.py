"""PIL images go in wherever tensors do, and come out."""

import re
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageChops

import unclip_pl
from tests.manipulate.pictures import pictures
from unclip_pl.manipulate import (
    image_to_image,
    inpaint,
    interpolate,
    invert,
    latent,
    text_diff,
    vary,
)
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import from_pil

ROOT = Path(__file__).resolve().parents[2]
CAPTION = "a red apple"
MASK = torch.arange(16).expand(1, 1, 16, 16) < 8


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def images():
    """Two PIL images of the decoder's size, and the same as a tensor."""
    made = [unclip_pl.to_pil(picture) for picture in pictures()]
    return made, torch.stack([from_pil(picture) for picture in made])


def test_each_function_draws_the_same_from_pil_images_and_tensors(unclip, images):
    (first, second), tensors = images
    whole = invert(unclip, tensors)
    same(invert(unclip, [first, second], 3).x_T, invert(unclip, tensors, 3).x_T)
    same(vary(unclip, first, range(2), 0.5), vary(unclip, whole[[0, 0]], range(2), 0.5))
    theta = torch.tensor([0.2, 0.6])
    way = interpolate(unclip, whole[[0, 0]], whole[[1, 1]], theta)
    same(interpolate(unclip, first, second, [0.2, 0.6]), way)
    edited = text_diff(unclip, whole[[1]], None, [CAPTION], torch.tensor([0.3]))
    same(text_diff(unclip, second, None, [CAPTION], [0.3]), edited)
    mask = Image.fromarray(MASK[0, 0].numpy())
    drawn = inpaint(unclip, None, [3, 4], images=[first, second], mask=mask)
    same(drawn, inpaint(unclip, None, [3, 4], images=tensors, mask=MASK.expand(2, -1, -1, -1)))


def test_captions_are_drawn_from_a_picture_to_start_from(unclip, images):
    (first, _), tensors = images

    def drawn(start):
        decode = partial(image_to_image, unclip, images=start, strength=0.5)
        return unclip.generate([CAPTION] * 2, range(2), "caption", decode=decode)

    same(drawn(first), drawn(tensors[[0, 0]]))


def test_one_picture_serves_all_seeds(unclip, images):
    pil, tensors = images
    drawn = image_to_image(unclip, None, [3, 4], images=pil[0], strength=0.5)
    same(drawn[1:], image_to_image(unclip, None, [4], images=tensors[:1], strength=0.5))
    drawn = inpaint(unclip, None, [3, 4], images=pil[0], mask=MASK)
    same(drawn[1:], inpaint(unclip, None, [4], images=tensors[:1], mask=MASK))
    kept = torch.where(MASK, 0, drawn)
    same(kept, torch.where(MASK, 0, tensors[:1]).expand(2, -1, -1, -1))


def test_pictures_of_any_size_and_mode_are_cut_to_the_decoder(unclip):
    colours = np.random.default_rng(0).integers(0, 256, (16, 40, 3), dtype=np.uint8)
    wide = Image.fromarray(colours)
    square = wide.crop((12, 0, 28, 16))
    for image in (wide, wide.convert("RGBA")):
        one, other = invert(unclip, [image, wide], 2), invert(unclip, square, 2)
        same(one.x_T[:1], other.x_T)
    # CLIP sees the square in its own size, and pictures may have several.
    embeds = unclip.embed_images([wide, square.resize((12, 12))])
    same(embeds[:1], unclip.embed_images(from_pil(square)[None]))
    same(embeds[1:], unclip.embed_images(from_pil(square.resize((12, 12)))[None]))


def test_what_is_no_picture_is_a_sentence(unclip, images):
    with pytest.raises(UserError, match="PIL.Image.open"):
        vary(unclip, "fox.png", [0], 0.5)
    with pytest.raises(UserError, match="PIL.Image.open"):
        unclip.embed_images([])
    with pytest.raises(UserError, match="several sizes"):
        unclip.upsample([images[0][0], images[0][0].resize((8, 8))], [0, 1])


@pytest.mark.slow
def test_the_lines_of_the_documentation_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(latent, "invert", partial(invert, steps=4))  # 50 take minutes
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, re.S)
    exec(block, {})
    drawn = [Image.open(file).convert("RGB") for file in sorted(tmp_path.glob("*.png"))]
    assert len(drawn) == 9 and {picture.size for picture in drawn} == {(64, 64)}
    for picture, following in pairwise(drawn):
        assert ImageChops.difference(picture, following).getbbox()
