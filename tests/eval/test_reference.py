"""All commands compare with the same real images, by the same features, on the right device."""

import io

import pytest
import torch
from PIL import Image

from eval import coco, compare, features, fid, sweep
from eval.commands import choose_features
from eval.evaluator import compute_distances
from eval.extract import reference_features
from eval.features import Network
from eval.source import GeneratedImages
from eval.stored import StoredImages
from tests.data.shardkit import write_tar
from tests.eval import tiny
from unclip_pl.data.decoding import decode
from unclip_pl.utils.commands import CommandParser
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import to_uint8

COUNT = 5


def photograph(number: int, width: int = 40, height: int = 30) -> bytes:
    """A PNG of noise."""
    pixels = torch.rand(height, width, 3, generator=torch.Generator().manual_seed(number)).mul(255)
    file = io.BytesIO()
    Image.fromarray(pixels.byte().numpy()).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def shard(tmp_path_factory) -> str:
    """A shard of pictures of 4:3 with captions."""
    files = {}
    for k in range(COUNT):
        files |= {f"{k}.png": photograph(k), f"{k}.txt": f"photograph {k}".encode()}
    return write_tar(tmp_path_factory.mktemp("photographs") / "00000.tar", files)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> str:
    return str(tiny.decoder(tmp_path_factory.mktemp("decoder") / "release"))


@pytest.fixture
def seen(monkeypatch) -> set[bytes]:
    """Every image that a network of features was arguments, as shape and bytes."""
    found: set[bytes] = set()
    whole = Network.__call__

    def call(self, images):
        found.update(bytes(image.shape) + image.numpy().tobytes() for image in images)
        return whole(self, images)

    monkeypatch.setattr(Network, "__call__", call)
    return found


@pytest.mark.parametrize(("reference", "size"), [(False, None), (True, None), (False, 12)])
@pytest.mark.parametrize("command", [fid, compare, sweep])
def test_every_command_sees_the_same_real_pictures(
    command, reference, size, shard, decoder, seen, tmp_path, monkeypatch
):
    """The decoder draws 16 x 16: by default the real pictures of 4:3 are cut to that."""
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "cache"))
    words = ["--captions", shard, "--features", "clip", "--device", "cpu"]
    words += ["--out", str(tmp_path / "out"), *(["--reference", shard] if reference else [])]
    words += ["--reference-size", str(size)] if size else []
    if command is compare:
        words += ["--decoder", decoder, "--diffusion-prior", "none", "--ar-prior", "none"]
        words += ["--baseline", "text", "--guidance-scales", "--resamples", "2"]
    else:
        words += ["--decoder", decoder, "--condition", "text"]
        words += ["--guidance-scales", "1"] if command is sweep else ["--resamples", "0"]
    assert command.main(words) == 0
    real = [to_uint8(decode(photograph(k), size or 16)) for k in range(COUNT)]
    expected = {bytes(image.shape) + image.numpy().tobytes() for image in real}
    assert len(expected) == COUNT and expected <= seen
    shapes = {image[:3] for image in seen - expected}
    assert shapes == {bytes((3, 16, 16))}  # what was drawn, and nothing of another size


def test_the_side_of_a_folder_is_known_only_where_its_images_are_squares_of_one_side(tmp_path):
    for k, (width, height) in enumerate([(16, 16), (16, 16), (40, 30)]):
        (tmp_path / f"{k}.png").write_bytes(photograph(k, width, height))
    everything = StoredImages(str(tmp_path))
    assert everything.side is None and StoredImages(str(tmp_path), size=8).side == 8
    assert StoredImages(str(tmp_path), names=["1.png", "0.png"]).side == 16
    assert StoredImages(str(tmp_path), 1, 2, names=["0.png", "2.png"]).side is None  # on every rank
    (batch,) = StoredImages(str(tmp_path), size=8, names=["2.png", "0.png"]).batches(5)
    assert batch["images"].shape == (2, 3, 8, 8) and batch["keys"] == ["2", "0"]


def test_a_folder_of_squares_is_compared_with_squares_and_photographs_with_whole_ones(tmp_path):
    for k in range(2):
        (tmp_path / f"wide-{k}.png").write_bytes(photograph(k))
        (tmp_path / f"square-{k}.png").write_bytes(photograph(k, 16, 16))
    for names, size in ((["square-0.png"], 16), (["wide-0.png"], None)):
        source = tiny.arguments(fid, "--images", "x")["source"]
        images = StoredImages(str(tmp_path), names=names)
        assert fid.open_reference(str(tmp_path), None, source, images).size == size


