"""Does it help to draw a CLIP image embedding first? The experiment of section 5.1 of the paper: the same captions, seeds and noise under

caption alone; the text embedding in the image embedding's place; a decoder trained on text embeddings; the AR prior; the diffusion prior; the true image
embedding, an upper bound. The decoder's guidance is swept for each; what it does best with is reported, and one fixed scale for all.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import torch
from PIL import Image
from torch import Tensor

from eval import arms, report
from eval.arms import TITLES, Arm
from eval.captions import Caption, read_captions
from eval.common import Figures, add_features, command, features_of, parser, positive, progress, rank, world_size
from eval.extract import reference
from eval.folders import Pictures
from eval.judge import Difference, Judge, Seen, gathered, paired_differences, pictures_of, shown, spread
from eval.metrics import FRECHET, frechet_key
from eval.source import Drawn, Model, add_drawing, weights_of
from unclip_pl.atomic import atomic_file
from unclip_pl.clip import ClipMismatch, require_same
from unclip_pl.commands.common import chosen
from unclip_pl.data.shards import decode
from unclip_pl.errors import UserError
from unclip_pl.images import grid, save_png
from unclip_pl.pipeline import DEFAULT_DECODER, DEFAULT_PRIORS, Prior, UnCLIP, load_stage
from unclip_pl.stages.ar_prior import ARPrior
from unclip_pl.stages.decoder import SamplingConfig
from unclip_pl.stages.diffusion_prior import DiffusionPrior

log = logging.getLogger(__name__)
SAME_CLIP = (
    "The CLIP that scores is the one that conditions the decoder, which flatters what was drawn from its embeddings: name another with --score-clip "
    "where there is one."
)


def arguments() -> argparse.ArgumentParser:
    made = parser(__doc__, "eval.compare", batch_size=32)
    made.set_defaults(out=Path("out/compare"))
    made.add_argument("--decoder", default="openmoji", help='a checkpoint or release; "openmoji" is the one in the package')
    made.add_argument("--text-decoder", help="the decoder that was trained on text embeddings (stages/decoder_text.yaml); without it that arm is left out")
    made.add_argument("--diffusion-prior", default="diffusion", help='a checkpoint or release; "none" leaves it out')
    made.add_argument("--ar-prior", default="ar", help='a checkpoint or release; "none" leaves it out')
    add_drawing(made)
    made.add_argument("--reference", help="real pictures, a folder or shards; by default the captions' own")
    made.add_argument("--guidance-scale", type=float, help="the fixed scale; by default the decoder's own")
    made.add_argument("--guidance-scales", type=float, nargs="*", default=[1.0, 1.5, 2.0, 3.0], help="the scales to sweep; none: no sweep")
    made.add_argument("--sweep-captions", type=positive, help="sweep over the first so many captions; by default all")
    add_features(made)
    made.add_argument("--score-clip", default="openmoji", help="which CLIP scores: openmoji (the embedded one), NAME/TAG of open_clip, local-dir:/folder")
    made.add_argument("--baseline", default="diffusion", help="the arm from which the others' differences are taken")
    made.add_argument("--resamples", type=positive, default=200, help="random halves of the captions, for the intervals of FD and of the differences")
    made.add_argument("--pictures", type=positive, default=8, help="columns of the picture side by side")
    return made


def arms_of(given: argparse.Namespace, model: Model, captions: Sequence[Caption]) -> tuple[list[Arm], list[str]]:
    """The arms in the paper's order, and a sentence for each that is left out."""
    decoder = model.unclip.decoder
    if decoder.condition != "image":
        raise UserError(f"The decoder {model.decoder} was trained on text embeddings: give it as --text-decoder, and as --decoder one trained on images.")
    seed, said = given.seed, []
    found = [arms.of_caption(model, captions, seed), arms.of_text(model, captions, seed)]
    if given.text_decoder:
        other = Model(given.text_decoder, device=given.device, precision=given.precision, compile=given.compile)
        if other.unclip.decoder.condition != "text":
            raise UserError(f"The decoder {given.text_decoder} was trained on image embeddings: give --text-decoder one of stages/decoder_text.yaml.")
        require_same(decoder.clip_fingerprint or {}, other.unclip.clip.fingerprint(), "The decoder")
        if other.size != model.size:
            raise UserError(f"The two decoders draw pictures of {model.size} and {other.size} pixels: compare decoders of one size.")
        found.append(arms.of_text(other, captions, seed, "text-decoder"))
    else:
        said.append("No decoder trained on text embeddings was given (--text-decoder), so that arm is left out.")
    for name, path, kind in (("ar", given.ar_prior, ARPrior), ("diffusion", given.diffusion_prior, DiffusionPrior)):
        if path == "none":
            said.append(f"The arm of the {arms.TITLES[name]} is left out, as asked.")
            continue
        where = DEFAULT_PRIORS.get(path, Path(path))
        unclip = UnCLIP(decoder, cast(Prior, load_stage(where, kind)), model.unclip.clip, given.device)
        options = given if name == "diffusion" else argparse.Namespace()
        arm = arms.of_prior(name, model, unclip, chosen(options, unclip.prior, "prior_"), captions, seed)
        arm.settings["prior"] = weights_of(where)
        found.append(arm)
    if all(caption.image for caption in captions):
        found.append(arms.of_image(model, captions, seed))
    else:
        said.append(f"The captions of {given.captions} have no pictures, so the arm of the true image embedding is left out.")
    return found, said


