"""`unclip probe pca | typographic`: what CLIP's embedding of a picture holds (unCLIP section 4).

Both show it by what a decoder draws from the embedding.
"""

from collections.abc import Sequence
from pathlib import Path

from unclip_pl.cli.data import require_store
from unclip_pl.cli.generate import file_names
from unclip_pl.cli.pictures import enlarge_like, require_files
from unclip_pl.cli.progress import step_bar
from unclip_pl.cli.session import Session, SessionOptions
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.options import Count


def pca(
    images: Sequence[Path],
    *,
    components: Sequence[int] | None = None,
    store: str | None = None,
    options: SessionOptions,
) -> None:
    """Draw pictures from the first principal components of their CLIP embedding.

    Args:
        images: pictures of any size (the centre square is taken)
        components: how many; by default the paper's 20 to 320 of 1024 scaled to the CLIP's
            dimensions, and all
        store: the embedding store whose components are taken; by default OpenMoji's, which is made
            if it is missing
        options: what draws, from which seed and where to
    """
    for count in components or ():
        if count < 1:
            raise UserError(
                f"There are no {count} principal components: give --components 1 or more."
            )
    require_files(images)
    if store is not None:
        require_store(store)
    session = Session(options)
    import torch

    from unclip_pl.probe import paper_dimensions, principal_components

    unclip, sampling = session.unclip, session.sampling()
    principal = principal_components(unclip.clip, store)
    counts = components or [*paper_dimensions(principal.dim), principal.dim]
    seeds = [options.seed] * len(counts)  # one noise, so that only the components differ
    settings = f"probe pca, {sampling}"
    rows = []
    for path in images:
        original, z = session.embed(path)
        embeds = torch.cat([principal.reconstruct(z, k) for k in counts])
        with step_bar(path.name) as callback:
            drawn = unclip.decode(embeds, seeds, None, sampling, callback)
        similarities = unclip.clip.similarity(unclip.embed_images(drawn), z)[:, 0].tolist()
        drawn = session.upsample_to_size(drawn, seeds)
        for k, picture, similarity in zip(counts, drawn, similarities, strict=True):
            metadata = {"source": path.name, "seed": str(options.seed), "unclip": settings}
            session.save(picture, f"{path.stem}-pca{k}", **metadata)
            print(
                f"{path.name}: {k} components ({principal.explained_variance(k):.1%} of the "
                f"variance): CLIP similarity of what is drawn {similarity:.3f}"
            )
        rows.append(torch.cat([drawn, enlarge_like(original, drawn)]))
    labels = [path.stem for path in images]
    session.save_figure("pca", rows, labels, [*map(str, counts), "original"])


def typographic(
    image: Path,
    *,
    object: str,
    label: Sequence[str],
    num_images: Count = 4,
    options: SessionOptions,
) -> None:
    """Paste labels over a picture and ask CLIP what it is.

    Shows what CLIP takes it for, next to what the decoder draws from its embedding.

    Args:
        image: a picture of any size (the centre square is taken)
        object: what the picture shows, as a caption
        label: what to paste: each on its own copy, and each a caption that CLIP may choose
        num_images: variations of each copy; picture k uses seed + k
        options: what draws, from which seed and where to
    """
    captions = [object, *label]
    check_distinct(captions)
    if not all(text.strip() for text in label):
        raise UserError("The label to paste is empty: write what it shall say.")
    require_files([image])
    session = Session(options)
    import torch
    from torch.nn.functional import interpolate

    from unclip_pl.probe import paste_label, zero_shot

    unclip, sampling = session.unclip, session.sampling()
    _, whole = session.load_picture(image)
    pasted = [paste_label(whole[0], text) for text in label]
    copies = [whole[0], *pasted]
    names = ["no label", *label]
    words = file_names(names)
    seeds = options.seeds(num_images)
    rows, labels = [], []
    for copy, name in zip(copies, names, strict=True):
        z = unclip.embed_images(copy[None])
        with step_bar(name) as callback:
            drawn = unclip.decode(z.expand(len(seeds), -1), seeds, None, sampling, callback)
        seen = percentages(captions, zero_shot(unclip, z, captions)[0].tolist())
        variations = zero_shot(unclip, unclip.embed_images(drawn), captions).mean(0).tolist()
        drawn = session.upsample_to_size(drawn, seeds)
        settings = f"probe typographic, label {name}, {sampling}"
        for seed, variation in zip(seeds, drawn):
            metadata = {"source": image.name, "unclip": settings}
            session.save(variation, f"{image.stem}-{words[name]}-{seed}", **metadata)
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
