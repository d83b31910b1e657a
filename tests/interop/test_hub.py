"""Whole models as folders and on the hub: saved, sent and fetched, they draw the same."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch

from tests.factories import package_cascade, write_checkpoint, write_release
from tests.interop import standin
from unclip_pl import CLIPConfig, FrozenCLIP, UnCLIP
from unclip_pl.clip.config import EMBEDDED
from unclip_pl.pipeline import release
from unclip_pl.pipeline.hub import read_parts
from unclip_pl.utils.errors import UserError

NAME = "some-org/small-unclip"


@pytest.fixture(scope="module")
def small() -> UnCLIP:
    decoder, *upsamplers = package_cascade()
    return UnCLIP(decoder, upsamplers=upsamplers[:1])


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, asked instead of the hub; an empty cache."""
    with standin.serving() as server:
        standin.lead_to(server.url, tmp_path / "default", monkeypatch)
        yield server


def drawn(model: UnCLIP) -> torch.Tensor:
    return model.generate(["a red apple"], [0], "caption", size=256)


def files_of(folder) -> dict[str, bytes]:
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def test_a_saved_model_is_read_whole_and_draws_the_same(small, tmp_path):
    folder = small.save_pretrained(tmp_path / "saved")
    assert sorted(path.name for path in folder.iterdir()) == [
        *("README.md", "config.json", "decoder", "upsampler-256")
    ]  # the CLIP is that of the package
    assert folder.joinpath("README.md").read_text().startswith("---\nlibrary_name: unclip_pl\n")
    again = UnCLIP.from_pretrained(folder)
    assert again.sizes == small.sizes and again.prior is None
    torch.testing.assert_close(drawn(again), drawn(small), atol=2e-2, rtol=0)  # float16
    with pytest.raises(UserError, match="exists already"):
        small.save_pretrained(folder)


def test_a_saved_model_keeps_the_steps_of_its_training(tmp_path):
    decoder, upsampler, _ = package_cascade()
    first = write_checkpoint(tmp_path / "decoder.ckpt", decoder, steps=1234)
    second = write_release(tmp_path / "upsampler", upsampler, steps=56)
    saved = UnCLIP.load(first, upsamplers=[second]).save_pretrained(tmp_path / "saved")
    again = UnCLIP.from_pretrained(saved).save_pretrained(tmp_path / "again")
    for folder in (saved, again):
        steps = {part: release.read(folder / part).steps for part in read_parts(folder)}
        assert steps == {"decoder": 1234, "upsampler-256": 56}
    decoder._trainer = SimpleNamespace(global_step=78)  # trained in this process
    trained = UnCLIP(decoder).save_pretrained(tmp_path / "trained")
    assert release.read(trained / "decoder").steps == 78


def test_a_clip_of_ones_own_goes_with_the_model(small, tmp_path):
    shutil.copytree(EMBEDDED, tmp_path / "mine")
    clip = FrozenCLIP(CLIPConfig(f"local-dir:{tmp_path / 'mine'}"))
    model = UnCLIP(small.decoder, clip=clip)
    folder = model.save_pretrained(tmp_path / "saved", card="# mine\n")
    shutil.rmtree(tmp_path / "mine")
    moved = folder.rename(tmp_path / "moved")
    again = UnCLIP.from_pretrained(moved)
    assert again.clip.config.model == f"local-dir:{moved.resolve() / 'clip'}"
    assert (moved / "README.md").read_text() == "# mine\n"
    caption = ["a red apple"]
    torch.testing.assert_close(again.embed_text(caption), small.embed_text(caption))


def test_it_goes_to_the_hub_and_comes_back(small, hub, tmp_path):
    url = small.push_to_hub(NAME, token="hf_test", commit_message="First")
    assert url.endswith(standin.COMMIT) and hub.messages == ["First"]
    assert "decoder/model.safetensors" in hub.repositories[NAME]
    again = UnCLIP.from_pretrained(NAME, cache_dir=tmp_path / "cache", token=False)
    torch.testing.assert_close(drawn(again), drawn(small), atol=2e-2, rtol=0)
    pinned = {"cache_dir": tmp_path / "cache", "token": False, "revision": standin.COMMIT}
    assert UnCLIP.from_pretrained(NAME, **pinned).sizes == (64, 256)
    with pytest.raises(UserError, match=f"The hub has no revision v9 of {NAME}"):
        UnCLIP.from_pretrained(NAME, **(pinned | {"revision": "v9"}))
    with pytest.raises(UserError, match="The hub has no model some-org/nothing, or it is private"):
        UnCLIP.from_pretrained("some-org/nothing", **pinned)
    hub.refuses = "You may not write here."
    with pytest.raises(UserError, match="The hub refuses .*You may not write here"):
        small.push_to_hub(NAME, token="hf_test")


def test_a_model_in_the_cache_needs_no_hub(small, tmp_path):
    folder = small.save_pretrained(tmp_path / "saved")
    standin.cache_layout(tmp_path / "cache", NAME, files_of(folder))
    again = UnCLIP.from_pretrained(NAME, cache_dir=tmp_path / "cache")  # the tests are offline
    torch.testing.assert_close(drawn(again), drawn(small), atol=2e-2, rtol=0)
    with pytest.raises(UserError, match="at revision v2 is not in the cache, and the hub is not"):
        UnCLIP.from_pretrained(NAME, revision="v2", cache_dir=tmp_path / "cache")


def one_sentence(error) -> bool:
    return "\n" not in str(error.value) and str(error.value).endswith(".")


def test_what_is_no_model_is_refused_in_a_sentence(small, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="not in the cache") as error:
        UnCLIP.from_pretrained("some-org/other", cache_dir=tmp_path, local_files_only=True)
    assert one_sentence(error)
    with pytest.raises(
        UserError, match="There is no folder nowhere, and models of the hub"
    ) as error:
        UnCLIP.from_pretrained("nowhere")
    assert one_sentence(error)
    folder = small.save_pretrained(tmp_path / "saved")
    config = json.loads((folder / "config.json").read_text())
    for broken, said in (
        ({"parts": ["decoder", "../../etc"]}, "which make no model"),
        ({"parts": ["upsampler-256"]}, "which make no model"),
        ({"format": 2}, "has format 2"),
        ({"parts": 5}, "names no parts"),
        ({"parts": None}, "names no parts"),
        ({"format": "new"}, "names no parts"),
    ):
        (folder / "config.json").write_text(json.dumps(config | broken))
        with pytest.raises(UserError, match=said):
            read_parts(folder)
    with pytest.raises(UserError, match="is no whole model"):
        UnCLIP.from_pretrained(folder / "decoder")


@pytest.mark.parametrize("name", ["../mine", "-a/b", "a/b.git", "a--b/c", "", "mine", "/a/b"])
def test_names_that_the_hub_cannot_have(name, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as error:
        UnCLIP.from_pretrained(name, cache_dir=tmp_path)
    assert one_sentence(error)
    with pytest.raises(UserError) as error:
        small.push_to_hub(name, token="hf_test")
    assert one_sentence(error)


def test_a_hub_that_does_not_answer(hub, small, tmp_path):
    hub.shutdown()
    hub.server_close()
    with pytest.raises(UserError) as error:
        UnCLIP.from_pretrained(NAME, cache_dir=tmp_path)
    assert one_sentence(error)
    with pytest.raises(UserError) as error:
        small.push_to_hub(NAME, token="hf_test")
    assert one_sentence(error)
