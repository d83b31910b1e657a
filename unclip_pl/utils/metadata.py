"""Strip broken metadata from picture files; the bytes that the pixels need stay as they are."""

import struct
import zlib

PNG = b"\x89PNG\r\n\x1a\n"
PNG_CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")
TRANSPARENCY = {0: 2, 2: 6}  # length of a tRNS chunk in bytes, by colour type
TIFF_TAGS = {
    *(254, 256, 257, 258, 259, 262, 266, 273, 274, 277, 278, 279, 284, 292, 293, 317, 320),
    *(322, 323, 324, 325, 338, 339, 347, 529, 530, 531, 532),
}
"""Sizes, layout, colours and orientation."""


def strip_metadata(data: bytes) -> bytes:
    """A PNG, JPEG, WebP, GIF or TIFF file without texts, profiles and thumbnails.

    A valid orientation stays. Other formats, and files whose structure is broken, come back
    unchanged.
    """
    try:
        if data.startswith(PNG):
            return _png(data)
        if data.startswith(b"\xff\xd8"):
            return _jpeg(data)
        if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
            return _webp(data)
        if data[:6] in (b"GIF87a", b"GIF89a"):
            return _gif(data)
        if data[:4] in (b"II*\0", b"MM\0*"):
            return _tiff(data)
    except (struct.error, IndexError):
        pass
    return data


def _png(data: bytes) -> bytes:
    parts, at, colour = [PNG], len(PNG), 0
    while at + 12 <= len(data):
        (length,), name = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        chunk = data[at : at + 12 + length]
        body, crc = chunk[8:-4], chunk[-4:]
        at += 12 + length
        if name == b"IHDR":
            colour = body[9]
        valid = crc == struct.pack(">I", zlib.crc32(name + body))
        if name == b"tRNS":
            valid = valid and TRANSPARENCY.get(colour, length) == length
        if name in PNG_CHUNKS or (name in (b"tRNS", b"eXIf") and valid):
            parts.append(chunk)
    return b"".join(parts)


def _jpeg(data: bytes) -> bytes:
    parts, at = [data[:2]], 2
    while at + 4 <= len(data):
        marker, (length,) = data[at + 1], struct.unpack(">H", data[at + 2 : at + 4])
        end = at + 2 + length
        if data[at] != 0xFF or length < 2 or data[end : end + 1] != b"\xff":
            if marker == 0xDA and data[at] == 0xFF:  # the pixels follow
                break
            at = data.find(b"\xff\xdb", at + 2)  # where tables begin again
            if at < 0:
                return data
            continue
        content = data[at + 4 : end]
        needed = content.startswith((b"Exif\0\0", b"Adobe"))  # Adobe's says which colours
        valid = len(content) >= (12 if content.startswith(b"Adobe") else 8)
        if not (0xE0 <= marker <= 0xEF or marker == 0xFE) or (needed and valid):
            parts.append(data[at:end])
        at = end
        if marker == 0xDA:
            break
    return b"".join(parts) + data[at:]


def _webp(data: bytes) -> bytes:
    parts, at = [], 12
    while at + 8 <= len(data):
        name, (length,) = data[at : at + 4], struct.unpack("<I", data[at + 4 : at + 8])
        chunk = data[at : at + 8 + length + length % 2]
        at += len(chunk)
        if name not in (b"ICCP", b"EXIF", b"XMP ") or (name == b"EXIF" and len(chunk) > 8 + length):
            parts.append(chunk)
    if parts and parts[0].startswith(b"VP8X"):
        flags = parts[0][8] & ~0x2C | (0x08 if any(c.startswith(b"EXIF") for c in parts) else 0)
        parts[0] = parts[0][:8] + bytes([flags]) + parts[0][9:]
    body = b"WEBP" + b"".join(parts)
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _gif(data: bytes) -> bytes:
    at = 13 + (3 * (2 << (data[10] & 7)) if data[10] & 0x80 else 0)
    parts = [data[:at]]
    while data[at] == 0x21:  # an extension before the first picture
        first, at = at, at + 2
        while data[at]:
            at += 1 + data[at]
        at += 1
        if data[first + 1] == 0xF9 and data[first + 2] == 4:  # says what is transparent
            parts.append(data[first:at])
    return b"".join(parts) + data[at:]


def _tiff(data: bytes) -> bytes:
    order = "<" if data.startswith(b"II") else ">"
    (at,) = struct.unpack(order + "I", data[4:8])
    (count,) = struct.unpack(order + "H", data[at : at + 2])
    entries = [data[at + 2 + 12 * i : at + 14 + 12 * i] for i in range(count)]
    parts = [entry for entry in entries if struct.unpack(order + "H", entry[:2])[0] in TIFF_TAGS]
    table = struct.pack(order + "H", len(parts)) + b"".join(parts) + bytes(4)
    end = at + 2 + 12 * count + 4
    return data[:at] + table.ljust(end - at, b"\0") + data[end:]
