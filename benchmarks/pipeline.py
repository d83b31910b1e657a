"""From a caption to a 256x256 picture by `UnCLIP.generate` with random weights.

The text tower runs, then 5 steps of the prior, 5 of the decoder and 2 of the upsampler. The shapes
are those that the other systems are timed with: text tower and prior of width 512, 6 blocks and 8
heads on 77 tokens; decoder of `decoder_train.py`; upsampler of 32 channels x 1, 2, 3, 4 with two
blocks per level. Prior and decoder draw with guidance, the prior one candidate.
"""

import argparse
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from _common import (
    begin,
    flops_of,
    make_parser,
    peak_mib,
    report,
    sampling_options,
    timed,
)

from decoder_train import decoder
from embed import PREPROCESS
from prior_train import DIM, prior
from upsampler_train import upsampler

from unclip_pl.clip.config import CLIPConfig
from unclip_pl.clip.folder import save_clip
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.clip.loading import import_open_clip
from unclip_pl.pipeline.unclip import UnCLIP
from unclip_pl.stages.decoder import DecoderSamplingConfig
from unclip_pl.stages.diffusion_prior import PriorSamplingConfig
from unclip_pl.stages.upsampler import UpsamplingConfig

CAPTION = "a red circle on a coloured cloud"
CLIP = {
    "embed_dim": DIM,
    "vision_cfg": {  # no picture is embedded
        "image_size": 32, "layers": 1, "width": 64, "head_width": 64, "patch_size": 32,
    },
    "text_cfg": {
        "context_length": 77, "vocab_size": 49408, "width": DIM, "heads": 8, "layers": 6,
    },
}  # fmt: skip
STEPS = {"prior": 5, "decoder": 5, "upsampler": 2}


def build_pipeline(folder: Path, arguments: argparse.Namespace) -> UnCLIP:
    """The pipeline of the comparison, with a CLIP of random weights in `folder`."""
    save_clip(import_open_clip().model.CLIP(**CLIP), folder, CLIP, PREPROCESS)
    clip = FrozenCLIP(CLIPConfig(f"local-dir:{folder}"))
    first, second = prior(), decoder()
    for stage in (first, second):
        stage.clip_fingerprint = clip.fingerprint()
    stages = [first, second, upsampler(width=32)]
    for stage in stages:
        stage.requires_grad_(False)  # as loaded stages are
    unclip = UnCLIP(second, first, clip, arguments.device, stages[2:], precision=arguments.dtype)
    return unclip.accelerate(arguments.compile, arguments.cuda_graphs)


def measure(arguments: argparse.Namespace, before: float) -> None:
    """Time the pipeline, count its operations, and print the line."""
    settings: dict[str, Any] = {
        "prior_sampling": PriorSamplingConfig(
            "ddpm", arguments.prior_steps, guidance_scale=4.0, num_candidates=1
        ),
        "sampling": DecoderSamplingConfig("ddpm", arguments.decoder_steps, guidance_scale=8.0),
        "upsampling": {256: UpsamplingConfig(steps=arguments.upsampler_steps)},
    }
    captions, seeds = [CAPTION] * arguments.batch, range(arguments.batch)
    seconds: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        unclip = build_pipeline(Path(folder) / "clip", arguments)

        def step() -> None:
            last = time.perf_counter()

            def record_time(stage: str, step: int, steps: int) -> None:
                nonlocal last
                now = time.perf_counter()
                seconds[stage] += now - last
                last = now

            unclip.generate(captions, seeds, callback=record_time, **settings)

        times = timed(step, arguments)
        peak, rounds = peak_mib(), arguments.repeats + arguments.warmup
        by_stage = {stage: spent / rounds for stage, spent in seconds.items()}
        stages = [unclip.prior, unclip.decoder, *unclip.cascade.stages]
        for stage in stages:
            stage.cuda_graphs = False  # a replay hides its operations
        modules = [unclip.clip.model.transformer, *stages]
        report(
            "pipeline", arguments, times, arguments.batch, before,
            params=sum(p.numel() for module in modules for p in module.parameters()),
            flops_per_step=flops_of(step), peak_rss_mib=peak, stage_s=by_stage,
        )  # fmt: skip


def main() -> None:
    """Time all stages from captions to pictures, and report pictures per second."""
    parser = make_parser(__doc__, repeats=5, warmup=1, batch=1)
    for name, steps in STEPS.items():
        parser.add_argument(f"--{name}-steps", type=int, default=steps)
    sampling_options(parser)
    arguments = parser.parse_args()
    measure(arguments, begin(arguments))


if __name__ == "__main__":
    main()
