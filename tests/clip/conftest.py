"""A tiny CLIP, and names of open_clip's for it."""

import json

import open_clip
import pytest

from tests.clip.tiny import MODEL, write_clip
from unclip_pl.clip.config import CLIPConfig
from unclip_pl.clip.frozen import FrozenCLIP


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def clip(tiny):
    return FrozenCLIP(CLIPConfig(tiny))


@pytest.fixture
def named(tmp_path, monkeypatch):
    """open_clip names "tiny" and "tiny-quickgelu", as long as the test runs."""
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    monkeypatch.setattr(
        open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS)
    )
    for name, more in (("tiny", {}), ("tiny-quickgelu", {"quick_gelu": True})):
        (tmp_path / f"{name}.json").write_text(json.dumps(MODEL | more))
        open_clip.add_model_config(tmp_path / f"{name}.json")
    return tmp_path
