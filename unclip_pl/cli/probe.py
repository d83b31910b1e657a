"""`unclip probe pca | typographic`: what CLIP's embedding of a picture holds, seen by what a decoder draws from it (unCLIP section 4)."""

import argparse
from pathlib import Path
from typing import Any

from unclip_pl.cli.options import Command
from unclip_pl.cli.session import Studio, at_least, check_files, enlarged, options
from unclip_pl.utils.errors import UserError


def add(command: Command) -> None:
    """The commands, under `unclip probe`."""
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
        help="how many; by default the paper's 20 to 320 of 1024 scaled to the CLIP's dimensions, and all",
    )
    pca.add_argument(
        "--store",
        type=Path,
        help="embedding store to take the components of; by default that of OpenMoji, made if it is not there",
    )
    options(pca)

    attack = command(
        "typographic",
        run_typographic,
        "Paste labels over a picture: what CLIP takes it for, beside what the decoder draws from its embedding.",
    )
    attack.add_argument(
        "image",
        type=Path,
        metavar="IMAGE",
        help="a picture of any size (the centre square is taken)",
    )
    attack.add_argument("--object", required=True, help="what the picture shows, as a caption")
    attack.add_argument(
        "--label",
        nargs="+",
        required=True,
        help="what to paste: each on a copy of its own, and each a caption that CLIP may choose",
    )
    attack.add_argument(
        "--num-images", type=int, default=4, help="variations of each copy; picture k uses seed + k"
    )
    options(attack)


def components(studio: Studio, store: Path | None) -> Any:
    """The principal components of a store, which must be of the decoder's CLIP."""
    from unclip_pl.clip.fingerprint import require_same
    from unclip_pl.data.store import EmbeddingStore
    from unclip_pl.datamodules.image_embedding import ImageEmbeddingData
    from unclip_pl.probe import PrincipalComponents

    if store is None:
        data = ImageEmbeddingData(clip=studio.unclip.clip.config)
        data.prepare_data()
        return PrincipalComponents.of(data.store.statistics(data.train_shards))
    found = EmbeddingStore(store)
    require_same(found.manifest["clip"], studio.unclip.clip.fingerprint(), f"The store {store}")
    return PrincipalComponents.of(found.statistics())


def run_pca(arguments: argparse.Namespace) -> None:
    import torch

    from unclip_pl.probe import paper_dimensions

    check_files(arguments.images)
    studio = Studio(arguments)
    unclip, sampling = studio.unclip, studio.sampling()
    principal = components(studio, arguments.store)
    counts = arguments.components or [*paper_dimensions(principal.dim), principal.dim]
    rows, labels = [], []
    for path in arguments.images:
        original, z = studio.embed(path)
        embeds = torch.cat([principal.reconstruct(z, k) for k in counts])
        seeds = [arguments.seed] * len(
            counts
        )  # one noise for all: what differs comes from the components
        with studio.progress(path.name) as callback:
            drawn = unclip.decode(embeds, seeds, None, sampling, callback)
        near = unclip.clip.similarity(unclip.embed_images(drawn), z)[:, 0].tolist()
        drawn = studio.finish(drawn, seeds)
        studio.save(
            drawn,
            [f"{path.stem}-pca{k}" for k in counts],
            source=path.name,
            seed=str(arguments.seed),
            unclip=f"probe pca, {sampling}",
        )
        for k, similarity in zip(counts, near, strict=True):
            print(
                f"{path.name}: {k} components ({principal.share(k):.1%} of the variance): CLIP similarity of what is drawn {similarity:.3f}"
            )
        rows.append(torch.cat([drawn, enlarged(original, drawn)]))
        labels.append(path.stem)
    studio.figure("pca", rows, labels, [*map(str, counts), "original"])


def run_typographic(arguments: argparse.Namespace) -> None:
    import torch

    from unclip_pl.probe import labelled, zero_shot

    at_least(arguments, num_images=1)
    captions = [arguments.object, *arguments.label]
    if twice := [
        caption
        for k, caption in enumerate(captions)
        if caption.strip().lower() in [other.strip().lower() for other in captions[:k]]
    ]:
        raise UserError(
            f'"{twice[0]}" is named twice among --object and --label, and CLIP is to choose between them: name each once.'
        )
    check_files([arguments.image])
    studio = Studio(arguments)
    unclip, sampling = studio.unclip, studio.sampling()
    _, whole = studio.picture(arguments.image)
    copies = [whole[0], *(labelled(whole[0], text) for text in arguments.label)]
    seeds = [arguments.seed + k for k in range(arguments.num_images)]
    rows, labels = [], []
    for copy, name in zip(copies, ["no label", *arguments.label], strict=True):
        z = unclip.embed_images(copy[None])
        with studio.progress(name) as callback:
            drawn = unclip.decode(z.expand(len(seeds), -1), seeds, None, sampling, callback)
        of_picture = zero_shot(unclip, z, captions)[0].tolist()
        of_drawn = zero_shot(unclip, unclip.embed_images(drawn), captions).mean(0).tolist()
        drawn = studio.finish(drawn, seeds)
        text = f"probe typographic, label {name}, {sampling}"
        studio.save(
            drawn,
            [f"{arguments.image.stem}-{name}-{seed}" for seed in seeds],
            source=arguments.image.name,
            unclip=text,
        )
        lines = [
            f"{caption} {share:.1%}" for caption, share in zip(captions, of_picture, strict=True)
        ]
        print(
            f"{name}: CLIP says {', '.join(lines)}; of the variations "
            + ", ".join(f"{c} {s:.1%}" for c, s in zip(captions, of_drawn, strict=True))
        )
        shown = torch.nn.functional.interpolate(
            copy[None], drawn.shape[-2:], mode="bicubic", antialias=True, align_corners=False
        ).clamp(-1, 1)
        rows.append(torch.cat([shown, drawn]))
        labels.append("\n".join(lines))
    studio.figure("typographic", rows, labels, ["seen", *(f"seed {seed}" for seed in seeds)])
