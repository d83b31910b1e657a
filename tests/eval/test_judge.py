"""Who judges: by default never the CLIP whose embeddings the pictures are drawn from."""

import argparse
from pathlib import Path

import pytest
import torch

from eval import clip_score
from eval.judge import EMBEDDED_JUDGE, Judge, same_clip, score_clip
from tests.eval import tiny
from unclip_pl.clip import loading as _open_clip
from unclip_pl.clip.config import CLIPConfig
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.utils.errors import UserError


@pytest.fixture(scope="module")
def conditions():
    """The fingerprint of the CLIP that conditions the embedded stages."""
    return FrozenCLIP().fingerprint()


def options(**given: str | None) -> argparse.Namespace:
    named = {"features": None, "score_clip": None, "captions": "openmoji"} | given
    return argparse.Namespace(**named, device="cpu", precision="fp32")


def test_the_judge_in_the_package_is_another_clip_and_small(conditions):
    judge = FrozenCLIP(CLIPConfig(EMBEDDED_JUDGE))
    assert not same_clip(conditions, judge.fingerprint())
    assert same_clip(conditions, FrozenCLIP().fingerprint())
    folder = _open_clip.folder_of(EMBEDDED_JUDGE)
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 8_000_000
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "OpenMoji" in card and "never conditions" in card and "R@1" in card


def test_by_default_the_package_judges_what_its_own_clip_conditions(conditions):
    judge = Judge.asked(options(), conditions)
    assert judge.clip.config.model == EMBEDDED_JUDGE and judge.network is judge.scores
    assert judge.network.frechet == "fd_clip" and judge.bias(conditions) == []


def test_a_network_that_is_the_conditioner_is_said_to_be(conditions, caplog):
    score = Judge.asked(options(score_clip="openmoji"), conditions).bias(conditions)
    features = Judge.asked(options(features="openmoji"), conditions).bias(conditions)
    assert "scores" in score[0] and "--score-clip" in score[0] and len(score) == 1
    assert "features" in features[0] and "--features" in features[0] and len(features) == 1
    assert caplog.text.count("conditions the decoder") == 2
    copy = f"local-dir:{_open_clip.folder_of('openmoji')}"  # another name, the same CLIP
    assert len(Judge(copy, copy).bias(conditions)) == 2


def test_for_other_data_a_judge_must_be_named(conditions):
    other = conditions | {"config": conditions["config"] | {"model": "ViT-L-14"}}
    with pytest.raises(UserError, match="embeddings of the CLIP ViT-L-14.*one with --score-clip"):
        Judge.asked(options(captions="captions.txt"), other)
    assert score_clip("ViT-B-32/openai", other, "--clip") == "ViT-B-32/openai"
    assert score_clip(None, None, "--clip") == EMBEDDED_JUDGE


def test_clip_score_is_the_judges_by_default(tmp_path: Path, caplog, capsys):
    decoder, shard = tiny.decoder(tmp_path / "decoder"), tiny.shards(tmp_path / "drawings", 3)
    words = ["--device", "cpu", "--ckpt", str(decoder), "--captions", str(shard)]
    words += ["--condition", "text", "--samples", str(tmp_path / "samples")]
    assert clip_score.main(words) == 0
    assert '"clip": "openmoji-judge"' in capsys.readouterr().out and not caplog.text
    assert clip_score.main([*words, "--clip", "openmoji"]) == 0
    assert "the same CLIP scores them" in caplog.text


def test_retrieval_by_the_judge_is_far_above_chance(tmp_path):
    """40 held-out drawings and their captions; by chance 2.5 % are found first."""
    from eval.captions import read_captions
    from eval.judge import pictures_of
    from eval.paired import found_first

    judge = Judge(EMBEDDED_JUDGE, EMBEDDED_JUDGE)
    captions = read_captions(str(tiny.shards(tmp_path, 40, size=64)))
    seen = judge.look(pictures_of(captions, 64, 40))
    first = found_first(seen.image_embed, judge.text(captions)[seen.number])
    assert first.mean().item() > 0.5 and seen.number.tolist() == list(range(len(captions)))
    assert torch.isfinite(seen.features).all()
