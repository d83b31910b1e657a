"""Stores for tests."""

from safetensors import safe_open
from safetensors.torch import save_file

from tests.data.shardkit import FakeCLIP
from unclip_pl.data.store import EmbeddingStore


def fill(folder, shards, clip=None, **kwargs) -> EmbeddingStore:
    store = EmbeddingStore(folder)
    store.ensure(shards, clip or FakeCLIP(), 5, progress=False, **kwargs)
    return store


def rewrite_rows(store: EmbeddingStore, shard: str, change) -> None:
    """Rewrite a file of the store with `change(tensors, metadata)` applied."""
    path = store.path(shard)
    with safe_open(path, "pt") as file:
        names = list(file.keys())
        tensors = {name: file.get_tensor(name) for name in names}
        metadata = dict(file.metadata())
    change(tensors, metadata)
    save_file(tensors, path, metadata)
