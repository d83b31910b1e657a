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

from PIL import Image

from eval import arms, report
from eval.arms import Arm
from eval.captions import Caption, read_captions
from eval.common import (
    Figures,
    command,
    parser,
)
from eval.floor import (
    NO_FLOOR,
    add_floor,
    floor_of,
    other_real,
    real_seen,
    require_real,
)
from eval.judge import SHOWN, Judge, add_judging, gathered, shown
from eval.metrics import frechet_key
from eval.source import Model, add_drawing, weights_of
from eval.tables import Section, floor_row, notes
from unclip_pl.pipeline.unclip import CONDITIONS
from unclip_pl.pipeline.weights import DEFAULT_DECODER, DEFAULT_PRIORS
from unclip_pl.stages.decoder import Decoder, DecoderSamplingConfig
from unclip_pl.utils.distributed import rank, world_size
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.files import atomic_file
from unclip_pl.utils.images import grid, save_png
from unclip_pl.utils.options import SPACING_HELP, add_prior_option, override_sampling, spacing

SETTINGS = ("sampler", "steps", "guidance")
"""The first columns of the table."""


def arguments() -> argparse.ArgumentParser:
    made = parser(__doc__, "eval.sweep", batch_size=32)
    made.set_defaults(out=Path("out/sweep"))
    add = made.add_argument
    add("--ckpt", default="openmoji", help='a checkpoint or release; "openmoji": the package\'s')
    add_prior_option(made)
    add(
        "--condition",
        choices=[*CONDITIONS, "image"],
        help="what the decoder has for an image embedding; image: that of the caption's picture",
    )
    add_drawing(made)
    add_floor(made)
    scales = [1.0, 1.25, 1.5, 2.0, 3.0, 4.0]
    add("--guidance-scales", type=float, nargs="*", default=scales, help="none: they are not swept")
    add("--sweep-steps", type=spacing, nargs="*", default=[], help=SPACING_HELP)
    add(
        "--sweep-samplers",
        nargs="*",
        default=[],
        choices=["ddpm", "ddim", "dpm_solver_pp"],
        help="samplers, each with all of --sweep-steps",
    )
    add_judging(made)
    return made


def points(given: argparse.Namespace, decoder: Decoder) -> dict[str, list[DecoderSamplingConfig]]:
    """Curves by name: "guidance", and one for each sampler over steps.

    Raises:
        UserError: a setting is impossible; said before anything is drawn.
    """

    def point(**options: Any) -> DecoderSamplingConfig:
        return override_sampling(decoder, vars(given) | options)

    own = point()
    curves = {
        "guidance": [
            point(guidance_scale=float(scale)) for scale in sorted(set(given.guidance_scales))
        ]
    }
    samplers = given.sweep_samplers or ([own.sampler] if given.sweep_steps else [])
    for sampler in samplers:
        spacings = dict.fromkeys(given.sweep_steps or [own.steps])
        curve = [point(sampler=sampler, steps=steps) for steps in spacings]
        curves[sampler] = sorted(curve, key=lambda sampling: count_steps(decoder, sampling))
    found = {name: curve for name, curve in curves.items() if curve}
    if not found:
        raise UserError(
            "There is nothing to sweep: give --guidance-scales, --sweep-steps or --sweep-samplers."
        )
    return found


def arm_of(given: argparse.Namespace, captions: Sequence[Caption], model: Model) -> Arm:
    """The condition that is swept."""
    if given.condition == "caption":
        return arms.of_caption(model, captions, given.seed)
    if given.condition == "text":
        return arms.of_text(model, captions, given.seed)
    if given.condition == "image":
        if not all(caption.image for caption in captions):
            raise UserError(
                f"The captions of {given.captions} have no pictures whose embeddings could be "
                "taken: choose another --condition."
            )
        return arms.of_image(model, captions, given.seed)
    sampling = override_sampling(model.unclip.prior, vars(given), "prior_")
    weights = weights_of(DEFAULT_PRIORS.get(given.prior, Path(given.prior)))
    return arms.of_prior("prior", model, model.unclip, weights, sampling, captions, given.seed)


