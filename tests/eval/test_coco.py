"""`eval.coco`: a caption of each picture, each prior at each guidance scale, any ranks."""

import functools
import json
from pathlib import Path

import pytest
import torch

from eval import coco, coco_images
from eval.captions import one_per_picture, read_coco
from eval.commands import choose_features
from eval.evaluator import compute_distances
from eval.features import load_features
from eval.generated import GeneratedImages
from eval.metrics import CLIPScore
from eval.stored import StoredImages
from tests.cluster.forks import Ranks
from tests.eval import tiny
from tests.eval.test_reference import photograph
from unclip_pl.data.decoding import decode
from unclip_pl.pipeline.unclip import UnCLIP
from unclip_pl.stages.decoder import DecoderSamplingConfig
from unclip_pl.stages.diffusion_prior import PriorSamplingConfig
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import to_uint8

PICTURES, COUNT, SIDE = 9, 6, 64
"""Of the annotations, and of those that have a caption drawn."""
SMALL_SHARDS = functools.partial(GeneratedImages, shard_size=2)
ANIMALS = ("cat", "dog", "fox", "cow", "hen", "bee", "ant", "owl", "rat")


def annotations(folder: Path) -> Path:
    """A file in the form of captions_val2014.json, and its pictures of 4:3 in `folder`/val."""
    images, captions = [], []
    (folder / "val").mkdir(parents=True)
    for k in range(PICTURES):
        name, number = f"COCO_val2014_{1000 - k:012d}.png", 1000 - k
        (folder / "val" / name).write_bytes(photograph(k, 120, 90))
        images.append({"id": number, "file_name": name, "width": 120, "height": 90})
        for n in range(5):
            text = f"{ANIMALS[k]}\n {n} "
            captions.append({"id": 7 * k + n, "image_id": number, "caption": text})
    file = folder / "captions_val2014.json"
    file.write_text(json.dumps({"info": {}, "images": images, "annotations": captions[::-1]}))
    return file


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> dict[str, Path]:
    """A decoder of 16 pixels and an upsampler to 64, the annotations, and few images per shard."""
    folder = tmp_path_factory.mktemp("coco")
    return {
        "decoder": tiny.decoder(folder / "decoder"),
        "upsampler": tiny.upsampler(folder / "upsampler", SIDE),
        "annotations": annotations(folder),
        "images": folder / "val",
        "floor": tiny.shards(folder / "floor", PICTURES + COUNT),
    }


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(coco_images, "GeneratedImages", SMALL_SHARDS)


def words(stages, out: Path, *more: str) -> list[str]:
    options = ["--annotations", stages["annotations"], "--images", stages["images"]]
    options += ["--decoder", stages["decoder"], "--upsamplers", stages["upsampler"], "--out", out]
    options += ["--num-captions", COUNT, "--batch-size", 4, "--resamples", 2]
    options += ["--floor", stages["floor"], "--prior-sampler", "ddim", "--prior-steps", 2]
    options += ["--features", "clip", "--score-clip", "openmoji", "--device", "cpu"]
    return [*map(str, options), "--guidance-scales", "1.25", "2", *more]


@pytest.fixture(scope="module")
def ran(stages, tmp_path_factory) -> tuple[Path, dict]:
    """(folder, the JSON line) of both priors at two scales, drawn without a stop."""
    out = tmp_path_factory.mktemp("ran") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(coco_images, "GeneratedImages", SMALL_SHARDS)
        assert coco.main(words(stages, out)) == 0
    return out, json.loads((out / "coco.json").read_text())


def test_the_paper_s_settings_are_the_defaults():
    words = ["--annotations", "a.json", "--images", "val2014"]
    found = tiny.arguments(coco, *words)
    selected, drawing, features = (found[name] for name in ("selected", "drawing", "judging"))
    assert (selected.num_captions, drawing.guidance_scales) == (30000, (1.25,))
    assert (drawing.priors, drawing.upsamplers) == (("diffusion", "ar"), ("256",))
    assert (selected.reference, features.reference_size) == ("all", None)
    assert tiny.arguments(coco, *words, "--count", "7")["selected"].num_captions == 7
    assert choose_features(features.features, None) == "inception" and coco.SIDE == 256


