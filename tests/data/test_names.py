"""A path is a path: no character of a local name makes it a URL, a pattern or a brace list."""

import gzip
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.data.fitkit import data_of
from tests.data.loaderkit import keys_of
from tests.data.shardkit import FakeCLIP, write_shards
from unclip_pl.cli import lightning as cli
from unclip_pl.data.bad_samples import BadSampleCounter
from unclip_pl.data.names import PACK, expand, is_url
from unclip_pl.data.shards import count_samples
from unclip_pl.data.store import EmbeddingStore
from unclip_pl.data.verify import verify
from unclip_pl.datamodules.prior import PriorData
from unclip_pl.utils.errors import UserError

SIGNS = ["data[1]", "a{b,c}", "what?", "a*", "#1", "100%20", "pipe:touch pwned", "s3:", "C: x", "~"]


@pytest.mark.parametrize("name", [*SIGNS, "{0..3}"])
def test_a_name_with_signs_is_a_file_a_folder_and_the_folder_of_a_pattern(
    tmp_path, monkeypatch, name
):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / name
    folder.mkdir()
    write_shards(folder, [2, 3])
    (folder / f"{name}.tar").write_bytes((folder / "00001.tar").read_bytes())
    given = f"./{name}" if name == "~" else name
    for spec, counts in {
        f"{given}/00001.tar": [3],
        given: [2, 3, 3],
        f"{given}/0000*.tar": [2, 3],
        f"{given}/{{00000..00001}}.tar": [2, 3],
        f"{given}/{name}.tar": [3],
    }.items():
        shards = expand(spec)
        assert sorted(map(count_samples, shards)) == counts, spec
        assert not any(map(is_url, shards))
        assert sorted(len(keys_of(shard, BadSampleCounter(0))) for shard in shards) == counts
    store = EmbeddingStore(tmp_path / "store")
    store.ensure(expand(given), FakeCLIP(), progress=False)
    assert verify(store.folder) == [] and not Path("pwned").exists()
    data = data_of(PriorData, expand(given), store=store.folder)
    for shard in expand(given):
        Path(shard).unlink()
    data.prepare_data()
    assert len(data.train_shards) == 3


def test_hidden_files_and_folders_are_no_shards(tmp_path):
    write_shards(tmp_path, [2])
    for name in ("._00000.tar", ".partial.tar"):
        (tmp_path / name).write_bytes(b"no tar")
    (tmp_path / "folder.tar").mkdir()
    assert [Path(shard).name for shard in expand(str(tmp_path))] == ["00000.tar"]


def test_links_are_followed_or_named(tmp_path):
    (tmp_path / "real").mkdir()
    (shard,) = write_shards(tmp_path / "real", [2])
    (tmp_path / "links").mkdir()
    link = tmp_path / "links" / "a.tar"
    link.symlink_to(shard)
    (tmp_path / "linked").symlink_to(tmp_path / "links")
    for spec in (link, tmp_path / "links", tmp_path / "linked", tmp_path / "links" / "*.tar"):
        (found,) = expand(str(spec))
        assert count_samples(found) == 2
    Path(shard).unlink()
    for spec in (link, tmp_path / "links", tmp_path / "links" / "*.tar"):
        with pytest.raises(UserError, match=r"a\.tar is a link to .*which is not there"):
            expand(str(spec))


def test_a_folder_of_compressed_tars_is_taken_and_a_mixture_is_not(tmp_path):
    (shard,) = map(Path, write_shards(tmp_path, [2]))
    (tmp_path / "00001.tar.gz").write_bytes(gzip.compress(shard.read_bytes()))
    with pytest.raises(UserError, match=r"1 \.tar files and 1 compressed .*00001\.tar\.gz"):
        expand(str(tmp_path))
    shard.unlink()
    (found,) = expand(str(tmp_path))
    assert count_samples(found) == len(keys_of(found, BadSampleCounter(0))) == 2


def test_an_empty_file_is_one_sentence_before_any_work(tmp_path):
    (tmp_path / "a.tar").touch()
    for spec in (tmp_path, tmp_path / "a.tar", tmp_path / "*.tar"):
        with pytest.raises(UserError, match=r"a\.tar is empty, a file of 0 bytes"):
            expand(str(spec))


def test_pictures_that_are_not_packed_are_told_where_that_is_shown(tmp_path):
    (tmp_path / "fox.PNG").write_bytes(b"\x89PNG")
    for spec in (tmp_path / "*.PNG", tmp_path / "fox.PNG"):
        with pytest.raises(UserError, match=r"fox\.PNG is a picture and no .*packed .*tutorial"):
            expand(str(spec))
    with pytest.raises(UserError, match=r"There are no \.tar files in .*packed .*tutorial"):
        expand(str(tmp_path))
    heading = PACK.split('"')[1]
    assert f" {heading}\n" in (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")


def test_a_pattern_that_the_shell_has_taken_apart_is_one_sentence(tmp_path, capsys):
    shards = write_shards(tmp_path, [1, 1])
    command = ["fit", "-c", "stages/decoder.yaml", "--data.train", *shards, "--data.val", "null"]
    for arguments in (command, [*command[:3], f"--data.train={shards[0]}", shards[1]]):
        assert cli.main(arguments) == 1
        said = capsys.readouterr().err.strip()
        assert "\n" not in said and "write it in quotes, as in --data." in said
