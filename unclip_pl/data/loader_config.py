"""The settings `data.loader` of the DataModules."""

from dataclasses import dataclass


@dataclass(frozen=True)
class LoaderConfig:
    """How samples become batches."""

    batch_size: int = 32
    """Samples per batch and rank."""
    num_workers: int = 2
    steps_per_epoch: int | None = None
    """Batches per epoch, the same on every rank; None: as many as the samples fill."""
    window: int = 4
    """Shards that a reader holds and mixes at a time."""
    seed: int = 0
    max_bad_rate: float = 0.01
    """Largest share of samples that may be unusable before the run stops."""
    exact_jpeg: bool = False
    """Decode JPEGs whole where a half, quarter or eighth would do. This is slower, and pixels
    differ by about 0.4 of 255 levels."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.window < 1 or self.num_workers < 0:
            raise ValueError(
                "data.loader needs a batch_size and window of at least 1 and num_workers of at "
                "least 0."
            )
        _check_steps(self.steps_per_epoch, "samples")
        _check_rate(self.max_bad_rate)


@dataclass(frozen=True)
class EmbeddingLoaderConfig:
    """How rows of the embedding store become batches."""

    batch_size: int = 256
    """Rows per batch and rank."""
    steps_per_epoch: int | None = None
    """Batches per epoch, the same on every rank; None: as many as the rows fill."""
    seed: int = 0
    max_bad_rate: float = 0.01
    """Largest share of samples that may be unusable while the store is filled."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.seed < 0:
            raise ValueError(
                "data.loader needs a batch_size of at least 1 and a seed of at least 0."
            )
        _check_steps(self.steps_per_epoch, "rows")
        _check_rate(self.max_bad_rate)


def _check_steps(steps: int | None, what: str) -> None:
    if steps is not None and steps < 1:
        raise ValueError(
            f"data.loader.steps_per_epoch is {steps}: give 1 or more, or null for as many as the "
            f"{what} fill."
        )


def _check_rate(rate: float) -> None:
    if not 0 <= rate <= 1:
        raise ValueError(f"data.loader.max_bad_rate is {rate}: give a share from 0 to 1.")
