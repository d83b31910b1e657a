"""Sample the embeddings of two captions by the prior of `prior_train.py`.

It takes 16 steps with guidance and the better of two candidates for each caption. Captions have 38
tokens, as in the script that times diffusers.
"""

from _common import begin, make_parser

from _sampling import measure, options
from prior_train import LENGTH, batch_of, prior


def main() -> None:
    """Time the sampling of a batch of embeddings, and report captions per second."""
    parser = make_parser(__doc__, repeats=5, warmup=1, batch=2)
    options(parser, steps=16)
    arguments = parser.parse_args()
    before = begin(arguments)
    batch = batch_of(arguments.batch, LENGTH // 2)
    del batch["key"], batch["image_embed"]
    settings = {"steps": arguments.steps, "guidance_scale": arguments.guidance_scale}
    measure("prior_sample", prior(), batch, arguments, before, **settings)


if __name__ == "__main__":
    main()
