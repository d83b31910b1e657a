"""Fill an embedding store from tar shards: read, decode, embed images and captions, write.

A repeat is the whole job, with the model loaded before. The operations are those of the image tower
only, as in the scripts of the systems that embed no captions.
"""

import json
import tempfile
from pathlib import Path

from _common import begin, flops_of, make_parser, peak_mib, report, timed

import torch

from unclip_pl.clip.config import CLIPConfig
from unclip_pl.clip.folder import save_clip
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.clip.loading import import_open_clip
from unclip_pl.data.names import expand
from unclip_pl.data.store import EmbeddingStore

TINY = {
    "embed_dim": 128,
    "vision_cfg": {
        "image_size": 224, "layers": 4, "width": 192, "head_width": 64, "patch_size": 32,
    },
    "text_cfg": {
        "context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 2,
    },
}  # fmt: skip
PREPROCESS = {
    "mean": [0.48145466, 0.4578275, 0.40821073],
    "std": [0.26862954, 0.26130258, 0.27577711],
    "interpolation": "bicubic",
    "resize_mode": "shortest",
}


def random_clip(name: str, folder: Path) -> str:
    """Write a CLIP of random weights as an open_clip folder; returns its name.

    `tiny` is a ViT of 4 layers and width 192 on 224 px.
    """
    open_clip = import_open_clip()
    config = TINY if name == "tiny" else open_clip.get_model_config(name)
    parts = (config[part] for part in ("embed_dim", "vision_cfg", "text_cfg"))
    network = open_clip.model.CLIP(*parts, quick_gelu=bool(config.get("quick_gelu")))
    save_clip(network, folder, json.loads(json.dumps(config)), PREPROCESS)
    return f"local-dir:{folder}"


def image_tower_flops(clip: FrozenCLIP) -> int:
    """Operations of one image."""
    side, dtype = clip.image_size, clip.model.visual.proj.dtype
    picture = torch.randn(1, 3, side, side, dtype=dtype, device=clip.device)
    with torch.enable_grad():  # otherwise attention takes a fused path that the counter misses
        return flops_of(lambda: clip.model.encode_image(picture))


def main() -> None:
    """Time the filling of a new store, and report samples per second."""
    parser = make_parser(__doc__, repeats=3, warmup=1, batch=64)
    parser.add_argument("--shards", required=True, help="brace pattern of tars")
    parser.add_argument(
        "--model", default="ViT-B-32", help="an open_clip name, or tiny; weights are random"
    )
    arguments = parser.parse_args()
    before = begin(arguments)
    shards = expand(arguments.shards)
    with tempfile.TemporaryDirectory() as folder:
        name = random_clip(arguments.model, Path(folder) / "clip")
        clip = FrozenCLIP(CLIPConfig(name, precision=arguments.dtype), arguments.device)
        clip.fingerprint()  # loads it
        rows = 0

        def step() -> None:
            nonlocal rows
            with tempfile.TemporaryDirectory(dir=folder) as target:
                store = EmbeddingStore(target)
                store.ensure(shards, clip, arguments.batch, progress=False)
                rows = sum(store.row_counts(shards))

        times = timed(step, arguments)
        peak = peak_mib()  # counting the operations takes memory of its own
        report(
            "embed", arguments, times, rows, before, f"unclip_pl/{arguments.model}",
            params=sum(p.numel() for p in clip.model.parameters()),
            flops_per_step=image_tower_flops(clip) * rows, peak_rss_mib=peak,
        )  # fmt: skip


if __name__ == "__main__":
    main()
