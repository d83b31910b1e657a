"""The LightningModules, one file per stage: what it computes, its loss, how it samples."""

import importlib
import pkgutil


def load_all() -> None:
    """Import every stage, so that a YAML may name its class by the short name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
