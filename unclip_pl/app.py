"""`unclip generate | vary | export | data ...`: what is done with trained stages and with data. Parses, calls, prints; torch is imported when it is needed."""

import argparse
import sys
from pathlib import Path
from typing import Any

from unclip_pl import __version__
from unclip_pl.errors import UserError


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Names defaults, except those that are None: their help says what happens."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default is None or action.default == [] else super()._get_help_string(action)


def parser() -> argparse.ArgumentParser:
    """The whole command line of `unclip`."""
    root = argparse.ArgumentParser(prog="unclip", description="Draw with unCLIP and look after its data. Training: see `lightning --help`.")
    root.add_argument("--version", action="version", version=f"unclip_pl {__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, run: object, text: str, group: argparse._SubParsersAction = commands) -> argparse.ArgumentParser:
        added = group.add_parser(name, help=text, description=text, formatter_class=Help)
        added.set_defaults(run=run)
        return added

    generate = command("generate", run_generate, "Draw pictures from captions: a prior makes a CLIP image embedding of each, the decoder draws it.")
    generate.add_argument("prompts", nargs="*", metavar="PROMPT", help="captions")
    generate.add_argument("--file", type=Path, help="a UTF-8 text file with one more prompt a line")
    generate.add_argument("--condition", choices=["prior", "text", "caption"], default="prior",
                          help="what the decoder has for an image embedding: the prior's, CLIP's text embedding in its place, or none")
    generate.add_argument("--prior", help='"diffusion" (the default) or "ar", those in the package; or a checkpoint or release')
    generate.add_argument("--prior-guidance-scale", type=float, help="1: no guidance; by default the prior's own")
    generate.add_argument("--prior-steps", type=int, help="sampling steps of a diffusion prior; by default its own")
    generate.add_argument("--prior-sampler", choices=["analytic", "ddpm", "ddim", "dpm_solver_pp"], help="of a diffusion prior; by default its own")
    generate.add_argument("--prior-temperature", type=float, help="of an autoregressive prior: divides its logits; by default its own")
    generate.add_argument("--prior-top-p", type=float, help="of an autoregressive prior: share of the likeliest codes drawn from; by default its own")
    drawing(generate, "pictures of each prompt")
    generate.add_argument("--batch-size", type=int, default=16, help="pictures drawn at a time")
    generate.add_argument("--grid", action="store_true", help="also write grid.png, a row for each prompt")

    vary = command("vary", run_vary, "Draw variations of pictures: encode each with CLIP and decode its embedding.")
    vary.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="picture files of any size (centre-cropped to a square)")
    vary.add_argument("--caption", help="a caption to draw with; without it the embedding alone decides")
    drawing(vary, "variations of each picture")

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


def seed(text: str) -> int:
    """A seed that torch's generators take, with room for some more after it."""
    value = int(text)
    if not 0 <= value < 1 << 62:
        raise argparse.ArgumentTypeError(f"{value} is no seed: give an integer from 0 to 2^62 - 1")
    return value


def drawing(command: argparse.ArgumentParser, what: str) -> None:
    """The options of every command that draws with a decoder."""
    command.add_argument("--num-images", type=int, default=4, help=what)
    command.add_argument("--decoder", type=Path, help="a checkpoint or release; by default the one in the package")
    command.add_argument("--sampler", choices=["ddpm", "ddim", "dpm_solver_pp"], help="by default the decoder's own")
    command.add_argument("--steps", type=int, help="sampling steps; by default the decoder's own")
    command.add_argument("--guidance-scale", type=float, help="1: no guidance; by default the decoder's own")
    command.add_argument("--eta", type=float, help="noise of DDIM, 0 to 1")
    command.add_argument("--seed", type=seed, default=0, help="picture k of each uses seed + k")
    command.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ...")
    command.add_argument("--out", type=Path, default=Path("out"), help="folder for the PNG files")


def chosen(arguments: argparse.Namespace, stage: Any, prefix: str = "") -> Any:
    """A stage's sampling settings with what the options say otherwise; one sentence where a value is impossible or not this stage's."""
    from dataclasses import replace

    own = stage.sampling
    options = {name: getattr(arguments, prefix + name, None) for name in ("sampler", "steps", "guidance_scale", "eta", "temperature", "top_p")}
    given = {name: value for name, value in options.items() if value is not None}
    unknown = [f"--{(prefix + name).replace('_', '-')}" for name in given if not hasattr(own, name)]
    if unknown:
        raise UserError(f"{unknown[0]} is no setting of this stage: leave it out.")
    if "steps" in given and not 1 <= given["steps"] <= (timesteps := stage.process.config.timesteps):
        raise UserError(f"--{prefix.replace('_', '-')}steps is {given['steps']}: give 1 to {timesteps}, the timesteps that the stage was trained with.")
    if given.get("eta") and given.get("sampler", own.sampler) != "ddim":
        raise UserError(f"--eta is for the sampler ddim, and the decoder's is {given.get('sampler', own.sampler)}: add --sampler ddim, or leave --eta out.")
    if not 1 <= given.get("guidance_scale", 1) < float("inf"):
        raise UserError(f"--{prefix.replace('_', '-')}guidance-scale is {given['guidance_scale']}: give 1 (no guidance) or more.")
    try:
        return replace(own, **given)
    except ValueError as error:
        raise UserError(str(error)) from None