def run(given: argparse.Namespace) -> Figures:
    """Draw, judge, compare; rank 0 writes the tables, the pictures and the page."""
    model = Model(str(DEFAULT_DECODER) if given.decoder == "openmoji" else given.decoder, None, given.device, given.precision, compile=given.compile)
    captions = read_captions(given.captions, given.num_captions, model.size)
    ways, said = arms_of(given, model, captions)
    if given.baseline not in [arm.name for arm in ways]:
        raise UserError(f"--baseline is {given.baseline}, and the arms are {', '.join(arm.name for arm in ways)}: name one of them.")
    if not given.reference and not all(caption.image for caption in captions):
        raise UserError(f"The captions of {given.captions} have no pictures to compare with: give real ones with --reference.")
    fixed = chosen(given, model.unclip.decoder)
    scales = sorted({*map(float, given.guidance_scales), fixed.guidance_scale})
    for scale in scales:
        chosen(argparse.Namespace(guidance_scale=scale), model.unclip.decoder)  # refuses what is impossible before anything is drawn
    judge = Judge(features_of(given), given.score_clip, given.device, given.precision)
    try:
        require_same(model.unclip.decoder.clip_fingerprint or {}, judge.clip.fingerprint(), "The decoder")
        said.append(SAME_CLIP)
        log.warning(SAME_CLIP)
    except ClipMismatch:
        pass
    study = Study(given, ways, captions, judge, fixed, scales)
    results = study.results()
    differences = study.differences()
    real = judge.figures(None, study.real, study.text) if study.paired else None
    settings = {
        "decoder": given.decoder, "captions": f"{given.captions} ({len(captions)})", "sweep over": f"the first {study.sweep_count}",
        "features": judge.network.name, "CLIP that scores": str(judge.clip.config), "seed": given.seed, **asdict(fixed),
    }  # fmt: skip
    if rank() == 0:
        write(given.out, study, results, real, differences, said, settings)
    return {"arms": results, "real": real, "differences": plain(differences), "baseline": given.baseline, "said": said, "settings": settings}


def plain(differences: dict[str, dict[str, dict[str, Difference]]]) -> dict[str, Any]:
    """The differences as JSON has them."""
    return {
        kind: {arm: {name: asdict(one) | {"sure": one.sure} for name, one in figures.items()} for arm, figures in arms.items()}
        for kind, arms in differences.items()
    }


