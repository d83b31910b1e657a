"""Captions to draw from: a text file, MS-COCO's annotations, or image shards.

The spec "openmoji" means the captions of OpenMoji's held-out drawings.
"""

import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unclip_pl.data.bad_samples import BadSampleCounter
from unclip_pl.data.names import expand
from unclip_pl.data.shards import raw_samples
from unclip_pl.datamodules.base import resolve_shards
from unclip_pl.utils.errors import UserError

MAX_BAD_RATE = 0.01
"""The largest share of a shard's samples that may be unreadable."""
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Caption:
    """A caption with what belongs to it.

    Args:
        key: the name that its source has for it.
        text: the caption.
        image: from shards: the bytes of its picture.
        picture: from MS-COCO: the number of its picture.
    """

    key: str
    text: str
    image: bytes | None = None
    picture: int | None = None


def read_captions(spec: str, count: int | None = None, image_size: int = 64) -> list[Caption]:
    """The captions of a file or of shards; blank ones are named in a warning and left out.

    Args:
        spec: FILE.txt (one caption per line), FILE.json (MS-COCO's annotations), or shards.
        count: how many: the first ones. MS-COCO has five captions of each picture: of it, one of
            each of so many pictures, a fixed random choice (`one_per_picture`).
        image_size: side in pixels of the drawings, for the spec "openmoji".

    Raises:
        UserError: there are none, or fewer than `count`.
    """
    if spec.endswith(".txt"):
        captions = _without_blank(_lines(Path(spec).expanduser()), spec)
    elif spec.endswith(".json"):
        captions, _ = read_coco(spec)
    else:
        captions = _without_blank(_from_shards(resolve_shards(spec, "val", image_size)), spec)
    if not captions:
        raise UserError(
            f"There are no captions in {spec}: give a .txt file with one per line, MS-COCO's "
            "annotations (.json), or image shards with captions."
        )
    if count is None:
        return captions
    if spec.endswith(".json"):
        return one_per_picture(captions, count, spec)
    if not 1 <= count <= len(captions):
        raise UserError(
            f"{count} captions were asked for and {spec} has {len(captions)}: give --num-captions "
            "from 1 to that."
        )
    return captions[:count]


def require_captions(spec: str) -> None:
    """Raise a UserError where there are no such captions, before anything is loaded or drawn."""
    if spec.endswith((".txt", ".json")):
        _read_text(Path(spec).expanduser())
    elif spec != "openmoji":
        try:
            expand(spec)
        except UserError as error:
            raise UserError(
                f"{spec} names no captions: give openmoji, FILE.txt with one per line, "
                "MS-COCO's FILE.json, or image shards (a folder, a file, a pattern)."
            ) from error


def one_per_picture(
    captions: Sequence[Caption], count: int, spec: str, seed: int = 0
) -> list[Caption]:
    """Choose one caption for each of `count` pictures of MS-COCO, in the order of their numbers.

    Args:
        captions: all captions, several for a picture.
        count: how many pictures, 1 to as many as have captions.
        spec: the name of the file, for the error.
        seed: chooses the pictures and their captions. Which caption a picture has does not depend
            on `count`.

    Raises:
        UserError: fewer pictures have captions.
    """
    by_picture: dict[int | None, list[Caption]] = {}
    for caption in sorted(captions, key=lambda caption: (caption.picture, int(caption.key))):
        by_picture.setdefault(caption.picture, []).append(caption)
    if not 1 <= count <= len(by_picture):
        raise UserError(
            f"Captions of {count} pictures were asked for and {spec} has those of "
            f"{len(by_picture)}: give --num-captions from 1 to that."
        )
    generator = random.Random(seed)
    one_each = [generator.choice(candidates) for candidates in by_picture.values()]
    return [one_each[k] for k in sorted(generator.sample(range(len(one_each)), count))]


def read_coco(spec: str) -> tuple[list[Caption], dict[int, str]]:
    """Read MS-COCO's annotations: all captions that are not blank, and the pictures' file names.

    The file names are a dict, by the pictures' numbers.

    Raises:
        UserError: the file cannot be read or has another form.
    """
    try:
        content = json.loads(_read_text(Path(spec).expanduser()))
        captions = [_coco_caption(entry) for entry in content["annotations"]]
        files = {int(entry["id"]): str(entry["file_name"]) for entry in content.get("images", [])}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{spec} is none of MS-COCO's caption files "
            f'({{"annotations": [{{"id", "image_id", "caption"}}, ...]}}): give '
            "captions_val2014.json."
        ) from None
    return _without_blank(captions, spec), files


def _coco_caption(entry: dict) -> Caption:
    text = " ".join(entry["caption"].split())
    return Caption(str(int(entry["id"])), text, picture=int(entry["image_id"]))


def _without_blank(captions: list[Caption], spec: str) -> list[Caption]:
    blank = [caption.key for caption in captions if not caption.text]
    if blank:
        names = ", ".join(blank[:3]) + (", ..." if len(blank) > 3 else "")
        log.warning("%s has %d blank captions (%s), which are left out.", spec, len(blank), names)
    return [caption for caption in captions if caption.text]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(
            f"The captions {path} cannot be read ({error.strerror}): check the path."
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"The captions {path} are not UTF-8 (byte {error.start}): save the file as UTF-8."
        ) from None


def _lines(path: Path) -> list[Caption]:
    lines = _read_text(path).splitlines()
    return [Caption(f"line {number}", line.strip()) for number, line in enumerate(lines, 1)]


def _from_shards(shards: Sequence[str]) -> list[Caption]:
    counter = BadSampleCounter(MAX_BAD_RATE, "the share of bad samples")
    samples = (sample for shard in shards for sample in raw_samples(shard, counter))
    return [Caption(sample["key"], sample["caption"], sample["image"]) for sample in samples]
