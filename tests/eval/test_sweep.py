"""`eval.sweep`: each point is drawn with its own settings, from the same embeddings and noise."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from eval import sweep
from eval.captions import read_captions
from eval.evaluator import caption_images
from eval.features import load_features
from eval.metrics import FrechetDistance
from eval.source import describe_weights
from eval.stored import StoredImages
from tests.eval import tiny
from unclip_pl.pipeline.unclip import UnCLIP
from unclip_pl.stages.decoder import DecoderSamplingConfig
from unclip_pl.utils.images import to_uint8


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stages")
    return {
        "decoder": tiny.decoder(folder / "image"),
        "text": tiny.decoder(folder / "text", "text"),
        "shard": tiny.shards(folder / "drawings", 8),
        "more": tiny.shards(folder / "more", 20, seed=1),
    }


def words(stages, out: Path, *more: str) -> list[str]:
    return [
        *("--decoder", str(stages["decoder"]), "--captions", str(stages["shard"])),
        *("--floor", str(stages["more"]), "--out", str(out), "--device", "cpu"),
        *("--batch-size", "8", "--features", "clip", *more),
    ]


@pytest.fixture(scope="module")
def ran(stages, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep") / "out"
    more = [
        "--condition",
        "text",
        "--guidance-scales",
        "3",
        "1",
        "--sweep-steps",
        "2",
        "3",
        "--sweep-samplers",
        "ddim",
        "dpm_solver_pp",
    ]
    assert sweep.main(words(stages, out, *more)) == 0
    return out, json.loads((out / "sweep.json").read_text())


def test_curves_have_their_points_in_order(ran):
    curves = ran[1]["curves"]
    assert [point["guidance_scale"] for point in curves["guidance"]] == [1, 3]
    assert {
        name: [point["steps"] for point in curves[name]] for name in ("ddim", "dpm_solver_pp")
    } == {"ddim": [2, 3], "dpm_solver_pp": [2, 3]}
    assert all(
        point["sampler"] == name and point["guidance_scale"] == 1
        for name in ("ddim", "dpm_solver_pp")
        for point in curves[name]
    )
    # ddim in 2 steps without guidance stands in two curves; dpm_solver_pp in 2 steps, both of the
    # first order, is the same
    assert len({point["fd_clip"] for curve in curves.values() for point in curve}) == 4


def test_a_points_figures_are_those_of_its_pictures(ran, stages):
    out, found = ran
    captions = read_captions(str(stages["shard"]))
    network, metric = load_features("clip"), FrechetDistance(256)
    texts = [caption.text for caption in captions]
    sampling = DecoderSamplingConfig("dpm_solver_pp", 3)
    images = UnCLIP.load(stages["decoder"]).generate(texts, range(8), "text", sampling=sampling)
    shard = out / "samples" / "dpm_solver_pp-3-1" / "00000.tar"
    (batch,) = StoredImages(str(shard)).batches(8)
    drawn = batch["images"]
    assert torch.equal(drawn, to_uint8(images))
    metric.update(network(drawn), real=False)
    metric.update(network(next(iter(caption_images(captions, 16, 8)))["images"]), real=True)
    figures = found["curves"]["dpm_solver_pp"][1]
    assert figures["fd_clip"] == pytest.approx(metric.compute()["fd"], rel=1e-6)


def test_the_report_its_curves_and_pictures_lie_in_the_folder(ran, stages):
    out, found = ran
    table = (out / "sweep.md").read_text()
    lines = [line for line in table.partition("\n## ")[0].splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 6 + 1 and lines[-1].startswith("| floor: real against other real")
    floor, first = found["floor"], found["curves"]["guidance"][0]
    for name in ("fd_clip", "kid"):
        reached = first[name] <= floor["high"][name]
        assert (name in first["at_floor"]) == reached
    assert ("at the floor" in table) == any(
        point["at_floor"] for curve in found["curves"].values() for point in curve
    )
    assert found["settings"]["the decoder sees"] == "z_t as the embedding + the caption's tokens"
    shared, sizes = found["notes"]
    assert shared.startswith("The features") and "8 images" in sizes and sizes in table
    assert found["settings"]["decoder"] == describe_weights(stages["decoder"])
    assert found["settings"]["floor"] == str(stages["more"])
    assert "(sweep-curves.png)" in table and "(sweep.png)" in table
    assert "| CLIP that scores | openmoji-judge |" in table
    panels = sweep.build_panels(found["curves"], "fd_clip")
    assert len(panels) == 13 and {*panels[1].lines} == {"ddim", "dpm_solver_pp"}
    with Image.open(out / "sweep-curves.png") as curves:
        assert curves.width > 1000 and curves.height > 1000
    assert len(list((out / "tensorboard" / "sweep").glob("events.out.tfevents*"))) == 1
    with Image.open(out / "sweep.png") as picture:
        assert picture.width > 8 * 16 and picture.height >= 5 * 16


@pytest.mark.parametrize(
    ("more", "keyword"),
    [
        (["--guidance-scales"], "nothing to sweep"),
        (["--condition", "text", "--prior", "ar"], "--prior"),
        (["--condition", "caption", "--prior-temperature", "2"], "--prior-temperature"),
        (["--decoder", "{text}", "--prior-steps", "2"], "--condition text"),
        (["--sweep-steps", "0"], "--steps is 0"),
        (["--sweep-steps", "2000"], "--steps is 2000"),
        (["--sweep-steps", "fast28"], "--steps is fast28"),
        (["--guidance-scales", "-1"], "--guidance-scale is -1"),
        (["--decoder", "gone"], "no decoder gone"),
        (["--num-captions", "3"], "3 captions are too few"),
    ],
)
def test_what_cannot_be_swept_is_one_sentence(more, keyword, stages, tmp_path, capsys):
    more = [word.format(**stages) for word in more]
    assert sweep.main(words(stages, tmp_path / "out", *more)) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("python -m eval.sweep: ") and keyword in last
    assert not (tmp_path / "out").exists()


def test_spacings_stand_by_the_number_of_their_steps(stages):
    decoder = UnCLIP.load(stages["decoder"]).decoder
    more = ["--guidance-scales", "--sweep-steps", "fast27", "30", "2,1", "2", "30"]
    found = tiny.arguments(sweep, *words(stages, Path("out"), *more))
    (curve,) = sweep.build_curves(found["sweep"], found["drawing"].sampling, decoder).values()
    assert [sampling.steps for sampling in curve] == [2, (2, 1), "fast27", 30]
    assert [decoder.count_steps(sampling) for sampling in curve] == [2, 3, 27, 30]
    assert " " not in sweep.folder_name(curve[1])
