"""Does it help to draw a CLIP image embedding first? (unCLIP, section 5.1)

The same captions, seeds and noise under: caption alone; the text embedding in the image embedding's
place; a decoder trained on text embeddings; the AR prior; the diffusion prior; the true image
embedding, an upper bound. The table says what reaches the decoder in each. The guidance of the
priors and of the decoder is swept; a table has all at one guidance, another each at its best.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval import arms, report
from eval.arms import TITLES, Arm
from eval.captions import Caption, read_captions
from eval.common import Figures, command, parser
from eval.floor import NO_FLOOR, add_floor, require_real
from eval.judge import Judge, add_judging, shown
from eval.metrics import FRECHET
from eval.source import Model, add_drawing, weights_of
from eval.study import Differences, Study
from eval.tables import (
    Section,
    difference_headers,
    difference_row,
    floor_row,
    headers,
    notes,
    real_row,
    row,
)
from unclip_pl.clip.fingerprint import require_same
from unclip_pl.pipeline.unclip import Prior, UnCLIP
from unclip_pl.pipeline.weights import DEFAULT_DECODER, DEFAULT_PRIORS, load_stage
from unclip_pl.stages.ar_prior import ARPrior
from unclip_pl.stages.diffusion_prior import DiffusionPrior
from unclip_pl.utils.distributed import rank
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import atomic_file
from unclip_pl.utils.images import save_png
from unclip_pl.utils.options import override_sampling, positive_int

GRID = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
PRIORS: dict[str, tuple[type[Prior], tuple[str, ...]]] = {
    "ar": (ARPrior, ("guidance_scale", "temperature", "top_p")),
    "diffusion": (DiffusionPrior, ("guidance_scale", "sampler", "steps")),
}
"""Each prior's stage and those of its settings that have an option."""


def arguments() -> argparse.ArgumentParser:
    made = parser(__doc__, "eval.compare", batch_size=32)
    made.set_defaults(out=Path("out/compare"))
    add = made.add_argument
    add("--decoder", default="openmoji", help='a checkpoint or release; "openmoji": the package\'s')
    add("--text-decoder", help="one trained on text embeddings; without it that arm is left out")
    add("--diffusion-prior", default="diffusion", help='a checkpoint or release, or "none"')
    add("--ar-prior", default="ar", help='a checkpoint or release, or "none"')
    add_drawing(made)
    # Both priors draw from what they have learned unless told: the same guidance, nothing cut off.
    made.set_defaults(prior_guidance_scale=1.0, prior_temperature=1.0, prior_top_p=1.0)
    add(
        "--seeds", type=positive_int, default=1, help="pictures per caption, over which is averaged"
    )
    scales: dict[str, Any] = {"type": float, "nargs": "*", "default": list(GRID)}
    add("--guidance-scales", **scales, help="the decoder's, to sweep; none: no sweep")
    add("--prior-guidance-scales", **scales, help="both priors', to sweep first; none: no sweep")
    add("--sweep-captions", type=positive_int, help="sweep over the first so many; by default all")
    add_floor(made)
    add_judging(made)
    add("--baseline", default="diffusion", help="the arm from which the others' differences are")
    add("--resamples", type=positive_int, default=200, help="random halves, for the intervals")
    add("--pictures", type=positive_int, default=8, help="columns of the picture side by side")
    return made


