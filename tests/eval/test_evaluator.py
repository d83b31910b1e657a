"""What evaluates: by default never the CLIP whose embeddings the images are drawn from."""

import json
from pathlib import Path

import pytest
import torch

from eval import clip_score, fid
from eval.captions import read_captions
from eval.commands import choose_features
from eval.evaluator import (
    SCORING_CLIP,
    Evaluator,
    caption_images,
    choose_score_clip,
    same_clip,
)
from eval.paired import own_caption_first
from tests.eval import tiny
from unclip_pl.clip import loading
from unclip_pl.clip.config import CLIPConfig
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.utils.errors import UserError


@pytest.fixture(scope="module")
def fingerprint():
    """Of the CLIP that conditions the embedded stages."""
    return FrozenCLIP().fingerprint()


def evaluator(fingerprint, features=None, score_clip=None, captions="openmoji") -> Evaluator:
    """As the commands choose it from their options."""
    return Evaluator(
        choose_features(features, captions), choose_score_clip(score_clip, fingerprint, captions)
    )


def test_the_scoring_clip_in_the_package_is_another_clip_and_small(fingerprint):
    scoring = FrozenCLIP(CLIPConfig(SCORING_CLIP))
    assert not same_clip(fingerprint, scoring.fingerprint())
    assert same_clip(fingerprint, FrozenCLIP().fingerprint())
    folder = loading.folder_of(SCORING_CLIP)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8_000_000
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "OpenMoji" in card and "never conditions" in card and "R@1" in card


def test_by_default_the_package_scores_what_its_own_clip_conditions(fingerprint):
    default = evaluator(fingerprint)
    assert default.clip.config.model == SCORING_CLIP and default.network is default.scores
    assert default.network.frechet == "fd_clip"
    assert default.shared_clip_warnings(fingerprint) == []


def test_a_network_that_is_the_conditioning_clip_is_named_in_a_warning(fingerprint, caplog):
    (score,) = evaluator(fingerprint, score_clip="openmoji").shared_clip_warnings(fingerprint)
    (features,) = evaluator(fingerprint, features="openmoji").shared_clip_warnings(fingerprint)
    assert "--score-clip" in score and "--features" in features
    assert score in caplog.text and features in caplog.text
    copy = f"local-dir:{loading.folder_of('openmoji')}"  # another name, the same CLIP
    assert len(Evaluator(copy, copy).shared_clip_warnings(fingerprint)) == 2


def test_for_other_data_a_scoring_clip_must_be_named(fingerprint):
    other = fingerprint | {"config": fingerprint["config"] | {"model": "ViT-L-14"}}
    with pytest.raises(UserError, match="--score-clip"):
        evaluator(other, captions="captions.txt")
    assert choose_score_clip("ViT-B-32/openai", other, None) == "ViT-B-32/openai"
    assert choose_score_clip(None, None, "openmoji") == SCORING_CLIP
    for captions in (None, "captions.txt"):  # of a folder, or of a decoder without a CLIP
        with pytest.raises(UserError, match="not known.*--score-clip"):
            choose_score_clip(None, None, captions)
    with pytest.raises(UserError, match="CLIP ViT-L-14.*--score-clip"):
        choose_score_clip(None, other, "openmoji")


def last_line(capsys: pytest.CaptureFixture) -> dict:
    return json.loads(capsys.readouterr().out.strip().splitlines()[-1])


def test_clip_score_is_by_the_scoring_clip_by_default(tmp_path: Path, caplog, capsys):
    decoder, shard = tiny.decoder(tmp_path / "decoder"), tiny.shards(tmp_path / "drawings", 3)
    words = ["--device", "cpu", "--decoder", str(decoder), "--captions", str(shard)]
    words += ["--condition", "text", "--samples", str(tmp_path / "samples")]
    assert clip_score.main(words) == 0
    found = last_line(capsys)
    assert (found["clip"], found["notes"]) == ("openmoji-judge", []) and not caplog.text
    assert found["drawn"]["condition"] == "text" and found["drawn"]["decoder"]["sha256"]
    assert found["captions_from"] == str(shard)
    assert clip_score.main([*words, "--score-clip", "openmoji"]) == 0
    (note,) = last_line(capsys)["notes"]
    assert "--score-clip" in note and note in caplog.text


def test_distances_by_the_clip_that_conditions_are_said_to_be_by_it(tmp_path, caplog, capsys):
    decoder, shard = tiny.decoder(tmp_path / "decoder"), tiny.shards(tmp_path / "drawings", 4)
    words = ["--device", "cpu", "--decoder", str(decoder), "--captions", str(shard)]
    words += ["--condition", "text", "--samples", str(tmp_path / "samples"), "--resamples", "0"]
    for features, expected in (("clip", True), ("openmoji-judge", False)):
        caplog.clear()
        assert fid.main([*words, "--features", features]) == 0
        printed = capsys.readouterr().out
        found = json.loads(printed.strip().splitlines()[-1])
        notes = [note for note in found["notes"] if "--features" in note]
        assert len(notes) == expected == ("--features" in caplog.text)
        assert all(note in printed.partition("\n{")[0] for note in found["notes"])
        assert found["drawn"]["seed"] == 0 and found["floor"] is None
        assert found["captions_from"] == str(shard) in printed
    more = ["--features", "clip", "--floor"]
    assert fid.main([*words, *more, str(tiny.shards(tmp_path / "more", 8, seed=1))]) == 0
    printed = capsys.readouterr().out
    floor = json.loads(printed.strip().splitlines()[-1])["floor"]
    assert (floor["count"], floor["reference"]) == (4, 4)
    said = [f"{floor[part]['fd_clip']:.4g}" for part in ("mean", "high")]
    kids = [f"{1000 * floor[part]['kid']:.4g}" for part in ("mean", "high")]
    assert f"{', up to '.join(said)}, KID x 1000 {', up to '.join(kids)}" in printed
    assert fid.main([*words, *more, str(shard)]) == 0
    note = "No floor: it takes 8 real images, and --floor has 4."
    assert note in capsys.readouterr().out
    assert fid.main([*words, *more, str(tmp_path / "nothing")]) == 1


def test_retrieval_by_the_scoring_clip_is_far_above_chance(tmp_path):
    """40 held-out drawings and their captions; by chance 2.5 % are found first."""
    scoring = Evaluator(SCORING_CLIP, SCORING_CLIP)
    captions = read_captions(str(tiny.shards(tmp_path, 40, size=64)))
    images = scoring.extract(caption_images(captions, 64, 40))
    first = own_caption_first(images.image_embed, scoring.embed_captions(captions)[images.number])
    assert first.mean().item() > 0.5
    assert images.number.tolist() == list(range(len(captions)))
    assert torch.isfinite(images.features).all()
