"""Data on disk: shards, the embedding store, OpenMoji, degradation. No Lightning and no stage."""
