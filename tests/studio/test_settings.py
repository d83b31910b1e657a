"""Settings in PNG files: written, read again, and put back into the form of their tab."""

import io
import json

import pytest
import torch
from PIL import Image, PngImagePlugin

from tests.studio.conftest import picture
from unclip_pl.studio.engine import Engine
from unclip_pl.studio.picture_files import png_file, settings_in
from unclip_pl.studio.requests import (
    PCA,
    Create,
    Edit,
    Inpaint,
    Interpolate,
    Typographic,
    Upsample,
    Vary,
    described,
    request_of,
)
from unclip_pl.utils.errors import UserError

IMAGE = torch.zeros(3, 8, 8, dtype=torch.uint8)
REQUESTS = {
    "Create": Create(captions=("fox",), seed=3, size=64, sampler="ddim", steps=7, eta=0.5),
    "Vary": Vary(image=picture(), eta=0.25, num_images=20, size=16),
    "Interpolate": Interpolate(image=picture(), other=picture(), frames=5, noise="fresh", seed=2),
    "Edit": Edit(image=picture(), source="a photo", target="fox", theta=(0.0, 0.3), steps=4),
    "Inpaint": Inpaint(image=picture(), mask=picture(), caption="fox", prior="none"),
    "Upsample": Upsample(image=picture(), seed=4),
    "Components": PCA(image=picture(), components=(1, 10), guidance_scale=2),
    "Typography": Typographic(image=picture(), object="fox", labels=("a", "b"), num_images=1),
}


def png(**texts):
    """A PNG with these texts."""
    info, file = PngImagePlugin.PngInfo(), io.BytesIO()
    for name, text in texts.items():
        info.add_text(name, text)
    Image.new("RGB", (4, 4)).save(file, "PNG", pnginfo=info)
    return file.getvalue()


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=list(REQUESTS))
def test_a_png_holds_the_request_but_for_its_pictures(request_):
    settings = settings_in(png_file(IMAGE, request_, "fox", request_.seed))
    assert described(request_of(settings)) == described(request_)


def test_an_emptied_text_is_kept_where_it_means_something():
    edit = Edit(image=picture(), source="", target="fox")
    assert described(edit)["source"] == ""
    assert request_of(settings_in(png_file(IMAGE, edit, "fox", 0))).source == ""


def test_what_generate_wrote_has_caption_seed_and_condition():
    unclip = "generate, condition caption, prior None None, decoder of the package x"
    found = settings_in(png(prompt="fox", seed="5", unclip=unclip))
    assert found == {"kind": "create", "captions": ["fox"], "seed": 5, "prior": "none"}
    with pytest.raises(UserError, match="made by `unclip vary`"):
        settings_in(png(source="a.png", seed="5", unclip="vary, eta 0.5"))


HOSTILE = {
    "a number": "5",
    "a deep one": "[" * 100_000,
    "broken": "{",
    "no kind": "{}",
    "a kind of another type": '{"kind": ["create"], "captions": ["a"]}',
    "not for users": '{"kind": "useweights", "run": "/etc"}',
    "another type": '{"kind": "create", "captions": {"a": 1}}',
    "unknown": '{"kind": "create", "captions": ["a"], "path": "/etc/passwd"}',
    "too many": '{"kind": "create", "captions": ["a"], "num_images": 1000000}',
    "not a number": '{"kind": "vary", "guidance_scale": NaN}',
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=list(HOSTILE))
def test_what_cannot_be_settings_is_refused_in_a_sentence(text):
    with pytest.raises(UserError) as refused:
        request_of(settings_in(png(studio=text)))
    assert "\n" not in str(refused.value)


@pytest.fixture(scope="module")
def restoring(models):
    gr = pytest.importorskip("gradio", reason='needs the extra "web"')
    from unclip_pl.studio.page import TABS
    from unclip_pl.studio.restore import Restoring

    engine = Engine(models)
    with gr.Blocks():
        restoring = Restoring({name: make(engine) for name, make in TABS.items()})
    yield restoring
    engine.close()


def plain(value):
    """What an update shows."""
    return value.get("value") if isinstance(value, dict) else value


@pytest.mark.parametrize("name", REQUESTS)
def test_settings_fill_the_tab_that_made_them(restoring, name):
    from unclip_pl.studio.inputs import Painted

    request, painted = REQUESTS[name], Painted(picture(), picture())
    said, opened, *values = restoring.filled(described(request))
    assert f"The settings are in {name}." in said and opened.selected == name
    start = 0
    for other, tab in restoring.made.items():
        fields = list(tab.form.fields)
        own = dict(zip(fields, values[start : start + len(fields)], strict=True))
        start += len(fields)
        if other != name:
            assert all(plain(value) is None for value in own.values())
            continue
        given = {"image": picture(), "other": picture(), "painted": painted}
        filled = [given.get(field) or plain(value) for field, value in own.items()]
        again = described(tab.form.request(filled))
        assert described(request).items() <= again.items()


def test_settings_without_a_field_are_named(restoring):
    said, *_ = restoring.filled({"kind": "create", "captions": ["fox"], "prior_sampler": "ddim"})
    assert "prior_sampler" in said


def test_settings_for_another_studio_are_refused(restoring):
    settings = described(Create(captions=("fox",), size=1024))
    with pytest.raises(UserError, match="1024 pixels"):
        restoring.filled(json.loads(json.dumps(settings)))
