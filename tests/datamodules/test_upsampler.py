"""Crops for the upsamplers: both resolutions show the same place, chance follows from (seed, epoch,
key), and no image is enlarged."""

import io
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from tests.data.shardkit import write_tar
from unclip_pl.data.degradation import DegradationConfig
from unclip_pl.data.loader_config import LoaderConfig
from unclip_pl.datamodules.upsampler import CropsConfig, CropTransform, UpsamplerData
from unclip_pl.utils.errors import UserError

PLAIN = DegradationConfig(kind="none")
ALONE = LoaderConfig(batch_size=2, num_workers=0)


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def ramp(side: int = 64, width: int | None = None) -> np.ndarray:
    """Red tells the column, green the row, blue is the same everywhere: (side, width, 3)."""
    width = width or side
    rows, columns = np.mgrid[:side, :width]
    return np.stack([columns * 2, rows * 2, np.full_like(rows, 77)], -1).astype(np.uint8)


def shards(folder, images: list[np.ndarray]) -> list[str]:
    return [
        write_tar(
            folder / "00000.tar", {f"{i:04d}.png": png(image) for i, image in enumerate(images)}
        )
    ]


def batches(data: UpsamplerData, train: bool = True):
    data.setup("fit")
    for batch in data.train_dataloader() if train else data.val_dataloader():
        yield data.on_before_batch_transfer(batch, 0)


@pytest.mark.parametrize("kind", ["none", "blur", "bsr"])
def test_both_resolutions_show_the_same_place(kind):
    """On a ramp, low-res pixel i is the mean of its four columns: 4 i + 1.5 pixels of two levels
    each. Half a pixel more or less would be one level."""
    crop = CropTransform(
        64, 32, CropsConfig(3), DegradationConfig(kind=kind), LoaderConfig(), train=True
    )
    error = []
    for epoch in range(8):
        found = crop({"key": "k", "image": png(ramp())}, epoch)
        image, low_res = (
            value[:, :2].add(1).mul(127.5) for value in (found["image"], found["low_res"])
        )
        expected = torch.nn.functional.avg_pool2d(image, 4)
        # borders apart: there a filter lacks pixels
        error.append((low_res - expected)[:, :, 2:-2, 2:-2].mean((0, 2, 3)))
        assert (
            image - image.round()
        ).abs().max() < 1e-3  # crops at whole pixels: nothing is interpolated
    assert torch.stack(error).mean(0).abs().max() < (0.3 if kind == "bsr" else 0.01)


def test_validation_takes_the_centre_always_spoiled_alike(tmp_path):
    data = UpsamplerData(
        shards(tmp_path, [ramp()] * 3),
        shards(tmp_path, [ramp()] * 3),
        64,
        crop=16,
        val_crop=32,
        loader=ALONE,
    )
    once, again = list(batches(data, train=False)), list(batches(data, train=False))
    assert [b["key"] for b in once] == [["0000", "0001"], ["0002"]]
    assert torch.equal(
        once[0]["image"][0].add(1).mul(127.5).round(),
        torch.from_numpy(ramp()[16:48, 16:48]).permute(2, 0, 1).float(),
    )
    assert all(
        torch.equal(a[name], b[name])
        for a, b in zip(once, again, strict=True)
        for name in ("image", "low_res")
    )


def test_several_crops_of_an_image_are_samples_of_one_batch(tmp_path):
    data = UpsamplerData(
        shards(tmp_path, [ramp()] * 4),
        None,
        64,
        crop=16,
        crops=CropsConfig(per_image=3),
        loader=ALONE,
    )
    batch = next(batches(data))
    assert batch["image"].shape == (6, 3, 16, 16) and batch["low_res"].shape == (6, 3, 4, 4)
    assert batch["key"][0] == batch["key"][2] != batch["key"][3] and len(batch["key"]) == 6
    assert len({tuple(image[:2, 0, 0].tolist()) for image in batch["image"]}) > 3  # other places


def test_places_follow_from_seed_epoch_and_key():
    sample = {"key": "k", "image": png(ramp())}
    draw = lambda seed=0, epoch=0, key="k": CropTransform(
        64, 16, CropsConfig(4), DegradationConfig(), LoaderConfig(seed=seed), True
    )(sample | {"key": key}, epoch)
    one = draw()
    assert torch.equal(one["image"], draw()["image"]) and torch.equal(
        one["low_res"], draw()["low_res"]
    )
    for other in (draw(seed=1), draw(epoch=1), draw(key="l")):
        assert not torch.equal(one["image"], other["image"])