def arms_of(
    given: argparse.Namespace, model: Model, captions: Sequence[Caption]
) -> tuple[list[Arm], list[str]]:
    """The arms in the paper's order, and a sentence for each that is left out."""
    decoder = model.unclip.decoder
    if decoder.condition != "image":
        raise UserError(
            f"The decoder {model.decoder} was trained on text embeddings: give it as "
            "--text-decoder, and as --decoder one trained on images."
        )
    seed, said = given.seed, []
    found = [arms.of_caption(model, captions, seed), arms.of_text(model, captions, seed)]
    if given.text_decoder:
        other = text_decoder(given, model)
        found.append(arms.of_text(other, captions, seed, "text-decoder"))
    else:
        said.append(
            "No decoder trained on text embeddings was given (--text-decoder), so that arm is left "
            "out."
        )
    for name, (kind, settings) in PRIORS.items():
        path = getattr(given, f"{name}_prior")
        if path == "none":
            said.append(f"The arm of the {TITLES[name]} is left out, as asked.")
            continue
        where = DEFAULT_PRIORS.get(path, Path(path))
        prior, clip = load_stage(where, kind), model.unclip.clip
        unclip = UnCLIP(decoder, prior, clip, given.device, precision=model.precision)
        options = {f"prior_{one}": getattr(given, f"prior_{one}") for one in settings}
        sampling = override_sampling(unclip.prior, options, "prior_")
        weights = weights_of(where)
        found.append(arms.of_prior(name, model, unclip, weights, sampling, captions, seed))
    if all(caption.image for caption in captions):
        found.append(arms.of_image(model, captions, seed))
    else:
        said.append(
            f"The captions of {given.captions} have no pictures, so the arm of the true image "
            "embedding is left out."
        )
    return found, said


def opened(given: argparse.Namespace, decoder: str) -> Model:
    """A decoder with the upsamplers that all arms share."""
    upsamplers = given.upsamplers or ()
    return Model(decoder, None, given.device, given.precision, upsamplers, given.compile)


def text_decoder(given: argparse.Namespace, model: Model) -> Model:
    """The one trained on text embeddings; UserError where it cannot be compared with `model`."""
    other = opened(given, given.text_decoder)
    if other.unclip.decoder.condition != "text":
        raise UserError(
            f"The decoder {given.text_decoder} was trained on image embeddings: give "
            "--text-decoder one of stages/decoder_text.yaml."
        )
    conditions = model.unclip.decoder.clip_fingerprint or {}
    require_same(conditions, other.unclip.clip.fingerprint(), "The decoder")
    if other.size != model.size:
        raise UserError(
            f"The two decoders draw pictures of {model.size} and {other.size} pixels: compare "
            "decoders of one size."
        )
    return other


def run(given: argparse.Namespace) -> Figures:
    """Draw, judge, compare; rank 0 writes the tables, the pictures and the page."""
    model = opened(given, str(DEFAULT_DECODER) if given.decoder == "openmoji" else given.decoder)
    captions = read_captions(given.captions, given.num_captions, model.size)
    ways, said = arms_of(given, model, captions)
    names = [arm.name for arm in ways]
    if given.baseline not in names:
        raise UserError(
            f"--baseline is {given.baseline}, and the arms are {', '.join(names)}: name one of "
            "them."
        )
    require_real(given, captions)
    fixed = override_sampling(model.unclip.decoder, vars(given))
    for scale in given.guidance_scales:  # what is impossible is refused before anything is drawn
        override_sampling(model.unclip.decoder, {"guidance_scale": scale})
    for scale in given.prior_guidance_scales:
        if not 1 <= scale < float("inf"):
            raise UserError(f"--prior-guidance-scales has {scale}: give 1 (no guidance) or more.")
    conditions = model.unclip.decoder.clip_fingerprint or {}
    judge = Judge.asked(given, conditions)
    said += judge.bias(conditions)
    study = Study(given, ways, captions, judge, fixed)
    results = study.results()
    differences = study.differences(results)
    real = judge.figures(None, study.real, study.text) if study.paired else None
    floor = study.floor(len(captions))
    if floor is None:
        said.append(NO_FLOOR.format(len(captions) + study.reference_count))
    settings = {
        "decoder": given.decoder,
        "size": model.size,
        "captions": f"{given.captions} ({len(captions)})",
        "pictures per caption": given.seeds,
        "sweep over": f"the first {study.sweep_count}",
        "features": judge.network.name,
        "CLIP that scores": str(judge.clip.config),
        "seed": given.seed,
        **asdict(fixed),
    }
    for arm in ways:
        if arm.prior_scale is not None:
            settings[TITLES[arm.name]] = arm.settings["prior_sampling"]
    if rank() == 0:
        write(study, results, real, differences, said, settings)
    return {
        "arms": results,
        "real": real,
        "floor": None if floor is None else asdict(floor),
        "differences": plain(differences),
        "baseline": given.baseline,
        "said": said,
        "settings": settings,
    }


