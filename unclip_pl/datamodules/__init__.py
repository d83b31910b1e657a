"""The LightningDataModules and the embedding job: shards and stores for a training run."""
