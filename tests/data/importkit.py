"""Embeddings made elsewhere, for the tests of the import."""

import io
import random

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.shardkit import FakeCLIP, write_tar
from unclip_pl.data.bad_samples import BadSampleCounter
from unclip_pl.data.decoding import decode
from unclip_pl.data.import_embeddings import import_embeddings
from unclip_pl.data.shards import raw_samples
from unclip_pl.utils.errors import UserError

COUNTS = [9, 4, 30]


class WideCLIP(FakeCLIP):
    """FakeCLIP with 24 numbers per embedding: few enough to be quick, and too many for two pictures
    of noise to agree by chance."""

    embed_dim = 24

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        generator = torch.Generator().manual_seed(100 + seed)
        self.matrix = torch.randn(3 * 64, 24, generator=generator)
        self.letters = torch.randn(128, 24, generator=generator)

    def embed_text(self, tokens):
        return super().embed_text(tokens)._replace(embed=self.letters[tokens].sum(1))

    def fingerprint(self):
        return super().fingerprint() | {"embed_dim": 24}


def noise(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), np.uint8)).save(
        file, "PNG"
    )
    return file.getvalue()


def caption(number: int) -> str:
    return "".join(random.Random(number).choices("abcdefghijklmnopqrstuvwxyz", k=12))


def npy(array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def embedded(shards, clip) -> dict[str, list[np.ndarray]]:
    """Image and text row of each key, computed one by one."""
    rows = {}
    for sample in (
        sample for shard in shards for sample in raw_samples(shard, BadSampleCounter(0))
    ):
        image = clip.embed_images(decode(sample["image"], clip.image_size)[None])[0]
        rows[sample["key"]] = [
            image.half().numpy(),
            clip.embed_text(clip.tokenize([sample["caption"]])).embed[0].half().numpy(),
        ]
    return rows


def write_retrieval(folder, rows, parts: int = 2, text: bool = False, column: str = "image_path"):
    """Write a folder as clip-retrieval does.

    Its parts follow no shard's border, and their rows are in an order of their own.
    """
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    keys = sorted(rows, key=lambda key: hash((int(key) * 7919) % 101))
    for kind in ["img_emb", "metadata", *(["text_emb"] if text else [])]:
        (folder / kind).mkdir(parents=True)
    for n in range(parts):
        mine = keys[n::parts]
        for slot, kind in enumerate(["img_emb", "text_emb"][: 1 + text]):
            np.save(folder / kind / f"{kind}_{n}.npy", np.stack([rows[key][slot] for key in mine]))
        parquet.write_table(
            pyarrow.table({column: mine, "caption": ["x"] * len(mine)}),
            folder / "metadata" / f"metadata_{n}.parquet",
        )
    return folder


def into(tmp_path, shards, source, clip=None, **kwargs):
    return import_embeddings(
        tmp_path / "store",
        shards,
        source,
        clip or WideCLIP(),
        batch_size=5,
        progress=False,
        **kwargs,
    )


def refused(tmp_path, shards, source, match, clip=None, **kwargs):
    """One sentence, and neither rows nor a claim are left."""
    with pytest.raises(UserError, match=match) as caught:
        into(tmp_path, shards, source() if callable(source) else source, clip, **kwargs)
    assert "\n" not in str(caught.value)
    assert not [path.name for path in (tmp_path / "store").glob("*") if path.suffix != ".lock"]


def in_tars(
    tmp_path, shards, rows, image="img_emb.npy", text="text_emb.npy", change=lambda files: None
):
    """The shards again, with the rows as members."""
    for shard in shards:
        files = {}
        for sample in raw_samples(shard, BadSampleCounter(0)):
            key = sample["key"]
            files |= {
                f"{key}.png": sample["image"],
                f"{key}.txt": sample["caption"].encode(),
                f"{key}.{image}": npy(rows[key][0]),
            }
            if text:
                files[f"{key}.{text}"] = npy(rows[key][1])
        change(files)
        write_tar(
            tmp_path / shard, {name: data for name, data in files.items() if data is not None}
        )
    return shards


def unit(row):
    return (np.float32(row) / np.linalg.norm(np.float32(row))).astype(np.float16)


def write_import_shards(folder):
    """The shards whose rows are imported, with COUNTS samples and keys that count through all."""
    numbers = iter(range(sum(COUNTS)))
    shards = []
    for index, count in enumerate(COUNTS):
        files = {}
        for n in (next(numbers) for _ in range(count)):
            files |= {
                f"{n:06d}.png": noise(n),
                f"{n:06d}.txt": caption(n).encode(),
                f"{n:06d}.json": b"{}",
            }
        shards.append(write_tar(folder / f"{index:05d}.tar", files))
    return shards
