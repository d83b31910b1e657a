"""Tiny weights that commands draw with, and a folder with pictures to work in."""

import pytest
from PIL import Image

from tests.cli.shell import names_in, run_unclip
from tests.factories import package_cascade, package_decoder, write_release


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The release of a tiny decoder with random weights."""
    return write_release(tmp_path_factory.mktemp("decoder") / "release", package_decoder())


@pytest.fixture(scope="module")
def three():
    """A decoder and both upsamplers."""
    return package_cascade()


@pytest.fixture(scope="module")
def releases(three, tmp_path_factory):
    """Folders of the three, by name."""
    root = tmp_path_factory.mktemp("releases")
    names = ("decoder", "256", "1024")
    return {name: write_release(root / name, stage) for name, stage in zip(names, three)}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with pictures, to work in."""
    monkeypatch.chdir(tmp_path)
    Image.effect_noise((40, 40), 90).convert("RGB").save("a.png")
    Image.linear_gradient("L").resize((60, 30)).save("wide.png")
    mask = Image.new("L", (40, 40), 0)
    mask.paste(255, (20, 0, 40, 40))
    mask.save("mask.png")
    Image.new("L", (40, 40), 255).save("white.png")
    Image.new("L", (40, 40), 0).save("black.png")
    Image.new("L", (20, 40), 255).save("narrow.png")
    return tmp_path


@pytest.fixture
def run(place, folder):
    """Runs a command with the tiny decoder; returns the names of the files in its folder."""

    def call(command: str, *more: object) -> list[str]:
        assert run_unclip(command, *more, "--decoder", folder, "--out", "out") == 0
        return names_in(place / "out")

    return call
