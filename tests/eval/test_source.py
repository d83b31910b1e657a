"""Pictures that a model draws for a metric: once, resumably, the same from any number of ranks, and never mixed with those of other settings."""

import argparse
import json
import os
import signal
from pathlib import Path

import pytest
import torch

from eval import source
from eval.captions import Caption, read_captions
from eval.source import Drawn, add_arguments, open_source
from tests.eval import tiny
from unclip_pl.pipeline.unclip import UnCLIP
from unclip_pl.pipeline.weights import DEFAULT_PRIORS
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import to_uint8

CAPTIONS = [Caption(f"key {k}", f"caption {k}") for k in range(11)]


def draw(indices):
    """Picture k from seed k alone."""
    return torch.stack(
        [torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(k)) * 2 - 1 for k in indices]
    )


def drawn(folder: Path, draw=draw, captions=CAPTIONS, settings=None, **options) -> Drawn:
    return Drawn(folder, captions, draw, settings or {"guidance": 1.5}, shard=4, **options)


def all_of(*sources: Drawn, batch_size: int = 3) -> dict[str, tuple[bytes, str]]:
    batches = [batch for one in sources for batch in one.batches(batch_size)]
    return {
        key: (image.numpy().tobytes(), text)
        for b in batches
        for key, image, text in zip(b["keys"], b["images"], b["captions"], strict=True)
    }


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    return tiny.decoder(tmp_path_factory.mktemp("decoder") / "release")


@pytest.fixture(scope="module")
def shard(tmp_path_factory):
    return tiny.shards(tmp_path_factory.mktemp("drawings"), 6)


def given(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    parser.set_defaults(device="cpu", precision="fp32", compile=False, seed=7)
    return parser.parse_args(words)


def test_pictures_come_back_as_they_were_drawn_with_their_captions(tmp_path):
    found = all_of(drawn(tmp_path))
    assert list(found) == [f"{k:07d}" for k in range(11)]
    for k, (image, caption) in enumerate(found.values()):
        assert image == to_uint8(draw([k]))[0].numpy().tobytes() and caption == f"caption {k}"
    assert len(list(tmp_path.glob("*.tar"))) == 3 and len(drawn(tmp_path)) == 11


@pytest.mark.parametrize("world", [2, 3, 5])
def test_ranks_have_disjoint_shares_which_are_together_those_of_one(tmp_path, world):
    alone = all_of(drawn(tmp_path / "one"))
    ranks = [drawn(tmp_path / "many", rank=rank, world_size=world) for rank in range(world)]
    shares = [all_of(rank) for rank in ranks]
    assert (
        sum(map(len, shares)) == 11
        and {key: value for share in shares for key, value in share.items()} == alone
    )
    contents = lambda folder: {
        path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()
    }
    assert contents("one") == contents("many")


def test_a_killed_run_keeps_whole_shards_and_draws_the_rest(tmp_path):
    def killed(indices):
        if 6 in indices:
            os.kill(os.getpid(), signal.SIGKILL)  # in mid-shard, with a part of it written
        return draw(indices)

    if (child := os.fork()) == 0:
        drawn(tmp_path, killed).complete(2)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert [path.name for path in tmp_path.glob("[0-9]*.tar")] == ["00000.tar"] and list(
        tmp_path.glob(".*.tmp")
    )
    asked = []
    again = drawn(tmp_path, lambda indices: (asked.extend(indices), draw(indices))[1])
    assert all_of(again) == all_of(drawn(tmp_path / "whole")) and asked == list(range(4, 11))
    assert not list(tmp_path.glob(".*.tmp"))  # and what the kill left is gone
    asked.clear()
    assert all_of(again) and not asked


def test_the_first_captions_are_part_of_all(tmp_path):
    first, whole = drawn(tmp_path, first=6), drawn(tmp_path)
    assert len(first) == 6 and list(all_of(first)) == [f"{k:07d}" for k in range(6)]
    assert len(list(tmp_path.glob("*.tar"))) == 2 and all(
        batch["keys"] for batch in first.batches(1)
    )
    assert dict(list(all_of(whole).items())[:6]) == all_of(first) and len(all_of(whole)) == 11
    torch.testing.assert_close(whole.pictures([10, 0]), draw([10, 0]), rtol=0, atol=1 / 255)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"settings": {"guidance": 2.0}}, "holds pictures with guidance 1.5, and this run has 2.0"),
        ({"captions": [*CAPTIONS[:-1], Caption("x", "another")]}, "captions_sha256"),
        ({"settings": {"guidance": 1.5, "seed": 1}}, "with seed None, and this run has 1"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(tmp_path, changes, words):
    drawn(tmp_path).complete(4)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(UserError, match=words):
        drawn(tmp_path, **changes).complete(4)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_folder_of_other_shards_is_left_alone(tmp_path):
    (tmp_path / "00000.tar").write_bytes(b"mine")
    with pytest.raises(UserError, match=r"were not drawn here \(no samples.json\)"):
        drawn(tmp_path).complete(4)
    (tmp_path / "samples.json").write_text("{")
    with pytest.raises(UserError, match="is damaged"):
        drawn(tmp_path).complete(4)


@pytest.mark.parametrize("condition", ["prior", "text", "caption"])
def test_a_model_draws_what_its_pipeline_draws(release, shard, tmp_path, condition):
    words = ["--prior-sampler", "ddim", "--prior-steps", "2"] if condition == "prior" else []
    opened = open_source(
        given(
            "--ckpt",
            str(release),
            "--captions",
            str(shard),
            "--condition",
            condition,
            "--samples",
            str(tmp_path),
            *words,
        )
    )
    images = torch.cat([batch["images"] for batch in opened.batches(8)])
    captions = [caption.text for caption in read_captions(str(shard))]
    unclip = UnCLIP.load(release, DEFAULT_PRIORS["diffusion"] if condition == "prior" else None)
    prior = None
    if condition == "prior":
        from dataclasses import replace

        prior = replace(unclip.prior.sampling, sampler="ddim", steps=2)
    assert torch.equal(
        images, to_uint8(unclip.generate(captions, range(7, 13), condition, prior_sampling=prior))
    )
    assert json.loads((tmp_path / "samples.json").read_text())["settings"]["condition"] == condition


def test_samples_lie_in_the_cache_in_a_folder_of_their_settings(release, shard, cache):
    words = ["--ckpt", str(release), "--captions", str(shard), "--condition", "caption"]
    folders = [
        open_source(given(*words, *more)).folder
        for more in ([], [], ["--guidance-scale", "2"], ["--num-captions", "5"])
    ]
    assert (
        folders[0] == folders[1]
        and len(set(folders)) == 3
        and all(folder.parent == cache / "samples" for folder in folders)
    )


def test_a_decoder_on_text_embeddings_is_conditioned_on_them_unasked(tmp_path, shard):
    opened = open_source(
        given("--ckpt", str(tiny.decoder(tmp_path / "text", "text")), "--captions", str(shard))
    )
    assert opened.settings["condition"] == "text" and opened.settings["prior"] is None


def test_a_folder_of_images_needs_no_model(shard):
    assert (
        sum(
            len(batch["keys"])
            for batch in open_source(given("--images", str(shard.parent))).batches(4)
        )
        == 6
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "Say what is to be judged"),
        (["--images", "{shards}", "--ckpt", "openmoji"], "Say what is to be judged"),
        (["--images", "{shards}", "--prior", "ar"], "--prior is for pictures that a model draws"),
        (
            ["--ckpt", "openmoji", "--condition", "text", "--prior", "ar"],
            "--prior is given, and --condition text uses none",
        ),
        (
            ["--ckpt", "{prior}", "--condition", "text"],
            "holds a DiffusionPrior, and a Decoder is needed",
        ),
        (
            ["--ckpt", "openmoji", "--prior", "{decoder}"],
            "holds a Decoder, and a DiffusionPrior or ARPrior is needed",
        ),
        (["--ckpt", "gone.ckpt"], "There is no checkpoint gone.ckpt"),
        (
            ["--ckpt", "{decoder}", "--captions", "gone.txt", "--condition", "text"],
            "gone.txt cannot be read",
        ),
        (
            [
                "--ckpt",
                "{decoder}",
                "--steps",
                "0",
                "--condition",
                "text",
                "--captions",
                "{shards}",
            ],
            "--steps is 0",
        ),
    ],
)
def test_what_cannot_be_opened_is_one_sentence(words, said, release, shard):
    places = {"shards": shard.parent, "prior": DEFAULT_PRIORS["diffusion"], "decoder": release}
    with pytest.raises(UserError, match=said):
        open_source(given(*(word.format(**places) for word in words)))


