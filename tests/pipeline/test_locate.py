"""Weights are found by the package's names, by path and by URL; a wrong name names the choices."""

import os

import pytest

from unclip_pl.pipeline.locate import DEFAULT_PRIORS, NAMES, locate, require_weights
from unclip_pl.utils.errors import UserError


def test_names_of_the_package_paths_and_urls_are_found(tmp_path):
    for kind, names in NAMES.items():
        for name, place in names.items():
            assert locate(kind, name) == place and place.is_dir()
        for place in (tmp_path, str(tmp_path), "hf://org/model/prior", "s3://bucket/a.ckpt"):
            assert locate(kind, place) == place
    assert locate("prior", "ar") == DEFAULT_PRIORS["ar"]


@pytest.mark.parametrize("kind", NAMES)
def test_a_wrong_name_says_what_there_is(kind):
    with pytest.raises(UserError, match=f"no {kind} foo") as error:
        locate(kind, "foo")
    assert all(name in str(error.value) for name in (*NAMES[kind], "path or URL"))


def test_a_file_nearby_is_proposed(tmp_path):
    (tmp_path / "best-step=10.ckpt").write_text("")
    with pytest.raises(UserError, match="such as .*best-step=10"):
        locate("decoder", tmp_path / "best-step=11.ckpt")


def test_of_a_runs_folder_a_checkpoint_is_proposed(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    assert locate("decoder", tmp_path) == tmp_path  # read it, and it says what is missing
    (tmp_path / "checkpoints" / "newest-step=4.ckpt").write_text("")
    older = tmp_path / "checkpoints" / "newest-step=900.ckpt"
    older.touch()
    os.utime(older, (1, 1))
    with pytest.raises(UserError, match="such as .*checkpoints/newest-step=4"):
        locate("decoder", tmp_path)


@pytest.mark.parametrize("wrong", [("gone",), (None, "gone"), ("openmoji", "ar", ["256", "gone"])])
def test_all_weights_are_looked_for(wrong):
    require_weights("openmoji", "diffusion", ["256", "1024"])
    require_weights()
    with pytest.raises(UserError, match="gone"):
        require_weights(*wrong)
