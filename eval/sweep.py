"""`python -m eval.sweep`: the figures of a decoder over guidance scales, steps and samplers."""

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from eval import conditioning, report
from eval.captions import Caption, require_captions
from eval.commands import Figures, ReportOptions, run_command
from eval.conditioning import Conditioning
from eval.evaluator import (
    METRIC_TITLES,
    EvaluatorOptions,
    gather_ranks,
    metric_titles,
)
from eval.floor import (
    NO_FLOOR,
    Floor,
    ReferenceOptions,
    check_enough,
    compute_floor,
    reached_on_other_pictures,
)
from eval.generated import GeneratedImages, captions_digest
from eval.paired import paired_kid
from eval.source import (
    DrawingOptions,
    Model,
    choose_prior,
    default_condition,
)
from eval.tables import Section, body, floor_line, floor_row, number
from unclip_pl.pipeline.locate import require_weights
from unclip_pl.stages.decoder import Decoder, DecoderSamplingConfig
from unclip_pl.utils.commands import Option
from unclip_pl.utils.distributed import rank
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import grid
from unclip_pl.utils.options import GuidedSamplingOptions, Sampler, Spacing, check_sampling
from unclip_pl.utils.outputs import OutputFolder

SCALES = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
SETTINGS_HEADERS = ("sampler", "steps", "guidance")
"""The first columns of the table."""
PICTURES = 8
"""Columns of the picture with all points side by side."""
DEFAULTS = ReportOptions(out=Path("out/sweep"))
SweepCondition = Literal["prior", "text", "caption", "image"]
Curves = dict[str, list[DecoderSamplingConfig]]
"""The points of each curve: "guidance", and one per sampler over steps."""


@dataclass(frozen=True)
class SweepOptions:
    """What is swept.

    Args:
        guidance_scales: to sweep; none: no such curve
        sweep_steps: spacings of the sampling steps, each as of --steps
        sweep_samplers: samplers, each with all of --sweep-steps
    """

    guidance_scales: Annotated[Sequence[float], Option(may_be_empty=True)] = SCALES
    sweep_steps: Sequence[Spacing] = ()
    sweep_samplers: Sequence[Sampler] = ()

    def __post_init__(self) -> None:
        if not (self.guidance_scales or self.sweep_steps or self.sweep_samplers):
            raise UserError(
                "There is nothing to sweep: give --guidance-scales, --sweep-steps or "
                "--sweep-samplers."
            )
        for steps in self.sweep_steps:
            check_sampling({"steps": steps})
        for scale in self.guidance_scales:
            check_sampling({"guidance_scale": scale})


def build_curves(sweep: SweepOptions, sampling: GuidedSamplingOptions, decoder: Decoder) -> Curves:
    """The settings of all points, by curve.

    Raises:
        UserError: a setting is impossible; found before anything is drawn.
    """

    def point(**settings: Any) -> DecoderSamplingConfig:
        return sampling.of(decoder, **settings)

    own = point()
    scales = sorted({*sweep.guidance_scales})
    curves = {"guidance": [point(guidance_scale=scale) for scale in scales]}
    samplers: Sequence[str] = sweep.sweep_samplers or ([own.sampler] if sweep.sweep_steps else [])
    for sampler in samplers:
        spacings = dict.fromkeys(sweep.sweep_steps or [own.steps])
        curve = [point(sampler=sampler, steps=steps) for steps in spacings]
        curves[sampler] = sorted(curve, key=decoder.count_steps)
    return {name: curve for name, curve in curves.items() if curve}


def load_condition(
    name: SweepCondition,
    drawing: DrawingOptions,
    captions: Sequence[Caption],
    model: Model,
    seed: int,
) -> Conditioning:
    """The condition under which the decoder is swept."""
    place = (captions, seed)
    if name == "caption":
        return conditioning.from_caption(model, *place)
    if name == "text":
        return conditioning.from_text(model, *place)
    if name == "image":
        if not all(caption.image for caption in captions):
            raise UserError(
                f"The captions of {drawing.captions} have no pictures whose embeddings could be "
                "taken: choose another --condition."
            )
        return conditioning.from_image(model, *place)
    sampling = drawing.prior_sampling.of(model.unclip.prior)
    weights = model.settings["prior"]
    return conditioning.from_prior("prior", model, model.unclip, weights, sampling, *place)