def test_each_picture_has_one_of_its_captions_which_the_seed_chooses(stages):
    captions, files = read_coco(str(stages["annotations"]))
    assert len(captions) == 5 * PICTURES and len(files) == PICTURES
    chosen = one_per_picture(captions, COUNT, "x", seed=3)
    assert (
        chosen
        == one_per_picture(captions[::-1], COUNT, "x", seed=3)
        != one_per_picture(captions, COUNT, "x")
    )
    assert len({caption.picture for caption in chosen}) == COUNT
    for caption in chosen:
        word, number = caption.text.split()
        assert ANIMALS.index(word) == 1000 - caption.picture and int(number) < 5
    everything = one_per_picture(captions, PICTURES, "x", seed=3)
    assert set(chosen) < set(everything) and len({c.text.split()[1] for c in everything}) > 1
    with pytest.raises(UserError, match="--num-captions"):
        one_per_picture(captions, PICTURES + 1, "x")


def test_both_priors_are_evaluated_at_every_scale_against_all_pictures(ran):
    out, found = ran
    at = [(point["prior"], point["guidance_scale"]) for point in found["points"]]
    assert at == [("diffusion", 1.25), ("diffusion", 2), ("ar", 1.25), ("ar", 2)]
    for point in found["points"]:
        assert (point["n_fake"], point["n_real"], point["n"]) == (COUNT, PICTURES, COUNT)
        assert point["fd_clip_low"] < point["fd_clip"] < point["fd_clip_high"]
        assert point["clip_score_low"] < point["clip_score"] < point["clip_score_high"]
    assert len({point["fd_clip"] for point in found["points"]}) == 4
    assert found["real"]["n"] == COUNT and found["settings"]["reference_size"] == SIDE
    assert (found["floor"]["count"], found["floor"]["reference"]) == (COUNT, PICTURES)
    table = (out / "coco.md").read_text()
    assert table.count("\n| floor: real against other real images | - | ") == 1
    assert table.count("\n| diffusion |") == table.count("\n| ar |") == 2
    assert "of 64 pixels are compared" in table and "6 images" in table  # and sizes that differ
    score, features = (text for text in found["notes"] if "that conditions the decoder" in text)
    assert "--score-clip" in score and "--features" in features
    assert score in table and features in table


def test_the_report_says_what_both_priors_draw_with(ran):
    out, found = ran
    table = (out / "coco.md").read_text()
    ar, diffusion = (found["settings"][f"prior {name}"] for name in ("ar", "diffusion"))
    assert (ar["guidance_scale"], ar["top_p"]) == (1.5, 0.95)  # those of the release
    assert (diffusion["guidance_scale"], diffusion["sampler"]) == (1.0, "ddim")
    for line in (f"| prior ar | name {ar['name']}, sha256 {ar['sha256']}, ", "| seed | 0 |"):
        assert line in table
    assert f"sha256 {found['settings']['decoder']['sha256']} |" in table
    assert "| decoder sees | z_i of the prior + the caption's tokens |" in table


def test_figures_are_those_of_the_pictures_that_the_stages_draw(ran, stages):
    """The first point, drawn by the pipeline itself and compared with pictures cut by hand."""
    captions, _ = read_coco(str(stages["annotations"]))
    chosen = one_per_picture(captions, COUNT, "x")
    unclip = UnCLIP.load(stages["decoder"], "diffusion", upsamplers=[stages["upsampler"]])
    prior = unclip.prior.sampling
    sampling = DecoderSamplingConfig(sampler="ddim", steps=2, guidance_scale=1.25)
    prior = PriorSamplingConfig("ddim", 2, prior.guidance_scale)
    texts = [caption.text for caption in chosen]
    pairs = [
        unclip.generate(texts[k : k + 2], [k, k + 1], sampling=sampling, prior_sampling=prior)
        for k in range(0, COUNT, 2)
    ]
    drawn = to_uint8(torch.cat(pairs))
    network = load_features("clip")
    real = torch.stack([to_uint8(decode(photograph(k, 120, 90), SIDE)) for k in range(PICTURES)])
    assert drawn.shape[-2:] == real.shape[-2:] == (SIDE, SIDE)
    expected = compute_distances(network, network(real), network(drawn), resamples=0)
    assert ran[1]["points"][0]["fd_clip"] == pytest.approx(expected["fd_clip"], rel=1e-5)
    clip, score = unclip.clip, CLIPScore()
    score.update(network(drawn), clip.embed_text(clip.tokenize(texts)).embed)
    assert ran[1]["points"][0]["clip_score"] == pytest.approx(score.compute()["clip_score"])


