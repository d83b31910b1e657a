"""`eval.compare`: arms that differ in their embedding alone, sets judged as the metrics judge them, intervals that hold what they should."""

import html
import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from eval import arms, compare
from eval.captions import read_captions
from eval.judge import Difference, Seen, paired_differences
from eval.source import Model
from tests.eval import tiny
from tests.eval.sets import features
from tests.training.forks import Ranks
from unclip_pl.diffusion.noise import Noise
from unclip_pl.errors import UserError
from unclip_pl.images import load_image, to_uint8


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """Folders of a decoder, of one on text embeddings, and a shard of twelve drawings."""
    folder = tmp_path_factory.mktemp("stages")
    return {"decoder": tiny.decoder(folder / "image"), "text": tiny.decoder(folder / "text", "text", 1), "shard": tiny.shards(folder / "drawings", 12)}


def words(stages, out: Path, *more: str) -> list[str]:
    return [
        "--decoder", str(stages["decoder"]), "--text-decoder", str(stages["text"]), "--captions", str(stages["shard"]), "--out", str(out), "--device", "cpu",
        "--prior-sampler", "ddim", "--prior-steps", "2", "--guidance-scales", "1", "--sweep-captions", "6", "--batch-size", "8", "--resamples", "5",
        "--features", "clip",
        "--pictures", "3", "--guidance-scale", "2", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def ran(stages, tmp_path_factory):
    """(folder, the JSON line) of a whole comparison."""
    out = tmp_path_factory.mktemp("compare") / "out"
    assert compare.main(words(stages, out)) == 0
    return out, json.loads((out / "compare.json").read_text())


def test_all_six_arms_are_judged_at_the_fixed_scale_and_at_their_best(ran):
    found = ran[1]["arms"]
    assert list(found) == list(arms.TITLES)
    for arm in found.values():
        assert arm["fixed"]["guidance_scale"] == 2 and set(arm["sweep"]) == {"1", "2"}
        best = min(arm["sweep"], key=lambda scale: arm["sweep"][scale]["fd_clip"])
        assert arm["best"]["guidance_scale"] == float(best) and arm["sweep"]["1"]["n_fake"] == 6 and arm["fixed"]["n_fake"] == 12
        assert {"fd_clip", "kid", "clip_score", "precision", "recall", "r1", "fd_clip_low", "clip_score_high"} <= set(arm["best"])
    assert len({json.dumps(arm["fixed"]) for arm in found.values()}) == 6
    assert ran[1]["real"]["n"] == 12 and ran[1]["real"]["clip_score"] > max(arm["fixed"]["clip_score"] for arm in found.values())  # random decoders


def test_each_arm_draws_what_the_stages_draw_from_its_embedding_with_the_same_noise(ran, stages):
    """Picture k of every arm must be the decoder's for that arm's embedding, the caption, and the noise of seed k."""
    model, text_model = Model(str(stages["decoder"]), "diffusion"), Model(str(stages["text"]))
    captions = read_captions(str(stages["shard"]))
    texts, unclip = [caption.text for caption in captions], model.unclip
    real = torch.stack([load_image(_file(ran[0].parent / f"{k}.png", caption.image)) for k, caption in enumerate(captions)])
    sampling = compare.replace(unclip.decoder.sampling, guidance_scale=2.0)
    embeds = {"caption": None, "text": unclip.embed_text(texts), "text-decoder": unclip.embed_text(texts), "image": unclip.embed_images(real)}
    for name, embed in embeds.items():
        decoder = text_model.unclip.decoder if name == "text-decoder" else unclip.decoder
        expected = decoder.sample(unclip._text(texts) | {"embed": embed}, Noise(range(12)), sampling)
        drawn = compare.Drawn(ran[0] / "samples" / f"{name}-2", captions, None, {}).pictures(range(12))
        assert (to_uint8(drawn).int() - to_uint8(expected).int()).abs().max() <= 1, name


def _file(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_priors_are_drawn_once_whatever_the_guidance():
    calls = []
    embed = arms.remembered(lambda indices: (calls.append(list(indices)), torch.tensor([[float(k)] for k in indices]))[1])
    assert embed([3, 4]).tolist() == embed([3, 4]).tolist() == [[3.0], [4.0]] and embed([4]).tolist() == [[4.0]]
    assert calls == [[3, 4]]


def test_tables_pictures_page_and_events_lie_in_the_folder(ran):
    out, found = ran
    page = (out / "compare.html").read_text()
    assert all(html.escape(arms.TITLES[name]) in page for name in found["arms"]) and page.count("<svg") == 6 and "data:image/png;base64," in page
    table = (out / "compare.md").read_text()
    assert table.count("| real pictures |") == table.count("| diffusion prior |") == 2 and table.count("| AR prior |") == 4
    with Image.open(out / "compare.png") as picture:
        assert picture.height >= 7 * 16 and picture.width > 3 * 16 and picture.text["captions"].count(";") == 2
    assert list((out / "tensorboard").glob("events.out.tfevents*"))
    assert any("--score-clip" in text for text in found["said"])  # the scoring CLIP is the decoder's own


def test_a_second_run_draws_nothing_and_says_the_same(ran, stages, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in ran[0].rglob("*.tar")}
    monkeypatch.setattr(arms.Arm, "draw", lambda self, sampling: lambda indices: pytest.fail("a picture was drawn again"))
    assert compare.main(words(stages, ran[0])) == 0
    assert before == {path: path.stat().st_mtime_ns for path in ran[0].rglob("*.tar")}
    assert json.loads((ran[0] / "compare.json").read_text()) == ran[1]


@pytest.mark.slow
def test_two_ranks_give_the_same_pictures_and_figures(ran, stages, tmp_path):
    """Forks with the environment of `torchrun --nproc-per-node 2`."""
    ranks = Ranks(tmp_path / "said", lambda: compare.main(words(stages, tmp_path / "two")), 2)
    assert ranks.wait() == [0, 0], ranks.said()[-3000:]
    two = json.loads((tmp_path / "two" / "compare.json").read_text())
    samples = lambda folder: {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.tar")}
    assert samples(ran[0] / "samples") == samples(tmp_path / "two" / "samples")
    for name, arm in ran[1]["arms"].items():
        for figure, value in arm["fixed"].items():
            assert two["arms"][name]["fixed"][figure] == (pytest.approx(value, rel=1e-6) if isinstance(value, float) else value), (name, figure)
    assert two["differences"]["fixed"]["ar"]["clip_score"]["value"] == pytest.approx(ran[1]["differences"]["fixed"]["ar"]["clip_score"]["value"], rel=1e-6)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--decoder", "{text}"], "was trained on text embeddings: give it as --text-decoder"),
        (["--text-decoder", "{decoder}"], "was trained on image embeddings: give --text-decoder one of"),
        (["--decoder", "gone.ckpt"], "There is no checkpoint gone.ckpt"),
        (["--ar-prior", "diffusion"], "holds a DiffusionPrior, and a ARPrior is needed"),
        (["--ar-prior", "none", "--baseline", "ar"], "--baseline is ar, and the arms are caption, text,"),
        (["--captions", "{captions}"], "have no pictures to compare with: give real ones with --reference"),
        (["--num-captions", "13"], "13 captions were asked for"),
        (["--guidance-scales", "0.5"], "--guidance-scale is 0.5"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence(more, said, stages, tmp_path, capsys):
    (tmp_path / "captions.txt").write_text("a dog\na cat\n")
    places = stages | {"captions": tmp_path / "captions.txt"}
    assert compare.main(words(stages, tmp_path / "out", *(word.format(**places) for word in more))) == 1
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("python -m eval.compare: ") and said in last and not (tmp_path / "out" / "samples").exists()


def test_captions_without_pictures_leave_the_upper_bound_out(stages, tmp_path):
    (tmp_path / "captions.txt").write_text("a dog\na cat\na fox\n")
    given = compare.arguments().parse_args(words(stages, tmp_path, "--captions", str(tmp_path / "captions.txt"), "--text-decoder", "", "--ar-prior", "none"))
    found, said = compare.arms_of(given, Model(str(stages["decoder"])), read_captions(given.captions))
    assert [arm.name for arm in found] == ["caption", "text", "diffusion"] and len(said) == 3


def seen(seed: int, n: int = 300, shift: float = 0.0) -> Seen:
    rows = features(n, 16, seed, shift)
    return Seen(torch.arange(n), rows, rows)


def test_a_set_differs_from_itself_by_nothing_and_from_a_worse_one_for_sure():
    real, text = features(300, 16, 5), features(300, 16, 6)
    same = paired_differences(seen(1), seen(1), text, real, resamples=20)
    assert {name: (one.value, one.low, one.high) for name, one in same.items()} == dict.fromkeys(("clip_score", "r1", "fd"), (0.0, 0.0, 0.0))
    worse = paired_differences(seen(1), seen(1, shift=1.0), text, real, resamples=20)["fd"]
    better = paired_differences(seen(1, shift=1.0), seen(1), text, real, resamples=20)["fd"]
    assert worse.sure and worse.value > 0 and better.value == pytest.approx(-worse.value) and not Difference(0.1, -0.1, 0.3).sure


def test_interval_of_the_score_is_that_of_a_paired_mean():
    """Against the closed form: 1.96 standard errors of the mean of the differences, which pairing makes much smaller than unpaired ones."""
    a, text = seen(1), features(300, 16, 6)
    b = a._replace(image_embed=a.image_embed + 0.05 * features(300, 16, 9))
    one = paired_differences(a, b, text, None, resamples=800)["clip_score"]
    cosine = lambda x: 100 * torch.nn.functional.cosine_similarity(x.image_embed.double(), text.double())
    apart = cosine(b) - cosine(a)
    assert one.value == pytest.approx(apart.mean().item(), rel=1e-6)
    assert (one.high - one.low) / 2 == pytest.approx(1.96 * apart.std().item() / 300**0.5, rel=0.1)


def test_reference_of_other_pictures_is_halved_by_itself():
    text, real = features(300, 16, 6), features(500, 16, 5)
    one, two = (paired_differences(seen(1), seen(2, shift=0.2), text, rows, resamples=30, paired=False)["fd"] for rows in (real, real.flip(0)))
    assert one.value == pytest.approx(two.value, rel=1e-9) and one.sure and two.sure and one.low != two.low


def test_interval_of_the_distance_is_as_wide_as_fresh_sets_differ():
    """Sets drawn anew are the oracle: the half width must be about 1.96 times the spread of the difference over them."""
    text, apart = features(200, 16, 6), []
    for k in range(24):
        sets = seen(3 * k, 200), seen(3 * k + 1, 200, shift=0.1)
        apart.append(paired_differences(*sets, text, features(200, 16, 3 * k + 2), resamples=20)["fd"])
    spread = 1.96 * torch.tensor([one.value for one in apart]).std().item()
    width = torch.tensor([(one.high - one.low) / 2 for one in apart]).mean().item()
    assert 0.6 < width / spread < 1.6


def test_sets_of_other_captions_are_refused():
    with pytest.raises(UserError, match="not of the same captions"):
        paired_differences(seen(1), seen(1, 299), features(300, 16, 6), None)
