"""Frechet distance, CLIP score, precision and recall of a decoder over guidance scales (Fig. 11 and 13 of the paper), and over sampling steps and samplers."""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval import arms, report
from eval.arms import Arm
from eval.captions import Caption, read_captions
from eval.common import Figures, add_features, command, features_of, parser, progress, rank, world_size
from eval.extract import reference
from eval.folders import Pictures
from eval.judge import Judge, pictures_of, shown
from eval.metrics import frechet_key
from eval.source import Model, add_drawing, weights_of
from unclip_pl.atomic import atomic_file
from unclip_pl.commands.common import SPACING, chosen, spacing
from unclip_pl.errors import UserError
from unclip_pl.images import grid, save_png
from unclip_pl.pipeline import CONDITIONS, DEFAULT_DECODER, DEFAULT_PRIORS
from unclip_pl.stages.decoder import Decoder, SamplingConfig

SETTINGS = ("sampler", "steps", "guidance")
"""The first columns of the table."""


def arguments() -> argparse.ArgumentParser:
    made = parser(__doc__, "eval.sweep", batch_size=32)
    made.set_defaults(out=Path("out/sweep"))
    made.add_argument("--ckpt", default="openmoji", help='the decoder: a checkpoint or release; "openmoji" is the one in the package')
    made.add_argument("--prior", help='"diffusion" (the default) or "ar", those in the package; or a checkpoint or release')
    made.add_argument("--condition", choices=[*CONDITIONS, "image"], help="what the decoder has for an image embedding; image: that of the caption's picture")
    add_drawing(made)
    made.add_argument("--reference", help="real pictures, a folder or shards; by default the captions' own")
    made.add_argument("--guidance-scale", type=float, help="while steps and samplers are swept; by default the decoder's own")
    made.add_argument("--guidance-scales", type=float, nargs="*", default=[1.0, 1.25, 1.5, 2.0, 3.0, 4.0], help="none: they are not swept")
    made.add_argument("--sweep-steps", type=spacing, nargs="*", default=[], help=SPACING)
    made.add_argument("--sweep-samplers", nargs="*", default=[], choices=["ddpm", "ddim", "dpm_solver_pp"], help="samplers, each with all of --sweep-steps")
    add_features(made)
    made.add_argument("--score-clip", default="openmoji", help="which CLIP scores: openmoji (the embedded one), NAME/TAG of open_clip, local-dir:/folder")
    return made


def points(given: argparse.Namespace, decoder: Decoder) -> dict[str, list[SamplingConfig]]:
    """Curves by name: "guidance", and one for each sampler over steps. UserError where a setting is impossible: before anything is drawn."""

    def point(**options: Any) -> SamplingConfig:
        return chosen(argparse.Namespace(**{**vars(given), **options}), decoder)

    own = point()
    curves = {"guidance": [point(guidance_scale=float(scale)) for scale in sorted(set(given.guidance_scales))]}
    samplers = given.sweep_samplers or ([own.sampler] if given.sweep_steps else [])
    for sampler in samplers:
        spacings = dict.fromkeys(given.sweep_steps or [own.steps])
        curve = [point(sampler=sampler, steps=steps) for steps in spacings]
        curves[sampler] = sorted(curve, key=lambda sampling: count_steps(decoder, sampling))
    found = {name: curve for name, curve in curves.items() if curve}
    if not found:
        raise UserError("There is nothing to sweep: give --guidance-scales, --sweep-steps or --sweep-samplers.")
    return found


def count_steps(decoder: Decoder, sampling: SamplingConfig) -> int:
    """How many steps the settings take: where their point stands on the axis."""
    return len(decoder.process.schedule.respaced(sampling.steps))


def arm_of(given: argparse.Namespace, captions: Sequence[Caption], model: Model) -> Arm:
    """The condition that is swept."""
    if given.condition == "caption":
        return arms.of_caption(model, captions, given.seed)
    if given.condition == "text":
        return arms.of_text(model, captions, given.seed)
    if given.condition == "image":
        if not all(caption.image for caption in captions):
            raise UserError(f"The captions of {given.captions} have no pictures whose embeddings could be taken: choose another --condition.")
        return arms.of_image(model, captions, given.seed)
    arm = arms.of_prior("prior", model, model.unclip, chosen(given, model.unclip.prior, "prior_"), captions, given.seed)
    arm.settings["prior"] = weights_of(DEFAULT_PRIORS.get(given.prior, Path(given.prior)))
    return arm


