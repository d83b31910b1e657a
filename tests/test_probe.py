"""Probing: principal components against numpy's SVD, all of them give the embedding back; labels stand where they must; the two commands."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.test_manipulate_commands import decoder, folder, place, run  # noqa: F401
from unclip_pl.cli import unclip as app
from unclip_pl.clip.fingerprint import ClipMismatch
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.data.store import Statistics
from unclip_pl.pipeline.unclip import UnCLIP, load_stage
from unclip_pl.probe import PrincipalComponents, labelled, paper_dimensions, zero_shot
from unclip_pl.stages.decoder import Decoder
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import load_image


def embeddings(count=200, dim=16):
    random = np.random.default_rng(0)
    return random.standard_normal((count, dim)) * np.arange(dim, 0, -1) + 3


def statistics(x):
    return Statistics(len(x), torch.tensor(x.mean(0)), torch.tensor(np.cov(x.T, bias=True)))


def test_reconstructions_are_the_best_of_their_rank_as_svd_finds_them():
    x = embeddings()
    principal = PrincipalComponents.of(statistics(x))
    u, s, v = np.linalg.svd(x - x.mean(0), full_matrices=False)
    for k in (1, 4, 15):
        best = x.mean(0) + u[:, :k] * s[:k] @ v[:k]
        np.testing.assert_allclose(
            principal.reconstruct(torch.tensor(x), k).numpy(), best, atol=1e-9
        )
        assert principal.share(k) == pytest.approx((s[:k] ** 2).sum() / (s**2).sum())


@pytest.mark.parametrize("count", [200, 5])
def test_all_components_give_the_embedding_back(count):
    principal = PrincipalComponents.of(statistics(embeddings(count)))
    z = torch.randn(3, 16)
    assert torch.equal(principal.reconstruct(z, 16), z)
    errors = [float((principal.reconstruct(z, k) - z).norm()) for k in (1, 4, 8, 16)]
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0
    if count > 16:  # the last one adds what is missing, no more
        step = principal.reconstruct(z, 15) - z
        assert float((step @ principal.components[:15].T.float()).abs().max()) < 1e-5


@pytest.mark.parametrize("k", [0, 17])
def test_an_impossible_number_of_components_is_a_sentence(k):
    with pytest.raises(UserError, match="principal components"):
        PrincipalComponents.of(statistics(embeddings())).reconstruct(torch.zeros(1, 16), k)


def test_the_papers_dimensions_are_those_of_1024_scaled():
    assert paper_dimensions(1024) == [20, 30, 40, 80, 120, 160, 200, 320]
    assert paper_dimensions(256) == [5, 8, 10, 20, 30, 40, 50, 80]
    assert paper_dimensions(16) == sorted(set(paper_dimensions(16)))


def test_zero_shot_probabilities_are_open_clips(folder):  # noqa: F811
    unclip = UnCLIP(load_stage(folder, Decoder))
    image, captions = torch.rand(1, 3, 64, 64) * 2 - 1, ["red apple", "teapot", "fox"]
    model = unclip.clip.model
    with torch.no_grad():
        logits = model(
            torch.zeros(1, 3, 64, 64), unclip.clip.tokenize(captions)
        )  # only its text side and its temperature are taken
        features = torch.nn.functional.normalize(unclip.embed_images(image), dim=1)
    expected = (logits[2] * features @ logits[1].T).softmax(1)
    torch.testing.assert_close(zero_shot(unclip, unclip.embed_images(image), captions), expected)


def test_a_label_stands_in_the_middle_and_leaves_the_edges():
    image = -torch.ones(3, 96, 96)
    image[0] = 1
    for text in ("iPod", "a very long label that must become small"):
        pasted = labelled(image, text)
        changed = (pasted - image).abs().amax(0) > 0.1
        rows, columns = changed.any(1).nonzero(), changed.any(0).nonzero()
        assert (
            int(columns[0]) > 5
            and int(columns[-1]) < 90
            and int(rows[0]) > 20
            and int(rows[-1]) < 76
        )
        assert abs(int(columns[0]) + int(columns[-1]) - 95) <= 4
        assert (pasted[:, 48] > 0.9).all(0).any() and (pasted[:, 40:56] < -0.5).all(
            0
        ).any()  # white paper, black letters
    with pytest.raises(UserError, match="label to paste is empty"):
        labelled(image, " ")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """An embedding store of a few drawings."""
    from tests.data.shardkit import write_shards
    from unclip_pl.data.store import EmbeddingStore

    path = tmp_path_factory.mktemp("store")
    shards = write_shards(path, [12])
    found = EmbeddingStore(path / "store")
    found.ensure(shards, FrozenCLIP(), progress=False)
    return path / "store"


def test_probe_pca_draws_a_picture_a_number_of_components(run, store, capsys):  # noqa: F811
    assert run("probe", "pca", "a.png", "--store", str(store), "--components", "2", "256") == [
        "a-pca2.png",
        "a-pca256.png",
        "pca.png",
    ]
    assert "a.png: 2 components (" in capsys.readouterr().out
    run(
        "vary", "a.png", "--num-images", "1"
    )  # the same seed and, with all components, the same embedding
    assert (load_image("out/a-0.png") - load_image("out/a-pca256.png")).abs().max() < 0.02


def test_a_store_of_another_clip_is_refused(run, store, monkeypatch):  # noqa: F811
    from unclip_pl.cli import probe
    from unclip_pl.data.store import EmbeddingStore

    manifest = EmbeddingStore(store).manifest
    monkeypatch.setattr(
        EmbeddingStore, "manifest", manifest | {"clip": manifest["clip"] | {"embed_dim": 512}}
    )
    studio = type("Studio", (), {"unclip": type("UnCLIP", (), {"clip": FrozenCLIP()})})
    with pytest.raises(ClipMismatch, match="The store"):
        probe.components(studio, store)


def test_probe_typographic_draws_a_row_a_label(run, capsys):  # noqa: F811
    names = run(
        "probe",
        "typographic",
        "a.png",
        "--object",
        "red apple",
        "--label",
        "iPod",
        "a/b?",
        "--num-images",
        "2",
    )
    assert names == [
        "a-a-b--0.png",
        "a-a-b--1.png",
        "a-iPod-0.png",
        "a-iPod-1.png",
        "a-no label-0.png",
        "a-no label-1.png",
        "typographic.png",
    ]
    told = capsys.readouterr().out
    assert "no label: CLIP says red apple " in told and "iPod: CLIP says" in told
    with Image.open("out/typographic.png") as figure:
        assert figure.height > 3 * 16


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["probe", "pca", "gone.png"], "There is no picture gone.png"),
        (
            ["probe", "pca", "a.png", "--components", "0", "--store", "STORE"],
            "0 principal components",
        ),
        (
            ["probe", "pca", "a.png", "--components", "257", "--store", "STORE"],
            "257 principal components",
        ),
        (["probe", "pca", "a.png", "--store", "gone"], "is no whole embedding store"),
        (
            ["probe", "typographic", "a.png", "--object", "apple", "--label", "Apple"],
            "is named twice",
        ),
        (
            ["probe", "typographic", "a.png", "--object", "apple", "--label", " "],
            "label to paste is empty",
        ),
        (
            [
                "probe",
                "typographic",
                "a.png",
                "--object",
                "apple",
                "--label",
                "iPod",
                "--num-images",
                "0",
            ],
            "--num-images is 0",
        ),
    ],
)
def test_bad_input_is_one_sentence(arguments, words, place, folder, store, capsys):  # noqa: F811
    arguments = [str(store) if word == "STORE" else word for word in arguments]
    assert app.main([*arguments, "--decoder", str(folder), "--out", "out"]) == 1
    error = [
        line for line in capsys.readouterr().err.strip().splitlines() if line.startswith("unclip: ")
    ]
    assert len(error) == 1 and words in error[0]
