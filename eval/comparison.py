"""The images of several conditions for the same captions, their figures, and which ones differ."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Annotated, Any, cast

import torch
from PIL import Image

from eval.captions import Caption
from eval.commands import Figures, ReportOptions
from eval.conditioning import TITLES, Conditioning
from eval.evaluator import Evaluator, ImageFeatures, gather_ranks
from eval.floor import (
    LEAST,
    Floor,
    RealImages,
    check_enough,
    compute_floor,
    reached_on_other_pictures,
)
from eval.generated import GeneratedImages
from eval.paired import (
    Difference,
    distance_intervals,
    mean_clip_score,
    paired_differences,
    paired_kid,
)
from unclip_pl.data.decoding import decode
from unclip_pl.stages.decoder import DecoderSamplingConfig
from unclip_pl.utils.commands import Option
from unclip_pl.utils.images import grid
from unclip_pl.utils.options import Count

Results = dict[str, dict[str, Any]]
"""By condition: `title`, `decoder_sees`, `fixed`, and where guidance is swept `sweep` and `best`,
of a prior also `prior_sweep`."""
Differences = dict[str, dict[str, dict[str, Difference]]]
"""By "fixed" or "best", condition and figure."""


@dataclass(frozen=True)
class ComparisonSettings(ReportOptions):
    """How conditions are compared, where it runs and where to it writes.

    Args:
        baseline: the condition from which the others' differences are computed
        num_images: images of each caption; figures are means over them
        guidance_scales: the decoder's, to sweep; none: no sweep
        prior_guidance_scales: both priors', to sweep before the decoder's; none: no sweep
        sweep_captions: sweep only the first so many captions; by default all
        resamples: random halves of the captions, for the intervals
        pictures: columns of the picture with the conditions side by side
    """

    baseline: str = "diffusion"
    num_images: Annotated[Count, Option(renamed="--seeds")] = 1
    guidance_scales: Annotated[Sequence[float], Option(may_be_empty=True)] = ()
    prior_guidance_scales: Annotated[Sequence[float], Option(may_be_empty=True)] = ()
    sweep_captions: Count | None = None
    resamples: Count = 200
    pictures: Count = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("guidance_scales", "prior_guidance_scales"):
            for scale in getattr(self, name):
                if not 1 <= scale < float("inf"):
                    option = name.replace("_", "-")
                    raise ValueError(f"--{option} has {scale}: give 1 (no guidance) or more.")
        if self.sweep_captions is not None and self.sweep_captions < LEAST:
            raise ValueError(f"--sweep-captions is {self.sweep_captions}: give {LEAST} or more.")
        if self.resamples < 2:
            raise ValueError(f"--resamples is {self.resamples}: a comparison needs 2 or more.")


class Comparison:
    """The images of all conditions and their figures.

    Args:
        conditions: to compare; their decoders draw images of one size.
        captions: for all of them.
        fixed: the decoder's settings; its guidance scale is that of the table "fixed".
        real: the real images.
    """

    def __init__(
        self,
        settings: ComparisonSettings,
        conditions: Sequence[Conditioning],
        captions: Sequence[Caption],
        evaluator: Evaluator,
        fixed: DecoderSamplingConfig,
        real: RealImages,
    ) -> None:
        self.settings, self.conditions, self.captions = settings, conditions, captions
        self.evaluator, self.fixed = evaluator, fixed
        self.key = evaluator.network.frechet
        self.sweep_count = min(settings.sweep_captions or len(captions), len(captions))
        self.text = evaluator.embed_captions(captions)
        self.best: dict[str, tuple[Conditioning, float]] = {}
        self.real_images, self.paired = real, not real.reference
        self.real = real.features(evaluator, captions)
        self.all_real = gather_ranks(self.real, settings.device)
        check_enough(len(self.all_real.number), "real images")
        self._floor_features = real.floor_features(evaluator)
        self._floors: dict[int, Floor | None] = {}
        self._features: dict[tuple[str, float | None, float], tuple[int, list[ImageFeatures]]] = {}

    def floor(self, count: int) -> Floor | None:
        """For images of `count` captions; None where there are too few real images."""
        if self._floor_features is None:
            return None
        if count not in self._floors:
            others = count if self.paired else len(self.all_real.number)
            self._floors[count] = compute_floor(
                self._floor_features, count, others, self.key, self.settings.seed
            )
        return self._floors[count]

    def at_floor(self, figures: Figures, images: Sequence[ImageFeatures]) -> list[str]:
        """The names of figures that are no worse than those of real images.

        With the captions' own pictures for reference, they must not be worse on the pictures of
        other captions either.
        """
        count = len(images[0].number)
        floor = self.floor(count)
        reached = [] if floor is None else floor.reached_by(figures)
        if reached and self.paired:
            real, seed = self.all_real.first(count).features, self.settings.seed
            others = reached_on_other_pictures(real, images, self.key, seed)
            reached = [name for name in reached if name in others]
        return reached

    def near_floor(self, one: Figures, other: Figures) -> set[str]:
        """The names of figures of all captions by which neither is called better.

        One of the two is at the floor, and the interval of the other reaches it.
        """
        floor = self.floor(len(self.captions))
        if floor is None:
            return set()
        at_floor = {*one["at_floor"], *other["at_floor"]}
        return at_floor & {*floor.near(one)} & {*floor.near(other)}

    def images(
        self, condition: Conditioning, scale: float, first: int | None = None, repeat: int = 0
    ) -> GeneratedImages:
        """The images of a condition at one guidance scale, in their own folder."""
        prior_scale = condition.prior_scale
        prior = "" if prior_scale is None else f"-prior-{prior_scale:g}"
        name = f"{condition.name}{prior}-{scale:g}" + (f"-{repeat}" if repeat else "")
        sampling = replace(self.fixed, guidance_scale=scale)
        return condition.generate(self.settings.out / "samples" / name, sampling, first, repeat)

    def features(self, condition: Conditioning, scale: float, count: int) -> list[ImageFeatures]:
        """Of this rank's images of the first `count` captions, one entry per image of a caption.

        Images that are missing are drawn.
        """
        place = condition.name, condition.prior_scale, scale
        known, features = self._features.get(place, (0, []))
        if known < count:
            features = []
            for repeat in range(self.settings.num_images):
                images = self.images(condition, scale, count, repeat)
                features.append(self.evaluator.extract(images.batches(self.settings.batch_size)))
            self._features[place] = count, features
        return [one.first(count) for one in features]

    def all_features(
        self, condition: Conditioning, scale: float, count: int
    ) -> list[ImageFeatures]:
        """The same for the images of all ranks, in the order of the captions."""
        own = self.features(condition, scale, count)
        return [gather_ranks(one, self.settings.device) for one in own]

    def mean_figures(self, condition: Conditioning, scale: float, count: int) -> Figures:
        """Of the images of the first `count` captions: means over the images per caption.

        `at_floor` names those that are no worse than real images have.
        """
        real = (self.real.first(count) if self.paired else self.real).features
        every = [
            self.evaluator.compute(real, one, self.text)
            for one in self.features(condition, scale, count)
        ]
        means = {
            name: fmean(figures[name] for figures in every) if isinstance(value, float) else value
            for name, value in every[0].items()
        }
        images = self.all_features(condition, scale, count)
        if self.paired:
            means |= paired_kid(self.all_real.first(count).features, images)
        means |= mean_clip_score(images, self.text)
        return means | {"at_floor": self.at_floor(means, images)}

    def full_figures(self, condition: Conditioning, scale: float) -> Figures:
        """Of all captions, with the intervals of the distances and the guidance scales."""
        count, settings = len(self.captions), self.settings
        figures = self.mean_figures(condition, scale, count)
        figures |= distance_intervals(
            self.all_real.features,
            self.all_features(condition, scale, count),
            self.key,
            settings.resamples,
            settings.seed,
            self.paired,
        )
        scales = {"guidance_scale": scale}
        if condition.prior_scale is not None:
            scales["prior_guidance_scale"] = condition.prior_scale
        return scales | figures | {"at_edge": []}

    def best_scale(self, sweep: Mapping[float, Figures]) -> float:
        """The guidance scale of the least Frechet distance.

        Of those at the floor, it is the scale of the highest CLIP score.
        """

        def order(scale: float) -> tuple[float, float]:
            figures = sweep[scale]
            if self.key in figures["at_floor"]:
                return 0.0, -figures["clip_score"]
            return figures[self.key], 0.0

        return min(sorted(sweep), key=order)

    def results(self) -> Results:
        """The figures of all conditions; their images are drawn if they are missing.

        The fixed scale comes first, for all conditions: it is what one looks at first.
        """
        results: Results = {
            condition.name: {
                "title": TITLES[condition.name],
                "decoder_sees": asdict(condition.inputs),
                "fixed": self.full_figures(condition, self.fixed.guidance_scale),
            }
            for condition in self.conditions
        }
        if self.sweeps:
            for condition in self.conditions:
                results[condition.name] |= self.sweep(condition)
        return results

    @property
    def sweeps(self) -> bool:
        """Whether any guidance is swept."""
        has_prior = any(condition.with_guidance for condition in self.conditions)
        of_priors = has_prior and bool(self.settings.prior_guidance_scales)
        return of_priors or bool(self.settings.guidance_scales)

    def sweep(self, condition: Conditioning) -> dict[str, Any]:
        """`best` of one condition, with `sweep` and of a prior `prior_sweep` where asked for.

        A prior's guidance is swept at the decoder's fixed scale, then the decoder's guidance at the
        prior's best scale. What is not swept stays at its fixed scale.
        """
        settings, fixed, count = self.settings, self.fixed.guidance_scale, self.sweep_count
        results, edges = {}, []
        if condition.with_guidance and settings.prior_guidance_scales:
            own = cast(float, condition.prior_scale)
            scales = sorted({*settings.prior_guidance_scales, own})
            priors = {scale: condition.with_guidance(scale) for scale in scales}
            priors[own] = condition  # has its embeddings already
            figures = {scale: self.mean_figures(priors[scale], fixed, count) for scale in priors}
            condition = priors[best := self.best_scale(figures)]
            if at_edge(best, figures):
                edges.append("prior_guidance_scale")
            results["prior_sweep"] = {f"{scale:g}": row for scale, row in figures.items()}
        best = fixed
        if settings.guidance_scales:
            scales = sorted({*settings.guidance_scales, fixed})
            figures = {scale: self.mean_figures(condition, scale, count) for scale in scales}
            best = self.best_scale(figures)
            if at_edge(best, figures):
                edges.append("guidance_scale")
            results["sweep"] = {f"{scale:g}": row for scale, row in figures.items()}
        self.best[condition.name] = condition, best
        results["best"] = self.full_figures(condition, best) | {"at_edge": edges}
        return results

    def differences(self, results: Results) -> Differences:
        """From the baseline, of all conditions at the fixed scale and of each at its best."""
        fixed = self.fixed.guidance_scale
        points = {"fixed": {condition.name: (condition, fixed) for condition in self.conditions}}
        if self.best:
            points["best"] = self.best
        return {
            kind: self._differences(scales, {name: results[name][kind] for name in scales})
            for kind, scales in points.items()
        }

    def _differences(
        self, scales: Mapping[str, tuple[Conditioning, float]], figures: Mapping[str, Figures]
    ) -> dict[str, dict[str, Difference]]:
        """By condition and figure; `scales` has each condition's guidance scale."""
        settings, count = self.settings, len(self.captions)
        features = {name: self.all_features(*scales[name], count) for name in scales}
        baseline = features.pop(settings.baseline)
        by_condition = {}
        for name, other in features.items():
            differences = paired_differences(
                baseline,
                other,
                self.text,
                self.all_real.features,
                settings.resamples,
                settings.seed,
                self.paired,
                self.key,
            )
            floored = self.near_floor(figures[settings.baseline], figures[name])
            by_condition[name] = {
                figure: replace(difference, at_floor=figure in floored)
                for figure, difference in differences.items()
            }
        return by_condition

    def side_by_side(self) -> tuple[Image.Image, list[int]]:
        """A picture of the conditions at the fixed scale, and the numbers of its captions.

        The first row has the real pictures if there are any, each other row a condition. The
        columns are captions, spread over all of them.
        """
        count = min(self.settings.pictures, len(self.captions))
        step = (len(self.captions) - 1) / max(1, count - 1)
        numbers = [round(k * step) for k in range(count)]
        real = [self.captions[k].image for k in numbers]
        rows, labels = [], []
        if all(real):
            size = self.conditions[0].model.size
            rows.append(torch.stack([decode(cast(bytes, image), size) for image in real]))
            labels.append("real picture")
        for condition in self.conditions:
            rows.append(self.images(condition, self.fixed.guidance_scale).load(numbers))
            labels.append(TITLES[condition.name].partition(" (")[0])
        return grid(rows, labels), numbers


def at_edge(scale: float, swept: Mapping[float, Any]) -> bool:
    """Whether the best of several scales is the least or the greatest."""
    return len(swept) > 1 and scale in (min(swept), max(swept))
