"""What the manipulations do to held-out drawings: the figures of `docs/manipulations.md`.

    python benchmarks/manipulation_quality.py inversion     PSNR of an image inverted and decoded
    python benchmarks/manipulation_quality.py variations    distance to the original by eta
    python benchmarks/manipulation_quality.py edits         text diffs between skin tones or genders
    python benchmarks/manipulation_quality.py pca           CLIP similarity by components kept

Each prints a Markdown table. The drawings are OpenMoji's held-out ones, in the order of the split
(a hash).
"""

import argparse
import re
import time
from collections.abc import Callable, Iterator

from _common import results_option

import torch
from _results import save_rows
from torch import Tensor

from unclip_pl.clip.config import CLIPConfig
from unclip_pl.data.openmoji_drawings import TONES, Drawing, composition_split, list_drawings
from unclip_pl.datamodules.image_embedding import ImageEmbeddingData
from unclip_pl.diffusion import samplers
from unclip_pl.manipulate import (
    Latent,
    decode,
    inversion_sampling,
    invert,
    reconstruct,
    text_diff,
    vary,
)
from unclip_pl.pipeline.unclip import UnCLIP
from unclip_pl.utils.images import psnr

GENDERS = (("woman", "man"), ("women", "men"), ("girl", "boy"))


def held_out(data: ImageEmbeddingData, count: int) -> tuple[list[str], Tensor]:
    """Keys and pictures (N, 3, 64, 64) of the first `count`."""
    keys: list[str] = []
    images: list[Tensor] = []
    for batch in data.val_dataloader():
        keys += batch["key"]
        images.append(batch["image"])
        if len(keys) >= count:
            break
    return keys[:count], torch.cat(images)[:count]


def similar(unclip: UnCLIP, a: Tensor, b: Tensor) -> Tensor:
    """(N,) cosine of CLIP's embeddings of pictures."""
    return torch.cosine_similarity(unclip.embed_images(a), unclip.embed_images(b))


def inversion(
    unclip: UnCLIP, data: ImageEmbeddingData, arguments: argparse.Namespace
) -> Iterator[list[str]]:
    """Yield the table of inversions: its header, then a row for each number of steps.

    PSNR in dB is between the drawings and what is decoded from their inverted noise.
    """
    yield [
        "steps", "explicit, dB", "implicit, dB", "least of implicit", "standard deviation of x_T",
        "with x_0 clamped on the way back, dB",
    ]  # fmt: skip
    _, images = held_out(data, arguments.count)
    embed = unclip.embed_images(images)
    for steps in arguments.steps:
        settings = inversion_sampling(unclip, steps)

        def explicit(predict: Callable, schedule: samplers.Schedule) -> Tensor:
            return samplers.invert(predict, images, schedule)

        x_T = unclip.run_sampler(explicit, len(images), embed, sampling=settings)
        latent = invert(unclip, images, steps)
        by_explicit = psnr(reconstruct(unclip, Latent(embed, x_T, steps)), images)
        by_implicit = psnr(reconstruct(unclip, latent), images)
        static = inversion_sampling(unclip, steps, threshold="static")
        clamped = psnr(decode(unclip, latent, range(len(latent)), sampling=static), images)
        yield [
            str(steps),
            *decimals(1, by_explicit.mean(), by_implicit.mean(), by_implicit.min()),
            *decimals(2, latent.x_T.std()),
            *decimals(1, clamped.mean()),
        ]


def decimals(digits: int, *values: Tensor) -> list[str]:
    """Numbers as cells."""
    return [f"{float(value):.{digits}f}" for value in values]


def variations(
    unclip: UnCLIP, data: ImageEmbeddingData, arguments: argparse.Namespace
) -> Iterator[list[str]]:
    """Yield the table of variations: its header, then a row for each eta and each comparison.

    Distances are in grey levels from 0 to 255, similarities are cosines of CLIP's embeddings.
    """
    yield [
        "drawn", "mean absolute distance to the original (0 to 255)",
        "CLIP similarity to the original",
    ]  # fmt: skip
    _, images = held_out(data, arguments.count)
    latent = invert(unclip, images, arguments.steps[0])
    seeds = range(len(images))
    drawn = {
        f"eta {eta:g}, inverted noise": vary(unclip, latent, seeds, eta)
        for eta in (0.0, 0.25, 0.5, 0.75, 1.0)
    }
    settings = inversion_sampling(unclip, arguments.steps[0])
    drawn["fresh noise"] = unclip.decode(latent.image_embed, seeds, sampling=settings)
    drawn["fresh noise, of another drawing"] = drawn["fresh noise"].roll(1, 0)
    drawn["another drawing itself"] = images.roll(1, 0)
    for name, pictures in drawn.items():
        distance = (pictures - images).abs().mean() * 127.5
        similarity = similar(unclip, pictures, images).mean()
        yield [name, *decimals(1, distance), *decimals(3, similarity)]


def counterparts(drawing: Drawing, known: dict[str, Drawing]) -> Iterator[tuple[str, str]]:
    """(what differs, caption) for each counterpart of a drawing that exists.

    Counterparts have another skin tone or gender.
    """
    if len(drawing.tones) == 1:
        own = f"{drawing.tones[0]} skin tone"
        for tone in TONES.values():
            caption = drawing.caption.replace(own, f"{tone} skin tone")
            if tone != drawing.tones[0] and caption in known:
                yield "skin tone", caption
    for pair in GENDERS:
        for one, other in (pair, pair[::-1]):
            caption = re.sub(rf"\b{one}\b", other, drawing.caption)
            if caption != drawing.caption and caption in known:
                yield "gender", caption


