"""How near a prior's embeddings come to the true ones, on all held-out captions.

Two baselines that need no prior are measured too.

    python benchmarks/prior_quality.py            both priors of the package, OpenMoji's captions
    python benchmarks/prior_quality.py --prior FOLDER_OR_CKPT --train 'data/{0..98}.tar' \\
        --val data/99.tar --store data/embeddings

It prints a Markdown table: cosine to the true image embedding; to the caption's text embedding (the
true image's own stands in the last row) and to those of other captions; place of the true image
among all held-out ones; spread, the mean cosine of four draws of one caption.
"""

import argparse

from _common import results_option

import torch
from _results import save_rows

from unclip_pl.clip.config import CLIPConfig
from unclip_pl.datamodules.prior import PriorData
from unclip_pl.diffusion.noise import Noise
from unclip_pl.pipeline.locate import DEFAULT_PRIORS
from unclip_pl.pipeline.unclip import UnCLIP
from unclip_pl.training.prior_monitor import mean_pairwise, measure
from unclip_pl.utils.images import grid, save_png

SHOWN = 12
COLUMNS = ("cosine_image", "cosine_text", "cosine_text_other", "rank", "r1", "r5")


def nearest(train: dict[str, torch.Tensor], text_embed: torch.Tensor) -> torch.Tensor:
    """The image embedding of the training caption that is nearest to each text embedding.

    (N, D) -> (N, D).
    """
    pair = (text_embed, train["text_embed"])
    ours, theirs = (torch.nn.functional.normalize(z.float(), dim=1) for z in pair)
    return train["image_embed"][(ours @ theirs.T).argmax(1)]


def rows_of(loader: object) -> dict[str, torch.Tensor]:
    """All batches of a loader as one."""
    batches = list(loader)
    names = [name for name, value in batches[0].items() if torch.is_tensor(value)]
    return {name: torch.cat([batch[name] for batch in batches]) for name in names}


def main() -> None:
    """Measure the priors and the two baselines, and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prior", nargs="+", default=list(DEFAULT_PRIORS))
    parser.add_argument("--train", default="openmoji")
    parser.add_argument("--val", default="openmoji")
    parser.add_argument("--store")
    parser.add_argument("--model", default="openmoji", help="the CLIP")
    parser.add_argument("--pretrained")
    parser.add_argument(
        "--picture", help="draw the first 12 of each prior and of the true ones, to this PNG"
    )
    results_option(parser)
    arguments = parser.parse_args()
    clip = CLIPConfig(arguments.model, arguments.pretrained)
    data = PriorData(train=arguments.train, val=arguments.val, clip=clip, store=arguments.store)
    data.prepare_data()
    data.setup("fit")
    val = rows_of(data.val_dataloader())
    shards = [data.store.shard(shard) for shard in data.train_shards]
    train = {
        name: torch.cat([torch.from_numpy(getattr(rows, name).copy()) for rows in shards])
        for name in ("image_embed", "text_embed")
    }
    image, text = val["image_embed"].float(), val["text_embed"].float()
    embeddings = {
        "z_t instead of z_i": (text, None),
        "nearest training caption's image": (nearest(train, text).float(), None),
    }
    names = []
    for name in arguments.prior:
        unclip = UnCLIP.load(prior=name)
        names.append(f"{type(unclip.prior).__name__} ({name})")
        states = data.clip.embed_text(val["tokens"])
        batch = val | {"text_states": states.states, "text_mask": states.mask}
        few = torch.arange(min(64, len(image))).repeat_interleave(4)
        repeated = {key: value[few] for key, value in batch.items()}
        draws = unclip.prior.sample(repeated, Noise(range(len(few))))
        drawn = unclip.prior.sample(batch, Noise(range(len(image))))
        embeddings[names[-1]] = drawn, mean_pairwise(draws, few)
    embeddings["the true z_i"] = (image, None)
    print(f"{len(image)} held-out captions\n\n| | {' | '.join(COLUMNS)} | spread |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    rows = {}
    for name, (drawn, spread) in embeddings.items():
        values = measure(drawn, image, text)
        rows[name] = {column: float(values[column]) for column in COLUMNS}
        rows[name]["spread"] = None if spread is None else float(spread)
        cells = [f"{values[column]:.3g}" for column in COLUMNS]
        print(f"| {name} | {' | '.join(cells)} | {'' if spread is None else f'{spread:.3f}'} |")
    if arguments.picture:
        shown = dict.fromkeys(("the true z_i", *names))
        for name in shown:
            shown[name] = unclip.decode(embeddings[name][0][:SHOWN], range(SHOWN))
        picture = grid(list(shown.values()), list(shown))
        save_png(picture, arguments.picture, source="OpenMoji, CC BY-SA 4.0, openmoji.org")
    save_rows("prior_quality", arguments.results, rows)


if __name__ == "__main__":
    main()
