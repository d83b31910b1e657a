"""`python -m eval.compare`: does it help to draw a CLIP image embedding first?"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from eval import conditioning, report
from eval.captions import Caption, require_captions
from eval.commands import Figures, RunOptions, run_command
from eval.comparison import Comparison, ComparisonSettings, Differences, Results
from eval.conditioning import TITLES, Conditioning
from eval.evaluator import EvaluatorOptions, metric_titles
from eval.floor import NO_FLOOR, Floor, ReferenceOptions
from eval.generated import captions_digest
from eval.metrics import FRECHET
from eval.source import DrawingOptions, Model, describe_weights, refuse_options
from eval.tables import (
    Section,
    body,
    condition_headers,
    condition_row,
    difference_headers,
    difference_row,
    floor_line,
    floor_row,
    real_row,
)
from unclip_pl.clip.fingerprint import require_same
from unclip_pl.pipeline.locate import locate, require_weights
from unclip_pl.pipeline.unclip import Prior
from unclip_pl.pipeline.weights import load_stage
from unclip_pl.stages.ar_prior import ARPrior
from unclip_pl.stages.diffusion_prior import DiffusionPrior
from unclip_pl.utils.commands import Option
from unclip_pl.utils.distributed import rank
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.options import PriorSamplingOptions

SCALES = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
CHOSEN = (
    "The best guidance is chosen by the figures of these captions, and that of a prior as well: "
    "the table of the best flatters all conditions, most of all the priors, and its intervals "
    "leave this out. Of several scales at the floor, the best is the one of the highest CLIP score."
)
PRIORS: dict[str, tuple[type[Prior], dict[str, float | None]]] = {
    "ar": (ARPrior, {"guidance_scale": 1.0, "temperature": 1.0, "top_p": 1.0}),
    "diffusion": (DiffusionPrior, {"guidance_scale": 1.0, "sampler": None, "steps": None}),
}
"""Each prior's stage, and those of its settings that have an option, with their defaults here; None
is the prior's own. Both priors draw from what they have learned: the same guidance, nothing cut
off."""


@dataclass(frozen=True)
class ConditionOptions:
    """What is compared.

    Args:
        decoder: a checkpoint or release; "openmoji": the package's
        text_decoder: one trained on text embeddings; by default it is left out
        diffusion_prior: a checkpoint or release, or "none"
        ar_prior: a checkpoint or release, or "none"
    """

    decoder: Annotated[str, Option(alias="--ckpt")] = "openmoji"
    text_decoder: str | None = None
    diffusion_prior: str = "diffusion"
    ar_prior: str = "ar"

    @property
    def priors(self) -> dict[str, str]:
        """The priors by the names of their conditions; "none" where one is left out."""
        return {"ar": self.ar_prior, "diffusion": self.diffusion_prior}

    def require(self) -> None:
        """UserError for the first of the models that is not there, before one is loaded."""
        for decoder in (self.decoder, self.text_decoder):
            require_weights(decoder)
        for prior in self.priors.values():
            require_weights(prior=None if prior == "none" else prior)


DEFAULTS = ComparisonSettings(
    out=Path("out/compare"), guidance_scales=SCALES, prior_guidance_scales=SCALES
)


def load_conditions(
    asked: ConditionOptions,
    drawing: DrawingOptions,
    options: ComparisonSettings,
    model: Model,
    captions: Sequence[Caption],
) -> tuple[list[Conditioning], list[str]]:
    """The conditions in the paper's order, and a sentence for each that is left out."""
    if model.unclip.decoder.condition == "none":
        raise UserError(
            f"The decoder {model.decoder} reads captions only, and these conditions differ in its "
            "embedding: give --decoder one trained on images."
        )
    if model.unclip.decoder.condition != "image":
        raise UserError(
            f"The decoder {model.decoder} was trained on text embeddings: give it as "
            "--text-decoder, and as --decoder one trained on images."
        )
    place, notes = (captions, options.seed), []
    conditions = [
        conditioning.from_caption(model, *place),
        conditioning.from_text(model, *place),
    ]
    if asked.text_decoder:
        text_model = load_text_decoder(asked.text_decoder, options, model)
        conditions.append(conditioning.from_text(text_model, *place, "text-decoder"))
    else:
        notes.append(
            "No decoder trained on text embeddings was given (--text-decoder), so that condition "
            "is left out."
        )
    for name, path in asked.priors.items():
        if path == "none":
            notes.append(f"The condition of the {TITLES[name]} is left out, as asked.")
        else:
            conditions.append(
                load_prior(name, path, drawing.prior_sampling, model, captions, options.seed)
            )
    if all(caption.image for caption in captions):
        conditions.append(conditioning.from_image(model, *place))
    else:
        notes.append(
            f"The captions of {drawing.captions} have no pictures, so the condition of the true "
            "image embedding is left out."
        )
    return conditions, notes


