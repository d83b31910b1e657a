"""`unclip vary | export | data ...`: what is done with trained stages and with data. Parses, calls, prints; torch is imported when it is needed."""

import argparse
import sys
from pathlib import Path

from unclip_pl import __version__
from unclip_pl.errors import UserError


def parser() -> argparse.ArgumentParser:
    """The whole command line of `unclip`."""
    root = argparse.ArgumentParser(prog="unclip", description="Draw with unCLIP and look after its data. Training: see `lightning --help`.")
    root.add_argument("--version", action="version", version=f"unclip_pl {__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: object, text: str, group: argparse._SubParsersAction = commands) -> argparse.ArgumentParser:
        added = group.add_parser(name, help=text, description=text, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        added.set_defaults(run=run)
        return added

    vary = command("vary", run_vary, "Draw variations of pictures: encode each with CLIP and decode its embedding.")
    vary.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="picture files of any size (centre-cropped to a square)")
    vary.add_argument("--num-images", type=int, default=4, help="variations of each picture")
    vary.add_argument("--caption", help="a caption to draw with; without it the embedding alone decides")
    vary.add_argument("--decoder", type=Path, help="a checkpoint or release; by default the one in the package")
    vary.add_argument("--sampler", choices=["ddpm", "ddim", "dpm_solver_pp"], help="by default the decoder's own")
    vary.add_argument("--steps", type=int, help="sampling steps; by default the decoder's own")
    vary.add_argument("--guidance-scale", type=float, help="1: no guidance; by default the decoder's own")
    vary.add_argument("--eta", type=float, help="noise of DDIM, 0 to 1")
    vary.add_argument("--seed", type=int, default=0, help="variation k uses seed + k")
    vary.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...")
    vary.add_argument("--out", type=Path, default=Path("out"), help="folder for the PNG files")

    export = command("export", run_export, "Make a release (or, of a CLIP stage, an open_clip folder) from a checkpoint: EMA weights, no code in it.")
    export.add_argument("checkpoint", type=Path)
    export.add_argument("--out", type=Path, required=True, help="the new folder")
    export.add_argument("--card", type=Path, help="a Markdown file that becomes the release's README.md")

    data = commands.add_parser("data", help="Draw, check and inspect data.").add_subparsers(dest="data_command", required=True, metavar="COMMAND")
    openmoji = command("openmoji", run_openmoji, "Draw the OpenMoji data set as tar shards (CC BY-SA 4.0, openmoji.org).", data)
    openmoji.add_argument("--image-size", type=int, default=64, help="pixels a side")
    openmoji.add_argument("--cache", type=Path, help="folder; by default $UNCLIP_CACHE or ~/.cache/unclip_pl")
    verify = command("verify", run_verify, "Read an embedding store back and name every missing, doubled, non-finite or stale row.", data)
    verify.add_argument("store", type=Path, help="the store's folder")
    verify.add_argument("--shards", nargs="+", help="the tar shards it was made from; by default those its manifest names")
    take = command("import", run_import, "Take raw CLIP embeddings over into a store: of clip-retrieval's folder, or .npy members of the tars.", data)
    take.add_argument("source", nargs="?", type=Path, help="clip-retrieval's output folder; without it the embeddings are members of the tars")
    take.add_argument("--store", type=Path, required=True, help="the store's folder; goes on where it stopped")
    take.add_argument("--shards", nargs="+", required=True, help="the tar shards, spelled as data.train and data.val will spell them")
    take.add_argument("--key-column", help="the metadata's column of keys, with a source (default: image_path)")
    take.add_argument("--image-key", help="ending of the image embeddings' members, without a source (default: img_emb.npy)")
    take.add_argument("--text-key", help="ending of the text embeddings' members, without a source; by default they are computed")
    take.add_argument("--clip-model", default="openmoji", help="as data.clip.model: openmoji, a name of open_clip, or local-dir:/folder")
    take.add_argument("--clip-pretrained", help="as data.clip.pretrained: a tag or a weights file, with a name of open_clip")
    take.add_argument("--clip-precision", default="fp32", help="as data.clip.precision")
    take.add_argument("--embed-missing", action="store_true", help="embed the samples that have no row, which is an error otherwise")
    take.add_argument("--max-bad-rate", type=float, default=0.01, help="largest share of samples that cannot be used")
    take.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...")
    return root


def run_vary(arguments: argparse.Namespace) -> None:
    from dataclasses import replace

    from tqdm import tqdm

    from unclip_pl.images import grid, load_image, save_png
    from unclip_pl.pipeline import DEFAULT_DECODER, UnCLIP

    if arguments.num_images < 1:
        raise UserError(f"--num-images is {arguments.num_images}: give 1 or more.")
    originals = [load_image(path) for path in arguments.images]
    unclip = UnCLIP.load(arguments.decoder or DEFAULT_DECODER, device=pick_device(arguments.device))
    given = {key: getattr(arguments, key) for key in ("sampler", "steps", "guidance_scale", "eta") if getattr(arguments, key) is not None}
    sampling = replace(unclip.decoder.sampling, **given)
    seeds = [arguments.seed + k for k in range(arguments.num_images)]
    size = unclip.decoder.net_config.image_size
    rows, labels = [], []
    for path, original in zip(arguments.images, originals):
        embed = unclip.embed_images(original[None]).expand(len(seeds), -1)
        captions = [arguments.caption] * len(seeds) if arguments.caption else None
        with tqdm(desc=path.name, unit="step", file=sys.stderr) as bar:
            drawn = unclip.decode(embed, seeds, captions, sampling, callback=lambda step, steps, bar=bar: (setattr(bar, "total", steps), bar.update(1)))
        settings = {"unclip": f"vary, {sampling}, caption {arguments.caption!r}, decoder {arguments.decoder or 'of the package'}"}
        for seed, image in zip(seeds, drawn):
            print(save_png(image, arguments.out / f"{path.stem}-{seed}.png", source=path.name, seed=str(seed), **settings))
        rows += [load_image(path, size)[None], drawn.cpu()]
        labels += [path.stem, "variations"]
    print(save_png(grid(rows, labels), arguments.out / "variations.png"))


def run_export(arguments: argparse.Namespace) -> None:
    from unclip_pl import pipeline, release
    from unclip_pl.clip import save_clip
    from unclip_pl.stages.clip import CLIP

    weights = pipeline.read_weights(arguments.checkpoint)
    card = arguments.card.read_text(encoding="utf-8") if arguments.card else f"# {weights.stage}, {weights.steps} steps\n\nMade by `unclip export`.\n"
    if weights.stage == "CLIP":
        stage = pipeline.load_stage(arguments.checkpoint, CLIP)
        save_clip(stage.net, arguments.out, stage.model_config, stage.preprocess_config)
        (arguments.out / "README.md").write_text(card, encoding="utf-8")
    else:
        release.write(arguments.out, weights, card)
    size = sum(file.stat().st_size for file in arguments.out.iterdir()) / 1e6
    print(f"{arguments.out}: {weights.stage} after {weights.steps} steps, {size:.1f} MB")


def run_openmoji(arguments: argparse.Namespace) -> None:
    from unclip_pl.data.openmoji import openmoji_shards

    print(openmoji_shards(arguments.image_size, arguments.cache))


def run_verify(arguments: argparse.Namespace) -> None:
    from unclip_pl.data.embeddings import verify
    from unclip_pl.data.shards import expand

    problems = verify(arguments.store, expand(arguments.shards) if arguments.shards else None)
    for problem in problems:
        print(problem)
    if problems:
        raise UserError(f"{len(problems)} problems in {arguments.store}: delete the files named, then fill the store again; whole shards are kept.")
    print(f"{arguments.store} is whole.")


def run_import(arguments: argparse.Namespace) -> None:
    from unclip_pl.clip import CLIPConfig, FrozenCLIP
    from unclip_pl.data.import_embeddings import RetrievalFolder, TarMembers, import_embeddings
    from unclip_pl.data.shards import ErrorBudget, expand

    if arguments.source and (arguments.image_key or arguments.text_key):
        raise UserError(f"--image-key and --text-key name members of the tars, and {arguments.source} is given as the source: leave one of them away.")
    if arguments.key_column and not arguments.source:
        raise UserError("--key-column names a column of a source's metadata, and no source is given: give clip-retrieval's output folder.")
    shards = expand(arguments.shards)
    clip = FrozenCLIP(CLIPConfig(arguments.clip_model, arguments.clip_pretrained, arguments.clip_precision), pick_device(arguments.device))
    if arguments.source:
        source = RetrievalFolder(arguments.source, arguments.key_column or "image_path")
    else:
        source = TarMembers(arguments.image_key or "img_emb.npy", arguments.text_key)
    budget = ErrorBudget(arguments.max_bad_rate, "--max-bad-rate")
    store = import_embeddings(arguments.store, shards, source, clip, budget=budget, embed_missing=arguments.embed_missing)
    print(f"{arguments.store} has {sum(store.rows(shards))} rows for the shards given.")


def pick_device(name: str) -> str:
    """"auto" is a GPU where there is one, else the CPU."""
    import torch

    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"


def main(arguments: list[str] | None = None) -> int:
    """Entry point of `unclip`; returns the exit code."""
    parsed = parser().parse_args(arguments)
    try:
        parsed.run(parsed)
    except UserError as error:
        print(f"unclip: {error}", file=sys.stderr)
        return 1
    return 0