class Study:
    """The arms' pictures and what is seen in them."""

    def __init__(
        self, given: argparse.Namespace, ways: Sequence[Arm], captions: Sequence[Caption], judge: Judge, fixed: SamplingConfig, scales: Sequence[float],
    ) -> None:
        self.given, self.arms, self.captions, self.judge, self.fixed, self.scales = given, ways, captions, judge, fixed, scales
        self.sweep_count = min(given.sweep_captions or len(captions), len(captions))
        self.text = judge.text(captions)
        self.best: dict[str, float] = {}
        self.paired = not given.reference
        self.real = self._reference()
        self._seen: dict[tuple[str, float], tuple[int, Seen]] = {}

    def _reference(self) -> Seen:
        """This rank's share of the real pictures: the captions' own, or --reference."""
        size, place = self.given.reference_size or self.arms[0].model.size, (rank(), world_size())
        if self.paired:
            return self.judge.look(progress(pictures_of(self.captions, size, self.given.batch_size, *place), len(self.captions), "reference"))
        rows = reference(self.judge.network, Pictures(self.given.reference, *place, size=size), self.given.batch_size)
        return Seen(torch.arange(len(rows)) * place[1] + place[0], rows, rows)

    def reference(self, count: int) -> Tensor:
        """This rank's features of the reference, of the first `count` captions where it is theirs."""
        return (self.real.first(count) if self.paired else self.real).features

    def drawn(self, arm: Arm, scale: float, first: int | None = None) -> Drawn:
        """An arm's pictures at one guidance scale, in a folder of theirs."""
        folder = self.given.out / "samples" / f"{arm.name}-{scale:g}"
        return arm.drawn(folder, replace(self.fixed, guidance_scale=scale), first, rank=rank(), world_size=world_size())

    def seen(self, arm: Arm, scale: float, count: int) -> Seen:
        """What the judge sees in this rank's part of the first `count` pictures, drawn where they are missing."""
        known, seen = self._seen.get((arm.name, scale), (0, None))
        if seen is None or known < count:
            seen = self.judge.look(self.drawn(arm, scale, count).batches(self.given.batch_size))
            self._seen[arm.name, scale] = count, seen
        return seen.first(count)

    def results(self) -> dict[str, Any]:
        """By arm: `title`, `sweep` by scale, `fixed` and `best` over all captions. The fixed scale comes first, of all arms: what one looks at first."""
        scale = self.fixed.guidance_scale
        fixed = {arm.name: self.whole(arm, scale) for arm in self.arms}
        sweeps = {arm.name: {scale: self.figures(arm, scale, self.sweep_count) for scale in self.scales} for arm in self.arms}
        self.best = {name: min((figures[self.judge.network.frechet], scale) for scale, figures in sweep.items())[1] for name, sweep in sweeps.items()}
        return {
            arm.name: {
                "title": TITLES[arm.name], "sweep": {f"{scale:g}": figures for scale, figures in sweeps[arm.name].items()}, "fixed": fixed[arm.name],
                "best": self.whole(arm, self.best[arm.name]),
            } for arm in self.arms
        }  # fmt: skip

    def figures(self, arm: Arm, scale: float, count: int) -> Figures:
        """Of the first `count` captions."""
        return self.judge.figures(self.reference(count), self.seen(arm, scale, count), self.text)

    def whole(self, arm: Arm, scale: float) -> Figures:
        """Of all captions, with the interval of the Frechet distance."""
        count, device = len(self.captions), self.given.device
        real, seen = gathered(self.real, device), gathered(self.seen(arm, scale, count), device)
        error = spread(real, seen, self.given.resamples, self.given.seed, self.judge.network.frechet)
        return {"guidance_scale": scale} | self.figures(arm, scale, count) | error

    def differences(self) -> dict[str, dict[str, dict[str, Difference]]]:
        """At the fixed scale, and of each arm at its best: what another arm has more than the baseline."""
        real, given = gathered(self.real, self.given.device).features, self.given
        found: dict[str, dict[str, dict[str, Difference]]] = {}
        for kind in ("fixed", "best"):
            scale = {arm.name: self.fixed.guidance_scale if kind == "fixed" else self.best[arm.name] for arm in self.arms}
            seen = {arm.name: gathered(self.seen(arm, scale[arm.name], len(self.captions)), self.given.device) for arm in self.arms}
            found[kind] = {
                name: paired_differences(seen[given.baseline], other, self.text, real, given.resamples, given.seed, self.paired, self.judge.network.frechet)
                for name, other in seen.items() if name != given.baseline
            }  # fmt: skip
        return found

    def side_by_side(self) -> tuple[Image.Image, list[int]]:
        """Rows: the real pictures and each arm at the fixed scale; columns: captions, spread over all. With the captions' numbers."""
        count = min(self.given.pictures, len(self.captions))
        columns = [round(k * (len(self.captions) - 1) / max(1, count - 1)) for k in range(count)]
        rows, labels = [], []
        if all(self.captions[k].image for k in columns):
            rows.append(torch.stack([decode(self.captions[k].image or b"", self.arms[0].model.size) for k in columns]))
            labels.append("real picture")
        for arm in self.arms:
            rows.append(self.drawn(arm, self.fixed.guidance_scale).pictures(columns))
            labels.append(TITLES[arm.name].partition(" (")[0])
        return grid(rows, labels), columns


