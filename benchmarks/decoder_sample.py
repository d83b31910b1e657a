"""Draw two 64x64 pictures in 5 steps with guidance: `Decoder.sample` as the pipeline calls it.

The decoder is that of `decoder_train.py` with random weights.
"""

from _common import begin, make_parser

from _sampling import measure, options
from decoder_train import batch_of, decoder


def main() -> None:
    """Time the sampling of a batch of pictures, and report pictures per second."""
    parser = make_parser(__doc__, repeats=5, warmup=1, batch=2)
    options(parser, steps=5)
    arguments = parser.parse_args()
    before = begin(arguments)
    batch = batch_of(arguments.batch)
    del batch["key"], batch["image"]
    settings = {"steps": arguments.steps, "guidance_scale": arguments.guidance_scale}
    measure("decoder_sample", decoder(), batch, arguments, before, **settings)


if __name__ == "__main__":
    main()
