"""Text from outside: bytes of unknown encoding, and strings that are not valid Unicode."""

import codecs

BYTE_ORDER_MARKS = (  # UTF-32 before UTF-16, whose mark is a prefix of it
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
CONTROLS = {chr(n) for n in (*range(32), 127)} - {*"\t\n\r"}
REPLACEMENT = "\ufffd"  # stands for a character that cannot be decoded


def decode_text(data: bytes) -> str:
    """Decode the content of a text file whose encoding is not known.

    Tried in this order: a byte order mark of UTF-8, UTF-16 or UTF-32; UTF-16 by its many zero
    bytes; UTF-8; Windows-1252, which contains Latin-1.

    Returns:
        Valid Unicode, see `repair_text`.
    """
    for mark, encoding in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return repair_text(data.decode(encoding, errors="replace"))
    zeros = data[0::2].count(0), data[1::2].count(0)
    if max(zeros) > len(data) / 5 and len(data) % 2 == 0:
        wide = "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
        return repair_text(data.decode(wide, errors="replace"))
    text = data.decode("utf-8", errors="replace")
    if REPLACEMENT in text and not any(c > "\x7f" and c != REPLACEMENT for c in text):
        try:
            text = data.decode("cp1252")
        except UnicodeDecodeError:
            text = data.decode("latin-1")
    return repair_text(text)


def repair_text(text: str) -> str:
    """The text as valid Unicode, which any file and tokenizer takes.

    Undecoded bytes, which Python keeps as surrogates in arguments and file names, are read as
    `decode_text` does. Other lone surrogates become U+FFFD. Control characters become spaces,
    except for tabs and line ends.
    """
    if text.isprintable():
        return text
    if any("\ud800" <= c <= "\udfff" for c in text):
        try:
            return decode_text(text.encode("utf-8", "surrogateescape"))
        except UnicodeEncodeError:  # halves of characters, as JSON can hold them
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return "".join(" " if c in CONTROLS else c for c in text)
