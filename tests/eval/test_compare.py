"""`eval.compare`: conditions that differ in their embedding only, with the metrics' figures."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from eval import compare, conditioning, distances, fid
from eval.captions import read_captions
from eval.comparison import Comparison
from eval.features import load_features
from eval.generated import GeneratedImages
from eval.source import Model, describe_weights
from tests.cluster.forks import Ranks
from tests.eval import tiny
from unclip_pl.data.decoding import decode
from unclip_pl.diffusion.noise import Noise
from unclip_pl.pipeline.locate import DEFAULT_PRIORS
from unclip_pl.pipeline.unclip import UnCLIP
from unclip_pl.pipeline.weights import load_stage
from unclip_pl.stages.ar_prior import ARPrior
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
        "few": tiny.shards(folder / "few", 3),
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


def test_all_six_conditions_have_figures_at_the_fixed_scale_and_at_their_best(ran):
    found = ran[1]["conditions"]
    assert list(found) == list(conditioning.TITLES)
    for name, condition in found.items():
        assert condition["fixed"]["guidance_scale"] == 2 and set(condition["sweep"]) == {"1", "2"}
        assert condition["sweep"]["1"]["n_fake"] == 6 and condition["fixed"]["n_fake"] == 12
        assert {"fd_clip", "kid", "clip_score", "r1", "fd_clip_low"} <= set(condition["best"])
        assert (
            condition["fixed"]["at_edge"] == [] and "guidance_scale" in condition["best"]["at_edge"]
        )
        assert ("prior_sweep" in condition) == (name in compare.PRIORS)
    assert len({json.dumps(condition["fixed"]) for condition in found.values()}) == 6
    # of random decoders every picture is worse than the real one
    best = max(condition["fixed"]["clip_score"] for condition in found.values())
    assert ran[1]["real"]["n"] == 12 and ran[1]["real"]["clip_score"] > best


def test_both_priors_have_the_same_guidance_and_the_same_sweep(ran):
    """What they draw with is in the settings: the guidance, and that nothing is cut off."""
    found, settings = ran[1]["conditions"], ran[1]["settings"]
    ar, diffusion = settings[conditioning.TITLES["ar"]], settings[conditioning.TITLES["diffusion"]]
    assert ar["guidance_scale"] == diffusion["guidance_scale"] == 1
    assert ar["temperature"] == ar["top_p"] == 1 and diffusion["steps"] == 2
    for name in compare.PRIORS:
        assert set(found[name]["prior_sweep"]) == {"1", "2"}
        assert found[name]["fixed"]["prior_guidance_scale"] == 1
        sweep = found[name]["prior_sweep"]
        assert sweep["1"]["fd_clip"] != sweep["2"]["fd_clip"]
        assert "prior_guidance_scale" in found[name]["best"]["at_edge"]
    options = tiny.arguments(compare)["options"]
    assert options.guidance_scales == options.prior_guidance_scales == (1, 1.25, 1.5, 2, 3, 4)


def test_each_condition_draws_what_the_stages_draw_from_its_embedding_with_the_same_noise(
    ran, stages
):
    """Image k is the decoder's for the condition's embedding, the caption, the noise of seed k."""
    model, text_model = Model(str(stages["decoder"]), "diffusion"), Model(str(stages["text"]))
    captions = read_captions(str(stages["shard"]))
    texts, unclip = [caption.text for caption in captions], model.unclip
    real = torch.stack([decode(caption.image, unclip.clip.image_size) for caption in captions])
    sampling = replace(unclip.decoder.sampling, guidance_scale=2.0)
    z_t = unclip.embed_text(texts)
    embeds = {"caption": None, "text": z_t, "text-decoder": z_t, "image": unclip.embed_images(real)}
    ar = UnCLIP(unclip.decoder, load_stage(DEFAULT_PRIORS["ar"], ARPrior), unclip.clip)
    for prior, system in {"ar": ar, "diffusion": unclip}.items():
        settings = ran[1]["settings"][conditioning.TITLES[prior]]
        own = {name: value for name, value in settings.items() if name not in ("name", "sha256")}
        prior_sampling = type(system.prior.sampling)(**own)
        embeds[f"{prior}-prior-1"] = system.sample_prior(texts, range(12), prior_sampling)
    assert len(embeds) == len(conditioning.TITLES)
    for name, embed in embeds.items():
        decoder = text_model.unclip.decoder if name == "text-decoder" else unclip.decoder
        batch = unclip.conditions(embed, texts)
        expected = decoder.sample(batch, Noise(range(12)), sampling)
        folder = ran[0] / "samples" / f"{name}-2"
        drawn = GeneratedImages(folder, captions, None, {}).load(range(12))
        assert (to_uint8(drawn).int() - to_uint8(expected).int()).abs().max() <= 1, name


def test_the_report_its_curves_pictures_and_events_lie_in_the_folder(ran):
    out, found = ran
    panels = compare.build_panels(found["conditions"], "fd_clip")
    assert len(panels) == 12 and {*panels[0].lines} == {*conditioning.TITLES.values()}
    report = (out / "compare.md").read_text()
    assert "(compare.png)" in report and "(compare-curves.png)" in report
    assert "| features | CLIP openmoji-judge |" in report
    table = report.partition("\n## ")[0]
    with Image.open(out / "compare-curves.png") as curves:
        assert curves.width > 1000 and curves.height > 1000
    assert table.count("| real pictures |") == table.count("| diffusion prior |") == 2
    assert table.count("| AR prior |") == 4 and table.count("| floor: real against") == 2
    assert table.count("z_i of the prior + the caption's tokens") == 4
    assert "| caption only | the caption's tokens" in table
    assert "1*, prior" in table or "2*, prior" in table
    with Image.open(out / "compare.png") as picture:
        assert picture.height >= 7 * 16 and picture.width > 3 * 16
        assert picture.text["captions"].count(";") == 2
    assert len(list((out / "tensorboard" / "compare").glob("events.out.tfevents*"))) == 1


def test_the_settings_hold_all_that_the_figures_depend_on(ran, biased, stages):
    settings = ran[1]["settings"]
    assert settings["decoder"] == describe_weights(stages["decoder"])
    text, ar = settings["decoder trained on text embeddings"], settings["AR prior"]
    assert text == describe_weights(stages["text"])
    assert ar["sha256"] == describe_weights(DEFAULT_PRIORS["ar"])["sha256"]
    assert (settings["upsamplers"], settings["precision"]) == ([], "fp32")
    assert settings["reference"] == "the captions' own pictures"
    assert settings["floor"] == str(stages["more"]) and settings["reference size"] == 16
    assert settings["guidance scales"] == [1] and settings["resamples"] == 5
    (upsampler,) = biased[1]["settings"]["upsamplers"]
    assert upsampler == describe_weights(biased[0] / "upsampler")
    report = (ran[0] / "compare.md").read_text()
    assert f"| decoder | name image, sha256 {settings['decoder']['sha256']} |" in report


def test_the_report_says_what_makes_figures_too_good_or_too_large(ran, biased):
    for needle in ("best guidance is chosen", "12 images and the features have"):
        assert any(needle in note for note in ran[1]["notes"])
        assert needle in (ran[0] / "compare.md").read_text()
    assert not any("best guidance" in note for note in biased[1]["notes"])


def test_the_scoring_clip_is_not_the_one_that_conditions(ran):
    settings = ran[1]["settings"]
    assert settings["CLIP that scores"] == "openmoji-judge"
    assert settings["features"] == "CLIP openmoji-judge"
    assert not any("conditions the decoder" in text for text in ran[1]["notes"])


@pytest.fixture(scope="module")
def biased(stages, tmp_path_factory):
    """Four captions, two larger images of each, no priors, scored by the CLIP that conditions."""
    out = tmp_path_factory.mktemp("biased")
    larger = str(tiny.upsampler(out / "upsampler"))
    more = ["--ar-prior", "none", "--diffusion-prior", "none", "--baseline", "text"]
    more += ["--num-captions", "4", "--guidance-scales", "--prior-guidance-scales"]
    more += ["--num-images", "2", "--upsamplers", larger, "--guidance-scale", "1"]
    more += ["--features", "openmoji", "--score-clip", "openmoji"]
    own = words(stages, out)
    start = own.index("--prior-sampler")  # this one and the next are of the diffusion prior
    assert compare.main([*own[:start], *own[start + 4 :], *more]) == 0
    return out, json.loads((out / "compare.json").read_text())


def test_fid_of_the_drawn_pictures_is_the_same_figure(ran, stages, capsys):
    words = ["--images", str(ran[0] / "samples" / "image-2"), "--reference", str(stages["shard"])]
    words += ["--features", "openmoji-judge", "--resamples", "0", "--device", "cpu"]
    assert fid.main(words) == 0
    found = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    figures = ran[1]["conditions"]["image"]["fixed"]
    for name in ("fd_clip", "precision", "recall"):
        assert found[name] == pytest.approx(figures[name], rel=1e-6)
    assert found["kid"] != pytest.approx(figures["kid"])  # there without own pairs


def test_a_scoring_clip_that_conditions_is_named_in_the_notes(biased):
    score, features = (text for text in biased[1]["notes"] if "conditions the decoder" in text)
    assert "--score-clip" in score and "--features" in features
    assert score in (biased[0] / "compare.md").read_text()
    assert "best" not in biased[1]["conditions"]["text"] and list(biased[1]["differences"]) == [
        "fixed"
    ]


def test_figures_are_means_over_several_larger_pictures_of_each_caption(biased, stages):
    out, found = biased
    assert found["settings"]["size"] == 64 and found["settings"]["images per caption"] == 2
    captions, network = read_captions(str(stages["shard"]), 4), load_features("openmoji")
    real = network(torch.stack([to_uint8(decode(one.image, 64)) for one in captions]))
    values = []
    for folder in ("text-1", "text-1-1"):
        drawn = to_uint8(
            GeneratedImages(out / "samples" / folder, captions, None, {}).load(range(4))
        )
        assert drawn.shape == (4, 3, 64, 64)
        values.append(distances.frechet(real, network(drawn)))
    figures = found["conditions"]["text"]["fixed"]
    assert values[0] != values[1]
    assert figures["fd_clip"] == pytest.approx(sum(values) / 2, rel=1e-6)


def test_what_is_not_swept_has_no_curve_and_stays_at_its_fixed_guidance(stages, tmp_path):
    out = tmp_path / "out"
    more = ["--ar-prior", "none", "--num-captions", "4", "--guidance-scales", "--text-decoder", ""]
    assert compare.main(words(stages, out, *more)) == 0
    found = json.loads((out / "compare.json").read_text())["conditions"]
    assert not any("sweep" in condition for condition in found.values())
    assert [name for name in found if "prior_sweep" in found[name]] == ["diffusion"]
    assert {condition["best"]["guidance_scale"] for condition in found.values()} == {2}
    assert found["text"]["best"] == found["text"]["fixed"]


def test_a_second_run_draws_nothing_and_has_the_same_figures(ran, stages, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in ran[0].rglob("*.tar")}

    def sampler(self, sampling, repeat=0):
        return lambda indices: pytest.fail("an image was drawn again")

    monkeypatch.setattr(conditioning.Conditioning, "sampler", sampler)
    assert compare.main(words(stages, ran[0])) == 0
    assert before == {path: path.stat().st_mtime_ns for path in ran[0].rglob("*.tar")}
    assert json.loads((ran[0] / "compare.json").read_text()) == ran[1]


def test_what_is_near_the_floor_has_no_sure_difference(ran, stages, tmp_path, monkeypatch):
    """A run over a copy of the folder, which draws nothing."""
    out = shutil.copytree(ran[0], tmp_path / "out")
    monkeypatch.setattr(Comparison, "near_floor", lambda self, one, other: {"kid"})
    assert compare.main(words(stages, out, "--overwrite")) == 0
    found = json.loads((out / "compare.json").read_text())["differences"]["fixed"]
    for differences in found.values():
        assert [name for name, one in differences.items() if one["at_floor"]] == ["kid"]
        assert not differences["kid"]["sure"]


@pytest.mark.slow
def test_two_ranks_give_the_same_pictures_and_figures(ran, stages, tmp_path):
    """Forks with the environment of `torchrun --nproc-per-node 2`."""
    ranks = Ranks(tmp_path / "output", lambda: compare.main(words(stages, tmp_path / "two")), 2)
    assert ranks.wait() == [0, 0], ranks.output()[-3000:]
    two = json.loads((tmp_path / "two" / "compare.json").read_text())

    def samples(folder: Path) -> dict[Path, bytes]:
        return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.tar")}

    assert samples(ran[0] / "samples") == samples(tmp_path / "two" / "samples")
    for name, condition in ran[1]["conditions"].items():
        for figure, value in condition["fixed"].items():
            close = pytest.approx(value, rel=1e-6, abs=1e-9) if isinstance(value, float) else value
            assert two["conditions"][name]["fixed"][figure] == close, (name, figure)
    for part in ("mean", "high"):
        assert two["floor"][part] == pytest.approx(ran[1]["floor"][part], rel=1e-6)
    score = two["differences"]["fixed"]["ar"]["clip_score"]["value"]
    assert score == pytest.approx(
        ran[1]["differences"]["fixed"]["ar"]["clip_score"]["value"], rel=1e-6
    )


@pytest.mark.parametrize(
    ("more", "keyword"),
    [
        (["--decoder", "{text}"], "--text-decoder"),
        (["--text-decoder", "{decoder}"], "--text-decoder"),
        (["--decoder", "gone.ckpt"], "gone.ckpt"),
        (["--ar-prior", "diffusion"], "ARPrior"),
        (["--ar-prior", "none", "--baseline", "ar"], "--baseline"),
        (["--captions", "{captions}"], "--reference"),
        (["--num-captions", "13"], "--num-captions"),
        (["--guidance-scales", "0.5"], "--guidance-scales"),
        (["--prior-guidance-scales", "0.5"], "--prior-guidance-scales"),
        (["--resamples", "1"], "--resamples"),
        (["--num-captions", "3"], "3 captions are too few"),
        (["--sweep-captions", "3"], "--sweep-captions is 3: give 4"),
        (["--reference", "{few}"], "3 real images are too few"),
        (["--prior-top-p", "2"], "--prior-top-p"),
        (["--ar-prior", "none", "--prior-top-p", "0.9"], "--prior-top-p"),
        (["--diffusion-prior", "none", "--baseline", "ar"], "--prior-steps"),
        (["--upsamplers", "1024"], "upsampler"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(more, keyword, stages, tmp_path, capsys):
    (tmp_path / "captions.txt").write_text("a dog\na cat\n")
    places = stages | {"captions": tmp_path / "captions.txt"}
    more = [word.format(**places) for word in more]
    assert compare.main(words(stages, tmp_path / "out", *more)) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("python -m eval.compare: ") and keyword in last
    assert not (tmp_path / "out" / "samples").exists()


def test_captions_without_pictures_leave_the_upper_bound_out(stages, tmp_path):
    file = tmp_path / "captions.txt"
    file.write_text("a dog\na cat\na fox\n")
    more = ["--captions", str(file), "--text-decoder", "", "--ar-prior", "none"]
    found = tiny.arguments(compare, *words(stages, tmp_path, *more))
    asked = [found[name] for name in ("asked", "drawing", "options")]
    model = Model(str(stages["decoder"]))
    conditions, notes = compare.load_conditions(*asked, model, read_captions(str(file)))
    assert [condition.name for condition in conditions] == ["caption", "text", "diffusion"]
    assert len(notes) == 3
