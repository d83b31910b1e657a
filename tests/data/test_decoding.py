"""Image bytes to tensors: every format, within limits."""

import io
import itertools
import struct
import warnings
import zlib

import pytest
import torch
from PIL import Image, ImageFile

from tests.data.fitkit import data_of
from tests.data.loaderkit import keep, saved
from tests.data.shardkit import picture, pixels, write_tar
from unclip_pl.data.bad_samples import BadSample, BadSampleCounter
from unclip_pl.data.decoding import decode
from unclip_pl.data.loader_config import LoaderConfig
from unclip_pl.data.names import expand
from unclip_pl.data.reader import ShuffledShards
from unclip_pl.data.shards import raw_samples
from unclip_pl.datamodules.image_text import ImageTextData


def test_transparency_is_white_and_exif_turns():
    clear = saved(Image.new("RGBA", (20, 20), (255, 0, 0, 0)))
    assert torch.equal(decode(clear, 8), torch.ones(3, 8, 8))
    palette = Image.new("P", (20, 20), 0)
    palette.putpalette([0, 0, 0] * 256)
    assert torch.equal(decode(saved(palette, transparency=0), 8), torch.ones(3, 8, 8))
    exif = Image.Exif()
    exif[274] = 6  # the camera was held upright: turn by 90 degrees clockwise
    half = Image.new("RGB", (32, 32), "black")
    half.paste("white", (0, 0, 32, 16))  # white above: turned, white at the right
    turned = decode(saved(half, "JPEG", exif=exif), 8)
    assert turned[:, :, 5:].min() > 0.8 and turned[:, :, :3].max() < -0.8


def test_grey_16_bit_and_cmyk_keep_their_brightness():
    assert decode(saved(Image.fromarray(pixels(257 * 100))), 8).unique().numpy() == pytest.approx(
        100 / 127.5 - 1, abs=1e-5
    )
    assert decode(saved(Image.new("L", (9, 9), 100)), 8).unique().numpy() == pytest.approx(
        100 / 127.5 - 1, abs=1e-5
    )
    assert decode(saved(Image.new("CMYK", (16, 16), (0, 0, 0, 0)), "JPEG"), 8).min() > 0.97


def test_the_short_side_is_resized_antialiased_and_the_centre_cut():
    wide = Image.new("RGB", (96, 32), "black")
    wide.paste("white", (32, 0, 64, 32))
    # at the very edge the filter sees the black next to the cut
    assert decode(saved(wide), 16)[..., 1:-1].min() > 0.95
    checks = Image.new("L", (64, 64))
    checks.putdata([255 * ((x + y) % 2) for y in range(64) for x in range(64)])
    assert decode(saved(checks), 8).abs().max() < 0.05  # grey, not aliased to black or white
    strip = decode(saved(Image.new("RGB", (20000, 2), "red")), 64)
    assert strip.shape == (3, 64, 64) and strip[0].min() > 0.99


def test_a_large_jpeg_decoded_small_is_the_same_picture(tmp_path, noto):
    picture = decode(next(raw_samples(expand(str(noto))[0], BadSampleCounter(0)))["image"], 256)
    large = Image.fromarray(
        ((picture.permute(1, 2, 0).numpy() + 1) * 127.5).round().astype("uint8")
    ).resize((1024, 1024), Image.Resampling.BICUBIC)
    jpeg, whole = (
        saved(large, "JPEG", quality=95),
        decode(saved(Image.open(io.BytesIO(saved(large, "JPEG", quality=95)))), 64),
    )
    assert 0 < (decode(jpeg, 64) - whole).abs().mean() < 0.02
    assert torch.equal(decode(jpeg, 64, exact_jpeg=True), whole)
    shard = write_tar(tmp_path / "a.tar", {"a.jpg": jpeg, "a.txt": b"a"})
    exact, fast = (
        next(iter(ShuffledShards([shard], 64, LoaderConfig(exact_jpeg=exact), keep)))["image"]
        for exact in (True, False)
    )
    assert torch.equal(exact, whole) and not torch.equal(fast, whole)


def png_header(side: int) -> bytes:
    """A PNG that says it is side x side and has no pixels."""
    body = b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + struct.pack(">I", 13)
        + body
        + struct.pack(">II", zlib.crc32(body), 9999)
        + b"IDAT"
    )


@pytest.mark.filterwarnings(
    "ignore::PIL.Image.DecompressionBombWarning"
)  # as shards.py has it; pytest sets filters of its own
def test_a_picture_of_a_hundred_megapixels_is_a_bad_sample_at_once(tmp_path, caplog, monkeypatch):
    huge = saved(Image.new("1", (10_000, 10_000)))
    load, loaded = ImageFile.ImageFile.load, []
    monkeypatch.setattr(
        ImageFile.ImageFile,
        "load",
        lambda image: loaded.append(image.width * image.height) or load(image),
    )
    shard = write_tar(
        tmp_path / "a.tar",
        {"a.png": huge, "b.png": png_header(40_000), "c.png": b"", "d.png": picture(1)},
    )
    samples = ShuffledShards([shard], 8, LoaderConfig(max_bad_rate=1.0), keep)
    # and so a whole pass
    assert [sample["key"] for sample in itertools.islice(samples, 2)] == [
        "d",
        "d",
    ]
    assert loaded and max(loaded) < 10_000  # "at once": the pixels of no other were read
    with warnings.catch_warnings(), pytest.raises(BadSample, match="larger than 50 megapixels"):
        warnings.simplefilter("error")
        decode(huge, 8)
    for key, reason in {
        "a": "larger than 50 megapixels",
        "b": "larger than 50 megapixels",
        "c": "0 bytes",
    }.items():
        assert any(
            f"sample {key} of {shard}" in line and reason in line for line in caplog.messages
        ), key


def test_a_jpeg_of_a_hundred_megapixels_is_decoded_at_an_eighth():
    large = saved(Image.new("L", (10_000, 10_000), 200), "JPEG", quality=50)
    assert decode(large, 64).unique().numpy() == pytest.approx(200 / 127.5 - 1, abs=0.01)
    with pytest.raises(BadSample, match="larger than 50 megapixels"):
        decode(large, 4096)  # nothing can be left out


def test_pictures_of_every_format_with_gaps_and_json_captions_make_batches(tmp_path):
    drawing = Image.radial_gradient("L").convert("RGB")
    failed = b'{"caption": "failed to download", "status": "failed_to_download"}'
    files = {
        "000000003.jpg": saved(drawing, "JPEG", quality=95),
        "000000003.json": b'{"caption": "three", "status": "success"}',
        "000000003.txt": b"three",
        "000000007.png": saved(drawing),
        "000000007.json": b'{"caption": "seven"}',
        "000000011.webp": saved(drawing, "WEBP", lossless=True),
        "000000011.txt": b"eleven",
        "000000012.json": failed,
        "000000019.jpg": saved(drawing, "WEBP", lossless=True),
        "000000019.txt": b"nineteen, named wrongly",
    }
    shard = write_tar(tmp_path / "00000.tar", files)
    data = data_of(ImageTextData, [shard], max_bad_rate=1.0)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert sorted(batch["key"]) == ["000000003", "000000007", "000000011", "000000019"]
    exact = decode(saved(drawing), 8)
    assert (batch["image"] - exact).abs().amax() < 0.05
    assert all(
        word in " ".join(batch["caption"]).lower()
        for word in ("three", "seven", "eleven", "nineteen")
    )