def run(given: argparse.Namespace) -> Figures:
    """Draw and judge each point; rank 0 writes the plots, the pictures and the page."""
    given.condition = given.condition or "prior"
    if given.prior and given.condition != "prior":
        raise UserError(
            f"--prior is given, and --condition {given.condition} uses none: leave one of them out."
        )
    given.prior = given.prior or "diffusion"
    decoder = str(DEFAULT_DECODER) if given.ckpt == "openmoji" else given.ckpt
    prior = given.prior if given.condition == "prior" else None
    upsamplers = given.upsamplers or ()
    model = Model(decoder, prior, given.device, given.precision, upsamplers, given.compile)
    captions = read_captions(given.captions, given.num_captions, model.size)
    require_real(given, captions)
    curves = points(given, model.unclip.decoder)
    arm = arm_of(given, captions, model)
    conditions = model.unclip.decoder.clip_fingerprint or {}
    judge = Judge.asked(given, conditions)
    said = judge.bias(conditions)
    text, where = judge.text(captions), (rank(), world_size())
    real = real_seen(given, judge, captions, model.size)
    count = len(gathered(real, given.device).number)
    others = other_real(given, judge, model.size)
    key, floor = judge.network.frechet, None
    if others is not None:
        floor = floor_of(others, len(captions), count, key, given.seed)
    if floor is None:
        said.append(NO_FLOOR.format(len(captions) + count))
    results: dict[str, list[Figures]] = {}
    rows, drawn = [], {}
    for name, curve in curves.items():
        for sampling in curve:
            source = arm.drawn(given.out / "samples" / place(sampling), sampling, place=where)
            seen = judge.look(source.batches(given.batch_size))
            figures = judge.figures(real.features, seen, text)
            figures["at_floor"] = floor.at(figures) if floor else []
            settings_of_point = asdict(sampling) | {
                "step_count": count_steps(model.unclip.decoder, sampling)
            }
            results.setdefault(name, []).append(settings_of_point | figures)
            point = f"{sampling.sampler} {sampling.steps}, {sampling.guidance_scale:g}"
            drawn[point] = source
            rows.append(row(sampling, figures, key))
    rows.append(floor_row(floor, key))
    settings = {
        "decoder": given.ckpt,
        "size": model.size,
        "condition": given.condition,
        "the decoder sees": str(arm.sees),
        "prior": prior or "none",
        "prior sampling": arm.settings.get("prior_sampling"),
        "captions": f"{given.captions} ({len(captions)})",
        "features": judge.network.name,
        "CLIP that scores": str(judge.clip.config),
        "seed": given.seed,
    }
    if rank() == 0:
        some = range(min(8, len(captions)))
        sides = grid([source.pictures(some) for source in drawn.values()], list(drawn))
        shown_captions = "; ".join(caption.text for caption in captions[:8])
        save_png(sides, given.out / "sweep.png", captions=shown_captions)
        table = Section("Sweep", [*SETTINGS, *shown(key).values()], rows)
        write(given.out, results, table, said, settings, sides)
    return {
        "curves": results,
        "floor": None if floor is None else asdict(floor),
        "said": said,
        "settings": settings,
    }


def count_steps(decoder: Decoder, sampling: DecoderSamplingConfig) -> int:
    """How many steps the settings take: where their point stands on the axis."""
    return len(decoder.process.schedule.respaced(sampling.steps))


def place(sampling: DecoderSamplingConfig) -> str:
    """The name of a point's folder."""
    steps = str(sampling.steps).replace(" ", "")
    return f"{sampling.sampler}-{steps}-{sampling.guidance_scale:g}"


def row(sampling: DecoderSamplingConfig, figures: Figures, key: str) -> list[str]:
    """One point's line of the table."""
    cells = []
    for name in shown(key):
        text = f"{figures[name] * (1000 if name == 'kid' else 1):.4g}"
        cells.append(f"{text}, at the floor" if name in figures["at_floor"] else text)
    return [sampling.sampler, str(sampling.steps), f"{sampling.guidance_scale:g}", *cells]


def write(
    out: Path,
    results: dict[str, list[Figures]],
    table: Section,
    said: list[str],
    settings: dict[str, Any],
    sides: Image.Image,
) -> None:
    """sweep.html, a plot a figure as .svg, the table in sweep.md, TensorBoard's events.

    The table is printed too.
    """
    said = [*notes([table]), *said]
    markdown = report.markdown(table.headers, table.rows) + "".join(f"\n{one}\n" for one in said)
    print(markdown)
    with atomic_file(out / "sweep.md", "w") as file:
        file.write(markdown)
    guidance = results.get("guidance", [])
    samplers = {name: curve for name, curve in results.items() if name != "guidance"}
    plots: list[str] = []
    scalars: dict[str, report.Points] = {}
    for figure, title in shown(frechet_key(next(iter(results.values()))[0])).items():
        steps = {
            name: [(one["step_count"], one[figure]) for one in curve]
            for name, curve in samplers.items()
        }
        scales = [(one["guidance_scale"], one[figure]) for one in guidance]
        for x, axis, series in (
            ("guidance", "guidance scale", {"guidance": scales} if guidance else {}),
            ("steps", "sampling steps", steps),
        ):
            if not series:
                continue
            plots.append(report.plot(series, axis, title.removesuffix(" x 1000")))
            scalars |= {f"{figure}/{name} over {x}": line for name, line in series.items()}
            with atomic_file(out / f"{figure}-{x}.svg", "w") as file:
                file.write(plots[-1])
    if guidance:  # Fig. 13 of the paper sets recall against what guidance improves
        points = [(one["recall"], one["clip_score"]) for one in guidance]
        plots.append(report.plot({"guidance": points}, "recall", SHOWN["clip_score"]))
    parts = [table.html, *(report.paragraph(one) for one in said), *plots]
    parts += [report.heading("Side by side"), report.picture(sides, "side by side")]
    report.write_page(out / "sweep.html", "Sweep", parts, settings)
    report.write_tensorboard(out / "tensorboard", scalars)


def main(given: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    return command(arguments(), run, given)


if __name__ == "__main__":
    sys.exit(main())
