"""Callbacks and plugins of a training run. They know of a stage only that it has `loss(batch)` and `sample(batch, noise)`, and what `needs` lists."""

import unclip_pl.utils.torchvision  # noqa: F401  before the first import of lightning
