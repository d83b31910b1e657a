"""Captions to draw from: a text file, MS-COCO's annotations, or image shards, "openmoji" (its
held-out drawings) among them.
"""

import json
import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from unclip_pl.data.modules import resolve
from unclip_pl.data.shards import ErrorBudget, raw_samples
from unclip_pl.errors import UserError

MAX_BAD_RATE = 0.01
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Caption:
    """A caption, with the `key` that its source has for it and, from shards, the bytes of its
    picture.
    """

    key: str
    text: str
    image: bytes | None = None


def read_captions(spec: str, count: int | None = None, image_size: int = 64) -> list[Caption]:
    """The captions of FILE.txt (one a line), FILE.json (MS-COCO's annotations), or shards
    ("openmoji": `image_size` is that of the drawings).

    With `count` that many: the first ones; of MS-COCO's, which has five of each picture, a fixed
    random choice. Blank ones are named and passed over.

    Raises:
        UserError: there are none, or fewer than `count`.
    """
    if spec.endswith(".txt"):
        found = _lines(Path(spec).expanduser())
    elif spec.endswith(".json"):
        found = _coco(Path(spec).expanduser())
    else:
        found = _shards(resolve(spec, "val", image_size))
    blank = [caption.key for caption in found if not caption.text]
    if blank:
        log.warning(
            "%s has %d blank captions (%s%s), which were passed over.",
            spec,
            len(blank),
            ", ".join(blank[:3]),
            ", ..." if len(blank) > 3 else "",
        )
        found = [caption for caption in found if caption.text]
    if not found:
        raise UserError(
            f"There are no captions in {spec}: give a .txt file with one a line, MS-COCO's "
            "annotations (.json), or image shards with captions."
        )
    if count is None:
        return found
    if not 1 <= count <= len(found):
        raise UserError(
            f"{count} captions were asked for and {spec} has {len(found)}: give --num-captions "
            "from 1 to that."
        )
    return (
        sorted(random.Random(0).sample(found, count), key=lambda caption: int(caption.key))
        if spec.endswith(".json")
        else found[:count]
    )


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


def _coco(path: Path) -> list[Caption]:
    try:
        return [
            Caption(str(int(entry["id"])), " ".join(entry["caption"].split()))
            for entry in json.loads(_text(path))["annotations"]
        ]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{path} is none of MS-COCO's caption files "
            f'({{"annotations": [{{"id", "caption"}}, ...]}}): give captions_val2014.json.'
        ) from None


def _shards(shards: Sequence[str]) -> list[Caption]:
    budget = ErrorBudget(MAX_BAD_RATE, "the share of bad samples")
    return [
        Caption(sample["key"], sample["caption"], sample["image"])
        for shard in shards
        for sample in raw_samples(shard, budget)
    ]