def test_a_run_that_was_stopped_goes_on_and_has_the_figures_of_a_whole_one(
    ran, stages, tmp_path, monkeypatch
):
    whole, drawn = UnCLIP.decode, []

    def decode(self, image_embed, seeds, *arguments):
        if len(drawn) == 4:
            raise KeyboardInterrupt  # in the second point, after one of its three shards
        drawn.append(list(seeds))
        return whole(self, image_embed, seeds, *arguments)

    monkeypatch.setattr(UnCLIP, "decode", decode)
    assert coco.main(words(stages, tmp_path / "out")) == 130
    assert drawn == [[0, 1], [2, 3], [4, 5], [0, 1]]

    def decode_all(self, image_embed, seeds, *arguments):
        drawn.append(list(seeds))
        return whole(self, image_embed, seeds, *arguments)

    monkeypatch.setattr(UnCLIP, "decode", decode_all)
    assert coco.main(words(stages, tmp_path / "out")) == 0
    assert drawn[4:] == [[2, 3], [4, 5], *[[0, 1], [2, 3], [4, 5]] * 2]
    again = json.loads((tmp_path / "out" / "coco.json").read_text())
    assert again == ran[1]


@pytest.mark.slow
def test_two_ranks_share_the_images_and_have_the_figures_of_one(ran, stages, tmp_path):
    """Rank 0 has two of the three shards of each point, rank 1 the other."""
    ranks = Ranks(tmp_path / "output", lambda: coco.main(words(stages, tmp_path / "two")), 2)
    assert ranks.wait() == [0, 0], ranks.output()[-3000:]

    def samples(folder):
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.tar")}

    assert len(samples(ran[0])) == 12 and samples(ran[0]) == samples(tmp_path / "two")
    two = json.loads((tmp_path / "two" / "coco.json").read_text())
    for one, other in zip(ran[1]["points"], two["points"], strict=True):
        for name, value in one.items():
            if not isinstance(value, float):
                assert other[name] == value
            else:  # the halves of the interval are drawn from rows in order of their sums
                assert other[name] == pytest.approx(value, rel=1e-4), name
    assert two["floor"]["mean"] == pytest.approx(ran[1]["floor"]["mean"], rel=1e-6)


def test_only_the_drawn_captions_pictures_can_be_the_reference(stages, tmp_path):
    more = ["--priors", "diffusion", "--reference", "drawn", "--guidance-scales", "1"]
    more += ["--upsamplers", "--reference-size", "32", "--resamples", "0"]
    (stages["images"] / "unused.txt").write_text("no picture")
    assert coco.main(words(stages, tmp_path / "out", *more)) == 0
    found = json.loads((tmp_path / "out" / "coco.json").read_text())
    (point,) = found["points"]
    assert (point["n_real"], point["n_fake"]) == (COUNT, COUNT) and "fd_clip_low" not in point
    assert "Images of 16 pixels are compared with real ones of 32" in found["notes"][0]
    (folder,) = (tmp_path / "out" / "samples").iterdir()
    (batch,) = StoredImages(str(folder)).batches(COUNT)
    assert batch["images"].shape == (COUNT, 3, 16, 16)


@pytest.mark.parametrize(
    ("more", "keyword"),
    [
        (["--num-captions", "10"], "--num-captions"),
        (["--images", "{annotations}"], "--images"),
        (["--annotations", "gone.json"], "gone.json"),
        (["--annotations", "{wrong}"], "MS-COCO"),
        (["--annotations", "{unnamed}"], "file_name"),
        (["--priors", "ar", "ar"], "--priors"),
        (["--priors", "{decoder}"], "DiffusionPrior"),
        (["--priors", "ar"], "--prior-sampler"),
        (["--guidance-scales", "1", "0.5"], "--guidance-scale"),
        (["--upsamplers", "{decoder}"], "Upsampler256"),
    ],
)
def test_what_is_wrong_is_one_sentence_and_nothing_is_drawn(
    more, keyword, stages, tmp_path, capsys
):
    places = stages | {"wrong": tmp_path / "wrong.json", "unnamed": tmp_path / "unnamed.json"}
    places["wrong"].write_text('{"annotations": [{"id": 1, "caption": "a cat"}]}')
    captions = [{"id": 1, "image_id": 3, "caption": "a cat"}] * COUNT
    places["unnamed"].write_text(json.dumps({"annotations": captions}))
    if "{unnamed}" in more:
        more = [*more, "--num-captions", "1"]
    assert coco.main(words(stages, tmp_path / "out", *(one.format(**places) for one in more))) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("python -m eval.coco: ") and keyword in last
    assert not (tmp_path / "out").exists()
