"""One model for many: places, equal settings together, previews, cancelling, failures, the end."""

import base64
import dataclasses
import threading
import time

import pytest
import torch

from tests.studio.conftest import mask, picture, principal
from unclip_pl.studio import engine as rooms
from unclip_pl.studio.engine import Engine, QueueFull, State
from unclip_pl.studio.picture_files import from_base64, read_picture
from unclip_pl.studio.requests import (
    PCA,
    Create,
    Edit,
    Inpaint,
    Interpolate,
    Typographic,
    Upsample,
    Vary,
)
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import png_bytes, to_uint8

QUICK = {"prior_steps": 2, "steps": 2}


def drawn(engine, request):
    ticket = engine.submit(request)
    assert ticket.wait(60)
    assert ticket.state is State.DONE, ticket.error
    return ticket


def until(true):
    """Wait for what another thread does."""
    end = time.monotonic() + 60
    while not true():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture
def held(engine, monkeypatch):
    """An engine that draws nothing until the event is set; what it was given to draw together."""
    go, batches, real = threading.Event(), [], rooms.draw

    def draw(models, requests, tell):
        batches.append(list(requests))
        while not go.wait(0.01):
            tell("held", 0, 1)
        return real(models, requests, tell)

    monkeypatch.setattr(rooms, "draw", draw)
    return go, batches


def test_each_picture_equals_that_of_the_pipeline_whatever_its_company(engine, models, held):
    go, batches = held
    tickets = [engine.submit(Create(captions=("wait",), seed=99, **QUICK))]
    captions = ["red heart", "green apple", "fox"]
    for k, caption in enumerate(captions):
        tickets.append(
            engine.submit(Create(captions=(caption,), seed=5 * k, num_images=2, **QUICK))
        )
    tickets.append(engine.submit(Create(captions=("red heart",), steps=3, prior_steps=2)))
    go.set()
    assert all(ticket.wait(60) for ticket in tickets)
    # the first was being drawn already, or waited with the three of equal settings
    assert [len(batch) for batch in batches] in ([1, 3, 1], [4, 1])
    unclip = models.with_prior["diffusion"]
    for k, caption in enumerate(captions):
        request = tickets[k + 1].request
        for n, shown in enumerate(tickets[k + 1].pictures):
            alone = unclip.generate(
                [caption],
                [5 * k + n],
                size=16,
                prior_sampling=models.prior_sampling(request),
                sampling=models.sampling(request),
            )
            assert (shown.label, shown.seed) == (caption, 5 * k + n)
            # a matrix product of another height is rounded otherwise: one level of 255
            difference = shown.image.int() - to_uint8(alone[0]).int()
            assert difference.abs().max() <= 1


def test_places_and_the_limit(models, held, engine):
    go, _ = held
    first = engine.submit(Create(captions=("a",), steps=1))
    until(lambda: first.state is State.DRAWING)
    waiting = [engine.submit(Create(captions=("a",), steps=2 + k)) for k in range(engine.limit)]
    assert [engine.place(ticket) for ticket in (first, *waiting[:3])] == [0, 1, 2, 3]
    with pytest.raises(QueueFull, match="20 requests are waiting"):
        engine.submit(Create(captions=("b",)))
    engine.cancel(waiting[0])
    assert waiting[0].state is State.CANCELLED and engine.place(waiting[1]) == 1
    for ticket in waiting[2:]:
        engine.cancel(ticket)
    go.set()
    assert waiting[1].wait(60) and waiting[1].state is State.DONE
    assert first.wait(60)
    until(lambda: engine.load() == (0, 0))


