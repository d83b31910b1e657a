"""Runs over many processes and nodes: start-up check, preemption, watchdog, sharded training."""

import unclip_pl.utils.torchvision  # noqa: F401  before the first import of lightning