def plain(differences: Differences) -> dict[str, Any]:
    """The differences as JSON has them."""
    return {
        kind: {
            arm: {name: asdict(one) | {"sure": one.sure} for name, one in figures.items()}
            for arm, figures in found.items()
        }
        for kind, found in differences.items()
    }


def sections_of(
    study: Study, results: dict[str, Any], real: Figures | None, differences: Differences
) -> list[Section]:
    """The tables: all arms at the fixed guidance, each at its best, and the differences in both."""
    key, baseline = study.key, TITLES[study.given.baseline]
    last = [] if real is None else [real_row(real)]
    last.append(floor_row(study.floor(len(study.captions)), key))
    fixed = f"guidance {study.fixed.guidance_scale:g} for all"
    best = f"each at its best guidance (least {FRECHET[key]} over {study.sweep_count} captions)"
    made, sees = [], {arm.name: str(arm.sees) for arm in study.arms}
    for kind, what in (("fixed", fixed), ("best", best)):
        if kind not in differences:
            continue
        lines = [row(arm, sees[arm], found[kind], key) for arm, found in results.items()]
        made.append(Section(what[0].upper() + what[1:], headers(key), [*lines, *last]))
        lines = [difference_row(arm, found, key) for arm, found in differences[kind].items()]
        titles = difference_headers(baseline, what, key)
        made.append(Section(f"Differences from the {baseline}, {what}", titles, lines))
    return made


def curves_of(results: dict[str, Any], key: str) -> dict[str, dict[str, report.Points]]:
    """By "figure over axis" and arm: the lines of what was swept."""
    found: dict[str, dict[str, report.Points]] = {}
    for sweep, axis in (
        ("sweep", "guidance scale"),
        ("prior_sweep", "guidance scale of the prior"),
    ):
        swept = {arm: one[sweep] for arm, one in results.items() if sweep in one}
        for figure, title in shown(key).items() if swept else ():
            found[f"{title} over {axis}"] = {
                TITLES[arm]: [(float(scale), points[scale][figure]) for scale in points]
                for arm, points in swept.items()
            }
    return found


def write(
    study: Study,
    results: dict[str, Any],
    real: Figures | None,
    differences: Differences,
    said: Sequence[str],
    settings: dict[str, Any],
) -> None:
    """compare.md, compare.png, compare.html and TensorBoard's events; the tables are printed."""
    out, (picture, columns) = study.given.out, study.side_by_side()
    sections = sections_of(study, results, real, differences)
    said = [*notes(sections), *said]
    markdown = "\n".join(section.markdown for section in sections)
    markdown += "".join(f"\n{text}\n" for text in said)
    with atomic_file(out / "compare.md", "w") as file:
        file.write(markdown)
    print(markdown)
    captions = "; ".join(study.captions[k].text for k in columns)
    save_png(picture, out / "compare.png", captions=captions)
    curves = curves_of(results, study.key)
    parts = [section.html for section in sections] + [report.paragraph(text) for text in said]
    parts += [report.heading("Side by side"), report.picture(picture, "side by side")]
    parts += [report.paragraph(captions), report.heading("Guidance")]
    for title, lines in curves.items():
        figure, _, axis = title.partition(" over ")
        parts.append(report.plot(lines, axis, figure))
    report.write_page(out / "compare.html", "Does a prior help?", parts, settings)
    scalars = {
        f"{title}/{name}": line for title, lines in curves.items() for name, line in lines.items()
    }
    report.write_tensorboard(out / "tensorboard", scalars, {"side by side": picture})


def main(given: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    return command(arguments(), run, given)


if __name__ == "__main__":
    sys.exit(main())
