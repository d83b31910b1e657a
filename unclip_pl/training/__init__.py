"""Callbacks and the trainer of a training run.

Of a stage they use `loss(batch)`, `sample(batch, noise)` and what `protocols.py` lists.
"""

import unclip_pl.utils.torchvision  # noqa: F401  before the first import of lightning
