"""The studio for programs: jobs over HTTP, described at /api/docs.

A POST puts a request into the queue and answers with a job. The job says where it is and, when it
is done, where its pictures are.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi_offline import FastAPIOffline
from pydantic import BaseModel, Field

from unclip_pl import __version__
from unclip_pl.studio.drawing import ROWS
from unclip_pl.studio.engine import Engine, QueueFull, State, Ticket
from unclip_pl.studio.jobs import Jobs, NoSuchJob
from unclip_pl.studio.picture_files import as_pil, png_file, settings_of
from unclip_pl.studio.requests import KINDS
from unclip_pl.utils.errors import UserError
from unclip_pl.utils.images import png_bytes
from unclip_pl.utils.options import SAMPLERS

POLL_SECONDS = 0.02
CODES = {QueueFull: 429, NoSuchJob: 404}
"""Of sentences; of all others 400."""


class Picture(BaseModel):
    """One that was drawn."""

    url: str
    label: str = Field(description="what it shows among the others: a caption, a theta ...")
    seed: int
    settings: dict[str, Any] = Field(description="also in the PNG, as its text `studio`")


class Job(BaseModel):
    """A request on its way."""

    id: str
    state: State
    place: int = Field(description="in the queue, 1 is drawn next; 0: it waits no more")
    stage: str = Field(description="what it is at: prior, decoder, upsampler 256 ...")
    step: int
    steps: int
    preview: str | None = Field(description="where its x0 can be seen while it is drawn")
    pictures: list[Picture]
    notes: list[str] = Field(description="what there is to say of the pictures")
    seconds: dict[str, float] = Field(description="that it waited, and was at each stage, so far")
    seconds_to_preview: float | None = Field(description="from its POST to its first x0")
    error: str = Field(description="of a failed one: what went wrong, in a sentence")


class Studio(BaseModel):
    """What this studio draws with, and how busy it is."""

    version: str
    sizes: list[int]
    priors: list[str]
    samplers: list[str]
    steps: Any = Field(description="the decoder's own")
    guidance_scale: float = Field(description="the decoder's own")
    rows: int = Field(description="pictures that are drawn at a time")
    weights: str = Field(description="which weights everything is drawn with now")
    waiting: int
    drawing: int
    limit: int = Field(description="requests that may wait")


def api(engine: Engine, jobs: Jobs) -> FastAPI:
    """The API as an application of its own, to be mounted at /api."""
    app = FastAPIOffline(
        title="unCLIP studio",
        version=__version__,
        description=__doc__,
        redoc_url=None,
        static_url="/static",
    )

    def described(name: str, ticket: Ticket, request: Request) -> Job:
        here = f"{request.scope.get('root_path', '')}/jobs/{name}"
        asked = ticket.request
        pictures = [
            Picture(
                url=f"{here}/pictures/{k}",
                label=shown.label,
                seed=shown.seed,
                settings=settings_of(asked, shown.label, shown.seed),
            )
            for k, shown in enumerate(ticket.pictures)
        ]
        return Job(
            id=name,
            state=ticket.state,
            place=engine.place(ticket),
            stage=ticket.stage,
            step=ticket.step,
            steps=ticket.steps,
            preview=None if ticket.preview is None else f"{here}/preview",
            pictures=pictures,
            notes=ticket.notes,
            seconds=dict(ticket.seconds),
            seconds_to_preview=ticket.seconds_to_preview,
            error=ticket.error,
        )

    def submits(kind: type) -> Callable[..., Job]:
        def submit(body: Any, request: Request) -> Job:
            ticket = engine.submit(body)
            return described(jobs.add(ticket), ticket, request)

        submit.__annotations__["body"] = kind
        submit.__doc__ = kind.__doc__
        return submit

    for name, kind in KINDS.items():
        route = app.post(f"/{name}", status_code=202, response_model=Job, name=name)
        route(submits(kind))

    @app.get("/studio")
    def studio() -> Studio:
        """What this studio draws with, and how busy it is."""
        own = engine.models.plain.decoder.sampling
        waiting, drawing = engine.load()
        return Studio(
            version=__version__,
            sizes=list(engine.models.sizes),
            priors=list(engine.models.priors),
            samplers=list(SAMPLERS),
            steps=own.steps,
            guidance_scale=own.guidance_scale,
            rows=ROWS,
            weights=engine.models.standing(),
            waiting=waiting,
            drawing=drawing,
            limit=engine.limit,
        )

    @app.get("/jobs/{name}")
    async def job(
        name: str, request: Request, wait: Annotated[float, Query(ge=0, le=30)] = 0
    ) -> Job:
        """A job; with `wait`, when it has ended or after so many seconds."""
        ticket, end = jobs.get(name), time.monotonic() + wait
        while not ticket.ended and time.monotonic() < end:
            await asyncio.sleep(POLL_SECONDS)
        return described(name, ticket, request)

    @app.get("/jobs/{name}/pictures/{number}", response_class=Response, responses=PNG)
    def picture(name: str, number: int) -> Response:
        """A drawn picture as a PNG, with its settings in it."""
        ticket = jobs.get(name)
        if not 0 <= number < len(ticket.pictures):
            raise NoSuchJob(f"The job has {len(ticket.pictures)} pictures, counted from 0.")
        shown = ticket.pictures[number]
        data = png_file(shown.image, ticket.request, shown.label, shown.seed)
        return Response(data, media_type="image/png")

    @app.get("/jobs/{name}/preview", response_class=Response, responses=PNG)
    def preview(name: str) -> Response:
        """x0 as it was last seen, all pictures side by side."""
        shown = jobs.get(name).preview
        if shown is None:
            raise NoSuchJob("There is no preview: the job is not being drawn.")
        row = shown.permute(1, 2, 0, 3).flatten(2)
        return Response(png_bytes(as_pil(row)), media_type="image/png")

    @app.delete("/jobs/{name}", status_code=204)
    def cancel(name: str) -> None:
        """Nobody wants it any more; a job that has ended stays as it is."""
        engine.cancel(jobs.get(name))

    @app.exception_handler(UserError)
    async def sentence(_: Request, error: UserError) -> JSONResponse:
        code = CODES.get(type(error), 400)
        headers = {"Retry-After": "10"} if code == 429 else None
        return JSONResponse({"detail": str(error)}, code, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"][1:])) or "the body"
        return JSONResponse({"detail": f"{where}: {first['msg']}; see /api/docs."}, 422)

    return app


PNG: dict[int | str, dict[str, Any]] = {200: {"content": {"image/png": {}}}}
