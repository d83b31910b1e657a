"""The LightningDataModules and the embedding job: shards and stores for a training run."""

import unclip_pl.utils.torchvision  # noqa: F401  before the first import of lightning