def test_drawings_are_compared_with_the_held_out_ones(tmp_path, monkeypatch):
    def shards(size):
        folder = tmp_path / f"openmoji-{size}"
        folder.mkdir()
        write_tar(folder / "val-00000.tar", {"0.png": photograph(0), "0.txt": b"a dog"})
        return folder

    monkeypatch.setattr(fid, "openmoji_shards", shards)
    drawn = GeneratedImages(tmp_path, [], lambda indices: torch.zeros(0), {}, size=16)
    source = tiny.arguments(fid, "--decoder", "x", "--captions", "openmoji")["source"]
    real = fid.open_reference(None, None, source, drawn)
    assert real.shards == [str(tmp_path / "openmoji-16" / "val-00000.tar")] and real.size == 16


def test_another_size_is_another_entry_of_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.png").write_bytes(photograph(0))
    means = Network("means", 3, lambda images: images.double().mean((2, 3)).float(), "means")
    found = [
        reference_features(means, StoredImages(str(tmp_path), size=size), 4) for size in (8, 12, 8)
    ]
    assert torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])


@pytest.mark.parametrize(
    ("features", "captions", "expected"),
    [
        (None, "openmoji", "openmoji-judge"),
        (None, "data/{00000..00009}.tar", "inception"),
        (None, None, "inception"),  # images that are not drawn for captions
        ("clip", "captions.txt", "clip"),
        ("inception", "openmoji", "inception"),
    ],
)
def test_features_are_inception_s_except_for_the_embedded_drawings(features, captions, expected):
    assert choose_features(features, captions) == expected


@pytest.mark.parametrize("command", [fid, compare, sweep, coco])
def test_no_command_has_features_of_its_own_by_default(command):
    assert CommandParser(command.run, "eval").get_default("features") is None


def test_only_inception_s_distance_is_called_fid(tmp_path, monkeypatch, capsys):
    """Also by the commands: the stand-in lies where Inception does."""
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "cache"))
    tiny.inception(tmp_path / "cache" / features.INCEPTION)
    (tmp_path / "images").mkdir()
    for k in range(6):
        (tmp_path / "images" / f"{k}.png").write_bytes(photograph(k))
    words = ["--images", str(tmp_path / "images"), "--reference", str(tmp_path / "images")]
    keys = {}
    for name, more in (("inception", []), ("clip", ["--features", "clip"])):
        out = tmp_path / name
        more = [*more, "--out", str(out), "--device", "cpu", "--resamples", "2"]
        assert fid.main([*words, *more]) == 0
        keys[name] = (out / "fid.json").read_text()
        output = capsys.readouterr().out
        assert ("\nFID  " in output) == (name == "inception")
        assert ("\nFD of CLIP  " in output) == (name == "clip")
    assert '"fid": ' in keys["inception"] and '"fid_low": ' in keys["inception"]
    assert "fd_clip" not in keys["inception"] and "cmmd" not in keys["inception"]
    assert '"fd_clip": ' in keys["clip"] and '"fid' not in keys["clip"].replace('"fid", ', "")
    other = features.callable_features("means", lambda images: images.float().mean((2, 3)), 3)
    rows = torch.rand(9, 3, generator=torch.Generator().manual_seed(0))
    assert {"fd"} < set(compute_distances(other, rows, rows, resamples=0)) - {"fid", "fd_clip"}


def test_distances_stay_on_the_device_that_was_asked_for(monkeypatch):
    """Where there is a GPU and --device is cpu nothing goes there: here there is one that fails."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    used = []
    monkeypatch.setattr("eval.metrics.TwoSets.to", lambda self, device: used.append(device))
    rows = torch.rand(9, 3, generator=torch.Generator().manual_seed(0))
    network = features.callable_features("means", lambda images: images.float().mean((2, 3)), 3)
    compute_distances(network, rows, rows, resamples=2, device="cpu")
    assert set(used) == {"cpu"}


def test_without_inception_nothing_is_drawn(shard, decoder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path / "cache"))

    def unreachable(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", unreachable)
    words = ["--decoder", decoder, "--captions", shard, "--device", "cpu", "--condition", "text"]
    assert fid.main([*words, "--samples", str(tmp_path / "samples")]) == 1
    output = capsys.readouterr().err.strip().splitlines()[-1]
    assert str(tmp_path / "cache" / features.INCEPTION) in output and "no network" in output
    assert not (tmp_path / "samples").exists()
    with pytest.raises(UserError, match="--features"):
        features.inception_features()
