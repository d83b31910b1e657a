"""`unclip data openmoji | verify | import`: draw, check and import data."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from unclip_pl.utils.devices import pick_device
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.remote import is_remote

if TYPE_CHECKING:
    from unclip_pl.data.import_sources import RetrievalFolder, TarMembers


def require_store(store: str) -> None:
    """Raise a UserError where a folder is no embedding store, before one is read."""
    if not is_remote(store) and not (Path(store) / "manifest.json").is_file():
        raise UserError(
            f"{store} is no whole embedding store (manifest.json is missing): fill it with "
            "`lightning predict -c stages/embed.yaml`, or check the path."
        )


def openmoji(*, image_size: int = 64, cache: Path | None = None) -> None:
    """Draw the OpenMoji data set as tar shards (CC BY-SA 4.0, openmoji.org).

    Args:
        image_size: pixels per side
        cache: folder; by default $UNCLIP_CACHE or ~/.cache/unclip_pl
    """
    from unclip_pl.data.openmoji import openmoji_shards

    print(openmoji_shards(image_size, cache))


def verify(store: str, *, shards: Sequence[str] | None = None) -> None:
    """Read an embedding store back.

    Every missing, doubled, non-finite or stale row is named.

    Args:
        store: the store's folder, or its URL
        shards: the tar shards it was made from; by default those its manifest names
    """
    folder = Path(store)
    if not is_remote(store) and (
        folder.suffix == ".tar"
        or (not (folder / "manifest.json").exists() and any(folder.glob("*.tar*")))
    ):
        raise UserError(
            f"{store} is shards and no embedding store: name the store that "
            f"`lightning predict -c stages/embed.yaml` fills from them, with --shards "
            f"{store}."
        )
    require_store(store)
    from unclip_pl.data.names import expand
    from unclip_pl.data.verify import verify

    notes: list[str] = []
    problems = verify(store, expand(shards) if shards else None, notes=notes)
    for line in [*(f"note: {note}" for note in notes), *problems]:
        print(line)
    if problems:
        raise UserError(
            f"{len(problems)} problems in {store}: delete the .safetensors files that "
            "lines begin with, never a .tar, then fill the store again; whole shards are kept."
        )
    exception = ", but for images that cannot be used" if notes else ""
    print(f"{store} is whole{exception}.")


@dataclass(frozen=True)
class ImportCLIPOptions:
    """The CLIP that made the embeddings.

    Args:
        model: as data.clip.model: openmoji, a name of open_clip, or local-dir:/folder
        pretrained: as data.clip.pretrained: a tag or a weights file, with a name of open_clip
        precision: as data.clip.precision
    """

    PREFIX: ClassVar[str] = "clip_"
    model: str = "openmoji"
    pretrained: str | None = None
    precision: str = "fp32"


@dataclass(frozen=True)
class SourceOptions:
    """Where the embeddings are.

    Args:
        key_column: the metadata's column of keys, with a source (default: image_path)
        image_key: ending of the image embeddings' members, without a source (default:
            img_emb.npy)
        text_key: ending of the text embeddings' members, without a source; by default they are
            computed
    """

    key_column: str | None = None
    image_key: str | None = None
    text_key: str | None = None

    def open(self, folder: Path | None) -> "RetrievalFolder | TarMembers":
        """The source: clip-retrieval's folder, or the tars.

        Raises:
            UserError: an option is for the other kind of source.
        """
        from unclip_pl.data.import_sources import RetrievalFolder, TarMembers

        if folder and (self.image_key or self.text_key):
            raise UserError(
                "--image-key and --text-key name members of the tars, and "
                f"{folder} is given as the source: leave one of them out."
            )
        if self.key_column and not folder:
            raise UserError(
                "--key-column names a column of a source's metadata, and no source is given: give "
                "clip-retrieval's output folder."
            )
        if folder:
            return RetrievalFolder(folder, self.key_column or "image_path")
        return TarMembers(self.image_key or "img_emb.npy", self.text_key)


def import_(
    source: Path | None = None,
    *,
    store: str,
    shards: Sequence[str],
    keys: SourceOptions,
    clip: ImportCLIPOptions,
    embed_missing: bool = False,
    max_bad_rate: float = 0.01,
    device: str = "auto",
) -> None:
    """Import raw CLIP embeddings into a store.

    They are those of clip-retrieval's folder, or .npy members of the tars.

    Args:
        source: clip-retrieval's output folder; without it the embeddings are members of the tars
        store: the store's folder or its URL; goes on where it stopped
        shards: the tar shards, spelled as data.train and data.val will spell them
        embed_missing: embed the samples that have no row, which is an error otherwise
        max_bad_rate: largest share of samples that cannot be used
        device: cpu, cuda, cuda:1 ...
        keys: where the embeddings are
        clip: the CLIP that made the embeddings
    """
    from unclip_pl.data.names import expand

    if source is not None and not source.is_dir():
        raise UserError(f"There is no folder {source}: give clip-retrieval's output folder.")
    names = expand(shards)
    from unclip_pl.clip.config import CLIPConfig
    from unclip_pl.clip.frozen import FrozenCLIP
    from unclip_pl.data.bad_samples import BadSampleCounter
    from unclip_pl.data.import_embeddings import import_embeddings

    members = keys.open(source)
    config = CLIPConfig(clip.model, clip.pretrained, clip.precision)
    frozen = FrozenCLIP(config, pick_device(device))
    counter = BadSampleCounter(max_bad_rate, "--max-bad-rate")
    written = import_embeddings(
        store, names, members, frozen, counter=counter, embed_missing=embed_missing
    )
    print(f"{store} has {sum(written.row_counts(names))} rows for the shards given.")
