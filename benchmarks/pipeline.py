"""From a caption to a 256x256 picture by `UnCLIP.generate`, random weights: text tower, 5 steps of the prior, 5 of the decoder, 2 of the upsampler.

The shapes are those that the other systems are timed with: text tower and prior of width 512, 6 blocks and 8 heads on 77 tokens; decoder of
`decoder_train.py`; upsampler of 32 channels x 1, 2, 3, 4 with two blocks a level. Prior and decoder draw with guidance, the prior one candidate.
"""

from _common import begin, flops_of, parser, peak_mib, report, timed  # sets what must be set before torch

# isort: split
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from decoder_train import decoder
from embed import PREPROCESS
from prior_train import DIM, prior

from unclip_pl._open_clip import import_open_clip
from unclip_pl.clip import CLIPConfig, FrozenCLIP, save_clip
from unclip_pl.networks.unet import UNetConfig
from unclip_pl.pipeline import UnCLIP
from unclip_pl.precision import Precision
from unclip_pl.stages.decoder import SamplingConfig
from unclip_pl.stages.diffusion_prior import PriorSamplingConfig
from unclip_pl.stages.upsampler import NET, Upsampler256, UpsamplingConfig

CLIP = {
    "embed_dim": DIM,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 64, "head_width": 64, "patch_size": 32},  # no picture is embedded
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": DIM, "heads": 8, "layers": 6},
}


def built(folder: Path, device: str, precision: Precision) -> UnCLIP:
    """The pipeline of the comparison, with a CLIP of random weights in `folder`."""
    save_clip(import_open_clip().model.CLIP(**CLIP), folder, CLIP, PREPROCESS)
    clip = FrozenCLIP(CLIPConfig(f"local-dir:{folder}"))
    stages = prior(), decoder()
    for stage in stages:
        stage.clip_fingerprint = clip.fingerprint()
    upsampler = Upsampler256(UNetConfig(image_size=256, width=32, mults=(1, 2, 3, 4), depth=2, dropout=0.0, **NET))
    return UnCLIP(stages[1], stages[0], clip, device, [upsampler], precision=precision)


def main() -> None:
    arguments = parser(__doc__, repeats=5, warmup=1, batch=1)
    for name, steps in {"prior": 5, "decoder": 5, "upsampler": 2}.items():
        arguments.add_argument(f"--{name}-steps", type=int, default=steps)
    given = arguments.parse_args()
    before = begin(given)
    settings: dict[str, Any] = {
        "prior_sampling": PriorSamplingConfig("ddpm", given.prior_steps, guidance_scale=4.0, num_candidates=1),
        "sampling": SamplingConfig("ddpm", given.decoder_steps, guidance_scale=8.0),
        "upsampling": {256: UpsamplingConfig(steps=given.upsampler_steps)},
    }
    seconds: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        unclip = built(Path(folder) / "clip", given.device, given.dtype)

        def step() -> None:
            last = time.perf_counter()

            def told(stage: str, step: int, steps: int) -> None:
                nonlocal last
                now = time.perf_counter()
                seconds[stage] += now - last
                last = now

            unclip.generate(["a red circle on a coloured cloud"] * given.batch, range(given.batch), callback=told, **settings)

        times = timed(step, given)
        peak, rounds = peak_mib(), given.repeats + given.warmup
        by_stage = {stage: spent / rounds for stage, spent in seconds.items()}
        for stage in (unclip.prior, unclip.decoder, *unclip.cascade.stages):
            stage.replay = lambda make, conditions, *_: make(conditions)  # operations of a recording are not seen
        modules = [unclip.clip.model.transformer, unclip.prior, unclip.decoder, *unclip.cascade.stages]
        params = sum(p.numel() for module in modules for p in module.parameters())
        report("pipeline", given, times, given.batch, before, params=params, flops_per_step=flops_of(step), peak_rss_mib=peak, stage_s=by_stage)


if __name__ == "__main__":
    main()
