"""Frechet distance, CLIP score, precision and recall of a decoder over guidance scales.

Fig. 11 and 13 of the paper; and over sampling steps and samplers.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval import conditioning, report
from eval.captions import Caption, read_captions
from eval.commands import Figures, choose_features, command_parser, run_command, settings_from
from eval.conditioning import Conditioning
from eval.evaluator import (
    METRIC_TITLES,
    Evaluator,
    add_evaluator_options,
    choose_score_clip,
    gather_ranks,
    metric_titles,
)
from eval.floor import (
    NO_FLOOR,
    RealImages,
    add_reference_options,
    compute_floor,
    reached_on_other_pictures,
)
from eval.generated import GeneratedImages, captions_digest
from eval.paired import paired_kid
from eval.source import (
    Model,
    add_generation_options,
    choose_prior,
    decoder_path,
    default_condition,
    describe_weights,
)
from eval.tables import Section, body, floor_row
from unclip_pl.pipeline.unclip import CONDITIONS
from unclip_pl.pipeline.weights import DEFAULT_PRIORS
from unclip_pl.stages.decoder import Decoder, DecoderSamplingConfig
from unclip_pl.utils.distributed import rank
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import grid, save_png
from unclip_pl.utils.options import (
    SAMPLERS,
    SPACING_HELP,
    add_prior_option,
    override_sampling,
    spacing,
)

SCALES = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
SETTINGS_HEADERS = ("sampler", "steps", "guidance")
"""The first columns of the table."""
PICTURES = 8
"""Columns of the picture with all points side by side."""
Curves = dict[str, list[DecoderSamplingConfig]]
"""The points of each curve: "guidance", and one per sampler over steps."""


def build_parser() -> argparse.ArgumentParser:
    """Make the parser: the model, its condition, and the settings to sweep."""
    parser = command_parser(__doc__, "eval.sweep", batch_size=32)
    parser.set_defaults(out=Path("out/sweep"))
    add = parser.add_argument
    add(
        "--decoder",
        "--ckpt",
        default="openmoji",
        help='a checkpoint or release; "openmoji": the package\'s',
    )
    add_prior_option(parser)
    add(
        "--condition",
        choices=[*CONDITIONS, "image"],
        help="what the decoder has for an image embedding; image: that of the caption's picture; "
        "by default the prior's, or the text's for a decoder that was trained on text embeddings",
    )
    add_generation_options(parser)
    add_reference_options(parser)
    scales: dict[str, Any] = {"type": float, "nargs": "*", "default": list(SCALES)}
    add("--guidance-scales", **scales, help="to sweep; none: no such curve")
    add("--sweep-steps", type=spacing, nargs="*", default=[], help=SPACING_HELP)
    add(
        "--sweep-samplers",
        nargs="*",
        default=[],
        choices=SAMPLERS,
        help="samplers, each with all of --sweep-steps",
    )
    add_evaluator_options(parser)
    return parser


def build_curves(arguments: argparse.Namespace, decoder: Decoder) -> Curves:
    """The settings of all points, by curve.

    Raises:
        UserError: a setting is impossible; found before anything is drawn.
    """

    def point(**settings: Any) -> DecoderSamplingConfig:
        return override_sampling(decoder, vars(arguments) | settings)

    own = point()
    scales = sorted({*arguments.guidance_scales})
    curves = {"guidance": [point(guidance_scale=scale) for scale in scales]}
    samplers = arguments.sweep_samplers or ([own.sampler] if arguments.sweep_steps else [])
    for sampler in samplers:
        spacings = dict.fromkeys(arguments.sweep_steps or [own.steps])
        curve = [point(sampler=sampler, steps=steps) for steps in spacings]
        curves[sampler] = sorted(curve, key=lambda sampling: count_steps(decoder, sampling))
    curves = {name: curve for name, curve in curves.items() if curve}
    if not curves:
        raise UserError(
            "There is nothing to sweep: give --guidance-scales, --sweep-steps or --sweep-samplers."
        )
    return curves


def load_condition(
    arguments: argparse.Namespace, captions: Sequence[Caption], model: Model
) -> Conditioning:
    """The condition under which the decoder is swept."""
    place = (captions, arguments.seed)
    if arguments.condition == "caption":
        return conditioning.from_caption(model, *place)
    if arguments.condition == "text":
        return conditioning.from_text(model, *place)
    if arguments.condition == "image":
        if not all(caption.image for caption in captions):
            raise UserError(
                f"The captions of {arguments.captions} have no pictures whose embeddings could be "
                "taken: choose another --condition."
            )
        return conditioning.from_image(model, *place)
    sampling = override_sampling(model.unclip.prior, vars(arguments), "prior_")
    name = str(model.prior)
    weights = describe_weights(DEFAULT_PRIORS.get(name, Path(name)))
    return conditioning.from_prior("prior", model, model.unclip, weights, sampling, *place)


def run(arguments: argparse.Namespace) -> Figures:
    """Draw and evaluate each point; rank 0 writes the table, the curves and the pictures."""
    decoder_folder = decoder_path(arguments.decoder)
    arguments.condition = arguments.condition or default_condition(decoder_folder)
    prior = choose_prior(arguments, arguments.condition)
    model = settings_from(Model, arguments, decoder=decoder_folder, prior=prior)
    captions = read_captions(arguments.captions, arguments.num_captions, model.size)
    real = settings_from(RealImages, arguments, size=arguments.reference_size or model.size)
    real.check(captions)
    decoder = model.unclip.decoder
    curves = build_curves(arguments, decoder)
    condition = load_condition(arguments, captions, model)
    conditioning_clip = model.unclip.clip.fingerprint()
    evaluator = Evaluator(
        choose_features(arguments.features, arguments.captions),
        choose_score_clip(arguments.score_clip, conditioning_clip),
        arguments.device,
        arguments.precision,
    )
    notes = evaluator.shared_clip_warnings(conditioning_clip)
    text, reference = evaluator.embed_captions(captions), real.features(evaluator, captions)
    all_real = gather_ranks(reference, arguments.device).features
    key, count = evaluator.network.frechet, len(all_real)
    floor, others = None, real.floor_features(evaluator)
    if others is not None:
        floor = compute_floor(others, len(captions), count, key, arguments.seed)
    if floor is None:
        notes.append(NO_FLOOR.format(len(captions) + count))
    results: dict[str, list[Figures]] = {name: [] for name in curves}
    rows, images = [], {}
    for name, curve in curves.items():
        for sampling in curve:
            drawn = condition.generate(arguments.out / "samples" / folder_name(sampling), sampling)
            features = evaluator.extract(drawn.batches(arguments.batch_size))
            figures = evaluator.compute(reference.features, features, text)
            every = [gather_ranks(features, arguments.device)]
            if real.reference is None:
                figures |= paired_kid(all_real, every)
            reached = floor.reached_by(figures) if floor else []
            if reached and real.reference is None:
                others = reached_on_other_pictures(all_real, every, key, arguments.seed)
                reached = [name for name in reached if name in others]
            figures["at_floor"] = reached
            steps = {"step_count": count_steps(decoder, sampling)}
            results[name].append(asdict(sampling) | steps | figures)
            images[f"{sampling.sampler} {sampling.steps}, {sampling.guidance_scale:g}"] = drawn
            rows.append(table_row(sampling, figures, key))
    rows.append(floor_row(floor, key))
    notes += figures["notes"]
    settings = model.settings | {
        "size": model.size,
        "condition": arguments.condition,
        "the decoder sees": str(condition.inputs),
        "prior sampling": condition.settings.get("prior_sampling"),
        "captions": f"{arguments.captions} ({len(captions)})",
        "captions sha256": captions_digest(captions),
        "reference": real.reference or "the captions' own pictures",
        "reference size": real.size,
        "floor": real.floor_path,
        "features": evaluator.network.name,
        "CLIP that scores": str(evaluator.clip.config),
        "seed": arguments.seed,
    }
    if rank() == 0:
        table = Section("Sweep", [*SETTINGS_HEADERS, *metric_titles(key).values()], rows)
        save_side_by_side(arguments.out / "sweep.png", images, captions)
        write(arguments.out, results, body([table], notes), settings, key)
    return {
        "curves": results,
        "floor": None if floor is None else asdict(floor),
        "notes": notes,
        "settings": settings,
    }


def count_steps(decoder: Decoder, sampling: DecoderSamplingConfig) -> int:
    """How many steps the settings take: the place of their point on the axis."""
    return len(decoder.process.schedule.respaced(sampling.steps))


def folder_name(sampling: DecoderSamplingConfig) -> str:
    """The name of a point's folder."""
    steps = str(sampling.steps).replace(" ", "")
    return f"{sampling.sampler}-{steps}-{sampling.guidance_scale:g}"


