"""Resizing equals clean-fid's; Inception is loaded from the cache or the sentence says where to put it; networks are told apart."""

import urllib.error
import urllib.request

import numpy as np
import pytest
import torch
from torch import nn

from eval import features
from eval.resize import clean_resize
from unclip_pl.clip import FrozenCLIP
from unclip_pl.errors import UserError


@pytest.mark.parametrize(
    "shape", [(256, 256), (64, 64), (40, 300), (299, 299), (700, 333), (7, 1030), (1, 1)]
)
def test_resizing_equals_clean_fid_within_a_thousandth_of_a_level(shape):
    resizer = pytest.importorskip("cleanfid.resize").build_resizer("clean")
    pixels = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), dtype=np.uint8)
    pixels[1] = 255 * (pixels[1] > 127)  # hard edges: values beyond 0 and 255, which are cut off
    theirs = torch.stack([torch.from_numpy(resizer(image)).permute(2, 0, 1) for image in pixels])
    assert (clean_resize(torch.from_numpy(pixels).permute(0, 3, 1, 2)) - theirs).abs().max() < 1e-3


class Layers(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (
            torch.nn.functional.adaptive_avg_pool2d(x, (32, 64))
            .mean(1)
            .flatten(1)[:, :, None, None]
        )


class Standin(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = Layers()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("UNCLIP_CACHE", str(tmp_path))
    return tmp_path


def placed(folder, module=None) -> None:
    torch.jit.script(module or Standin()).save(str(folder / features.INCEPTION))


def test_inception_gets_what_clean_fid_gives_it(empty_cache):
    """The same TorchScript through clean-fid's own wrapper and resizer."""
    placed(empty_cache)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8)
    resizer = pytest.importorskip("cleanfid.resize").build_resizer("clean")
    wrapper = pytest.importorskip("cleanfid.inception_torchscript").InceptionV3W(
        str(empty_cache), download=False
    )
    theirs = wrapper(
        torch.stack([torch.from_numpy(resizer(image)).permute(2, 0, 1) for image in pixels])
    )
    network = features.inception()
    assert (network.dim, network.is_clip) == (2048, False)
    torch.testing.assert_close(
        network(torch.from_numpy(pixels).permute(0, 3, 1, 2)), theirs, rtol=0, atol=1e-5
    )


def test_without_a_network_the_sentence_says_where_inception_belongs(empty_cache, monkeypatch):
    def unreachable(*_, **__):
        raise urllib.error.URLError("Temporary failure in name resolution")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    with pytest.raises(UserError, match="name resolution") as error:
        features.inception()
    assert str(empty_cache / features.INCEPTION) in str(
        error.value
    ) and features.INCEPTION_URL in str(error.value)
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
        features.inception()
    assert not list(empty_cache.glob("*.pt")) and not list(empty_cache.glob(".*.tmp"))


def test_a_file_that_is_not_inception_is_a_sentence(empty_cache):
    (empty_cache / features.INCEPTION).write_bytes(b"<html>moved</html>")
    with pytest.raises(UserError, match="is not clean-fid's Inception"):
        features.inception()
    placed(empty_cache, Layers())
    with pytest.raises(UserError, match="is not clean-fid's Inception"):
        features.inception()


def test_clip_features_are_the_clips_embeddings_and_networks_are_told_apart():
    clip = FrozenCLIP()
    network = features.named("clip")
    images = torch.randint(
        0, 256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(
        network(images), clip.embed_images(images / 127.5 - 1), rtol=1e-5, atol=1e-5
    )
    assert network.is_clip and network.dim == clip.embed_dim
    assert (
        features.clip_features(clip).key
        == network.key
        != features.named("clip", precision="bf16").key
    )
    assert features.of_callable("means", lambda x: x.float().mean((2, 3)), 3)(images).shape == (
        2,
        3,
    )


def test_wrong_images_and_wrong_widths_are_named():
    network = features.of_callable("means", lambda x: x.float().mean((2, 3)), 4)
    with pytest.raises(UserError, match=r"means gave features \(2, 3\) .* \(2, 4\) were expected"):
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
