"""`unclip data verify` names what is wrong with a store, and what to delete."""

import json
from pathlib import Path

import pytest

from tests.data.shardkit import picture, write_shards, write_tar
from tests.data.storekit import fill, rewrite_rows
from unclip_pl.cli import unclip as app
from unclip_pl.data.bad_samples import BadSampleCounter
from unclip_pl.data.verify import verify


@pytest.fixture
def shards(tmp_path):
    return write_shards(tmp_path, [9, 4, 12])


def test_verify_names_missing_doubled_and_non_finite_rows(tmp_path, shards):
    store = fill(tmp_path / "store", shards)

    def change(tensors, metadata):
        rows = json.loads(metadata["rows"])
        rows["keys"][1:3] = [rows["keys"][0], "stranger"]
        metadata["rows"] = json.dumps(rows)
        tensors["text_embed"][3, 2] = float("nan")
        tensors["image_embed"][4, 0] = float("inf")

    rewrite_rows(store, shards[0], change)
    store.path(shards[1]).unlink()
    extra = write_tar(tmp_path / "extra.tar", {"x.png": picture(0)})
    problems = "\n".join(verify(store.folder, [*shards, extra]))
    for line in [
        "key 000000 is doubled, it has 2 rows",
        "key 000001 is missing",
        "key 000002 is missing",
        "the row of key stranger has no image",
        "key 000003 has a text_embed that is not finite",
        "key 000004 has a image_embed that is not finite",
        f"{store.path(shards[1])}: the rows of",
        f"{store.path(extra)}: the rows of",
    ]:
        assert line in problems, line
    assert "00002.tar" not in problems and len(problems.splitlines()) == 8


def test_verify_names_rows_that_are_too_few(tmp_path, shards):
    store = fill(tmp_path / "store", shards)
    rewrite_rows(
        store,
        shards[0],
        lambda tensors, _: tensors.update(image_embed=tensors["image_embed"][:8].clone()),
    )
    assert verify(store.folder) == [
        f"{store.path(shards[0])}: 8 rows of image_embed for 9 keys (of {shards[0]})"
    ]


def test_verify_names_what_to_delete_and_never_a_tar(tmp_path, capsys):
    (tmp_path / "tars").mkdir()
    shards = write_shards(tmp_path / "tars", [9, 4, 12, 5], bad={3})
    store = fill(tmp_path / "store", shards, counter=BadSampleCounter(1.0))
    assert app.main(["data", "verify", str(store.folder)]) == 0
    output = capsys.readouterr().out
    assert output.startswith(
        f"note: sample 000003 of {shards[0]} has no row: its image cannot be decoded"
    )
    assert "is whole, but for images" in output
    write_tar(Path(shards[1]), {"new.png": picture(77), "new.txt": b"new"})
    rewrite_rows(store, shards[2], lambda tensors, _: tensors["image_embed"].fill_(float("nan")))
    Path(shards[3]).unlink()
    lines = verify(store.folder)
    named = {line.partition(": ")[0] for line in lines if ".safetensors: " in line}
    assert named == {str(store.path(shard)) for shard in shards[1:3]}
    assert [line for line in lines if ".safetensors: " not in line] == [
        line for line in lines if line.startswith(f"The shard {shards[3]} cannot be read")
    ]
    assert not any(line.startswith(shard) for line in lines for shard in shards)
    assert app.main(["data", "verify", str(store.folder)]) == 1
    assert "never a .tar" in capsys.readouterr().err
    for name in named:
        Path(name).unlink()
    fill(tmp_path / "store", shards[:3], counter=BadSampleCounter(1.0))
    assert verify(store.folder, shards[:3]) == []