def edits(
    unclip: UnCLIP, data: ImageEmbeddingData, arguments: argparse.Namespace
) -> Iterator[list[str]]:
    """Yield the table of text diffs: its header, then a row for each kind of edit and theta.

    An edit changes the skin tone or the gender that the drawing's caption names.
    """
    yield [
        "what changes", "pairs", "theta", "nearer to the target caption", "without the edit",
        "the target's own drawing", "similarity to the original",
    ]  # fmt: skip
    train, val = composition_split(list_drawings())
    known, by_key = {d.caption: d for d in [*train, *val]}, {d.hexcode: d for d in val}
    keys, images = held_out(data, arguments.count)
    pairs = [
        (row, kind, caption)
        for row, key in enumerate(keys)
        for kind, caption in counterparts(by_key[key], known)
    ]
    latent = invert(unclip, images, arguments.steps[0])
    sources = unclip.embed_text([by_key[keys[row]].caption for row, _, _ in pairs])
    targets = unclip.embed_text([caption for _, _, caption in pairs])
    rows = [row for row, _, _ in pairs]

    def nearer(embed: Tensor) -> Tensor:
        to_target = torch.cosine_similarity(embed, targets)
        return to_target > torch.cosine_similarity(embed, sources)

    before = nearer(latent.image_embed[rows])
    shards = [*data.train_shards, *data.val_shards]
    theirs = {key: value for shard in shards for key, value in stored(data, shard)}
    own = nearer(torch.stack([theirs[known[caption].hexcode] for _, _, caption in pairs]))
    for theta in arguments.theta:
        after = []
        for part in [pairs[i : i + 32] for i in range(0, len(pairs), 32)]:
            where = [row for row, _, _ in part]
            captions = [by_key[keys[row]].caption for row in where]
            wanted = [caption for _, _, caption in part]
            thetas = torch.full((len(part),), theta)
            edited = text_diff(unclip, latent[where], captions, wanted, thetas)
            after.append(unclip.embed_images(edited))
        moved = torch.cat(after)
        similarity = torch.cosine_similarity(moved, latent.image_embed[rows])
        for kind in ("skin tone", "gender"):
            of = torch.tensor([kind == this for _, this, _ in pairs])
            if of.any():
                flags = (nearer(moved), before, own)
                shares = [f"{float(right[of].float().mean()):.1%}" for right in flags]
                head = [kind, str(int(of.sum())), f"{theta:g}"]
                yield [*head, *shares, *decimals(3, similarity[of].mean())]


def stored(data: ImageEmbeddingData, shard: str) -> Iterator[tuple[str, Tensor]]:
    """Keys and image embeddings of a shard's store."""
    rows = data.store.shard(shard)
    yield from zip(rows.keys, torch.from_numpy(rows.image_embed.copy()).float(), strict=True)


def pca(
    unclip: UnCLIP, data: ImageEmbeddingData, arguments: argparse.Namespace
) -> Iterator[list[str]]:
    """Yield the table of principal components: its header, then a row for each number kept.

    Similarities are cosines with CLIP's embedding of the drawing, before and after decoding.
    """
    from unclip_pl.probe import PrincipalComponents, paper_dimensions

    yield ["components", "share of the variance", "of the embedding", "of what is drawn from it"]
    components = PrincipalComponents.from_statistics(data.store.statistics(data.train_shards))
    _, images = held_out(data, arguments.count)
    embed = unclip.embed_images(images)
    settings = inversion_sampling(unclip, arguments.steps[0])
    for k in [*paper_dimensions(components.dim), components.dim]:
        z = components.reconstruct(embed, k)
        drawn = unclip.embed_images(unclip.decode(z, range(len(images)), sampling=settings))
        cosines = [torch.cosine_similarity(z_k, embed).mean() for z_k in (z, drawn)]
        yield [str(k), f"{components.explained_variance(k):.1%}", *decimals(3, *cosines)]


JOBS = {"inversion": inversion, "variations": variations, "edits": edits, "pca": pca}


def main() -> None:
    """Run one of the four jobs, print its table and save its rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("--count", type=int, default=32, help="drawings")
    parser.add_argument("--steps", type=int, nargs="+", default=[25])
    parser.add_argument("--theta", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--decoder")
    results_option(parser)
    arguments = parser.parse_args()
    data = ImageEmbeddingData(clip=CLIPConfig(), image_size=64)
    data.prepare_data()
    data.setup("validate")
    unclip = UnCLIP.load(arguments.decoder) if arguments.decoder else UnCLIP.load()
    start, rows = time.monotonic(), []
    for cells in JOBS[arguments.job](unclip, data, arguments):
        print(f"| {' | '.join(cells)} |", flush=True)
        if not rows:
            print("|" + "---|" * len(cells))
        rows.append(cells)
    seconds = time.monotonic() - start
    settings = f"{arguments.job}, steps {arguments.steps}, {seconds:.0f} s"
    print(f"\n{arguments.count} held-out drawings, {settings}")
    save_rows(f"manipulation_quality_{arguments.job}", arguments.results, rows)


if __name__ == "__main__":
    main()
