"""Inception gets what clean-fid gives it, and a missing file is named; networks have keys of their
own."""

import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from cleanfid.downloads_helper import inception_url
from PIL import Image

from eval import features
from tests.eval import tiny
from unclip_pl.clip.frozen import FrozenCLIP
from unclip_pl.utils.errors import UserError


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("shape", [(64, 64), (40, 300), (700, 333)])
def test_inception_gets_the_whole_image_as_clean_fid_resizes_it(empty_cache, shape):
    """Pillow's bicubic filter on floats, written out.

    It is antialiased, does not keep the aspect ratio, is cut off at 0 and 255, and not rounded.
    """
    tiny.inception(empty_cache / features.INCEPTION)
    pixels = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), dtype=np.uint8)
    pixels[1] = 255 * (pixels[1] > 127)  # hard edges: values beyond 0 and 255, which are cut off

    def resized(plane):
        image = Image.fromarray(plane.astype(np.float32))
        return np.asarray(image.resize((299, 299), Image.Resampling.BICUBIC))

    planes = [[resized(plane) for plane in image] for image in pixels.transpose(0, 3, 1, 2)]
    network = features.inception_features()
    inputs = (torch.from_numpy(np.stack(planes)).clamp(0, 255) - 128) / 128
    expected = tiny.InceptionLayers()(inputs).flatten(1)
    found = network(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (network.dim, network.is_clip, network.frechet) == (2048, False, "fid")


def test_without_a_network_the_sentence_says_where_inception_belongs(empty_cache, monkeypatch):
    def unreachable(*_, **__):
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(UserError, match="name resolution") as error:
        features.inception_features()
    sentence = str(error.value)
    assert str(empty_cache / features.INCEPTION) in sentence and inception_url in sentence
    assert not (empty_cache / features.INCEPTION).exists()


def test_a_download_that_breaks_off_leaves_nothing(empty_cache, monkeypatch):
    class Answer:
        headers = {"Content-Length": "1000"}

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def read(self, _=-1, parts=[b"too little"]):  # noqa: B006
            return parts.pop() if parts else b""

    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: Answer())
    with pytest.raises(UserError, match="10 of 1000 bytes"):
        features.inception_features()
    assert not list(empty_cache.glob("*.pt")) and not list(empty_cache.glob(".*.tmp"))


def test_a_file_that_is_not_inception_is_a_sentence(empty_cache):
    (empty_cache / features.INCEPTION).write_bytes(b"<html>moved</html>")
    with pytest.raises(UserError, match="is not clean-fid's Inception"):
        features.inception_features()
    tiny.inception(empty_cache / features.INCEPTION, tiny.InceptionLayers())
    with pytest.raises(UserError, match="is not clean-fid's Inception"):
        features.inception_features()


def test_clip_features_are_the_clips_embeddings_and_keys_differ():
    clip = FrozenCLIP()
    network = features.load_features("clip")
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=generator)
    expected = clip.embed_images(images / 127.5 - 1)
    torch.testing.assert_close(network(images), expected, rtol=1e-5, atol=1e-5)
    assert network.is_clip and network.dim == clip.embed_dim
    assert network.key == features.clip_features(clip).key
    assert network.key != features.load_features("clip", precision="bf16").key
    means = features.callable_features("means", lambda x: x.float().mean((2, 3)), 3)
    assert means(images).shape == (2, 3)


def test_wrong_images_and_wrong_widths_are_named():
    network = features.callable_features("means", lambda x: x.float().mean((2, 3)), 4)
    with pytest.raises(UserError, match="expected"):
        network(torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
    with pytest.raises(ValueError, match="uint8"):
        network(torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("name", "model", "tag"),
    [
        ("ViT-B-32/openai", "ViT-B-32", "openai"),
        ("openmoji", "openmoji", None),
        ("local-dir:/a/b", "local-dir:/a/b", None),
    ],
)
def test_a_clip_is_named_as_open_clip_names_it(name, model, tag):
    found = features.clip_config(name)
    assert (found.model, found.pretrained) == (model, tag)
