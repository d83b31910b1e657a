"""`unclip probe pca | typographic`: files, figures, and bad input."""

import pytest
from PIL import Image

from tests.cli.shell import error_of, run_unclip
from tests.data.shardkit import write_shards
from unclip_pl.clip.fingerprint import ClipMismatch
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.probe import principal_components
from unclip_pl.utils.images import load_image


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """An embedding store of a few drawings."""
    path = tmp_path_factory.mktemp("store")
    EmbeddingStore(path / "store").ensure(write_shards(path, [12]), FrozenCLIP(), progress=False)
    return path / "store"


def test_pca_draws_a_picture_for_each_number_of_components(run, store, capsys):
    names = run("probe pca a.png --components 2 256 --store", store)
    assert names == ["a-pca2.png", "a-pca256.png", "pca.png"]
    assert "a.png: 2 components (" in capsys.readouterr().out
    # the same seed and, with all components, the same embedding
    run("vary a.png --num-images 1")
    assert (load_image("out/a-0.png") - load_image("out/a-pca256.png")).abs().max() < 0.02


def test_a_store_of_another_clip_is_refused(store, monkeypatch):
    manifest = EmbeddingStore(store).manifest
    other = manifest | {"clip": manifest["clip"] | {"embed_dim": 512}}
    monkeypatch.setattr(EmbeddingStore, "manifest", other)
    with pytest.raises(ClipMismatch, match="The store"):
        principal_components(FrozenCLIP(), store)


def test_typographic_draws_a_row_for_each_label(run, capsys):
    names = run("probe typographic a.png --object 'red apple' --label iPod a/b? --num-images 2")
    assert names == [
        "a-a-b-0.png",
        "a-a-b-1.png",
        "a-iPod-0.png",
        "a-iPod-1.png",
        "a-no-label-0.png",
        "a-no-label-1.png",
        "typographic.png",
    ]
    output = capsys.readouterr().out
    assert "no label: CLIP says red apple " in output and "iPod: CLIP says" in output
    with Image.open("out/typographic.png") as figure:
        assert figure.height > 3 * 16


@pytest.mark.parametrize(
    ("command", "named"),
    [
        ("pca gone.png", "gone.png"),
        ("pca a.png --components 0 --store STORE", "0 principal components"),
        ("pca a.png --components 257 --store STORE", "257 principal components"),
        ("pca a.png --store gone", "gone"),
        ("typographic a.png --object apple --label Apple", "twice"),
        ("typographic a.png --object apple --label ' '", "empty"),
    ],
)
def test_bad_input_is_one_sentence(command, named, place, folder, store, capsys):
    command = command.replace("STORE", str(store))
    assert run_unclip(f"probe {command}", "--decoder", folder, "--out", "out") == 1
    assert named in error_of(capsys)
