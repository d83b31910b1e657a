"""A studio whose decoder reads captions only: it draws them, and shows no more than it can do."""

import pytest

from tests.factories import captions_decoder
from tests.studio.conftest import mask, picture
from unclip_pl.pipeline.unclip import UnCLIP
from unclip_pl.studio.engine import Engine, State
from unclip_pl.studio.models import Models
from unclip_pl.studio.requests import (
    PCA,
    Create,
    Edit,
    Inpaint,
    Interpolate,
    Typographic,
    Vary,
)
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import to_uint8


@pytest.fixture(scope="module")
def engine():
    engine = Engine(Models(UnCLIP(captions_decoder())), limit=20)
    yield engine
    engine.close()


def test_it_draws_captions_as_the_pipeline_does(engine):
    unclip = engine.models.plain
    assert engine.models.priors == ("none",)
    ticket = engine.submit(Create(captions=("an apple",), seed=4, num_images=2))
    assert ticket.wait(60) and ticket.state is State.DONE, ticket.error
    expected = unclip.generate(["an apple"] * 2, [4, 5], "caption")
    for shown, image in zip(ticket.pictures, expected, strict=True):
        assert (shown.image.int() - to_uint8(image).int()).abs().max() <= 1
    ticket = engine.submit(Create(captions=("an apple and much more of it",)))
    assert ticket.wait(60)
    assert 'longer than the decoder reads (8 tokens), cut: "' in ticket.notes[0]


def test_it_paints_captions_into_pictures(engine):
    ticket = engine.submit(Inpaint(image=picture(), mask=mask(), caption="an apple"))
    assert ticket.wait(60) and ticket.state is State.DONE, ticket.error


@pytest.mark.parametrize(
    "request_",
    [
        Vary(image=picture()),
        Interpolate(image=picture(), other=picture(seed=1)),
        Edit(image=picture(), target="a car"),
        Inpaint(image=picture(), mask=mask()),
        PCA(image=picture()),
        Typographic(image=picture(), object="apple", labels=("car",)),
    ],
    ids=lambda request: type(request).__name__,
)
def test_what_needs_an_embedding_is_refused(engine, request_):
    with pytest.raises(UserError, match="draws from captions only"):
        engine.submit(request_)


def test_the_page_has_the_tabs_that_are_of_use(engine):
    gradio = pytest.importorskip("gradio", reason='needs the extra "web"')
    from unclip_pl.studio.album import Album
    from unclip_pl.studio.page import page
    from unclip_pl.studio.restore import Restoring

    album = Album()
    try:
        blocks = page(engine, album)
    finally:
        album.close()
    tabs = [part.label for part in blocks.blocks.values() if isinstance(part, gradio.Tab)]
    assert tabs == ["Create", "Inpaint"]
    with pytest.raises(UserError, match="with a decoder that draws from embeddings"):
        Restoring({}).filled({"kind": "vary"})
    with pytest.raises(UserError, match="with upsamplers"):
        Restoring({}).filled({"kind": "upsample", "times": 4})
