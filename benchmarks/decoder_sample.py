"""Drawing two 64x64 pictures in 5 steps with guidance by the decoder of `decoder_train.py` (random weights): `Decoder.sample` as the pipeline calls it."""

from _common import begin, parser  # sets what must be set before torch

# isort: split
from _sampling import measure, options
from decoder_train import batch_of, decoder


def main() -> None:
    arguments = parser(__doc__, repeats=5, warmup=1, batch=2)
    options(arguments, steps=5)
    given = arguments.parse_args()
    before = begin(given)
    batch = {key: value for key, value in batch_of(given.batch).items() if key not in ("key", "image")}
    measure("decoder_sample", decoder(), batch, given, before)


if __name__ == "__main__":
    main()