def headers(frechet: str) -> list[str]:
    """Of the table of figures."""
    return ["", "guidance", *shown(frechet).values()]


def row(arm: str, figures: Figures) -> list[str]:
    """One arm's line of a table."""
    key = frechet_key(figures)
    return [
        TITLES[arm], f"{figures['guidance_scale']:g}", f"{figures[key]:.4g} [{figures[f'{key}_low']:.4g}, {figures[f'{key}_high']:.4g}]",
        f"{1000 * figures['kid']:.4g} ± {1000 * figures['kid_se']:.2g}",
        score(figures), f"{figures['precision']:.3f}", f"{figures['recall']:.3f}", f"{figures['r1']:.1%}",
    ]  # fmt: skip


def score(figures: Figures) -> str:
    """The CLIP score with its interval."""
    return f"{figures['clip_score']:.2f} [{figures['clip_score_low']:.2f}, {figures['clip_score_high']:.2f}]"


def difference_row(arm: str, differences: dict[str, Difference]) -> list[str]:
    """One arm's line of the table of differences; a figure whose interval holds 0 stands in brackets."""

    def cell(name: str, digits: int, factor: float = 1.0) -> str:
        one = differences[name]
        text = f"{one.value * factor:+.{digits}f} [{one.low * factor:+.{digits}f}, {one.high * factor:+.{digits}f}]"
        return text if one.sure else f"({text})"

    return [TITLES[arm], cell(frechet_key(differences), 2), cell("clip_score", 2), cell("r1", 1, 100)]


def write(
    out: Path, study: Study, results: dict[str, Any], real: Figures | None, differences: dict[str, dict[str, dict[str, Difference]]],
    said: Sequence[str], settings: dict[str, Any],
) -> None:
    """compare.md, compare.png, compare.html and TensorBoard's events in `out`; the tables are printed too."""
    picture, columns = study.side_by_side()
    frechet = study.judge.network.frechet
    figures = shown(frechet)
    baseline = TITLES[study.given.baseline]
    last = [] if real is None else [["real pictures", "-", "-", "-", score(real), "-", "-", f"{real['r1']:.1%}"]]
    sections: list[tuple[str, Sequence[str], list[list[str]]]] = [
        (name, headers(frechet), [*(row(arm, found[kind]) for arm, found in results.items()), *last])
        for kind, name in (
            ("fixed", f"Guidance {study.fixed.guidance_scale:g} for all"),
            ("best", f"Each at its best guidance (least {FRECHET[frechet]} over {study.sweep_count} captions)"),
        )
    ]
    for kind, what in (("fixed", f"guidance {study.fixed.guidance_scale:g} for all"), ("best", "each at its best guidance")):
        titles = (f"less the {baseline}: {what}", FRECHET[frechet], "CLIP score", "own caption first, points")
        sections.append((f"Differences from the {baseline}, {what}", titles, [difference_row(arm, found) for arm, found in differences[kind].items()]))
    captions = "; ".join(study.captions[k].text for k in columns)
    markdown = "\n".join(f"### {name}\n\n{report.markdown(titles, rows)}" for name, titles, rows in sections) + "".join(f"\n{text}\n" for text in said)
    with atomic_file(out / "compare.md", "w") as file:
        file.write(markdown)
    print(markdown)
    save_png(picture, out / "compare.png", captions=captions)
    curves = {
        figure: {TITLES[arm]: [(float(scale), found["sweep"][scale][figure]) for scale in found["sweep"]] for arm, found in results.items()}
        for figure in figures
    }
    parts = [part for name, titles, rows in sections for part in (report.heading(name), report.table(titles, rows))]
    parts += [report.paragraph(text) for text in ("In brackets: the interval of 95 % holds 0.", *said)]
    parts += [report.heading("Side by side"), report.picture(picture, "side by side"), report.paragraph(captions), report.heading("Guidance")]
    parts += [report.plot(lines, "guidance scale", figures[figure]) for figure, lines in curves.items()]
    report.write_page(out / "compare.html", "Does a prior help?", parts, settings)
    scalars = {f"{figure}/{name}": line for figure, lines in curves.items() for name, line in lines.items()}
    report.write_tensorboard(out / "tensorboard", scalars, {"side by side": picture})


def main(given: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    return command(arguments(), run, given)


if __name__ == "__main__":
    sys.exit(main())
