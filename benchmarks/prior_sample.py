"""Drawing the embeddings of two captions by the prior of `prior_train.py`: 16 steps with guidance,
two candidates each, of which one is kept.

Captions of 38 tokens, as in the script that times diffusers.
"""

from _common import begin, parser  # sets what must be set before torch

# isort: split
from _sampling import measure, options
from prior_train import LENGTH, batch_of, prior


def main() -> None:
    arguments = parser(__doc__, repeats=5, warmup=1, batch=2)
    options(arguments, steps=16)
    given = arguments.parse_args()
    before = begin(given)
    batch = batch_of(given.batch, LENGTH // 2)
    del batch["key"], batch["image_embed"]
    settings = {"steps": given.steps, "guidance_scale": given.guidance_scale}
    measure("prior_sample", prior(), batch, given, before, **settings)


if __name__ == "__main__":
    main()