def test_resumed_crops_are_those_of_a_run_that_was_not_stopped(tmp_path):
    names = shards(tmp_path, [ramp()] * 7)
    make = lambda: UpsamplerData(
        names, None, 64, crop=16, degradation=DegradationConfig(kind="bsr"), loader=ALONE
    )

    def loader(data):
        data.setup("fit")
        return data.train_dataloader()

    whole, first, second = loader(make()), loader(make()), loader(make())
    expected = [batch for _ in range(3) for batch in whole]  # three epochs of three
    seen = [batch for _, batch in zip(range(2), first, strict=False)]
    second.load_state_dict(first.state_dict())
    seen += [batch for _ in range(3) for batch in second][:6]
    for a, b in zip(seen, expected, strict=False):
        assert a["key"] == b["key"]
        assert torch.equal(a["image"], b["image"])
        assert torch.equal(a["low_res"], b["low_res"])
    assert len(seen) == 8 and not torch.equal(expected[0]["image"], expected[3]["image"])


def test_flat_crops_are_as_frequent_as_they_are_unless_they_are_to_be_avoided():
    image = np.full((256, 256, 3), 255, np.uint8)
    image[100:140, 100:140] = 0

    def share(train: bool, crops: CropsConfig, picture: np.ndarray = image) -> float:
        """Of crops that show something."""
        cropped = CropTransform(256, 64, crops, PLAIN, LoaderConfig(), train)
        found = [
            cropped({"key": "k", "image": png(picture)}, epoch)["image"] for epoch in range(40)
        ]
        images = torch.cat(found)
        return (images != images[:, :, :1, :1]).flatten(1).any(1).float().mean().item()

    one_place = (104 / 193) ** 2  # places whose crop meets the square
    assert share(True, CropsConfig(5)) == pytest.approx(one_place, abs=0.11)
    assert share(True, CropsConfig(5, avoid_flat=True)) > 0.85
    flat = np.full((256, 256, 3), 9, np.uint8)
    assert share(True, CropsConfig(avoid_flat=True), flat) == 0  # it does not look for ever
    assert share(False, CropsConfig(avoid_flat=True)) == 1  # the centre


def test_large_pictures_are_made_smaller_and_small_ones_are_not_enlarged():
    crop = CropTransform(64, 32, CropsConfig(), PLAIN, LoaderConfig(), train=False)
    checker = np.indices((40, 48)).sum(0) % 2
    small = crop(
        {"key": "k", "image": png((checker[..., None] * np.full(3, 255)).astype(np.uint8))}, 0
    )["image"]
    assert set(small.unique().tolist()) == {-1.0, 1.0}  # as it was: an enlargement would have greys
    large = (
        crop({"key": "k", "image": png(ramp(128, 256) // 2 * 2)}, 0)["image"][0].add(1).mul(127.5)
    )
    # twice as steep: half the side
    assert large.shape == (3, 32, 32) and abs((large[1, 20, 5] - large[1, 10, 5]) / 10 - 4) < 0.1


def test_image_smaller_than_the_crop_is_counted_and_named(tmp_path, caplog):
    data = UpsamplerData(
        shards(tmp_path, [ramp(24, 60), *[ramp()] * 3]),
        None,
        64,
        crop=32,
        loader=LoaderConfig(batch_size=1, num_workers=0),
    )
    with caplog.at_level(logging.WARNING):
        assert sum(1 for _ in batches(data)) == 4
    assert "sample 0000 of" in caplog.text
    assert "60 x 24 pixels, less than the crop of 32" in caplog.text
    assert data._train_loader.bad >= 1
    only = UpsamplerData(
        shards(tmp_path, [ramp(24)] * 2),
        None,
        64,
        crop=32,
        loader=LoaderConfig(batch_size=1, num_workers=0),
    )
    with pytest.raises(UserError, match="found no usable sample"):
        next(batches(only))


def test_no_clip_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "unclip_pl.clip.frozen.load_model", lambda *_: pytest.fail("a CLIP was loaded")
    )
    data = UpsamplerData(
        shards(tmp_path, [ramp()] * 4), shards(tmp_path, [ramp()] * 4), 64, loader=ALONE
    )
    data.prepare_data()
    # a quarter of the side
    assert next(batches(data))["image"].shape == (2, 3, 16, 16) and data.crop == data.val_crop == 16


@pytest.mark.parametrize("change", [{"crop": 30}, {"crop": 128}, {"val_crop": 0}])
def test_impossible_crops_are_a_sentence(change):
    with pytest.raises(ValueError, match=rf"data\.{next(iter(change))} is"):
        UpsamplerData(image_size=64, **change)


def test_no_crops_of_an_image_are_a_sentence():
    with pytest.raises(ValueError, match=r"data\.crops\.per_image is 0: give 1 or more"):
        CropsConfig(per_image=0)
