"""A folder or shards come as uint8 batches of one size, every image once over all ranks.

Images that cannot be read are counted and refused above a rate.
"""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from eval.extract import extract_features, reference_features
from eval.features import Network
from eval.stored import StoredImages
from tests.data.shardkit import write_shards
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import grid
from unclip_pl.utils.outputs import OutputFolder


def write(folder, count, size=8, start=0):
    folder.mkdir(exist_ok=True)
    for n in range(start, start + count):
        Image.new("RGB", (size, size), (n, 0, 128)).save(folder / f"{n:03d}.png")
    return folder


def reds(batches):
    return {
        key: int(image[0, 0, 0])
        for batch in batches
        for key, image in zip(batch["keys"], batch["images"], strict=True)
    }


def test_a_folder_comes_whole_in_any_batch_size_and_over_any_ranks(tmp_path):
    folder = write(tmp_path / "a", 23)
    write(folder / "more", 7, size=5, start=100)
    expected = {f"{n:03d}": n for n in range(23)} | {f"more/{n}": n for n in range(100, 107)}
    assert len(StoredImages(str(folder))) == 30
    assert reds(StoredImages(str(folder)).batches(4)) == expected
    shares = [reds(StoredImages(str(folder), rank, 3).batches(100)) for rank in range(3)]
    assert sum(map(len, shares)) == 30 and shares[0] | shares[1] | shares[2] == expected
    for batch in StoredImages(str(folder)).batches(4):
        images = batch["images"]
        assert images.dtype == torch.uint8 and images.ndim == 4 and len(images) <= 4


def test_shards_come_whole_over_any_ranks_with_their_captions(tmp_path):
    write_shards(tmp_path, [7, 5])
    assert len(StoredImages(str(tmp_path))) == 12
    shares = [list(StoredImages(str(tmp_path), rank, 2).batches(3)) for rank in range(2)]
    found = {
        key: caption
        for share in shares
        for batch in share
        for key, caption in zip(batch["keys"], batch["captions"], strict=True)
    }
    assert found == {f"{n:06d}": f"caption {n}" for n in range(12)}


def test_sheets_of_several_pictures_are_left_out(tmp_path, caplog):
    folder = write(tmp_path / "a", 3)
    out = OutputFolder(folder)
    sheet = grid([torch.zeros(2, 3, 8, 8)], ["a fox"])
    for name, texts in (("grid.png", {"prompt": "a fox"}), ("variations.png", {})):
        out.write_picture(name, sheet, **texts)
    out.write_picture("drawn.png", torch.zeros(3, 8, 8), prompt="a fox")
    found = [list(reds(StoredImages(str(folder)).batches(4))) for _ in range(2)]
    assert found == [["000", "001", "002", "drawn"]] * 2
    assert len(caplog.messages) == 1
    assert f"{folder / 'grid.png'} was skipped, and 1 more" in caplog.text


def test_pixels_are_those_of_the_file(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (9, 6, 3), dtype=np.uint8)
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels).save(tmp_path / "a" / "x.png")
    (batch,) = StoredImages(str(tmp_path / "a")).batches(2)
    assert np.array_equal(batch["images"][0].permute(1, 2, 0).numpy(), pixels)


def test_grey_palette_and_transparent_images_come_as_rgb_on_white(tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    Image.new("L", (4, 4), 77).save(folder / "grey.png")
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(folder / "clear.png")
    Image.new("LA", (4, 4), (0, 128)).save(folder / "half.png")
    Image.new("P", (4, 4), 0).save(folder / "palette.gif")
    Image.new("RGB", (4, 4), (10, 200, 30)).save(folder / "colour.JPG")
    (batch,) = StoredImages(str(folder)).batches(9)
    found = {
        key: tuple(image[:, 0, 0].tolist())
        for key, image in zip(batch["keys"], batch["images"], strict=True)
    }
    assert found["grey"] == (77, 77, 77) and found["clear"] == (255, 255, 255)
    assert found["half"] == (127, 127, 127) and found["palette"] == (0, 0, 0)
    assert len(found) == 5


def test_unreadable_images_are_named_and_counted_and_refused_above_the_rate(tmp_path, caplog):
    folder = write(tmp_path / "a", 40)
    (folder / "bad.png").write_bytes(b"no picture")
    (folder / "cut.png").write_bytes((folder / "001.png").read_bytes()[:40])
    (folder / "empty.webp").write_bytes(b"")
    assert len(reds(StoredImages(str(folder), max_bad_rate=0.1).batches(8))) == 40
    for name in ("bad.png", "cut.png", "empty.webp"):
        assert f"image {folder / name} was skipped" in caplog.text
    with pytest.raises(UserError, match="--max-bad-rate"):
        list(StoredImages(str(folder)).batches(8))


def test_an_image_that_would_not_fit_into_memory_is_passed_over(tmp_path, caplog):
    folder = write(tmp_path / "a", 3)
    file = io.BytesIO()
    Image.new("1", (9000, 9000)).save(file, "PNG")
    (folder / "huge.png").write_bytes(file.getvalue())
    assert len(reds(StoredImages(str(folder), max_bad_rate=0.5).batches(8))) == 3
    assert "larger than 50 megapixels" in caplog.text


def test_what_holds_no_images_is_a_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no images"):
        StoredImages(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="nowhere"):
        StoredImages(str(tmp_path / "nowhere"))
    folder = write(tmp_path / "a", 3)
    with pytest.raises(UserError, match="2 captions"):
        StoredImages(str(folder), captions=["a", "b"])


def means(images):
    return images.double().mean((2, 3))


def test_features_of_a_reference_are_kept_until_a_file_or_the_network_changes(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "cache"))
    folder, seen = write(tmp_path / "a", 5), []

    def network(key, scale=1.0):
        def function(images):
            seen.append(len(images))
            return scale * means(images)

        return Network("means", 3, function, key)

    def features(key, batch_size=2, scale=1.0):
        seen.clear()
        images = StoredImages(str(folder))
        return reference_features(network(key, scale), images, batch_size)

    first = features("one")
    assert sum(seen) == 5
    assert torch.equal(features("one", 3), first) and not seen
    assert torch.equal(extract_features(network("one"), StoredImages(str(folder)), 4), first)
    assert torch.equal(features("two", scale=2.0), 2 * first) and sum(seen) == 5
    for _ in range(2):
        features(None)
        assert sum(seen) == 5
    Image.new("RGB", (8, 8), (200, 0, 128)).save(folder / "001.png")
    assert features("one")[1, 0] == 200 and sum(seen) == 5
    entries = (tmp_path / "cache" / "features").iterdir()
    max(entries, key=lambda file: file.stat().st_mtime_ns).write_bytes(b"damaged")
    assert features("one")[1, 0] == 200 and sum(seen) == 5