def test_previews_come_while_it_draws(engine, monkeypatch):
    monkeypatch.setattr(rooms, "PREVIEW_SECONDS", 0.0)
    seen = []
    monkeypatch.setattr(
        rooms.Ticket,
        "__setattr__",
        lambda self, name, value: (
            seen.append(value) if name == "preview" and value is not None else None,
            object.__setattr__(self, name, value),
        )[1],
    )
    ticket = drawn(engine, Create(captions=("red heart",), num_images=3, steps=6, prior_steps=2))
    assert len(seen) == 6 and all(preview.shape == (3, 3, 16, 16) for preview in seen)
    assert seen[-1].equal(torch.stack([picture.image for picture in ticket.pictures]))
    assert not seen[0].equal(seen[-1])
    assert engine.models.plain.decoder.watch is None


def test_a_drawing_that_nobody_wants_ends_at_the_next_step(engine):
    ticket = engine.submit(Create(captions=("red heart",), num_images=16, steps=1000))
    until(lambda: ticket.preview is not None)
    engine.cancel(ticket)
    assert ticket.state is State.CANCELLED and ticket.preview is None
    assert drawn(
        engine, Create(captions=("fox",), **QUICK)
    ).pictures  # does not wait for 1000 steps


def test_cancelling_one_of_a_batch_leaves_the_others(engine, held):
    go, batches = held
    block = engine.submit(Create(captions=("a",), steps=1, prior_steps=2))
    until(lambda: batches)
    pair = [engine.submit(Create(captions=(c,), **QUICK), owner=c) for c in ("fox", "cat")]
    engine.cancel(block)
    until(lambda: len(batches) == 2)
    engine.cancel_all("fox")
    go.set()
    assert pair[1].wait(60)
    assert [ticket.state for ticket in pair] == [State.CANCELLED, State.DONE]


def test_a_failure_is_one_sentence_and_of_one_request_only(engine, held, monkeypatch, caplog):
    go, batches = held
    tickets = [engine.submit(Create(captions=("a",), steps=1, prior_steps=2))]
    until(lambda: batches)
    tickets += [engine.submit(Create(captions=(c,), **QUICK)) for c in ("fox", "bad", "cat")]
    real = rooms.draw

    def draw(models, requests, tell):
        if any("bad" in request.captions for request in requests):
            raise ValueError("a tensor of /secret/path")
        return real(models, requests, tell)

    monkeypatch.setattr(rooms, "draw", draw)
    go.set()
    assert all(ticket.wait(60) for ticket in tickets)
    assert [t.state for t in tickets[1:]] == [State.DONE, State.FAILED, State.DONE]
    assert tickets[2].error == "The studio could not draw this (ValueError): its log says more."
    assert "/secret/path" in caplog.text


def test_memory_that_is_missing_is_said_so():
    assert "too little memory" in rooms.sentence(torch.OutOfMemoryError("CUDA out of memory"))
    assert rooms.sentence(UserError("Give another.")) == "Give another."


def test_closing_cancels_what_is_there_and_ends_the_thread(models):
    engine = Engine(models)
    tickets = [
        engine.submit(Create(captions=("a",), steps=1000 - k, num_images=16)) for k in range(3)
    ]
    engine.close(30)
    assert all(ticket.state is State.CANCELLED for ticket in tickets)
    assert not engine._thread.is_alive()
    with pytest.raises(UserError, match="is being closed"):
        engine.submit(Create(captions=("a",)))


WAYS = {
    "vary": (Vary(image=picture(), num_images=2, steps=2), 2, 16),
    "vary around": (Vary(image=picture(), num_images=2, steps=2, eta=0.5, caption="a"), 2, 16),
    "interpolate": (Interpolate(image=picture(), other=picture(seed=1), frames=3, steps=2), 3, 16),
    "interpolate afresh": (
        Interpolate(image=picture(), other=picture(seed=1), frames=3, steps=2, noise="fresh"),
        3,
        16,
    ),
    "edit": (Edit(image=picture(), target="red heart", theta=(0, 0.5), steps=2, size=64), 2, 64),
    "inpaint": (
        Inpaint(image=picture(), mask=mask(), caption="fox", num_images=2, **QUICK),
        2,
        16,
    ),
    "inpaint what is there": (Inpaint(image=picture(), mask=mask(), num_images=1, steps=2), 1, 16),
    "upsample": (Upsample(image=picture(20)), 1, 80),
    "pca": (PCA(image=picture(), components=(1, 200, 256), steps=2), 3, 16),
}


