"""How well a decoder draws held-out drawings from their CLIP image embeddings.

    python benchmarks/decoder_quality.py                    that of the package, 398 drawings
    python benchmarks/decoder_quality.py --weights FOLDER_OR_CKPT --picture decoder.png

It prints a Markdown table with the figures of what was drawn, and of the real drawings: cosine of
the embeddings of the drawn and the true one; how often CLIP finds the true drawing first among all;
grain, the median distance from white where the drawing is white, of a range of 2; layout, the mean
squared error of both reduced to 16 x 16 pixels, on a range of -1 to 1; the Frechet distance
`fd_clip`, for real drawings against as many other real ones. The second and the last are by the
CLIP that conditions, which flatters what is drawn from its embeddings, and (`_judge`) by the
independent one.
"""

import argparse

from _common import results_option

import torch
from _results import save_rows
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d
from tqdm import trange

from eval.distances import frechet
from eval.features import clip_features
from eval.floor import compute_floor
from unclip_pl.clip.config import CLIPConfig
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.datamodules.image_embedding import ImageEmbeddingData
from unclip_pl.pipeline.locate import DEFAULT_DECODER
from unclip_pl.pipeline.unclip import UnCLIP
from unclip_pl.training.retrieval import recall_at
from unclip_pl.utils.devices import pick_device
from unclip_pl.utils.images import grid, save_png, to_uint8
from unclip_pl.utils.options import override_sampling

WHITE = 0.99
"""Pixels are white from here on, of a range of -1 to 1."""
LAYOUT = 16
"""Side to which drawings are reduced to compare where things lie."""
COLUMNS = 12


def drawings() -> tuple[Tensor, Tensor, Tensor]:
    """The held-out drawings (N, 3, 64, 64) and their CLIP embeddings (N, D), and 2 N others."""
    data = ImageEmbeddingData(clip=CLIPConfig(), image_size=64)
    data.prepare_data()
    data.setup("fit")
    val = list(data.val_dataloader())
    images, embeds = (
        torch.cat([batch[name] for batch in val]) for name in ("image", "image_embed")
    )
    others: list[Tensor] = []
    for batch in data.train_dataloader():
        others.append(batch["image"])
        if sum(map(len, others)) >= 2 * len(images):
            break
    return images, embeds, torch.cat(others)


def found_first(clip: FrozenCLIP, drawn: Tensor, real: Tensor) -> float:
    """How often what was drawn is nearest to its own drawing; a tie does not count."""
    similarity = clip.similarity(clip.embed_images(drawn), clip.embed_images(real))
    return recall_at(similarity, 1).item()


def features(clip: FrozenCLIP, images: Tensor) -> Tensor:
    """What the Frechet distance is of: embeddings of images as files hold them."""
    return clip_features(clip)(to_uint8(images)).float()


def figures(drawn: Tensor, real: Tensor, clip: FrozenCLIP, judge: FrozenCLIP) -> dict[str, float]:
    """The figures of drawn images, each from the embedding of the real one in the same row."""
    embeds = clip.embed_images(drawn), clip.embed_images(real)
    return {
        "cosine": torch.cosine_similarity(*embeds).mean().item(),
        "first": found_first(clip, drawn, real),
        "first_judge": found_first(judge, drawn, real),
        "grain": (1 - drawn).abs().mean(1)[real.amin(1) > WHITE].median().item(),
        "layout": adaptive_avg_pool2d(drawn - real, LAYOUT).square().mean().item(),
        "fd_clip": frechet(features(clip, real), features(clip, drawn)),
        "fd_clip_judge": frechet(features(judge, real), features(judge, drawn)),
    }


@torch.no_grad()
def main() -> None:
    """Draw, measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", default=DEFAULT_DECODER, help="a release or checkpoint")
    parser.add_argument("--sampler", help="this and the next three: by default the decoder's own")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--eta", type=float)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--picture", help="write the first 24, real above drawn, to this PNG")
    results_option(parser)
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    unclip = UnCLIP.load(arguments.weights, device=device, precision=arguments.precision)
    judge = FrozenCLIP(CLIPConfig("openmoji-judge"), device)
    sampling = override_sampling(unclip.decoder, vars(arguments))
    real, embeds, others = (rows.to(device) for rows in drawings())
    count = len(real)
    drawn = torch.cat(
        [
            unclip.decode(embeds[k : k + 32], range(k, min(k + 32, count)), sampling=sampling)
            for k in trange(0, count, 32)
        ]
    ).float()
    rows = {
        "drawn": figures(drawn, real, unclip.clip, judge),
        "real": figures(real, real, unclip.clip, judge),
    }
    for name, clip in {"fd_clip": unclip.clip, "fd_clip_judge": judge}.items():
        floor = compute_floor(features(clip, others), count, count, name)
        rows["real"][name] = floor.mean[name]
    columns = list(rows["drawn"])
    how = f"{sampling.sampler} in {sampling.steps} steps, eta {sampling.eta:g}, "
    how += f"guidance {sampling.guidance_scale:g}, {unclip.precision}"
    print(f"{count} held-out drawings, {how}\n")
    print(f"| | {' | '.join(columns)} |\n{'|---' * (len(columns) + 1)}|")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{row[column]:.4g}' for column in columns)} |")
    if arguments.picture:
        halves = zip(real[: 2 * COLUMNS].split(COLUMNS), drawn[: 2 * COLUMNS].split(COLUMNS))
        picture = grid([row for half in halves for row in half])
        save_png(picture, arguments.picture, source="OpenMoji, CC BY-SA 4.0, openmoji.org")
    save_rows("decoder_quality", arguments.results, rows, device)


if __name__ == "__main__":
    main()
