"""The real pictures, and the floor: what they have against others, at the same numbers.

A Frechet distance of finite sets is never 0, and KID spreads about 0. What lies at the floor cannot
be told from real pictures by these figures, and is not called better than what lies there too.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eval import distances
from eval.captions import Caption
from eval.common import progress
from eval.extract import reference
from eval.folders import Pictures
from eval.judge import Judge, Seen, gathered, numbered, pictures_of
from unclip_pl.data.openmoji import openmoji_shards
from unclip_pl.data.openmoji_drawings import STYLES
from unclip_pl.utils.distributed import rank, world_size
from unclip_pl.utils.errors import UserError

REPEATS = 20
"""Pairs of sets that are drawn."""
NO_FLOOR = "No floor: it takes {} real pictures, which are not known here; name them with --floor."


@dataclass(frozen=True)
class Floor:
    """Figures of real pictures: by key the mean over pairs of sets, and what 97.5 % stay below.

    Args:
        count: pictures in the set that stands for the drawn ones.
        reference: pictures in the other.
    """

    count: int
    reference: int
    mean: Mapping[str, float]
    high: Mapping[str, float]

    def at(self, figures: Mapping[str, Any]) -> list[str]:
        """The names of those figures that real pictures have too."""
        return [name for name, high in self.high.items() if figures[name] <= high]


def floor_of(real: Tensor, count: int, reference: int, key: str, seed: int = 0) -> Floor | None:
    """The floor of the Frechet distance, under `key`, and of `kid`.

    Args:
        real: (P, D) features of real pictures.
        count, reference: pictures of the two sets, which have none in common.

    Returns:
        None where `real` has too few for both.
    """
    if len(real) < count + reference:
        return None
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, list[float]] = {key: [], "kid": []}
    for _ in range(REPEATS):
        order = torch.randperm(len(real), generator=generator)
        sets = real[order[:reference]], real[order[reference : reference + count]]
        drawn[key].append(distances.frechet(*sets))
        drawn["kid"].append(distances.kernel(*sets).value)
    rows = {name: torch.tensor(values, dtype=torch.float64) for name, values in drawn.items()}
    mean = {name: row.mean().item() for name, row in rows.items()}
    high = {name: mean[name] + 1.96 * row.std().item() for name, row in rows.items()}
    return Floor(count, reference, mean, high)


def add_floor(parser: argparse.ArgumentParser) -> None:
    """The options that name real pictures."""
    parser.add_argument(
        "--reference", help="real pictures, a folder or shards; by default the captions' own"
    )
    parser.add_argument(
        "--floor",
        help="more real pictures, a folder or shards, to show what real ones have against real "
        "ones; by default OpenMoji's training drawings with its captions, else those of "
        "--reference",
    )


def real_seen(
    given: argparse.Namespace, judge: Judge, captions: Sequence[Caption], size: int
) -> Seen:
    """This rank's share of the real pictures that the drawn ones are compared with.

    Those of --reference, else the captions' own, which go by the numbers of their captions.
    """
    size, place = given.reference_size or size, (rank(), world_size())
    if given.reference:
        pictures = Pictures(given.reference, *place, size=size)
        return numbered(reference(judge.network, pictures, given.batch_size), *place)
    own = pictures_of(captions, size, given.batch_size, *place)
    return judge.look(progress(own, len(captions), "reference"))


def require_real(given: argparse.Namespace, captions: Sequence[Caption]) -> None:
    """UserError where there is nothing to compare drawn pictures with."""
    if not given.reference and not all(caption.image for caption in captions):
        raise UserError(
            f"The captions of {given.captions} have no pictures to compare with: give real ones "
            "with --reference."
        )


def other_real(given: argparse.Namespace, judge: Judge, size: int) -> Tensor | None:
    """Features (P, D) of the real pictures that the floor is taken from; None where none are known.

    Args:
        given: `captions`, `reference`, `reference_size` and `floor` of the options.
        size: side of the pictures that are judged, in pixels.
    """
    where = given.floor or given.reference
    if given.floor is None and given.captions in STYLES:
        where = str(openmoji_shards(size, name=given.captions) / "train-*.tar")
    if not where:
        return None
    place = rank(), world_size()
    pictures = Pictures(where, *place, size=given.reference_size or size)
    rows = reference(judge.network, pictures, given.batch_size)
    return gathered(numbered(rows, *place), given.device).features
