"""Drawing two 64x64 pictures in 5 steps with guidance by the decoder of `decoder_train.py` (random
weights): `Decoder.sample` as the pipeline calls it."""

from _common import begin, parser  # sets what must be set before torch

# isort: split
from _sampling import measure, options
from decoder_train import batch_of, decoder


def main() -> None:
    arguments = parser(__doc__, repeats=5, warmup=1, batch=2)
    options(arguments, steps=5)
    given = arguments.parse_args()
    before = begin(given)
    batch = batch_of(given.batch)
    del batch["key"], batch["image"]
    settings = {"steps": given.steps, "guidance_scale": given.guidance_scale}
    measure("decoder_sample", decoder(), batch, given, before, **settings)


if __name__ == "__main__":
    main()