def test_captions_of_every_kind(tmp_path, shard, caplog):
    text = tmp_path / "mine.txt"
    text.write_text("a dog\n\n  a cat \n \n", encoding="utf-8")
    assert [(caption.key, caption.text) for caption in read_captions(str(text))] == [
        ("line 1", "a dog"),
        ("line 3", "a cat"),
    ]
    assert "has 2 blank captions (line 2, line 4), which were passed over" in caplog.text
    coco = tmp_path / "captions.json"
    coco.write_text(
        json.dumps(
            {
                "annotations": [
                    {"id": k, "image_id": k // 5, "caption": f" picture\n {k} "} for k in range(50)
                ]
            }
        )
    )
    some = read_captions(str(coco), 10)
    assert some == read_captions(str(coco), 10) and len({caption.picture for caption in some}) == 10
    assert all(caption.text == f"picture {caption.key}" for caption in some) and [
        c.key for c in some
    ] != [str(k) for k in range(10)]
    pictured = read_captions(str(shard), 4)
    assert len(pictured) == 4 and all(caption.image for caption in pictured)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("blank.txt", b"\n \n", "There are no captions"),
        ("bytes.txt", b"\xff\xfe", "are not UTF-8"),
        ("wrong.json", b"[1]", "is none of MS-COCO's"),
        ("wrong.json", b"{", "is none of MS-COCO's"),
        ("one.txt", b"dog", "2 captions were asked for and"),
    ],
)
def test_captions_that_are_none_are_one_sentence(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        read_captions(str(tmp_path / name), 2)


def test_another_file_of_the_same_name_is_another_model(tmp_path):
    tiny.decoder(tmp_path / "a" / "mine")
    tiny.decoder(tmp_path / "b" / "mine", seed=1)
    one, two = (source.weights_of(tmp_path / name / "mine") for name in "ab")
    assert (
        one["name"] == two["name"]
        and one["sha256"] != two["sha256"]
        and one == source.weights_of(tmp_path / "a" / "mine")
    )
