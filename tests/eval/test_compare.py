"""`eval.compare`: arms that differ in their embedding alone, judged as the metrics judge them."""

import html
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from eval import arms, compare, distances
from eval.captions import read_captions
from eval.drawn import Drawn
from eval.features import named
from eval.source import Model
from tests.cluster.forks import Ranks
from tests.eval import tiny
from unclip_pl.data.shards import decode
from unclip_pl.diffusion.noise import Noise
from unclip_pl.utils.images import to_uint8


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Folders of a decoder, of one on text embeddings, and shards of 12 and 30 drawings."""
    folder = tmp_path_factory.mktemp("stages")
    return {
        "decoder": tiny.decoder(folder / "image"),
        "text": tiny.decoder(folder / "text", "text", 1),
        "shard": tiny.shards(folder / "drawings", 12),
        "more": tiny.shards(folder / "more", 30, seed=1),
    }


def words(stages, out: Path, *more: str) -> list[str]:
    return [
        *("--decoder", str(stages["decoder"]), "--text-decoder", str(stages["text"])),
        *("--captions", str(stages["shard"]), "--floor", str(stages["more"])),
        *("--out", str(out), "--device", "cpu", "--batch-size", "8", "--resamples", "5"),
        *("--prior-sampler", "ddim", "--prior-steps", "2", "--prior-guidance-scales", "2"),
        *("--guidance-scales", "1", "--guidance-scale", "2", "--sweep-captions", "6"),
        *("--pictures", "3", "--features", "openmoji-judge", *more),
    ]


@pytest.fixture(scope="module")
def ran(stages, tmp_path_factory):
    """(folder, the JSON line) of a whole comparison."""
    out = tmp_path_factory.mktemp("compare") / "out"
    assert compare.main(words(stages, out)) == 0
    return out, json.loads((out / "compare.json").read_text())


def test_all_six_arms_are_judged_at_the_fixed_scale_and_at_their_best(ran):
    found = ran[1]["arms"]
    assert list(found) == list(arms.TITLES)
    for name, arm in found.items():
        assert arm["fixed"]["guidance_scale"] == 2 and set(arm["sweep"]) == {"1", "2"}
        assert arm["sweep"]["1"]["n_fake"] == 6 and arm["fixed"]["n_fake"] == 12
        assert {"fd_clip", "kid", "clip_score", "r1", "fd_clip_low"} <= set(arm["best"])
        assert arm["fixed"]["at_edge"] == [] and "guidance_scale" in arm["best"]["at_edge"]
        assert ("prior_sweep" in arm) == (name in compare.PRIORS)
    assert len({json.dumps(arm["fixed"]) for arm in found.values()}) == 6
    # of random decoders every picture is worse than the real one
    best = max(arm["fixed"]["clip_score"] for arm in found.values())
    assert ran[1]["real"]["n"] == 12 and ran[1]["real"]["clip_score"] > best


def test_both_priors_have_the_same_guidance_and_the_same_sweep(ran):
    """What they draw with is in the settings: the guidance, and that nothing is cut off."""
    found, settings = ran[1]["arms"], ran[1]["settings"]
    ar, diffusion = settings[arms.TITLES["ar"]], settings[arms.TITLES["diffusion"]]
    assert ar["guidance_scale"] == diffusion["guidance_scale"] == 1
    assert ar["temperature"] == ar["top_p"] == 1 and diffusion["steps"] == 2
    for name in compare.PRIORS:
        assert set(found[name]["prior_sweep"]) == {"1", "2"}
        assert found[name]["fixed"]["prior_guidance_scale"] == 1
        sweep = found[name]["prior_sweep"]
        assert sweep["1"]["fd_clip"] != sweep["2"]["fd_clip"]
        assert "prior_guidance_scale" in found[name]["best"]["at_edge"]
    given = compare.arguments().parse_args([])
    assert given.guidance_scales == given.prior_guidance_scales == [1, 1.25, 1.5, 2, 3, 4]


def test_each_arm_draws_what_the_stages_draw_from_its_embedding_with_the_same_noise(ran, stages):
    """Picture k must be the decoder's for the arm's embedding, the caption, the noise of seed k."""
    model, text_model = Model(str(stages["decoder"]), "diffusion"), Model(str(stages["text"]))
    captions = read_captions(str(stages["shard"]))
    texts, unclip = [caption.text for caption in captions], model.unclip
    real = torch.stack([decode(caption.image, unclip.clip.image_size) for caption in captions])
    sampling = replace(unclip.decoder.sampling, guidance_scale=2.0)
    z_t = unclip.embed_text(texts)
    embeds = {"caption": None, "text": z_t, "text-decoder": z_t, "image": unclip.embed_images(real)}
    for name, embed in embeds.items():
        decoder = text_model.unclip.decoder if name == "text-decoder" else unclip.decoder
        batch = unclip._text(texts) | {"embed": embed}
        expected = decoder.sample(batch, Noise(range(12)), sampling)
        drawn = Drawn(ran[0] / "samples" / f"{name}-2", captions, None, {}).pictures(range(12))
        assert (to_uint8(drawn).int() - to_uint8(expected).int()).abs().max() <= 1, name


def test_tables_pictures_page_and_events_lie_in_the_folder(ran):
    out, found = ran
    page = (out / "compare.html").read_text()
    assert all(html.escape(arms.TITLES[name]) in page for name in found["arms"])
    assert page.count("<svg") == 12 and "data:image/png;base64," in page
    table = (out / "compare.md").read_text()
    assert table.count("| real pictures |") == table.count("| diffusion prior |") == 2
    assert table.count("| AR prior |") == 4 and table.count("| floor: real against") == 2
    assert table.count("z_i of the prior + the caption's tokens") == 4
    assert "| caption alone | the caption's tokens" in table
    assert "1*, prior" in table or "2*, prior" in table
    with Image.open(out / "compare.png") as picture:
        assert picture.height >= 7 * 16 and picture.width > 3 * 16
        assert picture.text["captions"].count(";") == 2
    assert list((out / "tensorboard").glob("events.out.tfevents*"))


def test_the_judge_is_not_the_clip_that_conditions(ran):
    settings = ran[1]["settings"]
    assert settings["CLIP that scores"] == "openmoji-judge"
    assert settings["features"] == "CLIP openmoji-judge"
    assert not any("conditions the decoder" in text for text in ran[1]["said"])


@pytest.fixture(scope="module")
def biased(stages, tmp_path_factory):
    """Four captions, two larger pictures of each, no priors, judged by the CLIP that conditions."""
    out = tmp_path_factory.mktemp("biased")
    larger = str(tiny.upsampler(out / "upsampler"))
    more = ["--ar-prior", "none", "--diffusion-prior", "none", "--baseline", "text"]
    more += ["--num-captions", "4", "--guidance-scales", "--prior-guidance-scales"]
    more += ["--seeds", "2", "--upsamplers", larger, "--guidance-scale", "1"]
    more += ["--features", "openmoji", "--score-clip", "openmoji"]
    assert compare.main(words(stages, out, *more)) == 0
    return out, json.loads((out / "compare.json").read_text())


def test_a_judge_that_conditions_is_said_to(biased):
    said = [text for text in biased[1]["said"] if "conditions the decoder" in text]
    assert len(said) == 2 and said[0].startswith("The CLIP that scores is the one that conditions")
    assert said[1].startswith("The features of the Frechet distance, KID, precision and recall are")
    assert "best" not in biased[1]["arms"]["text"] and list(biased[1]["differences"]) == ["fixed"]


def test_figures_are_means_over_several_larger_pictures_of_each_caption(biased, stages):
    out, found = biased
    assert found["settings"]["size"] == 64 and found["settings"]["pictures per caption"] == 2
    captions, network = read_captions(str(stages["shard"]), 4), named("openmoji")
    real = network(torch.stack([to_uint8(decode(one.image, 64)) for one in captions]))
    values = []
    for folder in ("text-1", "text-1-1"):
        drawn = to_uint8(Drawn(out / "samples" / folder, captions, None, {}).pictures(range(4)))
        assert drawn.shape == (4, 3, 64, 64)
        values.append(distances.frechet(real, network(drawn)))
    figures = found["arms"]["text"]["fixed"]
    assert values[0] != values[1]
    assert figures["fd_clip"] == pytest.approx(sum(values) / 2, rel=1e-6)


def test_a_second_run_draws_nothing_and_says_the_same(ran, stages, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in ran[0].rglob("*.tar")}

    def draw(self, sampling, repeat=0):
        return lambda indices: pytest.fail("a picture was drawn again")

    monkeypatch.setattr(arms.Arm, "draw", draw)
    assert compare.main(words(stages, ran[0])) == 0
    assert before == {path: path.stat().st_mtime_ns for path in ran[0].rglob("*.tar")}
    assert json.loads((ran[0] / "compare.json").read_text()) == ran[1]


@pytest.mark.slow
def test_two_ranks_give_the_same_pictures_and_figures(ran, stages, tmp_path):
    """Forks with the environment of `torchrun --nproc-per-node 2`."""
    ranks = Ranks(tmp_path / "said", lambda: compare.main(words(stages, tmp_path / "two")), 2)
    assert ranks.wait() == [0, 0], ranks.output()[-3000:]
    two = json.loads((tmp_path / "two" / "compare.json").read_text())

    def samples(folder: Path) -> dict[Path, bytes]:
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.tar")}

    assert samples(ran[0] / "samples") == samples(tmp_path / "two" / "samples")
    for name, arm in ran[1]["arms"].items():
        for figure, value in arm["fixed"].items():
            close = pytest.approx(value, rel=1e-6, abs=1e-9) if isinstance(value, float) else value
            assert two["arms"][name]["fixed"][figure] == close, (name, figure)
    for part in ("mean", "high"):
        assert two["floor"][part] == pytest.approx(ran[1]["floor"][part], rel=1e-6)
    score = two["differences"]["fixed"]["ar"]["clip_score"]["value"]
    assert score == pytest.approx(
        ran[1]["differences"]["fixed"]["ar"]["clip_score"]["value"], rel=1e-6
    )


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--decoder", "{text}"], "was trained on text embeddings: give it as --text-decoder"),
        (["--text-decoder", "{decoder}"], "was trained on image embeddings: give --text-decoder"),
        (["--decoder", "gone.ckpt"], "There is no checkpoint gone.ckpt"),
        (["--ar-prior", "diffusion"], "holds a DiffusionPrior, and a ARPrior is needed"),
        (["--ar-prior", "none", "--baseline", "ar"], "--baseline is ar, and the arms are caption,"),
        (["--captions", "{captions}"], "have no pictures to compare with: give real ones with"),
        (["--num-captions", "13"], "13 captions were asked for"),
        (["--guidance-scales", "0.5"], "--guidance-scale is 0.5"),
        (["--prior-guidance-scales", "0.5"], "--prior-guidance-scales has 0.5: give 1"),
        (["--prior-top-p", "2"], "top_p of the AR prior is 2"),
        (["--upsamplers", "1024"], "upsampler"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(more, said, stages, tmp_path, capsys):
    (tmp_path / "captions.txt").write_text("a dog\na cat\n")
    places = stages | {"captions": tmp_path / "captions.txt"}
    more = [word.format(**places) for word in more]
    assert compare.main(words(stages, tmp_path / "out", *more)) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("python -m eval.compare: ") and said in last
    assert not (tmp_path / "out" / "samples").exists()


def test_captions_without_pictures_leave_the_upper_bound_out(stages, tmp_path):
    (tmp_path / "captions.txt").write_text("a dog\na cat\na fox\n")
    more = (
        "--captions",
        str(tmp_path / "captions.txt"),
        "--text-decoder",
        "",
        "--ar-prior",
        "none",
    )
    given = compare.arguments().parse_args(words(stages, tmp_path, *more))
    model = Model(str(stages["decoder"]))
    found, said = compare.arms_of(given, model, read_captions(given.captions))
    assert [arm.name for arm in found] == ["caption", "text", "diffusion"] and len(said) == 3
