"""OpenMoji as webdataset shards, drawn at the first use.

KEY is the hexcode of the code points (1F468-1F3FB-200D-1F692). KEY.png is RGB on white, KEY.txt the
caption, KEY.json the parts it is made of.
"""

import io
import json
import os
import shutil
import sys
import tarfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path

from unclip_pl.data.openmoji_drawings import (
    Drawing,
    composition_split,
    draw,
    list_drawings,
    package_folder,
    package_version,
)
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import atomic_folder, cache_dir, file_lock

RULE = "composition-1"
"""Name of the selection, the captions and the split. With a new name, cached shards are drawn
again."""
SHARD_SIZE = 512  # drawings per shard
ATTRIBUTION = (
    "The drawings in these shards are from OpenMoji – the open-source emoji and icon project "
    "(https://openmoji.org),\n"
    "version {version}, licensed CC BY-SA 4.0 (https://creativecommons.org/licenses/by-sa/4.0/).\n"
    "Changes: drawn as PNG on white by resvg. Shared under the same licence, whose text follows."
    "\n\n"
)


def write_shards(
    folder: Path,
    train: Sequence[Drawing],
    val: Sequence[Drawing],
    size: int,
    progress: bool = True,
) -> dict:
    """Write train-*.tar, val-*.tar, LICENSE.txt and manifest.json, the same bytes every time.

    Args:
        folder: must exist.
        train: the drawings for training.
        val: the drawings for validation.
        size: side of the pictures in pixels.
        progress: show a progress bar.

    Returns:
        The manifest.
    """
    from tqdm import tqdm

    version, shards = package_version(), {}
    total, title = len(train) + len(val), f"OpenMoji at {size} px"
    with ExitStack() as stack:
        bar = tqdm(total=total, desc=title, unit="drawing", disable=not progress)
        stack.enter_context(bar)
        pool = stack.enter_context(_pool()) if _worth_a_pool(total) else None
        png_of = partial(_png, size=size)
        for split, drawings in (("train", train), ("val", val)):
            for number, start in enumerate(range(0, len(drawings), SHARD_SIZE)):
                batch = drawings[start : start + SHARD_SIZE]
                pictures = pool.map(png_of, batch, chunksize=16) if pool else map(png_of, batch)
                path = folder / f"{split}-{number:05d}.tar"
                with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
                    for drawing, png in zip(batch, pictures, strict=True):
                        for ending, data in _sample(drawing, png, split):
                            _add(tar, f"{drawing.hexcode}.{ending}", data)
                        bar.update()
                shards[path.name] = {"count": len(batch), "bytes": path.stat().st_size}
    licence = (package_folder() / "LICENSE").read_text(encoding="utf-8")
    text = ATTRIBUTION.format(version=version) + licence
    (folder / "LICENSE.txt").write_text(text, encoding="utf-8")
    manifest = {
        "name": "openmoji",
        "version": version,
        "names": f"emoji {metadata.version('emoji')}",
        "image_size": size,
        "rule": RULE,
        "counts": {"train": len(train), "val": len(val)},
        "license": "CC BY-SA 4.0",
        "shards": shards,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def openmoji_shards(
    image_size: int,
    cache: str | os.PathLike | None = None,
    progress: bool = True,
) -> Path:
    """The folder `<cache>/openmoji-<version>-<image_size>` with the shards.

    They are drawn at the first call (about ten seconds at 64 pixels).

    Args:
        image_size: side of the pictures in pixels, 8 to 4096.
        cache: None: `cache_dir()`.
        progress: show a progress bar.

    Raises:
        UserError: the size is out of range, or a package is missing.
    """
    if not 8 <= image_size <= 4096:
        raise UserError(
            f"OpenMoji cannot be drawn at image_size={image_size}: choose 8 to 4096 pixels."
        )
    cache = Path(cache).expanduser() if cache else cache_dir()
    folder = cache / f"openmoji-{package_version()}-{image_size}"
    if _is_whole(folder):
        return folder
    with file_lock(cache / f".{folder.name}.lock"):
        if not _is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
            train, val = composition_split(list_drawings())
            with atomic_folder(folder) as temporary:
                write_shards(temporary, train, val, image_size, progress)
    return folder


def _is_whole(folder: Path) -> bool:
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if manifest["rule"] != RULE:
            return False
        shards = manifest["shards"].items()
        return all((folder / name).stat().st_size == shard["bytes"] for name, shard in shards)
    except (OSError, ValueError, KeyError):
        return False


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _worth_a_pool(count: int) -> bool:
    return count > 200 and _cores() > 1 and sys.platform == "linux"


def _pool() -> ProcessPoolExecutor:
    # Processes, because resvg holds the GIL. Forked, because a spawned one would run a caller's
    # unguarded script again. They touch neither torch nor CUDA.
    return ProcessPoolExecutor(min(_cores(), 16), mp_context=get_context("fork"))


def _png(drawing: Drawing, size: int) -> bytes:
    file = io.BytesIO()
    draw(drawing, size).save(file, "PNG")
    return file.getvalue()


def _sample(drawing: Drawing, png: bytes, split: str) -> Iterator[tuple[str, bytes]]:
    facts = {
        "key": drawing.hexcode,
        "caption": drawing.caption,
        "emoji": drawing.emoji,
        "base": drawing.base,
        "family": drawing.family,
        "tones": drawing.tones,
        "split": split,
        "license": "CC BY-SA 4.0",
    }
    yield "png", png
    yield "txt", drawing.caption.encode()
    yield "json", json.dumps(facts, ensure_ascii=False).encode()


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode, info.mtime = len(data), 0o644, 0
    tar.addfile(info, io.BytesIO(data))
