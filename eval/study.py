"""The pictures of several arms of the same captions, what is seen in them, and which differ."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from eval.arms import TITLES, Arm
from eval.captions import Caption
from eval.common import Figures
from eval.drawn import Drawn
from eval.floor import Floor, floor_of, other_real, real_seen
from eval.judge import Judge, Seen, gathered
from eval.paired import Difference, paired_differences, score_of, spread
from unclip_pl.data.shards import decode
from unclip_pl.stages.decoder import DecoderSamplingConfig
from unclip_pl.utils.distributed import rank, world_size
from unclip_pl.utils.images import grid

Differences = dict[str, dict[str, dict[str, Difference]]]
"""By "fixed" or "best", arm and figure."""


class Study:
    """The arms' pictures and what is seen in them."""

    def __init__(
        self,
        given: argparse.Namespace,
        ways: Sequence[Arm],
        captions: Sequence[Caption],
        judge: Judge,
        fixed: DecoderSamplingConfig,
    ) -> None:
        self.given, self.arms, self.captions = given, ways, captions
        self.judge, self.fixed, self.key = judge, fixed, judge.network.frechet
        self.sweep_count = min(given.sweep_captions or len(captions), len(captions))
        self.text = judge.text(captions)
        self.best: dict[str, tuple[Arm, float]] = {}
        self.paired = not given.reference
        size = ways[0].model.size
        self.real = real_seen(given, judge, captions, size)
        self.reference_count = len(gathered(self.real, given.device).number)
        self._other_real = other_real(given, judge, size)
        self._floors: dict[int, Floor | None] = {}
        self._seen: dict[tuple[str, float | None, float], tuple[int, list[Seen]]] = {}

    def floor(self, count: int) -> Floor | None:
        """Of `count` captions; None where there are too few real pictures."""
        if count not in self._floors:
            others = count if self.paired else self.reference_count
            self._floors[count] = (
                None
                if self._other_real is None
                else floor_of(self._other_real, count, others, self.key, self.given.seed)
            )
        return self._floors[count]

    def at_floor(self, figures: Figures, count: int) -> list[str]:
        """The figures that are no worse than those of real pictures."""
        floor = self.floor(count)
        return [] if floor is None else floor.at(figures)

    def reference(self, count: int) -> Tensor:
        """This rank's features of the reference, of the first `count` where it is the captions'."""
        return (self.real.first(count) if self.paired else self.real).features

    def drawn(self, arm: Arm, scale: float, first: int | None = None, repeat: int = 0) -> Drawn:
        """An arm's pictures at one guidance scale, in a folder of theirs."""
        prior = "" if arm.prior_scale is None else f"-prior-{arm.prior_scale:g}"
        name = f"{arm.name}{prior}-{scale:g}" + (f"-{repeat}" if repeat else "")
        folder = self.given.out / "samples" / name
        sampling = replace(self.fixed, guidance_scale=scale)
        return arm.drawn(folder, sampling, first, repeat, (rank(), world_size()))

    def seen(self, arm: Arm, scale: float, count: int) -> list[Seen]:
        """What the judge sees in this rank's part of the first `count` captions' pictures.

        They are drawn where they are missing. One entry per picture of a caption.
        """
        place = arm.name, arm.prior_scale, scale
        known, seen = self._seen.get(place, (0, []))
        if known < count:
            sources = [self.drawn(arm, scale, count, repeat) for repeat in range(self.given.seeds)]
            seen = [self.judge.look(source.batches(self.given.batch_size)) for source in sources]
            self._seen[place] = count, seen
        return [one.first(count) for one in seen]

    def of_all(self, arm: Arm, scale: float, count: int) -> list[Seen]:
        """The same of all ranks, in the order of the captions."""
        return [gathered(one, self.given.device) for one in self.seen(arm, scale, count)]

    def figures(self, arm: Arm, scale: float, count: int) -> Figures:
        """Of the first `count` captions: means over their pictures."""
        reference, seen = self.reference(count), self.seen(arm, scale, count)
        found = [self.judge.figures(reference, one, self.text) for one in seen]
        means = {
            name: fmean(figures[name] for figures in found) if isinstance(value, float) else value
            for name, value in found[0].items()
        }
        return means | score_of(self.of_all(arm, scale, count), self.text)

    def whole(self, arm: Arm, scale: float) -> Figures:
        """Of all captions, with the interval of the Frechet distance and the guidance."""
        count, given = len(self.captions), self.given
        figures = self.figures(arm, scale, count)
        real = gathered(self.real, given.device).features
        seen = self.of_all(arm, scale, count)
        figures |= spread(real, seen, given.resamples, given.seed, self.key)
        scales = {"guidance_scale": scale}
        if arm.prior_scale is not None:
            scales["prior_guidance_scale"] = arm.prior_scale
        return scales | figures | {"at_floor": self.at_floor(figures, count), "at_edge": []}

    def best_of(self, sweep: Mapping[float, Figures]) -> float:
        """The scale of the least Frechet distance; of those at the floor, of the highest score."""

        def order(scale: float) -> tuple[float, float]:
            figures = sweep[scale]
            if self.key in self.at_floor(figures, self.sweep_count):
                return 0.0, -figures["clip_score"]
            return figures[self.key], 0.0

        return min(sorted(sweep), key=order)

    def results(self) -> dict[str, dict[str, Any]]:
        """By arm: `title`, `decoder_sees`, `fixed`, and where scales are swept `prior_sweep`,
        `sweep` and `best`.

        The fixed scale comes first, of all arms: what one looks at first. Then the priors' guidance
        is swept at the decoder's fixed one, and the decoder's at the priors' best.
        """
        scale, count, given = self.fixed.guidance_scale, self.sweep_count, self.given
        found: dict[str, dict[str, Any]] = {
            arm.name: {
                "title": TITLES[arm.name],
                "decoder_sees": asdict(arm.sees),
                "fixed": self.whole(arm, scale),
            }
            for arm in self.arms
        }
        if not given.guidance_scales and not given.prior_guidance_scales:
            return found
        for arm in self.arms:
            best, edges = arm, []
            if arm.with_guidance and arm.prior_scale is not None:
                priors = {arm.prior_scale: arm}
                for one in sorted({*given.prior_guidance_scales} - {arm.prior_scale}):
                    priors[one] = arm.with_guidance(one)
                sweep = {one: self.figures(priors[one], scale, count) for one in sorted(priors)}
                best = priors[self.best_of(sweep)]
                edges += ["prior_guidance_scale"] if at_edge(best.prior_scale, sweep) else []
                found[arm.name]["prior_sweep"] = {f"{one:g}": sweep[one] for one in sweep}
            scales = sorted({*given.guidance_scales, scale})
            sweep = {one: self.figures(best, one, count) for one in scales}
            self.best[arm.name] = best, self.best_of(sweep)
            edges += ["guidance_scale"] if at_edge(self.best[arm.name][1], sweep) else []
            found[arm.name]["sweep"] = {f"{one:g}": sweep[one] for one in sweep}
            found[arm.name]["best"] = self.whole(*self.best[arm.name]) | {"at_edge": edges}
        return found

    def differences(self, results: Mapping[str, Mapping[str, Any]]) -> Differences:
        """At the fixed scale, and of each arm at its best: what another arm has more than the
        baseline."""
        given, count = self.given, len(self.captions)
        real = gathered(self.real, given.device).features
        points = {"fixed": {arm.name: (arm, self.fixed.guidance_scale) for arm in self.arms}}
        points |= {"best": self.best} if self.best else {}
        found: Differences = {}
        for kind, places in points.items():
            sets = {name: self.of_all(arm, scale, count) for name, (arm, scale) in places.items()}
            base = sets.pop(given.baseline)
            floored = set(results[given.baseline][kind]["at_floor"])
            found[kind] = {}
            for name, other in sets.items():
                apart = paired_differences(
                    base, other, self.text, real, given.resamples, given.seed, self.paired, self.key
                )
                both = floored.intersection(results[name][kind]["at_floor"])
                apart |= {figure: replace(apart[figure], at_floor=True) for figure in both}
                found[kind][name] = apart
        return found

    def side_by_side(self) -> tuple[Image.Image, list[int]]:
        """Rows: the real pictures and each arm at the fixed scale; columns: captions, spread over
        all. With the captions' numbers."""
        count = min(self.given.pictures, len(self.captions))
        step = (len(self.captions) - 1) / max(1, count - 1)
        columns = [round(k * step) for k in range(count)]
        images, size = [self.captions[k].image for k in columns], self.arms[0].model.size
        rows, labels = [], []
        if all(images):
            rows.append(torch.stack([decode(cast(bytes, image), size) for image in images]))
            labels.append("real picture")
        for arm in self.arms:
            rows.append(self.drawn(arm, self.fixed.guidance_scale).pictures(columns))
            labels.append(TITLES[arm.name].partition(" (")[0])
        return grid(rows, labels), columns


def at_edge(scale: float | None, swept: Mapping[float, Any]) -> bool:
    """Whether the best of several scales is the least or the greatest."""
    return len(swept) > 1 and scale in (min(swept), max(swept))
