"""Drawing the embeddings of two captions by the prior of `prior_train.py`: 16 steps with guidance, two candidates each, of which one is kept."""

from _common import begin, flops_of, parser, peak_mib, report, timed

# isort: split
import dataclasses

import torch
from prior_train import batch_of, prior

from unclip_pl.diffusion.noise import Noise


def main() -> None:
    arguments = parser(__doc__, repeats=5, warmup=1, batch=2)
    arguments.add_argument("--steps", type=int, default=16)
    arguments.add_argument("--guidance-scale", type=float, default=2.0)
    given = arguments.parse_args()
    before = begin(given)
    stage = prior().to(given.device).eval()
    batch = {key: value.to(given.device) for key, value in batch_of(given.batch).items() if key not in ("key", "image_embed")}
    sampling = dataclasses.replace(stage.sampling, steps=given.steps, guidance_scale=given.guidance_scale)

    def step() -> None:
        with torch.autocast(given.device.split(":")[0], torch.bfloat16, enabled=given.dtype == "bf16"):
            stage.sample(batch, Noise(range(given.batch)), sampling)

    times = timed(step, given)
    peak = peak_mib()
    report(
        "prior_sample", given, times, given.batch, before, params=sum(p.numel() for p in stage.parameters()), flops_per_step=flops_of(step),
        peak_rss_mib=peak, nfe=given.steps,
    )


if __name__ == "__main__":
    main()