def check_prior_options(
    asked: ConditionOptions, sampling: PriorSamplingOptions, options: ComparisonSettings
) -> None:
    """UserError where an option is given that no prior of this comparison has."""
    drawing = [name for name, path in asked.priors.items() if path != "none"]
    useful = {f"--prior-{field.replace('_', '-')}" for name in drawing for field in PRIORS[name][1]}
    useless = [option for option in sampling.given() if option not in useful]
    left_out = " and ".join(f"--{name}-prior none" for name in PRIORS if name not in drawing)
    refuse_options(useless, f"is for a prior that {left_out} leaves out")
    if not drawing and {*options.prior_guidance_scales} - {*SCALES}:
        raise UserError(
            "--prior-guidance-scales is for priors, and both are left out: leave it out as well."
        )


def check_baseline(baseline: str, conditions: Sequence[str]) -> None:
    """UserError where the baseline is none of the conditions."""
    if baseline not in conditions:
        raise UserError(
            f"--baseline is {baseline}, and the conditions are {', '.join(conditions)}: name one "
            "of them."
        )


def load_prior(
    name: str,
    given: str,
    options: PriorSamplingOptions,
    model: Model,
    captions: Sequence[Caption],
    seed: int,
) -> Conditioning:
    """The condition of a prior, with the settings that the options ask for."""
    kind, settings = PRIORS[name]
    path = locate("prior", given)
    prior = load_stage(path, kind)
    asked = {field: getattr(options, field) for field in settings}
    changes: dict[str, Any] = {
        field: default if asked[field] is None else asked[field]
        for field, default in settings.items()
    }
    sampling = PriorSamplingOptions(**changes).of(prior)
    unclip, weights = model.with_prior(prior), describe_weights(path)
    return conditioning.from_prior(name, model, unclip, weights, sampling, captions, seed)


def load_text_decoder(path: str, options: RunOptions, model: Model) -> Model:
    """The decoder trained on text embeddings.

    Raises:
        UserError: it cannot be compared with `model`.
    """
    other = Model.of(options, path, upsamplers=model.upsamplers)
    if other.unclip.decoder.condition != "text":
        raise UserError(
            f"The decoder {other.decoder} was not trained on text embeddings: give --text-decoder "
            "one of stages/decoder_text.yaml."
        )
    fingerprint = model.unclip.decoder.clip_fingerprint or {}
    require_same(fingerprint, other.unclip.clip.fingerprint(), "The decoder")
    if other.size != model.size:
        raise UserError(
            f"The two decoders draw images of {model.size} and {other.size} pixels: compare "
            "decoders of one size."
        )
    return other


def run(
    *,
    asked: ConditionOptions,
    drawing: DrawingOptions,
    real: ReferenceOptions,
    evaluation: EvaluatorOptions,
    options: ComparisonSettings = DEFAULTS,
) -> Figures:
    """Does it help to draw a CLIP image embedding first? (unCLIP, section 5.1)

    The same captions, seeds and noise under six conditions: the caption only; the text embedding
    instead of the image embedding; a decoder trained on text embeddings; the AR prior; the
    diffusion prior; the true image embedding, an upper bound. The table says what reaches the
    decoder in each. The guidance of the priors and of the decoder is swept: one table has all
    conditions at one guidance, another has each at its best.

    Args:
        prior_guidance_scale: 1: no guidance; by default 1
        prior_temperature: of an autoregressive prior: divides its logits; by default 1
        prior_top_p: of an autoregressive prior: share of the likeliest codes drawn from; by
            default 1
        asked: the models
        drawing: what is drawn and how
        real: which images are the real ones
        evaluation: what evaluates
        options: where and how it runs
    """
    asked.require()
    require_weights(upsamplers=drawing.upsamplers or ())
    require_captions(drawing.captions)
    real.require()
    check_prior_options(asked, drawing.prior_sampling, options)
    check_baseline(options.baseline, [*TITLES])
    model = Model.of(options, asked.decoder, upsamplers=drawing.upsamplers)
    captions = drawing.read_captions(model.size)
    conditions, notes = load_conditions(asked, drawing, options, model, captions)
    check_baseline(options.baseline, [condition.name for condition in conditions])
    size = evaluation.reference_size or model.size
    images = real.images(drawing.captions, size, options)
    images.check(captions)
    fixed = drawing.sampling.of(model.unclip.decoder)
    conditioning_clip = model.unclip.clip.fingerprint()
    evaluator = evaluation.load(drawing.captions, conditioning_clip, options)
    notes += evaluator.shared_clip_warnings(conditioning_clip)
    comparison = Comparison(options, conditions, captions, evaluator, fixed, images)
    results = comparison.results()
    differences = comparison.differences(results)
    real_figures = None
    if comparison.paired:
        real_figures = evaluator.compute(None, comparison.real, comparison.text)
    floor = comparison.floor(len(captions))
    if floor is None:
        notes.append(NO_FLOOR.format(len(captions) + len(comparison.all_real.number)))
    notes += results["caption"]["fixed"]["notes"]
    if comparison.sweeps:
        notes.append(CHOSEN)
    description = describe(drawing, comparison)
    if rank() == 0:
        sections = build_sections(comparison, results, real_figures, differences)
        write(comparison, results, body(sections, notes), description)
    return {
        "conditions": results,
        "real": real_figures,
        "floor": None if floor is None else asdict(floor),
        "differences": as_plain(differences),
        "baseline": options.baseline,
        "notes": notes,
        "settings": description,
    }


