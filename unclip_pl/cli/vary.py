"""`unclip vary`: variations of pictures (unCLIP section 3.1)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from unclip_pl.cli.pictures import require_files
from unclip_pl.cli.progress import step_bar
from unclip_pl.cli.session import Session, SessionOptions
from unclip_pl.utils.options import Count, check_sampling


def vary(
    images: Sequence[Path],
    *,
    eta: Sequence[float] | None = None,
    noise: Literal["inverted", "fresh"] | None = None,
    num_images: Count = 4,
    caption: str | None = None,
    options: SessionOptions,
) -> None:
    """Draw variations of pictures.

    They lie around the picture itself (--eta), or are of all that CLIP sees the same in.

    Args:
        images: a picture of any size (its centre square is taken), or a latent that `unclip
            invert` wrote
        eta: noise of DDIM, 0 (the picture again) to 1: a row of the figure for each
        noise: start from the inverted picture or from fresh noise; by default inverted with --eta
        num_images: variations of each picture (and each eta); picture k uses seed + k
        caption: a caption to draw with; without it only the picture decides
        options: what draws, from which seed and where to
    """
    noise = noise or ("inverted" if eta else "fresh")
    inverted = noise == "inverted"
    etas: Sequence[float | None] = eta or ([0.0] if inverted else [None])
    for one in eta or ():
        check_sampling({"eta": one, "sampler": options.sampler})
    require_files(images, latents=True)
    session = Session(options)
    seeds = options.seeds(num_images)
    captions = [caption] * len(seeds) if caption else None
    rows, labels = [], []
    for path in images:
        original, start = session.load_latent(path) if inverted else session.embed(path)
        rows.append(original)
        labels.append(path.stem)
        for value in etas:
            drawn, sampling = draw(session, path, start, seeds, captions, value)
            suffix = f"-eta{value:g}" if len(etas) > 1 else ""
            settings = f"vary, {noise} noise, {sampling}, caption {caption!r}"
            for seed, image in zip(seeds, drawn):
                name = f"{path.stem}{suffix}-{seed}"
                session.save(image, name, source=path.name, seed=str(seed), unclip=settings)
            rows.append(drawn)
            labels.append("variations" if value is None else f"eta {value:g}")
    session.save_figure("variations", rows, labels)


def draw(
    session: Session,
    path: Path,
    start: Any,
    seeds: list[int],
    captions: list[str] | None,
    eta: float | None,
) -> tuple[Any, Any]:
    """Variations at --size, one per seed, and the settings they were drawn with.

    `start` is the picture's latent, or its z_i (1, D) for fresh noise.
    """
    from unclip_pl.manipulate import Latent, decode

    description = path.name if eta is None else f"{path.name}, eta {eta:g}"
    with step_bar(description) as callback:
        if isinstance(start, Latent):
            latent = start[[0] * len(seeds)]
            sampling = session.inversion_sampling(latent, eta)
            drawn = decode(session.unclip, latent, seeds, captions, sampling, callback)
        else:
            embed = start.expand(len(seeds), -1)
            sampling = session.sampling(eta)
            drawn = session.unclip.decode(embed, seeds, captions, sampling, callback)
    return session.upsample_to_size(drawn, seeds), sampling
