"""`unclip data openmoji | verify | import`: draw, check and import data."""

import argparse
from pathlib import Path

from unclip_pl.cli.options import AddCommand
from unclip_pl.utils.devices import pick_device
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.remote_copies import path_or_url


def add(command: AddCommand) -> None:
    openmoji = command(
        "openmoji",
        run_openmoji,
        "Draw the OpenMoji data set as tar shards (CC BY-SA 4.0, openmoji.org).",
    )
    openmoji.add_argument("--image-size", type=int, default=64, help="pixels per side")
    openmoji.add_argument(
        "--line", action="store_true", help="their black lines only: the data set openmoji-line"
    )
    openmoji.add_argument(
        "--cache", type=Path, help="folder; by default $UNCLIP_CACHE or ~/.cache/unclip_pl"
    )
    verify = command(
        "verify",
        run_verify,
        "Read an embedding store back and name every missing, doubled, non-finite or stale row.",
    )
    verify.add_argument("store", type=path_or_url, help="the store's folder")
    verify.add_argument(
        "--shards",
        nargs="+",
        help="the tar shards it was made from; by default those its manifest names",
    )
    importing = command(
        "import",
        run_import,
        "Import raw CLIP embeddings into a store: from clip-retrieval's folder, or from .npy "
        "members of the tars.",
    )
    importing.add_argument(
        "source",
        nargs="?",
        type=Path,
        help="clip-retrieval's output folder; without it the embeddings are members of the tars",
    )
    importing.add_argument(
        "--store",
        type=path_or_url,
        required=True,
        help="the store's folder; goes on where it stopped",
    )
    importing.add_argument(
        "--shards",
        nargs="+",
        required=True,
        help="the tar shards, spelled as data.train and data.val will spell them",
    )
    importing.add_argument(
        "--key-column", help="the metadata's column of keys, with a source (default: image_path)"
    )
    importing.add_argument(
        "--image-key",
        help="ending of the image embeddings' members, without a source (default: img_emb.npy)",
    )
    importing.add_argument(
        "--text-key",
        help="ending of the text embeddings' members, without a source; by default they are "
        "computed",
    )
    importing.add_argument(
        "--clip-model",
        default="openmoji",
        help="as data.clip.model: openmoji, a name of open_clip, or local-dir:/folder",
    )
    importing.add_argument(
        "--clip-pretrained",
        help="as data.clip.pretrained: a tag or a weights file, with a name of open_clip",
    )
    importing.add_argument("--clip-precision", default="fp32", help="as data.clip.precision")
    importing.add_argument(
        "--embed-missing",
        action="store_true",
        help="embed the samples that have no row, which is an error otherwise",
    )
    importing.add_argument(
        "--max-bad-rate",
        type=float,
        default=0.01,
        help="largest share of samples that cannot be used",
    )
    importing.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...")


def run_openmoji(arguments: argparse.Namespace) -> None:
    from unclip_pl.data.openmoji import openmoji_shards

    name = "openmoji-line" if arguments.line else "openmoji"
    print(openmoji_shards(arguments.image_size, arguments.cache, name=name))


def run_verify(arguments: argparse.Namespace) -> None:
    from unclip_pl.data.names import expand
    from unclip_pl.data.verify import verify

    shards = expand(arguments.shards) if arguments.shards else None
    store = arguments.store
    if isinstance(store, Path) and (
        store.suffix == ".tar"
        or (not (store / "manifest.json").exists() and any(store.glob("*.tar*")))
    ):
        raise UserError(
            f"{arguments.store} is shards and no embedding store: name the store that "
            f"`lightning predict -c stages/embed.yaml` fills from them, with --shards "
            f"{arguments.store}."
        )
    notes: list[str] = []
    problems = verify(arguments.store, shards, notes=notes)
    for line in [*(f"note: {note}" for note in notes), *problems]:
        print(line)
    if problems:
        raise UserError(
            f"{len(problems)} problems in {arguments.store}: delete the .safetensors files that "
            "lines begin with, never a .tar, then fill the store again; whole shards are kept."
        )
    exception = ", but for images that cannot be used" if notes else ""
    print(f"{arguments.store} is whole{exception}.")


def run_import(arguments: argparse.Namespace) -> None:
    from unclip_pl.clip.config import CLIPConfig
    from unclip_pl.clip.frozen import FrozenCLIP
    from unclip_pl.data.bad_samples import BadSampleCounter
    from unclip_pl.data.import_embeddings import import_embeddings
    from unclip_pl.data.import_sources import RetrievalFolder, TarMembers
    from unclip_pl.data.names import expand

    if arguments.source and (arguments.image_key or arguments.text_key):
        raise UserError(
            "--image-key and --text-key name members of the tars, and "
            f"{arguments.source} is given as the source: leave one of them out."
        )
    if arguments.key_column and not arguments.source:
        raise UserError(
            "--key-column names a column of a source's metadata, and no source is given: give "
            "clip-retrieval's output folder."
        )
    shards = expand(arguments.shards)
    config = CLIPConfig(arguments.clip_model, arguments.clip_pretrained, arguments.clip_precision)
    clip = FrozenCLIP(config, pick_device(arguments.device))
    source: RetrievalFolder | TarMembers
    if arguments.source:
        source = RetrievalFolder(arguments.source, arguments.key_column or "image_path")
    else:
        source = TarMembers(arguments.image_key or "img_emb.npy", arguments.text_key)
    counter = BadSampleCounter(arguments.max_bad_rate, "--max-bad-rate")
    store = import_embeddings(
        arguments.store,
        shards,
        source,
        clip,
        counter=counter,
        embed_missing=arguments.embed_missing,
    )
    print(f"{arguments.store} has {sum(store.row_counts(shards))} rows for the shards given.")
