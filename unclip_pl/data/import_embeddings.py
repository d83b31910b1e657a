"""Import embeddings that were made elsewhere into an embedding store, paired by key.

They are taken over as they are, after some images (and captions) of every shard were embedded here
to compare: the CLIP at hand must give the same rows.
"""

import logging
import os
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.data.bad_samples import BadSample, BadSampleCounter
from unclip_pl.data.decoding import decode
from unclip_pl.data.import_sources import EMBED_AGAIN, Source
from unclip_pl.data.names import expand
from unclip_pl.data.shard_rows import describe_shard
from unclip_pl.data.shards import raw_samples
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.utils.errors import UserError

COMPARED = 8
"""Samples of a shard that are embedded to compare."""
MIN_COSINE = 0.98
"""From here on a row is of the same image or caption: another resize or float16 moves the cosine by
about 0.001, another image by more."""
MIN_AGREEING = 0.75
"""Share of the compared samples that must agree: CLIP's own transform treats transparency and EXIF
in another way than this one."""
MAX_LENGTH_CHANGE = 0.05
"""Relative difference in length that rounding and another resize can explain."""
log = logging.getLogger(__name__)


class Importer(EmbeddingStore):
    """A store whose rows are taken from a `source`.

    Tokens, and text embeddings where the source has none, are computed by the CLIP.

    Args:
        folder: of the store, made on demand.
        source: of the rows.
        embed_missing: embed the samples that the source has no row for; else they are an error.
    """

    def __init__(
        self, folder: str | os.PathLike, source: Source, embed_missing: bool = False
    ) -> None:
        super().__init__(folder)
        self.source, self.embed_missing = source, embed_missing

    def _claim(self, clip: FrozenCLIP) -> None:
        """Compare the CLIP with that of the folder's owner.

        A new folder is claimed when its first shard has passed the comparison.
        """
        if self.files.exists("clip.json") or self.files.exists("manifest.json") or self.has_rows():
            super()._claim(clip)

    def _embed(
        self, shard: str, clip: FrozenCLIP, batch_size: int, counter: BadSampleCounter, bar: tqdm
    ) -> None:
        tar = describe_shard(shard)
        bar.set_description("importing", refresh=False)
        captions: dict[str, str] = {}  # by key
        images: list[np.ndarray] = []
        texts: list[np.ndarray] = []
        drawn: list[tuple[int, Tensor]] = []  # row and decoded image of the samples to compare
        rng = random.Random(shard)
        for sample in raw_samples(shard, counter, self.source.members, whole=True):
            key = sample["key"]
            try:
                image, text = self._rows(sample, clip)
                # A uniform draw of those seen so far; what is drawn must decode
                place = len(drawn) if len(drawn) < COMPARED else rng.randrange(len(captions) + 1)
                if place < COMPARED:
                    picture = decode(sample["image"], clip.image_size)
                    drawn[place : place + 1] = [(len(captions), picture)]
            except BadSample as error:
                counter.record_bad(f"sample {key} of {shard}", error)
                continue
            counter.record_good()
            captions[key] = sample["caption"]
            images.append(image)
            if text is not None:
                texts.append(text)
            bar.update(len(sample["image"]))
            bar.set_postfix_str(f"{counter.bad} bad", refresh=False)
        if not captions:
            raise UserError(
                f"The shard {shard} has no usable sample: take it out of the data, or mend it."
            )
        keys = list(captions)
        tokens = _tokenize(list(captions.values()), clip, batch_size)
        image_embed = torch.from_numpy(np.stack(images))
        rows = [row for row, _ in drawn]
        where = f"{self.source.name} for {shard}"
        pictures = torch.stack([picture for _, picture in drawn])
        compare(image_embed, rows, clip.embed_images(pictures), keys, "image", where)
        if texts:
            text_embed = torch.from_numpy(np.stack(texts))
            compare(text_embed, rows, clip.embed_text(tokens[rows]).embed, keys, "text", where)
        else:
            parts = tokens.split(batch_size)
            text_embed = torch.cat([clip.embed_text(part).embed.half().cpu() for part in parts])
        super()._claim(clip)
        tensors = {"image_embed": image_embed, "text_embed": text_embed, "tokens": tokens.int()}
        self._write(shard, keys, tensors, tar)

    def _rows(
        self, sample: dict[str, Any], clip: FrozenCLIP
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Image and text row (D,) float16 of a sample.

        Raises:
            BadSample: there is no row because the image does not decode.
        """
        image, text, file = self.source.rows(sample)
        lacks_text = text is None and self.source.has_text
        if image is None or lacks_text:
            picture = decode(sample["image"], clip.image_size)
            if not self.embed_missing:
                kind = "image" if image is None else "text"
                raise UserError(
                    f"There is no {kind} embedding of the sample {sample['key']} of "
                    f"{sample['shard']} in {self.source.name}: compare the keys and the endings "
                    "of members, or embed what is missing with --embed-missing."
                )
            if image is None:
                image = clip.embed_images(picture[None])[0].cpu().numpy()
            if lacks_text:
                text = clip.embed_text(clip.tokenize([sample["caption"]])).embed[0].cpu().numpy()
        where = f"of the sample {sample['key']} in {file}"
        image = _check_row(image, clip.embed_dim, f"The image embedding {where}")
        if text is not None:
            text = _check_row(text, clip.embed_dim, f"The text embedding {where}")
        return image, text


def _tokenize(captions: list[str], clip: FrozenCLIP, batch_size: int) -> Tensor:
    """(N, L) int64."""
    starts = range(0, len(captions), batch_size)
    return torch.cat([clip.tokenize(captions[start : start + batch_size]) for start in starts])


def _check_row(row: np.ndarray, width: int, what: str) -> np.ndarray:
    """A row (D,) of floats as float16; raises a UserError where it cannot be one of this CLIP's."""
    if row.shape != (width,) or row.dtype.kind != "f":
        raise UserError(
            f"{what} is {row.dtype} {row.shape}, and this CLIP's are floats ({width},): name the "
            "CLIP that it was made with."
        )
    with np.errstate(over="ignore"):
        half = row.astype(np.float16)
    if not np.isfinite(half).all():
        raise UserError(
            f"{what} is not finite in float16: take the sample out of the data, or {EMBED_AGAIN}."
        )
    return half


def compare(
    table: Tensor, rows: list[int], fresh: Tensor, keys: list[str], kind: str, where: str
) -> None:
    """Compare some rows of a table with embeddings computed here: direction, then length.

    Args:
        table: (N, D), the imported embeddings.
        rows: M row numbers.
        fresh: (M, D), the embeddings of these samples, computed here.
        keys: of all N rows.
        kind: "image" or "text".
        where: the source of the table, for messages.

    Raises:
        UserError: the rows are in another order, of another CLIP, normalised, or scaled.
    """
    imported, fresh = table[rows].float(), fresh.float().cpu()
    agrees = F.cosine_similarity(fresh, imported) >= MIN_COSINE
    others = (~agrees).nonzero().flatten().tolist()
    for i in others:
        cosine, best = F.cosine_similarity(fresh[i : i + 1], table.float()).max(0)
        if cosine >= MIN_COSINE:
            raise UserError(
                f"The rows of {where} are in another order than its keys: the {kind} embedding of "
                f"{keys[int(best)]} is that of {keys[rows[i]]}; pair the files as they were "
                "written."
            )
    if agrees.sum() < MIN_AGREEING * len(rows):
        raise UserError(
            f"The {kind} embeddings of {where} were made with another CLIP or from other {kind}s: "
            f"only {int(agrees.sum())} of {len(rows)} samples that were embedded to compare agree, "
            f"{keys[rows[others[0]]]} does not; name the CLIP that they were made with."
        )
    for i in others:
        log.warning(
            "the %s embedding of %s from %s is not what this CLIP gives; its picture may be "
            "transparent or turned",
            kind,
            keys[rows[i]],
            where,
        )
    _compare_lengths(table, imported[agrees], fresh[agrees], kind, where)


def _compare_lengths(table: Tensor, imported: Tensor, fresh: Tensor, kind: str, where: str) -> None:
    theirs = imported.norm(dim=1).median().item()
    ours = fresh.norm(dim=1).median().item()
    if abs(theirs / ours - 1) <= MAX_LENGTH_CHANGE:
        return
    cure = EMBED_AGAIN
    if kind == "text":
        cure = "leave out the folder text_emb (or --text-key) to compute them from the captions"
    if ((table.float().norm(dim=1) - 1).abs() < 0.01).all():
        raise UserError(
            f"The {kind} embeddings of {where} are normalised to length 1 (clip-retrieval always "
            f"does that), and this CLIP's have lengths around {ours:.3g}: the lengths are lost "
            f"and cannot be found again, and training needs them; {cure}."
        )
    raise UserError(
        f"The {kind} embeddings of {where} have lengths around {theirs:.3g}, and this CLIP's have "
        f"{ours:.3g}: they were rescaled; {cure}."
    )


def import_embeddings(
    folder: str | os.PathLike,
    shards: str | Sequence[str],
    source: Source,
    clip: FrozenCLIP,
    *,
    batch_size: int = 256,
    progress: bool = True,
    counter: BadSampleCounter | None = None,
    embed_missing: bool = False,
) -> EmbeddingStore:
    """Fill a store from `source` for `shards`.

    A shard that is done is not done again, and one that is refused leaves no file.

    Args:
        folder: of the store, made on demand.
        shards: tars, as `expand` takes them.
        source: of the rows.
        clip: the CLIP that they were made with.
        batch_size: samples that go through CLIP at a time.
        progress: show a progress bar.
        counter: counts the samples that cannot be used.
        embed_missing: embed the samples that the source has no row for; else they are an error.

    Raises:
        UserError: the first row that is missing, there twice, not finite, of another width or CLIP,
            or normalised; or there are too many bad samples.
    """
    names = expand(shards)
    source.check(clip.embed_dim)
    importer = Importer(folder, source, embed_missing)
    importer.ensure(names, clip, batch_size, progress=progress, counter=counter)
    return EmbeddingStore(folder)