def run(given: argparse.Namespace) -> Figures:
    """Draw and judge each point; rank 0 writes the plots, the pictures and the page."""
    given.condition = given.condition or "prior"
    if given.prior and given.condition != "prior":
        raise UserError(f"--prior is given, and --condition {given.condition} uses none: leave one of them out.")
    given.prior = given.prior or "diffusion"
    decoder = str(DEFAULT_DECODER) if given.ckpt == "openmoji" else given.ckpt
    model = Model(decoder, given.prior if given.condition == "prior" else None, given.device, given.precision, compile=given.compile)
    captions = read_captions(given.captions, given.num_captions, model.size)
    if not given.reference and not all(caption.image for caption in captions):
        raise UserError(f"The captions of {given.captions} have no pictures to compare with: give real ones with --reference.")
    curves = points(given, model.unclip.decoder)
    arm = arm_of(given, captions, model)
    judge = Judge(features_of(given), given.score_clip, given.device, given.precision)
    text = judge.text(captions)
    size = given.reference_size or model.size
    if given.reference:
        real = reference(judge.network, Pictures(given.reference, rank(), world_size(), size=size), given.batch_size)
    else:
        own = pictures_of(captions, size, given.batch_size, rank(), world_size())
        real = judge.look(progress(own, len(captions), "reference")).features
    results: dict[str, list[Figures]] = {}
    rows, drawn = [], {}
    for name, curve in curves.items():
        for sampling in curve:
            source = arm.drawn(given.out / "samples" / place(sampling), sampling, rank=rank(), world_size=world_size())
            figures = judge.figures(real, judge.look(source.batches(given.batch_size)), text)
            settings_of_point = asdict(sampling) | {
                "step_count": count_steps(model.unclip.decoder, sampling)
            }
            results.setdefault(name, []).append(settings_of_point | figures)
            drawn[f"{sampling.sampler} {sampling.steps}, {sampling.guidance_scale:g}"] = source
            rows.append(row(sampling, figures))
    settings = {
        "decoder": given.ckpt, "condition": given.condition, "prior": given.prior if given.condition == "prior" else "none",
        "captions": f"{given.captions} ({len(captions)})", "features": judge.network.name, "CLIP that scores": str(judge.clip.config), "seed": given.seed,
    }  # fmt: skip
    if rank() == 0:
        sides = grid([source.pictures(range(min(8, len(captions)))) for source in drawn.values()], list(drawn))
        save_png(sides, given.out / "sweep.png", captions="; ".join(caption.text for caption in captions[:8]))
        write(given.out, results, rows, settings, report.picture(sides, "side by side"))
    return {"curves": results, "settings": settings}


def place(sampling: SamplingConfig) -> str:
    """The name of a point's folder."""
    steps = str(sampling.steps).replace(" ", "")
    return f"{sampling.sampler}-{steps}-{sampling.guidance_scale:g}"


def row(sampling: SamplingConfig, figures: Figures) -> list[str]:
    """One point's line of the table."""
    values = [figures[name] * (1000 if name == "kid" else 1) for name in shown(frechet_key(figures))]
    return [sampling.sampler, str(sampling.steps), f"{sampling.guidance_scale:g}", *(f"{value:.4g}" for value in values)]


def write(out: Path, results: dict[str, list[Figures]], rows: list[list[str]], settings: dict[str, object], sides: str) -> None:
    """sweep.html, a plot a figure as .svg, the table in sweep.md, TensorBoard's events; the table is printed too."""
    titles = shown(frechet_key(next(iter(results.values()))[0]))
    headers = [*SETTINGS, *titles.values()]
    table = report.markdown(headers, rows)
    print(table)
    with atomic_file(out / "sweep.md", "w") as file:
        file.write(table)
    guidance = results.get("guidance", [])
    samplers = {name: curve for name, curve in results.items() if name != "guidance"}
    plots: list[str] = []
    scalars: dict[str, report.Points] = {}
    for figure, said in titles.items():
        for x, axis, series in (
            ("guidance", "guidance scale", {"guidance": [(one["guidance_scale"], one[figure]) for one in guidance]} if guidance else {}),
            ("steps", "sampling steps", {name: [(one["step_count"], one[figure]) for one in curve] for name, curve in samplers.items()}),
        ):
            if not series:
                continue
            plots.append(report.plot(series, axis, said.removesuffix(" x 1000")))
            scalars |= {f"{figure}/{name} over {x}": line for name, line in series.items()}
            with atomic_file(out / f"{figure}-{x}.svg", "w") as file:
                file.write(plots[-1])
    if guidance:  # Fig. 13 of the paper sets recall against what guidance improves
        plots.append(report.plot({"guidance": [(one["recall"], one["clip_score"]) for one in guidance]}, "recall", titles["clip_score"]))
    report.write_page(out / "sweep.html", "Sweep", [report.table(headers, rows), *plots, report.heading("Side by side"), sides], settings)
    report.write_tensorboard(out / "tensorboard", scalars)


def main(given: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    return command(arguments(), run, given)


if __name__ == "__main__":
    sys.exit(main())