@pytest.mark.parametrize("name", WAYS)
def test_every_manipulation_draws(engine, monkeypatch, name):
    request, count, side = WAYS[name]
    if isinstance(request, PCA):
        monkeypatch.setitem(engine.models.__dict__, "components", principal())
    ticket = drawn(engine, request)
    assert [tuple(shown.image.shape) for shown in ticket.pictures] == [(3, side, side)] * count
    assert all(shown.image.dtype == torch.uint8 and shown.label for shown in ticket.pictures)


def test_the_typographic_attack_says_what_clip_sees(engine):
    request = Typographic(image=picture(), object="red heart", labels=("fox",), num_images=1)
    ticket = drawn(engine, dataclasses.replace(request, steps=2))
    assert [shown.label for shown in ticket.pictures] == [
        "seen: no label",
        "no label, seed 0",
        "seen: fox",
        "fox, seed 0",
    ]
    assert len(ticket.notes) == 4 and "red heart" in ticket.notes[0] and "%" in ticket.notes[0]


def test_inpainting_keeps_what_is_not_asked_for_to_the_pixel(engine):
    request = Inpaint(image=picture(16), mask=mask(16), num_images=1, steps=2)
    shown = drawn(engine, request).pictures[0].image
    given = to_uint8(read_picture(from_base64(picture(16))))
    assert shown[:, :, 8:].equal(given[:, :, 8:])
    assert not shown[:, :, :8].equal(given[:, :, :8])


BLACK = base64.b64encode(png_bytes(torch.full((3, 40, 40), -1.0))).decode()
BAD = {
    "no caption": (lambda: Create(captions=(" ",)), "caption is empty"),
    "none at all": (lambda: Create(captions=()), "There is no caption"),
    "too many": (lambda: Create(captions=("a", "b"), num_images=50), "100 pictures are asked for"),
    "a novel": (lambda: Create(captions=("a" * 2000,)), "has 2000 characters"),
    "steps": (lambda: Create(captions=("a",), steps=0), "steps is 0"),
    "nan": (lambda: Create(captions=("a",), guidance_scale=float("nan")), "guidance_scale is nan"),
    "seed": (lambda: Create(captions=("a",), seed=-1), "seed is -1"),
    "prior": (lambda: Create(captions=("a",), prior="best"), 'no prior "best"'),
    "prior setting": (
        lambda: Create(captions=("a",), prior="ar", prior_steps=3),
        "no setting of the ARPrior",
    ),
    "size": (lambda: Create(captions=("a",), size=100), "draws 16 or 64"),
    "eta": (lambda: Create(captions=("a",), sampler="ddpm", eta=0.5), "for the sampler ddim"),
    "no picture": (lambda: Vary(image="AAAA"), "no picture that can be read"),
    "not base64": (lambda: Vary(image="?"), "not in base64"),
    "same": (lambda: Edit(image=picture(), source="a", target="a"), "no change"),
    "theta": (lambda: Edit(image=picture(), target="a", theta=(2.0,)), "theta is 2"),
    "mask": (lambda: Inpaint(image=picture(), mask=mask(20)), "The mask is 20 x 20 pixels"),
    "no mask": (lambda: Inpaint(image=picture(), mask=BLACK), "must have white"),
    "times": (lambda: Upsample(image=picture(), times=16), "no upsamplers that make pictures 16"),
    "large": (lambda: Upsample(image=picture(100)), "at most 128 per side"),
    "twice": (
        lambda: Typographic(image=picture(), object="a", labels=("A",)),
        "A caption comes twice",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_drawn_is_refused_with_a_sentence(engine, name):
    make, words = BAD[name]
    with pytest.raises(UserError) as told:
        engine.submit(make())
    assert words in str(told.value) and str(told.value).endswith(".")
