"""Pictures with broken metadata can be read, in every format."""

import io
import struct
import zlib

import pytest
import torch
from PIL import Image

from unclip_pl.data.bad_samples import BadSample
from unclip_pl.data.decoding import decode
from unclip_pl.utils.images import load_image
from unclip_pl.utils.metadata import strip_metadata

DRAWING = Image.radial_gradient("L").convert("RGB").resize((32, 32))
DRAWING.paste("red", (0, 0, 16, 8))


def saved(kind: str, **options) -> bytes:
    file = io.BytesIO()
    DRAWING.save(file, kind, **options)
    return file.getvalue()


def chunk(name: bytes, body: bytes, crc: int | None = None) -> bytes:
    crc = zlib.crc32(name + body) if crc is None else crc
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", crc)


def png(*chunks: bytes) -> bytes:
    data = saved("PNG")
    return data[:33] + b"".join(chunks) + data[33:]


def segment(marker: int, body: bytes, length: int | None = None) -> bytes:
    data = saved("JPEG", quality=95)
    size = struct.pack(">H", len(body) + 2 if length is None else length)
    return data[:2] + bytes([0xFF, marker]) + size + body + data[2:]


def tiff_with_a_tag_beyond_the_end() -> bytes:
    data = bytearray(saved("TIFF", tiffinfo={270: "a description of some length"}))
    (at,) = struct.unpack("<I", data[4:8])
    for i in range(struct.unpack("<H", data[at : at + 2])[0]):
        entry = at + 2 + 12 * i
        if struct.unpack("<H", data[entry : entry + 2]) == (270,):
            data[entry + 8 : entry + 12] = struct.pack("<I", 0x7FFFFFFF)
    return bytes(data)


def gif(extension: bytes) -> bytes:
    data = saved("GIF")
    at = 13 + 3 * (2 << (data[10] & 7))
    return data[:at] + extension + data[at:]


OPTIONS = {"jpeg": {"quality": 95}, "webp": {"lossless": True}}
BOMB = zlib.compress(b"x" * 9_000_000)
WEBP = saved("WEBP", lossless=True, exif=b"Exif\0\0garbage", xmp=b"<x", icc_profile=b"abc")
BROKEN = {
    "png exif": png(chunk(b"eXIf", b"garbage")),
    "png checksum": png(chunk(b"tEXt", b"a\0b", 0)),
    "png text of 9 MB": png(chunk(b"zTXt", b"a\0\0" + BOMB), chunk(b"iTXt", b"a\0\1\0\0\0" + BOMB)),
    "png profile": png(chunk(b"iCCP", b"")),
    "png gamma, size, colours": png(chunk(b"gAMA", b""), chunk(b"pHYs", b"1"), chunk(b"cHRM", b"")),
    "png transparency": png(chunk(b"tRNS", b"1")),
    "png animation": png(chunk(b"acTL", b"1")),
    "png text at the end": saved("PNG")[:-12] + chunk(b"zTXt", b"a\0\5z") + saved("PNG")[-12:],
    "jpeg exif": segment(0xE1, b"Exif\0\0garbage"),
    "jpeg profile": segment(0xE2, b"ICC_PROFILE\0"),
    "jpeg jfif": segment(0xE0, b"JFIF\0"),
    "jpeg adobe": segment(0xEE, b"Adobe\0"),
    "jpeg length": segment(0xED, b"x" * 10, 65535),
    "jpeg pictures": segment(0xE2, b"MPF\0II*\0\x08\0\0\0\0\0"),
    "webp exif": WEBP,
    "webp cut in its metadata": WEBP[:-3],
    "webp length": WEBP[:4] + struct.pack("<I", len(WEBP) + 999) + WEBP[8:],
    "gif control": gif(b"!\xf9\x01\0\0"),
    "gif extension": gif(b"!\xff\0"),
    "tiff tag": tiff_with_a_tag_beyond_the_end(),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_picture_with_broken_metadata_is_decoded(name, tmp_path):
    kind = name.split()[0]
    good = decode(saved(kind.upper(), **OPTIONS.get(kind, {})), 32)
    path = tmp_path / "picture"
    path.write_bytes(BROKEN[name])
    for image in (decode(BROKEN[name], 32), load_image(path)):
        assert (image - good).abs().max() < 0.01


def test_a_valid_orientation_is_kept_among_broken_metadata():
    exif = Image.Exif()
    exif[274] = 6
    good = decode(saved("JPEG", quality=95, exif=exif), 32)
    profile = segment(0xE2, b"ICC_PROFILE\0")[2:20]
    data = saved("JPEG", quality=95, exif=exif)
    assert torch.equal(decode(data[:2] + profile[:16] + data[2:], 32), good)
    assert (good - decode(saved("JPEG", quality=95), 32)).abs().max() > 0.5
    whole = saved("PNG", exif=exif)
    turned = whole[:33] + chunk(b"tEXt", b"a\0b", 0) + whole[33:]
    assert torch.equal(decode(turned, 32), decode(whole, 32))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_what_is_no_picture_stays_none_and_what_is_whole_stays_whole(kind):
    whole = saved(kind)
    assert torch.equal(decode(strip_metadata(whole), 32), decode(whole, 32))
    for damaged in (whole[:20], whole[:9] + b"\xff" * 60, whole[: len(whole) // 3]):
        with pytest.raises(BadSample, match="cannot be decoded"):
            decode(damaged, 32)
