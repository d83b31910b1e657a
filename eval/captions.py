"""Captions to draw from: a text file, MS-COCO's annotations, or image shards, "openmoji" (its
held-out drawings) among them.
"""

import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unclip_pl.data.bad_samples import BadSampleCounter
from unclip_pl.data.shards import raw_samples
from unclip_pl.datamodules.base import resolve_shards
from unclip_pl.utils.errors import UserError

MAX_BAD_RATE = 0.01
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Caption:
    """A caption, with the `key` that its source has for it.

    From shards it has the bytes of its picture (`image`), from MS-COCO the picture's number.
    """

    key: str
    text: str
    image: bytes | None = None
    picture: int | None = None


def read_captions(spec: str, count: int | None = None, image_size: int = 64) -> list[Caption]:
    """The captions of FILE.txt (one a line), FILE.json (MS-COCO's annotations), or shards
    ("openmoji": `image_size` is that of the drawings).

    With `count` that many: the first ones; of MS-COCO's, which has five of each picture, one of
    each of so many pictures, a fixed random choice (`one_each`). Blank ones are named and passed
    over.

    Raises:
        UserError: there are none, or fewer than `count`.
    """
    if spec.endswith(".txt"):
        found = _not_blank(_lines(Path(spec).expanduser()), spec)
    elif spec.endswith(".json"):
        found, _ = read_coco(spec)
    else:
        found = _not_blank(_shards(resolve_shards(spec, "val", image_size)), spec)
    if not found:
        raise UserError(
            f"There are no captions in {spec}: give a .txt file with one a line, MS-COCO's "
            "annotations (.json), or image shards with captions."
        )
    if count is None:
        return found
    if spec.endswith(".json"):
        return one_each(found, count, spec)
    if not 1 <= count <= len(found):
        raise UserError(
            f"{count} captions were asked for and {spec} has {len(found)}: give --num-captions "
            "from 1 to that."
        )
    return found[:count]


def _not_blank(found: list[Caption], spec: str) -> list[Caption]:
    blank = [caption.key for caption in found if not caption.text]
    if blank:
        log.warning(
            "%s has %d blank captions (%s%s), which were passed over.",
            spec,
            len(blank),
            ", ".join(blank[:3]),
            ", ..." if len(blank) > 3 else "",
        )
    return [caption for caption in found if caption.text]


def one_each(captions: Sequence[Caption], count: int, spec: str, seed: int = 0) -> list[Caption]:
    """One caption of each of `count` of MS-COCO's pictures, in the order of the pictures' numbers.

    `seed` chooses both. Which caption a picture has does not depend on `count`.

    Raises:
        UserError: there are not so many pictures with captions in `spec`.
    """
    of_picture: dict[int | None, list[Caption]] = {}
    for caption in sorted(captions, key=lambda caption: (caption.picture, int(caption.key))):
        of_picture.setdefault(caption.picture, []).append(caption)
    if not 1 <= count <= len(of_picture):
        raise UserError(
            f"Captions of {count} pictures were asked for and {spec} has those of "
            f"{len(of_picture)}: ask for 1 to that many."
        )
    generator = random.Random(seed)
    chosen = [generator.choice(some) for some in of_picture.values()]
    return [chosen[k] for k in sorted(generator.sample(range(len(chosen)), count))]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(
            f"The captions {path} cannot be read ({error.strerror}): check --captions."
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"The captions {path} are not UTF-8 (byte {error.start}): save the file as UTF-8."
        ) from None


def _lines(path: Path) -> list[Caption]:
    return [
        Caption(f"line {number}", line.strip())
        for number, line in enumerate(_text(path).splitlines(), 1)
    ]


def read_coco(spec: str) -> tuple[list[Caption], dict[int, str]]:
    """MS-COCO's annotations -> all captions that are not blank, and the file names of the pictures
    by their numbers.

    Raises:
        UserError: the file cannot be read or has another form.
    """
    try:
        read = json.loads(_text(Path(spec).expanduser()))
        captions = [
            Caption(
                str(int(entry["id"])),
                " ".join(entry["caption"].split()),
                picture=int(entry["image_id"]),
            )
            for entry in read["annotations"]
        ]
        files = {int(entry["id"]): str(entry["file_name"]) for entry in read.get("images", [])}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{spec} is none of MS-COCO's caption files "
            f'({{"annotations": [{{"id", "image_id", "caption"}}, ...]}}): give '
            "captions_val2014.json."
        ) from None
    return _not_blank(captions, spec), files


def _shards(shards: Sequence[str]) -> list[Caption]:
    counter = BadSampleCounter(MAX_BAD_RATE, "the share of bad samples")
    return [
        Caption(sample["key"], sample["caption"], sample["image"])
        for shard in shards
        for sample in raw_samples(shard, counter)
    ]