def run(
    *,
    decoder: Annotated[str, Option(alias="--ckpt")] = "openmoji",
    prior: str | None = None,
    condition: SweepCondition | None = None,
    drawing: DrawingOptions,
    real: ReferenceOptions,
    sweep: SweepOptions,
    evaluation: EvaluatorOptions,
    options: ReportOptions = DEFAULTS,
) -> Figures:
    """Frechet distance, CLIP score, precision and recall of a decoder over guidance scales.

    Fig. 11 and 13 of the paper; and over sampling steps and samplers.

    Args:
        decoder: a checkpoint or release; "openmoji": the package's
        prior: "diffusion" (the default) or "ar", those in the package; or a checkpoint or release
        condition: what the decoder has for an image embedding; image: that of the caption's
            picture; by default the prior's, or what the decoder was trained on (text embeddings,
            captions only)
        drawing: what is drawn and how
        real: which images are the real ones
        sweep: what is swept
        evaluation: what evaluates
        options: where and how it runs
    """
    require_weights(decoder, prior, drawing.upsamplers or ())
    require_captions(drawing.captions)
    real.require()
    condition = condition or default_condition(decoder)
    prior = choose_prior(prior, drawing.prior_sampling, condition)
    model = Model.of(options, decoder, prior, drawing.upsamplers)
    captions = drawing.read_captions(model.size)
    images = real.images(drawing.captions, evaluation.reference_size or model.size, options)
    images.check(captions)
    stage = model.unclip.decoder
    curves = build_curves(sweep, drawing.sampling, stage)
    inputs = load_condition(condition, drawing, captions, model, options.seed)
    evaluator = evaluation.load(drawing.captions, model.conditioning_clip, options)
    notes = evaluator.shared_clip_warnings(model.conditioning_clip)
    text, reference = evaluator.embed_captions(captions), images.features(evaluator, captions)
    all_real = gather_ranks(reference, options.device).features
    key, count = evaluator.network.frechet, len(all_real)
    check_enough(count, "real images")
    floor, others = None, images.floor_features(evaluator)
    if others is not None:
        floor = compute_floor(others, len(captions), count, key, options.seed)
    if floor is None:
        notes.append(NO_FLOOR.format(len(captions) + count))
    results: dict[str, list[Figures]] = {name: [] for name in curves}
    rows, points = [], {}
    for name, curve in curves.items():
        for sampling in curve:
            drawn = inputs.generate(options.out / "samples" / folder_name(sampling), sampling)
            features = evaluator.extract(drawn.batches(options.batch_size))
            figures = evaluator.compute(reference.features, features, text)
            every = [gather_ranks(features, options.device)]
            if images.reference is None:
                figures |= paired_kid(all_real, every)
            reached = floor.reached_by(figures) if floor else []
            if reached and images.reference is None:
                elsewhere = reached_on_other_pictures(all_real, every, key, options.seed)
                reached = [name for name in reached if name in elsewhere]
            figures["at_floor"] = reached
            steps = {"step_count": stage.count_steps(sampling)}
            results[name].append(asdict(sampling) | steps | figures)
            points[f"{sampling.sampler} {sampling.steps}, {sampling.guidance_scale:g}"] = drawn
            rows.append(table_row(sampling, figures, key))
    rows.append(floor_row(floor, key))
    notes += figures["notes"]
    settings = model.settings | {
        "size": model.size,
        "condition": condition,
        "the decoder sees": str(inputs.inputs),
        "prior sampling": inputs.settings.get("prior_sampling"),
        "captions": f"{drawing.captions} ({len(captions)})",
        "captions sha256": captions_digest(captions),
        "reference": images.reference or "the captions' own pictures",
        "reference size": images.size,
        "floor": images.floor_path,
        "features": evaluator.network.name,
        "CLIP that scores": str(evaluator.clip.config),
        "seed": options.seed,
    }
    if rank() == 0:
        table = Section("Sweep", [*SETTINGS_HEADERS, *metric_titles(key).values()], rows)
        out = options.open_out()
        picture = save_side_by_side(out, points, captions)
        write(out, picture, results, body([table], notes), settings, key, floor)
    return {
        "curves": results,
        "floor": None if floor is None else asdict(floor),
        "notes": notes,
        "settings": settings,
    }


