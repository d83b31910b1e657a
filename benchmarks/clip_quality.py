"""How well a CLIP does on shards.

Measured are retrieval in both directions over all pairs, and zero-shot accuracy among the captions
of the shards.

    python benchmarks/clip_quality.py                              OpenMoji's held-out drawings
    python benchmarks/clip_quality.py --shards 'data/{0..2}.tar'   other drawings

If a caption occurs several times, or a picture is the same to the pixel, each of its twins is a
right answer.
"""

import argparse
import json

from _common import results_option

import torch
from _results import save_rows

from unclip_pl.clip.config import CLIPConfig
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.data.bad_samples import BadSampleCounter
from unclip_pl.data.decoding import decode
from unclip_pl.data.names import expand
from unclip_pl.data.shards import raw_samples
from unclip_pl.datamodules.base import resolve_shards


def recall(similarity: torch.Tensor, right: torch.Tensor, k: int) -> float:
    """Share of rows with a right answer (bool, same shape) among the k best."""
    best = similarity.topk(min(k, similarity.shape[1]), dim=1).indices
    return round(right.gather(1, best).any(1).double().mean().item(), 4)


def main() -> None:
    """Measure the CLIP and the shards of the command line, and print a Markdown table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shards", nargs="+")
    parser.add_argument("--model", default="openmoji")
    parser.add_argument("--pretrained")
    results_option(parser)
    arguments = parser.parse_args()
    clip = FrozenCLIP(CLIPConfig(arguments.model, arguments.pretrained))
    shards = expand(arguments.shards) if arguments.shards else resolve_shards("openmoji", "val", 64)
    counter = BadSampleCounter(0.5)
    samples = [
        sample for shard in shards for sample in raw_samples(shard, counter) if sample["caption"]
    ]
    images = torch.stack([decode(sample["image"], clip.image_size) for sample in samples])
    captions = [sample["caption"] for sample in samples]
    image = torch.cat([clip.embed_images(part) for part in images.split(128)])
    parts = [captions[i : i + 128] for i in range(0, len(captions), 128)]
    text = torch.cat([clip.embed_text(clip.tokenize(part)).embed for part in parts])
    cosine = clip.similarity(image, text)
    flat = images.flatten(1)
    same_image = torch.stack([(flat == row).all(1) for row in flat])
    same_caption = torch.tensor([[a == b for b in captions] for a in captions])
    twins = same_image | same_caption
    classes = sorted(set(captions))
    of_class = torch.tensor([[caption == name for name in classes] for caption in captions])
    by_class = torch.stack([cosine[:, captions.index(name)] for name in classes], dim=1)
    results = {"images": len(samples), "classes": len(classes)}
    for k in (1, 5):
        results[f"image_to_text_r{k}"] = recall(cosine, twins, k)
        results[f"text_to_image_r{k}"] = recall(cosine.T, twins, k)
        results[f"zero_shot_top{k}"] = recall(by_class, of_class, k)
    results["by_chance_top1"] = round(1 / len(classes), 4)
    print(json.dumps(results))
    save_rows("clip_quality", arguments.results, results)


if __name__ == "__main__":
    main()