def describe(drawing: DrawingOptions, comparison: Comparison) -> dict[str, Any]:
    """All that the figures depend on: weights with their digests, settings, real images."""
    by_name = {condition.name: condition for condition in comparison.conditions}
    model, text = by_name["caption"].model, by_name.get("text-decoder")
    priors = {
        TITLES[condition.name]: condition.settings["prior"] | condition.settings["prior_sampling"]
        for condition in comparison.conditions
        if condition.prior_scale is not None
    }
    real, settings = comparison.real_images, comparison.settings
    return {
        "decoder": model.settings["decoder"],
        "decoder trained on text embeddings": text and text.model.settings["decoder"],
        **priors,
        "upsamplers": model.settings["upsamplers"],
        "precision": model.precision,
        "size": model.size,
        "captions": f"{drawing.captions} ({len(comparison.captions)})",
        "captions sha256": captions_digest(comparison.captions),
        "images per caption": settings.num_images,
        **asdict(comparison.fixed),
        "guidance scales": [*settings.guidance_scales],
        "guidance scales of priors": [*settings.prior_guidance_scales] if priors else [],
        "sweep over": f"the first {comparison.sweep_count}",
        "reference": real.reference or "the captions' own pictures",
        "reference size": real.size,
        "floor": real.floor_path,
        "features": comparison.evaluator.network.name,
        "CLIP that scores": str(comparison.evaluator.clip.config),
        "resamples": settings.resamples,
        "seed": settings.seed,
    }


def as_plain(differences: Differences) -> dict[str, Any]:
    """The differences as JSON can hold them."""
    return {
        kind: {
            condition: {
                name: asdict(difference) | {"sure": difference.sure}
                for name, difference in figures.items()
            }
            for condition, figures in by_condition.items()
        }
        for kind, by_condition in differences.items()
    }


def build_sections(
    comparison: Comparison, results: Results, real: Figures | None, differences: Differences
) -> list[Section]:
    """Build the tables of the report.

    They show all conditions at the fixed guidance, each condition at its best guidance, and the
    differences in both.
    """
    key, baseline = comparison.key, TITLES[comparison.settings.baseline]
    last = [] if real is None else [real_row(real)]
    last.append(floor_row(comparison.floor(len(comparison.captions)), key))
    inputs = {condition.name: str(condition.inputs) for condition in comparison.conditions}
    titles = {
        "fixed": f"guidance {comparison.fixed.guidance_scale:g} for all",
        "best": "each at its best guidance "
        f"(least {FRECHET[key]} over {comparison.sweep_count} captions)",
    }
    sections = []
    for kind, by_condition in differences.items():
        title = titles[kind]
        rows = [condition_row(name, inputs[name], results[name][kind], key) for name in results]
        sections.append(Section(title[:1].upper() + title[1:], condition_headers(key), rows + last))
        rows = [difference_row(name, figures, key) for name, figures in by_condition.items()]
        name = f"Differences from the {baseline}, {title}"
        sections.append(Section(name, difference_headers(baseline, key), rows))
    return sections


def build_panels(results: Results, key: str, floor: Floor | None = None) -> list[report.Panel]:
    """A plot of each figure over what was swept, with a line per condition and the floor."""
    panels = []
    axes = {"sweep": "guidance scale", "prior_sweep": "guidance scale of the prior"}
    for sweep, axis in axes.items():
        swept = {name: result[sweep] for name, result in results.items() if sweep in result}
        for figure, title in metric_titles(key).items() if swept else ():
            lines: dict[str, report.Points] = {
                TITLES[name]: [(float(scale), points[scale][figure]) for scale in points]
                for name, points in swept.items()
            }
            lines |= floor_line(floor, figure, next(iter(lines.values())))
            panels.append(report.Panel(axis, title.removesuffix(" x 1000"), lines))
    return panels


def write(
    comparison: Comparison, results: Results, tables: str, description: dict[str, Any]
) -> None:
    """compare.md, compare.png, compare-curves.png and TensorBoard's events; prints the tables."""
    out, (picture, numbers) = comparison.settings.open_out(), comparison.side_by_side()
    print(tables)
    captions = "; ".join(comparison.captions[k].text for k in numbers)
    side_by_side = out.write_picture("compare.png", picture, captions=captions)
    pictures = {f"Side by side: {captions}": side_by_side}
    panels = build_panels(results, comparison.key, comparison.floor(comparison.sweep_count))
    if panels:
        pictures["Guidance"] = report.write_curves(out, "compare-curves.png", panels)
    title = "Does a prior help?"
    written = report.write_report(out, "compare.md", title, tables, pictures, description)
    scalars = {
        f"{panel.y} over {panel.x}/{name}": points
        for panel in panels
        for name, points in panel.lines.items()
    }
    report.write_tensorboard(out, written, scalars, {"side by side": picture})


def main(words: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    return run_command(run, "eval.compare", words)


if __name__ == "__main__":
    sys.exit(main())
