"""Text from outside: bytes of unknown encoding, and strings that are not quite Unicode."""

import codecs

MARKS = (  # UTF-32's begins as UTF-16's does
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
CONTROLS = {chr(n) for n in (*range(32), 127)} - {*"\t\n\r"}
LOST = "\ufffd"  # what stands for a character that cannot be read


def decode_text(data: bytes) -> str:
    """Text of a file: UTF-8; UTF-16 or UTF-32 by their mark, UTF-16 also by its zeros; else
    Windows-1252, of which Latin-1 is a part. Always a string that is Unicode, see `mended`."""
    for mark, encoding in MARKS:
        if data.startswith(mark):
            return mended(data.decode(encoding, errors="replace"))
    zeros = data[0::2].count(0), data[1::2].count(0)
    if max(zeros) > len(data) / 5 and len(data) % 2 == 0:
        wide = "utf-16-be" if zeros[0] > zeros[1] else "utf-16-le"
        return mended(data.decode(wide, errors="replace"))
    text = data.decode("utf-8", errors="replace")
    if LOST in text and not any(c > "\x7f" and c != LOST for c in text):
        try:
            text = data.decode("cp1252")
        except UnicodeDecodeError:
            text = data.decode("latin-1")
    return mended(text)


def mended(text: str) -> str:
    """The text as Unicode that any file and tokenizer takes: bytes that an argument or a file name
    holds (Python's surrogates) are read as `decode_text` does, half characters are replaced, and
    control characters except line ends and tabs become spaces."""
    if text.isprintable():
        return text
    if any("\ud800" <= c <= "\udfff" for c in text):
        try:
            return decode_text(text.encode("utf-8", "surrogateescape"))
        except UnicodeEncodeError:  # halves of characters, as JSON can hold them
            text = text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return "".join(" " if c in CONTROLS else c for c in text)
