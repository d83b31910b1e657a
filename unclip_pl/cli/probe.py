"""`unclip probe pca | typographic`: what CLIP's embedding of a picture holds (unCLIP section 4).

Both show it by what a decoder draws from the embedding.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from unclip_pl.cli.options import AddCommand, require_minimum
from unclip_pl.cli.pictures import enlarge_like, require_files
from unclip_pl.cli.session import Session, add_session_options
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.remote_copies import path_or_url


def add(command: AddCommand) -> None:
    pca = command(
        "pca", run_pca, "Draw pictures from the first principal components of their CLIP embedding."
    )
    pca.add_argument(
        "images",
        nargs="+",
        type=Path,
        metavar="IMAGE",
        help="pictures of any size (the centre square is taken)",
    )
    pca.add_argument(
        "--components",
        type=int,
        nargs="+",
        help="how many; by default the paper's 20 to 320 of 1024 scaled to the CLIP's dimensions, "
        "and all",
    )
    pca.add_argument(
        "--store",
        type=path_or_url,
        help="the embedding store whose components are taken; by default OpenMoji's, which is made "
        "if it is missing",
    )
    add_session_options(pca)

    typographic = command(
        "typographic",
        run_typographic,
        "Paste labels over a picture: what CLIP takes it for, next to what the decoder draws from "
        "its embedding.",
    )
    typographic.add_argument(
        "image",
        type=Path,
        metavar="IMAGE",
        help="a picture of any size (the centre square is taken)",
    )
    typographic.add_argument("--object", required=True, help="what the picture shows, as a caption")
    typographic.add_argument(
        "--label",
        nargs="+",
        required=True,
        help="what to paste: each on its own copy, and each a caption that CLIP may choose",
    )
    typographic.add_argument(
        "--num-images", type=int, default=4, help="variations of each copy; picture k uses seed + k"
    )
    add_session_options(typographic)


def run_pca(arguments: argparse.Namespace) -> None:
    import torch

    from unclip_pl.probe import paper_dimensions, principal_components

    require_files(arguments.images)
    session = Session(arguments)
    unclip, sampling = session.unclip, session.sampling()
    principal = principal_components(unclip.clip, arguments.store)
    counts = arguments.components or [*paper_dimensions(principal.dim), principal.dim]
    seeds = [arguments.seed] * len(counts)  # one noise, so that only the components differ
    settings = f"probe pca, {sampling}"
    rows = []
    for path in arguments.images:
        original, z = session.embed(path)
        embeds = torch.cat([principal.reconstruct(z, k) for k in counts])
        with session.progress(path.name) as callback:
            drawn = unclip.decode(embeds, seeds, None, sampling, callback)
        similarities = unclip.clip.similarity(unclip.embed_images(drawn), z)[:, 0].tolist()
        drawn = session.upsample_to_size(drawn, seeds)
        for k, image, similarity in zip(counts, drawn, similarities, strict=True):
            metadata = {"source": path.name, "seed": str(arguments.seed), "unclip": settings}
            session.save(image, f"{path.stem}-pca{k}", **metadata)
            print(
                f"{path.name}: {k} components ({principal.explained_variance(k):.1%} of the "
                f"variance): CLIP similarity of what is drawn {similarity:.3f}"
            )
        rows.append(torch.cat([drawn, enlarge_like(original, drawn)]))
    labels = [path.stem for path in arguments.images]
    session.save_figure("pca", rows, labels, [*map(str, counts), "original"])


def run_typographic(arguments: argparse.Namespace) -> None:
    import torch
    from torch.nn.functional import interpolate

    from unclip_pl.probe import paste_label, zero_shot

    require_minimum(arguments, num_images=1)
    captions = [arguments.object, *arguments.label]
    check_distinct(captions)
    require_files([arguments.image])
    session = Session(arguments)
    unclip, sampling = session.unclip, session.sampling()
    _, image = session.load_picture(arguments.image)
    pasted = [paste_label(image[0], text) for text in arguments.label]
    copies = [image[0], *pasted]
    names = ["no label", *arguments.label]
    seeds = [arguments.seed + k for k in range(arguments.num_images)]
    rows, labels = [], []
    for copy, name in zip(copies, names, strict=True):
        z = unclip.embed_images(copy[None])
        with session.progress(name) as callback:
            drawn = unclip.decode(z.expand(len(seeds), -1), seeds, None, sampling, callback)
        seen = percentages(captions, zero_shot(unclip, z, captions)[0].tolist())
        variations = zero_shot(unclip, unclip.embed_images(drawn), captions).mean(0).tolist()
        drawn = session.upsample_to_size(drawn, seeds)
        settings = f"probe typographic, label {name}, {sampling}"
        for seed, variation in zip(seeds, drawn):
            metadata = {"source": arguments.image.name, "unclip": settings}
            session.save(variation, f"{arguments.image.stem}-{name}-{seed}", **metadata)
        print(
            f"{name}: CLIP says {', '.join(seen)}; of the variations "
            + ", ".join(percentages(captions, variations))
        )
        size = drawn.shape[-2:]
        shown = interpolate(copy[None], size, mode="bicubic", antialias=True, align_corners=False)
        rows.append(torch.cat([shown.clamp(-1, 1), drawn]))
        labels.append("\n".join(seen))
    heads = ["seen", *(f"seed {seed}" for seed in seeds)]
    session.save_figure("typographic", rows, labels, heads)


def percentages(captions: Sequence[str], shares: Sequence[float]) -> list[str]:
    """ "red apple 97.3%" for each caption."""
    return [f"{caption} {share:.1%}" for caption, share in zip(captions, shares, strict=True)]


def check_distinct(captions: Sequence[str]) -> None:
    """Raise a UserError if a caption comes twice, up to case and spaces."""
    seen = set()
    for caption in captions:
        if (key := caption.strip().lower()) in seen:
            raise UserError(
                f'"{caption}" is named twice among --object and --label, and CLIP is to choose '
                "between them: name each once."
            )
        seen.add(key)