def table_row(sampling: DecoderSamplingConfig, figures: Figures, key: str) -> list[str]:
    """One point's line of the table; `key` is that of the Frechet distance."""
    cells = []
    for name in metric_titles(key):
        text = f"{figures[name] * (1000 if name == 'kid' else 1):.4g}"
        cells.append(f"{text}, at the floor" if name in figures["at_floor"] else text)
    return [sampling.sampler, str(sampling.steps), f"{sampling.guidance_scale:g}", *cells]


def save_side_by_side(
    path: Path, images: dict[str, GeneratedImages], captions: Sequence[Caption]
) -> None:
    """A picture with a row per point and a column per caption, of the first ones."""
    numbers = range(min(PICTURES, len(captions)))
    picture = grid([drawn.load(numbers) for drawn in images.values()], list(images))
    save_png(picture, path, captions="; ".join(captions[k].text for k in numbers))


def build_panels(results: dict[str, list[Figures]], key: str) -> list[report.Panel]:
    """A plot of each figure over guidance and over steps, and of the CLIP score over recall."""
    guidance = results.get("guidance", [])
    samplers = {name: points for name, points in results.items() if name != "guidance"}
    panels = []
    for figure, title in metric_titles(key).items():
        label = title.removesuffix(" x 1000")
        if guidance:
            points = [(point["guidance_scale"], point[figure]) for point in guidance]
            panels.append(report.Panel("guidance scale", label, {"guidance": points}))
        if samplers:
            lines = {
                name: [(point["step_count"], point[figure]) for point in points]
                for name, points in samplers.items()
            }
            panels.append(report.Panel("sampling steps", label, lines))
    if guidance:  # Fig. 13 of the paper sets recall against what guidance improves
        points = [(point["recall"], point["clip_score"]) for point in guidance]
        panels.append(report.Panel("recall", METRIC_TITLES["clip_score"], {"guidance": points}))
    return panels


def write(
    out: Path, results: dict[str, list[Figures]], table: str, settings: dict[str, Any], key: str
) -> None:
    """sweep.md, sweep-curves.png and TensorBoard's events; prints the table."""
    print(table)
    panels = build_panels(results, key)
    report.write_curves(out / "sweep-curves.png", panels)
    pictures = {"Curves": "sweep-curves.png", "Side by side": "sweep.png"}
    report.write_report(out / "sweep.md", "Sweep", table, pictures, settings)
    scalars = {
        f"{panel.y} over {panel.x}/{name}": points
        for panel in panels
        for name, points in panel.lines.items()
        if panel.x != "recall"
    }
    report.write_tensorboard(out / "tensorboard", scalars)


def main(words: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    return run_command(build_parser(), run, words)


if __name__ == "__main__":
    sys.exit(main())