def prompts_of(arguments: argparse.Namespace) -> list[str]:
    """The prompts as arguments and of the file, without empty lines; one sentence where there is none, or an empty one."""
    prompts = list(arguments.prompts)
    if any(not prompt.strip() for prompt in prompts):
        raise UserError("A prompt is empty: write what the picture should show.")
    if arguments.file:
        try:
            prompts += [line.strip() for line in arguments.file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except OSError as error:
            raise UserError(f"The file of prompts {arguments.file} cannot be read ({error.strerror}): check --file.") from None
        except UnicodeDecodeError as error:
            raise UserError(f"The file of prompts {arguments.file} is not UTF-8 (byte {error.start}): save it as UTF-8.") from None
    if not prompts:
        raise UserError("There is no prompt: write one, or name a file with one a line (--file).")
    return list(dict.fromkeys(prompts))  # each once


def run_generate(arguments: argparse.Namespace) -> None:
    import re

    import torch
    from tqdm import tqdm

    from unclip_pl.images import grid, save_png
    from unclip_pl.pipeline import DEFAULT_DECODER, UnCLIP

    prompts = prompts_of(arguments)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in ("num_images", "batch_size"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(arguments, name)}: give 1 or more.")
    of_prior = ("prior", "prior_guidance_scale", "prior_steps", "prior_sampler", "prior_temperature", "prior_top_p")
    priors = [name for name in of_prior if getattr(arguments, name) is not None]
    if priors and arguments.condition != "prior":
        raise UserError(f"--{priors[0].replace('_', '-')} is given, and --condition {arguments.condition} uses no prior: leave one of them out.")
    prior = (arguments.prior or "diffusion") if arguments.condition == "prior" else None
    unclip = UnCLIP.load(arguments.decoder or DEFAULT_DECODER, prior, device=pick_device(arguments.device))
    sampling = chosen(arguments, unclip.decoder)
    prior_sampling = chosen(arguments, unclip.prior, "prior_") if unclip.prior else None
    for prompt in prompts:
        if cut := unclip.clip.cut(prompt):
            print(f'unclip: "{prompt[:40]}..." is longer than CLIP reads ({unclip.clip.context_length} tokens), cut: "{cut}"', file=sys.stderr)
    todo = [(prompt, arguments.seed + k) for prompt in prompts for k in range(arguments.num_images)]
    settings = f"generate, condition {arguments.condition}, prior {prior} {prior_sampling}, decoder {arguments.decoder or 'of the package'} {sampling}"
    names: dict[str, str] = {}
    for prompt in prompts:
        name = re.sub(r"\W+", "-", prompt).strip("-")[:60] or "picture"
        names[prompt] = name if name not in names.values() else f"{name}-{len(names) + 1}"
    drawn: list[torch.Tensor] = []
    with tqdm(total=len(todo), unit="picture", file=sys.stderr) as bar:
        for first in range(0, len(todo), arguments.batch_size):
            captions, seeds = zip(*todo[first : first + arguments.batch_size], strict=True)
            images = unclip.generate(
                captions, seeds, arguments.condition, prior_sampling=prior_sampling, sampling=sampling,
                callback=lambda stage, step, steps: bar.set_postfix_str(f"{stage} step {step}/{steps}"),
            )
            for prompt, seed, image in zip(captions, seeds, images.cpu(), strict=True):
                path = save_png(image, arguments.out / f"{names[prompt]}-{seed}.png", prompt=prompt, seed=str(seed), unclip=settings)
                bar.write(str(path), file=sys.stdout)
                drawn.append(image)
            bar.update(len(images))
    if arguments.grid:
        rows = list(torch.stack(drawn).split(arguments.num_images))
        print(save_png(grid(rows, prompts), arguments.out / "grid.png", prompt="; ".join(prompts), seed=str(arguments.seed), unclip=settings))


def run_vary(arguments: argparse.Namespace) -> None:
    from tqdm import tqdm

    from unclip_pl.images import grid, load_image, save_png
    from unclip_pl.pipeline import DEFAULT_DECODER, UnCLIP

    if arguments.num_images < 1:
        raise UserError(f"--num-images is {arguments.num_images}: give 1 or more.")
    originals = [load_image(path) for path in arguments.images]
    arguments.out.mkdir(parents=True, exist_ok=True)
    unclip = UnCLIP.load(arguments.decoder or DEFAULT_DECODER, device=pick_device(arguments.device))
    sampling = chosen(arguments, unclip.decoder)
    seeds = [arguments.seed + k for k in range(arguments.num_images)]
    size = unclip.decoder.net_config.image_size
    rows, labels = [], []
    for path, original in zip(arguments.images, originals):
        embed = unclip.embed_images(original[None]).expand(len(seeds), -1)
        captions = [arguments.caption] * len(seeds) if arguments.caption else None
        with tqdm(desc=path.name, total=sampling.steps, unit="step", file=sys.stderr) as bar:
            drawn = unclip.decode(embed, seeds, captions, sampling, callback=lambda *_, bar=bar: bar.update(1))  # type: ignore[misc]
        settings = {"unclip": f"vary, {sampling}, caption {arguments.caption!r}, decoder {arguments.decoder or 'of the package'}"}
        for seed, image in zip(seeds, drawn):
            print(save_png(image, arguments.out / f"{path.stem}-{seed}.png", source=path.name, seed=str(seed), **settings))
        rows += [load_image(path, size)[None], drawn.cpu()]
        labels += [path.stem, "variations"]
    print(save_png(grid(rows, labels), arguments.out / "variations.png"))


def run_export(arguments: argparse.Namespace) -> None:
    from unclip_pl import pipeline, release
    from unclip_pl.clip import save_clip
    from unclip_pl.stages.ar_prior import ARPrior
    from unclip_pl.stages.clip import CLIP
    from unclip_pl.stages.decoder import Decoder
    from unclip_pl.stages.diffusion_prior import DiffusionPrior

    weights = pipeline.read_weights(arguments.checkpoint)
    card = arguments.card.read_text(encoding="utf-8") if arguments.card else f"# {weights.stage}, {weights.steps} steps\n\nMade by `unclip export`.\n"
    if weights.stage == "CLIP":
        clip = pipeline.load_stage(arguments.checkpoint, CLIP)
        save_clip(clip.net, arguments.out, clip.model_config, clip.preprocess_config)
        (arguments.out / "README.md").write_text(card, encoding="utf-8")
    else:
        kinds = {kind.__name__: kind for kind in (Decoder, DiffusionPrior, ARPrior)}
        stage = pipeline.load_stage(arguments.checkpoint, kinds[weights.stage])
        release.write(arguments.out, weights, card, exact=[name for name, _ in stage.named_buffers()])
    size = sum(file.stat().st_size for file in arguments.out.iterdir()) / 1e6
    print(f"{arguments.out}: {weights.stage} after {weights.steps} steps, {size:.1f} MB")


def run_openmoji(arguments: argparse.Namespace) -> None:
    from unclip_pl.data.openmoji import openmoji_shards

    print(openmoji_shards(arguments.image_size, arguments.cache))


def run_verify(arguments: argparse.Namespace) -> None:
    from unclip_pl.data.shards import expand
    from unclip_pl.data.verify import verify

    notes: list[str] = []
    problems = verify(arguments.store, expand(arguments.shards) if arguments.shards else None, notes=notes)
    for line in [*(f"note: {note}" for note in notes), *problems]:
        print(line)
    if problems:
        raise UserError(
            f"{len(problems)} problems in {arguments.store}: delete the .safetensors files that lines begin with, never a .tar, "
            "then fill the store again; whole shards are kept."
        )
    print(f"{arguments.store} is whole{', but for images that cannot be used' if notes else ''}.")


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
    source: RetrievalFolder | TarMembers
    if arguments.source:
        source = RetrievalFolder(arguments.source, arguments.key_column or "image_path")
    else:
        source = TarMembers(arguments.image_key or "img_emb.npy", arguments.text_key)
    budget = ErrorBudget(arguments.max_bad_rate, "--max-bad-rate")
    store = import_embeddings(arguments.store, shards, source, clip, budget=budget, embed_missing=arguments.embed_missing)
    print(f"{arguments.store} has {sum(store.rows(shards))} rows for the shards given.")


def pick_device(name: str) -> str:
    """"auto" is a GPU where there is one, else the CPU; one sentence where the device that is named is not there."""
    import torch

    if name != "auto":
        try:
            torch.empty(1, device=name)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f"There is no device {name} here ({str(error).splitlines()[0]}): choose another with --device.") from None
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
    except OSError as error:
        print(f"unclip: {error.filename or 'A file'} cannot be used ({error.strerror or error}): check the path and the rights to it.", file=sys.stderr)
        return 1
    return 0