def folder_name(sampling: DecoderSamplingConfig) -> str:
    """The name of a point's folder."""
    steps = str(sampling.steps).replace(" ", "")
    return f"{sampling.sampler}-{steps}-{sampling.guidance_scale:g}"


def table_row(sampling: DecoderSamplingConfig, figures: Figures, key: str) -> list[str]:
    """One point's line of the table; `key` is that of the Frechet distance."""
    cells = []
    for name in metric_titles(key):
        text = number(figures[name] * (1000 if name == "kid" else 1))
        cells.append(f"{text}, at the floor" if name in figures["at_floor"] else text)
    return [sampling.sampler, str(sampling.steps), f"{sampling.guidance_scale:g}", *cells]


def save_side_by_side(
    out: OutputFolder, images: dict[str, GeneratedImages], captions: Sequence[Caption]
) -> Path:
    """Write sweep.png: a row per point and a column per caption, of the first ones."""
    numbers = range(min(PICTURES, len(captions)))
    picture = grid([drawn.load(numbers) for drawn in images.values()], list(images))
    texts = "; ".join(captions[k].text for k in numbers)
    return out.write_picture("sweep.png", picture, captions=texts)


def build_panels(
    results: dict[str, list[Figures]], key: str, floor: Floor | None = None
) -> list[report.Panel]:
    """A plot of each figure over guidance and over steps, and of the CLIP score over recall."""
    guidance = results.get("guidance", [])
    samplers = {name: points for name, points in results.items() if name != "guidance"}
    panels = []
    for figure, title in metric_titles(key).items():
        label = title.removesuffix(" x 1000")
        if guidance:
            points = [(point["guidance_scale"], point[figure]) for point in guidance]
            lines: dict[str, report.Points] = {"guidance": points}
            lines |= floor_line(floor, figure, points)
            panels.append(report.Panel("guidance scale", label, lines))
        if samplers:
            lines = {
                name: [(point["step_count"], point[figure]) for point in points]
                for name, points in samplers.items()
            }
            every = [point for points in lines.values() for point in points]
            lines |= floor_line(floor, figure, every)
            panels.append(report.Panel("sampling steps", label, lines))
    if guidance:  # Fig. 13 of the paper sets recall against what guidance improves
        points = [(point["recall"], point["clip_score"]) for point in guidance]
        panels.append(report.Panel("recall", METRIC_TITLES["clip_score"], {"guidance": points}))
    return panels


def write(
    out: OutputFolder,
    picture: Path,
    results: dict[str, list[Figures]],
    table: str,
    settings: dict[str, Any],
    key: str,
    floor: Floor | None,
) -> None:
    """sweep.md, sweep-curves.png and TensorBoard's events; prints the table."""
    print(table)
    panels = build_panels(results, key, floor)
    curves = report.write_curves(out, "sweep-curves.png", panels)
    pictures = {"Curves": curves, "Side by side": picture}
    written = report.write_report(out, "sweep.md", "Sweep", table, pictures, settings)
    scalars = {
        f"{panel.y} over {panel.x}/{name}": points
        for panel in panels
        for name, points in panel.lines.items()
        if panel.x != "recall"
    }
    report.write_tensorboard(out, written, scalars)


def main(words: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    return run_command(run, "eval.sweep", words)


if __name__ == "__main__":
    sys.exit(main())
